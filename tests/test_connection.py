"""A connection's way out: order, the outbox and its policies, a reader that stalls, and what it costs the others."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import anyio.to_thread
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.sessions import SessionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed as ReallyClosed

from fastapi_channels import connection
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event
from fastapi_channels.layers import ChannelLayer
from fastapi_channels.testing import ConnectionClosed, WebSocketSession, connect
from tests.conftest import Serve, app_with, until

GROUP = "readers"


class Reader(ActionConsumer):
    groups = [GROUP]
    forward_events = ["tick", "tock"]

    ended: ClassVar[list[tuple[int, str]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.ended = []

    @action
    async def ping(self) -> str:
        return "pong"

    @event
    async def handled(self, message: dict[str, Any]) -> None:
        await self.send_json({"type": "handled", "n": message["n"]})

    async def disconnect(self, code: int, reason: str) -> None:
        self.ended.append((code, reason))


class Stall:
    """A middleware of somebody else, whose `send` waits on paths that end in `?slow` while it `holds`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.opened = asyncio.Event()
        self.reached = asyncio.Event()

    def hold(self) -> None:
        self.opened.clear()
        self.reached.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_send(message: Message) -> None:
            if message["type"] in ("websocket.send", "websocket.close"):
                if not self.opened.is_set():
                    self.reached.set()
                await self.opened.wait()
            await send(message)

        is_slow = scope["type"] == "websocket" and scope["query_string"] == b"slow"
        await self.app(scope, receive, slow_send if is_slow else send)


def layer_of(app: FastAPI) -> ChannelLayer:
    layer: ChannelLayer = app.state.channels.layer()
    return layer


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


async def tick(app: FastAPI, *numbers: int, kind: str = "tick", text: str = "") -> None:
    for number in numbers:
        await layer_of(app).group_send(GROUP, {"type": kind, "n": number, "text": text})


async def numbers_until_ping(ws: WebSocketSession) -> list[Any]:
    """The numbers of what comes before the answer to a question that is asked now."""
    await ws.send_json({"action": "ping", "request_id": "marker"})
    numbers = []
    while (frame := await ws.receive_json()).get("request_id") != "marker":
        numbers.append(frame["n"])
    return numbers


# The direct way


@pytest.mark.parametrize("with_sessions", [False, True])
async def test_a_frame_leaves_in_the_senders_own_step(with_sessions: bool) -> None:
    """A forwarded event is with the server when `group_send` returns, also behind Starlette's own middleware."""

    class Chat(Reader): ...

    app = app_with(Chat)
    if with_sessions:
        app.add_middleware(SessionMiddleware, secret_key="x")
    async with connect(app, "/ws") as ws:
        await tick(app, 1)
        assert (await ws.receive_json(timeout=0))["n"] == 1


async def test_a_middleware_with_a_timeout_around_send_works() -> None:
    """Another's middleware may open a timeout around `send`: it runs in a task of the connection's own."""
    tasks: dict[int, set[asyncio.Task[Any] | None]] = {}
    gate = asyncio.Event()

    class WithTimeout:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def timed_send(message: Message) -> None:
                tasks.setdefault(id(scope), set()).add(asyncio.current_task())
                async with asyncio.timeout(0.1):
                    if scope.get("query_string") == b"slow" and message["type"] == "websocket.send":
                        await gate.wait()
                    await asyncio.sleep(0)
                    await send(message)

            await self.app(scope, receive, timed_send if scope["type"] == "websocket" else send)

    class Chat(Reader): ...

    app = app_with(Chat)
    app.add_middleware(WithTimeout)
    async with connect(app, "/ws") as one, connect(app, "/ws?slow") as slow, connect(app, "/ws") as two:
        await tick(app, *range(20))
        for ws in (one, two):
            assert await numbers_until_ping(ws) == list(range(20))
        await slow.receive_nothing(0.15)  # its timeout passes: nothing can be sent to it any more
        await tick(app, 20)
        for ws in (one, two):
            assert await numbers_until_ping(ws) == [20]
        sender = asyncio.current_task()
        assert all(sender not in used for used in tasks.values())
        gate.set()


