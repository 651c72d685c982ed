"""`BaseChannel` and `Channel`: what the original package's classes do, and what of it they do better."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.websockets import WebSocket

from fastapi_channels import Channels, add_channel
from fastapi_channels.authentication import TokenAuthentication, User
from fastapi_channels.channels import BaseChannel, Channel
from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.decorators import action
from fastapi_channels.exceptions import (
    ActionIsDeprecated,
    ActionNotExist,
    AuthenticationFailed,
    ConsumerError,
    DefinitionError,
    LayerUnavailable,
    MethodNotAllowed,
    NotFound,
    ParseError,
    PermissionDenied,
    RateLimitExceeded,
    WebSocketException,
    WebSocketExceptionHandler,
)
from fastapi_channels.layers import MemoryLayer
from fastapi_channels.permission import AllowAny, BasePermission, DenyAll, IsAuthenticated
from fastapi_channels.routing import ConsumerRouter
from fastapi_channels.settings import ChannelsSettings
from fastapi_channels.testing import ConnectionClosed, WebSocketSession, connect
from fastapi_channels.throttling import ConnectionRateThrottle, limiter
from fastapi_channels.used import GroupChannel, PersonChannel


def app_with(*channels: BaseChannel, app: FastAPI | None = None, **options: Any) -> FastAPI:
    """An application with the first channel at `/`, and each at its number."""
    app = app or FastAPI()
    add_channel(app, **options)
    for number, channel in enumerate(channels):
        _add_route(app, channel, f"/{number}")
    _add_route(app, channels[0], "/")
    return app


def _add_route(app: FastAPI, channel: BaseChannel, path: str) -> None:
    @app.websocket(path)
    async def endpoint(websocket: WebSocket) -> None:
        await channel.connect(websocket)


async def closed(client: WebSocketSession) -> tuple[list[Any], int | None]:
    """What a client still gets, and the code that it is closed with."""
    frames = []
    try:
        while True:
            frames.append(await client.receive_json())
    except ConnectionClosed:
        return frames, client.close_code


async def ask(client: WebSocketSession, action: str, **data: Any) -> Any:
    """Ask for an action, and get the next frame."""
    await client.send_json({"action": action, **data})
    return await client.receive_json()


class Echo(Channel):
    """A channel whose action `echo` replies with what it got."""

    @action()
    async def echo(self, websocket: WebSocket, channel: str, data: dict[str, Any]) -> Any:
        return {"channel": channel, "data": data}


# The channel


async def test_everybody_on_a_channel_hears_a_frame() -> None:
    """What one client sends, all on the channel get as JSON; who is on another channel doesn't."""
    app = app_with(BaseChannel(), BaseChannel(channel="other"))
    async with connect(app, "/") as one, connect(app, "/") as two, connect(app, "/1") as three:
        await one.send_text('hi "there"')
        await three.send_text("marker")
        assert await one.receive_text() == '"hi \\"there\\""'
        assert await two.receive_json() == 'hi "there"'
        assert await three.receive_json() == "marker"


@pytest.mark.parametrize("given", ["class", "constructor", "connect"])
async def test_where_a_channels_name_comes_from(given: str) -> None:
    """The name is the class's, or the constructor's, or that of `connect`, which is the strongest."""

    class Named(Echo):
        channel = "class"

    channel = Named() if given == "class" else Named(channel="constructor")
    app = FastAPI()
    add_channel(app)

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await channel.connect(websocket, "connect" if given == "connect" else None)

    async with connect(app, "/") as client:
        assert (await ask(client, "echo"))["data"]["channel"] == given


async def test_the_default_channel() -> None:
    """Without a name it is `default_channel`, and a consumer's group of that name is the same."""
    app = app_with(BaseChannel())
    async with connect(app, "/") as client:
        await app.state.channels.layer().group_send("default_channel", {"type": "websocket.send", "text": "!"})
        assert await client.receive_text() == "!"


async def test_a_receiver_of_ones_own() -> None:
    """`receiver` gets the text of each frame, and may be plain `def`; `close` closes."""

    class Own(BaseChannel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            if message == "close":
                await self.close(websocket)
            await self.broadcast_to_personal(websocket, {"got": message, "on": channel})

    async with connect(app_with(Own(channel="c")), "/") as client:
        await client.send_text("x")
        assert await client.receive_json() == {"got": "x", "on": "c"}
        await client.send_text("close")
        assert await closed(client) == ([], 1000)


async def test_broadcasts_from_a_view() -> None:
    """A view reaches a channel by its name."""
    channel = BaseChannel()
    app = app_with(channel)

    @app.post("/say")
    async def say() -> None:
        await channel.broadcast_to_channel("default_channel", {"a": [1, "é"]})

    async with connect(app, "/") as client:
        await post(app, "/say")
        assert await client.receive_json() == {"a": [1, "é"]}


async def post(app: FastAPI, path: str) -> int:
    """The status of a request."""
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.post(path)).status_code


async def test_encode_and_decode() -> None:
    """`encode` and `decode` make and read the frames, also those of actions; models are JSON."""

    class Said(BaseModel):
        text: str

    class Shouting(Channel):
        async def encode(self, data: Any) -> str:
            return (await super().encode(data)).upper()

        @staticmethod
        async def decode_json(message: str) -> Any:
            name, _, text = message.partition(" ")
            return {"action": name, "text": text}

        @action()
        async def say(self, websocket: WebSocket, channel: str, data: dict[str, Any]) -> None:
            await self.broadcast_to_channel(channel, Said(text=data["text"]))

    async with connect(app_with(Shouting()), "/") as client:
        await client.send_text("say hello")
        assert await client.receive_text() == '{"TEXT":"HELLO"}'


