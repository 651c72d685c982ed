"""Limits: how many connections there may be, how fast a client may talk, and how long it may be silent."""

import asyncio
import heapq
import json
import random
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import Depends, HTTPException
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed as ReallyClosed
from websockets.exceptions import InvalidStatus

from fastapi_channels.authentication import BaseAuthentication, User
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event
from fastapi_channels.exceptions import DefinitionError, SettingsError
from fastapi_channels.pace import Pace, Silence
from fastapi_channels.permissions import DenyAll
from fastapi_channels.settings import ChannelsSettings
from fastapi_channels.testing import ConnectionClosed, RedisServer, WebSocketSession, connect
from tests.brokers import ask
from tests.conftest import Forward, Serve, app_with


class Names(BaseAuthentication):
    """Believes the query."""

    async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
        name = websocket.query_params.get("user")
        return None if name is None else (User(name), None)


class Chat(ActionConsumer):
    authentication_classes = [Names]

    @action
    async def ping(self) -> str:
        return "pong"


class Game(Chat):
    pass


def made(base: Any = Chat, **attributes: Any) -> Any:
    return type("Made", (base,), attributes)


async def ping(ws: WebSocketSession) -> Any:
    await ws.send_json({"action": "ping", "request_id": 1})
    return (await ws.receive_json())["data"]


def frame(number: int, name: str = "ping") -> str:
    return json.dumps({"action": name, "request_id": number})


async def is_let_in(app: Any, path: str = "/ws", **options: Any) -> bool:
    """Whether one more connection is; if not, it is refused as one too many."""
    async with connect(app, path, **options) as ws:
        if ws.accepted:
            assert await ping(ws) == "pong"
            return True
        assert ws.response is not None
        assert ws.response.status_code == 429
        assert ws.response.json()["code"] == "too_many_connections"
        return False


# Connections


@pytest.mark.parametrize("source", ["setting", "consumer"])
async def test_connections_of_a_consumer(source: str) -> None:
    """A consumer class has so many connections and no more, whoever they are; one that ends makes room."""
    limit = {"max_connections": 2}
    app = app_with(Chat, **limit) if source == "setting" else app_with(made(**limit))
    async with connect(app, "/ws") as one:
        async with connect(app, "/ws?user=ann"):
            assert not await is_let_in(app, client=("10.0.0.9", 1))
            assert not await is_let_in(app, "/ws?user=ann")
            assert await ping(one) == "pong"
        for _ in range(3):
            assert await is_let_in(app)


async def test_each_consumer_has_its_own() -> None:
    """The setting holds for each consumer class on its own, and a class's own number for it alone."""
    app = app_with(Chat, Game, made(max_connections=3), max_connections=1)
    async with connect(app, "/Chat"), connect(app, "/Game"):
        assert not await is_let_in(app, "/Chat")
        assert not await is_let_in(app, "/Game")
        async with connect(app, "/Made"), connect(app, "/Made"), connect(app, "/Made"):
            assert not await is_let_in(app, "/Made")


async def test_connections_of_a_user() -> None:
    """The setting counts all connections of a user to consumers that say nothing; strangers are not counted."""
    app = app_with(Chat, Game, max_connections_per_user=2)
    async with connect(app, "/Chat?user=ann"), connect(app, "/Game?user=ann", client=("10.0.0.9", 1)):
        assert not await is_let_in(app, "/Chat?user=ann")
        assert not await is_let_in(app, "/Game?user=ann")
        assert await is_let_in(app, "/Chat?user=Ann")
        async with connect(app, "/ws"), connect(app, "/ws"), connect(app, "/ws") as ws:
            assert ws.accepted
    assert await is_let_in(app, "/Chat?user=ann")


