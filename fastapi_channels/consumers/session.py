"""A session: one consumer's life, from the first question to the last cleanup.

It stands between the connection and the layer. The server's own task drains the connection and runs no handler; frames
and events wait in a lane each, and are handled by the layer's crew. Whatever ends the connection, `serve` is left
through one door: what runs is ended, `disconnect` is called once, and the memberships are gone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Coroutine, Mapping
from contextvars import Context
from typing import TYPE_CHECKING, Any

import anyio
from pydantic_core import from_json
from typing_extensions import override

from fastapi_channels._tasks import Lane, LaneFull, in_thread
from fastapi_channels.answers import Answer, answer_to, ask_application
from fastapi_channels.application import Channels
from fastapi_channels.connection import Connection, State
from fastapi_channels.dependencies import Handshake
from fastapi_channels.exceptions import ConsumerError, FrameTooLarge, InvalidMessage
from fastapi_channels.layers import ChannelLayer, Envelope
from fastapi_channels.layers.envelope import CLOSE, SEND

if TYPE_CHECKING:
    from fastapi_channels.consumers.base import WebSocketConsumer

__all__ = ["DEALT_WITH", "Session", "checked_close_code"]

logger = logging.getLogger("fastapi_channels")

#: How many seconds what has arrived, or is being handled, has to be finished when the connection ends.
GRACE = 1.0

#: What `_parse_frame` returns of a frame that has been dealt with already.
DEALT_WITH: Any = object()

#: How many bytes of frames wait to be handled, in terms of the largest frame.
INBOX_FRAMES_OF_MAX_SIZE = 4


class Session:
    """One consumer on one connection.

    Args:
        consumer: Whose hooks and handlers are called.
        connection: Its client.
        layer: Where it has its channel.
        channels: The application's.
    """

    __slots__ = (
        "_answer",
        "_context",
        "_frames",
        "_handshake",
        "_has_complained",
        "channel_name",
        "channels",
        "connection",
        "consumer",
        "layer",
        "tasks",
    )

    def __init__(
        self, consumer: WebSocketConsumer, connection: Connection, layer: ChannelLayer, channels: Channels
    ) -> None:
        self.consumer = consumer
        self.connection = connection
        self.layer = layer
        self.channels = channels
        self.channel_name = ""
        self._handshake: Handshake | None = None
        #: Calls that run beside the frames, as `@action(concurrency=n)` has them.
        self.tasks: set[asyncio.Task[None]] | None = None
        self._frames: FrameLane | None = None
        self._context: Context | None = None
        self._answer: Answer | None = None
        self._has_complained = False

    async def serve(self, values: Mapping[str, Any]) -> None:
        """Live the whole life: `connect` with these arguments, frames and events, `disconnect`.

        Raises:
            Exception: What `connect` raised; the connection, if it was open, has been closed for it.
        """
        connection = self.connection
        has_grace = True
        connection.taker = self.deliver
        connection.forwards = self.consumer._is_forwarded
        self.channel_name = self.consumer.channel_name = self.layer.attach(connection)
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
        connect = self.consumer.connect
        if inspect.iscoroutinefunction(connect):
            await connect(**values)
        else:
            await in_thread(connect, **values)

    async def accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Answer the handshake with yes; the events that have come meanwhile follow."""
        self.connection.context = self.connection.crew.context()
        await self.connection.accept(subprotocol, headers)
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
        size = len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode("utf-8", "replace"))
        item: Any
        if size > self.connection.limits.max_frame_size:
            item = FrameTooLarge(f"a frame has at most {self.connection.limits.max_frame_size} bytes, not {size}")
            size = 0
        else:
            try:
                item = self.consumer._parse_frame(frame)
            except ConsumerError as error:
                item = error
            if item is DEALT_WITH:
                return None
        if self._frames is None:
            self._frames = FrameLane(self)
            if self._context is not None:
                self._frames.open(self._context)
        self._frames.put((item, size))
        self._frames.size += size
        return self._frames.room() if self._frames.is_full else None

    @property
    def waiting_frames(self) -> list[Any]:
        """What `_parse_frame` made of the frames that wait to be handled, oldest first."""
        return [] if self._frames is None else [item for item, _ in self._frames.waiting]

    async def answer_error(self, error: Exception, action: str | None = None, request_id: Any = None) -> None:
        """Tell the client of an error, and the log if it was none that is raised to be told."""
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
        lanes = (self._frames, self.connection.lane)
        return not self.tasks and not any(lane is not None and lane.is_active for lane in lanes)

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
                if inspect.iscoroutinefunction(consumer.disconnect):
                    await consumer.disconnect(*arguments)
                else:
                    await in_thread(consumer.disconnect, *arguments)
            except Exception:
                logger.exception("the disconnect hook of %s failed", name)
        if deadline.cancelled_caught:
            logger.error("the disconnect hook of %s took longer than DRAIN_TIMEOUT, %g s", name, timeout)

    async def leave(self, exc_type: object, error: BaseException | None, traceback: object) -> bool:
        """Answer for what ended the handshake, or the connection in `connect`; the route's last word.

        An error that was raised to be told ends here. Any other goes on: the server logs it.
        """
        if not isinstance(error, Exception):
            return False
        answer = self._answer or await ask_application(self.connection.websocket, error)
        await self.connection.refuse(answer)
        return answer.is_expected or answer.response is not None


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
            raise frame
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


def checked_close_code(code: Any) -> int:
    """Return `code` if an application may close with it.

    Raises:
        ValueError: RFC 6455 7.4 doesn't let it.
    """
    if isinstance(code, int) and not isinstance(code, bool):
        if 1000 <= code <= 1014 and code not in (1004, 1005, 1006):
            return code
        if 3000 <= code <= 4999:
            return code
    raise ValueError(f"a close code is 1000-1014 without 1004-1006, or 3000-4999, not {code!r}")
