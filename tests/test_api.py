"""`add_channel` with the arguments of the original package, and `FastAPIChannel`."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from broadcaster import Broadcast
from broadcaster._backends.memory import MemoryBackend
from fastapi import FastAPI
from starlette.requests import Request
from starlette.websockets import WebSocket

import fastapi_channels
import fastapi_channels.permission
from fastapi_channels import FastAPIChannel, add_channel, get_channel_layer
from fastapi_channels.api import (
    DEFAULT_PERMISSION_CLASSES,
    default_identifier,
    http_default_callback,
    ws_default_callback,
)
from fastapi_channels.application import Channels
from fastapi_channels.channels import BaseChannel
from fastapi_channels.exceptions import RateLimitExceeded, SettingsError
from fastapi_channels.layers import BroadcasterLayer, MemoryLayer, RedisLayer
from fastapi_channels.permissions import AllowAny
from fastapi_channels.testing import ConnectionClosed, connect
from fastapi_channels.testing.server import free_port


def layer_of(**options: Any) -> Any:
    """The default layer that `add_channel` makes of its arguments."""
    return add_channel(FastAPI(), **options).layer()


def test_the_default_layer() -> None:
    """A URL is a layer of ours where we have one, and else broadcaster's; its objects are taken as they are."""
    assert type(layer_of()) is MemoryLayer
    assert type(layer_of(url="memory://")) is MemoryLayer
    assert type(layer_of(url="redis://localhost")) is RedisLayer
    foreign: list[dict[str, Any]] = [
        {"broadcast": Broadcast(url="memory://")},
        {"backend": MemoryBackend("memory://")},
        {"url": "broadcaster+memory://"},
        {"url": "postgres://localhost/x"},
    ]
    for options in foreign:
        assert type(layer_of(**options)) is BroadcasterLayer


def test_the_url_is_stronger_than_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`url` says what the default layer is, whatever the environment says of it, and leaves the others."""
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", '{"default": "redis://localhost", "jobs": "memory://"}')
    channels = add_channel(FastAPI(), url="memory://", capacity=2000)
    assert {alias: type(layer) for alias, layer in channels.layers.items()} == {
        "default": MemoryLayer,
        "jobs": MemoryLayer,
    }
    assert channels.layer().capacity == 2000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "memory://", "broadcast": Broadcast("memory://")}, "url and broadcast both say"),
        ({"url": "memory://", "backend": MemoryBackend("memory://")}, "url and backend both say"),
        ({"url": "memory://", "channel_layers": {"default": "memory://"}}, "url and channel_layers both say"),
        ({"url": "nonsense"}, "^url: "),
        ({"url": ""}, "^url: "),
        ({"broadcast": 7}, "^broadcast: "),
        ({"backend": "x"}, "^backend: "),
        ({"limiter_url": "http://x"}, "^LIMITER_URL: "),
        ({"pagination_class": object}, "^pagination_class: "),
    ],
)
def test_what_can_not_be(options: dict[str, Any], text: str) -> None:
    """Two answers to one question, and what can't be kept, stop the start."""
    with pytest.raises(SettingsError, match=text):
        add_channel(FastAPI(), **options)


def test_unknown_arguments() -> None:
    """An argument that is none is a TypeError."""
    with pytest.raises(TypeError, match="limiter_uri"):
        add_channel(FastAPI(), limiter_uri="redis://localhost")


def test_settings_by_their_names() -> None:
    """What has the name of a setting is that setting; one class need not be in a list."""
    settings = add_channel(
        FastAPI(), query_token_key="q", cookie_token_key="c", permission_classes=AllowAny, throttle_classes=("1/s",)
    ).settings
    assert (settings.query_token_key, settings.cookie_token_key) == ("q", "c")
    assert (settings.permission_classes, settings.throttle_classes) == ([AllowAny], ["1/s"])
    assert fastapi_channels.permission.AllowAny is AllowAny


@pytest.mark.parametrize("is_first", [True, False])
async def test_the_applications_lifespan_is_merged(is_first: bool) -> None:
    """The application's own lifespan runs inside ours, whether it is there before `add_channel` or put there after."""
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        events.append(f"start {app.state.channels.is_open}")
        yield {"own": 1}
        events.append(f"end {app.state.channels.is_open}")

    app = FastAPI(lifespan=lifespan if is_first else None)
    add_channel(app)
    if not is_first:
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def around(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app), lifespan(app) as state:
                yield state

        app.router.lifespan_context = around
    async with app.router.lifespan_context(app) as state:
        assert state == {"own": 1}
    assert events == ["start True", "end True"]


