"""`BaseChannel` and `Channel`: the classes of the original package, on the core that consumers have.

```python
app = FastAPI()
add_channel(app, url="memory://")
chat = Channel()


@chat.action("say")
async def say(websocket: WebSocket, channel: str, data: dict[str, Any]) -> None:
    await chat.broadcast_to_channel(channel, data)


@app.websocket("/chat")
async def chat_endpoint(websocket: WebSocket) -> None:
    await chat.connect(websocket, "lobby")
```

A connection is a session of a private consumer class, one for each channel object. A channel's name is the name of a
group of the default layer, so consumers and views reach its members with `group_send`.

Spec:
    decisions.md, 8, 29 and 30.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, ClassVar, TypeVar, overload

import anyio
from pydantic_core import from_json
from starlette.websockets import WebSocket, WebSocketState
from typing_extensions import override

from fastapi_channels import _fastapi
from fastapi_channels._tasks import call
from fastapi_channels.answers import Answer, answer_to, ask_application
from fastapi_channels.application import CHANNEL_KEY, Channels, get_channel_layer
from fastapi_channels.connection import State
from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.consumers.endpoint import Sessions
from fastapi_channels.consumers.session import Session
from fastapi_channels.decorators import ChannelAction, actions_of, channel_action, granted, mark_of
from fastapi_channels.decorators import action as mark_action
from fastapi_channels.exceptions import (
    ActionIsDeprecated,
    ActionNotExist,
    ConsumerError,
    DefinitionError,
    ParseError,
    PermissionDenied,
    RateLimitExceeded,
    Throttled,
    TooManyConnections,
    WebSocketException,
    WebSocketExceptionHandler,
)
from fastapi_channels.gate import Gate, Rules
from fastapi_channels.layers import Envelope
from fastapi_channels.layers.envelope import SEND, checked_close_code, encode

__all__ = ["BaseChannel", "Channel"]

logger = logging.getLogger("fastapi_channels")

Function = TypeVar("Function", bound=Callable[..., Any])

#: A context manager around each connection, made with the WebSocket and the channel's name.
Lifespan = Callable[[WebSocket, str], AbstractAsyncContextManager[Any]]

#: Where the scope of a connection has the consumer that serves it.
CONSUMER_KEY = "fastapi_channels.consumer"

TOO_MANY = "The current number of channel connections is greater than the maximum number of connections"

# What the original package stores and never reads; here it waits for history.
_NOT_YET = ("history_key", "max_history", "limiter_depends", "timedelta")


class BaseChannel:
    """A channel: what one client sends to it, all who are on it get, in JSON.

    Its attributes are set on a class or given to the constructor; None leaves them to the class, and there to the
    application's settings.

    Args:
        channel: The name of the channel that `connect` joins if it is given none.
        max_connection: How many connections a channel may have, over all processes.
        permission_classes: Who may connect, and send frames: a permission or several, callables, booleans.
        throttle_classes: How often frames may be sent: a throttle or several, limiters of fastapi-limiter, rates.
        on_join: Called with the WebSocket and the channel's name before the connection joins.
        on_leave: Called likewise when it has left.
        lifespan: A context manager around that in their place, made with the same.
        history_key: Not supported: anything but None is an error.
        max_history: Not supported.
        limiter_depends: Not supported.

    Raises:
        DefinitionError: Something of it is wrong, or not supported.
    """

    channel: str = "default_channel"
    max_connection: int | None = None
    permission_classes: Any = None
    throttle_classes: Any = None
    on_join: Sequence[Callable[..., Any]] | None = None
    on_leave: Sequence[Callable[..., Any]] | None = None
    lifespan: Callable[..., Any] | None = None
    history_key: str | None = None
    max_history: int | None = None
    limiter_depends: Any = None
    timedelta: int | None = None

    def __init__(
        self,
        *,
        channel: str | None = None,
        max_connection: int | None = None,
        history_key: str | None = None,
        max_history: int | None = None,
        limiter_depends: Any = None,
        permission_classes: Any = None,
        throttle_classes: Any = None,
        on_join: Sequence[Callable[..., Any]] | None = None,
        on_leave: Sequence[Callable[..., Any]] | None = None,
        lifespan: Callable[..., Any] | None = None,
    ) -> None:
        given = {
            "channel": channel,
            "max_connection": max_connection,
            "history_key": history_key,
            "max_history": max_history,
            "limiter_depends": limiter_depends,
            "permission_classes": permission_classes,
            "throttle_classes": throttle_classes,
            "on_join": on_join,
            "on_leave": on_leave,
            "lifespan": lifespan,
        }
        vars(self).update({name: value for name, value in given.items() if value is not None})
        for name in _NOT_YET:
            if getattr(self, name) is not None:
                raise DefinitionError(f"{type(self).__name__}: {name} is not supported by this version")
        self._on_join = list(self.on_join or ())
        self._on_leave = list(self.on_leave or ())
        if self.lifespan is not None and (self._on_join or self._on_leave):
            raise DefinitionError(f"{type(self).__name__} has either a lifespan or on_join and on_leave, not both")
        self._lifespan = self._default_lifespan if self.lifespan is None else _context_manager(self.lifespan)
        self._sessions: Sessions | None = None
        #: Stands for this object where throttles are counted, under the same name in every process.
        self._owner = type(f"{type(self).__qualname__}({self.channel!r})", (), {"__module__": type(self).__module__})
        self._actions = self._marked_actions()
        Gate.check(self._rules(), self._action_rules())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.channel!r}>"

    # What the consumers of this channel are

    def _rules(self) -> Rules:
        """What it says of its gate."""
        throttles = self.throttle_classes
        if throttles is not None and not isinstance(throttles, list | tuple):
            throttles = [throttles]
        return Rules(self._owner, permission_classes=granted(self.permission_classes), throttle_classes=throttles)

    def _marked_actions(self) -> dict[str, ChannelAction]:
        """The actions that its class has marked, by name."""
        return {}

    def _action_rules(self) -> Mapping[str, Rules]:
        """What its actions add to that, by name."""
        return {
            name: Rules(self._owner, permission_classes=action.permissions, throttle_classes=action.limits, action=name)
            for name, action in self._actions.items()
        }

    @property
    def sessions(self) -> Sessions:
        """What opens its sessions, of a consumer class that is this object's own."""
        if self._sessions is None:
            namespace = {"owner": self, "__module__": __name__, "__qualname__": type(self).__qualname__}
            self._sessions = Sessions(type(type(self).__name__, (ChannelConsumer,), namespace))
        return self._sessions

    # A connection

    async def connect(self, websocket: WebSocket, channel: str | None = None) -> None:
        """Serve a connection, from the answer to its handshake to its end; to be awaited in a WebSocket route.

        It passes the origin, the throttles and the permissions; a client that doesn't is accepted, told so, and closed,
        and no frame of it is handled. Frames are handled one at a time, in order.

        Args:
            websocket: The connection, not accepted yet.
            channel: The name of the channel that it joins.

        Raises:
            RuntimeError: The connection has been accepted already.
            SettingsError: The settings lack what the channel needs.
        """
        if websocket.application_state is not WebSocketState.CONNECTING:
            raise RuntimeError(f"{type(self).__name__}.connect() accepts the connection; don't do so before")
        name = websocket.scope[CHANNEL_KEY] = self.channel if channel is None else channel
        session = await self.sessions.begin(websocket)
        websocket.scope[CONSUMER_KEY] = session.consumer
        with session.channels.in_force():
            try:
                if await self._has_let_in(session, name):
                    with session.channels.counted(name):
                        await self._serve(session, name)
            finally:
                await session.leave(None, None, None)

    async def _has_let_in(self, session: Session, name: str) -> bool:
        """Let a client in, or tell it why not."""
        consumer = consumer_of(session.websocket)
        try:
            await session.admit()
            await self._occupy(session, name)
            await consumer.take_seat(name)
        except Exception as error:
            await consumer.open()
            await consumer.fail(error)
            return False
        await consumer.open()
        return session.connection.state is State.OPEN  # it may have been disconnected while it stood at the gate

    async def _occupy(self, session: Session, name: str) -> None:
        """Take one of the channel's places, if there are only so many."""
        limit = self.max_connection or 0
        if limit > 0:
            try:
                await session.occupy(place_of(name), limit)
            except TooManyConnections:
                raise TooManyConnections(TOO_MANY) from None

    async def _serve(self, session: Session, name: str) -> None:
        connection = session.connection
        async with AsyncExitStack() as stack:
            joining = stack.enter_async_context(self._lifespan(session.websocket, name))
            try:
                await connection.run(joining, session.take)
            except Exception as error:
                await consumer_of(session.websocket).fail(error)
            if connection.state is State.OPEN:
                await session.serve({})

    async def disconnect(self, websocket: WebSocket) -> None:
        """Close a connection."""
        await consumer_of(websocket).close()

    async def close(self, websocket: WebSocket) -> None:
        """Close a connection."""
        await consumer_of(websocket).close()

    async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> Any:
        """Called with each frame; override it. By default everybody on the channel gets it.

        Args:
            websocket: The connection.
            channel: The channel's name.
            message: The text of the frame.
        """
        await self.broadcast_to_channel(channel, message)

    # The way out

    async def broadcast_to_channel(self, channel: str, message: Any) -> None:
        """Send to everybody on a channel, in every process.

        Args:
            channel: The channel's name.
            message: What `encode` makes a frame of.

        Raises:
            InvalidGroupName: It is no name for a group.
            LayerUnavailable: The layer's broker is away.
        """
        await get_channel_layer().group_send(channel, {"type": SEND, "text": await _awaited(self.encode(message))})

    async def broadcast_to_personal(self, websocket: WebSocket, message: Any) -> bool:
        """Send to one connection of a channel.

        Args:
            websocket: The connection.
            message: What `encode` makes a frame of.

        Returns:
            False if the connection is gone.
        """
        return await consumer_of(websocket).send(await _awaited(self.encode(message)))

    @staticmethod
    async def send_error(error_msg: Any, close: bool = False) -> None:  # noqa: FBT001, FBT002
        """Raise an error that the client of the frame at hand is told.

        Args:
            error_msg: The `errors` of the error frame.
            close: Whether the connection is closed then.

        Raises:
            WebSocketException: Always.
        """
        raise WebSocketException(error_msg=error_msg, close=close)

    @staticmethod
    async def encode_json(data: Any) -> str:
        """The JSON of what is sent; pydantic models, dates and the like too."""
        return encode(data).decode()

    @staticmethod
    async def decode_json(message: str) -> Any:
        """What the JSON of a frame says."""
        return from_json(message, allow_inf_nan=False)

    async def encode(self, data: Any) -> str:
        """Make a frame; override it for another form than JSON."""
        text: str = await _awaited(self.encode_json(data))
        return text

    async def decode(self, message: Any) -> Any:
        """Read a frame, of which actions get the result as `data`."""
        return await _awaited(self.decode_json(message))

    # Who is there

    async def get_connection_count(self, channel: str) -> int:
        """How many connections a channel has: with a `max_connection` in all processes that share a Redis, else here.

        Raises:
            LayerUnavailable: That Redis is away.
        """
        channels = Channels.current()
        if (self.max_connection or 0) > 0:
            return await channels.leases.count(place_of(channel))
        return channels.present[channel]

    # Events

    def on_event(self, event_type: str) -> Callable[[Function], Function]:
        """Call a function when a connection joins or leaves a channel.

        It is called with the WebSocket and the channel's name. For "join" the client is there, and what the channel
        says waits until it has joined; what is raised closes the connection. For "leave", which comes to all that have
        joined, it is gone.

        Args:
            event_type: "join" or "leave".
        """

        def decorator(function: Function) -> Function:
            self.add_event_handler(event_type, function)
            return function

        return decorator

    def add_event_handler(self, event_type: str, func: Callable[..., Any]) -> None:
        """As `on_event` does.

        Raises:
            DefinitionError: There is no such event, or a lifespan.
        """
        handlers = {"join": self._on_join, "leave": self._on_leave}.get(event_type)
        if handlers is None:
            raise DefinitionError(f'a channel has the events "join" and "leave", not {event_type!r}')
        if self.lifespan is not None:
            raise DefinitionError(f"{type(self).__name__} has a lifespan, which stands in place of its events")
        handlers.append(func)

    @asynccontextmanager
    async def _default_lifespan(self, websocket: WebSocket, channel: str) -> AsyncIterator[None]:
        for handler in self._on_join:
            await call(handler, websocket, channel)
        try:
            yield
        finally:
            timeout = consumer_of(websocket)._session.channels.settings.drain_timeout
            with anyio.move_on_after(timeout, shield=True):
                for handler in self._on_leave:
                    try:
                        await call(handler, websocket, channel)
                    except Exception:
                        logger.exception("a leave handler of %s failed", type(self).__qualname__)


