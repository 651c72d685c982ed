"""The life of a connection: every hook once, whatever ends it, and no membership left behind."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar

import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed as ReallyClosed
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from fastapi_channels import get_channel_layer
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event, session
from fastapi_channels.exceptions import ConsumerError, LayerUnavailable
from fastapi_channels.layers import ChannelLayer
from fastapi_channels.testing import ConnectionClosed, WebSocketSession, connect
from tests.conftest import Serve, app_with


class Watched(ActionConsumer):
    """Notes how each connection ended; its subclasses have notes of their own."""

    ended: ClassVar[list[tuple[int, str]]]
    names: ClassVar[list[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.ended, cls.names = [], []

    async def connect(self) -> None:
        await self.joined()

    async def joined(self) -> None:
        self.names.append(self.channel_name)
        await self.group_add("everyone")

    async def disconnect(self, code: int, reason: str) -> None:
        self.ended.append((code, reason))

    @action
    async def ping(self) -> str:
        return "pong"


def assert_left(app: FastAPI, consumer: type[Watched]) -> None:
    """Every connection of the consumer has lost its channel, and with it its memberships."""
    layer: ChannelLayer = app.state.channels.layer()
    assert consumer.names
    for name in consumer.names:
        with pytest.raises(ValueError, match="not a channel"):
            layer.groups_of(name)


async def ask(ws: WebSocketSession, name: str = "ping", **data: Any) -> Any:
    await ws.send_json({"action": name, "request_id": name, "data": data})
    reply = await ws.receive_json()
    assert (reply["action"], reply["request_id"]) == (name, name), reply
    return reply


# What ends a connection


@pytest.mark.parametrize(
    ("code", "reason"), [(1000, ""), (1001, "going away"), (3000, "é" * 61), (4999, "bye ✓"), (1000, "\n")]
)
async def test_the_code_and_reason_of_the_clients_close_arrive(code: int, reason: str) -> None:
    """The `disconnect` hook is told what the client closed with."""

    class Chat(Watched): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.close(code, reason)
        assert Chat.ended == [(code, reason)]
        assert_left(app, Chat)
    assert Chat.ended == [(code, reason)]


async def test_a_client_that_vanishes_counts_as_1006() -> None:
    """Without a close frame the code is 1006 and the reason empty."""

    class Chat(Watched): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.vanish()
        assert Chat.ended == [(1006, "")]
        assert_left(app, Chat)


@pytest.mark.parametrize("implementation", ["websockets-sansio", "wsproto"])
async def test_a_real_client_closes_with_a_code_or_vanishes(serve: Serve, implementation: str) -> None:
    """Over a real server, a close frame's code and reason arrive, and a lost connection is 1006."""
    ended: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    class Chat(Watched):
        async def disconnect(self, code: int, reason: str) -> None:
            ended.put_nowait((code, reason))

    served = await serve(app_with(Chat), ws=implementation)
    async with connect_for_real(f"{served.url}/ws") as client:
        await client.close(4321, "så länge")
    assert await asyncio.wait_for(ended.get(), 2) == (4321, "så länge")
    client = await connect_for_real(f"{served.url}/ws")
    client.transport.abort()
    await client.wait_closed()
    assert await asyncio.wait_for(ended.get(), 2) == (1006, "")


class Closing(Watched):
    @action
    async def leave(self) -> None:
        await self.close(4100, "enough")

    @event
    async def leave_all(self) -> None:
        await self.close(4100, "enough")


async def _by_action(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await ws.send_json({"action": "leave"})


async def _by_handler(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await layer.group_send("everyone", {"type": "leave.all"})


async def _by_built_in_event(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await layer.group_send("everyone", {"type": "websocket.close", "code": 4100, "reason": "enough"})


@pytest.mark.parametrize("end", [_by_action, _by_handler, _by_built_in_event])
async def test_disconnect_is_told_the_own_close_code(
    end: Callable[[WebSocketSession, ChannelLayer], Awaitable[None]],
) -> None:
    """After a close of our own, client and hook are told that code and reason, and the hook is called once."""

    class Chat(Closing): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await end(ws, app.state.channels.layer())
        assert await ws.closed() == (4100, "enough")
        assert Chat.ended == [(4100, "enough")]
        assert_left(app, Chat)
    assert len(Chat.ended) == 1


async def test_of_two_closes_at_once_there_is_one_end() -> None:
    """A client that closes while the server closes gets one `disconnect`, with the code of whoever was first."""

    class Chat(Closing): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "leave"})
        await ws.send_json({"action": "leave"})
        await ws.close(4444, "me first")
    assert len(Chat.ended) == 1
    assert_left(app, Chat)


async def test_a_close_without_arguments_is_1000() -> None:
    """`close()` closes with 1000 and no reason; the frames sent before it arrive, those after it don't."""

    class Chat(Watched):
        @action
        async def leave(self) -> None:
            await self.send_json("last words")
            await self.close()
            self.names.append(f"sent: {await self.send_json('too late')}")
            await self.close(4100)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "leave"})
        assert await ws.receive_json() == "last words"
        with pytest.raises(ConnectionClosed):
            await ws.receive_json()
        assert await ws.closed() == (1000, "")
    assert Chat.ended == [(1000, "")]
    assert Chat.names[-1] == "sent: False"


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, True, "1000", 4100.0])
async def test_nobody_closes_with_a_forbidden_code(code: Any) -> None:
    """A code that RFC 6455 keeps from applications is a ValueError, and the connection lives."""

    class Chat(Watched):
        @action
        async def leave(self) -> str:
            with pytest.raises(ValueError, match="close code"):
                await self.close(code)
            return "still here"

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "leave"))["data"] == "still here"