async def test_frames_keep_their_order_from_direct_to_waiting_and_back() -> None:
    """Frames that go at once, one that gets stuck, those that wait behind it, and later ones arrive in order."""

    class Chat(Reader): ...

    app = app_with(Chat)
    stall = Stall(app)
    stall.opened.set()
    async with connect(stall, "/ws?slow") as ws:
        await tick(app, 0, 1)
        assert [(await ws.receive_json())["n"] for _ in range(2)] == [0, 1]
        stall.hold()
        await tick(app, 2)
        await asyncio.wait_for(stall.reached.wait(), 1)
        for number in range(3, 60):
            await tick(app, number, kind=["tick", "tock", "handled"][number % 3])
        assert await ws.receive_nothing(0.01)
        stall.opened.set()
        assert [(await ws.receive_json())["n"] for _ in range(58)] == list(range(2, 60))
        await tick(app, 60, 61)
        assert await numbers_until_ping(ws) == [60, 61]


# The outbox


async def fill(app: FastAPI, stall: Stall, numbers: range, **options: Any) -> None:
    """Stop the slow client's socket with one frame, and have the others wait in its outbox."""
    stall.hold()
    await tick(app, numbers[0], **options)
    await asyncio.wait_for(stall.reached.wait(), 1)
    await tick(app, *numbers[1:], **options)