async def test_send_error() -> None:
    """`send_error` tells the client, and closes if it is told to."""

    class Refusing(BaseChannel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            await self.send_error(f"no {message}", close=message == "last")

    async with connect(app_with(Refusing()), "/") as client:
        await client.send_text("first")
        frame = {"type": "response", "status": "bad", "request_id": None, "data": None, "errors": "no first"}
        assert await client.receive_json() == frame
        await client.send_text("last")
        assert await closed(client) == ([{**frame, "errors": "no last"}], 1000)


async def test_the_websocket_itself_may_be_used() -> None:
    """What a handler does with the WebSocket goes through the connection, in order, and is nothing once it is gone."""
    seen = asyncio.Event()

    class Own(BaseChannel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            await self.broadcast_to_personal(websocket, 1)
            await websocket.send_text("2")
            await websocket.send_bytes(b"3")
            await websocket.send_json(4)
            with pytest.raises(RuntimeError, match="the channel reads this connection"):
                await websocket.receive_text()
            await websocket.close(4100, "bye")
            await self.broadcast_to_personal(websocket, 5)
            seen.set()

    async with connect(app_with(Own()), "/") as client:
        await client.send_text("")
        assert [await client.receive_text(), await client.receive_text()] == ["1", "2"]
        assert await client.receive_bytes() == b"3"
        assert await client.receive_text() == "4"
        assert await closed(client) == ([], 4100)
        await asyncio.wait_for(seen.wait(), 5)


async def test_an_accepted_connection_is_an_error() -> None:
    """`connect` accepts by itself, and says so where the route has done it before."""
    app, channel = FastAPI(), BaseChannel()
    add_channel(app)
    errors: list[str] = []

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        with pytest.raises(RuntimeError) as caught:
            await channel.connect(websocket)
        errors.append(str(caught.value))
        await websocket.close()

    async with connect(app, "/") as client:
        await closed(client)
    assert errors == ["BaseChannel.connect() accepts the connection; don't do so before"]


async def test_a_websocket_of_nobody() -> None:
    """A WebSocket that is on no channel can't be sent to."""
    websocket = WebSocket({"type": "websocket"}, lambda: None, lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="not connected to a channel"):
        await BaseChannel().broadcast_to_personal(websocket, "x")


# Actions


async def test_an_action_replies() -> None:
    """What an action returns is the data of the reply, with the request's id; None is no reply."""
    channel = Channel()

    @channel.action("say")
    async def say(websocket: WebSocket, channel: str, data: dict[str, Any], **kwargs: Any) -> Any:
        return data.get("answer")

    async with connect(app_with(channel), "/") as client:
        await client.send_json({"action": "say"})
        reply = await ask(client, "say", request_id="a-1", answer=[1])
        ok = {"type": "response", "action": "say", "request_id": "a-1", "status": "ok", "data": [1], "errors": None}
        assert reply == ok


async def test_handlers_get_what_they_ask_for() -> None:
    """A handler declares any of the three arguments, may be plain `def`, and an awaitable it returns is awaited."""
    channel = Channel()

    @channel.action()
    def plain(data: dict[str, Any]) -> Any:
        return data["x"]

    @channel.action()
    def later(websocket: WebSocket) -> Any:
        return channel.broadcast_to_personal(websocket, "sent")

    async with connect(app_with(channel), "/") as client:
        assert (await ask(client, "plain", x=1))["data"] == 1
        assert await ask(client, "later") == "sent"
        assert (await client.receive_json())["data"] is True


async def test_keys_of_the_client_are_no_arguments() -> None:
    """A frame's keys stay in `data`, whatever they are called."""
    async with connect(app_with(Echo()), "/") as client:
        keys = {"websocket": 1, "channel": 2, "self": 3, "scope": 4, "data": 5}
        reply = await ask(client, "echo", **keys)
        assert reply["data"] == {"channel": "default_channel", "data": {"action": "echo", **keys}}


@pytest.mark.parametrize(
    "frame",
    ["", "{", "null", "[]", '"text"', "NaN", '{"action":"echo","request_id":[]}', b"\x00", b'{"action":"echo"}'],
)
async def test_hostile_frames(frame: str | bytes) -> None:
    """A frame that can't be read is answered, and the connection lives on."""
    async with connect(app_with(Echo()), "/") as client:
        await (client.send_bytes(frame) if isinstance(frame, bytes) else client.send_text(frame))
        assert (await client.receive_json())["errors"] == "Parse Error"
        assert (await ask(client, "echo"))["status"] == "ok"


@pytest.mark.parametrize("name", ["nothing", "receiver", "__init__", None, 7, ["echo"], {}])
async def test_unknown_actions(name: Any) -> None:
    """What is no action is told to be none, with the frame's id."""
    async with connect(app_with(Echo()), "/") as client:
        reply = await ask(client, name, request_id=3)
        assert (reply["errors"], reply["request_id"], reply["status"]) == ("Action Not Exist", 3, "bad")


async def test_large_frames() -> None:
    """A frame above MAX_FRAME_SIZE is refused, and the connection lives on."""
    async with connect(app_with(Echo(), max_frame_size=100), "/") as client:
        await client.send_text("x" * 101)
        reply = await client.receive_json()
        assert (reply["status"], reply["errors"]) == ("bad", "a frame has at most 100 bytes, not 101")
        assert (await ask(client, "echo"))["status"] == "ok"


async def test_an_exception_in_an_action(caplog: pytest.LogCaptureFixture) -> None:
    """An exception of a handler is logged once, tells the client nothing of the inside, and closes nothing."""
    channel = Echo()

    @channel.action()
    async def fail() -> None:
        raise ValueError("a secret")

    async with connect(app_with(channel), "/") as client:
        reply = await ask(client, "fail", request_id=1)
        assert (reply["errors"], reply["request_id"]) == ("Internal Server Error", 1)
        assert (await ask(client, "echo"))["status"] == "ok"
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (PermissionDenied(close=False), "Permission Denied", None),
        (PermissionDenied(close=True), "Permission Denied", 4503),
        (PermissionDenied(), "Permission Denied", 4503),
        (PermissionDenied("not you", close=False), "not you", None),
        (PermissionDenied(error_msg="go away", reason="why", code=4600), "go away", 4600),  # type: ignore[arg-type]
        (WebSocketException(close=False), "disconnect error", None),
        (WebSocketException(4100, "reason"), "reason", 4100),
        (NotFound(), "Not Found", 4504),
        (MethodNotAllowed(), "Method Not Allowed", 4500),
        (RateLimitExceeded(close=False), "Too Many Request", None),
        (ActionNotExist(), "Action Not Exist", 4504),
        (ActionIsDeprecated(), "Action is deprecated", 4504),
        (ParseError(error_msg={"line": 3}, close=False), {"line": 3}, None),
        (ConsumerError("the room is full", code="room_full"), "the room is full", None),
        (HTTPException(404, "no such room"), "no such room", None),
    ],
)
async def test_what_an_action_raises(error: Exception, text: Any, code: int | None) -> None:
    """An error raised to be told is told in the original's envelope, and closes the connection if it says so."""
    channel = Echo()

    @channel.action()
    async def fail() -> None:
        raise error

    async with connect(app_with(channel), "/") as client:
        reply = await ask(client, "fail", request_id=9)
        assert (reply["type"], reply["status"], reply["request_id"]) == ("response", "bad", 9)
        assert reply["errors"] == text
        if code is None:
            assert (await ask(client, "echo"))["status"] == "ok"
        else:
            assert await closed(client) == ([], code)