async def test_a_long_reason_is_cut_between_characters() -> None:
    """A reason of more than 123 bytes is cut off, and never in the middle of a character."""

    class Chat(Watched):
        @action
        async def leave(self) -> None:
            await self.close(4100, "é" * 1000)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "leave"})
        assert await ws.closed() == (4100, "é" * 61)
    assert Chat.ended == [(4100, "é" * 61)]


# connect that raises or closes


async def test_an_exception_in_connect_refuses_with_500() -> None:
    """Before the accept, an exception is an HTTP 500 that tells nothing, and goes on to the server's log."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            raise ZeroDivisionError("the secret")

    app = app_with(Chat)
    seen = []
    with suppress(ZeroDivisionError):
        async with connect(app, "/ws") as ws:
            seen.append((ws.accepted, ws.response))
        pytest.fail("the exception did not go on")
    ((accepted, response),) = seen
    assert not accepted
    assert response is not None
    assert response.status_code == 500
    assert b"secret" not in response.content
    assert b"Zero" not in response.content
    assert [code for code, _ in Chat.ended] == [1011]
    assert_left(app, Chat)


async def test_an_exception_in_connect_after_the_accept_closes_with_1011() -> None:
    """After the accept, an exception closes with 1011, tells nothing, and goes on to the server's log."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            await self.accept()
            await self.send_json("welcome")
            raise ZeroDivisionError("the secret")

    app = app_with(Chat)
    sessions = []
    with suppress(ZeroDivisionError):
        async with connect(app, "/ws") as ws:
            sessions.append(ws)
            assert ws.accepted
            assert await ws.receive_json() == "welcome"
        pytest.fail("the exception did not go on")
    assert sessions[0].close_code == 1011
    assert "secret" not in (sessions[0].close_reason or "")
    assert [code for code, _ in Chat.ended] == [1011]
    assert_left(app, Chat)


REFUSALS: list[Any] = [
    pytest.param(HTTPException(401, "who?", {"WWW-Authenticate": "Bearer"}), 401, "who?", 4501, id="401"),
    pytest.param(HTTPException(403), 403, "Forbidden", 4503, id="403"),
    pytest.param(HTTPException(404, "no room ✗"), 404, "no room ✗", 4504, id="404"),
    pytest.param(HTTPException(418), 418, "I'm a Teapot", 4500, id="418"),
    pytest.param(HTTPException(422, ["a", {"b": 1}]), 422, ["a", {"b": 1}], 4500, id="422"),
    pytest.param(HTTPException(429, "slow", {"Retry-After": "7"}), 429, "slow", 4029, id="429"),
    pytest.param(HTTPException(503, "later", {"Retry-After": "9"}), 503, "later", 1013, id="503"),
    pytest.param(ConsumerError("full", code="room_full", seats=0), 403, "full", 4503, id="ConsumerError"),
    pytest.param(LayerUnavailable("redis://:secret@host"), 503, "the service is not available now", 1013, id="layer"),
]


