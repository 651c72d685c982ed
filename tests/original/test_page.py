"""The page "getting started" of the original package: its blocks, word for word, do what it says."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from fastapi_channels import api
from fastapi_channels.permission import AllowAny
from fastapi_channels.testing.server import RedisServer, Watched, free_port

PAGE = (Path(__file__).parent / "getting-started.txt").read_text("utf-8")

Start = Callable[..., Awaitable[tuple[int, Watched]]]


def between(first: str, last: str, occurrence: int = 1) -> str:
    """The lines of the page from one on, up to another."""
    start = -1
    for _ in range(occurrence):
        start = PAGE.index(f"\n{first}", start + 1)
    return PAGE[start + 1 : PAGE.index(f"\n{last}", start)] + "\n"


BLOCKS = {
    1: between("from fastapi import FastAPI, WebSocket\n", "就像上面这段代码"),
    2: between("from fastapi import FastAPI, WebSocket\n", "  • *add_exception_handlers", 2),
    3: between("    default_identifier,", "自定义的范畴"),
    4: between("from contextlib import asynccontextmanager", "Note"),
    5: between("from fastapi import APIRouter, Depends", "评论"),
}


def write(folder: Path, number: int, port: int) -> None:
    """Write a block into a file. Of what it says, only the port of Redis is another."""
    text = BLOCKS[number].replace("localhost:6379", f"localhost:{port}")
    (folder / f"block{number}.py").write_text(text, "utf-8")


async def check_channel(port: int) -> None:
    """What the page promises: a channel, on which everybody hears everybody, and nobody from a foreign page is."""
    url = f"ws://127.0.0.1:{port}/"
    async with connect(url) as one, connect(url) as other:
        await one.send("hello")
        await other.send("你好")
        for client in (one, other):
            assert {await client.recv(), await client.recv()} == {'"hello"', '"你好"'}
    async with connect(url, origin=Origin("https://evil.example")) as stranger:
        with suppress(ConnectionClosed):  # it may be over already
            await stranger.send("boo")
        assert '"status":"bad"' in str(await stranger.recv())
        await stranger.wait_closed()
        assert stranger.close_code == 4503


def test_the_blocks_are_found() -> None:
    """The blocks are those of the page, from their first line to their last."""
    assert [text.splitlines()[0] for text in BLOCKS.values()] == [
        "from fastapi import FastAPI, WebSocket",
        "from fastapi import FastAPI, WebSocket",
        "    default_identifier,",
        "from contextlib import asynccontextmanager",
        "from fastapi import APIRouter, Depends",
    ]
    assert [text.rstrip().splitlines()[-1].strip() for text in BLOCKS.values()] == [
        'return await c.connect(websocket, "default_channel")',
        'return await c.connect(websocket, "default_channel")',
        "cookie_token_key: Optional[str] = None",
        "uvicorn.run(app)",
        'return {"msg": "Hello World"}',
    ]


async def test_block_1(start: Start, tmp_path: Path, redis_server: RedisServer, redis_url: str) -> None:
    """The first block makes a channel."""
    write(tmp_path, 1, redis_server.port)
    port, server = await start("block1:app")
    await check_channel(port)
    assert "Traceback" not in server.output()


async def test_block_2(
    start: Start, tmp_path: Path, redis_server: RedisServer, redis_url: str, limiter_01: Path
) -> None:
    """The second block is the first again; with fastapi-limiter 0.1.6 it does the same."""
    write(tmp_path, 2, redis_server.port)
    port, server = await start("block2:app", limiter_01)
    await check_channel(port)
    assert "Traceback" not in server.output()


async def test_block_1_without_redis(start: Start, tmp_path: Path, limiter_01: Path) -> None:
    """Where no Redis is, the application starts, says so in one line, and the channel works."""
    write(tmp_path, 1, free_port())
    port, server = await start("block1:app", limiter_01)
    await check_channel(port)
    told = [line for line in server.output().splitlines() if "reached" in line]
    assert len(told) == 1
    assert "Traceback" not in server.output()


def test_block_3() -> None:
    """The names and the defaults of the excerpt are there."""
    for name in ("default_identifier", "http_default_callback", "ws_default_callback"):
        assert callable(getattr(api, name))
    namespace: dict[str, Any] = {**vars(api), "Optional": dict, "Broadcast": object, "TypeVar": lambda *_: None}
    lines = BLOCKS[3].splitlines()
    wanted = {}
    for line in lines:
        name, equals, value = line.strip().partition(" = ")
        name = name.partition(":")[0]
        if equals and name.isidentifier() and not name.startswith("_"):
            where = api.FastAPIChannel if line.startswith(" ") else api
            if name != "ParentT":
                wanted[name] = eval(value, namespace)
                assert getattr(where, name) == wanted[name], name
    assert wanted == {
        "DEFAULT_QUERY_TOKEN_KEY": "token",
        "DEFAULT_COOKIE_TOKEN_KEY": "token",
        "DEFAULT_PERMISSION_CLASSES": (AllowAny,),
        "broadcast": None,
        "limiter_url": None,
        "query_token_key": None,
        "cookie_token_key": None,
    }
    assert {constraint.__name__ for constraint in api.ParentT.__constraints__} == {"APIRouter", "FastAPI"}


async def test_block_4(
    start: Start, tmp_path: Path, redis_server: RedisServer, redis_url: str, limiter_01: Path
) -> None:
    """The fourth block brings its own Broadcast and lifespan, which initialises FastAPILimiter by itself."""
    write(tmp_path, 4, redis_server.port)
    port, server = await start("block4:app", limiter_01)
    await check_channel(port)
    server.stop()
    assert "Application shutdown complete" in server.output()
    assert "Traceback" not in server.output()


async def test_block_5(
    start: Start, tmp_path: Path, redis_server: RedisServer, redis_url: str, limiter_01: Path
) -> None:
    """The fifth block, included into the application of the fourth, limits its route beside the channel."""
    write(tmp_path, 4, redis_server.port)
    write(tmp_path, 5, redis_server.port)
    (tmp_path / "both.py").write_text("import block4, block5\n\napp = block4.app\napp.include_router(block5.app)\n")
    port, server = await start("both:app", limiter_01)
    await check_channel(port)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answers = [await client.get("/index") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].json() == {"msg": "Hello World"}
    assert 1 <= int(answers[2].headers["retry-after"]) <= 5
    assert "Traceback" not in server.output()
