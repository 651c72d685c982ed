"""The base of every layer: the channels and groups of this process, and how messages reach them.

A layer knows the sinks of its own process and who of them is in which group. A backend only carries messages between
processes; what comes in is handed to `_fan_out`, which gives each member the same envelope: no task, no queue and no
copy for a member. Membership is known here and nowhere else, so it can't expire and can't leak.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, KeysView
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar, final

from fastapi_channels._tasks import Crew, Lane, rest_of, run_blocking
from fastapi_channels.exceptions import ChannelFull, InvalidGroupName, LayerUnavailable
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.envelope import CLOSE, Envelope, Message, checked_close_code
from fastapi_channels.layers.inbox import Inbox
from fastapi_channels.layers.leases import Leases, MemoryLeases
from fastapi_channels.layers.limiter import Limiter, MemoryLimiter
from fastapi_channels.layers.names import checked_name
from fastapi_channels.layers.sink import Sink
from fastapi_channels.layers.users import DISCONNECT, USERS_GROUP, Close, Users

__all__ = ["ChannelLayer", "Health", "Receipt", "SyncChannelLayer"]

logger = logging.getLogger("fastapi_channels")

Result = TypeVar("Result")

#: Abandoned inboxes are looked for when there are this many of them, and again when there are twice as many.
SWEEP = 64

#: How many seconds an idempotency key is remembered.
REMEMBERED = 300.0

#: Told of each `group_send` before it is carried out: the group, the envelope, the channels left out.
Observer = Callable[[str, Envelope, Collection[str]], None]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a `group_send` came to.

    Attributes:
        offset: The message's number in the group's history; None without one.
        epoch: The identity of that history; None without one.
        duplicate: Whether its `idempotency_key` had been seen, so that nothing was sent.
    """

    offset: int | None = None
    epoch: str | None = None
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a layer can do its work at this moment; true as a bool if it can.

    Attributes:
        ok: Whether messages can be sent, and whether this process hears what is sent.
        detail: What is wrong, for the operator; empty if nothing is. It may name servers, never a password.
        can_send: Whether messages can be sent.
        can_receive: Whether this process hears what others send.
        latency: How many seconds the broker took to answer when it was last asked; None if there is nothing to ask.
    """

    ok: bool
    detail: str = ""
    can_send: bool = True
    can_receive: bool = True
    latency: float | None = None

    def __bool__(self) -> bool:
        return self.ok


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


@dataclass(slots=True)
class _Attached:
    sink: Sink
    groups: dict[str, None] = field(default_factory=dict)


class ChannelLayer(ABC):
    """Carries messages between channels; the base of every layer.

    An async context manager: entering opens it, leaving closes it. Its methods belong to the event loop it was opened
    on; `sync` has the blocking twins for every other thread.

    Args:
        capacity: How many messages the inbox of a channel holds.
        expiry: After how many seconds a message that nobody has handled is dropped. A membership never expires.

    Spec:
        The Channels layer specification, whose method names it keeps.
    """

    def __init__(self, *, capacity: int = 1000, expiry: float = 60.0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is at least 1, not {capacity}")
        if expiry <= 0:
            raise ValueError(f"expiry is more than 0 seconds, not {expiry}")
        self.capacity = capacity
        self.expiry = expiry
        self.counters = Counters()
        #: Each is told of every `group_send` of this process; for tests.
        self.observers: list[Observer] = []
        #: Whether it hears what other processes send; a Publisher's doesn't. Only to be changed before it is opened.
        self.listens = True
        #: Whether there are other processes that could hear what it sends.
        self.reaches_others = True
        self._node = ""
        self._next_channel = 0
        self._sweep_at = SWEEP
        self._attached: dict[str, _Attached] = {}
        self._groups: dict[str, dict[str, Sink]] = {}
        self._subscribed: set[str] = set()
        self._turns: dict[str, _Turn] = {}
        self._users = Users()
        self._users_channel = ""
        self._watching: asyncio.Task[None] | None = None
        self._is_ready = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._crew: Crew | None = None
        self._opening: asyncio.Future[None] | None = None
        self._changing: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    # Opening and closing

    @property
    def is_open(self) -> bool:
        """Whether it can carry messages on the running event loop."""
        return self._is_ready and self._loop is asyncio.get_running_loop()

    @property
    def is_running(self) -> bool:
        """Whether it is open on an event loop that runs; to be asked from any thread."""
        return self._is_ready and self._loop is not None and self._loop.is_running()

    async def open(self) -> None:
        """Make it ready on the running event loop; does nothing if it is. Several may call it at once.

        Raises:
            LayerUnavailable: Its broker can't be reached.
            SettingsError: Its broker does not take the credentials.
        """
        loop = asyncio.get_running_loop()
        while not self.is_open:
            if self._opening is not None and self._opening.get_loop() is loop:
                await asyncio.shield(self._opening)
                continue
            opening = self._opening = loop.create_future()
            try:
                async with self._lock_of(loop):
                    await self._open(loop)
            except Exception as error:
                opening.set_exception(error)  # for who waits for the same
                opening.exception()
                raise
            finally:
                self._opening = None
                if not opening.done():
                    opening.set_result(None)

    async def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None:
            self._abandon()
        self._loop = loop
        self._crew = Crew(loop)
        # Not earlier: a server may load the application first and fork its workers then.
        self._node = secrets.token_hex(6)
        try:
            await self._connect()
        except BaseException:
            await self._let_go()
            raise
        self._is_ready = True

    async def close(self) -> None:
        """Let go of everything; afterwards it takes no message until it is opened again."""
        async with self._lock_of(asyncio.get_running_loop()):
            await self._let_go()

    async def _let_go(self) -> None:
        self._is_ready = False
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        for attached in self._attached.values():
            if isinstance(attached.sink, Inbox):
                attached.sink.end(closed())
        self._attached.clear()
        self._groups.clear()
        self._subscribed.clear()
        self._turns.clear()
        self._forget_users()
        try:
            await self._disconnect()
        finally:
            self._loop = None

    def _abandon(self) -> None:
        """Forget what belongs to an event loop that has ended without the layer being closed, and touch none of it."""
        self._is_ready = False
        self._watching = None
        self._attached.clear()
        self._groups.clear()
        self._subscribed.clear()
        self._turns.clear()
        self._forget_users()

    def _lock_of(self, loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
        """Held while it opens or closes."""
        if self._changing is None or self._changing[0] is not loop:
            self._changing = loop, asyncio.Lock()
        return self._changing[1]

    async def health(self) -> Health:
        """Whether it can do its work; answers at once, from what it knows."""
        return Health(ok=True) if self.is_open else Health(False, "the channel layer is not open", False, False)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def close_consumers_after(self, grace: float) -> None:
        """Close every consumer with 4010 whenever the layer has not been healthy for `grace` seconds, until it closes.

        Spec:
            protocol.md, 3 (close codes).
        """
        if self._watching is None:
            self._watching = self.crew.start(self._close_the_cut_off(grace), copy_context())

    async def _close_the_cut_off(self, grace: float) -> None:
        lost_at = None
        while True:
            await asyncio.sleep(min(1.0, grace / 4))
            now = self._now()
            if await self.health():
                lost_at = None
            elif lost_at is None:
                lost_at = now
            elif now - lost_at >= grace:
                close = {"type": CLOSE, "code": 4010, "reason": "cut off from the other processes"}
                envelope = self._envelope(close)
                for attached in list(self._attached.values()):
                    if not isinstance(attached.sink, Inbox):
                        attached.sink.deliver(envelope)

    def new_limiter(self) -> Limiter:
        """What counts for throttles: for all processes that share its broker, or for this one."""
        return MemoryLimiter()

    def new_leases(self) -> Leases:
        """What counts connections: those of all processes that share its broker, or of this one."""
        return MemoryLeases()

    @property
    def crew(self) -> Crew:
        """Who handles the messages and frames of this layer's consumers.

        Raises:
            LayerUnavailable: The layer is not open.
        """
        if self._crew is None:
            raise closed()
        return self._crew

    @property
    def sync(self) -> SyncChannelLayer:
        """The blocking twins of this layer's methods, for plain `def` views and other threads."""
        return SyncChannelLayer(self)

    # Channels

    async def new_channel(self, prefix: str = "specific") -> str:
        """Make a channel whose messages are read with `receive`, and return its name: `<prefix>.<node>!<id>`.

        It lives until it has been empty, unread and in no group for as long as `expiry`.
        """
        if len(self._attached) >= self._sweep_at:
            self._drop_abandoned()
            self._sweep_at = max(SWEEP, 2 * len(self._attached))
        return self.attach(_Mailbox(self, self._now() + self.expiry), prefix)

    def attach(self, sink: Sink, prefix: str = "specific") -> str:
        """Give `sink` a channel of this process, and return its name. The caller has to `detach` it."""
        if "!" in prefix:
            raise InvalidGroupName("the prefix of a channel name can't hold !")
        self._next_channel += 1
        name = checked_name(f"{prefix}.{self._node}!{self._next_channel:x}")
        self._attached[name] = _Attached(sink)
        return name

    async def detach(self, channel: str) -> None:
        """End a channel and all its memberships; does nothing if there is none of that name."""
        attached = self._attached.pop(channel, None)
        if attached is not None:
            if isinstance(attached.sink, Inbox):
                attached.sink.end(_no_channel(channel))
            for group in list(attached.groups):
                await self._leave(group, channel)
            attached.groups.clear()

    def groups_of(self, channel: str) -> KeysView[str]:
        """The groups that a channel of this process is in, as a live view."""
        return self._member(channel).groups.keys()

    @final
    async def send(self, channel: str, message: Message) -> None:
        """Send a message to one channel.

        Messages of one sender arrive in the order in which they were sent.

        Raises:
            ChannelFull: Its inbox has no room; the message was not taken.
            InvalidGroupName: Not a channel name.
            InvalidMessage: No `type`, or not for JSON.
            LayerUnavailable: The layer is closed.
        """
        checked_name(channel)
        envelope = self._envelope(message)
        if "!" not in channel:
            await self._enqueue(channel, envelope)
        elif self._is_local(channel):
            attached = self._attached.get(channel)
            if attached is None:
                self.counters.unreachable += 1
            elif not attached.sink.deliver(envelope):
                raise ChannelFull(channel)
        else:
            await self._send_to_node(channel, envelope)

    @final
    async def receive(self, channel: str) -> dict[str, Any]:
        """The oldest message of a channel; waits for one. Each message is handed to exactly one reader.

        Cancelling is safe: no message is lost.

        Raises:
            ValueError: The channel is another process's, belongs to a consumer, or is no more.
        """
        self._now()
        if "!" not in checked_name(channel):
            envelope = await self._dequeue(channel)
        else:
            mailbox = self._member(channel).sink
            if not isinstance(mailbox, _Mailbox):
                raise ValueError(f"the messages of {channel!r} are a consumer's")
            envelope = await mailbox.receive()
            mailbox.keep_until = self._now() + self.expiry
        return envelope.decode()

    # Groups

    @final
    async def group_add(self, group: str, channel: str) -> None:
        """Put a channel of this process into a group; again is the same as once.

        When it returns, the channel gets every message sent to the group from then on.

        Raises:
            InvalidGroupName: Not a group name.
            ValueError: The channel is not one of this process's.
        """
        await self._join(checked_name(group), channel)

    async def _join(self, group: str, channel: str) -> None:
        self._now()
        member = self._member(channel)
        if group in member.groups:
            return
        if group in self._groups:
            self._groups[group][channel] = member.sink
            member.groups[group] = None
            return
        async with self._turn_of(group):
            if group not in self._subscribed:
                await self._subscribe(group)
                self._subscribed.add(group)
            if self._attached.get(channel) is member:  # it may have ended meanwhile
                self._groups.setdefault(group, {})[channel] = member.sink
                member.groups[group] = None
            else:
                await self._subscribe_no_more(group)

    @final
    async def group_discard(self, group: str, channel: str) -> None:
        """Take a channel out of a group; does nothing if it isn't in it."""
        attached = self._attached.get(channel)
        if attached is not None and group in attached.groups:
            del attached.groups[group]
            await self._leave(group, channel)

    @final
    async def group_send(
        self, group: str, message: Message, *, exclude: Collection[str] = (), idempotency_key: str | None = None
    ) -> Receipt:
        """Send a message to every channel of a group, except those in `exclude`.

        Messages of one sender to one group arrive in the order in which they were sent. A member whose inbox is full
        doesn't get it, which is counted (`counters`); it holds up nobody.

        Args:
            group: The group's name; a group that nobody is in is no error.
            message: A dict with a `type`, or a pydantic model that has one.
            exclude: Names of channels.
            idempotency_key: The same key again for the same group within five minutes sends nothing.

        Raises:
            InvalidGroupName: Not a group name.
            InvalidMessage: No `type`, or not for JSON; nothing was sent.
            LayerUnavailable: The layer is closed, or its broker can't be reached.
        """
        checked_name(group)
        if isinstance(exclude, str):
            raise TypeError("exclude is a collection of channel names, not one name")
        envelope = self._envelope(message)
        for observe in self.observers:
            observe(group, envelope, exclude)
        return await self._publish(group, envelope, exclude, idempotency_key)

    async def flush(self) -> None:
        """Drop every message and membership; consumers stay attached to their channels."""
        for channel, attached in list(self._attached.items()):
            for group in list(attached.groups if channel != self._users_channel else ()):
                await self.group_discard(group, channel)
            if isinstance(attached.sink, _Mailbox):
                await self.detach(channel)

    # Users

    async def user_add(self, user_id: str, channel: str, close: Close) -> None:
        """Note whose connection a channel is; when it returns, `disconnect_user` reaches it from every process.

        Args:
            user_id: Whose.
            channel: Its name.
            close: Closes the connection, with a code and a reason.

        Raises:
            LayerUnavailable: The broker is away, and this process doesn't hear of users yet.
        """
        if not self._users_channel:
            self._users_channel = self.attach(self._users)
        await self._join(USERS_GROUP, self._users_channel)
        self._users.add(user_id, channel, close)

    def user_discard(self, user_id: str, channel: str) -> None:
        """Forget whose connection a channel is."""
        self._users.discard(user_id, channel)

    @final
    async def disconnect_user(self, user_id: str, code: int = 4503, reason: str = "") -> None:
        """Close every connection of a user to consumers on this layer, in every process.

        What keeps the user from coming back is the application's: tell whoever asks for permission first, and
        disconnect then.

        Args:
            user_id: As `str(user.id)`, or as the consumer's `user_id()` says.
            code: RFC 6455 7.4, or 3000-4999.
            reason: What does not fit into 123 bytes is cut off.

        Raises:
            ValueError: Nobody may close with that code.
            LayerUnavailable: The layer is closed, or its broker can't be reached.
        """
        order = {"type": DISCONNECT, "user": str(user_id), "code": checked_close_code(code), "reason": reason}
        await self._publish(USERS_GROUP, self._envelope(order), (), None)

    def _forget_users(self) -> None:
        self._users_channel = ""
        self._users.clear()

    # What a backend carries

    @abstractmethod
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        """Bring the envelope to `_fan_out` in every process that has members of the group."""

    @abstractmethod
    async def _enqueue(self, name: str, envelope: Envelope) -> None:
        """Put a message into the named queue that all processes share; ChannelFull if it has no room."""

    @abstractmethod
    async def _dequeue(self, name: str) -> Envelope:
        """The oldest message of a named queue; waits for one, and loses none when it is cancelled."""

    async def _connect(self) -> None:
        """Connect to the broker."""

    async def _disconnect(self) -> None:
        """Let go of the broker; called also when `_connect` has failed, or was never called."""

    async def _send_to_node(self, channel: str, envelope: Envelope) -> None:
        """Bring the envelope to a channel of another process; without a broker there is none."""
        self.counters.unreachable += 1

    async def _subscribe(self, group: str) -> None:
        """The group gets its first member in this process."""

    async def _unsubscribe(self, group: str) -> None:
        """The group has lost its last member in this process; raises nothing, whatever the broker does."""

    # Local delivery

    def _deliver_here(self, channel: str, envelope: Envelope) -> None:
        """Hand an envelope that another process sent to a channel of this one; what can't be is counted."""
        attached = self._attached.get(channel)
        if attached is None:
            self.counters.unreachable += 1
        elif not attached.sink.deliver(envelope):
            self.counters.inbox_dropped += 1

    def _fan_out(self, group: str, envelope: Envelope, exclude: Collection[str]) -> None:
        """Hand an envelope to every member in this process, without waiting for any.

        One coroutine awaits the members' `direct` one after another, and is stepped by hand here. Where one waits, the
        coroutine stays behind as the rest of that call, and another goes on with the members after it. Those that
        handle the message in a lane get it from the crew, all at once.
        """
        members = self._groups.get(group)
        if not members:
            return
        if exclude:
            sinks = iter([sink for channel, sink in members.items() if channel not in exclude])
        else:
            sinks = iter(list(members.values()))
        at: list[Any] = [None]
        lanes: list[Lane[Envelope]] = []
        while True:
            handing_out = self._hand_out(sinks, envelope, at, lanes)
            try:
                waits_for = handing_out.send(None)
            except StopIteration:
                break
            at[0].left_behind(rest_of(handing_out, waits_for))
        if lanes:
            self.crew.dispatch(envelope, lanes)

    async def _hand_out(
        self, sinks: Iterator[Sink], envelope: Envelope, at: list[Any], lanes: list[Lane[Envelope]]
    ) -> None:
        """Hand an envelope to the sinks, or add their lanes to `lanes`; in `at` is whose `direct` is under way."""
        kind, frame = envelope.type, envelope.frame
        is_busy = self.crew.is_busy
        for sink in sinks:
            lane = sink.lane
            if sink.forwards.get(kind):
                direct = sink.direct
                # Only while nothing that came before it is still to be handled.
                if direct is not None and (lane is None or not (is_busy or lane.is_active)):
                    at[0] = sink
                    try:
                        await direct(frame)
                    except Exception as error:
                        sink.lost(error)
                    continue
            if lane is not None:
                lanes.append(lane)
            elif not sink.deliver(envelope):
                self.counters.inbox_dropped += 1

    def _envelope(self, message: Message) -> Envelope:
        return Envelope.of(message, self._now() + self.expiry)

    def _now(self) -> float:
        if not self._is_ready or self._loop is None:
            raise closed()
        return self._loop.time()

    def _is_local(self, channel: str) -> bool:
        return channel.partition("!")[0].endswith(f".{self._node}")

    def _member(self, channel: str) -> _Attached:
        attached = self._attached.get(channel)
        if attached is None:
            raise _no_channel(channel)
        return attached

    async def _leave(self, group: str, channel: str) -> None:
        members = self._groups[group]
        members.pop(channel, None)
        if not members:
            del self._groups[group]
            async with self._turn_of(group):
                await self._subscribe_no_more(group)

    @asynccontextmanager
    async def _turn_of(self, group: str) -> AsyncIterator[None]:
        """Change the subscription of a group; one at a time, so that the last change is what counts."""
        turn = self._turns.setdefault(group, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users and self._turns.get(group) is turn:
                del self._turns[group]

    async def _subscribe_no_more(self, group: str) -> None:
        if group not in self._groups and group in self._subscribed:
            self._subscribed.discard(group)
            await self._unsubscribe(group)

    def _drop_abandoned(self) -> None:
        now = self._now()
        for name, attached in list(self._attached.items()):
            sink = attached.sink
            if isinstance(sink, _Mailbox) and sink.keep_until <= now and sink.is_idle and not attached.groups:
                del self._attached[name]


def _no_channel(channel: str) -> ValueError:
    return ValueError(f"{channel!r} is not a channel of this process")


def closed() -> LayerUnavailable:
    """What a call to a layer that is not open raises."""
    return LayerUnavailable("the channel layer is not open")


class _Mailbox(Inbox):
    """The inbox of a channel made by `new_channel`.

    Args:
        layer: Whose capacity and counters it has.
        keep_until: Before when it is not abandoned, on the event loop's clock.
    """

    def __init__(self, layer: ChannelLayer, keep_until: float) -> None:
        super().__init__(layer.capacity, layer.counters)
        self.keep_until = keep_until


class SyncChannelLayer:
    """The blocking twins of a layer's methods, for threads other than the event loop's.

    Each waits until the event loop has carried out the call, and raises what it raised. Thread-safe; messages of one
    thread keep their order.
    """

    def __init__(self, layer: ChannelLayer) -> None:
        self._layer = layer

    def send(self, channel: str, message: Message) -> None:
        """See `ChannelLayer.send`."""
        self._run(lambda: self._layer.send(channel, message))

    def receive(self, channel: str) -> dict[str, Any]:
        """See `ChannelLayer.receive`."""
        return self._run(lambda: self._layer.receive(channel))

    def new_channel(self, prefix: str = "specific") -> str:
        """See `ChannelLayer.new_channel`."""
        return self._run(lambda: self._layer.new_channel(prefix))

    def group_add(self, group: str, channel: str) -> None:
        """See `ChannelLayer.group_add`."""
        self._run(lambda: self._layer.group_add(group, channel))

    def group_discard(self, group: str, channel: str) -> None:
        """See `ChannelLayer.group_discard`."""
        self._run(lambda: self._layer.group_discard(group, channel))

    def group_send(
        self, group: str, message: Message, *, exclude: Collection[str] = (), idempotency_key: str | None = None
    ) -> Receipt:
        """See `ChannelLayer.group_send`."""
        return self._run(
            lambda: self._layer.group_send(group, message, exclude=exclude, idempotency_key=idempotency_key)
        )

    def disconnect_user(self, user_id: str, code: int = 4503, reason: str = "") -> None:
        """See `ChannelLayer.disconnect_user`."""
        self._run(lambda: self._layer.disconnect_user(user_id, code, reason))

    def flush(self) -> None:
        """See `ChannelLayer.flush`."""
        self._run(self._layer.flush)

    def _run(self, call: Callable[[], Awaitable[Result]]) -> Result:
        loop = self._layer._loop
        if loop is None:
            raise closed()

        async def called() -> Result:
            return await call()

        return run_blocking(loop, called())