@pytest.mark.parametrize(("error", "status_code", "detail", "close_code"), REFUSALS)
async def test_what_is_raised_to_be_told_refuses_the_handshake(
    error: Exception, status_code: int, detail: Any, close_code: int
) -> None:
    """An `HTTPException` or one of ours is an HTTP response with its status, detail and headers."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            raise error

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        assert ws.response is not None
        assert ws.response.status_code == status_code
        told = {"code": "room_full", "seats": 0} if isinstance(error, ConsumerError) else {}
        assert ws.response.json() == {"detail": detail, **told}
        for name, value in (getattr(error, "headers", None) or {}).items():
            assert ws.response.headers[name.lower()] == value
        if status_code == 503:
            assert int(ws.response.headers["retry-after"]) > 0
    assert [code for code, _ in Chat.ended] == [close_code]
    assert_left(app, Chat)


@pytest.mark.parametrize(("error", "status_code", "detail", "close_code"), REFUSALS)
@pytest.mark.parametrize("how", ["reject_mode", "after the accept"])
async def test_what_is_raised_to_be_told_closes_where_there_is_no_response(
    error: Exception, status_code: int, detail: Any, close_code: int, how: str
) -> None:
    """With `reject_mode="close"`, and after an own accept, the same errors are close codes."""
    handled = []

    class Chat(Watched):
        reject_mode = "close" if how == "reject_mode" else "http"

        async def connect(self) -> None:
            await self.joined()
            if how == "after the accept":
                await self.accept()
            raise error

        @action
        async def ping(self) -> str:
            handled.append("a frame")
            return "pong"

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        assert ws.accepted
        assert ws.response is None
        code, reason = await ws.closed()
        assert code == close_code
        assert reason == detail or not isinstance(detail, str)
    assert [code for code, _ in Chat.ended] == [close_code]
    assert not handled
    assert_left(app, Chat)


async def test_reject_mode_close_tells_an_internal_error_as_1011() -> None:
    """With `reject_mode="close"` an exception in `connect` is 1011 without its text."""

    class Chat(Watched):
        reject_mode = "close"

        async def connect(self) -> None:
            raise ZeroDivisionError("the secret")

    sessions = []
    with suppress(ZeroDivisionError):
        async with connect(app_with(Chat), "/ws") as ws:
            sessions.append(ws)
        pytest.fail("the exception did not go on")
    assert (sessions[0].accepted, sessions[0].close_code) == (True, 1011)
    assert "secret" not in (sessions[0].close_reason or "")


CLOSE_CODES = [(4501, 401), (4503, 403), (4504, 404), (4009, 429), (4029, 429), (1000, 403), (4600, 403), (4999, 403)]


@pytest.mark.parametrize(("code", "status_code"), CLOSE_CODES)
@pytest.mark.parametrize("reject_mode", ["http", "close"])
async def test_close_in_connect_refuses(code: int, status_code: int, reject_mode: Any) -> None:
    """`close(code)` before the accept is a refusal with the status of that code, or with `reject_mode` the code."""
    after = []

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            await self.close(code, "full house")
            after.append(await self.send_json("nobody hears this"))

    app = app_with(Chat, reject_mode=reject_mode)
    async with connect(app, "/ws") as ws:
        await ws.closed()
        if reject_mode == "close":
            assert (ws.accepted, ws.close_code, ws.close_reason) == (True, code, "full house")
        else:
            assert not ws.accepted
            assert ws.response is not None
            assert ws.response.status_code == status_code
            assert ws.response.json() == {"detail": "full house"}
    assert after == [False]
    assert Chat.ended == [(code, "full house")]
    assert_left(app, Chat)


async def test_close_in_connect_after_the_accept_closes() -> None:
    """`close()` after an own accept ends the connection, and the rest of `connect` still runs."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.accept()
            await self.close(4100, "only looking")
            self.names.append("after")

    async with connect(app_with(Chat), "/ws") as ws:
        assert await ws.closed() == (4100, "only looking")
    assert Chat.names == ["after"]
    assert Chat.ended == [(4100, "only looking")]


async def test_disconnect_is_not_called_when_connect_was_not_begun() -> None:
    """A handshake refused by its parameters calls neither `connect` nor `disconnect`."""

    class Chat(Watched):
        async def connect(self, room: int) -> None:  # type: ignore[override]
            await self.joined()

    async with connect(app_with(Chat), "/ws?room=lobby") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422
    assert (Chat.ended, Chat.names) == ([], [])


# accept


async def test_accept_in_connect_names_subprotocol_and_headers() -> None:
    """`accept()` in `connect` opens the connection at once, with its subprotocol and headers."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.accept("chat.v2", {"X-Room": "lobby", "Set-Cookie": "a=b; Path=/"})
            await self.send_json("hello")

    async with connect(app_with(Chat), "/ws", subprotocols=["chat.v1", "chat.v2"]) as ws:
        assert (ws.accepted, ws.subprotocol) == (True, "chat.v2")
        assert (ws.headers["x-room"], ws.headers["set-cookie"]) == ("lobby", "a=b; Path=/")
        assert await ws.receive_json() == "hello"
        assert (await ask(ws))["data"] == "pong"


async def test_a_connection_is_accepted_once() -> None:
    """A second `accept()` is a RuntimeError, and so is one in a handler."""

    class Chat(Watched):
        async def connect(self) -> None:
            await self.accept()
            with pytest.raises(RuntimeError, match="answered"):
                await self.accept()

        @action
        async def again(self) -> str:
            with pytest.raises(RuntimeError, match="answered"):
                await self.accept()
            return "no"

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "again"))["data"] == "no"


async def test_sending_before_the_accept_says_what_to_do() -> None:
    """`send` and `send_json` before the accept raise a RuntimeError that says to accept first."""

    class Chat(Watched):
        async def connect(self) -> None:
            for send in (self.send_json({}), self.send("text"), self.send(bytes=b"")):
                with pytest.raises(RuntimeError, match=r"accept\(\)"):
                    await send

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws))["data"] == "pong"


async def test_frames_that_come_while_connect_runs_wait() -> None:
    """After an own accept, frames wait until `connect` has returned; then they are handled in order."""
    go_on = asyncio.Event()

    class Chat(Watched):
        async def connect(self) -> None:
            await self.accept()
            await go_on.wait()
            self.names.append("connected")

        @action
        async def note(self, number: int) -> None:
            self.names.append(str(number))

    async with connect(app_with(Chat), "/ws") as ws:
        for number in range(3):
            await ws.send_json({"action": "note", "data": number})
        await ws.send_json({"action": "note", "data": "x"})
        assert await ws.receive_nothing(0.02)
        go_on.set()
        assert (await ws.receive_json())["errors"]["code"] == "invalid_data"
        assert (await ask(ws))["data"] == "pong"
    assert Chat.names == ["connected", "0", "1", "2"]


# Groups and events around connect


async def test_events_between_joining_and_the_accept_follow_it() -> None:
    """What is sent to a group between `group_add` in `connect` and the accept comes after it, in order."""

    class Chat(Watched):
        forward_events = ["plain"]

        async def connect(self) -> None:
            await self.joined()
            for number in range(6):
                await self.group_send("everyone", {"type": "plain" if number % 2 else "handled", "n": number})

        @event
        async def handled(self, message: dict[str, Any]) -> None:
            await self.send_json(message)

    async with connect(app_with(Chat), "/ws") as ws:
        assert [(await ws.receive_json())["n"] for _ in range(6)] == list(range(6))


async def test_a_connected_client_is_in_the_groups_of_the_class() -> None:
    """With `groups = [...]` a client that has its answer gets every event, and no longer once it has left."""

    class News(Watched):
        groups = ["news", "sport"]
        forward_events = ["item"]

        async def connect(self) -> None: ...

        @action
        async def list(self) -> list[str]:
            return sorted(self.groups)

    app = app_with(News)
    async with connect(app, "/ws") as ws:
        await app.state.channels.layer().group_send("news", {"type": "item", "n": 1})
        await app.state.channels.layer().group_send("sport", {"type": "item", "n": 2})
        assert [(await ws.receive_json())["n"] for _ in range(2)] == [1, 2]
        assert (await ask(ws, "list"))["data"] == ["news", "sport"]


async def test_groups_is_live_and_read_only() -> None:
    """`self.groups` follows `group_add` and `group_discard`, and can't be changed itself."""

    class Chat(Watched):
        @action
        async def look(self) -> list[list[str]]:
            groups, seen = self.groups, [sorted(self.groups)]
            await self.group_add("b")
            await self.group_add("b")
            seen.append(sorted(groups))
            await self.group_discard("everyone")
            await self.group_discard("never joined")
            seen.append(sorted(groups))
            for change in ("add", "append", "clear", "discard", "pop", "remove"):
                assert not hasattr(groups, change)
            return seen

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "look"))["data"] == [["everyone"], ["b", "everyone"], ["b"]]