@pytest.mark.parametrize(
    "error", [WebSocketException(42), WebSocketException(1006), WebSocketException(error_msg=object())]
)
async def test_errors_that_can_not_be_told(error: WebSocketException, caplog: pytest.LogCaptureFixture) -> None:
    """A code that nobody may close with, or what JSON can't hold, is logged, and the client is told of an error."""
    channel = Channel()

    @channel.action
    async def fail() -> None:
        raise error

    async with connect(app_with(channel), "/") as client:
        reply = await ask(client, "fail", request_id=1)
        assert (reply["status"], reply["request_id"]) == ("bad", 1)
        assert await closed(client) == ([], 1000 if error.code == 1000 else 1011)
    assert caplog.records


class Away(MemoryLayer):
    """A layer whose broker can't be reached."""

    async def _connect(self) -> None:
        raise LayerUnavailable


async def test_a_layer_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its layer a channel lets nobody in, and says to come again."""
    settings = ChannelsSettings.load(options={"channel_layers": {"default": Away()}})
    monkeypatch.setattr(Channels, "fallback", Channels(settings))
    app = FastAPI()
    _add_route(app, BaseChannel(), "/")
    async with connect(app, "/") as client:
        frames, code = await closed(client)
        assert (frames[0]["errors"], code) == ("the service is not available now", 1013)


async def test_the_envelope() -> None:
    """The error's status, data, request id and further keys are the frame's."""
    channel = Channel()

    @channel.action()
    async def fail() -> None:
        raise WebSocketException(status=7, data=[1], request_id="own", error_msg={"a": 1}, close=False, more=2)

    async with connect(app_with(channel), "/") as client:
        frame = {"type": "response", "status": 7, "request_id": "own", "data": [1], "errors": {"a": 1}, "more": 2}
        assert await ask(client, "fail", request_id=1) == {**frame, "action": "fail"}


async def test_deprecated_actions() -> None:
    """A deprecated action is refused, whichever decorator says so."""

    class Old(Channel):
        @action(deprecated=True)
        async def by_class(self) -> None: ...

    channel = Old()

    @channel.action(deprecated=True)
    async def by_object() -> None: ...

    async with connect(app_with(channel), "/") as client:
        for name in ("by_class", "by_object"):
            assert (await ask(client, name))["errors"] == f"The action '{name}' is deprecated."


# Errors at the handler of the application


async def test_a_handler_of_the_applications_own() -> None:
    """An exception handler for WebSocketException tells the client in place of ours, also of refusals."""
    app = FastAPI()
    channel = Echo(permission_classes=lambda websocket, action: action != "echo")

    async def handler(websocket: WebSocket, error: WebSocketException) -> None:
        await websocket.send_json({"mine": error.error_msg, "code": error.code, "close": error.close})

    app.add_exception_handler(WebSocketException, handler)  # type: ignore[arg-type]
    async with connect(app_with(channel, app=app), "/") as client:
        reply = await ask(client, "echo")
        assert reply == {"mine": "you do not have permission to do this", "code": 4503, "close": False}
        assert (await ask(client, "nothing"))["mine"] == "Action Not Exist"


async def test_without_exception_handlers() -> None:
    """With `add_exception_handlers=False` nobody tells the client: the connection closes with the error's code."""
    async with connect(app_with(Echo(), add_exception_handlers=False), "/") as client:
        await client.send_json({"action": "nothing"})
        assert await closed(client) == ([], 4504)


async def test_the_handler_serves_other_routes() -> None:
    """`add_exception_handlers=True` answers WebSocketException on the application's own WebSocket routes too."""
    app = app_with(BaseChannel())

    @app.websocket("/own")
    async def own(websocket: WebSocket, early: bool = False) -> None:
        if not early:
            await websocket.accept()
        raise NotFound()

    async with connect(app, "/own") as client:
        frames, code = await closed(client)
        assert (frames[0]["errors"], code) == ("Not Found", 4504)
    async with connect(app, "/own?early=1") as client:
        assert client.response is not None
        assert client.response.status_code == 403
    handler: Any = app.exception_handlers[WebSocketException]
    assert handler is WebSocketExceptionHandler


