"""Throttles: whom they count, in which bucket, and what a client is told; on WebSockets and on HTTP routes."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Annotated, Any, ClassVar

import httpx
import pytest
from asgi_lifespan import LifespanManager
from fastapi import APIRouter, Depends, FastAPI
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from fastapi_channels import add_channel
from fastapi_channels.authentication import BaseAuthentication, User
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import ConsumerError, DefinitionError, SettingsError, Throttled
from fastapi_channels.layers.limiter import Rate
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import RedisServer, WebSocketSession, connect
from fastapi_channels.throttling import (
    AnonRateThrottle,
    BaseThrottle,
    ConnectionRateThrottle,
    FrameRateThrottle,
    HTTPThrottle,
    RateThrottle,
    ScopedRateThrottle,
    UserRateThrottle,
)
from tests.conftest import app_with


class FromHeader(BaseAuthentication):
    """Believes the header `x-user`."""

    async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
        name = websocket.headers.get("x-user")
        return None if name is None else (User(name), None)


class Pings(ActionConsumer):
    authentication_classes = [FromHeader]

    @action
    async def ping(self) -> str:
        return "pong"

    @action
    async def other(self) -> str:
        return "pong"


def consumer(*throttles: Any, name: str = "Made") -> type[Pings]:
    return type(name, (Pings,), {"__qualname__": name, "throttle_classes": list(throttles)})


async def ask(ws: WebSocketSession, name: str = "ping") -> Any:
    """The error of an action's reply, or None."""
    await ws.send_json({"action": name, "request_id": 1})
    reply = await ws.receive_json()
    assert (reply["type"], reply["action"], reply["request_id"]) == ("response", name, 1)
    assert (reply["status"] == "ok") is (reply["errors"] is None)
    return reply["errors"]


async def passed(ws: WebSocketSession, name: str = "ping", *, tries: int = 10) -> int:
    """How many of some frames get through; those that don't have to be throttled."""
    errors = [await ask(ws, name) for _ in range(tries)]
    assert {error["code"] for error in errors if error} <= {"throttled"}
    return errors.count(None)


def as_user(name: str) -> dict[str, str]:
    return {"x-user": name}


@asynccontextmanager
async def http(app: Any, client: tuple[str, int] = ("10.0.0.1", 1)) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of an application whose lifespan runs."""
    async with LifespanManager(app) as manager:
        transport = httpx.ASGITransport(app=manager.app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            yield session


# What the client is told


async def test_a_throttled_frame() -> None:
    """A frame too many is answered with `throttled` and the seconds to wait, and the connection lives on."""
    async with connect(app_with(consumer("2/minute")), "/ws") as ws:
        assert await passed(ws, tries=2) == 2
        error = await ask(ws)
        assert error.keys() == {"code", "detail", "retry_after"}
        assert error["code"] == "throttled"
        assert 29 < error["retry_after"] <= 30
        assert "29." in error["detail"] or "30" in error["detail"]
        assert ws.close_code is None


async def test_who_waits_gets_through() -> None:
    """After `retry_after` seconds the next frame gets through, and no sooner."""
    async with connect(app_with(consumer("1/0.3s")), "/ws") as ws:
        assert await ask(ws) is None
        for _ in range(3):
            error = await ask(ws)
            assert 0 < error["retry_after"] <= 0.3
            await asyncio.sleep(error["retry_after"] + 0.005)
            assert await ask(ws) is None


async def test_every_frame_counts_whatever_it_asks_for() -> None:
    """Frames that aren't valid, of unknown actions, or too large, count, and are throttled before all else."""
    frames = [
        "no json",
        "[]",
        '{"action": 5}',
        '{"action": "nothing", "request_id": 1}',
        '{"action": "ping", "request_id": []}',
        '{"action": "$cancel"}',
        '{"action": "__init__"}',
        "x" * 200,
    ]
    codes = ["invalid_frame"] * 3 + ["unknown_action", "invalid_frame", "invalid_frame", "unknown_action", "too_large"]
    async with connect(app_with(consumer("8/hour"), max_frame_size=100), "/ws") as ws:
        for frame, code in zip(frames, codes, strict=True):
            await ws.send_text(frame)
            assert (await ws.receive_json())["errors"]["code"] == code
        for frame in frames:
            await ws.send_text(frame)
            assert (await ws.receive_json())["errors"]["code"] == "throttled"
        assert (await ask(ws))["code"] == "throttled"


@pytest.mark.parametrize("base", [WebSocketConsumer, JsonConsumer])
async def test_consumers_without_actions(base: Any) -> None:
    """Frames of a consumer without actions are throttled too: they don't reach `receive`."""
    received: list[Any] = []

    class Plain(base):  # type: ignore[misc]
        throttle_classes = ["2/hour"]

        async def receive(self, data: Any) -> None:
            received.append(data)
            await self.send(text="1")

    async with connect(app_with(Plain), "/ws") as ws:
        for _ in range(2):
            await ws.send_text("1")
            assert await ws.receive_text() == "1"
        for _ in range(3):
            await ws.send_text("1")
            reply = await ws.receive_json()
            assert (reply["type"], reply["action"], reply["request_id"]) == ("response", None, None)
            assert reply["errors"]["code"] == "throttled"
        await ws.send_bytes(b"\xff")
        assert (await ws.receive_json())["errors"]["code"] == "throttled"
    assert len(received) == 2


# Whom it counts