# disconnect


async def test_the_order_of_the_end() -> None:
    """In `disconnect` the connection is still a member and sends nothing; then it leaves; then dependencies close."""
    order: list[Any] = []

    async def database() -> AsyncIterator[str]:
        try:
            yield "db"
        finally:
            with pytest.raises(ValueError, match="not a channel"):
                Chat.layers[0].groups_of(Chat.names[0])
            order.append("dependency closed")

    class Chat(Watched):
        layers: ClassVar[list[ChannelLayer]] = []

        async def connect(self, who: str, db: Annotated[str, Depends(database)]) -> None:  # type: ignore[override]
            self.who = who
            self.layers.append(self.layer)
            await self.joined()

        async def disconnect(self, code: int, reason: str) -> None:
            order.append((sorted(self.groups), await self.send_json("gone"), await self.send("gone")))
            await self.group_send("everyone", {"type": "left", "who": self.who}, exclude_self=True)
            order.append("disconnect ended")

        @event
        async def left(self, message: dict[str, Any]) -> None:
            await self.send_json(message)

    app = app_with(Chat)
    async with connect(app, "/ws?who=anna") as anna, connect(app, "/ws?who=bert") as bert:
        await anna.close()
        assert order == [(["everyone"], False, False), "disconnect ended", "dependency closed"]
        assert await bert.receive_json() == {"type": "left", "who": "anna"}


async def test_disconnect_may_take_the_code_alone() -> None:
    """`disconnect(self, code)` is called with the code."""
    ended = []

    class Chat(WebSocketConsumer):
        async def disconnect(self, code: int) -> None:
            ended.append(code)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.close(4100, "a reason that nobody asks for")
    assert ended == [4100]


async def test_an_exception_in_disconnect_is_logged_and_leaves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """What `disconnect` raises is logged once, and the memberships end."""

    class Chat(Watched):
        async def disconnect(self, code: int, reason: str) -> None:
            await self.group_add("another one")
            raise ZeroDivisionError

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.close()
        assert_left(app, Chat)
    assert [record.levelname for record in caplog.records if record.name == "fastapi_channels"] == ["ERROR"]


