"""Servers in processes of their own, which the tests of this folder share."""

import re
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastapi_channels.testing.server import Watched, free_port
from tests.brokers import poll
from tests.servers.client import DEADLINE, Server

ROOT = Path(__file__).parents[2]

APP = "tests.servers.guarded:app"

#: uvicorn with each of its WebSocket implementations. It believes no forwarding headers by itself.
UVICORNS = {
    f"uvicorn {ws}": ["uvicorn", APP, "--port", "{port}", "--no-proxy-headers", "--ws", ws]
    for ws in ("websockets-sansio", "websockets", "wsproto")
}

COMMANDS = {**UVICORNS, "hypercorn": ["hypercorn", APP, "--bind", "127.0.0.1:{port}", "--access-logfile", "-"]}

#: What must not be in the log of a server whose application is in order.
COMPLAINTS = re.compile(r"Traceback|ERROR|was destroyed|never retrieved|never awaited|ResourceWarning")

Start = Callable[[str], tuple[int, Watched]]


@pytest.fixture(scope="session")
def start_guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start the application of `guarded.py` under a server, once in all the tests; it must not complain of anything."""
    started: dict[str, tuple[int, Watched]] = {}
    with ExitStack() as ending:

        def start(name: str) -> tuple[int, Watched]:
            if name not in started:
                port = free_port()
                command = [part.format(port=port) for part in COMMANDS[name]]
                environment = [f"PYTHONPATH={ROOT}", "PYTHONWARNINGS=always::ResourceWarning"]
                process = Watched(
                    ["env", *environment, sys.executable, "-m", *command],
                    directory=tmp_path_factory.mktemp("guarded"),
                    orphan_signal="TERM",
                )
                ending.callback(process.stop, timeout=DEADLINE)
                started[name] = port, process
                poll(lambda: not process.is_running or _listens(port), f"{name} listens")
                assert process.is_running, process.output()
            return started[name]

        yield start
        for name in UVICORNS.keys() & started.keys():  # others complain of clients that come to them wrongly
            _, process = started[name]
            assert not COMPLAINTS.search(process.output()), process.output()


def _listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port)):
        return True


@pytest.fixture
async def server(request: pytest.FixtureRequest, start_guarded: Start) -> AsyncIterator[Server]:
    """The server that a test asks for by its name, with `parametrize(..., indirect=True)`."""
    name: Any = request.param
    port, process = start_guarded(name)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE, verify=False) as http:
        yield Server(name, port, process, http)
