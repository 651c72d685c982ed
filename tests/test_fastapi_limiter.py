"""fastapi-limiter beside us: its limiters in `throttle_classes`, and on HTTP routes of the same application.

This file runs twice: with the version that is installed, which is 0.2, and by the last test of it with 0.1.6, which
comes from a directory of its own.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastapi_limiter
import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi_limiter.depends import RateLimiter, WebSocketRateLimiter
from redis.asyncio import Redis
from starlette.websockets import WebSocket

from fastapi_channels import add_channel
from fastapi_channels._fastapi_limiter import is_limiter, mend_http_limiter
from fastapi_channels.channels import Channel
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.exceptions import SettingsError, WebSocketException
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import WebSocketSession, connect
from fastapi_channels.testing.server import RedisServer, free_port

ROOT = Path(__file__).parent.parent

IS_OLD = hasattr(fastapi_limiter, "FastAPILimiter")

only_old = pytest.mark.skipif(not IS_OLD, reason="of fastapi-limiter 0.1")
only_new = pytest.mark.skipif(IS_OLD, reason="of fastapi-limiter 0.2")

Shared: Any = getattr(fastapi_limiter, "FastAPILimiter", None)


def limited(kind: Any, times: int, seconds: int = 3600, **options: Any) -> Any:
    """A limiter of the version that is installed."""
    if IS_OLD:
        return kind(times=times, seconds=seconds, **options)
    from pyrate_limiter import Duration, Limiter, Rate

    return kind(Limiter(Rate(times, Duration.SECOND * seconds)), **options)


@pytest.fixture(autouse=True)
def nobody_has_initialised() -> None:
    """What belongs to the process is as it was when it started."""
    if IS_OLD:
        Shared.redis = Shared.lua_sha = None


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str | None:
    """What 0.1 counts in; 0.2 counts by itself."""
    return str(request.getfixturevalue("redis_url")) if IS_OLD else None


def app_of(consumer: type[ActionConsumer], **options: Any) -> FastAPI:
    """An application with a consumer at `/ws` and `/other`."""
    app = FastAPI()
    add_channel(app, **options)
    app.include_router(ConsumerRouter([route("/ws", consumer), route("/other", consumer)]))
    return app


async def ask(client: WebSocketSession, action: str = "say") -> Any:
    """What `action` is answered with: "ok", or its errors."""
    await client.send_json({"action": action, "request_id": 1})
    reply = await client.receive_json()
    return "ok" if reply["status"] == "ok" else reply["errors"]


async def get(app: FastAPI, path: str, times: int, **headers: str) -> list[int]:
    """The statuses of so many requests."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return [(await client.get(path, headers=headers)).status_code for _ in range(times)]


@pytest.mark.parametrize("kind", [WebSocketRateLimiter, RateLimiter])
@pytest.mark.parametrize("level", ["settings", "consumer", "action"])
async def test_at_three_levels(kind: Any, level: str, url: str | None) -> None:
    """Its objects hold frames back in the settings, of a consumer, and of an action, with a time to wait."""
    limiter = [limited(kind, 2)]

    class Consumer(ActionConsumer):
        throttle_classes = limiter if level == "consumer" else None

        @action(throttle_classes=limiter if level == "action" else ())
        async def say(self) -> None: ...

        @action
        async def other(self) -> None: ...

    app = app_of(Consumer, limiter_url=url, throttle_classes=limiter if level == "settings" else None)
    async with connect(app, "/ws") as client:
        assert [await ask(client), await ask(client)] == ["ok", "ok"]
        errors = await ask(client)
        assert errors["code"] == "throttled"
        assert 3500 < errors["retry_after"] <= 3600
        assert (await ask(client, "other") == "ok") is (level == "action")


async def test_channels_take_one_without_a_list(url: str | None) -> None:
    """A channel's `throttle_classes` may be one of its objects, and so may `add_channel`'s."""
    for where in ("channel", "application"):
        one = limited(WebSocketRateLimiter, 1)
        channel = Channel(throttle_classes=one if where == "channel" else None)
        channel.action("say")(lambda: 1)
        app = FastAPI()
        add_channel(app, limiter_url=url, throttle_classes=one if where == "application" else None)
        serve(app, channel, f"/{where}")
        async with connect(app, f"/{where}") as client:
            assert await ask(client) == "ok"
            assert str(await ask(client)).startswith("Too Many Requests. Retry after 3")