@pytest.mark.parametrize(
    ("attribute", "path"),
    [("max_connections_per_user", "?user=ann"), ("max_connections_per_address", "")],
)
async def test_a_consumers_own_number(attribute: str, path: str) -> None:
    """A class's own number counts the connections to that class alone, which the setting doesn't count."""
    own = made(**{attribute: 2})
    app = app_with(Chat, Game, own, **{attribute: 1})
    async with connect(app, f"/Made{path}"), connect(app, f"/Made{path}"):
        assert not await is_let_in(app, f"/Made{path}")
        async with connect(app, f"/Chat{path}") as ws:
            assert ws.accepted
            assert not await is_let_in(app, f"/Game{path}")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:DB8:0:0:1:2:3:4", True),
    ],
)
async def test_connections_of_an_address(one: str, other: str, is_same: bool) -> None:
    """An address is one client, of IPv6 a /64, whatever port it comes from."""
    app = app_with(Chat, max_connections_per_address=1)
    async with connect(app, "/ws", client=(one, 1)):
        assert await is_let_in(app, client=(other, 2)) is not is_same
    assert await is_let_in(app, client=(other, 2))


async def test_a_forged_address() -> None:
    """X-Forwarded-For is believed from proxies that the settings name, and of what they say the last stranger."""
    app = app_with(Chat, max_connections_per_address=1)
    async with connect(app, "/ws", headers={"x-forwarded-for": "1.1.1.1"}, client=("10.0.0.1", 1)):
        assert not await is_let_in(app, headers={"x-forwarded-for": "2.2.2.2"}, client=("10.0.0.1", 2))
    app = app_with(Chat, max_connections_per_address=1, trusted_proxies=["10.0.0.0/8"])
    async with connect(app, "/ws", headers={"x-forwarded-for": "1.1.1.1"}, client=("10.0.0.1", 1)):
        assert await is_let_in(app, headers={"x-forwarded-for": "2.2.2.2"}, client=("10.0.0.1", 1))
        assert not await is_let_in(app, headers={"x-forwarded-for": "2.2.2.2, 1.1.1.1"}, client=("10.0.0.2", 1))
        assert not await is_let_in(app, headers={"x-forwarded-for": "2.2.2.2"}, client=("1.1.1.1", 1))


@pytest.mark.parametrize("attribute", ["max_connections", "max_connections_per_user", "max_connections_per_address"])
async def test_none_at_all(attribute: str) -> None:
    """With 0 nobody is let in."""
    assert not await is_let_in(app_with(Chat, **{attribute: 0}), "/ws?user=ann")
    assert not await is_let_in(app_with(made(**{attribute: 0})), "/ws?user=ann")


async def test_many_at_once() -> None:
    """Of many who come at the same moment exactly as many are let in as there are places."""
    app = app_with(Chat, max_connections=7)
    async with connect(app, "/other"):
        sessions = [connect(app, "/ws") for _ in range(30)]
        entered = await asyncio.gather(*(session.__aenter__() for session in sessions))
        assert sum(ws.accepted for ws in entered) == 7
        for session in sessions:
            await session.__aexit__(None, None, None)
        assert await is_let_in(app)


@pytest.mark.parametrize("attribute", ["max_connections", "max_connections_per_user", "max_connections_per_address"])
async def test_refused_by_a_close(attribute: str) -> None:
    """With `reject_mode="close"` who is too many reads 4009, and takes no place."""
    app = app_with(Chat, reject_mode="close", **{attribute: 1})
    async with connect(app, "/ws?user=ann"):
        for _ in range(3):
            async with connect(app, "/ws?user=ann") as ws:
                assert (ws.accepted, ws.close_code) == (True, 4009)
                with pytest.raises(ConnectionClosed):
                    await ws.receive_text()
    async with connect(app, "/ws?user=ann") as ws:
        assert await ping(ws) == "pong"


LIMITS = {"max_connections": 1, "max_connections_per_user": 1, "max_connections_per_address": 1}


class Ending(Chat):
    """Ends as the query says."""

    @staticmethod
    def dependency(how: str = "") -> None:
        if how == "dependency":
            raise HTTPException(404, "none")

    async def connect(self, number: int = 0, how: str = "", _: Annotated[None, Depends(dependency)] = None) -> None:
        match how:
            case "refuse":
                await self.close(4503)
            case "raise":
                raise HTTPException(403, "no")
            case "fail":
                raise ValueError("wrong")
            case "accept and fail":
                await self.accept()
                raise ValueError("wrong")
            case "accept and close":
                await self.accept()
                await self.close()
            case "close after":
                await self.close_in_disconnect()

    async def close_in_disconnect(self) -> None:
        self.fails = True

    async def disconnect(self, code: int) -> None:
        if getattr(self, "fails", False):
            raise ValueError("wrong")

    @action
    async def leave(self) -> None:
        await self.close(4600)


