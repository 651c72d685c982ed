"""`WebSocketConsumer`: the base of every consumer, for text and bytes."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Awaitable, Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.authentication import UnauthenticatedUser
from starlette.types import ASGIApp, Scope
from starlette.websockets import WebSocket

from fastapi_channels.answers import refusal
from fastapi_channels.authentication import id_of
from fastapi_channels.connection import Connection, State
from fastapi_channels.consumers.blocking import SyncConsumer
from fastapi_channels.consumers.marks import EventMark, marked
from fastapi_channels.consumers.session import Session
from fastapi_channels.dependencies import Plan
from fastapi_channels.exceptions import ConsumerError, DefinitionError, InvalidFrame, InvalidGroupName
from fastapi_channels.gate import Gate, Rules
from fastapi_channels.layers import ChannelLayer, Message, Receipt
from fastapi_channels.layers.envelope import SEND, checked_close_code, encode
from fastapi_channels.layers.names import checked_name
from fastapi_channels.settings import ChannelsSettings, OverflowPolicy, RejectMode

__all__ = ["WebSocketConsumer"]

logger = logging.getLogger("fastapi_channels")

#: How many types of events a class remembers something about; they are the application's, so there are fewer.
MAX_TYPES = 1000

# Attributes of the design that this version can't keep: a consumer that relies on one must not start without it.
_NOT_YET = (
    "presence_events",
    "presence_id",
)


#: The settings that a consumer may have in place of the application's.
OWN_SETTINGS = (
    "drain_timeout",
    "first_frame_timeout",
    "idle_timeout",
    "max_bytes_per_second",
    "max_connections",
    "max_connections_per_address",
    "max_connections_per_user",
    "max_frame_size",
    "max_frames_per_second",
    "max_violations",
    "outbox_bytes",
    "outbox_frames",
    "overflow",
    "reject_mode",
)


class WebSocketConsumer:
    """Serves one connection; its methods are what the connection's client and the layer's messages reach.

    Subclasses define the hooks `connect`, `receive` and `disconnect`, and handlers of events. Hooks and handlers may be
    `async def` or plain `def`; a plain one runs in the thread pool, where `self.sync` has the blocking methods. Frames
    are handled one at a time, in order, and so are events; frames and events don't wait for each other.
    """

    #: The alias of the layer that this consumer lives on.
    channel_layer_alias: str = "default"
    #: On the class: groups that every connection joins once `connect` has returned. On an instance: the groups it is
    #: in, as a live, read-only set.
    groups: Collection[str] = ()
    #: Types of events that go to the client as they are; True for all that have no handler.
    forward_events: bool | Collection[str] = ()

    #: In place of the settings of the same names; None leaves them.
    allowed_origins: Sequence[str] | None = None
    authentication_classes: Sequence[Any] | None = None
    permission_classes: Sequence[Any] | None = None
    throttle_classes: Sequence[Any] | None = None
    max_connections: int | None = None
    max_connections_per_user: int | None = None
    max_connections_per_address: int | None = None
    max_frames_per_second: float | None = None
    max_bytes_per_second: float | None = None
    max_violations: int | None = None
    first_frame_timeout: float | None = None
    idle_timeout: float | None = None
    max_frame_size: int | None = None
    outbox_frames: int | None = None
    outbox_bytes: int | None = None
    overflow: OverflowPolicy | None = None
    reject_mode: RejectMode | None = None
    drain_timeout: float | None = None

    #: Every how many seconds, at the latest, permissions are asked again whether the client may be connected; one that
    #: has lost them is closed with 4503. None for never.
    permission_recheck: float | None = None
    #: Whether a client that is not known may send its token as the first frame, `{"action": "$auth", "data": {"token":
    #: ...}}`. The handshake is accepted then, and nothing else is read until the token is in: within
    #: `first_frame_timeout`, or 10 seconds. `connect` is called after that.
    token_in_first_frame: bool = False

    channel_name: str
    """The address of this connection on the layer."""

    layer: ChannelLayer
    """The layer it lives on."""

    _session: Session
    _connection: Connection
    # Made with the class: how each type of event is handled, how many arguments `disconnect` takes, and so on.
    _event_plans: ClassVar[Mapping[str, Plan]]
    _disconnect_arguments: ClassVar[int]
    _unhandled: ClassVar[set[str]]
    _takes: ClassVar[tuple[type, ...]]
    _receive_plan: ClassVar[Plan]
    _is_forwarded: ClassVar[dict[str, bool]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_private_names(cls)
        for name in _NOT_YET:
            if getattr(cls, name, None) is not None:
                raise DefinitionError(f"{cls.__name__}.{name} is not supported by this version of fastapi-channels")
        if isinstance(cls.groups, str) or not isinstance(cls.groups, Collection):
            raise DefinitionError(f"{cls.__name__}.groups is a list of names, not {cls.groups!r}")
        if isinstance(cls.forward_events, str):
            raise DefinitionError(f"{cls.__name__}.forward_events is a list of types or True, not one type")
        marks = list(marked(cls, EventMark, API))
        for group in cls.groups:
            try:
                checked_name(group)
            except InvalidGroupName as error:
                raise DefinitionError(f"{cls.__name__}.groups: {error}") from error
        for name in OWN_SETTINGS:
            _check_setting(cls, name)
        every = cls.permission_recheck
        if every is not None and not (isinstance(every, int | float) and every > 0):
            raise DefinitionError(f"{cls.__name__}.permission_recheck is more than 0 seconds, or None")
        if not isinstance(cls.token_in_first_frame, bool):
            raise DefinitionError(f"{cls.__name__}.token_in_first_frame is True or False")
        plans: dict[str, Plan] = {}
        claimed: dict[str, str] = {}
        for attribute, function, mark in marks:
            kind = mark.type or attribute.replace("_", ".")
            if kind in plans:
                raise DefinitionError(f"{cls.__name__}: {claimed[kind]} and {attribute} both handle {kind!r}")
            plan = Plan(function, cls, data="event")
            plan.is_plain = plan.is_plain and kind != SEND  # whose bytes are not JSON
            if plan.is_stream:
                raise DefinitionError(f"{cls.__name__}.{attribute} handles an event and can't be a generator")
            plans[kind], claimed[kind] = plan, attribute
        cls._event_plans = plans
        cls._is_forwarded = dict.fromkeys(() if isinstance(cls.forward_events, bool) else cls.forward_events, True)
        if both := sorted(cls._is_forwarded.keys() & plans.keys()):
            raise DefinitionError(f"{cls.__name__}: {both[0]!r} has a handler and is in forward_events")
        cls._unhandled = set()
        cls._disconnect_arguments = _count_arguments(cls)
        cls._read_receive()
        Gate.check(cls._rules(), {})

    @classmethod
    def _rules(cls) -> Rules:
        """What the class says of its gate."""
        return Rules(
            cls,
            cls.allowed_origins,
            cls.authentication_classes,
            cls.permission_classes,
            cls.throttle_classes,
            cls.max_connections,
            cls.max_connections_per_user,
            cls.max_connections_per_address,
            cls.token_in_first_frame,
        )

    @classmethod
    def _action_rules(cls) -> Mapping[str, Rules]:
        """What its actions add to that, by name."""
        return {}

    @classmethod
    def _read_receive(cls) -> None:
        """Read from the `receive` hook what frames it takes."""
        plan = Plan(cls.receive, cls)
        annotation = str | bytes if plan.parameter is None else plan.parameter.annotation
        is_union = get_origin(annotation) in (Union, types.UnionType)
        takes = get_args(annotation) if is_union else (annotation,)
        if annotation is inspect.Parameter.empty or annotation is Any:
            takes = (str, bytes)
        if plan.is_stream or not set(takes) <= {str, bytes}:
            raise DefinitionError(f"{cls.__name__}.receive takes data: str, bytes or str | bytes")
        cls._receive_plan, cls._takes = plan, takes

    # Hooks

    if TYPE_CHECKING:
        # Subclasses choose the parameters, and between `async def` and `def`.
        def connect(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def receive(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def disconnect(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102

    else:

        async def connect(self) -> None:
            """Called before the handshake is answered; returning accepts it.

            Its parameters are FastAPI's: path, query, header, cookie, `Depends`; dependencies with `yield` live as long
            as the connection. It may call `accept()` itself, or `close()` to refuse. Raising `HTTPException`,
            `ConsumerError` or another exception refuses with a real HTTP response. If the client goes away meanwhile,
            it is cancelled.
            """

        async def receive(self, data: str | bytes) -> None:
            """Called with each frame, one at a time, in order.

            What it raises is answered with an error frame, and the connection lives on.
            """
            raise InvalidFrame("this connection takes no frames")

        async def disconnect(self, code: int, reason: str) -> None:
            """Called exactly once for every connection whose `connect` was begun, whatever ended it.

            The connection is still in its groups, so that the others can be told; its own sends return False. It may
            take `DRAIN_TIMEOUT` seconds, and may be declared without `reason`.

            Args:
                code: The client's close code; 1006 if it went without one; the own code after `close()`; 1011 after an
                    exception in `connect`; 1012 when the server shuts down.
                reason: The client's, or the own.
            """

    # The connection

    @property
    def websocket(self) -> WebSocket:
        """Starlette's WebSocket."""
        return self._connection.websocket

    @property
    def scope(self) -> Scope:
        """The ASGI scope of the connection."""
        return self.websocket.scope

    @property
    def path_params(self) -> Mapping[str, Any]:
        """The path parameters, as the route has them."""
        return self.websocket.path_params

    @property
    def user(self) -> Any:
        """Who the client is, if the gate or a middleware has found out; else one whose `is_authenticated` is False."""
        return self.scope.get("user") or UnauthenticatedUser()

    @property
    def auth(self) -> Any:
        """What the client's credentials are good for, as the gate or a middleware has found out; or None."""
        return self.scope.get("auth")

    def user_id(self) -> str | None:
        """Whose connection this is: to throttles, to the limit of connections per user, and to `disconnect_user`.

        It is `str(user.id)`, or None of a stranger; override it for another, such as one that has the tenant in it.
        """
        return id_of(self.user)

    @property
    def sync(self) -> SyncConsumer:
        """The blocking twins of this consumer's methods, for plain `def` hooks and handlers."""
        return SyncConsumer(self, self._connection.crew.loop)

    async def accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Accept the connection before `connect` has returned.

        Args:
            subprotocol: One of those that the client offers.
            headers: More headers of the response.

        Raises:
            RuntimeError: The handshake has been answered already.
        """
        await self._session.accept(subprotocol, headers)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection, behind the frames that are on their way; before it is accepted, refuse it.

        Does nothing on a connection that is gone. Cancelling is safe: it closes.

        Args:
            code: RFC 6455 7.4, or 3000-4999; 4100-4199 (come back) and 4600-4699 (don't) are the application's.
            reason: What does not fit into 123 bytes is cut off.

        Raises:
            ValueError: Nobody may close with that code.
        """
        checked_close_code(code)
        connection = self._connection
        if connection.state is State.CONNECTING:
            await connection.refuse(refusal(code, reason))
        else:
            await connection.close(code, reason)

    async def send(self, text: str | None = None, bytes: bytes | None = None) -> bool:
        """Send a frame of text or of bytes.

        Frames leave in the order in which they were sent. If the client reads so slowly that its outbox is full, this
        waits for room; in the handler of an event the overflow policy decides instead. Cancelling is safe: nothing was
        sent.

        Returns:
            False if the connection is gone.

        Raises:
            RuntimeError: The connection is not accepted yet.
        """
        if (text is None) == (bytes is None):
            raise TypeError("send() takes either a text or bytes")
        if text is not None:
            size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
            return await self._write({"type": "websocket.send", "text": text}, size)
        assert bytes is not None
        return await self._write({"type": "websocket.send", "bytes": bytes}, len(bytes))

    async def send_json(self, content: Any) -> bool:
        """Send a text frame with `content` as JSON, as pydantic writes it: models, dataclasses, dates and all.

        Otherwise like `send`.

        Raises:
            ValueError: Something in it is not for JSON; nothing was sent.
        """
        payload = encode(content)
        connection = self._connection
        if connection.direct is not None:  # the usual case, without a detour
            return connection.step({"type": "websocket.send", "text": payload.decode()})
        return await self._write({"type": "websocket.send", "text": payload.decode()}, len(payload), content)

    async def _write(self, frame: dict[str, Any], size: int, content: Any = None) -> bool:
        session, connection = self._session, self._connection
        if connection.state is State.CONNECTING:
            raise RuntimeError("the connection is not accepted yet: call accept() first, or send after connect")
        key = None
        if connection.is_full and session.is_paced:
            await connection.room()
        elif connection.limits.overflow == "latest" and content is not None:
            key = self.outbox_key(content)
        return connection.write(frame, size, key)

    def outbox_key(self, content: Any) -> Hashable:
        """Which frames replace each other while they wait, under the overflow policy `latest`: those of one key.

        Args:
            content: What was given to `send_json`, or a forwarded event as a dict.

        Returns:
            The type of an event by default; None for a frame that nothing replaces.
        """
        if isinstance(content, Mapping):
            return content.get("type")
        return getattr(content, "type", None) if isinstance(content, BaseModel) else None

    # Groups

    async def group_add(self, group: str) -> None:
        """Join a group. When this returns, the connection gets every message sent to it from then on.

        Raises:
            InvalidGroupName: Not a group name; `safe_name` makes one of any text.
            LayerUnavailable: The layer's broker is away.
        """
        await self.layer.group_add(group, self.channel_name)

    async def group_discard(self, group: str) -> None:
        """Leave a group; does nothing if the connection isn't in it."""
        await self.layer.group_discard(group, self.channel_name)

    async def group_send(
        self, group: str, event: Message, *, exclude_self: bool = False, idempotency_key: str | None = None
    ) -> Receipt:
        """Send an event to everybody in a group; see `ChannelLayer.group_send`.

        Args:
            group: The group's name; the connection need not be in it.
            event: A dict with a `type`, or a pydantic model that has one.
            exclude_self: Whether this connection doesn't get it.
            idempotency_key: The same key again within five minutes sends nothing.
        """
        exclude = (self.channel_name,) if exclude_self else ()
        return await self.layer.group_send(group, event, exclude=exclude, idempotency_key=idempotency_key)

    @classmethod
    def as_asgi(cls, **init: Any) -> ASGIApp:
        """This consumer as an ASGI application, for use without FastAPI or on a plain Starlette route.

        Args:
            init: Attributes of the class to set on each instance.
        """
        from fastapi_channels.consumers.endpoint import ConsumerApp, with_attributes  # which need this class

        return ConsumerApp(with_attributes(cls, init))

    # What the session asks; not for applications

    def _parse_frame(self, frame: str | bytes) -> Any:
        """Make of a frame what `_handle_frame` gets. Runs no code of users."""
        if type(frame) not in self._takes:
            due = "text" if self._takes == (str,) else "binary"
            raise InvalidFrame(f"a {due} frame was expected")
        return frame

    def _handle_at_once(self, parsed: Any) -> bool:
        """Whether it was a frame that doesn't wait for those before it, and has been seen to."""
        return False

    def _refused(self, parsed: Any, error: ConsumerError) -> Any:
        """What waits in the place of a frame that is refused before its turn."""
        return error

    def _handle_frame(self, parsed: Any) -> Awaitable[Any]:
        """Begin to handle what `_parse_frame` made of a frame."""
        if self._session.gate.asks_of_frames:
            return self._handle_asked(parsed)
        return self._begin_receive(parsed)

    async def _handle_asked(self, parsed: Any) -> None:
        await self._session.gate.pass_frame(self.websocket, None)
        if not self._connection.closed_here:  # meanwhile
            await self._begin_receive(parsed)

    def _begin_receive(self, parsed: Any) -> Awaitable[Any]:
        return self._receive_plan.begin(self, parsed, self._session.handshake)

    async def _reply_ok(self, action: str | None, request_id: Any, data: Any) -> None:
        """Answer a request with its result (protocol.md, 1)."""
        reply = {"type": "response", "action": action, "request_id": request_id, "status": "ok", "data": data}
        await self._reply({**reply, "errors": None})

    async def _send_error(self, errors: Mapping[str, Any], action: str | None, request_id: Any) -> None:
        """Answer with an error frame (protocol.md, 1)."""
        frame = {"type": "response", "action": action, "request_id": request_id}
        await self._reply({**frame, "status": "bad", "data": None, "errors": errors})

    async def _reply(self, frame: Mapping[str, Any]) -> bool:
        payload = encode(frame)
        event = {"type": "websocket.send", "text": payload.decode()}
        connection = self._connection
        if connection.direct is not None:
            return connection.step(event)
        return await self._write(event, len(payload))

    @classmethod
    def _forwards(cls, type: str) -> bool:
        """Whether events of that type go to the client as they are."""
        try:
            return cls._is_forwarded[type]
        except KeyError:
            is_forwarded = cls.forward_events is True and type not in cls._event_plans
            is_forwarded = is_forwarded and not type.startswith("websocket.")
            if len(cls._is_forwarded) < MAX_TYPES:
                cls._is_forwarded[type] = is_forwarded
            return is_forwarded

    def _complain_unhandled(self, type: str) -> None:
        """Log that there is no handler for a type of event; once for each type, since the next would say the same."""
        if type in self._unhandled or len(self._unhandled) >= MAX_TYPES:
            return
        self._unhandled.add(type)
        name = type.replace(".", "_")
        hint = (
            f"; {name}() is there, but not marked with @event" if inspect.isroutine(getattr(self, name, None)) else ""
        )
        logger.error("%s has no handler for the event %r%s", self.__class__.__qualname__, type, hint)