def serve(app: FastAPI, channel: Channel, path: str) -> None:
    """Serve a channel at a path."""

    @app.websocket(path)
    async def endpoint(websocket: WebSocket) -> None:
        await channel.connect(websocket)


@only_old
async def test_whom_it_counts(redis_url: str) -> None:
    """It counts each path alone; X-Forwarded-For is believed of nobody, unless the limiter has its own identifier."""

    async def forwarded(connection: Any) -> str:
        return str(connection.headers["x-forwarded-for"])

    for identifier, expected in ((None, "refused"), (forwarded, "ok")):
        limiter = limited(WebSocketRateLimiter, 1, identifier=identifier)

        class Consumer(ActionConsumer):
            throttle_classes = [limiter]

            @action
            async def say(self) -> None: ...

        app = app_of(Consumer, limiter_url=redis_url)
        answers = []
        for path, address in (("/ws", "10.0.0.1"), ("/ws", "10.0.0.2"), ("/other", "10.0.0.3")):
            async with connect(app, path, headers={"X-Forwarded-For": address}) as client:
                answers.append("ok" if await ask(client) == "ok" else "refused")
        assert answers == ["ok", expected, "ok"]


async def test_callbacks(url: str | None) -> None:
    """A callback of the limiter's own is called; a plain 429 means throttled, and an error of ours is the answer."""
    calls: list[Any] = []

    async def plain(websocket: WebSocket, *pexpire: int) -> None:
        calls.append(pexpire)
        raise HTTPException(429)

    async def nothing(websocket: WebSocket, *pexpire: int) -> None:
        calls.append(pexpire)

    def telling(websocket: WebSocket, *pexpire: int) -> None:
        raise WebSocketException(4100, "slowly")

    async def failing(websocket: WebSocket, *pexpire: int) -> None:
        raise HTTPException(503, "no")

    codes = []
    for number, callback in enumerate((plain, nothing, telling, failing)):
        limiter = limited(WebSocketRateLimiter, 1, callback=callback)

        class Consumer(ActionConsumer):
            throttle_classes = [limiter]

            @action
            async def say(self) -> None: ...

        Consumer.__qualname__ = f"Consumer{number}"
        async with connect(app_of(Consumer, limiter_url=url), "/ws") as client:
            if IS_OLD:
                await Shared.redis.flushall()
            assert await ask(client) == "ok"
            codes.append((await ask(client))["code"])
    assert codes == ["throttled", "throttled", "permission_denied", "http_503"]
    assert len(calls) == 2
    assert all(0 < pexpire[0] <= 3_600_000 for pexpire in calls if IS_OLD)


async def test_the_object_stays_as_it_is(url: str | None) -> None:
    """An object in `throttle_classes` may be a dependency of an HTTP route too, with a callback of its own."""

    async def teapot(request: Request, response: Response, *pexpire: int) -> None:
        raise HTTPException(418)

    limiter = limited(RateLimiter, 1, callback=teapot)

    class Consumer(ActionConsumer):
        throttle_classes = [limiter]

        @action
        async def say(self) -> None: ...

    app = app_of(Consumer, limiter_url=url)

    @app.get("/", dependencies=[Depends(limiter)])
    async def view() -> None: ...

    async with connect(app, "/ws") as client:
        if IS_OLD:  # 0.2 has one bucket for all
            assert await get(app, "/", 2) == [200, 418]
        assert await ask(client) == "ok"
        assert (await ask(client))["code"] == "throttled"
        assert (await get(app, "/", 1)) == [418]