@pytest.mark.parametrize(
    "how",
    [
        "refuse",
        "raise",
        "fail",
        "accept and fail",
        "accept and close",
        "close after",
        "dependency",
        "number",
        "permission",
        "action",
        "vanish",
        "",
    ],
)
@pytest.mark.parametrize("reject_mode", ["http", "close"])
async def test_every_end_makes_room(how: str, reject_mode: Any) -> None:
    """Whatever ends a connection, before it is open or after, its places are free when it is over."""
    consumer = made(Ending, permission_classes=[lambda ws: ws.query_params.get("how") != "permission"])
    app = app_with(consumer, reject_mode=reject_mode, **LIMITS)
    for _ in range(3):
        try:
            query = "&number=x" if how == "number" else ""
            async with connect(app, f"/ws?user=ann&how={how}{query}") as ws:
                if how == "action":
                    await ws.send_json({"action": "leave"})
                    assert (await ws.closed())[0] == 4600
                elif how == "vanish":
                    await ws.vanish()
                elif how in ("", "close after"):
                    assert await ping(ws) == "pong"
        except ValueError:
            assert "fail" in how
    async with connect(app, "/ws?user=ann") as ws:
        assert await ping(ws) == "pong"


async def test_who_is_cancelled_makes_room() -> None:
    """A connection whose task the server cancels gives its places back, in `connect` as later."""
    entered = asyncio.Event()

    class Hangs(Chat):
        async def connect(self, hang: bool = False) -> None:
            entered.set()
            if hang:
                await asyncio.Event().wait()

    app = app_with(Hangs, **LIMITS)
    async with connect(app, "/other"):
        for query in ("&hang=1", ""):
            entered.clear()
            session = connect(app, f"/ws?user=ann{query}")
            task = asyncio.create_task(session.__aenter__())
            await asyncio.wait_for(entered.wait(), 5)
            if query:
                task.cancel()
                await asyncio.wait({task})
            else:
                ws = await task
                assert ws._task is not None
                ws._task.cancel()
                await asyncio.wait({ws._task})
            async with connect(app, "/ws?user=ann") as ws:
                assert await ping(ws) == "pong"


async def test_a_refused_client_takes_no_place_of_another() -> None:
    """Who is refused for its user, or for the consumer, gives the place of its address back."""
    app = app_with(Chat, max_connections_per_user=1, max_connections_per_address=2)
    async with connect(app, "/ws?user=ann", client=("10.0.0.1", 1)):
        for _ in range(3):
            assert not await is_let_in(app, "/ws?user=ann", client=("10.0.0.2", 1))
        async with connect(app, "/ws", client=("10.0.0.2", 1)), connect(app, "/ws", client=("10.0.0.2", 1)) as ws:
            assert ws.accepted
            assert not await is_let_in(app, client=("10.0.0.2", 1))


async def test_across_processes(redis_url: str, redis_server: RedisServer) -> None:
    """Applications on one Redis count together, and leave nothing in it."""
    layers = {"channel_layers": {"default": redis_url}}
    one, other = (app_with(Chat, max_connections_per_user=2, max_connections=3, **layers) for _ in range(2))
    async with connect(one, "/ws?user=ann"), connect(other, "/ws?user=ann"):
        assert not await is_let_in(one, "/ws?user=ann")
        assert not await is_let_in(other, "/ws?user=ann")
        async with connect(other, "/ws?user=bob"):
            assert not await is_let_in(one, "/ws?user=cy")
        assert await is_let_in(one, "/ws?user=cy")
    assert ask(redis_server, "KEYS", "*") == []


async def test_the_limiters_redis_counts(redis_url: str, redis_server: RedisServer) -> None:
    """With LIMITER_URL that Redis counts, whatever the layer is."""
    one, other = (app_with(Chat, max_connections=1, limiter_url=redis_url) for _ in range(2))
    async with connect(one, "/ws"):
        assert len(ask(redis_server, "KEYS", "*")) == 1
        assert not await is_let_in(other)
    assert await is_let_in(other)
    assert ask(redis_server, "KEYS", "*") == []