async def test_a_user_is_one_wherever_it_comes_from() -> None:
    """A user is counted as one over all its connections and addresses, and apart from every other."""
    app = app_with(consumer("3/hour"))
    async with (
        connect(app, "/ws", headers=as_user("ann"), client=("10.0.0.1", 1)) as one,
        connect(app, "/ws", headers=as_user("ann"), client=("10.0.0.2", 1)) as two,
        connect(app, "/ws", headers=as_user("Ann"), client=("10.0.0.1", 1)) as other,
        connect(app, "/ws", client=("10.0.0.1", 1)) as stranger,
    ):
        assert await passed(one, tries=2) == 2
        assert await passed(two) == 1
        assert await passed(other) == 3
        assert await passed(stranger) == 3


@pytest.mark.parametrize("name", ["address:10.0.0.1", "10.0.0.1", "user:ann", "", "ann\x00", "日本"])
async def test_odd_user_ids(name: str) -> None:
    """No user's id makes it count as another one or as an address."""

    class Odd(BaseAuthentication):
        async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
            if "stranger" in websocket.query_params:
                return None
            return User("ann" if "ann" in websocket.query_params else name), None

    made = consumer("2/hour")
    made.authentication_classes = [Odd]
    app = app_with(made)
    for path in ("/ws?stranger", "/ws", "/ws?ann"):
        async with connect(app, path, client=("10.0.0.1", 1)) as ws, connect(app, path, client=("10.0.0.1", 2)) as two:
            assert await passed(ws, tries=1) == 1
            assert await passed(two) == 1


async def test_strangers_by_address() -> None:
    """Strangers are counted by address, whatever the port; of an IPv6 address the first 64 bits are one client's."""
    app = app_with(consumer("2/hour"))

    async def count(address: str, port: int = 1) -> int:
        async with connect(app, "/ws", client=(address, port)) as ws:
            return await passed(ws)

    assert await count("10.0.0.1") == 2
    assert await count("10.0.0.1", 2) == 0
    assert await count("10.0.0.2") == 2
    assert await count("::ffff:10.0.0.2") == 0
    assert await count("2001:db8::1") == 2
    assert await count("2001:db8::2") == 0
    assert await count("2001:0DB8:0:0:ffff:ffff:ffff:ffff") == 0
    assert await count("2001:db8:0:1::1") == 2
    assert await count("testclient") == 2
    assert await count("testclient") == 0


async def test_no_address() -> None:
    """Clients without an address, as on a Unix socket, are counted together."""
    app = app_with(consumer("2/hour"))
    async with connect(app, "/ws", client=None) as ws:
        assert await passed(ws) == 2
    async with connect(app, "/ws", client=None) as ws:
        assert await passed(ws) == 0


async def test_addresses_behind_proxies() -> None:
    """X-Forwarded-For counts when a trusted proxy says it; what a client adds to it changes nothing."""
    app = app_with(consumer("1/hour"), trusted_proxies=["10.0.0.0/8"])

    async def count(peer: str, forwarded: str) -> int:
        async with connect(app, "/ws", client=(peer, 1), headers={"x-forwarded-for": forwarded}) as ws:
            return await passed(ws)

    assert await count("10.0.0.1", "203.0.113.1") == 1
    assert await count("10.0.0.2", "203.0.113.1") == 0
    assert await count("10.0.0.1", "198.51.100.7, 203.0.113.1") == 0
    assert await count("10.0.0.1", "203.0.113.2") == 1
    assert await count("203.0.113.9", "198.51.100.1") == 1
    assert await count("203.0.113.9", "198.51.100.2") == 0


async def test_anon_throttle() -> None:
    """`AnonRateThrottle` counts strangers, by address, and no user."""
    app = app_with(consumer(AnonRateThrottle("2/hour")))
    async with connect(app, "/ws") as ws:
        assert await passed(ws) == 2
    async with connect(app, "/ws", headers=as_user("ann")) as ws:
        assert await passed(ws) == 10


async def test_a_user_of_a_middleware() -> None:
    """A user that a middleware has found is counted as the user."""
    made = type("Made", (Pings,), {"authentication_classes": None, "throttle_classes": ["2/hour"]})
    app = app_with(made)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            scope["user"] = User("ann")
        await app(scope, receive, send)

    async with LifespanManager(app):
        for address, expected in (("10.0.0.1", 2), ("10.0.0.2", 0)):
            async with connect(middleware, "/ws", client=(address, 1)) as ws:
                assert await passed(ws) == expected


# New connections


async def test_connection_throttle() -> None:
    """`ConnectionRateThrottle` refuses connections too many from one address: 429, with Retry-After."""
    app = app_with(consumer(ConnectionRateThrottle("2/minute")))

    async def refusal(address: str = "10.0.0.1", **headers: str) -> Any:
        async with connect(app, "/ws", client=(address, 1), headers=headers) as ws:
            assert ws.accepted is (ws.response is None)
            return ws.response

    async with LifespanManager(app):
        assert [await refusal() for _ in range(2)] == [None, None]
        for _ in range(3):
            response = await refusal()
            assert response.status_code == 429
            assert response.headers["retry-after"] == "30"
            body = response.json()
            assert body.keys() == {"detail", "code", "retry_after"}
            assert body["code"] == "throttled"
            assert 29 < body["retry_after"] <= 30
        assert (await refusal(**{"x-user": "ann"})).status_code == 429
        assert await refusal("10.0.0.2") is None


async def test_connections_and_frames_are_throttled_apart() -> None:
    """A throttle of connections isn't asked for frames, and one of frames isn't asked for connections."""
    app = app_with(consumer(ConnectionRateThrottle("3/hour"), UserRateThrottle("2/hour")))
    async with LifespanManager(app):
        counts = []
        for _ in range(3):
            async with connect(app, "/ws") as ws:
                counts.append(await passed(ws))
        assert counts == [2, 0, 0]
        async with connect(app, "/ws") as ws:
            assert ws.response is not None