async def test_a_disconnect_that_takes_too_long_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """A `disconnect` that takes longer than `DRAIN_TIMEOUT` is cancelled and logged, and the memberships end."""
    was_cancelled = []

    class Chat(Watched):
        drain_timeout = 0.05

        async def disconnect(self, code: int, reason: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                was_cancelled.append(True)

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.close()
        assert_left(app, Chat)
    assert was_cancelled == [True]
    assert [record.levelname for record in caplog.records if "DRAIN_TIMEOUT" in record.message] == ["ERROR"]


async def test_a_close_in_disconnect_does_nothing() -> None:
    """In `disconnect` the connection is gone: closing it once more is no error."""

    class Chat(Watched):
        async def disconnect(self, code: int, reason: str) -> None:
            await self.close(4100)
            self.ended.append((code, reason))

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.close(1001)
    assert Chat.ended == [(1001, "")]


# Cancelling, and what does not end


class Outer:
    """An application around another that knows the server's tasks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.tasks: list[asyncio.Task[Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] == "websocket" and task is not None:
            self.tasks.append(task)
        await self.app(scope, receive, send)


@pytest.mark.parametrize("where", ["idle", "action", "connect"])
async def test_cancelling_the_servers_task_runs_disconnect_with_1012(where: str) -> None:
    """A server that cancels the connection's task gets it cancelled, after one `disconnect` with 1012."""
    is_reached = asyncio.Event()

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            if where == "connect":
                await self.accept()
                await self.stay()

        @action
        async def stay(self) -> None:
            is_reached.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.names.append(self.channel_name)

    app = app_with(Chat)
    outer = Outer(app)
    async with connect(outer, "/ws") as ws:
        if where == "action":
            await ws.send_json({"action": "stay"})
        if where == "idle":
            await ask(ws)
        else:
            await asyncio.wait_for(is_reached.wait(), 1)
        began = time.monotonic()
        outer.tasks[0].cancel()
        await asyncio.wait(outer.tasks, timeout=2)
        assert outer.tasks[0].cancelled()
        assert time.monotonic() - began < session.GRACE / 2, "a cancelled connection gets no grace"
        assert Chat.ended == [(1012, "")]
        assert_left(app, Chat)
    assert Chat.names == [Chat.names[0]] * (1 if where == "idle" else 2)
    assert len(Chat.ended) == 1


async def test_a_server_that_shuts_down_ends_every_connection_with_1012(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When uvicorn stops, every connection, a busy one too, gets `disconnect` with 1012 before it has ended."""
    monkeypatch.setattr(session, "GRACE", 0.05)
    was_cancelled = []

    class Chat(Watched):
        @action
        async def stay(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled.append(True)
                raise

    app = app_with(Chat)
    served = await serve(app)
    idle, busy = await connect_for_real(f"{served.url}/ws"), await connect_for_real(f"{served.url}/ws")
    for name in ("stay", "ping"):
        await busy.send(f'{{"action": "{name}"}}')
    await idle.send('{"action": "ping"}')
    assert "pong" in str(await idle.recv())
    await served.stop()
    assert Chat.ended == [(1012, "")] * 2
    assert was_cancelled == [True]
    with pytest.raises(ConnectionClosedError) as closed:
        await idle.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    await busy.close()


class Stubborn(Watched):
    """Each of its parts waits for ever at `stay`."""

    reached: ClassVar[asyncio.Event]
    ends: ClassVar[list[str]]

    async def stay(self) -> None:
        self.reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise

    async def disconnect(self, code: int, reason: str) -> None:
        self.ends.append("disconnect")
        await super().disconnect(code, reason)


async def _in_action(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await ws.send_json({"action": "hang"})


async def _in_action_beside(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await ws.send_json({"action": "hang_beside", "request_id": 1})


async def _in_stream(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await ws.send_json({"action": "hang_in_stream", "request_id": 1})
    assert (await ws.receive_json())["data"] == "begun"


async def _in_event(ws: WebSocketSession, layer: ChannelLayer) -> None:
    await layer.group_send("everyone", {"type": "hang.all"})


@pytest.mark.parametrize("begin", [_in_action, _in_action_beside, _in_stream, _in_event])
@pytest.mark.parametrize("leave", [WebSocketSession.close, WebSocketSession.vanish])
async def test_a_handler_that_never_returns_is_cancelled_at_the_end(
    begin: Callable[[WebSocketSession, ChannelLayer], Awaitable[None]],
    leave: Callable[[WebSocketSession], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that leaves while a handler waits has it cancelled after a moment, and `disconnect` comes after."""
    monkeypatch.setattr(session, "GRACE", 0.05)

    class Chat(Stubborn):
        reached = asyncio.Event()
        ends = []

        @action
        async def hang(self) -> None:
            await self.stay()

        @action(concurrency=2)
        async def hang_beside(self) -> None:
            await self.stay()

        @action
        async def hang_in_stream(self) -> AsyncIterator[str]:
            yield "begun"
            await self.stay()

        @event
        async def hang_all(self) -> None:
            await self.stay()

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await begin(ws, app.state.channels.layer())
        await asyncio.wait_for(Chat.reached.wait(), 1)
        await leave(ws)
        assert Chat.ends == ["cancelled", "disconnect"]
        assert_left(app, Chat)


async def test_a_handler_that_ends_in_time_is_not_cancelled() -> None:
    """A call that needs a moment more than its client gets it, and finds that its sends return False."""
    is_reached, go_on = asyncio.Event(), asyncio.Event()
    notes: list[Any] = []

    class Chat(Watched):
        @action
        async def save(self) -> None:
            is_reached.set()
            await go_on.wait()
            notes.append(("saved", await self.send_json("saved"), await self.send("saved")))

        async def disconnect(self, code: int, reason: str) -> None:
            notes.append("disconnect")

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "save"})
        await is_reached.wait()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        await ws.close()
    assert notes == [("saved", False, False), "disconnect"]


async def test_a_client_that_leaves_in_connect_cancels_it() -> None:
    """A client that leaves while `connect` runs cancels it, and `disconnect` gets the client's code."""
    notes = []

    class Chat(Watched):
        async def connect(self) -> None:
            await self.joined()
            await self.accept()
            try:
                await asyncio.Event().wait()
            finally:
                notes.append("cancelled")

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await ws.close(4444, "bored")
        assert notes == ["cancelled"]
        assert Chat.ended == [(4444, "bored")]
        assert_left(app, Chat)


