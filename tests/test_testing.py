"""The testing kit: the client, the pytest plugin, and the contract of layers."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Any

import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI, HTTPException, WebSocket

from fastapi_channels import add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action
from fastapi_channels.layers import MemoryLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import ConnectionClosed, RefusedResponse, WebSocketSession, client, connect
from fastapi_channels.testing.plugin import CaptureGroupSends, GroupSend

pytest_plugins = ["pytester"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ACCEPT = {"type": "websocket.accept"}


class Boom(Exception):
    """What the applications of these tests fail with."""


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """An application that sends every frame back, and closes when it is told to."""
    assert scope["type"] == "websocket"
    await receive()
    await send(ACCEPT)
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4100, "reason": "as told"})
        elif message.get("text") == "fail":
            await send({"type": "websocket.send", "text": "last words"})
            raise Boom
        elif message.get("text") == "crash":
            raise Boom
        else:
            await send({**message, "type": "websocket.send"})


def answering(*messages: Message | None) -> Any:
    """An application that sends these messages, with a pause for None, and then waits for the client's end."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        for message in messages:
            await (asyncio.sleep(0) if message is None else send(message))
        while (await receive())["type"] != "websocket.disconnect":
            pass

    return app


# Talking


async def test_talking() -> None:
    """Text, bytes and JSON go both ways."""
    async with connect(echo, "/") as ws:
        await ws.send_text("é")
        assert await ws.receive_text() == "é"
        await ws.send_bytes(b"\xff\x00")
        assert await ws.receive_bytes() == b"\xff\x00"
        await ws.send_json({"a": [1, "日本"]})
        assert await ws.receive_json() == {"a": [1, "日本"]}
        await ws.send_bytes(b'{"b": 2}')
        assert await ws.receive_json() == {"b": 2}
        await ws.send_text("")
        assert await ws.receive_text() == ""


async def test_frames_keep_their_order() -> None:
    """Frames arrive in the order in which they were sent, however many wait."""
    async with connect(echo, "/") as ws:
        for number in range(100):
            await ws.send_json(number)
        assert [await ws.receive_json() for _ in range(100)] == list(range(100))


async def test_a_frame_of_the_other_kind() -> None:
    """Receiving text where bytes come, and the reverse, fails the test and shows the frame."""
    async with connect(echo, "/") as ws:
        await ws.send_text("x")
        with pytest.raises(AssertionError, match=r"a binary frame was expected, not .*'x'"):
            await ws.receive_bytes()
        await ws.send_bytes(b"x")
        with pytest.raises(AssertionError, match=r"a text frame was expected, not .*b'x'"):
            await ws.receive_text()


async def test_the_scope() -> None:
    """The application sees the scope that a server would give it."""
    scopes: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        scopes.append(scope)
        await send(ACCEPT)

    headers = {"X-Name": "é", "Cookie": "a=1"}
    path = "/ws/caf\u00e9%20%2F/{x}?room=日 x&b=%41"
    async with connect(app, path, headers=headers, subprotocols=["chat", "v2"], client=("10.0.0.1", 1)):
        pass
    assert scopes[0].pop("state") == {}
    assert scopes == [
        {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "server": ("testserver", 80),
            "client": ("10.0.0.1", 1),
            "root_path": "",
            "path": "/ws/café //{x}",
            "raw_path": b"/ws/caf%C3%A9%20%2F/%7Bx%7D",
            "query_string": b"room=%E6%97%A5%20x&b=%41",
            "headers": [
                (b"host", b"testserver"),
                (b"x-name", b"\xe9"),
                (b"cookie", b"a=1"),
                (b"sec-websocket-protocol", b"chat, v2"),
            ],
            "subprotocols": ["chat", "v2"],
            "extensions": {"websocket.http.response": {}},
        }
    ]