class Channel(BaseChannel):
    """A channel whose frames are `{"action": "...", "request_id": ..., ...}`, and that does what they ask for.

    Actions are methods marked with `decorators.action`, or functions marked with the object's own `action`. They are
    called with `websocket`, `channel` and `data`, the whole object; what they return is the `data` of the reply.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        list(actions_of(cls))  # what is wrong with them is wrong now

    @override
    def _marked_actions(self) -> dict[str, ChannelAction]:
        return {
            name: channel_action(name, getattr(self, attribute), definitions, what)
            for name, attribute, definitions, what in actions_of(type(self))
        }

    @property
    def actions(self) -> list[str]:
        """The names of its actions."""
        return list(self._actions)

    @overload
    def action(self, name: Function) -> Function: ...
    @overload
    def action(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]: ...
    def action(self, name: Any = None, **options: Any) -> Any:
        """Mark a function as an action of this channel; see `decorators.action`, whose arguments it takes.

        Raises:
            DefinitionError: The channel has an action of that name.
        """
        if callable(name):
            return self.action()(name)
        put_mark = mark_action(name, **options)

        def decorator(function: Function) -> Function:
            what = mark_of(put_mark(function))
            called = name or function.__name__
            if called in self._actions:
                raise DefinitionError(f"{type(self).__name__} has an action {called!r} already")
            self._actions[called] = channel_action(called, function, (function,), what)
            self._sessions = None
            return function

        return decorator

    @override
    async def receiver(self, websocket: WebSocket, channel: str, message: Any) -> Any:
        data = await self.decoded(message)
        request_id = data.get("request_id")
        return await self.handle_action(websocket, channel, data.get("action"), request_id, data)

    async def decoded(self, message: Any) -> dict[str, Any]:
        """Read a frame.

        Raises:
            ParseError: It is no JSON object, or whatever `decode` reads.
        """
        try:
            data = await _awaited(self.decode(message))
        except ValueError as error:
            raise ParseError(close=False) from error
        if not isinstance(data, dict):
            raise ParseError(close=False)
        return data

    async def handle_action(
        self, websocket: WebSocket, channel: str, action: Any, request_id: Any, data: dict[str, Any]
    ) -> Any:
        """Let a frame through the throttles and permissions of its action, call that, and send the reply.

        Args:
            websocket: The connection.
            channel: The channel's name.
            action: The action's name.
            request_id: What the client calls the frame; a string or a number.
            data: The whole frame.
        """
        consumer = consumer_of(websocket)
        if isinstance(request_id, bool) or not isinstance(request_id, str | int | float | None):
            await consumer.pass_frame(None)
            raise ParseError(close=False)
        consumer.request_id, consumer.action = request_id, action if isinstance(action, str) else None
        known = self._actions.get(action) if isinstance(action, str) else None
        await consumer.pass_action(None if known is None else known.name)
        if known is None:
            raise ActionNotExist(close=False)
        if known.mark.deprecated:
            raise ActionIsDeprecated(error_msg=f"The action '{known.name}' is deprecated.", close=False)
        result = await known(websocket=websocket, channel=channel, data=data)
        if result is not None:
            reply = {"type": "response", "action": known.name, "request_id": request_id, "status": "ok"}
            await self.broadcast_to_personal(websocket, {**reply, "data": result, "errors": None})


class ChannelConsumer(WebSocketConsumer):
    """Serves one connection of a channel, whose object is its class's `owner`; not for applications."""

    reject_mode = "close"
    owner: ClassVar[BaseChannel]

    #: Of the frame at hand.
    request_id: Any = None
    action: str | None = None
    #: For which action, None for none, it was let through the gate before the receiver saw it; gone once that is used.
    _passed: Sequence[str | None] = ()
    #: Whether the gate was asked about it.
    _was_asked: bool = False
    _held: list[Envelope]

    @classmethod
    @override
    def _rules(cls) -> Rules:
        owner = cls.__dict__.get("owner")
        return super()._rules() if owner is None else owner._rules()

    @classmethod
    @override
    def _action_rules(cls) -> Mapping[str, Rules]:
        return cls.owner._action_rules()

    async def take_seat(self, channel: str) -> None:
        """Join the channel before the handshake is answered, so that a client that is connected misses nothing.

        What is said there is kept until the client has joined in the eyes of the application, which may still say no.
        """
        self._held = []
        session = self._session
        session.connection.taker = self._hold
        await session.layer.group_add(channel, session._name())

    def _hold(self, envelope: Envelope) -> bool:
        if len(self._held) >= self.layer.capacity:
            return False
        self._held.append(envelope)
        return True

    @override
    async def connect(self) -> None:
        held, self._held = self._held, []
        for envelope in held:  # nothing else has been delivered yet: there was no wait since `serve` was called
            self._session.deliver(envelope)

    async def open(self) -> None:
        """Accept the handshake; all that anybody does with the WebSocket goes through this connection from then on."""
        if self._connection.state is State.CONNECTING:
            await self._session.accept()
        _fastapi.redirect(self.websocket, self._receive_none, self._send_through)

    async def _receive_none(self) -> Any:
        raise RuntimeError("the channel reads this connection: override its receiver, or mark actions")

    async def _send_through(self, event: Any) -> None:
        match event:
            case {"type": "websocket.send"}:
                await self.send(event.get("text"), event.get("bytes"))
            case {"type": "websocket.close"}:
                await self.close(event.get("code", 1000), event.get("reason") or "")
            case _:
                raise RuntimeError(f"{event['type']!r} is no event for a connection that is open")

    # Frames

    @override
    def _handle_frame(self, parsed: Any) -> Awaitable[Any]:
        return self._serve_frame(parsed)

    async def _serve_frame(self, frame: str | bytes) -> None:
        owner = self.owner
        self.request_id, self.action, self._passed, self._was_asked = None, None, (), False
        try:
            if isinstance(frame, bytes):
                raise ParseError(close=False)
            if not all(_is_stock(owner, name) for name in ("receiver", "handle_action")):
                # Code of the user's sees the frame, before any action of it is called.
                action = await self._action_in(frame)
                await self.pass_frame(action)
                self._passed = (action,)
            await call(owner.receiver, self.websocket, self.scope[CHANNEL_KEY], frame)
        except _ClosedMeanwhile:
            pass
        except Exception as error:
            await self._answer_frame(error)

    async def _answer_frame(self, error: Exception) -> None:
        try:
            if isinstance(error, ParseError) and not self._was_asked:
                await self.pass_frame(None)  # frames that can't be read count too
        except Exception as refusal:
            error = refusal
        await self.answer(error)

    async def _action_in(self, frame: str) -> str | None:
        """The action of a channel that a frame asks for, which a receiver of the user's is to read."""
        if not isinstance(self.owner, Channel):
            return None
        with suppress(Exception):
            action = (await self.owner.decoded(frame)).get("action")
            if isinstance(action, str) and action in self.owner.actions:
                return action
        return None

    async def pass_action(self, action: str | None) -> None:
        """Let an action that the frame at hand asks for through the gate, unless the frame has passed for that one.

        A receiver of the user's may call several for one frame, or another than the frame says.
        """
        if action in self._passed:
            self._passed = ()
        else:
            await self.pass_frame(action)

    async def pass_frame(self, action: str | None) -> None:
        """Let the frame at hand through the gate.

        Args:
            action: The action of the channel that it asks for; None if it asks for none.

        Raises:
            WebSocketException: It is refused.
        """
        if not self._session.gate.asks_of_frames:
            return
        self._was_asked = True
        try:
            await self._session.gate.pass_frame(self.websocket, action)
        except ConsumerError as error:
            if isinstance(error, Throttled):
                self._session._note_violation()
            raise in_words(error, close=False) from error
        if self._connection.closed_here:
            raise _ClosedMeanwhile

    # Errors

    @override
    async def _send_error(self, errors: Mapping[str, Any], action: str | None, request_id: Any) -> None:
        # Of a frame that was refused before it was looked at.
        retry_after = errors.get("retry_after")
        said = WebSocketException(error_msg=errors["detail"], request_id=request_id)
        await self._reply((said if retry_after is None else too_many_requests(retry_after)).frame)

    async def fail(self, error: Exception) -> None:
        """Tell the client of an error, and close the connection."""
        await self.answer(error, closes=True)

    async def answer(self, error: Exception, *, closes: bool = False) -> None:
        """Tell the client of an error, as the application's handler for it does.

        Args:
            error: The error.
            closes: Whether the connection is closed then, whatever the error says.
        """
        said = copy.copy(await self._in_words(error))
        said.close = said.close or closes
        said.kwargs = dict(said.kwargs)
        try:
            checked_close_code(said.code)
        except ValueError as wrong:
            logger.error("%s raised %r: %s", type(self.owner).__qualname__, error, wrong)
            said.code = 1011
        if said.request_id is None:
            said.request_id = self.request_id
        if self.action is not None:
            said.kwargs.setdefault("action", self.action)
        handler = self._handler_for(said)
        try:
            if handler is not None:
                await call(handler, self.websocket, said)
        except Exception as failure:
            logger.exception("a client of %s could not be told of an error", type(self.owner).__qualname__)
            await self._send_error({"detail": answer_to(failure).detail}, self.action, said.request_id)
        if said.close or handler is None:
            await self.close(said.code, said.reason)

    async def _in_words(self, error: Exception) -> WebSocketException:
        if isinstance(error, WebSocketException):
            return error
        if isinstance(error, ConsumerError):
            return in_words(error)
        answer = await ask_application(self.websocket, error)
        if not answer.is_expected and answer.response is None:
            logger.error("%s failed", type(self.owner).__qualname__, exc_info=error)
        return _of_answer(answer)

    def _handler_for(self, error: WebSocketException) -> Callable[..., Any] | None:
        """Who tells the client; nobody if `add_channel(add_exception_handlers=False)` leaves that to the application.

        Then the connection is closed with what the error says, as Starlette does on any WebSocket route.
        """
        app = self.scope.get("app")
        own = _fastapi.exception_handler(app, error)
        has_channels = hasattr(getattr(app, "state", None), "channels")
        is_left = has_channels and WebSocketException not in getattr(app, "exception_handlers", {})
        return own or (None if is_left else WebSocketExceptionHandler)


