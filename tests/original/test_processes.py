"""A channel of two processes that share a Redis."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from fastapi_channels.testing.server import Watched

Start = Callable[..., Awaitable[tuple[int, Watched]]]

APPLICATION = """
from fastapi import FastAPI, WebSocket

from fastapi_channels import add_channel
from fastapi_channels.channels import Channel
from fastapi_channels.decorators import action
from fastapi_channels.throttling import limiter


class Chat(Channel):
    channel = "chat"

    @limiter(times=2, hours=1)
    @action()
    async def say(self, websocket: WebSocket, channel: str, data: dict):
        await self.broadcast_to_channel(channel, data["text"])

    @action()
    async def count(self, channel: str):
        return await self.get_connection_count(channel)


app = FastAPI()
add_channel(app, url="URL", limiter_url="URL")
chat = Chat()


@app.websocket("/")
async def endpoint(websocket: WebSocket):
    await chat.connect(websocket)
"""


async def test_broadcasts_and_limits_of_two_processes(start: Start, tmp_path: Path, redis_url: str) -> None:
    """What is said in one process is heard in the other, and what is limited is counted together."""
    ports = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(APPLICATION.replace("URL", redis_url))
        ports.append((await start(f"{name}:app"))[0])
    async with connect(f"ws://127.0.0.1:{ports[0]}/") as one, connect(f"ws://127.0.0.1:{ports[1]}/") as two:
        for client, text in ((one, "from one"), (two, "from two")):
            await heard(client, text)
            assert await one.recv() == await two.recv() == f'"{text}"'
        for client in (one, two):
            await heard(client, "too much")
            assert "Too Many Requests. Retry after" in str(await client.recv())


async def test_a_number_of_connections_of_two_processes(start: Start, tmp_path: Path, redis_url: str) -> None:
    """22: `max_connection` holds over both processes, and who has left makes room; the counts are of both."""
    ports = []
    for name in ("one", "two"):
        text = APPLICATION.replace("URL", redis_url).replace(
            'channel = "chat"', 'channel = "chat"\n    max_connection = 2'
        )
        (tmp_path / f"{name}.py").write_text(text)
        ports.append((await start(f"{name}:app"))[0])
    urls = [f"ws://127.0.0.1:{port}/" for port in ports]
    async with connect(urls[0]) as one, connect(urls[1]) as two:
        for client in (one, two):
            await heard(client, "hello")
            assert await one.recv() == await two.recv() == '"hello"'
            await client.send('{"action": "count"}')
            assert '"data":2' in str(await client.recv())
        for url in urls:
            async with connect(url) as third:
                assert "greater than the maximum" in str(await third.recv())
                await third.wait_closed()
                assert third.close_code == 4009
    async with connect(urls[1]) as again:
        await again.send('{"action": "count"}')
        assert '"status":"ok"' in str(await again.recv())


async def heard(client: ClientConnection, text: Any) -> None:
    """Say something."""
    await client.send(f'{{"action": "say", "text": "{text}"}}')