async def test_the_host_can_be_another() -> None:
    """A Host header of one's own takes the place of the default."""
    scopes: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        scopes.append(scope)
        await send(ACCEPT)

    async with connect(app, "/", headers={"Host": "example.org"}, client=None):
        pass
    assert scopes[0]["headers"] == [(b"host", b"example.org")]
    assert scopes[0]["client"] is None


# The handshake


async def test_an_accepted_handshake() -> None:
    """What the application says with its yes can be seen."""
    app = answering({**ACCEPT, "subprotocol": "v2", "headers": [(b"X-Seen", b"yes")]})
    async with connect(app, "/", subprotocols=["v1", "v2"]) as ws:
        assert (ws.accepted, ws.subprotocol, ws.headers) == (True, "v2", {"x-seen": "yes"})
        assert (ws.response, ws.close_code, ws.close_reason) == (None, None, None)


async def test_a_refused_handshake() -> None:
    """A refusal doesn't raise: its response has status, headers and body."""

    class Refusing(WebSocketConsumer):
        async def connect(self) -> None:
            raise HTTPException(429, detail={"wait": "é"}, headers={"Retry-After": "5"})

    async with connect(Refusing.as_asgi(), "/") as ws:
        assert not ws.accepted
        assert ws.response is not None
        assert ws.response.status_code == 429
        assert ws.response.headers["retry-after"] == "5"
        assert ws.response.json() == {"detail": {"wait": "é"}}
        with pytest.raises(ConnectionClosed):
            await ws.receive_json()
        with pytest.raises(ConnectionClosed):
            await ws.send_text("x")
        assert await ws.receive_nothing()


async def test_a_refusal_by_a_close() -> None:
    """A close before the accept is what servers make of it: a plain 403, with the code kept for the test."""
    async with connect(answering({"type": "websocket.close", "code": 4503, "reason": "no"}), "/") as ws:
        assert (ws.accepted, ws.response) == (False, RefusedResponse(403))
        assert (ws.close_code, ws.close_reason) == (4503, "no")


async def test_a_refusal_in_parts() -> None:
    """The body of a refusal may come in parts."""
    app = answering(
        {"type": "websocket.http.response.start", "status": 401, "headers": [(b"WWW-Authenticate", b"Bearer")]},
        None,
        {"type": "websocket.http.response.body", "body": b"[1,", "more_body": True},
        None,
        {"type": "websocket.http.response.body", "body": b"2]"},
    )
    async with connect(app, "/") as ws:
        assert ws.response is not None
        assert ws.response == RefusedResponse(401, {"www-authenticate": "Bearer"}, b"[1,2]")
        assert ws.response.json() == [1, 2]


async def test_the_application_is_told_of_its_refusal() -> None:
    """An application that has refused is told of the end twice, as by uvicorn, and need not wait for it in vain."""
    received: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send({"type": "websocket.http.response.start", "status": 401})
        await send({"type": "websocket.http.response.body"})
        received.extend([await receive() for _ in range(3)])

    async with connect(app, "/") as ws:
        assert not ws.accepted
    assert [message["type"] for message in received] == ["websocket.connect", *["websocket.disconnect"] * 2]