class _ClosedMeanwhile(Exception):
    """The connection was closed while the gate was asked: its frame is not handled."""


def _is_stock(owner: BaseChannel, name: str) -> bool:
    """Whether a method is `Channel`'s own, which ask the gate themselves."""
    return getattr(getattr(owner, name, None), "__func__", None) is getattr(Channel, name)


def in_words(error: ConsumerError, *, close: bool | None = None) -> WebSocketException:
    """An error in the words of the original package.

    Args:
        error: The error.
        close: Whether the connection is to be closed for it; by default what it says, as the original's
            `PermissionDenied(close=False)` does, and that one closes if it says nothing.
    """
    said = _of_answer(answer_to(error))
    match error:
        case Throttled():
            said = too_many_requests(error.retry_after)
        case PermissionDenied():
            # Its other arguments are the original's, if it was made as that.
            known = inspect.signature(WebSocketException).parameters.keys()
            given = {name: value for name, value in error.extra.items() if name in known}
            code = error.code if isinstance(error.code, int) else said.code
            said = PermissionRefused(code, **{"reason": error.detail or "Permission Denied", **given})
            said.kwargs.update({name: value for name, value in error.extra.items() if name not in known})
        case _:
            pass
    if close is not None:
        said.close = close
    return said


def too_many_requests(retry_after: float) -> RateLimitExceeded:
    """What a client is told that has to wait for so many seconds."""
    text = f"Too Many Requests. Retry after {math.ceil(retry_after)} seconds."
    return RateLimitExceeded(error_msg=text, close=False, retry_after=retry_after)