async def test_http_routes_of_included_routers(url: str | None) -> None:
    """`RateLimiter` works on an application with included routers, nested ones too, and each limit by itself."""
    inner, outer = APIRouter(), APIRouter()
    limits = [Depends(limited(RateLimiter, times)) for times in (3, 2)]

    @inner.get("/inner", dependencies=limits)
    async def deep() -> None: ...

    @outer.get("/outer", dependencies=[Depends(limited(RateLimiter, 1))])
    async def view() -> None: ...

    outer.include_router(inner, prefix="/a")
    app = FastAPI()
    add_channel(app, limiter_url=url)
    app.include_router(outer, prefix="/b")

    @app.get("/direct", dependencies=[Depends(limited(RateLimiter, 1))])
    async def direct() -> None: ...

    async with app.router.lifespan_context(app):
        assert await get(app, "/b/a/inner", 4) == [200, 200, 429, 429]
        assert await get(app, "/b/outer", 2) == [200, 429]
        assert await get(app, "/direct", 2) == [200, 429]


async def test_what_an_identifier_sees(url: str | None) -> None:
    """An identifier of the application's own sees the request as it is, its application and its body."""
    seen: list[Any] = []

    async def identify(request: Request) -> str:
        seen.append((request.app.state.mark, request.app.title, await request.body(), request.state.own))
        return "me"

    app = FastAPI(title="mine")
    add_channel(app, limiter_url=url)
    app.state.mark = "mark"

    async def before(request: Request) -> None:
        request.state.own = await request.body()

    limiter = limited(RateLimiter, 5, identifier=identify)

    @app.post("/", dependencies=[Depends(before), Depends(limiter)])
    async def view() -> None: ...

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        assert (await client.post("/", content=b"body")).status_code == 200
    assert seen == [("mark", "mine", b"body", b"body")]


def test_mending_twice_is_mending_once() -> None:
    """Any number of applications mend it once."""
    mend_http_limiter()
    mended = RateLimiter.__call__
    mend_http_limiter()
    assert RateLimiter.__call__ is mended


def test_what_is_no_limiter() -> None:
    """Only its objects are taken for them."""
    assert not any(map(is_limiter, [None, "5/s", WebSocketRateLimiter, print, object()]))

    class Derived(WebSocketRateLimiter):
        pass

    assert is_limiter(limited(Derived, 1))


# 0.2


@only_new
async def test_one_bucket_for_all_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A Limiter that counts all clients together is said to do so, when the application starts."""

    class Consumer(ActionConsumer):
        throttle_classes = [limited(WebSocketRateLimiter, 1)]

        @action
        async def say(self) -> None: ...

    async with connect(app_of(Consumer), "/ws"):
        pass
    assert "has one bucket for all clients" in caplog.text


@only_new
def test_what_only_the_old_one_has() -> None:
    """What nothing would use is an error: `storage` and `http_callback` are for 0.1."""
    wrong: list[dict[str, Any]] = [{"storage": object()}, {"http_callback": print}]
    for options in wrong:
        with pytest.raises(SettingsError, match=r"is for fastapi-limiter 0\.1"):
            add_channel(FastAPI(), **options)


# 0.1


class Limited(ActionConsumer):
    """A consumer whose frames are limited."""

    throttle_classes = [limited(WebSocketRateLimiter, 2)] if IS_OLD else []

    @action
    async def say(self) -> None: ...


@only_old
async def test_nobody_has_called_init(caplog: pytest.LogCaptureFixture) -> None:
    """Without `FastAPILimiter.init` a frame is not let through, and the log says what is missing."""
    async with connect(app_of(Limited), "/ws") as client:
        assert (await ask(client))["code"] == "internal_error"
    assert "before `await FastAPILimiter.init(redis)`" in caplog.text


@only_old
@pytest.mark.filterwarnings("ignore:Call to deprecated close")
@pytest.mark.parametrize("is_inner", [True, False])
async def test_the_applications_own_init(redis_url: str, is_inner: bool) -> None:
    """What the application initialises stays the application's, in its lifespan or before ours."""
    mine = Redis.from_url(redis_url)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await Shared.init(mine, prefix="mine")
        yield
        await Shared.close()

    app = FastAPI(lifespan=lifespan if is_inner else None)
    add_channel(app, limiter_url=redis_url)
    app.include_router(ConsumerRouter([route("/ws", Limited)]))
    if not is_inner:
        await Shared.init(mine, prefix="mine")
    async with connect(app, "/ws") as client:
        assert Shared.redis is mine
        assert await ask(client) == "ok"
        keys: list[Any] = await mine.keys("*:ws:*")
        assert [key.startswith(b"mine:ws:") for key in keys] == [True]
    assert Shared.redis is mine
    await mine.aclose()