# Join and leave


async def test_join_and_leave() -> None:
    """Join handlers reach the client before it hears the channel; leave handlers run when it is gone."""
    channel = BaseChannel()
    left = asyncio.Event()

    @channel.on_event("join")
    async def join(websocket: WebSocket, channel_name: str) -> None:
        await channel.broadcast_to_personal(websocket, f"joined {channel_name}")

    @channel.on_event("join")
    def plain(websocket: WebSocket, channel_name: str) -> None: ...

    @channel.on_event("leave")
    async def leave(websocket: WebSocket, channel_name: str) -> None:
        assert not await channel.broadcast_to_personal(websocket, "nobody")
        await channel.broadcast_to_channel(channel_name, "left")
        left.set()

    app = app_with(channel)
    async with connect(app, "/") as stays:
        assert await stays.receive_json() == "joined default_channel"
        async with connect(app, "/") as goes:
            assert await goes.receive_json() == "joined default_channel"
            await goes.send_text("hello")
            assert await goes.receive_json() == await stays.receive_json() == "hello"
        assert await stays.receive_json() == "left"
        assert left.is_set()


async def test_what_is_said_while_a_client_joins() -> None:
    """What is said while join handlers run is heard when they have ended, and never if they say no."""
    channel = BaseChannel()
    begun, decide = asyncio.Semaphore(0), asyncio.Event()

    @channel.on_event("join")
    async def join(websocket: WebSocket, name: str) -> None:
        begun.release()
        await decide.wait()
        if "banned" in websocket.query_params:
            raise PermissionDenied("you are banned")

    app = app_with(channel)
    async with connect(app, "/") as one, connect(app, "/?banned=1") as banned:
        await begun.acquire()
        await begun.acquire()
        for number in range(3):
            event = {"type": "websocket.send", "text": f"{number}"}
            await app.state.channels.layer().group_send("default_channel", event)
        decide.set()
        await one.send_text("x")
        assert [await one.receive_json() for _ in range(4)] == [0, 1, 2, "x"]
        frames, code = await closed(banned)
        assert ([frame["errors"] for frame in frames], code) == (["you are banned"], 4503)


async def test_a_lifespan() -> None:
    """A lifespan is around the connection, in one task, with a task group of its own if it likes."""
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(websocket: WebSocket, channel: str) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(60))
            events.append(f"join {channel}")
            try:
                yield
            finally:
                events.append("leave")
                task.cancel()

    async with connect(app_with(BaseChannel(lifespan=lifespan)), "/") as client:
        await client.send_text("x")
        assert await client.receive_json() == "x"
        assert events == ["join default_channel"]
    assert events == ["join default_channel", "leave"]


async def test_a_lifespan_that_is_a_method() -> None:
    """A class's lifespan is called with the channel object, and may be a bare async generator function."""

    class Own(BaseChannel):
        async def lifespan(self, websocket: WebSocket, channel: str) -> AsyncIterator[None]:
            await self.broadcast_to_personal(websocket, "hello")
            yield

    async with connect(app_with(Own()), "/") as client:
        assert await client.receive_json() == "hello"