async def test_what_a_client_sent_before_its_close_is_handled() -> None:
    """Frames that had arrived before the close frame are handled before `disconnect`, in order."""
    handled: list[Any] = []

    class Chat(Watched):
        @action
        async def note(self, number: int) -> None:
            await asyncio.sleep(0)
            handled.append(number)

        async def disconnect(self, code: int, reason: str) -> None:
            handled.append("disconnect")

    async with connect(app_with(Chat), "/ws") as ws:
        for number in range(100):
            await ws.send_json({"action": "note", "data": number})
        await ws.close()
    assert handled == [*range(100), "disconnect"]


async def test_what_a_real_client_sent_before_its_close_is_handled(serve: Serve) -> None:
    """The same over a real server: send and close at once."""
    handled: list[Any] = []
    is_over = asyncio.Event()

    class Chat(Watched):
        @action
        async def note(self, number: int) -> None:
            handled.append(number)

        async def disconnect(self, code: int, reason: str) -> None:
            is_over.set()

    served = await serve(app_with(Chat))
    async with connect_for_real(f"{served.url}/ws") as client:
        for number in range(20):
            await client.send(f'{{"action": "note", "data": {number}}}')
    await asyncio.wait_for(is_over.wait(), 2)
    assert handled == list(range(20))


async def test_frames_behind_an_own_close_are_not_handled() -> None:
    """Once the server has closed, what the client had sent before it knew is left alone."""

    class Chat(Closing):
        @action
        async def note(self) -> None:
            self.names.append("handled")

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "leave"})
        await ws.send_json({"action": "note"})
        await ws.closed()
    assert "handled" not in Chat.names


async def test_a_send_to_a_client_that_is_gone_never_raises(serve: Serve) -> None:
    """An action that goes on sending to a client that has vanished sees False, and ends in its own time."""
    result: asyncio.Queue[int] = asyncio.Queue()

    class Chat(Watched):
        @action
        async def talk(self) -> None:
            sent = 0
            while await self.send_json("x" * 1000):
                sent += 1
                await asyncio.sleep(0)
            result.put_nowait(sent)

    served = await serve(app_with(Chat))
    client = await connect_for_real(f"{served.url}/ws")
    await client.send('{"action": "talk"}')
    await client.recv()
    client.transport.abort()
    assert await asyncio.wait_for(result.get(), 3) > 0
    await client.wait_closed()


# Exceptions in handlers


async def test_an_exception_in_a_frames_handler_is_answered_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in `receive` is logged with its traceback, answered without its text, and closes nothing."""

    class Echo(JsonConsumer):
        async def receive(self, data: Any) -> None:
            await self.send_json({"echo": 1 / data})

    async with connect(app_with(Echo), "/ws") as ws:
        await ws.send_json(0)
        reply = await ws.receive_json()
        assert reply["status"] == "bad"
        assert reply["errors"] == {"code": "internal_error", "detail": "Internal Server Error"}
        await ws.send_json(2)
        assert await ws.receive_json() == {"echo": 0.5}
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_an_exception_in_an_event_handler_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in an event's handler is logged once and counted; the client hears nothing, the next event comes."""

    class Chat(Watched):
        @event
        async def divide(self, message: dict[str, Any]) -> None:
            await self.send_json(1 / message["by"])

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        layer = app.state.channels.layer()
        await layer.group_send("everyone", {"type": "divide", "by": 0})
        await layer.group_send("everyone", {"type": "divide", "by": 4})
        assert await ws.receive_json() == 0.25
        assert layer.counters.failed == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


# Plain functions


async def test_hooks_and_handlers_may_be_plain_functions() -> None:
    """Plain `def` hooks, actions and event handlers run in threads, and reach the connection through `self.sync`."""
    ended: list[Any] = []

    class Chat(ActionConsumer):
        forward_events = ["news"]

        def connect(self, room: str) -> None:
            self.room = room
            self.sync.group_add(room)
            self.sync.accept("chat", {"x-room": room})
            self.sync.send_json({"room": room})
            self.sync.group_send(room, {"type": "joined"})

        def disconnect(self, code: int, reason: str) -> None:
            ended.append((code, reason, sorted(self.groups), self.sync.send_json("gone")))
            self.sync.close()

        @action
        def say(self, text: str) -> bool:
            time.sleep(0.01)
            return self.sync.send(text) and self.sync.send(bytes=text.encode())

        @action
        def leave(self, code: int) -> None:
            self.sync.group_discard(self.room)
            self.sync.close(code, "from a thread")

        @event
        def joined(self, message: dict[str, Any]) -> None:
            self.sync.group_send(self.room, {"type": "news", "of": message["type"]})

    async with connect(app_with(Chat), "/ws?room=hall", subprotocols=["chat"]) as ws:
        assert (ws.subprotocol, ws.headers["x-room"]) == ("chat", "hall")
        assert await ws.receive_json() == {"room": "hall"}
        assert await ws.receive_json() == {"type": "news", "of": "joined"}
        await ws.send_json({"action": "say", "data": "hey ✓"})
        assert await ws.receive_text() == "hey ✓"
        assert await ws.receive_bytes() == "hey ✓".encode()
        assert (await ws.receive_json())["data"] is True
        await ws.send_json({"action": "leave", "data": 4100})
        assert await ws.closed() == (4100, "from a thread")
    assert ended == [(4100, "from a thread", [], False)]