@pytest.mark.parametrize(
    ("overflow", "expected"),
    [("drop_oldest", [0, *range(95, 100)]), ("drop_newest", list(range(6))), ("latest", [0, 99])],
)
async def test_a_full_outbox_follows_its_policy(
    overflow: Any, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A client that doesn't read gets what its policy keeps, in order; what is dropped is counted, and told once."""

    class Chat(Reader): ...

    app = app_with(Chat, overflow=overflow, outbox_frames=5)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow, connect(stall, "/ws") as quick:
        await fill(app, stall, range(100))
        assert await numbers_until_ping(quick) == list(range(100))
        stall.opened.set()
        assert await numbers_until_ping(slow) == expected
        assert layer_of(app).counters.outbox_dropped == 100 - len(expected)
        assert layer_of(app).counters.too_slow == 0
        await tick(app, 100)
        assert await numbers_until_ping(slow) == [100]
    assert len(warnings(caplog)) == 1


async def test_the_policy_close_closes_with_4008(caplog: pytest.LogCaptureFixture) -> None:
    """By default a client whose outbox is full is closed with 4008; what was waiting is dropped and counted."""

    class Chat(Reader): ...

    app = app_with(Chat, outbox_frames=5)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow, connect(stall, "/ws") as quick:
        await fill(app, stall, range(100))
        assert await numbers_until_ping(quick) == list(range(100))
        stall.opened.set()
        assert (await slow.receive_json())["n"] == 0
        with pytest.raises(ConnectionClosed):
            await slow.receive_json()
        assert (await slow.closed())[0] == 4008
        assert [code for code, _ in Chat.ended] == [4008]
        assert layer_of(app).counters.too_slow == 1
        assert layer_of(app).counters.outbox_dropped == 6
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("overflow", ["close", "drop_oldest", "drop_newest", "latest"])
async def test_the_outbox_is_bounded_in_bytes(overflow: Any) -> None:
    """However many bytes are sent to a client that doesn't read, no more than its limit and one frame wait for it."""
    limit, size = 10_000, 4_000

    class Chat(Reader):
        def outbox_key(self, content: Any) -> Hashable:
            return None

    app = app_with(Chat, overflow=overflow, outbox_frames=1000, outbox_bytes=limit)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await fill(app, stall, range(100))
        await tick(app, *range(100, 150), text="x" * size)
        stall.opened.set()
        if overflow == "close":
            assert (await slow.closed())[0] == 4008
        frames = []
        while not await slow.receive_nothing(0.05):
            frames.append(await slow.receive_text())
        assert sum(map(len, frames[1:])) <= limit + size + 100


async def test_a_single_frame_may_be_larger_than_the_outbox() -> None:
    """A frame above `OUTBOX_BYTES` is sent all the same if nothing waits."""

    class Chat(Reader): ...

    app = app_with(Chat, outbox_bytes=10)
    stall = Stall(app)
    stall.opened.set()
    async with connect(stall, "/ws?slow") as slow:
        for number in range(3):
            await tick(app, number, text="x" * 1000)
            assert (await slow.receive_json())["n"] == number


async def test_latest_keeps_the_newest_frame_of_each_key() -> None:
    """Under `latest` a frame that waits is replaced, in its place, by a newer one of its type, also by `send_json`."""

    class Tock(BaseModel):
        type: str = "tock"
        n: int

    class Chat(Reader):
        @event
        async def send_model(self, message: dict[str, Any]) -> None:
            await self.send_json(Tock(n=message["n"]))
            await self.send_json({"n": -message["n"]})

    app = app_with(Chat, overflow="latest", outbox_frames=10)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await fill(app, stall, range(2))
        await tick(app, 3, kind="tock")
        await tick(app, 4, 5)
        await tick(app, 6, 7, kind="send.model")
        await tick(app, 8)
        await slow.receive_nothing(0.01)
        stall.opened.set()
        assert await numbers_until_ping(slow) == [0, 8, 7, -6, -7]


async def test_latest_replaces_before_it_drops() -> None:
    """In a full outbox a newer frame takes the place of the one of its key, and no other is dropped for it."""

    class Chat(Reader):
        def outbox_key(self, content: Any) -> Hashable:
            key: Hashable = content["n"] // 10
            return key

    app = app_with(Chat, overflow="latest", outbox_frames=3)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await fill(app, stall, range(1))
        await tick(app, 10, 20, 30, 21, 31)
        stall.opened.set()
        assert await numbers_until_ping(slow) == [0, 10, 21, 31]
        assert layer_of(app).counters.outbox_dropped == 2


async def test_latest_drops_the_oldest_where_keys_are_not_enough() -> None:
    """With more keys than room the oldest frames are dropped; frames without a key are never replaced."""

    class Chat(Reader):
        def outbox_key(self, content: Any) -> Hashable:
            return content["n"] if content["n"] < 10 else None

    app = app_with(Chat, overflow="latest", outbox_frames=3)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await fill(app, stall, range(5))
        stall.opened.set()
        assert await numbers_until_ping(slow) == [0, 2, 3, 4]
        await fill(app, stall, range(20, 24))
        stall.opened.set()
        assert await numbers_until_ping(slow) == [20, 21, 22, 23]


async def test_a_consumers_limits_are_its_own() -> None:
    """Attributes of the class, or of its route, stand above the settings of the application."""

    class Small(Reader):
        outbox_frames = 2
        overflow = "drop_newest"

    class Large(Reader): ...

    app = app_with(Small, Large, outbox_frames=50, overflow="drop_oldest")
    stall = Stall(app)
    async with connect(stall, "/Small?slow") as small, connect(stall, "/Large?slow") as large:
        await fill(app, stall, range(10))
        stall.opened.set()
        assert await numbers_until_ping(small) == [0, 1, 2]
        assert await numbers_until_ping(large) == list(range(10))


async def test_an_event_handler_is_not_held_up_by_a_slow_client() -> None:
    """A send in an event's handler follows the policy and doesn't wait, so that later events are handled in time."""
    handled = []

    class Chat(Reader):
        @event
        async def note(self, message: dict[str, Any]) -> None:
            handled.append((message["n"], await self.send_json({"n": message["n"]})))

    app = app_with(Chat, overflow="drop_oldest", outbox_frames=3)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await fill(app, stall, range(1))
        await tick(app, *range(1, 20), kind="note")
        await until(lambda: len(handled) == 19)
        assert handled == [(number, True) for number in range(1, 20)]
        stall.opened.set()
        assert await numbers_until_ping(slow) == [0, 17, 18, 19]


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_replies_wait_for_a_slow_client(concurrency: int) -> None:
    """An action that sends to a client that doesn't read is held back, whatever the policy; nothing is lost."""
    sent = []

    class Chat(Reader):
        @action(concurrency=concurrency)
        async def talk(self, n: int) -> AsyncIterator[int]:
            for number in range(100):
                sent.append(number)
                yield number

        @action
        async def say(self) -> None:
            for number in range(100):
                assert await self.send_json({"n": number})

    app = app_with(Chat, outbox_frames=4, overflow="close")
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        for number in range(concurrency):
            await slow.send_json({"action": "talk", "request_id": number, "data": number})
        await asyncio.wait_for(stall.reached.wait(), 1)
        assert await slow.receive_nothing(0.02)
        assert len(sent) < 20
        stall.opened.set()
        frames = [await slow.receive_json() for _ in range(concurrency * 101)]
        for number in range(concurrency):
            mine = [frame for frame in frames if frame["request_id"] == number]
            assert [frame["data"] for frame in mine] == [*range(100), None]
        stall.hold()
        await slow.send_json({"action": "say"})
        await asyncio.wait_for(stall.reached.wait(), 1)
        stall.opened.set()
        assert await numbers_until_ping(slow) == list(range(100))
        assert layer_of(app).counters.outbox_dropped == 0


async def test_slow_clients_do_not_use_up_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients stall while a plain generator streams to them, another's plain function gets a thread."""
    monkeypatch.setattr("fastapi_channels.consumers.session.GRACE", 0.05)
    threads = 4

    class Chat(Reader):
        @action
        def stream(self) -> Iterator[int]:
            yield from range(100)

        @action
        def plain(self) -> str:
            return "plain"

    app = app_with(Chat, outbox_frames=1)
    stall = Stall(app)
    limiter = anyio.to_thread.current_default_thread_limiter()
    monkeypatch.setattr(limiter, "total_tokens", threads)
    async with AsyncExitStack() as stack:
        quick = await stack.enter_async_context(connect(stall, "/ws"))
        for _ in range(threads):
            slow = await stack.enter_async_context(connect(stall, "/ws?slow"))
            await slow.send_json({"action": "stream", "request_id": 1})
            await asyncio.wait_for(stall.reached.wait(), 1)
            stall.reached.clear()
        await quick.send_json({"action": "plain", "request_id": 1})
        assert (await quick.receive_json())["data"] == "plain"
        stall.opened.set()


# Closing


async def test_a_close_follows_the_frames_that_wait() -> None:
    """A close leaves behind the frames that wait; what is sent after it doesn't leave."""

    class Chat(Reader):
        @action
        async def leave(self) -> None:
            for number in range(3):
                await self.send_json({"n": number})
            await self.close(4100, "done")

    app = app_with(Chat)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await slow.send_json({"action": "leave"})
        await asyncio.wait_for(stall.reached.wait(), 1)
        await slow.receive_nothing(0.01)
        await tick(app, 3, 4)
        stall.opened.set()
        assert [(await slow.receive_json())["n"] for _ in range(3)] == [0, 1, 2]
        assert await slow.closed() == (4100, "done")
        assert await slow.receive_nothing()
    assert Chat.ended == [(4100, "done")]


async def test_a_close_in_connect_to_a_slow_client_lets_connect_go_on() -> None:
    """`close()` in `connect` after the accept returns also where the close frame has to wait."""
    after = []

    class Chat(Reader):
        async def connect(self) -> None:
            await self.accept()
            await self.send_json({"n": 1})
            await self.close(4100)
            after.append("went on")

    app = app_with(Chat)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await asyncio.wait_for(stall.reached.wait(), 1)
        stall.opened.set()
        assert (await slow.closed())[0] == 4100
    assert after == ["went on"]
    assert Chat.ended == [(4100, "")]


async def test_a_close_that_can_not_leave_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads nothing is left to itself after `CLOSE_TIMEOUT`; the hook has the own code."""
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.05)
    returned = asyncio.Event()

    class Chat(Reader):
        @action
        async def leave(self) -> None:
            await self.send_json({"n": 1})
            await self.close(4100, "done")
            returned.set()

    app = app_with(Chat)
    async with connect(Stall(app), "/ws?slow") as slow:
        await slow.send_json({"action": "leave"})
        await asyncio.wait_for(returned.wait(), 1)
        await slow.closed()
        assert Chat.ended == [(4100, "done")]


async def test_a_client_that_takes_no_frame_in_time_counts_as_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that makes no room for one frame within `WRITE_TIMEOUT` is closed with 4008."""
    monkeypatch.setattr(connection, "WRITE_TIMEOUT", 0.05)
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.05)

    class Chat(Reader): ...

    app = app_with(Chat)
    stall = Stall(app)
    async with connect(stall, "/ws?slow") as slow:
        await tick(app, 1)
        await slow.closed()
        assert [code for code, _ in Chat.ended] == [4008]
        assert layer_of(app).counters.too_slow == 1
    assert len(warnings(caplog)) == 1