def _check_private_names(cls: type) -> None:
    """Tell a user's class, and its mixins, of a private name that the package's own classes rely on."""
    own = [base for base in cls.__mro__ if _is_ours(base)]
    names = {name for base in own for name in (*vars(base), *getattr(base, "__annotations__", {}))}
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    bases = [base for base in cls.__mro__[1:] if not _is_ours(base) and not issubclass(base, own[-1])]
    for base in () if _is_ours(cls) else (cls, *bases):
        for name in private & vars(base).keys():
            raise DefinitionError(f"{base.__name__}.{name} takes a private name of the consumers; choose another")


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _check_setting(cls: type[WebSocketConsumer], name: str) -> None:
    value = getattr(cls, name)
    if value is None:
        return
    field = ChannelsSettings.model_fields[name]
    try:
        annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise DefinitionError(f"{cls.__name__}.{name}: {error.errors()[0]['msg']}") from None


def _count_arguments(cls: type[WebSocketConsumer]) -> int:
    parameters = list(inspect.signature(cls.disconnect).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p not in positional]
    if len(positional) not in (1, 2) or required:
        raise DefinitionError(f"{cls.__name__}.disconnect takes (self, code, reason) or (self, code)")
    return len(positional)


#: The names that a marked method can't have.
API: frozenset[str] = frozenset(
    name for name in (*vars(WebSocketConsumer), *WebSocketConsumer.__annotations__) if not name.startswith("_")
)

WebSocketConsumer.__init_subclass__()  # the base can be used as it is, so it has tables too
