"""The servers that are measured: each a process of its own, asked and watched from here."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from benchmarks.load import HOST, LoadError

ROOT = Path(__file__).resolve().parent.parent
SERVERS = "benchmarks.servers:app"
CONSUMERS = "benchmarks.consumers:app"
UVICORN = (
    "--loop uvloop --ws auto --ws-per-message-deflate false --ws-ping-interval 0 --no-access-log --log-level warning"
)


class Server:
    """A uvicorn process that serves one of the applications.

    Args:
        app: Which one, as uvicorn takes it.
        layer: The URL of its channel layer; the default one if it is empty.
    """

    def __init__(self, app: str, layer: str = "") -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", app, "--host", HOST, "--port", str(self.port), *UVICORN.split()]
        settings = ("CHANNELS_", "FASTAPI_CHANNELS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        if layer:
            environment["CHANNELS_CHANNEL_LAYERS"] = json.dumps({"default": layer})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        self._memory = psutil.Process(self._process.pid)

    async def started(self, timeout: float = 30) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self.usage()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise LoadError("The server did not start") from None
                await asyncio.sleep(0.1)
            else:
                return

    async def usage(self, *, collect: bool = False) -> dict[str, Any]:
        """Ask for `servers.Usage`."""
        usage: dict[str, Any] = await self._request("GET", "/usage", collect=collect)
        return usage

    async def publish(self, numbers: range, *, size: int, pause: float) -> None:
        """Let the server publish the messages of these numbers."""
        await self._request("POST", "/publish", first=numbers.start, count=len(numbers), size=size, pause=pause)

    async def cpu_of(self, work: Awaitable[object]) -> float:
        """Do the work, and return the CPU seconds the server spent meanwhile."""
        return await cpu_of([self], work)

    async def join(self, groups: int) -> None:
        """Let the server join that many groups of which nothing is heard."""
        await self._request("POST", "/join", groups=groups)

    async def health(self) -> dict[str, Any]:
        """Ask for `consumers.LayerHealth`."""
        health: dict[str, Any] = await self._request("GET", "/health")
        return health

    def resident(self) -> int:
        """Return the resident memory of the process in bytes."""
        return int(self._memory.memory_info().rss)

    def stop(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def _request(self, method: str, path: str, **query: object) -> Any:
        return await asyncio.to_thread(self._blocking_request, method, f"{path}?{urlencode(query)}")

    def _blocking_request(self, method: str, target: str) -> Any:
        connection = HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise LoadError(f"{method} {target}: {response.status} {body[:500]!r}")
        return json.loads(body)


async def cpu_of(servers: Sequence[Server], work: Awaitable[object]) -> float:
    """Do the work, and return the CPU seconds that these servers spent meanwhile, all together."""
    before = [(await server.usage())["cpu"] for server in servers]
    await work
    after = [(await server.usage())["cpu"] for server in servers]
    return float(sum(after) - sum(before))


@asynccontextmanager
async def serving(app: str, layer: str = "") -> AsyncIterator[Server]:
    """Run a server for the length of the block."""
    async with serving_all(app, [layer]) as (server,):
        yield server


@asynccontextmanager
async def serving_all(app: str, layers: Sequence[str]) -> AsyncIterator[list[Server]]:
    """Run a server on each of these layers for the length of the block."""
    servers: list[Server] = []
    try:
        for layer in layers:
            servers.append(Server(app, layer))
        for server in servers:
            await server.started()
        yield servers
    finally:
        for server in servers:
            server.stop()