async def test_an_application_that_ends_without_an_answer() -> None:
    """An application that returns before it has answered refuses with 500, as under a server."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"

    async with connect(app, "/") as ws:
        assert (ws.accepted, ws.response) == (False, RefusedResponse(500))


# Waiting


async def test_a_timeout_cancels_nothing() -> None:
    """A receive that times out raises TimeoutError, and the application goes on as if nothing had been."""
    go_on = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(ACCEPT)
        await go_on.wait()
        await send({"type": "websocket.send", "text": "late"})
        await receive()
        await receive()

    async with connect(app, "/") as ws:
        for receive in (ws.receive_text, ws.receive_bytes, ws.receive_json):
            with pytest.raises(TimeoutError, match=r"no frame came within 0\.01 s"):
                await receive(timeout=0.01)
        assert await ws.receive_nothing(timeout=0.01)
        with pytest.raises(TimeoutError):
            await ws.closed(timeout=0.01)
        go_on.set()
        assert await ws.receive_text() == "late"


async def test_a_cancelled_receive_loses_no_frame() -> None:
    """A receive that is cancelled leaves what comes to the next."""
    async with connect(echo, "/") as ws:
        receiving = asyncio.create_task(ws.receive_text())
        await asyncio.sleep(0)
        await ws.send_text("x")
        receiving.cancel()
        await asyncio.wait({receiving})
        assert await ws.receive_text() == "x"


async def test_receive_nothing() -> None:
    """Nothing is nothing, and a frame that is there stays to be received."""
    async with connect(echo, "/") as ws:
        assert await ws.receive_nothing(timeout=0.01)
        for text in ("one", "two"):
            await ws.send_text(text)
        assert not await ws.receive_nothing()
        assert not await ws.receive_nothing()
        assert [await ws.receive_text() for _ in range(2)] == ["one", "two"]
        assert await ws.receive_nothing(timeout=0.01)


# The end


async def test_the_application_closes() -> None:
    """After the frames that were sent before, a receive on a closed connection raises how it was closed."""
    async with connect(echo, "/") as ws:
        await ws.send_text("before")
        await ws.send_text("close")
        assert await ws.receive_text() == "before"
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive_text()
        assert (caught.value.code, caught.value.reason) == (4100, "as told")
        assert str(caught.value) == "the connection is closed: 4100 as told"
        assert (ws.close_code, ws.close_reason) == (4100, "as told")
        assert await ws.closed() == (4100, "as told")
        with pytest.raises(ConnectionClosed):
            await ws.send_text("after")


async def test_an_application_that_returns() -> None:
    """An application that returns without a close frame has ended with 1006, as under a server."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(ACCEPT)

    async with connect(app, "/") as ws:
        assert await ws.closed() == (1006, "")
        with pytest.raises(ConnectionClosed, match=r"^the connection is closed: 1006$"):
            await ws.receive_text()


@pytest.mark.parametrize(
    ("leave", "seen"),
    [
        (lambda ws: ws.close(), {"type": "websocket.disconnect", "code": 1000, "reason": ""}),
        (lambda ws: ws.close(4001, "é"), {"type": "websocket.disconnect", "code": 4001, "reason": "é"}),
        (lambda ws: ws.vanish(), {"type": "websocket.disconnect", "code": 1005}),
    ],
)
async def test_the_client_leaves(leave: Callable[[WebSocketSession], Awaitable[None]], seen: Message) -> None:
    """The application is told how the client went, and has ended when that returns."""
    received: list[Message] = []
    ended = False

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal ended
        assert scope["type"] == "websocket"
        received.append(await receive())
        await send(ACCEPT)
        received.append(await receive())
        await asyncio.sleep(0)
        ended = True

    async with connect(app, "/") as ws:
        await leave(ws)
        assert ended
        assert received == [{"type": "websocket.connect"}, seen]
        assert ws.close_code == seen["code"]
        await ws.close(4002)
        assert ws.close_code == seen["code"]


async def test_leaving_the_block_closes() -> None:
    """At the end of the block the connection is closed, and the consumer's last hook has run."""
    codes: list[int] = []

    class Noting(WebSocketConsumer):
        async def disconnect(self, code: int) -> None:
            codes.append(code)

    async with connect(Noting.as_asgi(), "/"):
        assert codes == []
    assert codes == [1000]


async def test_leaving_the_block_by_an_error_closes() -> None:
    """An error of the test goes on outwards, once the application has ended."""
    codes: list[int] = []

    class Noting(WebSocketConsumer):
        async def disconnect(self, code: int) -> None:
            codes.append(code)

    with pytest.raises(KeyError):
        async with connect(Noting.as_asgi(), "/"):
            raise KeyError
    assert codes == [1000]