@pytest.mark.parametrize("throttle", [ConnectionRateThrottle, ConnectionRateThrottle("1/s")], ids=["class", "instance"])
def test_an_action_has_no_connections(throttle: Any) -> None:
    """A throttle of connections can't be an action's: there is no handshake for it to be asked at."""

    async def say(self: Any) -> None: ...

    guarded = action(throttle_classes=[throttle])(say)
    with pytest.raises(DefinitionError, match=r"^Wrong\.say\.throttle_classes: .*new connections"):
        type("Wrong", (Pings,), {"__qualname__": "Wrong", "say": guarded})


# Buckets


async def test_a_rate_counts_for_its_consumer_alone() -> None:
    """A rate as text has a bucket of its own for each consumer class."""
    one, other = consumer("2/hour", name="One"), consumer("2/hour", name="Other")
    app = app_with(one, other)
    async with connect(app, "/One") as first, connect(app, "/Other") as second, connect(app, "/ws") as third:
        assert await passed(first) == 2
        assert await passed(second) == 2
        assert await passed(third) == 0


async def test_classes_of_one_name_in_two_modules() -> None:
    """Two consumer classes of one name in two modules are two consumers, with a bucket each."""
    one, other = consumer("2/hour", name="Room"), consumer("2/hour", name="Room")
    other.__module__ = "app.other"
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/one", one), route("/other", other)]))
    async with connect(app, "/one") as first, connect(app, "/other") as second:
        assert await passed(first) == 2
        assert await passed(second) == 2


async def test_an_action_and_a_class_of_its_name() -> None:
    """An action's own bucket is not that of a class which is called as the two together are."""

    class Room(Pings):
        @action(throttle_classes=["2/hour"])
        async def inner(self) -> None: ...

    inner = consumer("2/hour", name="inner")
    inner.__qualname__ = f"{Room.__qualname__}.inner"
    inner.__module__ = Room.__module__
    async with connect(app := app_with(Room, inner), "/Room") as first, connect(app, "/inner") as second:
        assert await passed(first, "inner") == 2
        assert await passed(second) == 2


async def test_classes_without_a_scope() -> None:
    """Throttles of one class that has no scope count together; another class of its name doesn't."""

    def of(module: str) -> Any:
        def key(self: Any, connection: HTTPConnection, action: str | None) -> str:
            return "all"

        return type("All", (RateThrottle,), {"key": key, "__module__": module, "__qualname__": "All"})

    one, other = of("one"), of("other")
    app = app_with(
        *(consumer(throttle("2/hour"), name=name) for name, throttle in zip("ABC", (one, one, other), strict=True))
    )
    async with connect(app, "/A") as a, connect(app, "/B") as b, connect(app, "/C") as c:
        assert await passed(a, tries=1) == 1
        assert await passed(b) == 1
        assert await passed(c) == 2


async def test_a_consumer_that_is_named_like_a_scope() -> None:
    """A class's own bucket is not that of a scope which has the class's name."""
    app = app_with(
        consumer("2/hour", name="user"),
        consumer(UserRateThrottle("2/hour"), name="Other"),
    )
    async with connect(app, "/user") as first, connect(app, "/Other") as second:
        assert await passed(first) == 2
        assert await passed(second) == 2


async def test_a_rate_of_an_action_counts_for_it_alone() -> None:
    """A rate of an action has a bucket of its own, besides that of the consumer."""

    class Two(Pings):
        throttle_classes = ["7/hour"]

        @action(throttle_classes=["2/hour"])
        async def slow(self) -> None: ...

        @action(throttle_classes=["3/hour"])
        async def slower(self) -> None: ...

    async with connect(app_with(Two), "/ws") as ws:
        assert await passed(ws, "slow", tries=3) == 2
        assert await passed(ws, "slower", tries=3) == 3
        assert await passed(ws, "ping", tries=3) == 1
        assert await passed(ws, "slower", tries=3) == 0


async def test_scopes_are_shared() -> None:
    """Throttles of one scope share a bucket, as classes and as instances, over consumers and actions."""

    class One(Pings):
        throttle_classes = [UserRateThrottle]

    class Two(Pings):
        @action(throttle_classes=[UserRateThrottle])
        async def slow(self) -> None: ...

    app = app_with(One, Two, throttle_rates={"user": "5/hour"})
    async with connect(app, "/One", headers=as_user("a")) as one, connect(app, "/Two", headers=as_user("a")) as two:
        assert await passed(one, tries=2) == 2
        assert await passed(two, "slow", tries=2) == 2
        assert await passed(one) == 1
        assert await passed(two, "slow") == 0
        assert await passed(two, "ping") == 10


async def test_two_rates_of_one_scope() -> None:
    """A burst and a sustained rate of one scope can stand side by side: each counts for itself."""
    app = app_with(consumer(UserRateThrottle("5/second"), UserRateThrottle("100/hour")))
    async with connect(app, "/ws") as ws:
        assert await passed(ws, tries=5) == 5


async def test_an_actions_rate_of_the_consumers_scope() -> None:
    """An action's instance of another rate doesn't use up what the consumer's instance counts."""

    class Mixed(Pings):
        throttle_classes = [UserRateThrottle("10/minute")]

        @action(throttle_classes=[UserRateThrottle("2/hour")])
        async def slow(self) -> None: ...

    async with connect(app_with(Mixed), "/ws") as ws:
        assert await passed(ws, "slow", tries=3) == 2
        assert await passed(ws, "ping", tries=7) == 7


async def test_scoped_throttles() -> None:
    """`ScopedRateThrottle` takes its rate by its name; those of one name share it, those of others don't."""

    class Scoped(Pings):
        @action(throttle_classes=[ScopedRateThrottle("uploads")])
        async def upload(self) -> None: ...

        @action(throttle_classes=[ScopedRateThrottle("uploads")])
        async def upload_more(self) -> None: ...

        @action(throttle_classes=[ScopedRateThrottle("search")])
        async def search(self) -> None: ...

    app = app_with(Scoped, throttle_rates={"uploads": "3/hour", "search": "2/hour"})
    async with connect(app, "/ws") as ws:
        assert await passed(ws, "upload", tries=2) == 2
        assert await passed(ws, "upload_more") == 1
        assert await passed(ws, "search") == 2


