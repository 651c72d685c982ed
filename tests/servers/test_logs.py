"""Tokens don't appear in what servers log, though clients send them in the query."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from fastapi_channels.testing.server import free_port
from tests.brokers import poll

SECRET = "c2VjcmV0IG9mIGFubg"
WRONG = "d3JvbmcgYnV0IHNlY3JldA"

APP = """
from fastapi import FastAPI
from fastapi_channels import add_channel
from fastapi_channels.authentication import TokenAuthentication, User
from fastapi_channels.consumers import ActionConsumer
from fastapi_channels.exceptions import AuthenticationFailed
from fastapi_channels.routing import ConsumerRouter, route

class Tokens(TokenAuthentication):
    async def user_of(self, token, websocket):
        if token != "c2VjcmV0IG9mIGFubg":
            raise AuthenticationFailed("the token is not valid")
        return User("ann"), None

class Room(ActionConsumer):
    authentication_classes = [Tokens]

app = FastAPI()
add_channel(app, query_token_key="token")
app.include_router(ConsumerRouter([route("/ws", Room)]))

@app.get("/page")
async def page() -> int:
    return 1
"""

#: What every combined log has, with the query that isn't in hypercorn's own.
FORMAT = '%(h)s "%(R)s" "%(q)s" %(s)s "%(f)s"'

COMMANDS = {
    "uvicorn websockets-sansio": ["uvicorn", "served:app", "--port", "{port}", "--ws", "websockets-sansio"],
    "uvicorn websockets": ["uvicorn", "served:app", "--port", "{port}", "--ws", "websockets"],
    "uvicorn wsproto": ["uvicorn", "served:app", "--port", "{port}", "--ws", "wsproto"],
    "uvicorn debug": ["uvicorn", "served:app", "--port", "{port}", "--log-level", "debug"],
    "hypercorn": ["hypercorn", "served:app", "--bind", "127.0.0.1:{port}", "--access-logfile", "-"],
    "hypercorn with queries": [
        *("hypercorn", "served:app", "--bind", "127.0.0.1:{port}"),
        *("--access-logfile", "-", "--access-logformat", FORMAT),
    ],
    "gunicorn": [
        *("gunicorn", "served:app", "--bind", "127.0.0.1:{port}", "--worker-class", "uvicorn.workers.UvicornWorker"),
        *("--access-logfile", "-"),
    ],
}


@pytest.fixture(params=COMMANDS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int, subprocess.Popen[str]]]:
    """A server in a process of its own: what it is, its port, and the process, whose output can be read at its end."""
    port = free_port()
    (tmp_path / "served.py").write_text(APP)
    command = [part.format(port=port) for part in COMMANDS[request.param]]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield request.param, port, process
        finally:
            process.kill()


def is_up(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/page").status_code == 200
    return False


def test_no_token_in_the_log(served: tuple[str, int, subprocess.Popen[str]]) -> None:
    """Of a token in the query the log of every server says `[token]`, on HTTP and WebSockets, let in or refused."""
    name, port, process = served
    poll(lambda: is_up(port), f"{name} answers")
    referer = {"referer": f"http://127.0.0.1/page?token={SECRET}"}
    for query in (f"x=1&token={SECRET}&y=2", f"%74oken={SECRET}", f"token={SECRET}'\"x"):
        assert httpx.get(f"http://127.0.0.1:{port}/page?{query}", headers=referer).status_code == 200
    with connect(f"ws://127.0.0.1:{port}/ws?token={SECRET}&x=1", proxy=None):
        pass
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{port}/ws?x=1&token={WRONG}", proxy=None)
    process.terminate()
    log, _ = process.communicate(timeout=30)
    assert "/page" in log
    for secret in (SECRET, WRONG):
        assert secret not in log
    assert "Traceback" not in log
    if name != "hypercorn":  # which logs no query by default
        assert "x=1&token=[token]&y=2" in log
        assert "/ws?x=1&token=[token]" in log