async def test_an_application_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that goes on after the client has left is cancelled, and the test fails."""
    monkeypatch.setattr(client, "END_TIMEOUT", 0.05)
    cancelled = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(ACCEPT)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s after the client had left"):
        async with connect(app, "/"):
            pass
    assert cancelled.is_set()


async def test_a_cancelled_test_leaves_nothing_running() -> None:
    """A test that is cancelled while it waits for the answer to the handshake takes the application with it."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def test() -> None:
        async with connect(app, "/"):
            pass

    testing = asyncio.create_task(test())
    await begun.wait()
    testing.cancel()
    await asyncio.wait({testing})
    assert cancelled.is_set()
    assert testing.cancelled()


# What leaves the application


async def test_a_failure_surfaces_in_a_receive() -> None:
    """What was sent before the failure is received, then the failure is raised, and not again by leaving the block."""
    async with connect(echo, "/") as ws:
        await ws.send_text("fail")
        assert await ws.receive_text() == "last words"
        for _ in range(2):
            with pytest.raises(Boom):
                await ws.receive_text()
        with pytest.raises(Boom):
            await ws.send_text("x")
        assert ws.close_code == 1006


@pytest.mark.parametrize(
    "call",
    [
        lambda ws: ws.receive_nothing(),
        lambda ws: ws.close(),
        lambda ws: ws.vanish(),
        lambda ws: ws.closed(),
    ],
)
async def test_a_failure_surfaces_in_whatever_comes_first(call: Callable[[WebSocketSession], Awaitable[Any]]) -> None:
    """A failure is raised by whatever the test does next."""
    async with connect(echo, "/") as ws:
        await ws.send_text("fail")
        assert await ws.receive_text() == "last words"
        with pytest.raises(Boom):
            await call(ws)


async def test_a_failure_surfaces_at_the_end() -> None:
    """A failure that nothing else has raised is raised when the block is left."""
    with pytest.raises(Boom):
        async with connect(echo, "/") as ws:
            await ws.send_text("crash")


async def test_a_failure_before_the_answer() -> None:
    """An application that fails before it has answered refuses with 500, and fails the test."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        raise Boom

    with pytest.raises(Boom):
        async with connect(app, "/") as ws:
            assert ws.response == RefusedResponse(500)


async def test_a_failure_is_why_the_test_failed() -> None:
    """Where the application fails and then the test, the application's failure is raised; the test's is its context."""

    async def test() -> None:
        async with connect(echo, "/") as ws:
            await ws.send_text("fail")
            assert await ws.receive_text() == "something else"

    with pytest.raises(Boom) as caught:
        await test()
    assert isinstance(caught.value.__context__, AssertionError)


async def test_a_failure_after_a_close_frame() -> None:
    """A connection that is closed with 1011 because of a failure raises the failure, and knows the code."""

    class Failing(WebSocketConsumer):
        async def connect(self) -> None:
            await self.accept()
            raise Boom

    async with connect(Failing.as_asgi(), "/") as ws:
        with pytest.raises(Boom):
            await ws.receive_text()
        assert ws.close_code == 1011


async def test_a_failure_that_follows_a_close_frame() -> None:
    """A receive that waits when the connection is closed because of a failure raises the failure."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(ACCEPT)
        await receive()
        await receive()
        await send({"type": "websocket.close", "code": 1011})
        for _ in range(3):
            await asyncio.sleep(0)
        raise Boom

    async with connect(app, "/") as ws:
        await ws.send_text("x")
        with pytest.raises(Boom):
            await ws.receive_text()
        assert ws.close_code == 1011


