"""What the tests share: the event loop they run on, an application, and a real server."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from fastapi_channels import add_channel
from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.routing import ConsumerRouter, route


def app_with(*consumers: type[WebSocketConsumer], **options: Any) -> FastAPI:
    """An application with the first consumer at `/ws`, and each at `/` and its name; `options` are settings."""
    app = FastAPI()
    add_channel(app, **options)
    paths = ["/ws", *(f"/{consumer.__name__}" for consumer in consumers)]
    app.include_router(ConsumerRouter([route(*entry) for entry in zip(paths, (consumers[0], *consumers), strict=True)]))
    return app


#: Keys that are easily taken for one another, or mean something to a broker.
ODD_KEYS = [
    "",
    " ",
    "a",
    "A",
    "user:7",
    "user:{7}",
    "}{",
    "a\x00b",
    "a\r\nFLUSHALL\r\n",
    "日本語 ✓",
    "e\u0301",
    "é",
    "\ud800",
    "\U0001f600",
    "*",
    "x" * 100_000,
]


async def until(is_so: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for what nobody tells of.

    Raises:
        TimeoutError: It is not so within `timeout` seconds.
    """
    for _ in range(round(timeout / 0.005)):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


async def asked_until(is_so: Callable[[], Awaitable[Any]]) -> None:
    """Ask again and again, until it is so.

    Raises:
        TimeoutError: It was not so a thousand times.
    """
    for _ in range(1000):
        if await is_so():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def install(directory: Path, requirement: str) -> None:
    """Install one package, without what it needs, into a directory of its own, unless it is there."""
    made = directory / "made"
    if made.exists() and made.read_text() == requirement:
        return
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--upgrade", "--target", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        if os.environ.get("CI"):
            pytest.fail(done.stderr)
        pytest.skip(f"{requirement} can't be installed")
    made.write_text(requirement)


@pytest.fixture(scope="session")
def limiter_01(request: pytest.FixtureRequest) -> Path:
    """A directory with fastapi-limiter 0.1.6, to be first on PYTHONPATH."""
    cache = request.config.cache
    assert cache is not None
    directory = cache.mkdir("fastapi-limiter-0.1.6")
    install(directory, "fastapi-limiter==0.1.6")
    return directory


@dataclass(frozen=True)
class Served:
    """An application under uvicorn, in the test's own event loop."""

    url: str
    port: int
    server: uvicorn.Server
    task: asyncio.Task[None]

    async def stop(self) -> None:
        """End the server as a signal would."""
        self.server.should_exit = True
        await self.task


Serve = Callable[..., Awaitable[Served]]

Forward = Callable[[float], None]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start uvicorn with an application on a free port, and end it after the test."""
    started: list[Served] = []

    async def start(app: Any, **settings: Any) -> Served:
        settings = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 5, **settings}
        server = uvicorn.Server(uvicorn.Config(app, **settings))
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or task.done())
        assert server.started, "the application did not start"
        started.append(Served(f"ws://127.0.0.1:{port}", port, server, task))
        return started[-1]

    yield start
    for served in started:
        await served.stop()


@pytest.fixture
async def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Put the event loop's clock forward by some seconds: `forward(60)`."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, 0.0

    def put_forward(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    return put_forward