class PermissionRefused(WebSocketException):
    """`PermissionDenied` in the words of the original package."""


def _of_answer(answer: Answer) -> WebSocketException:
    text = answer.detail if isinstance(answer.detail, str) else answer.reason
    said = WebSocketException(answer.close_code, answer.reason, error_msg=text, close=False)
    said.kwargs.update({name: value for name, value in answer.extra.items() if name not in said.frame})
    return said


def place_of(name: str) -> str:
    """Under which key the connections of a channel are counted."""
    return f"channel:{name}"


def consumer_of(websocket: WebSocket) -> ChannelConsumer:
    """Who serves a connection.

    Raises:
        RuntimeError: It is not one of a channel.
    """
    consumer = websocket.scope.get(CONSUMER_KEY)
    if not isinstance(consumer, ChannelConsumer):
        raise RuntimeError("this WebSocket is not connected to a channel: BaseChannel.connect() does that")
    return consumer


def _context_manager(lifespan: Callable[..., Any]) -> Callable[..., AbstractAsyncContextManager[Any]]:
    """A lifespan as a function that makes an async context manager; an async generator function is one without."""
    if inspect.isasyncgenfunction(lifespan):
        return asynccontextmanager(lifespan)
    if inspect.isgeneratorfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        raise DefinitionError("a lifespan is an async context manager: decorate it with @asynccontextmanager")
    return lifespan


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
