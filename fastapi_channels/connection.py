"""One connection: the only place that writes to a socket, and what happens when the socket can't take it.

A frame goes to the server at once, in the caller's own step, if nothing waits before it and the socket has room: the
server's `send` is begun by hand, and usually it is over before it has ever waited. If it waits, the rest of it becomes
the connection's writer, a task that exists until the outbox is empty. So an idle connection has no task, and a slow
one holds up nobody: what comes meanwhile is kept in its bounded outbox.

Spec:
    protocol.md, 2 (refusing), 3 (close codes) and 4 (a slow client costs itself only); RFC 6455 7.4.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, cast

import anyio
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from typing_extensions import override

from fastapi_channels import _fastapi
from fastapi_channels._tasks import Crew, Lane
from fastapi_channels.answers import Answer
from fastapi_channels.layers import Counters, Direct, Envelope, Sink
from fastapi_channels.outbox import Frame, Outbox
from fastapi_channels.settings import OverflowPolicy, RejectMode

__all__ = ["Connection", "Limits", "State"]

logger = logging.getLogger("fastapi_channels")

#: How many seconds a client may take to make room for one frame before it counts as gone.
WRITE_TIMEOUT = 20.0
#: How many seconds a close frame may take to leave.
CLOSE_TIMEOUT = 5.0
#: How many seconds a full inbox may stay as it is before its handler counts as hanging.
STALLED_AFTER = 60.0

#: How many seconds a refused connection may take to be gone before it is left to the server.
GONE_TIMEOUT = 0.2

#: RFC 6455 5.5: a control frame has 125 bytes, of which the code takes two.
MAX_REASON = 123

TOO_SLOW = 4008

_NO_CONTEXT = Context()

#: Called with each frame of the client. If it has no room for more it returns what to await before the next.
Take = Callable[[str | bytes], Awaitable[None] | None]


class State(enum.Enum):
    """Where a connection is in its life; it only moves down this list."""

    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take up, and what happens beyond it; see the attributes of consumers of these names."""

    outbox_frames: int
    outbox_bytes: int
    overflow: OverflowPolicy
    max_frame_size: int
    reject_mode: RejectMode
    max_frames_per_second: float | None = None
    max_bytes_per_second: float | None = None
    first_frame_timeout: float | None = None
    idle_timeout: float | None = None
    max_violations: int | None = None
    permission_recheck: float | None = None