@pytest.mark.parametrize("on_error", ["allow", "deny"])
async def test_without_the_redis_that_counts(on_error: Any, redis_url: str, redis_server: RedisServer) -> None:
    """While it is away the process counts its own connections, or refuses with 503."""
    app = app_with(Chat, max_connections=2, limiter_url=redis_url, throttle_on_error=on_error)
    async with connect(app, "/ws") as before:
        redis_server.kill()
        async with connect(app, "/ws") as ws:
            if on_error == "allow":
                assert ws.accepted
                assert not await is_let_in(app)
            else:
                assert ws.response is not None
                assert ws.response.status_code == 503
                assert int(ws.response.headers["retry-after"]) > 0
        assert await ping(before) == "pong"
    redis_server.restart()


async def test_a_server_that_stops(serve: Serve, redis_url: str, redis_server: RedisServer) -> None:
    """Under a real server clients read 429 when there are too many; when it stops nothing of them stays in Redis."""
    app = app_with(Chat, max_connections=2, channel_layers={"default": redis_url})
    served = await serve(app)
    clients = [await connect_for_real(f"{served.url}/ws", proxy=None) for _ in range(2)]
    with pytest.raises(InvalidStatus) as refused:
        await connect_for_real(f"{served.url}/ws", proxy=None)
    assert refused.value.response.status_code == 429
    assert len(ask(redis_server, "KEYS", "*")) == 1
    await served.stop()
    for client in clients:
        with pytest.raises(ReallyClosed):
            await client.recv()
    assert ask(redis_server, "KEYS", "*") == []


# The pace


def test_frames_a_second() -> None:
    """A second's worth passes at once, one more when there is room for it again, and what is refused costs nothing."""
    pace = Pace(4, None)
    for start in (0.0, 12345.678, 1e7):
        assert [pace.wait(start, 1) for _ in range(4)] == [0] * 4
        for _ in range(50):
            assert pace.wait(start, 1) == pytest.approx(0.25)
        assert pace.wait(start + 0.2, 1) == pytest.approx(0.05)
        assert pace.wait(start + 0.25, 1) == 0
        assert pace.wait(start + 0.25, 1) == pytest.approx(0.25)


@pytest.mark.parametrize("frames", [0.1, 0.5, 1, 1.5, 3, 7, 10, 30, 49, 1000])
def test_who_keeps_to_the_pace(frames: float) -> None:
    """Who sends a second's worth at once, or evenly at the pace for ever, is never refused, for all rounding."""
    for start in (0.0, 0.1, 12345.678, 98765.4321, 1e7 + 1 / 3):
        pace = Pace(frames, None)
        assert {pace.wait(start, 1) for _ in range(max(1, int(frames)))} == {0}
        assert pace.wait(start, 1) > 0
        pace = Pace(frames, None)
        assert {pace.wait(start + n / frames, 1) for n in range(2000)} == {0}


@pytest.mark.parametrize("seed", range(5))
def test_random_frames(seed: int) -> None:
    """In no span of time more get through than the pace allows; who waits for as long as is told gets through."""
    chance = random.Random(seed)
    frames, size = chance.choice([0.7, 3, 20]), chance.choice([50, 1000])
    pace, now, passed = Pace(frames, size), 1000.0, list[tuple[float, int]]()
    for _ in range(500):
        now += chance.expovariate(frames * 1.5)
        wanted = chance.randint(0, size)
        wait = pace.wait(now, wanted)
        if wait and chance.random() < 0.5:
            now += wait
            assert pace.wait(now, wanted) == 0
            wait = 0
        if not wait:
            passed.append((now, wanted))
    for first in range(0, len(passed), 7):
        total = 0
        for last in range(first, len(passed)):
            total += passed[last][1]
            span = passed[last][0] - passed[first][0] + 1
            assert last - first + 1 <= max(frames * span, 1 + frames * (span - 1)) + 0.001
            assert total <= size * span + 0.001