async def test_a_timeout_of_the_application_is_a_failure() -> None:
    """A TimeoutError that leaves the application is no timeout of the client."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(ACCEPT)
        raise TimeoutError("the application's own")

    async with connect(app, "/") as ws:
        with pytest.raises(TimeoutError, match="the application's own"):
            await ws.receive_nothing()


async def test_what_stays_inside_is_not_raised() -> None:
    """An error that the application answers itself does not fail the test."""

    class Failing(ActionConsumer):
        @action
        async def fail(self) -> None:
            raise Boom

    async with connect(Failing.as_asgi(), "/") as ws:
        await ws.send_json({"action": "fail", "request_id": 1})
        assert (await ws.receive_json())["errors"]["code"] == "internal_error"


# As strict as a server


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (
            [{"type": "websocket.send", "text": "x"}],
            "the application sent 'websocket.send', where websocket.accept or ",
        ),
        ([ACCEPT, ACCEPT], "the application sent 'websocket.accept', where websocket.send or websocket.close is due"),
        ([ACCEPT, {"type": "websocket.http.response.start", "status": 400}], "where websocket.send or websocket.close"),
        (
            [{"type": "websocket.http.response.start", "status": 400}, ACCEPT],
            "where websocket.http.response.body is due",
        ),
        ([ACCEPT, {"type": "http.response.start", "status": 200}], "the application sent 'http.response.start'"),
    ],
)
async def test_what_a_server_would_not_take(messages: list[Message], told: str) -> None:
    """An application that sends what is not due gets a RuntimeError."""
    with pytest.raises(RuntimeError, match=told):
        async with connect(answering(*messages), "/"):
            pass


@pytest.mark.parametrize(
    "messages",
    [
        [ACCEPT, {"type": "websocket.close"}, {"type": "websocket.send", "text": "x"}],
        [{"type": "websocket.close"}, ACCEPT],
        [
            {"type": "websocket.http.response.start", "status": 400},
            {"type": "websocket.http.response.body"},
            {"type": "websocket.http.response.body"},
        ],
    ],
)
async def test_sending_after_the_end(messages: list[Message]) -> None:
    """An application that sends on a closed connection gets an OSError (ASGI, websocket send)."""
    with pytest.raises(OSError, match="after the connection was closed"):
        async with connect(answering(*messages), "/"):
            pass


async def test_sending_to_a_client_that_is_gone() -> None:
    """A consumer that sends after the client has left is told so by False, as under a server."""
    sent: list[bool] = []

    class Late(WebSocketConsumer):
        async def disconnect(self, code: int) -> None:
            sent.append(await self.send("too late"))

    async with connect(Late.as_asgi(), "/"):
        pass
    assert sent == [False]


async def test_a_reason_that_fits_no_frame() -> None:
    """A close reason of more than 123 bytes is an error, since no server could send it."""
    async with connect(answering(ACCEPT, {"type": "websocket.close", "reason": "é" * 61}), "/") as ws:
        assert await ws.receive_nothing()
    with pytest.raises(ValueError, match="a close reason has at most 123 bytes, not 124"):
        async with connect(answering(ACCEPT, {"type": "websocket.close", "reason": "é" * 62}), "/"):
            pass


# The lifespan


class Noted(FastAPI):
    """An application that notes when its lifespan begins and ends, and lets a WebSocket read its state."""

    def __init__(self) -> None:
        self.noted: list[str] = []

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
            self.noted.append("start")
            await asyncio.sleep(0)
            yield {"pool": "open"}
            await asyncio.sleep(0)
            self.noted.append("stop")

        super().__init__(lifespan=lifespan)

        @self.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_text(websocket.state.pool)
            await websocket.receive()


async def test_the_lifespan_runs() -> None:
    """The application has started before the handshake, with its state, and has stopped when the block is left."""
    app = Noted()
    for _ in range(2):
        async with connect(app, "/ws") as ws:
            assert await ws.receive_text() == "open"
            assert app.noted[-1] == "start"
        assert app.noted[-1] == "stop"
    assert app.noted == ["start", "stop"] * 2


async def test_connections_inside_of_each_other_share_the_lifespan() -> None:
    """The lifespan runs once for connections that are nested."""
    app = Noted()
    async with connect(app, "/ws") as one:
        async with connect(app, "/ws") as two:
            assert await two.receive_text() == "open"
        assert await one.receive_text() == "open"
        assert app.noted == ["start"]
    assert app.noted == ["start", "stop"]


async def test_connections_beside_each_other_share_the_lifespan() -> None:
    """The lifespan of connections that overlap begins with the first and ends with the last, whichever that is."""
    app = Noted()
    leave = [asyncio.Event(), asyncio.Event()]

    async def client(number: int) -> None:
        async with connect(app, "/ws") as ws:
            assert await ws.receive_text() == "open"
            await leave[number].wait()

    clients = [asyncio.create_task(client(number)) for number in range(2)]
    leave[0].set()
    await clients[0]
    assert app.noted == ["start"]
    leave[1].set()
    await clients[1]
    assert app.noted == ["start", "stop"]


async def test_a_lifespan_that_runs_already() -> None:
    """A lifespan that the test runs by itself is not run again."""
    app = Noted()
    add_channel(app)
    async with LifespanManager(app):
        async with connect(app, "/nowhere") as ws:
            assert ws.response == RefusedResponse(403)
        assert app.noted == ["start"]
    assert app.noted == ["start", "stop"]


async def test_an_open_layer_is_not_a_running_lifespan(memory_layer: MemoryLayer) -> None:
    """An application that is given a layer which is open still has its lifespan run, and leaves the layer open."""
    app = Noted()
    add_channel(app, channel_layers={"default": memory_layer})
    async with connect(app, "/ws"):
        assert app.noted == ["start"]
    assert app.noted == ["start", "stop"]
    assert memory_layer.is_open


async def test_a_start_that_fails() -> None:
    """What stops the start of an application is raised by connect."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise Boom
        yield

    app = FastAPI(lifespan=lifespan)
    for _ in range(2):
        with pytest.raises(Boom):
            async with connect(app, "/ws"):
                pass