async def test_a_plain_receive_runs_in_a_thread() -> None:
    """`receive` may be a plain function too; frames stay in order, and what it raises is answered."""

    class Echo(WebSocketConsumer):
        def receive(self, data: str) -> None:
            if data == "bad":
                raise ConsumerError("no", code="nope")
            self.sync.send(data)

    async with connect(app_with(Echo), "/ws") as ws:
        for text in ("a", "bad", "b"):
            await ws.send_text(text)
        assert await ws.receive_text() == "a"
        assert (await ws.receive_json())["errors"] == {"code": "nope", "detail": "no"}
        assert await ws.receive_text() == "b"


async def test_a_plain_connect_refuses_like_any_other() -> None:
    """`self.sync.close()` and an `HTTPException` in a plain `connect` refuse the handshake."""

    class Chat(WebSocketConsumer):
        def connect(self, how: str) -> None:
            if how == "close":
                self.sync.close(4504, "gone")
            else:
                raise HTTPException(404, "gone")

    app = app_with(Chat)
    for how in ("close", "raise"):
        async with connect(app, f"/ws?how={how}") as ws:
            assert ws.response is not None
            assert (ws.response.status_code, ws.response.json()) == (404, {"detail": "gone"})


async def test_the_blocking_methods_refuse_to_block_the_event_loop() -> None:
    """`self.sync` on the event loop's own thread is a RuntimeError that says to use `await`."""

    class Chat(Watched):
        @action
        async def wrong(self) -> str:
            for call in (self.sync.close, lambda: self.sync.send_json({}), lambda: self.sync.group_add("x")):
                with pytest.raises(RuntimeError, match="await"):
                    call()
            return "right"

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "wrong"))["data"] == "right"


# Context variables

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Tenants(Watched):
    async def connect(self, name: str) -> None:  # type: ignore[override]
        tenant.set(name)
        self.name = name
        await self.group_add("everyone")

    @action
    async def who(self) -> list[str]:
        return [self.name, tenant.get()]

    @action
    def who_in_a_thread(self) -> list[str]:
        return [self.name, tenant.get()]

    @action(concurrency=2)
    async def who_beside(self) -> list[str]:
        return [self.name, tenant.get()]

    @action
    async def become(self, name: str) -> list[str]:
        before = tenant.get()
        tenant.set(name)
        await asyncio.sleep(0)
        return [before, tenant.get()]

    @event
    async def tell(self, message: dict[str, Any]) -> None:
        await self.send_json([self.name, tenant.get()])

    async def disconnect(self, code: int, reason: str) -> None:
        self.ended.append((code, tenant.get()))


async def test_what_connect_puts_into_the_context_is_seen_in_every_handler() -> None:
    """Context variables set in `connect` are seen in actions, threads, event handlers and `disconnect`."""
    app = app_with(Tenants)
    Tenants.ended.clear()
    names = ["anna", "bert", "anna", "çelik"]
    async with (
        connect(app, f"/ws?name={names[0]}") as one,
        connect(app, f"/ws?name={names[1]}") as two,
        connect(app, f"/ws?name={names[2]}") as three,
        connect(app, f"/ws?name={names[3]}") as four,
    ):
        sessions = dict(zip((one, two, three, four), names, strict=True))
        for _ in range(2):
            await app.state.channels.layer().group_send("everyone", {"type": "tell"})
            for ws, name in sessions.items():
                assert await ws.receive_json() == [name, name]
        for question in ("who", "who_in_a_thread", "who_beside"):
            for ws in sessions:
                await ws.send_json({"action": question, "request_id": 1})
            for ws, name in sessions.items():
                assert (await ws.receive_json())["data"] == [name, name]
    assert sorted(Tenants.ended) == [(1000, name) for name in sorted(names)]
    assert tenant.get() == "nobody"


async def test_what_connect_puts_into_the_context_before_its_own_accept_is_seen() -> None:
    """The same holds if `connect` accepts itself and events have come by then, or come while it goes on."""
    go_on = asyncio.Event()

    class Chat(ActionConsumer):
        async def connect(self) -> None:
            await self.group_add("everyone")
            await self.group_send("everyone", {"type": "tell", "n": 0})
            tenant.set("anna")
            await self.accept()
            await go_on.wait()
            await self.send_json("connected")

        @event
        async def tell(self, message: dict[str, Any]) -> None:
            await self.send_json([message["n"], tenant.get()])

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        assert await ws.receive_json() == [0, "anna"]
        await app.state.channels.layer().group_send("everyone", {"type": "tell", "n": 1})
        assert await ws.receive_json() == [1, "anna"]
        go_on.set()
        assert await ws.receive_json() == "connected"
        await app.state.channels.layer().group_send("everyone", {"type": "tell", "n": 2})
        assert await ws.receive_json() == [2, "anna"]