def test_bytes_a_second() -> None:
    """Bytes count likewise; a frame larger than a second's worth passes if nothing came before, and is paid for."""
    pace = Pace(None, 100)
    assert [pace.wait(0, 50), pace.wait(0, 50)] == [0, 0]
    assert pace.wait(0, 30) == pytest.approx(0.3)
    assert pace.wait(0, 0) == 0
    assert pace.wait(1, 1000) == 0
    assert pace.wait(1, 1) > 9
    assert pace.wait(10, 1) == pytest.approx(0.01)
    assert pace.wait(10.5, 50) == 0
    assert pace.wait(12, 1000) == 0


def test_the_longer_wait_counts() -> None:
    """What is refused for its size costs no frame, and the other way round."""
    pace = Pace(2, 100)
    assert pace.wait(0, 90) == 0
    assert pace.wait(0, 90) == pytest.approx(0.8)
    assert pace.wait(0, 10) == 0
    assert pace.wait(0, 10) == pytest.approx(0.5)


async def test_frames_beyond_the_pace(forward: Forward) -> None:
    """A frame too many is answered in its turn with `throttled`, its `request_id` and when; later ones are handled."""
    app = app_with(Chat, max_frames_per_second=3)
    async with connect(app, "/ws") as ws:
        for number in range(6):
            await ws.send_text(frame(number))
        replies = [await ws.receive_json() for _ in range(6)]
        assert [reply["request_id"] for reply in replies] == list(range(6))
        assert [reply["status"] for reply in replies] == ["ok"] * 3 + ["bad"] * 3
        for reply in replies[3:]:
            assert (reply["type"], reply["action"], reply["data"]) == ("response", "ping", None)
            assert reply["errors"]["code"] == "throttled"
            assert 0 < reply["errors"]["retry_after"] <= 0.334
        forward(1)
        assert await ping(ws) == "pong"


async def test_bytes_beyond_the_pace(forward: Forward) -> None:
    """Bytes count as they come in, those of text in UTF-8."""
    app = app_with(Chat, max_bytes_per_second=1000)
    text = json.dumps({"action": "ping", "request_id": "日" * 200}, ensure_ascii=False)
    async with connect(app, "/ws") as ws:
        for _ in range(2):
            await ws.send_text(text)
        await ws.send_bytes(frame(1).encode())
        assert [(await ws.receive_json())["status"] for _ in range(3)] == ["ok", "bad", "ok"]
        forward(1)
        assert await ping(ws) == "pong"


@pytest.mark.parametrize(
    "text", [frame(1), "no json", "[]", frame(1, "nothing"), frame(1, "$cancel"), frame(1, "$auth"), "x" * 2000]
)
@pytest.mark.parametrize("has_throttle", [True, False])
async def test_too_many_violations(text: str, has_throttle: bool) -> None:
    """Frames beyond the pace are violations, whatever is in them, each is one: too many close with 4029."""
    limits = {"max_frames_per_second": 2, "max_violations": 3, "max_frame_size": 1000}
    app = app_with(made(throttle_classes=["2/hour"]) if has_throttle else Chat, **limits)
    async with connect(app, "/ws") as ws:
        for _ in range(2):
            assert await ping(ws) == "pong"
        for _ in range(3):
            await ws.send_text(text)
            assert (await ws.receive_json())["errors"]["code"] == "throttled"
        await ws.send_text(text)
        assert (await ws.closed())[0] == 4029


async def test_violations_of_long_ago(forward: Forward) -> None:
    """Violations count for a minute."""
    app = app_with(Chat, max_frames_per_second=1, max_violations=2)
    async with connect(app, "/ws") as ws:
        for _ in range(5):
            assert await ping(ws) == "pong"
            assert await ping(ws) is None
            assert await ping(ws) is None
            forward(61)
        assert ws.close_code is None


async def test_throttles_are_not_asked_of_what_is_too_fast() -> None:
    """What is refused for the pace is not counted by throttles, whose Redis a flood can't reach."""
    app = app_with(made(throttle_classes=["4/hour"]), max_frames_per_second=3)
    async with connect(app, "/ws") as ws:
        for number in range(50):
            await ws.send_text(frame(number))
        assert [(await ws.receive_json())["status"] for _ in range(50)] == ["ok"] * 3 + ["bad"] * 47
    async with connect(app, "/ws") as ws:
        for number in range(2):
            await ws.send_text(frame(number))
        assert [(await ws.receive_json())["status"] for _ in range(2)] == ["ok", "bad"]