async def test_stacked_throttles() -> None:
    """All of several throttles are asked, and the longest wait is told; one that refuses leaves the others' count."""
    slow, fast = ScopedRateThrottle("slow"), ScopedRateThrottle("fast")
    rates = {"slow": "2/hour", "fast": "4/minute"}
    app = app_with(
        consumer(slow, fast, name="Both"),
        consumer(fast, slow, name="Turned"),
        consumer(fast, name="Fast"),
        throttle_rates=rates,
    )
    for path in ("/Both", "/Turned"):
        async with (
            connect(app, path, headers=as_user(path)) as ws,
            connect(app, "/Fast", headers=as_user(path)) as fast_ws,
        ):
            assert await passed(ws, tries=2) == 2
            assert 1700 < (await ask(ws))["retry_after"] <= 1800
            assert await passed(fast_ws) == 1
            assert 1700 < (await ask(ws))["retry_after"] <= 1800


# Rates from the settings


async def test_rates_of_the_settings() -> None:
    """A class without a rate takes that of its scope; an instance with one keeps its own."""
    rates = {"user": "3/hour", "anon": "2/hour", "connection": "2/hour"}
    app = app_with(
        consumer(UserRateThrottle, name="One"),
        consumer(AnonRateThrottle, name="Two"),
        consumer(ConnectionRateThrottle, name="Three"),
        throttle_rates=rates,
    )
    async with connect(app, "/One") as one, connect(app, "/Two") as two:
        assert await passed(one) == 3
        assert await passed(two) == 2
        accepted = []
        for _ in range(4):
            async with connect(app, "/Three") as ws:
                accepted.append(ws.accepted)
        assert accepted == [True, True, False, False]


MISSING: list[Any] = [
    (consumer(UserRateThrottle), {}, "user"),
    (consumer(AnonRateThrottle), {"user": "1/s"}, "anon"),
    (consumer(ConnectionRateThrottle), {"Connection": "1/s"}, "connection"),
    (consumer(ScopedRateThrottle("uploads ✓")), {}, "uploads ✓"),
]


@pytest.mark.parametrize(("made", "rates", "scope"), MISSING)
async def test_a_missing_rate(made: Any, rates: Any, scope: str) -> None:
    """A throttle for whose scope the settings have no rate stops the start, and is named with its path."""
    app = app_with(made, throttle_rates=rates)
    with pytest.raises(SettingsError, match=f"^/ws: THROTTLE_RATES has no rate for '{scope}'"):
        async with connect(app, "/ws"):
            pass


async def test_a_missing_rate_of_an_action() -> None:
    """So does one of an action, and one of the settings themselves."""

    class Slow(Pings):
        @action(throttle_classes=[ScopedRateThrottle("slow")])
        async def slow(self) -> None: ...

    for app in (app_with(Slow), app_with(Pings, throttle_classes=[ScopedRateThrottle("slow")])):
        with pytest.raises(SettingsError, match="THROTTLE_RATES has no rate for 'slow'"):
            async with connect(app, "/ws"):
                pass


@pytest.mark.parametrize("rate", ["", "10", "0/s", "10/ms", "often"])
def test_a_wrong_rate_in_the_settings(rate: str) -> None:
    """A rate in the settings that is none is told when they are read."""
    with pytest.raises(SettingsError, match=r"^THROTTLE_RATES"):
        add_channel(FastAPI(), throttle_rates={"user": rate})


@pytest.mark.parametrize("value", [None, 1, 1.5, b"1/s", "often", "IsAuthenticated", int, object(), []])
def test_what_is_no_throttle(value: Any) -> None:
    """What is no throttle is an error when the class is made, and names it."""
    with pytest.raises(DefinitionError, match=r"^Wrong\.throttle_classes: .*(throttle|rate)"):
        type("Wrong", (Pings,), {"__qualname__": "Wrong", "throttle_classes": [value]})
    with pytest.raises((DefinitionError, SettingsError)):
        HTTPThrottle(value)


@pytest.mark.parametrize(
    "value",
    ["5/second", 5, UserRateThrottle, UserRateThrottle("1/s"), iter(["1/s"])],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_throttles(value: Any) -> None:
    """One throttle, or what can be read only once, is no list of them."""
    with pytest.raises(DefinitionError, match="throttle_classes"):
        type("Wrong", (Pings,), {"__qualname__": "Wrong", "throttle_classes": value})


def test_throttles_without_a_rate() -> None:
    """A throttle needs a rate or a scope, and a class that needs arguments is given as an instance."""

    class Nameless(RateThrottle):
        def key(self, connection: HTTPConnection, action: str | None) -> str | None:
            return "all"

    for wrong in (Nameless, ScopedRateThrottle):
        with pytest.raises(DefinitionError, match="needs"):
            consumer(wrong)
    with pytest.raises(DefinitionError, match="rate"):
        UserRateThrottle("often")
    consumer(Nameless("1/s"))


# Throttles of one's own


class Noting(BaseThrottle):
    """Notes what it is asked, and has the client wait as long as it is told to."""

    def __init__(self, waits: list[Any]) -> None:
        self.waits = waits
        self.asked: list[tuple[HTTPConnection, str | None, bool]] = []

    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        self.asked.append((connection, action, threading.current_thread() is threading.main_thread()))
        wait = self.waits.pop(0)
        if isinstance(wait, Exception):
            raise wait
        return wait  # type: ignore[no-any-return]


class PlainNoting(Noting):
    def wait(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, connection: HTTPConnection, action: str | None = None
    ) -> float:
        self.asked.append((connection, action, threading.current_thread() is threading.main_thread()))
        wait = self.waits.pop(0)
        if isinstance(wait, Exception):
            raise wait
        return wait  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Noting, PlainNoting])