async def test_join_handlers_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """What a join handler raises is told and closes, and no frame is handled."""
    handled: list[Any] = []

    class Own(BaseChannel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            handled.append(message)

    told, failing = Own(), Own()

    @told.on_event("join")
    async def refuse(websocket: WebSocket, channel: str) -> None:
        raise PermissionDenied("not today")

    @failing.on_event("join")
    async def fail(websocket: WebSocket, channel: str) -> None:
        raise ValueError("a secret")

    app = app_with(told, failing)
    async with connect(app, "/") as client:
        frames, code = await closed(client)
        assert (frames[0]["errors"], code) == ("not today", 4503)
    async with connect(app, "/1") as client:
        frames, code = await closed(client)
        assert (frames[0]["errors"], code) == ("Internal Server Error", 1011)
    assert handled == []
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_a_client_that_goes_while_it_joins() -> None:
    """A join handler that waits is cancelled when the client goes, and the channel forgets the connection."""
    channel = BaseChannel(max_connection=1)
    waits, ended = asyncio.Event(), asyncio.Event()

    @channel.on_event("join")
    async def join(websocket: WebSocket, name: str) -> None:
        if waits.is_set():
            return
        waits.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    app = app_with(channel)
    async with connect(app, "/"):
        await asyncio.wait_for(waits.wait(), 5)
    assert ended.is_set()
    async with connect(app, "/") as client:
        await client.send_text("again")
        assert await client.receive_json() == "again"


async def test_leave_handlers_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """A leave handler that fails is logged, and the next one runs."""
    channel = BaseChannel()
    left: list[str] = []

    @channel.on_event("leave")
    async def fail(websocket: WebSocket, name: str) -> None:
        raise ValueError

    channel.add_event_handler("leave", lambda websocket, name: left.append(name))
    async with connect(app_with(channel), "/"):
        pass
    assert left == ["default_channel"]
    assert "a leave handler of BaseChannel failed" in caplog.text


# The gate


@pytest.mark.parametrize(
    "permission", [False, DenyAll, [AllowAny, DenyAll], lambda websocket: False, ~AllowAny, (False,)]
)
async def test_a_refused_client(permission: Any) -> None:
    """A refused client is accepted, told, and closed with 4503; nothing that it has sent is handled."""
    handled: list[Any] = []

    class Own(BaseChannel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            handled.append(message)

    async with connect(app_with(Own(permission_classes=permission)), "/") as client:
        assert client.accepted
        frames, code = await closed(client)
        assert frames == [
            {
                "type": "response",
                "status": "bad",
                "request_id": None,
                "data": None,
                "errors": "you do not have permission to do this",
            }
        ]
        assert code == 4503
    assert handled == []


@pytest.mark.parametrize(
    "permission", [None, True, AllowAny, [AllowAny, True], (AllowAny(),), AllowAny & AllowAny | DenyAll]
)
async def test_a_client_that_may_come_in(permission: Any) -> None:
    """None is no condition, and everything that says True lets in."""
    async with connect(app_with(BaseChannel(permission_classes=permission)), "/") as client:
        await client.send_text("x")
        assert await client.receive_json() == "x"


async def test_permissions_of_actions() -> None:
    """An action's permission is asked with its name, on top of the channel's; a refusal doesn't close."""
    asked: list[Any] = []

    def general(websocket: WebSocket, action: str | None) -> bool:
        asked.append(action)
        return True

    def original(websocket: WebSocket, action: str, permission: Any) -> bool:
        return permission is original

    channel = Echo(permission_classes=[general])

    @channel.action(permission=False)
    async def never() -> None: ...

    @channel.action(permission=[True, original])
    async def always() -> Any:
        return 1

    async with connect(app_with(channel), "/") as client:
        reply = await ask(client, "never", request_id=2)
        assert (reply["status"], reply["errors"]) == ("bad", "you do not have permission to do this")
        assert (await ask(client, "always"))["data"] == 1
        assert (await ask(client, "echo"))["status"] == "ok"
    assert asked == [None, "never", "always", "echo"]


async def test_origins() -> None:
    """A page of another origin is refused, and ALLOWED_ORIGINS says which are not foreign."""
    for allowed, code in ((None, 4503), (["https://a.example"], None)):
        async with connect(
            app_with(Echo(), allowed_origins=allowed), "/", headers={"Origin": "https://a.example"}
        ) as client:
            if code is None:
                assert (await ask(client, "echo"))["status"] == "ok"
            else:
                assert (await closed(client))[1] == code


async def test_throttles_of_connections() -> None:
    """New connections are throttled before they are in."""
    app = app_with(BaseChannel(throttle_classes=ConnectionRateThrottle("1/hour")))
    async with connect(app, "/"), connect(app, "/") as second:
        frames, code = await closed(second)
        assert code == 4029
        assert frames[0]["retry_after"] > 3000
        assert frames[0]["errors"].startswith("Too Many Requests. Retry after ")


async def test_throttles_count_every_frame() -> None:
    """A channel's throttle counts frames that can't be read, or ask for nothing that there is, each once."""
    async with connect(app_with(Echo(throttle_classes="4/hour")), "/") as client:
        for frame in ("{", '{"action": "nothing"}', '{"action": "echo", "request_id": {}}', '{"action": "echo"}'):
            await client.send_text(frame)
            assert "Too Many" not in str((await client.receive_json())["errors"])
        assert (await ask(client, "echo", request_id=5))["errors"].startswith("Too Many Requests.")


@pytest.mark.parametrize("calls_super", [False, True])
async def test_a_channels_own_receiver_is_throttled(calls_super: bool) -> None:
    """Frames of a channel with a receiver of its own are counted once, before it sees them."""
    seen: list[Any] = []

    class Own(Echo):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> Any:
            seen.append(message)
            if calls_super:
                return await super().receiver(websocket, channel, message)
            return await self.broadcast_to_personal(websocket, {"errors": None})

    async with connect(app_with(Own(throttle_classes="2/hour")), "/") as client:
        assert (await ask(client, "echo"))["errors"] is None
        assert (await ask(client, "echo"))["errors"] is None
        assert (await ask(client, "echo"))["errors"].startswith("Too Many")
    assert len(seen) == 2


async def test_too_many_violations() -> None:
    """A client that doesn't stop is closed with 4029."""
    async with connect(app_with(Echo(throttle_classes="1/hour"), max_violations=2), "/") as client:
        for _ in range(6):
            await client.send_json({"action": "echo"})
        frames, code = await closed(client)
        assert ([frame["status"] for frame in frames], code) == (["ok", "bad", "bad"], 4029)


async def test_limited_numbers_of_connections() -> None:
    """One connection too many is told so and closed with 4009; each channel counts for itself."""
    channel = BaseChannel(max_connection=2)
    app = FastAPI()
    add_channel(app)

    @app.websocket("/{name}")
    async def endpoint(websocket: WebSocket, name: str) -> None:
        await channel.connect(websocket, name)

    async with connect(app, "/a"), connect(app, "/a"), connect(app, "/b"), connect(app, "/a") as third:
        frames, code = await closed(third)
        assert code == 4009
        assert frames[0]["errors"].startswith("The current number of channel connections is greater")
    async with connect(app, "/a") as client:
        await client.send_text("x")
        assert await client.receive_json() == "x"


async def test_connections_that_come_together() -> None:
    """Of connections that come at one moment as many as the limit get in."""
    app = app_with(BaseChannel(max_connection=3))
    answered, stay = asyncio.Semaphore(0), asyncio.Event()

    async def come() -> int | None:
        async with connect(app, "/") as client:
            with suppress(ConnectionClosed):
                await client.send_text("x")
                await client.receive_json()
            answered.release()
            await stay.wait()
            return client.close_code

    async with connect(app, "/nowhere"):  # so that one lifespan is shared
        tasks = [asyncio.create_task(come()) for _ in range(10)]
        for _ in tasks:
            await answered.acquire()
        stay.set()
        codes = await asyncio.gather(*tasks)
    assert (codes.count(4009), codes.count(None)) == (7, 3)


async def test_connection_counts() -> None:
    """`get_connection_count` tells how many are on a channel."""

    class Counting(GroupChannel):
        @action()
        async def count(self, channel: str) -> int:
            return await self.get_connection_count(channel)

    app = app_with(Counting())
    async with connect(app, "/") as one:
        async with connect(app, "/"):
            assert (await ask(one, "count"))["data"] == 2
        assert (await ask(one, "count"))["data"] == 1
    assert (GroupChannel.max_connection, PersonChannel.max_connection) == (200, 2)


async def test_too_long_a_name() -> None:
    """A channel's name has to be one for a group."""
    app = FastAPI()
    add_channel(app)
    channel = BaseChannel()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await channel.connect(websocket, "x" * 201)

    async with connect(app, "/") as client:
        frames, code = await closed(client)
        assert (frames[0]["status"], code) == ("bad", 4500)


async def test_dependencies_of_the_route() -> None:
    """The route's own dependencies live as long as the connection."""
    channel, events = BaseChannel(), []
    app = FastAPI()
    add_channel(app)

    async def resource() -> AsyncIterator[str]:
        events.append("open")
        yield "r"
        events.append("close")

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, r: str = Depends(resource)) -> None:
        await channel.connect(websocket)
        events.append("route")

    async with connect(app, "/") as client:
        await client.send_text("x")
        await client.receive_json()
        assert events == ["open"]
    assert events == ["open", "route", "close"]


async def test_consumers_beside_channels() -> None:
    """Consumers and channels of one application reach each other over its layer."""
    channel = BaseChannel(channel="shared")
    app = app_with(channel)
    router = ConsumerRouter()

    @router.consumer("/consumer")
    class Beside(WebSocketConsumer):
        groups = ["shared"]

        async def receive(self, data: str) -> None:
            await self.group_send("shared", {"type": "websocket.send", "text": data})

    app.include_router(router)
    async with connect(app, "/") as one, connect(app, "/consumer") as other:
        await one.send_text("from a channel")
        assert await other.receive_text() == await one.receive_text() == '"from a channel"'
        await other.send_text("from a consumer")
        assert await one.receive_text() == await other.receive_text() == "from a consumer"


# Definitions


def test_definitions_that_can_not_be() -> None:
    """What contradicts itself, or can't be kept, is an error where it is written."""

    @asynccontextmanager
    async def lifespan(websocket: WebSocket, channel: str) -> AsyncIterator[None]:
        yield

    def generator(websocket: WebSocket, channel: str) -> Any:
        yield

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_history": 10}, "max_history is not supported"),
        ({"history_key": "k"}, "history_key is not supported"),
        ({"limiter_depends": []}, "limiter_depends is not supported"),
        ({"permission_classes": "x"}, "is a list of permissions|is no permission"),
        ({"throttle_classes": "lots"}, "a rate is written"),
        ({"throttle_classes": 7}, "is no throttle"),
        ({"lifespan": lifespan, "on_join": [print]}, "either a lifespan or on_join"),
        ({"lifespan": generator}, "decorate it with @asynccontextmanager"),
    ]
    for options, text in wrong:
        with pytest.raises(DefinitionError, match=text):
            BaseChannel(**options)
    with pytest.raises(DefinitionError, match='the events "join" and "leave"'):
        BaseChannel().on_event("start")(print)
    with pytest.raises(DefinitionError, match="which stands in place of its events"):
        BaseChannel(lifespan=lifespan).add_event_handler("join", print)

    class WithHistory(BaseChannel):
        max_history = 5

    with pytest.raises(DefinitionError, match="max_history"):
        WithHistory()