@only_old
async def test_our_init_ends_with_the_application(redis_url: str) -> None:
    """What `add_channel` initialises has its prefix, identifier and callbacks, and is gone after the application."""

    async def identify(connection: Any) -> str:
        return "everybody"

    async def teapot(request: Request, response: Response, pexpire: int) -> None:
        raise HTTPException(418)

    app = FastAPI()
    add_channel(app, limiter_url=redis_url, prefix="ours", identifier=identify, http_callback=teapot)

    @app.get("/", dependencies=[Depends(limited(RateLimiter, 1))])
    async def view() -> None: ...

    async with app.router.lifespan_context(app):
        assert await get(app, "/", 2) == [200, 418]
        assert [key.startswith(b"ours:everybody:") for key in await Shared.redis.keys("*everybody*")] == [True]
    assert Shared.redis is None


@only_old
async def test_a_storage_stays_the_applications(redis_url: str) -> None:
    """A client given as `storage` is used, and not closed."""
    mine = Redis.from_url(redis_url)
    app = FastAPI()
    add_channel(app, storage=mine)
    app.include_router(ConsumerRouter([route("/ws", Limited)]))
    async with connect(app, "/ws") as client:
        assert Shared.redis is mine
        assert await ask(client) == "ok"
    assert Shared.redis is None
    assert await mine.ping()
    await mine.aclose()


@only_old
async def test_a_restart_of_redis(redis_server: RedisServer, redis_url: str) -> None:
    """After a restart of Redis, which forgets the script, limits hold again."""
    async with connect(app_of(Limited, limiter_url=redis_url), "/ws") as client:
        assert [await ask(client), await ask(client)] == ["ok", "ok"]
        assert (await ask(client))["code"] == "throttled"
        await Shared.redis.script_flush()
        assert (await ask(client))["code"] == "throttled"
        await asyncio.to_thread(redis_server.restart)
        assert [await ask(client), await ask(client)] == ["ok", "ok"]
        assert (await ask(client))["code"] == "throttled"


@only_old
@pytest.mark.parametrize(("on_error", "expected"), [("allow", "ok"), ("deny", "throttled")])
async def test_redis_away(on_error: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    """With Redis away the application starts, and THROTTLE_ON_ERROR says what happens; counted, and logged once."""
    app = app_of(Limited, limiter_url=f"redis://127.0.0.1:{free_port()}", throttle_on_error=on_error)
    async with connect(app, "/ws") as client:
        answers = [await ask(client) for _ in range(3)]
        assert [answer if answer == "ok" else answer["code"] for answer in answers] == [expected] * 3
        assert app.state.channels.layer().counters.uncounted == 3
    assert len([record for record in caplog.records if "throttles can't count" in record.message]) == 1


@only_old
async def test_a_frozen_redis(redis_server: RedisServer, redis_url: str) -> None:
    """A Redis that hangs holds nobody up for long, and limits hold again once it goes on."""
    async with connect(app_of(Limited, limiter_url=redis_url), "/ws") as client:
        assert await ask(client) == "ok"
        await asyncio.to_thread(redis_server.pause)
        await client.send_json({"action": "say", "request_id": 1})
        assert (await client.receive_json(timeout=5))["status"] == "ok"
        await asyncio.to_thread(redis_server.resume)


@only_old
def test_http_callback_needs_a_redis() -> None:
    """A callback that nothing would call is an error."""
    with pytest.raises(SettingsError, match="needs a limiter_url or a storage"):
        add_channel(FastAPI(), http_callback=print)


# The other version


@only_new
def test_with_0_1_6(request: pytest.FixtureRequest, limiter_01: Path) -> None:
    """All that is not of 0.2 alone passes with fastapi-limiter 0.1.6."""
    assert version("fastapi-limiter").startswith("0.2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(limiter_01), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