async def test_a_flood_during_connect() -> None:
    """Frames that come while `connect` runs count too."""
    ready = asyncio.Event()

    class Slow(Chat):
        async def connect(self) -> None:
            await self.accept()
            await ready.wait()

    async with connect(app_with(Slow, max_frames_per_second=2), "/ws") as ws:
        for number in range(4):
            await ws.send_text(frame(number))
        await asyncio.sleep(0)
        ready.set()
        assert [(await ws.receive_json())["status"] for _ in range(4)] == ["ok", "ok", "bad", "bad"]


class Other(JsonConsumer):
    async def receive(self, data: Any) -> None:
        await self.send_json({"got": data})


class Plain(WebSocketConsumer):
    async def receive(self, data: str) -> None:
        await self.send(text=json.dumps({"got": json.loads(data)}))


@pytest.mark.parametrize("consumer", [Other, Plain])
async def test_other_consumers(consumer: Any) -> None:
    """The pace holds for every consumer, and a class's own number stands in place of the setting."""
    app = app_with(made(consumer, max_frames_per_second=2), max_frames_per_second=100)
    async with connect(app, "/ws") as ws:
        for number in range(3):
            await ws.send_json(number)
        assert [await ws.receive_json() for _ in range(2)] == [{"got": 0}, {"got": 1}]
        reply = await ws.receive_json()
        assert (reply["status"], reply["request_id"], reply["errors"]["code"]) == ("bad", None, "throttled")


async def test_connections_have_their_own_pace() -> None:
    """The pace is a connection's own: another one is not held back."""
    app = app_with(Chat, max_frames_per_second=1)
    async with connect(app, "/ws") as one, connect(app, "/ws") as other:
        assert [await ping(one), await ping(one), await ping(other)] == ["pong", None, "pong"]


# Silence


