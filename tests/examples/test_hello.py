"""The app of the README, on a real server, and the README itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from websockets.asyncio.client import ClientConnection, connect

from tests.examples.server import StartServer

ROOT = Path(__file__).parents[2]


async def receive(connection: ClientConnection) -> object:
    return json.loads(await connection.recv())


async def test_hello(start_server: StartServer) -> None:
    """What a client says and what a view announces reaches everybody in the room, and nobody else."""
    server = await start_server("examples.hello:app")
    url = server.url.replace("http", "ws")
    lobby, kitchen = f"{url}/ws/lobby", f"{url}/ws/kitchen"
    async with (
        httpx.AsyncClient(base_url=server.url) as client,
        connect(lobby) as ada,
        connect(lobby) as bob,
        connect(kitchen) as cook,
    ):
        await ada.send(json.dumps({"action": "say", "data": "hello"}))
        said = {"type": "chat.message", "text": "hello"}
        assert await receive(ada) == await receive(bob) == said

        response = await client.post("/rooms/lobby/announce", params={"text": "closing time"})
        assert response.status_code == 200
        announced = {"type": "chat.message", "text": "closing time"}
        assert await receive(ada) == await receive(bob) == announced

        await cook.send(json.dumps({"action": "say", "data": "soup"}))
        assert await receive(cook) == {"type": "chat.message", "text": "soup"}


def test_readme() -> None:
    """The README's example is the file that the tests run."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks == [(ROOT / "examples" / "hello.py").read_text()]