async def test_each_frame_that_leaves_gives_a_slow_client_new_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is slow but takes frame after frame is not gone, however long all of it takes."""
    monkeypatch.setattr(connection, "WRITE_TIMEOUT", 0.1)

    class Chat(Reader): ...

    class Slow(Stall):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def slow_send(message: Message) -> None:
                await asyncio.sleep(0.03)
                await send(message)

            await self.app(scope, receive, slow_send if scope["type"] == "websocket" else send)

    app = app_with(Chat)
    async with connect(Slow(app), "/ws") as ws:
        await tick(app, *range(10))
        assert await numbers_until_ping(ws) == list(range(10))


# The way in


class Counting:
    """A middleware that counts the frames that were taken from the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_receive() -> Message:
            message = await receive()
            self.taken += message["type"] == "websocket.receive"
            return message

        await self.app(scope, counting_receive if scope["type"] == "websocket" else receive, send)


@pytest.mark.parametrize(
    ("options", "text", "most"), [({"capacity": 1000}, "1", 1001), ({"max_frame_size": 1000}, '"' + "x" * 900 + '"', 6)]
)
async def test_a_full_inbox_stops_reading(options: dict[str, int], text: str, most: int) -> None:
    """While a handler hangs, no more than the inbox holds is read from the client; later all of it is handled."""
    go_on = asyncio.Event()
    handled = []

    class Echo(JsonConsumer):
        async def receive(self, data: Any) -> None:
            await go_on.wait()
            handled.append(data)
            if data == "last":
                await self.send_json(len(handled))

    counting = Counting(app_with(Echo, **options))
    async with connect(counting, "/ws") as ws:
        for _ in range(3000):
            await ws.send_text(text)
        await ws.send_json("last")
        assert await ws.receive_nothing(0.05)
        assert 0 < counting.taken <= most
        go_on.set()
        assert await ws.receive_json() == 3001