async def test_a_stop_that_fails() -> None:
    """What fails while an application stops is raised when the block is left."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        raise Boom

    with pytest.raises(Boom):
        async with connect(FastAPI(lifespan=lifespan), "/ws"):
            pass


async def test_the_lifespan_ends_when_the_test_fails() -> None:
    """An application is stopped in order whatever ends the test."""
    app = Noted()
    with pytest.raises(KeyError):
        async with connect(app, "/ws"):
            raise KeyError
    assert app.noted == ["start", "stop"]


async def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asgi-lifespan the error names what to install."""
    monkeypatch.setitem(sys.modules, "asgi_lifespan", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastapi-channels\[testing\]'"):
        async with connect(echo, "/"):
            pass


# The plugin


class Announcing(JsonConsumer):
    """Tells everybody in its room what it was sent."""

    async def receive(self, data: dict[str, Any]) -> None:
        await self.group_send("room", {"type": "room.said", **data}, exclude_self=True)
        await self.send_json("sent")


async def test_memory_layer(memory_layer: MemoryLayer) -> None:
    """`memory_layer` is open, on the test's own event loop."""
    assert memory_layer.is_open
    channel = await memory_layer.new_channel()
    await memory_layer.send(channel, {"type": "x"})
    assert await memory_layer.receive(channel) == {"type": "x"}


async def test_capturing_of_a_layer(memory_layer: MemoryLayer, capture_group_sends: CaptureGroupSends) -> None:
    """What is sent to groups of a layer can be looked at, as it is on the wire, and is sent all the same."""
    await memory_layer.group_send("before", {"type": "x"})
    sent = capture_group_sends(memory_layer)
    assert sent == []
    channel = await memory_layer.new_channel()
    await memory_layer.group_add("room", channel)
    await memory_layer.group_send("room", {"type": "x", "pair": (1, 2)})
    await memory_layer.group_send("nobody", {"type": "y"}, exclude=[channel])
    await memory_layer.send(channel, {"type": "z"})
    assert sent == [
        GroupSend("room", {"type": "x", "pair": [1, 2]}, frozenset()),
        GroupSend("nobody", {"type": "y"}, frozenset({channel})),
    ]
    assert (await memory_layer.receive(channel))["type"] == "x"


async def test_capturing_of_an_application(capture_group_sends: CaptureGroupSends) -> None:
    """What consumers and views of an application send to groups can be looked at, on all its layers."""
    app = FastAPI()
    channels = add_channel(app, channel_layers={"default": "memory://", "jobs": "memory://"})
    app.include_router(ConsumerRouter([route("/ws", Announcing)]))
    sent = capture_group_sends(app)
    async with connect(app, "/ws") as ws:
        await ws.send_json({"text": "hi"})
        assert await ws.receive_json() == "sent"
        await channels.layer("jobs").group_send("workers", {"type": "job"})
    assert [(one.group, one.message) for one in sent] == [
        ("room", {"type": "room.said", "text": "hi"}),
        ("workers", {"type": "job"}),
    ]
    assert len(sent[0].exclude) == 1


async def test_capturing_of_an_application_without_add_channel(capture_group_sends: CaptureGroupSends) -> None:
    """An application that has no add_channel can be captured before its first connection."""
    app = FastAPI()
    app.include_router(ConsumerRouter([route("/ws", Announcing)]))
    sent = capture_group_sends(app)
    async with connect(app, "/ws") as ws:
        await ws.send_json({})
        assert await ws.receive_json() == "sent"
    assert [one.group for one in sent] == ["room"]


def test_the_plugin_is_found() -> None:
    """The plugin is found by pytest through its entry point."""
    (entry,) = entry_points(group="pytest11", name="fastapi_channels")
    assert entry.value == "fastapi_channels.testing.plugin"


def test_fixtures_in_a_project(pytester: pytest.Pytester) -> None:
    """In another project each test has a clean layer, and capturing ends with the test that began it."""
    pytester.makeconftest(
        """
        import pytest
        @pytest.fixture
        def anyio_backend():
            return "asyncio"
        """
    )
    pytester.makepyfile(
        """
        import pytest
        from fastapi_channels.layers import MemoryLayer

        pytestmark = pytest.mark.anyio
        seen, kept = [], MemoryLayer()

        @pytest.mark.parametrize("run", [1, 2])
        async def test_layer(memory_layer, run):
            assert memory_layer.is_open
            assert all(memory_layer is not other for other in seen)
            assert not any(other.observers for other in seen)
            seen.append(memory_layer)
            await memory_layer.send("jobs", {"type": "x", "run": run})
            assert await memory_layer.receive("jobs") == {"type": "x", "run": run}

        @pytest.mark.parametrize("run", [1, 2])
        async def test_capture(capture_group_sends, run):
            assert kept.observers == []
            async with kept:
                one, two = capture_group_sends(kept), capture_group_sends(kept)
                await kept.group_send("room", {"type": "x"})
            assert one == two
            assert len(one) == 1
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4)
    result = pytester.runpytest_inprocess("--fixtures", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["memory_layer*", "capture_group_sends*"])


# The contract


def test_a_contract_without_a_layer(pytester: pytest.Pytester) -> None:
    """A subclass that gives no layer fails with what is missing, and nothing else."""
    pytester.makepyfile(
        """
        from fastapi_channels.testing import LayerContract

        class TestMine(LayerContract):
            pass
        """
    )
    result = pytester.runpytest_inprocess("-k", "test_send_and_receive", "-p", "no:cacheprovider")
    result.assert_outcomes(errors=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*TestMine needs a fixture `layer`: the layer that LayerContract is to test*"])


BROKEN = {
    "ignores exclude": (
        """
        async def _publish(self, group, envelope, exclude, idempotency_key):
            return await super()._publish(group, envelope, (), idempotency_key)
        """,
        {"test_exclude", "test_threads_can_do_everything"},
    ),
    "knows no idempotency": (
        """
        async def _publish(self, group, envelope, exclude, idempotency_key):
            return await super()._publish(group, envelope, exclude, None)
        """,
        {"test_idempotency_key"},
    ),
    "shuffles what is sent at once": (
        """
        first = True
        async def _publish(self, group, envelope, exclude, idempotency_key):
            self.first = not self.first
            if self.first:
                await asyncio.sleep(0.001)
            return await super()._publish(group, envelope, exclude, idempotency_key)
        """,
        {"test_unawaited_group_sends_keep_their_order[gather]", "test_unawaited_group_sends_keep_their_order[tasks]"},
    ),
    "hands out one object": (
        """
        async def _publish(self, group, envelope, exclude, idempotency_key):
            message = envelope.decode()
            class Shared(type(envelope)):
                def decode(self):
                    return message
            shared = Shared(envelope.type, envelope.payload, envelope.expires)
            return await super()._publish(group, shared, exclude, idempotency_key)
        """,
        {"test_everybody_gets_an_object_of_their_own"},
    ),
    "mixes case": (
        """
        async def _publish(self, group, envelope, exclude, idempotency_key):
            for other in [name for name in self._groups if name.lower() == group.lower()]:
                receipt = await super()._publish(other, envelope, exclude, idempotency_key)
            return receipt if self._groups else await super()._publish(group, envelope, exclude, idempotency_key)
        """,
        {"test_awkward_names_of_groups"},
    ),
    "loses what a cancelled reader took": (
        """
        async def _dequeue(self, name):
            envelope = await super()._dequeue(name)
            await asyncio.sleep(0)
            return envelope
        """,
        {"test_a_cancelled_receive_loses_nothing_of_a_queue"},
    ),
    "has bottomless queues": (
        """
        def _queue(self, name):
            queue = super()._queue(name)
            queue.capacity = 1_000_000
            return queue
        """,
        {"test_capacity_of_a_queue"},
    ),
    "keeps messages through a flush": (
        """
        async def flush(self):
            await ChannelLayer.flush(self)
        """,
        {"test_flush", "test_threads_can_do_everything"},
    ),
}


def test_the_contract_is_broken_by_a_layer_that_is(pytester: pytest.Pytester) -> None:
    """A layer that breaks its contract in one way fails the tests of that, and passes the others."""
    classes = "".join(
        f"""
class Layer{number}(MemoryLayer):{body}
class Test{number}(LayerContract):
    timeout = 0.2
    @pytest.fixture
    async def layer(self):
        async with Layer{number}(capacity=20) as layer:
            yield layer
"""
        for number, (body, _) in enumerate(BROKEN.values())
    )
    pytester.makepyfile(
        "import asyncio\nimport pytest\nfrom fastapi_channels.layers import ChannelLayer, MemoryLayer\n"
        f"from fastapi_channels.testing import LayerContract\n{classes}"
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q", "--tb=no", "-rf")
    failed: dict[str, set[str]] = {what: set() for what in BROKEN}
    for line in result.outlines:
        if line.startswith("FAILED "):
            where, _, test = line.split()[1].rpartition("::")
            failed[list(BROKEN)[int(where.rpartition("::Test")[2])]].add(test)
    assert failed == {what: tests for what, (_, tests) in BROKEN.items()}


# Imports


def test_the_client_works_without_pytest() -> None:
    """The client can be imported where pytest is not; the contract can't."""
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from fastapi_channels.testing import ConnectionClosed, RefusedResponse, WebSocketSession, connect\n"
        "try:\n"
        "    from fastapi_channels.testing import LayerContract\n"
        "except ImportError:\n"
        "    print('no contract')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "no contract\n"


def test_names_that_are_not_there() -> None:
    """A name that the kit doesn't have is an AttributeError like anywhere."""
    from fastapi_channels import testing

    with pytest.raises(AttributeError, match=r"module 'fastapi_channels\.testing' has no attribute 'conect'"):
        _ = testing.conect
