"""What the applications of the page need: a server."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import httpx
import pytest

from fastapi_channels.testing.server import Watched, free_port

ROOT = Path(__file__).parent.parent.parent

#: Starts an application of a folder; gives its port and what it has written.
Start = Callable[..., Awaitable[tuple[int, Watched]]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start uvicorn with an application that is in a file of the test's folder."""
    async with AsyncExitStack() as stack:

        async def start(target: str, *paths: Path) -> tuple[int, Watched]:
            port = free_port()
            places = [str(path) for path in (*paths, tmp_path, ROOT)]
            command = ["env", f"PYTHONPATH={os.pathsep.join(places)}", sys.executable, "-m", "uvicorn", target]
            home = tmp_path / target.partition(":")[0]
            home.mkdir()
            server = Watched([*command, "--port", str(port)], directory=home)
            stack.callback(server.stop)
            async with httpx.AsyncClient() as client:
                with anyio.fail_after(30):
                    while True:
                        try:
                            await client.get(f"http://127.0.0.1:{port}/nothing")
                            return port, server
                        except httpx.TransportError:
                            assert server.is_running, server.output()
                            await anyio.sleep(0.05)

        yield start