class Timers:
    """A clock, and what was asked of it."""

    class Handle:
        def __init__(self) -> None:
            self.is_cancelled = False

        def cancel(self) -> None:
            self.is_cancelled = True

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, int, Timers.Handle, Callable[..., None], Any]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[..., None], *arguments: Any) -> "Timers.Handle":
        handle = Timers.Handle()
        heapq.heappush(self.timers, (when, len(self.timers) + id(handle), handle, call, arguments))
        return handle

    def forward(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers and self.timers[0][0] <= until:
            when, _, handle, call, arguments = heapq.heappop(self.timers)
            self.now = max(self.now, when)
            if not handle.is_cancelled:
                call(*arguments)
        self.now = until

    @property
    def pending(self) -> int:
        return sum(not entry[2].is_cancelled for entry in self.timers)


class Watch:
    def __init__(self) -> None:
        self.timers = Timers()
        self.is_busy = False
        self.ended: list[tuple[float, str]] = []

    def make(self, first: float | None, later: float | None) -> Silence:
        loop: Any = self.timers
        return Silence(loop, first, later, lambda: self.is_busy, self.end)

    def end(self, what: str) -> None:
        self.ended.append((self.timers.now - 1000, what))


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_no_first_frame(watch: Watch) -> None:
    """Who says nothing at all is told of once, at the time of the first frame."""
    watch.make(5, None)
    watch.timers.forward(4.9)
    assert not watch.ended
    watch.timers.forward(1000)
    ((at, what),) = watch.ended
    assert at == pytest.approx(5)
    assert "first" in what


def test_a_first_frame(watch: Watch) -> None:
    """After a first frame nothing more is due, if there is no other limit."""
    silence = watch.make(5, None)
    watch.timers.forward(4.9)
    silence.heard()
    watch.timers.forward(1000)
    assert (watch.ended, watch.timers.pending) == ([], 0)


def test_work_of_the_server_is_no_first_frame(watch: Watch) -> None:
    """That something of the server's is under way doesn't put the first frame off, and doesn't stand for it."""
    watch.is_busy = True
    watch.make(5, None)
    watch.timers.forward(1000)
    assert [at for at, _ in watch.ended] == [5]


def test_idle(watch: Watch) -> None:
    """Who says nothing for too long is told of; each frame gives it the whole time anew."""
    silence = watch.make(None, 10)
    for _ in range(20):
        watch.timers.forward(9.5)
        silence.heard()
        assert watch.timers.pending == 1
    watch.timers.forward(9.9)
    assert not watch.ended
    watch.timers.forward(100)
    ((at, _),) = watch.ended
    assert at == pytest.approx(20 * 9.5 + 10)


def test_busy_is_not_idle(watch: Watch) -> None:
    """While something is being seen to it is not silent; the time begins when that was last so."""
    silence = watch.make(None, 10)
    watch.is_busy = True
    watch.timers.forward(1005)
    assert not watch.ended
    watch.is_busy = False
    watch.timers.forward(20)
    assert [at for at, _ in watch.ended] == [1010]
    silence.cancel()


def test_both(watch: Watch) -> None:
    """With both limits the shorter one holds before the first frame, and the one for later after it."""
    for first, later, at in ((3, 10, 3), (10, 3, 3), (3, 3, 3)):
        watch = Watch()
        watch.make(first, later)
        watch.timers.forward(1000)
        assert [when for when, _ in watch.ended] == [at]
    watch = Watch()
    silence = watch.make(3, 10)
    watch.timers.forward(2)
    silence.heard()
    watch.timers.forward(9)
    assert not watch.ended
    watch.timers.forward(1000)
    assert [when for when, _ in watch.ended] == [12]


def test_a_silence_that_is_cancelled(watch: Watch) -> None:
    """After `cancel` nothing is told, and no timer is left."""
    silence = watch.make(3, 10)
    silence.heard()
    silence.cancel()
    silence.cancel()
    assert watch.timers.pending == 0
    watch.timers.forward(1000)
    assert not watch.ended


async def due() -> None:
    """Wait until whatever timer is due has run: it is due before this one."""
    await asyncio.sleep(0.001)


async def test_no_first_frame_from_a_client(forward: Forward) -> None:
    """A client that sends nothing in time is closed with 1001; one that has sent something stays for ever."""
    app = app_with(Chat, first_frame_timeout=10)
    async with connect(app, "/ws") as silent, connect(app, "/ws") as other:
        assert await ping(other) == "pong"
        forward(9)
        await due()
        assert silent.close_code is None
        forward(2)
        assert (await silent.closed())[0] == 1001
        assert silent.close_reason
        forward(10_000)
        await due()
        assert await ping(other) == "pong"


@pytest.mark.parametrize("text", ["no json", "x" * 2000, '{"action": "$cancel", "request_id": 1}', ""])
async def test_any_frame_is_a_first_frame(text: str, forward: Forward) -> None:
    """Whatever the first frame holds, it is one, also if it comes while `connect` runs."""
    ready = asyncio.Event()

    class Slow(Chat):
        async def connect(self, slow: bool = False) -> None:
            if slow:
                await self.accept()
                await ready.wait()

    app = app_with(Slow, first_frame_timeout=10, max_frame_size=1000)
    for query in ("", "?slow=1"):
        async with connect(app, f"/ws{query}") as ws:
            await ws.send_text(text)
            await due()
            ready.set()
            if "cancel" not in text:
                assert (await ws.receive_json())["status"] == "bad"
            await due()
            forward(11)
            await due()
            assert await ping(ws) == "pong"


async def test_idle_clients(forward: Forward) -> None:
    """A client that sends nothing for too long is closed with 1001; what the server sends makes no difference."""

    class Hearing(Chat):
        groups = ["hall"]
        forward_events = True

    app = app_with(Hearing, idle_timeout=10)
    async with connect(app, "/ws") as idle, connect(app, "/ws") as other:
        for _ in range(3):
            assert await ping(other) == "pong"
            forward(6)
            await due()
            await app.state.channels.layer().group_send("hall", {"type": "news"})
            assert await other.receive_json() == {"type": "news"}
        assert (await idle.closed())[0] == 1001
        assert await ping(other) == "pong"
        forward(11)
        assert (await other.closed())[0] == 1001


async def test_waiting_clients_are_not_idle(forward: Forward) -> None:
    """While an action or a stream runs, or frames wait, a client waits too, and is not idle."""
    ready = asyncio.Event()

    class Slow(Chat):
        @action
        async def slow(self) -> str:
            await ready.wait()
            return "done"

        @action(concurrency=2)
        async def beside(self) -> str:
            await ready.wait()
            return "done"

        @action
        async def stream(self) -> Any:
            yield 1
            await ready.wait()
            yield 2

    app = app_with(Slow, idle_timeout=10)
    for what in ("slow", "beside", "stream", "many"):
        ready.clear()
        async with connect(app, "/ws") as ws:
            for number in range(1200 if what == "many" else 1):
                await ws.send_text(frame(number, "slow" if what == "many" else what))
            await due()
            for _ in range(5):
                forward(11)
                await due()
            assert ws.close_code is None, what
            ready.set()
            if what == "many":
                for _ in range(1200):
                    assert (await ws.receive_json())["data"] == "done"
            else:
                await ws.receive_json()
                if what == "stream":
                    assert [(await ws.receive_json())["type"] for _ in range(2)] == ["stream", "response"]
            assert await ping(ws) == "pong"


async def test_events_are_no_sign_of_life(forward: Forward) -> None:
    """A silent client is idle, also while a handler is busy with what others send to its group."""
    begun, ready = asyncio.Event(), asyncio.Event()

    class Listens(Chat):
        groups = ["hall"]

        @event("work")
        async def work(self, event: dict[str, Any]) -> None:
            begun.set()
            await ready.wait()

    app = app_with(Listens, idle_timeout=10)
    async with connect(app, "/ws") as ws:
        await app.state.channels.layer().group_send("hall", {"type": "work"})
        await begun.wait()
        forward(11)
        await due()
        assert ws.close_code == 1001
        ready.set()


async def test_under_a_server(serve: Serve) -> None:
    """Under a real server the client reads 1001, for no first frame and for idling."""
    served = await serve(app_with(made(idle_timeout=0.1), made(first_frame_timeout=0.1)))
    for path in ("/ws", "/Made"):
        async with connect_for_real(f"{served.url}{path}", proxy=None) as client:
            with pytest.raises(ReallyClosed) as closed:
                await client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001


# What makes no sense

WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in ("max_connections", "max_connections_per_user") for value in (-1, 1.5, "1", True)],
    ("max_connections_per_address", -1),
    *[
        (name, value)
        for name in ("max_frames_per_second", "max_bytes_per_second", "first_frame_timeout", "idle_timeout")
        for value in (0, -1, "1", float("nan"))
    ],
    ("max_violations", 0),
    ("permission_recheck", 0),
    ("permission_recheck", -1.0),
    ("permission_recheck", float("nan")),
    ("permission_recheck", "30"),
    ("token_in_first_frame", "yes"),
]


@pytest.mark.parametrize(("attribute", "value"), WRONG)
def test_a_class_that_makes_no_sense(attribute: str, value: Any) -> None:
    """A value that makes no sense stops the class, and is named."""
    with pytest.raises(DefinitionError, match=attribute):
        made(**{attribute: value})


@pytest.mark.parametrize(
    ("attribute", "value"),
    [(name, value) for name, value in WRONG if type(value) in (float, int) and name in ChannelsSettings.model_fields],
)
def test_a_setting_that_makes_no_sense(attribute: str, value: Any) -> None:
    """As a setting it stops `add_channel`."""
    with pytest.raises(SettingsError, match=attribute.upper()):
        app_with(Chat, **{attribute: value})


async def test_a_limit_is_asked_in_its_turn() -> None:
    """The address and the consumer are counted before authentication, the user before permissions."""
    app = app_with(made(max_connections_per_address=0, permission_classes=[DenyAll]))
    assert not await is_let_in(app)
    app = app_with(made(max_connections_per_user=0, permission_classes=[DenyAll]))
    assert not await is_let_in(app, "/ws?user=ann")
    async with connect(app, "/ws") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 403
