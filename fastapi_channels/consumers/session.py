"""A session: one consumer's life, from the first question to the last cleanup.

It stands between the connection and the layer. The server's own task drains the connection and runs no handler; frames
and events wait in a lane each, and are handled by the layer's crew. Whatever ends the connection, `serve` is left
through one door: what runs is ended, `disconnect` is called once, and the memberships are gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Coroutine, Mapping
from contextvars import Context
from typing import TYPE_CHECKING, Any

import anyio
from pydantic_core import from_json
from starlette.websockets import WebSocket
from typing_extensions import override

from fastapi_channels._tasks import Lane, LaneFull, call
from fastapi_channels.answers import Answer, answer_to, ask_application, close_code_of, refusal
from fastapi_channels.application import Channels
from fastapi_channels.authentication import BEARER, user_id_of
from fastapi_channels.connection import Connection, State
from fastapi_channels.consumers.watch import Watch
from fastapi_channels.dependencies import Handshake
from fastapi_channels.exceptions import (
    AuthenticationFailed,
    ConsumerError,
    FrameTooLarge,
    InvalidMessage,
    NotAuthenticated,
    Throttled,
    TooManyConnections,
)
from fastapi_channels.gate import Gate
from fastapi_channels.layers import ChannelLayer, Envelope
from fastapi_channels.layers.envelope import CLOSE, SEND, checked_close_code
from fastapi_channels.pace import Pace, Tally

if TYPE_CHECKING:
    from fastapi_channels.consumers.base import WebSocketConsumer

__all__ = ["AUTH", "Session", "is_request_id"]

logger = logging.getLogger("fastapi_channels")

#: How many seconds what has arrived, or is being handled, has to be finished when the connection ends.
GRACE = 1.0

#: How many seconds a client has for its first frame if that has to be its token, and no setting says.
TOKEN_TIMEOUT = 10.0

#: The action of the frame that brings a token: the first on a consumer with `token_in_first_frame`, any on one with
#: actions.
AUTH = "$auth"

#: How many bytes of frames wait to be handled, in terms of the largest frame.
INBOX_FRAMES_OF_MAX_SIZE = 4


class Session:
    """One consumer on one connection.

    Args:
        consumer: Whose hooks and handlers are called.
        connection: Its client.
        layer: Where it has its channel.
        channels: The application's.
        gate: What the client, and its frames, have to pass.
    """

    __slots__ = (
        "_answer",
        "_context",
        "_frames",
        "_handshake",
        "_has_complained",
        "_has_heard",
        "_identity",
        "_pace",
        "_places",
        "_revoked",
        "_token_request_id",
        "_user_id",
        "_violations",
        "_watch",
        "channel_name",
        "channels",
        "connection",
        "consumer",
        "failure",
        "gate",
        "layer",
        "tasks",
    )

    def __init__(
        self, consumer: WebSocketConsumer, connection: Connection, layer: ChannelLayer, channels: Channels, gate: Gate
    ) -> None:
        self.gate = gate
        self.consumer = consumer
        self.connection = connection
        self.layer = layer
        self.channels = channels
        self.channel_name = ""
        #: Why the layers could not be opened; answered like what `connect` raises.
        self.failure: Exception | None = None
        self._handshake: Handshake | None = None
        #: Calls that run beside the frames, as `@action(concurrency=n)` has them.
        self.tasks: set[asyncio.Task[None]] | None = None
        self._frames: FrameLane | None = None
        self._context: Context | None = None
        self._answer: Answer | None = None
        self._has_complained = False
        #: Whether the client has sent a frame before it was watched for that.
        self._has_heard = False
        self._token_request_id: Any = None
        #: Held while it is asked whether the client may be here: who it is must not change meanwhile.
        self._identity: asyncio.Lock | None = None
        #: The code and the reason of a revocation before the handshake was answered.
        self._revoked: tuple[int, str] | None = None
        self._watch: Watch | None = None
        limits = connection.limits
        is_paced = limits.max_frames_per_second is not None or limits.max_bytes_per_second is not None
        self._pace = Pace(limits.max_frames_per_second, limits.max_bytes_per_second) if is_paced else None
        #: The keys of the places it holds.
        self._places: tuple[str, ...] = ()
        #: Whose connection it is, as the layer has been told.
        self._user_id: str | None = None
        self._violations: Tally | None = None

    # The gate

    @property
    def websocket(self) -> WebSocket:
        """Starlette's."""
        return self.connection.websocket

    async def admit(self) -> None:
        """Let the client through the gate.

        Raises:
            ConsumerError: It is refused.
            LayerUnavailable: The layers could not be opened.
        """
        if self.failure is not None:
            raise self.failure
        with self.channels.in_force():
            await self.gate.admit(self)
            if self._has_heard:
                await self.consumer._reply_ok(AUTH, self._token_request_id, self._told_of_expiry)

    async def occupy(self, key: str, limit: int) -> None:
        """Take a place of which there are so many, over all processes, until the connection ends.

        Args:
            key: What there are so many places of.
            limit: How many.

        Raises:
            TooManyConnections: There is none left.
            LayerUnavailable: Nobody can say, and THROTTLE_ON_ERROR is "deny".
        """
        if key in self._places:
            return
        if not await self.channels.leases.acquire(key, self._name(), limit):
            raise TooManyConnections("there are too many connections")
        self._places += (key,)

    async def vacate(self, key: str) -> None:
        """Give a place back before the connection ends; does nothing if it has none of that key."""
        if key in self._places:
            self._places = tuple(place for place in self._places if place != key)
            await self.channels.leases.release(key, self.channel_name)

    def unidentified(self) -> None:
        """The user is not known after all."""
        if self._user_id is not None:
            self.layer.user_discard(self._user_id, self.channel_name)
            self._user_id = None

    async def identified(self) -> None:
        """The user is known from now on: it can be disconnected from anywhere."""
        user_id = user_id_of(self.websocket)
        if user_id is not None:
            await self.layer.user_add(user_id, self._name(), self._revoke)
            self._user_id = user_id

    async def first_token(self) -> str:
        """Accept, and take the token that the client sends as its first frame.

        Raises:
            NotAuthenticated: It sent another frame, or none in time.
        """
        await self._accept()
        frame: str | bytes | None = None
        try:
            async with asyncio.timeout(self.connection.limits.first_frame_timeout or TOKEN_TIMEOUT):
                frame = await self.connection.read_one()
        except TimeoutError:
            raise NotAuthenticated("no token came in time") from None
        if frame is None or _size_of(frame) > self.connection.limits.max_frame_size:
            raise NotAuthenticated("no token came")
        try:
            content = from_json(frame)
        except ValueError:
            content = None
        match content:
            case {"action": "$auth", "data": {"token": str(token)}} | {"action": "$auth", "token": str(token)} if token:
                self._has_heard = True
                if is_request_id(content.get("request_id")):
                    self._token_request_id = content["request_id"]
                return token
        raise NotAuthenticated("the first frame has to be $auth, with a token")

    def _name(self) -> str:
        """The name of its channel, which it has from when somebody asks for it."""
        if not self.channel_name:
            self.channel_name = self.layer.attach(self.connection)
        return self.channel_name

    def _revoke(self, code: int, reason: str) -> None:
        """Close the connection, wherever it is in its life."""
        if self.connection.state is State.CONNECTING:
            self._revoked = code, reason
            _ = self.start(self.connection.refuse(refusal(code, reason)))
        else:
            self.connection.close_soon(code, reason)

    # The life

    async def serve(self, values: Mapping[str, Any]) -> None:
        """Live the whole life: `connect` with these arguments, frames and events, `disconnect`.

        Raises:
            Exception: What `connect` raised; the connection, if it was open, has been closed for it.
        """
        connection = self.connection
        if connection.state not in (State.CONNECTING, State.OPEN):
            return  # it was disconnected while it stood at the gate
        has_grace = True
        connection.taker = self.deliver
        connection.forwards = self.consumer._is_forwarded
        self.consumer.channel_name = self._name()
        self.consumer.groups = self.layer.groups_of(self.channel_name)
        try:
            await self._open(values)
            with connection.interruptible():
                await connection.read(self.take)
        except Exception as error:
            answer = self._answer = await ask_application(connection.websocket, error)
            await connection.close(answer.close_code, answer.reason)
            connection.end(answer.close_code, answer.reason)
            raise
        except asyncio.CancelledError:
            has_grace = False
            connection.end(1012)
            raise
        finally:
            await self._end(has_grace=has_grace)

    async def _open(self, values: Mapping[str, Any]) -> None:
        connection = self.connection
        with self.channels.in_force():
            connection.context = connection.crew.context()
            await connection.run(self._connect(values), self.take)
            connection.context = self._context = connection.crew.context()
            if connection.state in (State.CONNECTING, State.OPEN):
                for group in type(self.consumer).groups:
                    await self.layer.group_add(group, self.channel_name)
            if connection.state is State.CONNECTING:
                await self.accept()
            self._begin_watch()
        if connection.lane is not None:
            connection.lane.context = self._context  # it may have been opened by an accept() in the midst of connect
        if self._frames is not None:
            self._frames.open(self._context)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a call beside the frames; it is ended with the connection."""
        task = self.connection.crew.start(coroutine, self.connection.context)
        if self.tasks is None:
            self.tasks = set()
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _connect(self, values: Mapping[str, Any]) -> None:
        await call(self.consumer.connect, **values)

    async def accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Answer the handshake with yes; the events that have come meanwhile follow."""
        await self._accept(subprotocol, headers)
        self._begin_watch()

    async def _accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        self.connection.context = self.connection.crew.context()
        offered = self.connection.websocket.scope.get("subprotocols")
        if subprotocol is None and self.gate.authenticates and offered and offered[0].lower() == BEARER:
            subprotocol = offered[0]  # browsers hang up on a handshake that answers none of theirs
        await self.connection.accept(subprotocol, headers)
        if self._revoked is not None:  # while it was being accepted, too late to refuse it
            self.connection.close_soon(*self._revoked)
        if self.connection.lane is not None:
            self.connection.lane.open(self.connection.context)

    @property
    def handshake(self) -> Handshake:
        """What dependencies of handlers have asked of the handshake, for the next call."""
        if self._handshake is None:
            self._handshake = {}
        return self._handshake

    # Frames

    def take(self, frame: str | bytes) -> Awaitable[None] | None:
        """Take a frame from the client; returns what to wait for if the inbox is full."""
        if self.connection.state not in (State.CONNECTING, State.OPEN):
            return None
        size = _size_of(frame)
        if self._watch is None:
            self._has_heard = True
        else:
            self._watch.heard()
        wait = 0.0 if self._pace is None else self._pace.wait(self.connection.crew.loop.time(), size)
        item: Any
        if size > self.connection.limits.max_frame_size:
            item = FrameTooLarge(f"a frame has at most {self.connection.limits.max_frame_size} bytes, not {size}")
            size = 0
        else:
            try:
                item = self.consumer._parse_frame(frame)
            except ConsumerError as error:
                item = error
        if wait > 0:
            throttled = Throttled(retry_after=math.ceil(wait * 1000) / 1000)
            item = throttled if isinstance(item, ConsumerError) else self.consumer._refused(item, throttled)
        elif not isinstance(item, ConsumerError) and self.consumer._handle_at_once(item):
            return None
        if self._frames is None:
            self._frames = FrameLane(self)
            if self._context is not None:
                self._frames.open(self._context)
        self._frames.put((item, size))
        self._frames.size += size
        return self._frames.room() if self._frames.is_full else None

    def _begin_watch(self) -> None:
        """Watch, from when the connection is open, what may end it by itself."""
        if self._watch is None and self.connection.state is State.OPEN and Watch.is_needed(self):
            self._watch = Watch(self, has_heard=self._has_heard)

    async def ask_again(self) -> None:
        """Ask whether the client may still be here.

        Raises:
            ConsumerError: It may not.
        """
        with self.channels.in_force():
            async with self._same_identity():
                await self.gate.ask_again(self.websocket)

    async def renew(self, token: Any) -> dict[str, Any]:
        """Take a new token from the client.

        Returns:
            What it is told: when the new credentials expire.
        """
        with self.channels.in_force():
            async with self._same_identity():
                await self.gate.renew(self, token)
        if self._watch is None:
            self._begin_watch()
        else:
            self._watch.watch_expiry()
        return self._told_of_expiry

    @property
    def _told_of_expiry(self) -> dict[str, Any]:
        return {"expires_at": getattr(self.consumer.auth, "expires_at", None)}

    def _same_identity(self) -> asyncio.Lock:
        if self._identity is None:
            self._identity = asyncio.Lock()
        return self._identity

    async def _refuse_frame(self, error: ConsumerError) -> None:
        """Raise what is wrong with a frame, unless it is refused for another reason: invalid frames count too."""
        if self.gate.asks_of_frames and not isinstance(error, Throttled):
            await self.gate.pass_frame(self.websocket, None)
        raise error

    def _note_violation(self) -> None:
        """Count that a frame was held back, or brought a wrong token; a client of too many is closed with 4029."""
        allowed = self.connection.limits.max_violations
        if self._violations is None:
            self._violations = Tally()
        count = self._violations.add(self.connection.crew.loop.time())
        if allowed is not None and count > allowed:
            self.connection.close_soon(close_code_of(Throttled.status_code), "too many frames were refused")

    @property
    def waiting_frames(self) -> list[Any]:
        """What `_parse_frame` made of the frames that wait to be handled, oldest first."""
        return [] if self._frames is None else [item for item, _ in self._frames.waiting]

    async def answer_error(self, error: Exception, action: str | None = None, request_id: Any = None) -> None:
        """Tell the client of an error, and the log if it was none that is raised to be told."""
        if isinstance(error, Throttled | AuthenticationFailed):
            self._note_violation()
        answer = await ask_application(self.connection.websocket, error)
        if not answer.is_expected and answer.response is None:
            logger.error("%s failed on a frame", type(self.consumer).__qualname__, exc_info=error)
        elif not self._has_complained:
            self._has_complained = True
            logger.info("%s refuses a frame, and may refuse more: %r", type(self.consumer).__qualname__, answer.code)
        try:
            await self.consumer._send_error(answer.errors, action, request_id)
        except ValueError as failure:  # the application's own error is not for JSON
            logger.error("%s raised what a client can't be told", type(self.consumer).__qualname__, exc_info=failure)
            await self.consumer._send_error(answer_to(failure).errors, action, request_id)

    # Events

    def deliver(self, envelope: Envelope) -> bool:
        """Take a message of the layer; a forwarded one goes to the client at once if none waits before it."""
        connection = self.connection
        lane = connection.lane
        if lane is None:
            is_open = connection.state is not State.CONNECTING
            if is_open and self.consumer._forwards(envelope.type):
                self.forward(envelope)
                return True
            lane = connection.lane = EventLane(self)
            if is_open:
                lane.open(connection.context)
        if not lane.reserve():
            return False
        connection.crew.dispatch(envelope, [lane])
        return True

    def forward(self, envelope: Envelope) -> None:
        """Send a message on to the client as it is."""
        key = self.consumer.outbox_key(envelope.decode()) if self.connection.limits.overflow == "latest" else None
        self.connection.write(envelope.frame, len(envelope.payload), key)

    @property
    def is_paced(self) -> bool:
        """Whether the running code may be held back while the client reads slowly: all but an event's handler may."""
        lane = self.connection.lane
        return lane is None or lane.task is None or lane.task is not asyncio.current_task()

    # The end

    async def _end(self, *, has_grace: bool) -> None:
        """End what runs, call `disconnect`, leave the groups; each whatever became of the one before."""
        if self._watch is not None:
            self._watch.cancel()
        own = self.consumer.drain_timeout
        timeout = self.channels.settings.drain_timeout if own is None else own
        try:
            with anyio.move_on_after(GRACE + timeout, shield=True):
                await self._finish(GRACE if has_grace else 0)
        finally:
            try:
                await self._disconnect(timeout)
            finally:
                with anyio.CancelScope(shield=True):
                    await self.layer.detach(self.channel_name)

    async def _finish(self, grace: float) -> None:
        """Let what has arrived be handled for a moment, then cancel it and wait for its end."""
        if self.connection.lane is not None:
            self.connection.lane.clear()
        if self._is_idle:
            return
        with anyio.move_on_after(grace):
            await self._idle()
        for lane in (self._frames, self.connection.lane):
            if lane is not None:
                lane.cancel()
        for task in self.tasks or ():
            task.cancel()
        await self._idle()

    @property
    def _is_idle(self) -> bool:
        lane = self.connection.lane
        return not self.is_serving and (lane is None or not lane.is_active)

    @property
    def is_serving(self) -> bool:
        """Whether a frame of the client's is being handled, or waits for that."""
        return bool(self.tasks) or (self._frames is not None and self._frames.is_active)

    async def _idle(self) -> None:
        for lane in (self._frames, self.connection.lane):
            if lane is not None:
                await lane.idle()
        while self.tasks:
            await asyncio.wait(self.tasks)

    async def _disconnect(self, timeout: float) -> None:
        consumer = self.consumer
        name = type(consumer).__qualname__
        arguments = (self.connection.close_code, self.connection.close_reason)[: consumer._disconnect_arguments]
        with anyio.move_on_after(timeout, shield=True) as deadline, self.channels.in_force():
            try:
                await call(consumer.disconnect, *arguments)
            except Exception:
                logger.exception("the disconnect hook of %s failed", name)
        if deadline.cancelled_caught:
            logger.error("the disconnect hook of %s took longer than DRAIN_TIMEOUT, %g s", name, timeout)

    async def leave(self, exc_type: object, error: BaseException | None, traceback: object) -> bool:
        """Answer for what ended the handshake, or the connection in `connect`; the route's last word.

        An error that was raised to be told ends here. Any other goes on: the server logs it.
        """
        try:
            if not isinstance(error, Exception):
                return False
            answer = self._answer or await ask_application(self.connection.websocket, error)
            await self.connection.refuse(answer)
            await self.connection.close(answer.close_code, answer.reason)
        finally:
            if self.channel_name:
                with anyio.CancelScope(shield=True):
                    await self._give_back()
        return answer.is_expected or answer.response is not None

    async def _give_back(self) -> None:
        """Let go of what the connection had outside of itself."""
        if self.tasks:  # the refusal of a client that was disconnected at the gate
            await asyncio.wait(self.tasks, timeout=GRACE)
        self.unidentified()
        for key in self._places:
            await self.vacate(key)
        await self.layer.detach(self.channel_name)