class Connection(Sink):
    """A client's WebSocket, from before the handshake is answered to after its end.

    Only the event loop's own thread may call it.

    Args:
        websocket: Starlette's, whose `websocket.connect` has been received.
        limits: What it may take up.
        crew: Who runs the writer.
        counters: Where dropped frames are counted.

    Attributes:
        state: Where it is in its life.
        close_code: What it ended with, or is being closed with.
        close_reason: Likewise.
        closed_here: Whether it was us who closed it, after it was open.
        context: In a copy of which its tasks run.
        taker: Takes the messages of the layer that neither `direct` nor the lane does; set by whom it serves.
        direct: The server's `send`, while nothing waits in the outbox and it may be begun by hand.
    """

    __slots__ = (
        "_deadline",
        "_dropped",
        "_ended",
        "_interrupted",
        "_is_read",
        "_is_steppable",
        "_outbox",
        "_receive",
        "_room",
        "_send",
        "_serving",
        "_writer",
        "close_code",
        "close_reason",
        "closed_here",
        "context",
        "counters",
        "crew",
        "direct",
        "forwards",
        "lane",
        "limits",
        "state",
        "taker",
        "websocket",
    )

    def __init__(self, websocket: WebSocket, limits: Limits, crew: Crew, counters: Counters) -> None:
        self.websocket = websocket
        self.limits = limits
        self.counters = counters
        self.state = State.CONNECTING
        self.closed_here = False
        self.close_code = 1006
        self.close_reason = ""
        self.context = _NO_CONTEXT
        self.crew = crew
        self.direct: Direct | None = None
        self.forwards: Mapping[str, bool] = {}
        self.lane: Lane[Envelope] | None = None
        self.taker: Callable[[Envelope], bool] = _take_none
        self._receive = _fastapi.bare_receive(websocket)
        self._send = _fastapi.bare_send(websocket)
        self._is_steppable = _fastapi.can_be_stepped(self._send)
        self._outbox: Outbox | None = None
        self._dropped = 0
        self._writer: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None
        self._room: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._serving: asyncio.Task[Any] | None = None
        self._interrupted = False
        #: Whether somebody waits for what the client sends, and for its end.
        self._is_read = False

    # The handshake

    async def accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Answer the handshake with yes.

        Raises:
            RuntimeError: The handshake has been answered already.
        """
        if self.state is not State.CONNECTING:
            raise RuntimeError("the handshake has been answered already")
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
        try:
            await self.websocket.accept(subprotocol, raw)
        except (OSError, WebSocketDisconnect) as error:
            logger.debug("the client went away during the handshake", exc_info=error)
            self.end(1006)
            return
        self.state = State.OPEN
        self._go_direct()

    async def refuse(self, answer: Answer) -> None:
        """Answer the handshake with no, as `reject_mode` and the server allow; does nothing if it has been answered."""
        if self.websocket.application_state is not WebSocketState.CONNECTING:
            return
        self.end(answer.close_code, answer.reason)
        try:
            response = answer.to_response()
        except Exception:
            logger.exception("the text of a refusal is not for JSON")
            response = Response(status_code=answer.status_code)
        try:
            await self._answer_no(answer, response)
        except Exception as error:  # what servers raise then is of many kinds
            logger.debug("the client went away before it was refused", exc_info=error)

    async def _answer_no(self, answer: Answer, response: Response) -> None:
        websocket = self.websocket
        if self.limits.reject_mode == "http" and "websocket.http.response" in websocket.scope.get("extensions", {}):
            await websocket.send_denial_response(response)
            await self._until_gone()
            return
        if self.limits.reject_mode == "close":
            # Browsers hang up on a handshake that answers none of the sub-protocols that they offer.
            offered = websocket.scope.get("subprotocols") or [None]
            await websocket.accept(offered[0])
        await websocket.close(answer.close_code, fitting(answer.reason))

    async def _until_gone(self) -> None:
        """Wait for a moment until the server has seen the end of a refused connection.

        uvicorn's default implementation calls an application that returns sooner an error, one line for each refusal.
        It tells of the end twice: when the response is sent, and when the connection is lost. Frames that came with the
        handshake stand before that.
        """
        told = 0
        with anyio.move_on_after(GONE_TIMEOUT):
            while told < 2:
                message = await self._receive()
                told += message["type"] == "websocket.disconnect"

    # The way in

    def interruptible(self) -> AbstractContextManager[None]:
        """A block of the server's own task that ends when the connection does, whatever it waits for."""
        return _Interruptible(self)

    async def read(self, take: Take) -> None:
        """Hand every frame to `take` until the connection ends; `close_code` and `close_reason` tell how it did."""
        self._is_read = True
        try:
            while self.state is not State.CLOSED:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self._disconnected(message)
                    return
                text = message.get("text")
                room = take(message["bytes"] if text is None else text)
                if room is not None:
                    await self._until(room)
        finally:
            self._is_read = False

    async def read_one(self) -> str | bytes | None:
        """One frame, before the connection is served; None if it has ended instead."""
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._disconnected(message)
            return None
        text: str | None = message.get("text")
        return message["bytes"] if text is None else text

    async def run(self, hook: Awaitable[None], take: Take) -> None:
        """Run the hook that opens the connection, and cancel it if the client goes away meanwhile.

        Frames that come before it has ended go to `take`. A hook that never waits costs no task.
        """
        watcher: asyncio.Task[None] | None = None

        def watch() -> None:
            nonlocal watcher
            watcher = self.crew.start(self.read(take), self.context)

        with self.interruptible():
            starting = self.crew.loop.call_soon(watch)
            try:
                await hook
            finally:
                starting.cancel()
                if watcher is not None:
                    watcher.cancel()
                    await asyncio.wait({watcher})

    async def _until(self, room: Awaitable[None]) -> None:
        """Wait for a handler to make room in a full inbox; meanwhile TCP holds the client back."""
        try:
            async with asyncio.timeout(STALLED_AFTER):
                await room
        except TimeoutError:
            logger.error("a handler has kept a full inbox waiting for %g s; closing the connection", STALLED_AFTER)
            await self.close(1011, "not reading")

    def _disconnected(self, message: Mapping[str, Any]) -> None:
        self.websocket.client_state = WebSocketState.DISCONNECTED
        code = int(message.get("code") or 1005)
        reason = message.get("reason")
        if code == 1005 and reason is None:
            code = 1006  # servers say 1005 for a lost connection too, but only a close frame has a reason
        self.end(code, reason or "")

    # The way out

    @override
    def deliver(self, envelope: Envelope) -> bool:
        return self.taker(envelope)

    @property
    def is_full(self) -> bool:
        """Whether the outbox has no room, so that the next `write` would overflow."""
        return self._outbox is not None and self._outbox.is_full

    async def room(self) -> None:
        """Wait until the outbox has room, or the connection has ended. Cancelling is safe: nothing changes."""
        while self.is_full and self.state is not State.CLOSED:
            if self._room is None or self._room.done():
                self._room = self.crew.loop.create_future()
            await asyncio.shield(self._room)

    def write(self, frame: Frame, size: int, key: Hashable = None) -> bool:
        """Send a frame to the client, behind those that wait; never waits itself.

        If the outbox is full, its overflow policy decides; each dropped frame is counted, and told once in the log.

        Args:
            frame: The ASGI event; may be shared, nobody changes it.
            size: Of its payload, in bytes.
            key: Under the policy `latest`, a frame that waits is replaced by a newer one of the same key.

        Returns:
            False if the connection is gone, or not open yet.
        """
        if self.direct is not None:
            return self.step(frame)
        if self.state is not State.OPEN:
            return False
        if not self._keep(frame, size, key):
            return False
        if self._writer is None:
            self.left_behind()
        return True

    def close_soon(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection behind the frames that wait; never waits itself. Does nothing on one that is closing.

        Args:
            code: RFC 6455 7.4, or 4000-4999.
            reason: What does not fit into 123 bytes is cut off.
        """
        if self.state is not State.OPEN:
            return
        self.state = State.CLOSING
        self.closed_here = True
        self.close_code, self.close_reason = code, fitting(reason)
        self.websocket.application_state = WebSocketState.DISCONNECTED
        frame = {"type": "websocket.close", "code": code, "reason": self.close_reason}
        # In a timer's callback it is for the writer: uvicorn's `websockets` opens a timeout, which only tasks can.
        if self.direct is not None and asyncio.current_task() is not None:
            if self.step(frame) and self._writer is None:
                self.end(code, self.close_reason)
        else:
            if self._outbox is None:
                self._outbox = self._new_outbox()
            self._outbox.put_last(frame)
            if self._writer is None:
                self.left_behind()
        self.direct = None
        if self._deadline is not None:
            self._deadline.reschedule(self.crew.loop.time() + CLOSE_TIMEOUT)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close an open connection behind the frames that wait, and wait until it is closed.

        Takes a few seconds at most: a client that doesn't read is left to itself. Cancelling is safe: it closes.
        """
        self.close_soon(code, reason)
        if self.state is State.CLOSING:
            if self._ended is None:
                self._ended = self.crew.loop.create_future()
            serving = self._serving
            if serving is asyncio.current_task():
                self._serving = None  # `connect` closes, and goes on: its own close is no reason to interrupt it
            try:
                await asyncio.shield(self._ended)
            finally:
                self._serving = serving

    def step(self, frame: Frame) -> bool:
        """Begin the server's `send` by hand, where it is `direct`; what does not end at once becomes the writer."""
        direct = self.direct
        assert direct is not None
        try:
            rest = self.crew.begin(direct(frame))
        except Exception as error:
            self.lost(error)
            return False
        if rest is not None:
            self.left_behind(rest)
        return True

    def _go_direct(self) -> None:
        """Let frames go straight to the server from now on, if its `send` may be stepped."""
        if self.state is State.OPEN and self._is_steppable:
            self.direct = cast(Direct, self._send)

    @override
    def left_behind(self, rest: Awaitable[None] | None = None) -> None:
        """Start the writer, with the rest of a `send` that waits for the socket."""
        self.direct = None
        self._writer = self.crew.start(self._write_off(rest), self.context)

    async def _write_off(self, first: Awaitable[None] | None) -> None:
        """Write what waits until the outbox is empty."""
        try:
            async with asyncio.timeout(
                CLOSE_TIMEOUT if self.state is State.CLOSING else WRITE_TIMEOUT
            ) as self._deadline:
                if first is not None:
                    await first
                while self._outbox:
                    frame = self._outbox.pop()
                    self._make_room()
                    await self._send(frame)
                    if self.state is State.OPEN:
                        self._deadline.reschedule(self.crew.loop.time() + WRITE_TIMEOUT)
        except TimeoutError:
            self._deadline = None
            if self.state is State.OPEN:
                self._too_slow()
            self.end(self.close_code, self.close_reason)
        except Exception as error:
            self.lost(error)
        else:
            self._outbox = None
            if self.state is State.CLOSING:
                self.end(self.close_code, self.close_reason)
        finally:
            self._writer = self._deadline = None
            self._go_direct()
            self._make_room()

    def _keep(self, frame: Frame, size: int, key: Hashable) -> bool:
        """Put a frame into the outbox; False if that ended the connection."""
        if self._outbox is None:
            self._outbox = self._new_outbox()
        dropped = self._outbox.put(frame, size, key)
        if dropped is None:
            self._too_slow()
            return False
        if dropped:
            if self._dropped == 0:
                policy = self.limits.overflow
                logger.warning("dropping frames to a connection that reads too slowly (OVERFLOW=%r)", policy)
            self._dropped += dropped
            self.counters.outbox_dropped += dropped
        return True

    def _new_outbox(self) -> Outbox:
        return Outbox(self.limits.outbox_frames, self.limits.outbox_bytes, self.limits.overflow)

    def _too_slow(self) -> None:
        self.counters.too_slow += 1
        self.counters.outbox_dropped += len(self._outbox or ()) + 1
        logger.warning("closing a connection that reads too slowly: OUTBOX_FRAMES or OUTBOX_BYTES was reached")
        if self._outbox is not None:
            self._outbox.clear()
        self.close_soon(TOO_SLOW, "too slow")

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done() and not self.is_full:
            self._room.set_result(None)

    @override
    def lost(self, error: Exception) -> None:
        """The server would not take a frame: the client is gone, whatever the server calls it."""
        logger.debug("a frame could not be sent", exc_info=error)
        if self.state is State.CLOSING:
            self.end(self.close_code, self.close_reason)
        elif self.state is State.OPEN and self._is_read:
            self.state = State.CLOSING  # the disconnect that the server holds for us knows the code
            self.direct = None
        elif self.state is State.OPEN:
            self.end(1006)  # nobody would hear of that

    def end(self, code: int, reason: str = "") -> None:
        """Note that the connection is over: with this code, unless it was being closed with another."""
        if self.state is State.CLOSED:
            return
        if self.state is not State.CLOSING or self.close_code == 1006:
            self.close_code, self.close_reason = code, reason
        self.state = State.CLOSED
        self.direct = None
        self._outbox = None
        self._make_room()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if self._serving is not None and self._serving is not asyncio.current_task():
            self._interrupted = True
            self._serving.cancel()


def _take_none(envelope: Envelope) -> bool:
    return False


class _Interruptible:
    """See `Connection.interruptible`.

    The task is cancelled for that, and the cancellation ends with the block; one by others goes on outwards.
    """

    __slots__ = ("_connection", "_task")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = self._connection._serving = task
        self._connection._interrupted = False

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> bool:
        self._connection._serving = None
        if not self._connection._interrupted:
            return False
        return self._task.uncancel() == 0 and exc_type is asyncio.CancelledError


def fitting(reason: str) -> str:
    """As much of a close frame's reason as it can carry."""
    return reason.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore")