async def test_one_connections_context_does_not_reach_another() -> None:
    """What a handler puts into its context is seen by no other connection, whoever shares its task."""
    app = app_with(Tenants)
    async with connect(app, "/ws?name=same") as one, connect(app, "/ws?name=same") as two:
        for ws, name in ((one, "changed"), (two, "changed too")):
            await ws.send_json({"action": "become", "data": name, "request_id": 1})
        for ws, name in ((one, "changed"), (two, "changed too")):
            assert (await ws.receive_json())["data"] == ["same", name]
        await app.state.channels.layer().group_send("everyone", {"type": "tell"})
        assert await one.receive_json() == await two.receive_json() == ["same", "same"]


async def test_each_frame_has_a_context_of_its_own() -> None:
    """What one frame's handler puts into its context the next one does not see, also if both came at once."""
    async with connect(app_with(Tenants), "/ws?name=same") as ws:
        for number in range(3):
            await ws.send_json({"action": "become", "data": f"number {number}", "request_id": number})
        assert [(await ws.receive_json())["data"][0] for _ in range(3)] == ["same"] * 3


async def test_each_of_two_applications_has_its_own_layer_in_its_hooks() -> None:
    """`get_channel_layer()` in hooks and handlers is the layer of the application that serves the connection."""
    seen: list[ChannelLayer] = []

    class Chat(ActionConsumer):
        async def connect(self) -> None:
            seen.append(get_channel_layer())
            await get_channel_layer().group_add("all", self.channel_name)

        @action
        async def look(self) -> None:
            seen.append(get_channel_layer())

        @action
        def look_in_a_thread(self) -> None:
            seen.append(get_channel_layer())

        @event
        async def look_at_event(self, message: dict[str, Any]) -> None:
            seen.append(get_channel_layer())
            await self.send_json(message)

        async def disconnect(self, code: int, reason: str) -> None:
            seen.append(get_channel_layer())

    async def look(ws: WebSocketSession, layer: ChannelLayer) -> None:
        for name in ("look", "look_in_a_thread"):
            await ws.send_json({"action": name, "request_id": name})
            await ws.receive_json()
        await layer.group_send("all", {"type": "look.at.event"})
        await ws.receive_json()
        await ws.close()

    one, two = app_with(Chat), app_with(Chat)
    async with connect(one, "/ws") as in_one, connect(two, "/ws") as in_two:
        for app, ws in ((one, in_one), (two, in_two)):
            await look(ws, app.state.channels.layer())
    layer_of_one, layer_of_two = one.state.channels.layer(), two.state.channels.layer()
    assert seen == [layer_of_one, layer_of_two, *[layer_of_one] * 4, *[layer_of_two] * 4]


# The server's side of it


async def test_a_client_that_is_gone_before_the_accept_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Where the server can't take the accept, since the client is gone, the code is 1006 and nothing is logged."""

    class Chat(Watched): ...

    app = app_with(Chat)

    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        async def failing_send(message: Mapping[str, Any]) -> None:
            raise OSError("the transport is closed")

        await app(scope, receive, failing_send if scope["type"] == "websocket" else send)

    with suppress(OSError):  # the server knows its own error
        async with connect(gone, "/ws") as ws:
            assert not ws.accepted
    assert Chat.ended == [(1006, "")]
    assert_left(app, Chat)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_consumer_may_ask_for_the_websocket_and_read_its_scope() -> None:
    """`websocket`, `scope`, `path_params`, `user` and `auth` are there in every hook."""

    class Chat(WebSocketConsumer):
        async def connect(self) -> None:
            await self.accept()
            assert self.websocket.scope is self.scope
            await self.send_json(
                [
                    self.scope["path"],
                    dict(self.path_params),
                    self.user.is_authenticated,
                    self.auth,
                    self.groups == set(),
                ]
            )

    async with connect(app_with(Chat), "/ws") as ws:
        assert await ws.receive_json() == ["/ws", {}, False, None, True]


async def test_a_disconnect_of_starlette_out_of_a_handler_ends_nothing() -> None:
    """`WebSocketDisconnect` out of a handler, as Starlette's own methods raise it, doesn't end the connection."""

    class Chat(Watched):
        @action
        async def starlette(self) -> None:
            raise WebSocketDisconnect(1001)

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "starlette"))["status"] == "bad"
        assert (await ask(ws))["data"] == "pong"


async def test_a_real_client_is_refused_with_a_response(serve: Serve) -> None:
    """Over a real server a refusal is an HTTP response with status, headers and body."""

    class Chat(Watched):
        async def connect(self) -> None:
            raise HTTPException(429, "slow down", {"Retry-After": "7"})

    served = await serve(app_with(Chat))
    with pytest.raises(InvalidStatus) as refused:
        await connect_for_real(f"{served.url}/ws")
    response = refused.value.response
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert response.body == b'{"detail":"slow down"}'


async def test_a_real_client_is_closed_with_a_code_where_it_asks_for_that(serve: Serve) -> None:
    """Over a real server `reject_mode="close"` opens and closes with a code that browsers can read."""

    class Chat(Watched):
        reject_mode = "close"

        async def connect(self) -> None:
            raise HTTPException(401, "who are you?")

    served = await serve(app_with(Chat))
    async with connect_for_real(f"{served.url}/ws") as client:
        with pytest.raises(ReallyClosed) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4501, "who are you?")