async def test_a_handler_that_hangs_with_a_full_inbox_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full inbox that stays as it is for `STALLED_AFTER` closes the connection with 1011 and is logged once."""
    monkeypatch.setattr(connection, "STALLED_AFTER", 0.05)
    monkeypatch.setattr("fastapi_channels.consumers.session.GRACE", 0.05)

    class Chat(Reader):
        @action
        async def hang(self) -> None:
            await asyncio.Event().wait()

    async with connect(app_with(Chat, capacity=1000), "/ws") as ws:
        for _ in range(1500):
            await ws.send_json({"action": "hang"})
        assert (await ws.closed())[0] == 1011
        assert [code for code, _ in Chat.ended] == [1011]
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("character", ["x", "é", "☃", "\U0001f600"])
async def test_a_frame_above_the_limit_is_refused_and_the_connection_lives(character: str) -> None:
    """`MAX_FRAME_SIZE` counts bytes: a frame at the limit is taken, one above it is answered with `too_large`."""

    class Echo(WebSocketConsumer):
        max_frame_size = 120

        async def receive(self, data: str | bytes) -> None:
            await self.send(f"{len(data)}")

    at_the_limit = character * (120 // len(character.encode()))
    async with connect(app_with(Echo), "/ws") as ws:
        await ws.send_text(at_the_limit)
        await ws.send_text(at_the_limit + "x")
        await ws.send_bytes(at_the_limit.encode() + b"\xff")
        await ws.send_bytes(b"x" * 120)
        assert await ws.receive_text() == f"{len(at_the_limit)}"
        for _ in range(2):
            reply = await ws.receive_json()
            assert reply["errors"]["code"] == "too_large"
            assert "120" in reply["errors"]["detail"]
        assert await ws.receive_text() == "120"


# Over a real server


async def connect_slowly(url: str, port: int) -> ClientConnection:
    """A client that reads nothing from its socket until it is asked to."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await connect_for_real(url, sock=sock, max_queue=1, compression=None, ping_interval=None)