def test_actions_that_can_not_be() -> None:
    """An action that can't be called, is there twice, or asks for what there isn't, is an error at once."""
    channel = Echo()
    with pytest.raises(DefinitionError, match="has an action 'echo' already"):
        channel.action("echo")(lambda data: None)
    with pytest.raises(DefinitionError, match="takes websocket, channel and data, not room"):

        @channel.action()
        async def say(room: str) -> None: ...

    with pytest.raises(DefinitionError, match="detached"):
        channel.action(detached=True)
    with pytest.raises(DefinitionError, match="dependencies"):
        action(dependencies=[])  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="is no permission"):
        action(permission=7)
    with pytest.raises(TypeError, match="response_model"):
        action(response_model=int)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="are both the action"):

        class Twice(Channel):  # pyright: ignore[reportUnusedClass]
            @action("a")
            async def one(self) -> None: ...

            @action("a")
            async def two(self) -> None: ...

    with pytest.raises(DefinitionError, match="has a limiter and is no action"):

        class Limited(Channel):  # pyright: ignore[reportUnusedClass]
            @limiter(seconds=1)
            async def one(self) -> None: ...


# Of the failures of the original package, one test each (18 to 23)


async def test_global_permissions_and_throttles_have_effect() -> None:
    """18: PERMISSION_CLASSES and THROTTLE_CLASSES hold for channels that were made before the application."""
    channel = Echo()
    asked: list[Any] = []

    class Asked(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            asked.append(action)
            return True

    async with connect(app_with(channel, permission_classes=Asked, throttle_classes="1/hour"), "/") as client:
        assert (await ask(client, "echo"))["status"] == "ok"
        assert (await ask(client, "echo"))["status"] == "bad"
    assert asked == [None, "echo"]
    async with connect(app_with(channel, permission_classes=[False]), "/") as client:
        assert (await closed(client))[1] == 4503
    async with connect(app_with(Echo(permission_classes=True), permission_classes=[False]), "/") as client:
        assert (await ask(client, "echo"))["status"] == "ok"


async def test_permissions_mean_what_they_say(caplog: pytest.LogCaptureFixture) -> None:
    """19: `A & B` works, None doesn't let in, `can_connect` is called, and `permission=True` lets in."""

    class Nothing(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return None  # type: ignore[return-value]

    class Late(AllowAny):
        async def can_connect(self, websocket: WebSocket) -> bool:
            return "let" in websocket.query_params

    channel = Channel(permission_classes=[Late & AllowAny])

    @channel.action(permission=Nothing)
    async def nothing() -> None: ...

    @channel.action(permission=True)
    async def true() -> int:
        return 1

    @channel.action(permission=AllowAny & ~DenyAll)
    async def both() -> int:
        return 2

    app = app_with(channel)
    async with connect(app, "/") as client:
        assert (await closed(client))[1] == 4503
    async with connect(app, "/?let") as client:
        assert (await ask(client, "nothing"))["status"] == "bad"
        assert (await ask(client, "true"))["data"] == 1
        assert (await ask(client, "both"))["data"] == 2


async def test_actions_are_inherited_and_not_shared() -> None:
    """20: actions are inherited, and overridden; two objects have a table each; ids may be text; replies are sent."""

    class More(Echo):
        @action("more")
        async def another(self) -> str:
            return "more"

    class Most(More):
        async def another(self) -> str:
            return "most"

    one, two = Channel(), Channel()

    @one.action()
    async def only() -> int:
        return 1

    assert (More().actions, one.actions, two.actions) == (["echo", "more"], ["only"], [])
    async with connect(app_with(Most(), one), "/") as client:
        assert (await ask(client, "more", request_id="x"))["data"] == "most"
        assert (await ask(client, "echo", request_id=1.5))["request_id"] == 1.5


@pytest.mark.parametrize("is_above", [True, False])
async def test_limits_of_one_second_trigger(is_above: bool) -> None:
    """21: limits of a second hold, above or below `@action`; without `limiter_url` the connection lives on."""
    channel = Echo()

    async def say() -> int:
        return 1

    if is_above:
        limiter(times=1, seconds=1)(channel.action()(say))
    else:
        channel.action()(limiter(times=1, seconds=1)(say))
    async with connect(app_with(channel), "/") as client:
        assert (await ask(client, "say"))["data"] == 1
        reply = await ask(client, "say", request_id=8)
        assert (reply["errors"], reply["request_id"]) == ("Too Many Requests. Retry after 1 seconds.", 8)
        assert 0 < reply["retry_after"] <= 1
        assert (await ask(client, "echo"))["status"] == "ok"


async def test_stacked_limits_all_hold() -> None:
    """21: of stacked limits each holds, and those of an action are not those of another, or of another channel."""

    class Limited(Channel):
        @limiter(times=2, hours=1)
        @action()
        @limiter(times=1000, seconds=1)
        async def outer(self) -> int:
            return 1

        @limiter(times=1000, seconds=1)
        @action()
        @limiter(times=2, hours=1)
        async def inner(self) -> int:
            return 2

    class Inherited(Limited):
        async def outer(self) -> int:
            return 3

    app = app_with(Limited(), Limited(channel="second"), Inherited(channel="third"))
    for path in ("/0", "/1", "/2"):
        async with connect(app, path) as client:
            for name in ("outer", "inner"):
                replies = [await ask(client, name) for _ in range(3)]
                assert [reply["status"] for reply in replies] == ["ok", "ok", "bad"]
                assert replies[-1]["retry_after"] > 1000


async def test_callbacks_and_identifiers_of_limits() -> None:
    """A limit's identifier says whom to count, and its callback what to tell; the application's are the defaults."""
    calls: list[Any] = []
    channel = Channel()

    async def identify(websocket: WebSocket) -> str:
        return websocket.query_params["who"]

    async def tell(websocket: WebSocket, pexpire: int) -> None:
        calls.append(pexpire)
        raise WebSocketException(4100, error_msg="slowly")

    @limiter(times=1, hours=1)
    @channel.action()
    async def say() -> int:
        return 1

    app = app_with(channel, identifier=identify, ws_callback=tell)
    for who in ("a", "b"):
        async with connect(app, f"/?who={who}") as client:
            assert (await ask(client, "say"))["data"] == 1
    async with connect(app, "/?who=a") as client:
        assert (await ask(client, "say"))["errors"] == "slowly"
        assert (await closed(client))[1] == 4100
    assert len(calls) == 1
    assert 3_500_000 < calls[0] <= 3_600_000


@pytest.mark.parametrize("arguments", [{"times": 0, "seconds": 1}, {"times": 1}, {"times": 1, "seconds": -1}])
def test_limits_that_can_not_be(arguments: Any) -> None:
    """A limit of nothing, or for no time, is an error."""
    with pytest.raises(DefinitionError, match="lets through at least one"):
        limiter(**arguments)


class ByToken(TokenAuthentication):
    """Knows one token."""

    async def user_of(self, token: str, websocket: WebSocket) -> Any:
        if token != "secret":
            raise AuthenticationFailed("wrong token")
        return User("ann"), None


async def test_keys_of_tokens_are_read() -> None:
    """22: `query_token_key` and `cookie_token_key` say where a token is; a wrong one is refused with 4501."""
    channel = Echo(permission_classes=IsAuthenticated)
    options: dict[str, Any] = {"query_token_key": "q", "cookie_token_key": "c", "authentication_classes": [ByToken]}
    app = app_with(channel, **options)
    for path, headers in (("/?q=secret", {}), ("/", {"Cookie": "c=secret"})):
        async with connect(app, path, headers=headers) as client:
            assert (await ask(client, "echo"))["status"] == "ok"
    for path in ("/", "/?q=wrong", "/?token=secret"):
        async with connect(app, path) as client:
            frames, code = await closed(client)
            assert (frames[0]["status"], code) == ("bad", 4501)


async def test_a_user_is_disconnected_from_a_channel() -> None:
    """A channel's user can be disconnected from anywhere, as a consumer's can."""
    channel = BaseChannel()
    left = asyncio.Event()

    @channel.on_event("leave")
    async def leave(websocket: WebSocket, name: str) -> None:
        left.set()

    app = app_with(channel, query_token_key="q", authentication_classes=[ByToken])
    async with connect(app, "/?q=secret") as client:
        await client.send_text("x")
        assert await client.receive_json() == "x"
        await app.state.channels.layer().disconnect_user("ann", code=4503)
        assert await closed(client) == ([], 4503)
        await asyncio.wait_for(left.wait(), 5)


async def test_two_applications_are_independent() -> None:
    """23: one channel object in two applications of one process is under the rules, and on the layer, of each."""
    channel = Echo()
    open_app, closed_app = app_with(channel), app_with(channel, permission_classes=[False])
    third = app_with(channel)
    async with connect(open_app, "/") as one, connect(closed_app, "/") as two, connect(third, "/") as three:
        assert (await closed(two))[1] == 4503
        await post_to(open_app, channel)
        assert await one.receive_json() == "here"
        assert (await ask(three, "echo"))["status"] == "ok"


async def post_to(app: FastAPI, channel: BaseChannel) -> None:
    """Broadcast from a view of one application."""

    @app.post("/here")
    async def here() -> None:
        await channel.broadcast_to_channel("default_channel", "here")

    assert await post(app, "/here") == 200


class OnlyTheHandshake(DenyAll):
    async def can_connect(self, websocket: WebSocket) -> bool:
        return True


async def test_a_receiver_that_calls_other_actions_than_the_frame_says() -> None:
    """However many actions a receiver calls for a frame, and whichever, each passes its own permission and limit."""
    called: list[str] = []

    class Batch(Channel):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            for item in (await self.decode(message))["batch"]:
                with suppress(WebSocketException):
                    await self.handle_action(websocket, channel, item, None, {})
            await self.broadcast_to_personal(websocket, "done")

        @action("wipe", permission=False)
        async def wipe(self) -> None:
            called.append("wipe")

        @limiter(times=1, hours=1)
        @action("once")
        async def once(self) -> None:
            called.append("once")

    class Alias(Batch):
        async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> None:
            await Channel.receiver(self, websocket, channel, message.replace("remove", "wipe"))

    async with connect(app_with(Batch()), "/") as client:
        await client.send_json({"batch": ["wipe", "once", "wipe", "once", "once"]})
        assert await client.receive_json() == "done"
        assert called == ["once"]
    async with connect(app_with(Alias()), "/") as client:
        assert (await ask(client, "remove"))["status"] == "bad"
    assert called == ["once"]


async def test_whatever_handles_frames_is_asked_for_first() -> None:
    """A frame is let through before code of the user's sees it, in whichever way that has been put in place."""
    seen: list[Any] = []

    class Own(Channel):
        async def handle_action(
            self, websocket: WebSocket, channel: str, action: Any, request_id: Any, data: dict[str, Any]
        ) -> None:
            seen.append(action)

    async def receiver(*args: Any) -> None:
        seen.append(args)

    replaced = Channel()
    replaced.receiver = receiver  # type: ignore[method-assign, assignment]
    for channel in (Own(), replaced):
        async with connect(app_with(channel, permission_classes=[OnlyTheHandshake]), "/") as client:
            for _ in range(3):
                assert (await ask(client, "x"))["status"] == "bad"
        assert seen == []


def test_no_permission_in_a_list() -> None:
    """None in a list of permissions is an error, and not the absence of one."""
    for make in (lambda: Channel(permission_classes=[None]), lambda: action("x", permission=[None])(print)):
        with pytest.raises(DefinitionError):
            make()


async def test_nobody_joins_who_was_disconnected_at_the_gate() -> None:
    """Join and leave handlers hear nothing of a client that is gone before it is in."""
    heard: list[str] = []
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Tokens(TokenAuthentication):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any]:
            return User(token), None

    class Slow(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            asked.set()
            await go_on.wait()
            return True

    channel = BaseChannel(permission_classes=[Slow])
    channel.on_event("join")(lambda websocket, name: heard.append("join"))
    channel.on_event("leave")(lambda websocket, name: heard.append("leave"))
    app = app_with(channel, authentication_classes=[Tokens], query_token_key="token")

    async def come() -> int | None:
        async with connect(app, "/?token=tom") as client:
            return (await client.closed())[0] if client.accepted else 403

    async with connect(app_with(BaseChannel(), app=FastAPI()), "/"), asyncio.TaskGroup() as tasks:
        coming = tasks.create_task(come())
        await asked.wait()
        await app.state.channels.layer().disconnect_user("tom")
        go_on.set()
        assert await coming in (403, 4503)
    assert heard == []


async def test_limits_of_two_classes_on_one_channel() -> None:
    """Actions of one name, of two classes on a channel of one name, are limited each by its own."""

    class One(Channel):
        @limiter(times=1, hours=1)
        @action("say")
        async def say(self) -> str:
            return "one"

    class Other(Channel):
        @limiter(times=2, hours=1)
        @action("say")
        async def say(self) -> str:
            return "other"

    app = app_with(One(), Other())
    async with connect(app, "/0") as one, connect(app, "/1") as other:
        statuses = [(await ask(client, "say"))["status"] for client in (one, one, other, other, other)]
    assert statuses == ["ok", "bad", "ok", "ok", "bad"]


async def test_a_client_that_hangs_up_before_it_is_refused() -> None:
    """Nothing waits for a client that is gone, on a server that raises for what is sent to it."""
    app = app_with(BaseChannel(permission_classes=False))
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            return {"type": "websocket.connect"}
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] != "websocket.accept":
            raise OSError("gone")

    scope = {"type": "websocket", "path": "/", "raw_path": b"/", "query_string": b"", "headers": [], "subprotocols": []}
    await asyncio.wait_for(app(scope, receive, send), 5)
    assert sent[0] == "websocket.accept"