async def test_a_limiter_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """The application starts when `limiter_url` can't be reached, and says so in one line."""
    channel = BaseChannel(throttle_classes="1/hour")
    app = FastAPI()
    add_channel(app, limiter_url=f"redis://127.0.0.1:{free_port()}")
    serve(app, channel)
    with caplog.at_level(logging.WARNING):
        async with connect(app, "/") as client:
            assert len([record for record in caplog.records if "reached" in record.message]) == 1
            for _ in range(2):
                await client.send_text("x")
                assert await client.receive_json() == "x"


def serve(app: FastAPI, channel: BaseChannel) -> None:
    """Serve a channel at `/`."""

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await channel.connect(websocket)


async def test_the_default_callbacks() -> None:
    """They refuse with the seconds to wait, rounded up; the identifier is address and path."""
    app = FastAPI()
    add_channel(app, trusted_proxies=["10.0.0.1"])

    @app.get("/who")
    async def who(request: Request) -> str:
        return await default_identifier(request)

    @app.get("/refused")
    async def refused(request: Request) -> None:
        await http_default_callback(request, None, 1001)  # type: ignore[arg-type]

    transport = httpx.ASGITransport(app, client=("10.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/who", headers={"X-Forwarded-For": "10.9.9.9, 10.0.0.2"})
        assert answer.json() == "10.0.0.2:/who"
        answer = await client.get("/refused")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    with pytest.raises(RateLimitExceeded) as caught:
        await ws_default_callback(None, 1)  # type: ignore[arg-type]
    assert caught.value.error_msg == "Too Many Requests. Retry after 1 seconds."


# FastAPIChannel


@pytest.fixture
async def closed_after() -> AsyncIterator[None]:
    """Nothing of the process is left after the test."""
    yield
    await FastAPIChannel.close()
    assert Channels.fallback is None


@pytest.mark.usefixtures("closed_after")
async def test_a_fallback_for_applications_without_add_channel() -> None:
    """`FastAPIChannel.init` serves applications that have no channels of their own, and no others."""
    channel = BaseChannel()
    without, own = FastAPI(), FastAPI()
    add_channel(own)
    for app in (without, own):
        serve(app, channel)
    await FastAPIChannel.init(permission_classes=False)
    async with connect(without, "/") as refused, connect(own, "/") as client:
        assert (await refused.receive_json())["status"] == "bad"
        with pytest.raises(ConnectionClosed):
            await refused.receive_json()
        assert refused.close_code == 4503
        await client.send_text("x")
        assert await client.receive_json() == "x"
    await FastAPIChannel.close()
    async with connect(without, "/") as client:
        await client.send_text("x")
        assert await client.receive_json() == "x"


@pytest.mark.usefixtures("closed_after")
async def test_the_attributes_are_views() -> None:
    """The attributes show what it was initialised with, and the defaults before and after."""
    broadcast = Broadcast("memory://")
    before = {
        "broadcast": None,
        "limiter_url": None,
        "query_token_key": None,
        "cookie_token_key": None,
        "permission_classes": DEFAULT_PERMISSION_CLASSES,
        "throttle_classes": None,
        "pagination_class": None,
    }
    assert {name: getattr(FastAPIChannel, name) for name in before} == before
    url = f"redis://127.0.0.1:{free_port()}"
    await FastAPIChannel.init(
        broadcast=broadcast, limiter_url=url, query_token_key="q", cookie_token_key="c", throttle_classes="1/s"
    )
    assert {name: getattr(FastAPIChannel, name) for name in before} == {
        **before,
        "broadcast": broadcast,
        "limiter_url": url,
        "query_token_key": "q",
        "cookie_token_key": "c",
        "throttle_classes": ["1/s"],
    }
    assert Channels.fallback is not None
    assert get_channel_layer() is Channels.fallback.layer()
    await FastAPIChannel.close()
    assert {name: getattr(FastAPIChannel, name) for name in before} == before


@pytest.mark.usefixtures("closed_after")
async def test_init_twice() -> None:
    """A second `init` is an error, one that fails leaves nothing, and `close` may be called at any time."""
    await FastAPIChannel.close()
    wrong: list[dict[str, Any]] = [{"limiter_backend": object()}, {"debug": True}, {"pagination_class": object}]
    for options in [*wrong, {"url": "nonsense"}, {"url": "memory://", "broadcast": object()}]:
        with pytest.raises((SettingsError, TypeError), match=next(iter(options))):
            await FastAPIChannel.init(**options)
    await FastAPIChannel.init(url="memory://")
    with pytest.raises(RuntimeError, match="twice"):
        await FastAPIChannel.init()


def test_names_of_the_package() -> None:
    """The names are where the original package has them."""
    from fastapi_channels.api import FastAPIChannel as InApi
    from fastapi_channels.api import add_channel as in_api

    assert in_api is fastapi_channels.add_channel
    assert InApi is fastapi_channels.FastAPIChannel