async def test_10_000_frames_sent_at_once_are_all_answered_in_order(serve: Serve) -> None:
    """A client that sends 10,000 frames before it reads anything gets 10,000 answers, in order."""

    class Chat(ActionConsumer):
        @action
        async def echo(self, n: int) -> int:
            return n

    served = await serve(app_with(Chat))
    async with connect_for_real(f"{served.url}/ws", max_queue=1, compression=None) as client:
        sending = asyncio.create_task(_send_all(client, 10_000))
        for number in range(10_000):
            reply = await client.recv()
            assert f'"request_id":{number},"status":"ok","data":{number},' in str(reply)
        await sending


async def _send_all(client: ClientConnection, count: int) -> None:
    for number in range(count):
        await client.send(f'{{"action":"echo","request_id":{number},"data":{number}}}')


async def test_a_real_client_that_reads_nothing_is_closed_and_costs_nobody_else(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real server a client that doesn't read is closed with 4008, and another gets every event."""
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.1)

    class Chat(Reader): ...

    app = app_with(Chat, outbox_frames=20)
    served = await serve(app)
    slow = await connect_slowly(f"{served.url}/ws", served.port)
    async with connect_for_real(f"{served.url}/ws", compression=None) as quick:
        for number in range(200):
            await tick(app, number, text="x" * 100_000)
            assert f'"n":{number},' in str(await quick.recv())
        await until(lambda: bool(Chat.ended))
        assert [code for code, _ in Chat.ended] == [4008]
        assert layer_of(app).counters.too_slow == 1
        assert layer_of(app).counters.outbox_dropped >= 20
    slow.transport.abort()
    await slow.wait_closed()


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest"])
async def test_a_real_client_that_wakes_up_gets_the_rest_in_order(serve: Serve, overflow: Any) -> None:
    """Over a real server what is kept for a client that stalls reaches it in order when it reads again."""

    class Chat(Reader): ...

    app = app_with(Chat, outbox_frames=20, overflow=overflow)
    served = await serve(app)
    slow = await connect_slowly(f"{served.url}/ws", served.port)
    for number in range(200):
        await tick(app, number, text="x" * 100_000)
        await asyncio.sleep(0)
    dropped = layer_of(app).counters.outbox_dropped
    assert dropped > 0
    numbers = []
    for _ in range(200 - dropped):
        text = str(await asyncio.wait_for(slow.recv(), 2))
        numbers.append(int(text.partition('"n":')[2].partition(",")[0]))
    assert numbers == sorted(set(numbers))
    assert (numbers[-1] == 199) == (overflow == "drop_oldest")
    assert numbers[0] == 0
    await tick(app, 200)
    assert '"n":200,' in str(await asyncio.wait_for(slow.recv(), 2))
    await slow.close()


async def test_a_real_client_gets_every_frame_before_the_close(serve: Serve) -> None:
    """Over a real server frames that wait for a slow client arrive before the close frame."""

    class Chat(Reader):
        @action
        async def leave(self) -> None:
            for number in range(50):
                await self.send_json({"n": number, "text": "x" * 100_000})
            await self.close(4100, "done")

    served = await serve(app_with(Chat))
    client = await connect_slowly(f"{served.url}/ws", served.port)
    await client.send('{"action": "leave"}')
    for number in range(50):
        assert f'"n":{number},' in str(await asyncio.wait_for(client.recv(), 2))
    with pytest.raises(ReallyClosed) as closed:
        await client.recv()
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4100, "done")