async def test_an_own_throttle(kind: type[Noting]) -> None:
    """A throttle of one's own says how long to wait, and is told the action; plain `def` runs in the thread pool."""
    throttle = kind([0, 1.25, 0, 7, 0.0])
    async with connect(app_with(consumer(throttle)), "/ws") as ws:
        assert await ask(ws) is None
        error = await ask(ws, "other")
        assert (error["code"], error["retry_after"]) == ("throttled", 1.25)
        assert (await ask(ws, "nothing"))["code"] == "unknown_action"
        await ws.send_text("no json")
        assert (await ws.receive_json())["errors"]["retry_after"] == 7
        assert await ask(ws) is None
    assert [action for _, action, _ in throttle.asked] == ["ping", "other", None, None, "ping"]
    assert all(isinstance(connection, WebSocket) for connection, _, _ in throttle.asked)
    assert {in_loop for _, _, in_loop in throttle.asked} == {kind is Noting}


@pytest.mark.parametrize("wrong", [RuntimeError("secret"), None, "1", [1]], ids=repr)
async def test_an_own_throttle_that_fails(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A throttle that fails, or gives no number, lets nothing through: one traceback in the log, nothing told of it."""
    async with connect(app_with(consumer(Noting([wrong, 0]))), "/ws") as ws:
        error = await ask(ws)
        assert error == {"code": "internal_error", "detail": "Internal Server Error"}
        assert await ask(ws) is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None


@pytest.mark.parametrize("is_for_connections", [False, True])
async def test_an_own_throttle_that_never_lets_through(is_for_connections: bool) -> None:
    """A wait without an end is a refusal like any other."""
    throttle = type("Never", (Noting,), {"is_for_connections": is_for_connections})([float("inf")])
    async with connect(app_with(consumer(throttle)), "/ws") as ws:
        if is_for_connections:
            assert ws.response is not None
            assert ws.response.status_code == 429
            assert ws.response.json() == {"detail": "too often", "code": "throttled", "retry_after": None}
            assert "retry-after" not in ws.response.headers
        else:
            assert await ask(ws) == {"detail": "too often", "code": "throttled", "retry_after": None}


@pytest.mark.parametrize("wait", [0.0001, 0.0004, 1.2344, 29.99949])
async def test_the_wait_is_not_rounded_down(wait: float) -> None:
    """What a client is told to wait is not less than what it has to."""
    async with connect(app_with(consumer(Noting([wait]))), "/ws") as ws:
        assert wait <= (await ask(ws))["retry_after"] < wait + 0.002


async def test_a_throttle_may_raise_what_is_told() -> None:
    """A throttle may raise a `ConsumerError` of its own."""
    throttle = Noting([ConsumerError("come back tomorrow", code="quota", used=7)])
    async with connect(app_with(consumer(throttle)), "/ws") as ws:
        assert await ask(ws) == {"code": "quota", "detail": "come back tomorrow", "used": 7}


async def test_an_own_key() -> None:
    """A subclass of `RateThrottle` chooses whom to count; nobody for None."""

    class PerRoom(RateThrottle):
        scope = "room"
        keys: ClassVar[list[Any]] = []

        def key(self, connection: HTTPConnection, action: str | None) -> str | None:
            self.keys.append(action)
            return connection.query_params.get("room")

    app = app_with(consumer(PerRoom("2/hour")))
    async with connect(app, "/ws?room=a") as a, connect(app, "/ws?room=a") as b, connect(app, "/ws?room=b") as c:
        assert await passed(a) == 2
        assert await passed(b) == 0
        assert await passed(c) == 2
    async with connect(app, "/ws") as ws:
        assert await passed(ws) == 10
    assert set(PerRoom.keys) == {"ping"}


# HTTP


def throttled_app(throttle: Any, **settings: Any) -> FastAPI:
    """An application with some routes that one throttle limits, which all have it from one object."""
    app = FastAPI()
    add_channel(app, **settings)
    limited = [Depends(HTTPThrottle(throttle))]

    @app.get("/one", dependencies=limited)
    async def one() -> int:
        return 1

    @app.post("/one", dependencies=limited)
    def post_one() -> int:
        return 2

    @app.get("/items/{item}", dependencies=limited)
    async def item(item: int) -> int:
        return item

    router = APIRouter()

    @router.get("/one", dependencies=limited)
    async def included() -> int:
        return 3

    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")

    @app.get("/free")
    async def free() -> int:
        return 4

    return app


async def statuses(client: httpx.AsyncClient, path: str, tries: int = 3, method: str = "GET") -> list[int]:
    return [(await client.request(method, path)).status_code for _ in range(tries)]


async def test_http_throttle() -> None:
    """A request too many is answered with 429, Retry-After in whole seconds and the same in JSON."""
    async with http(throttled_app("2/5s")) as client:
        assert await statuses(client, "/one", 2) == [200, 200]
        for _ in range(2):
            response = await client.get("/one")
            assert response.status_code == 429
            assert response.headers["retry-after"] == "3"
            body = response.json()
            assert body.keys() == {"detail", "code", "retry_after"}
            assert body["code"] == "throttled"
            assert 2 < body["retry_after"] <= 2.5
        assert await statuses(client, "/free") == [200] * 3


async def test_http_throttle_in_time() -> None:
    """After the wait the next request gets through."""
    async with http(throttled_app("1/0.2s")) as client:
        assert await statuses(client, "/one", 2) == [200, 429]
        wait = (await client.get("/one")).json()["retry_after"]
        await asyncio.sleep(wait + 0.005)
        assert await statuses(client, "/one", 2) == [200, 429]


async def test_http_rates_count_for_each_route() -> None:
    """A rate counts for each route alone: another path, prefix or method has its own; a path parameter doesn't."""
    async with http(throttled_app("2/hour")) as client:
        assert await statuses(client, "/one") == [200, 200, 429]
        assert await statuses(client, "/one", method="POST") == [200, 200, 429]
        assert await statuses(client, "/a/one") == [200, 200, 429]
        assert await statuses(client, "/b/one") == [200, 200, 429]
        assert await statuses(client, "/items/1", 1) == [200]
        assert await statuses(client, "/items/2") == [200, 429, 429]


async def test_http_rates_of_mounted_applications() -> None:
    """A route of a mounted application is another one than that of the same path outside."""
    app, sub = throttled_app("2/hour"), FastAPI()

    @sub.get("/one", dependencies=[Depends(HTTPThrottle("2/hour"))])
    async def one() -> int:
        return 1

    app.mount("/sub", sub)
    async with http(app) as client:
        assert await statuses(client, "/one") == [200, 200, 429]
        assert (await client.get("/sub/one")).status_code == 200


async def test_http_rates_of_a_mount_with_parameters() -> None:
    """What a client puts into the path of a mount makes no route of its own, and so no new bucket."""
    app, sub = FastAPI(), FastAPI()
    add_channel(app)

    @sub.get("/one/{item}", dependencies=[Depends(HTTPThrottle("2/hour"))])
    async def one(item: int) -> int:
        return item

    app.mount("/t/{tenant}", sub)
    async with http(app) as client:
        assert await statuses(client, "/t/a/one/1", 1) == [200]
        assert await statuses(client, "/t/b/one/2") == [200, 429, 429]
        assert await statuses(client, "/t/one/one/3") == [429] * 3


async def test_http_rates_below_an_included_mount() -> None:
    """A mount in a router that is included under two prefixes is two, also for the routes of its application."""
    app, router, sub = FastAPI(), APIRouter(), FastAPI()
    add_channel(app)

    @sub.get("/one", dependencies=[Depends(HTTPThrottle("2/hour"))])
    async def one() -> int:
        return 1

    router.mount("/sub", sub)
    for prefix in ("/a", "/b"):
        app.include_router(router, prefix=prefix)
    async with http(app) as client:
        for path in ("/a/sub/one", "/b/sub/one"):
            assert await statuses(client, path) in ([200, 200, 429], [404] * 3)  # the oldest FastAPI includes no mounts


async def test_http_throttle_by_scope() -> None:
    """A throttle with a scope counts all routes, and the frames of consumers, together."""
    app = throttled_app(UserRateThrottle, throttle_rates={"user": "4/hour"})
    app.include_router(ConsumerRouter([route("/ws", consumer(UserRateThrottle))]))
    async with http(app) as client:
        assert await statuses(client, "/one", 1) == [200]
        assert await statuses(client, "/a/one", 1) == [200]
        async with connect(app, "/ws", client=("10.0.0.1", 2)) as ws:
            assert await passed(ws) == 2
        assert await statuses(client, "/one", 1) == [429]


async def test_http_throttle_by_user() -> None:
    """A user that a middleware has found is counted by its id, others by address."""
    app = throttled_app("2/hour")

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            user = dict(scope["headers"]).get(b"x-user")
            scope["user"] = User(user.decode()) if user else None
        await app(scope, receive, send)

    async with LifespanManager(app):
        for address, name, expected in (
            ("10.0.0.1", "ann", [200, 200, 429]),
            ("10.0.0.2", "ann", [429] * 3),
            ("10.0.0.1", "bob", [200, 200, 429]),
            ("10.0.0.1", "", [200, 200, 429]),
            ("10.0.0.2", "", [200, 200, 429]),
        ):
            transport = httpx.ASGITransport(app=middleware, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=as_user(name)) as client:
                assert await statuses(client, "/one") == expected, (address, name)


async def test_http_throttle_of_ones_own() -> None:
    """A throttle of one's own is asked with the request, and may be plain `def`."""
    throttle = PlainNoting([0, 3])
    async with http(throttled_app(throttle)) as client:
        assert await statuses(client, "/one", 1) == [200]
        response = await client.get("/one")
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert [(connection.url.path, action) for connection, action, _ in throttle.asked] == [("/one", None)] * 2


@pytest.mark.parametrize("throttle", [UserRateThrottle, ScopedRateThrottle("user")], ids=["class", "instance"])
async def test_http_throttle_without_a_rate(throttle: Any) -> None:
    """An HTTP route with a throttle that has no rate stops the start, and names the scope."""
    with pytest.raises(SettingsError, match="THROTTLE_RATES has no rate for 'user'"):
        async with http(throttled_app(throttle)):
            pass


@pytest.mark.parametrize("place", ["application", "include", "dependency", "parameter", "mount", "websocket"])
async def test_where_a_throttle_without_a_rate_may_stand(place: str) -> None:
    """So does one that all routes have, or the dependency of a dependency, and the route's path is told."""
    throttle = HTTPThrottle(ScopedRateThrottle("uploads"))

    async def inner(_: Annotated[None, Depends(throttle)]) -> int:
        return 1

    app = FastAPI(dependencies=[Depends(throttle)] if place == "application" else [])
    add_channel(app)
    router = APIRouter()
    path = "/api/one"
    if place == "parameter":

        @router.get("/one")
        async def with_parameter(n: Annotated[int, Depends(inner)]) -> int:
            return n

    elif place == "websocket":

        @router.websocket("/one")
        async def on_websocket(websocket: WebSocket, _: Annotated[None, Depends(throttle)]) -> None: ...

    else:

        @router.get("/one", dependencies=[Depends(inner)] if place in {"dependency", "mount"} else [])
        async def one() -> int:
            return 1

    if place == "mount":
        sub = FastAPI()
        sub.include_router(router)
        app.mount("/api", sub)
    else:
        app.include_router(router, prefix="/api", dependencies=[Depends(throttle)] if place == "include" else [])
    with pytest.raises(SettingsError, match=f"^{path}: THROTTLE_RATES has no rate for 'uploads'"):
        async with http(app):
            pass


async def test_rates_of_a_mounted_application_with_settings_of_its_own() -> None:
    """A throttle is asked about the settings of the application whose route it is."""
    app, sub = FastAPI(), FastAPI()
    add_channel(app)
    add_channel(sub, throttle_rates={"uploads": "1/hour"})

    @sub.get("/one", dependencies=[Depends(HTTPThrottle(ScopedRateThrottle("uploads")))])
    async def one() -> int:
        return 1

    app.mount("/sub", sub)
    async with http(app) as client:
        assert await statuses(client, "/sub/one", 2) == [200, 429]


async def test_http_throttle_without_add_channel() -> None:
    """On an application without `add_channel` it counts in the process, and refuses all the same."""
    app = FastAPI()

    @app.get("/one", dependencies=[Depends(HTTPThrottle("1/hour"))])
    async def one() -> int:
        return 1

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/one")).status_code == 200
        assert (await client.get("/one")).status_code == 429
        response = await client.get("/one")
        assert 0 < int(response.headers["retry-after"]) <= 3600
        assert response.json()["detail"].startswith("too often; try again in")


@pytest.mark.parametrize("channels", ["none", "no handlers", "enclosing"])
async def test_http_throttle_without_our_exception_handlers(channels: str) -> None:
    """Whatever has become of `add_channel`'s exception handlers, a request too many is 429, with Retry-After."""
    app, outer = FastAPI(), FastAPI()

    @app.get("/one", dependencies=[Depends(HTTPThrottle("1/hour"))])
    async def one() -> int:
        return 1

    if channels == "no handlers":
        add_channel(app, add_exception_handlers=False)
    elif channels == "enclosing":
        add_channel(outer)
        outer.mount("/sub", app)
    path = "/sub/one" if channels == "enclosing" else "/one"
    async with http(outer if channels == "enclosing" else app) as client:
        assert (await client.get(path)).status_code == 200
        response = await client.get(path)
        assert response.status_code == 429
        assert 0 < int(response.headers["retry-after"]) <= 3600


async def test_http_throttle_with_a_handler_of_the_status() -> None:
    """The application may have a handler for the status as well."""
    app = FastAPI()
    add_channel(app)

    @app.exception_handler(429)
    async def handle(request: Any, error: Any) -> Any:
        return httpx_response(error)

    @app.get("/one", dependencies=[Depends(HTTPThrottle("1/hour"))])
    async def one() -> int:
        return 1

    async with http(app) as client:
        assert await statuses(client, "/one", 2) == [200, 418]


async def test_http_throttle_on_a_websocket() -> None:
    """As a dependency of a consumer it refuses the handshake as other throttles do."""

    class Limited(Pings):
        async def connect(self, _: Annotated[None, Depends(HTTPThrottle("1/hour"))]) -> None:
            await self.accept()

    app = app_with(Limited)
    async with LifespanManager(app):
        async with connect(app, "/ws") as ws:
            assert ws.accepted
        async with connect(app, "/ws") as ws:
            assert ws.response is not None
            assert ws.response.status_code == 429
            assert 0 < int(ws.response.headers["retry-after"]) <= 3600
            assert ws.response.json()["code"] == "throttled"


async def test_http_throttle_as_a_parameter() -> None:
    """A `Rate` serves as well as text, and the exception can be handled by the application."""
    app = FastAPI()
    add_channel(app)

    @app.exception_handler(Throttled)
    async def handle(request: Any, error: Throttled) -> Any:
        return httpx_response(error)

    @app.get("/one", dependencies=[Depends(HTTPThrottle(Rate(1, 3600.0)))])
    async def one() -> int:
        return 1

    async with http(app) as client:
        assert await statuses(client, "/one", 2) == [200, 418]


def httpx_response(error: Throttled) -> Any:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(f"{error.retry_after:g}", 418)


# Through Redis


async def test_limits_are_shared_through_the_layer(redis_url: str) -> None:
    """Two applications on one Redis layer count together."""
    layers = {"default": redis_url}
    one, other = (app_with(consumer("3/hour"), channel_layers=layers) for _ in range(2))
    async with connect(one, "/ws") as first, connect(other, "/ws") as second:
        assert await passed(first, tries=2) == 2
        assert await passed(second) == 1
        assert await passed(first) == 0


async def test_limits_are_shared_through_limiter_url(redis_url: str) -> None:
    """`LIMITER_URL` counts in that Redis, whatever the layers are."""
    one, other = (app_with(consumer("3/hour"), limiter_url=redis_url) for _ in range(2))
    async with connect(one, "/ws") as first, connect(other, "/ws") as second:
        assert await passed(first, tries=2) == 2
        assert await passed(second) == 1
        assert await passed(first) == 0


@pytest.mark.parametrize("setting", ["allow", "deny"])
@pytest.mark.parametrize("source", ["layer", "limiter_url"])
async def test_an_outage(
    source: str, setting: str, redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is away `THROTTLE_ON_ERROR` says what happens to all; it is told once, counted, and over in time."""
    where: dict[str, Any] = (
        {"channel_layers": {"default": redis_url}} if source == "layer" else {"limiter_url": redis_url}
    )
    app = app_with(
        consumer(ConnectionRateThrottle("1000/hour"), UserRateThrottle("1000/hour")),
        throttle_on_error=setting,
        **where,
    )
    counters = app.state.channels.layer().counters
    async with connect(app, "/ws") as ws:
        assert await passed(ws) == 10
        redis_server.kill()
        assert await passed(ws, tries=50) == (50 if setting == "allow" else 0)
        if setting == "deny":
            assert (await ask(ws))["retry_after"] == 1
        async with connect(app, "/ws") as second:
            assert second.accepted is (setting == "allow")
            if second.response is not None:
                assert (second.response.status_code, second.response.headers["retry-after"]) == (429, "1")
        assert counters.uncounted >= 51
        assert sum("throttles can't count" in record.getMessage() for record in caplog.records) == 1
        redis_server.restart()
        async with asyncio.timeout(10):
            while not any(record.getMessage() == "throttles count again" for record in caplog.records):
                await ask(ws)
                await asyncio.sleep(0.02)
        before = counters.uncounted
        assert await passed(ws) == 10
        assert counters.uncounted == before


async def test_a_limiter_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """An application starts when `LIMITER_URL` can't be reached, with a line in the log, and lets through."""
    with RedisServer() as server:
        server.kill()
        app = app_with(consumer("1/hour"), limiter_url=server.url)
        started_at = time.monotonic()
        async with connect(app, "/ws") as ws:
            assert time.monotonic() - started_at < 3
            assert await passed(ws) == 10
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert any("starting without it" in line for line in lines)
        server.restart()


@pytest.mark.parametrize("url", ["nonsense", "http://localhost", "redis://localhost:port/0"])
def test_a_wrong_limiter_url(url: str) -> None:
    """A `LIMITER_URL` that is none is told when the settings are read."""
    with pytest.raises(SettingsError, match=r"^LIMITER_URL"):
        add_channel(FastAPI(), limiter_url=url)


async def test_a_flood_of_frames() -> None:
    """Of a flood of frames exactly as many get through as may, in order, and each is answered."""
    settings = ModuleType("settings")
    settings.MAX_VIOLATIONS = None  # type: ignore[attr-defined]
    app = app_with(consumer("50/hour"), settings=settings)
    async with connect(app, "/ws") as ws:
        for n in range(1000):
            await ws.send_json({"action": "ping", "request_id": n})
        replies = [await ws.receive_json() for _ in range(1000)]
        assert [reply["request_id"] for reply in replies] == list(range(1000))
        assert [reply["status"] for reply in replies] == ["ok"] * 50 + ["bad"] * 950


async def test_frames_of_each_connection_by_itself() -> None:
    """`FrameRateThrottle` counts a connection's frames with it, and leaves nothing where others are counted."""

    class Each(ActionConsumer):
        throttle_classes = [FrameRateThrottle("2/hour")]

        @action(throttle_classes=[FrameRateThrottle("1/hour")])
        async def once(self) -> str:
            return "ok"

        @action
        async def ping(self) -> str:
            return "ok"

    app = app_with(Each)
    for _ in range(2):
        async with connect(app, "/ws") as ws:
            for name, status in (("once", "ok"), ("once", "bad"), ("ping", "bad")):
                await ws.send_json({"action": name, "request_id": 1})
                assert (await ws.receive_json())["status"] == status
    assert not app.state.channels.limiter._arrivals
    with pytest.raises(DefinitionError, match="a request has none"):
        HTTPThrottle(FrameRateThrottle("1/hour"))


@pytest.mark.parametrize("has_channels", [True, False])
async def test_http_throttles_where_nobody_runs_the_lifespan(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, *, has_channels: bool
) -> None:
    """On a mounted application, or one without `add_channel`, what counts in Redis is opened by whoever asks first."""
    app, outer = FastAPI(), FastAPI()
    layers = {"default": redis_url}
    if has_channels:
        add_channel(app, channel_layers=layers)
    else:
        monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", json.dumps(layers))

    @app.get("/x", dependencies=[Depends(HTTPThrottle("1/hour"))])
    async def x() -> None: ...

    outer.mount("/sub", app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://t") as client:
        assert [(await client.get("/sub/x")).status_code for _ in range(3)] == [200, 429, 429]
    channels = app.state.channels if has_channels else app.state.fastapi_channels
    await channels.close()


async def test_the_prefix_of_the_limiter(redis_url: str) -> None:
    """Applications with prefixes of their own don't count together, though their LIMITER_URL is the same."""

    class Once(ActionConsumer):
        throttle_classes = [UserRateThrottle("1/hour")]

        @action
        async def ping(self) -> str:
            return "ok"

    for prefix in ("one", "two"):
        config = {"url": redis_url, "prefix": prefix}
        layers = {"default": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": config}}
        async with connect(app_with(Once, channel_layers=layers, limiter_url=redis_url), "/ws") as ws:
            for status in ("ok", "bad"):
                await ws.send_json({"action": "ping", "request_id": 1})
                assert (await ws.receive_json())["status"] == status


@pytest.mark.parametrize("answer", [float("nan"), -1, False, None, "1"])
async def test_what_is_no_time_to_wait(answer: Any) -> None:
    """A throttle of one's own that answers nonsense lets nothing through."""

    class Odd(BaseThrottle):
        async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
            return answer  # type: ignore[no-any-return]

    class Guarded(ActionConsumer):
        throttle_classes = [Odd]

        @action
        async def ping(self) -> str:
            return "pong"

    async with connect(app_with(Guarded), "/ws") as ws:
        await ws.send_json({"action": "ping", "request_id": 1})
        assert (await ws.receive_json())["errors"]["code"] == "internal_error"