def _size_of(frame: str | bytes) -> int:
    """The bytes of a frame, as it came in."""
    return len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode("utf-8", "replace"))


class FrameLane(Lane[tuple[Any, int]]):
    """The frames of a client that wait to be handled: what was made of each, and its size in bytes."""

    __slots__ = ("_session", "size")

    def __init__(self, session: Session) -> None:
        super().__init__(session.connection.crew, session.layer.capacity)
        self._session = session
        #: The bytes that wait.
        self.size = 0

    @property
    def is_full(self) -> bool:
        """Whether the client has to be held back."""
        largest = self._session.connection.limits.max_frame_size
        return len(self.waiting) >= self.capacity or self.size >= INBOX_FRAMES_OF_MAX_SIZE * largest

    @override
    def begin(self, item: tuple[Any, int]) -> Awaitable[Any] | None:
        frame, size = item
        self.size -= size
        if self._session.connection.closed_here:
            return None
        if isinstance(frame, ConsumerError):
            return self._session._refuse_frame(frame)
        return self._session.consumer._handle_frame(frame)

    @override
    def failed(self, item: tuple[Any, int], error: Exception) -> Awaitable[None]:
        return self._session.answer_error(error)


class EventLane(Lane[Envelope]):
    """The messages of the layer that wait to be handled."""

    __slots__ = ("_connection", "_consumer", "_session")

    def __init__(self, session: Session) -> None:
        super().__init__(session.connection.crew, session.layer.capacity)
        self._connection = session.connection
        self._consumer = session.consumer
        self._session = session

    @override
    def begin(self, item: Envelope) -> Awaitable[Any] | None:
        connection = self._connection
        if connection.direct is None and connection.state is not State.OPEN:
            return None
        if item.expires <= connection.crew.now:
            connection.counters.expired += 1
            return None
        consumer = self._consumer
        plan = consumer._event_plans.get(item.type)
        if plan is None:
            self._deliver_unhandled(item)
            return None
        if plan.is_plain:  # what most handlers are, without a detour
            rest: Awaitable[Any] = plan.function(consumer, from_json(item.payload))
            return rest
        return plan.begin_event(consumer, item, self._session.handshake)

    @override
    def failed(self, item: Envelope, error: Exception) -> None:
        if isinstance(error, LaneFull):
            self._connection.counters.inbox_dropped += 1
            return
        self._connection.counters.failed += 1
        name = type(self._consumer).__qualname__
        logger.error("%s failed on the event %r", name, item.type, exc_info=error)

    def _deliver_unhandled(self, envelope: Envelope) -> None:
        if self._consumer._forwards(envelope.type):
            self._session.forward(envelope)
        elif envelope.type == SEND:
            self._send(envelope.decode())
        elif envelope.type == CLOSE:
            event = envelope.decode()
            self._connection.close_soon(checked_close_code(event.get("code", 1000)), str(event.get("reason") or ""))
        else:
            self._connection.counters.unhandled += 1
            self._consumer._complain_unhandled(envelope.type)

    def _send(self, event: Mapping[str, Any]) -> None:
        text, data = event.get("text"), event.get("bytes")
        if isinstance(text, str) and data is None:
            self._connection.write({"type": "websocket.send", "text": text}, len(text.encode()))
        elif isinstance(data, bytes) and text is None:
            self._connection.write({"type": "websocket.send", "bytes": data}, len(data))
        else:
            raise InvalidMessage("websocket.send has either a text (str) or bytes")


def is_request_id(value: Any) -> bool:
    """Whether it can be given back as it came: a string, or a number that isn't too large for one."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)
