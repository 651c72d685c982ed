"""What the tests of the examples share: servers in processes of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from tests.examples.server import Server, StartServer


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    servers: list[Server] = []

    async def start(app: str, port: int = 0) -> Server:
        server = await Server.start(app, port)
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
