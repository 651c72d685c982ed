"""The way to the broker and back, kept up.

A `Broadcast` forgives no two calls at a time, its listener dies or is cut off without a word, and it reconnects
nothing. So one task asks everything of it, one thing after another, and the link believes what it hears: it sends
itself a probe now and then. If that doesn't come back, the Broadcast is connected anew, with all subscriptions.

What goes through it is text: a message as `wire` writes it, or a part of one as `parts` writes it; in a broker that has
one channel for everything, with its address and a newline before it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from broadcaster import Event

from fastapi_channels._tasks import Crew, not_cancelled
from fastapi_channels.exceptions import InvalidMessage, LayerUnavailable, SettingsError
from fastapi_channels.layers.base import Health, closed
from fastapi_channels.layers.broadcaster.parts import LARGEST, Parts, parts_of
from fastapi_channels.layers.broadcaster.source import Source, is_connected
from fastapi_channels.layers.counters import Counters

__all__ = ["Link"]

logger = logging.getLogger("fastapi_channels")

#: How many messages of a group are delivered before the rest of the process has its turn.
BURST = 32

#: How long to wait before connecting again: at most this, twice as much after each try, in seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0

#: How long to wait for the first probe before it is sent again, twice as much each time, in seconds.
FIRST_ECHO = 0.05

#: By how many seconds a timer is so late that this process itself must have stood still.
LATE = 0.1

#: The errors of the brokers' packages, of which any may be missing, that say that the credentials are wrong.
WRONG_CREDENTIALS = {"AuthenticationError", "InvalidAuthorizationSpecificationError", "InvalidPasswordError"}

#: Called with an address and what has come to it.
Deliver = Callable[[str, str], None]

Call = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout` that gives a process which stood still a moment to see what has come meanwhile."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    async with asyncio.timeout(None) as limit:

        def is_up() -> None:
            now = loop.time()
            limit.reschedule(now + LATE / 2 if now - due > LATE else now)

        timer = loop.call_at(due, is_up)
        try:
            yield
        finally:
            timer.cancel()


class Request:
    """What is asked of the Broadcast, and what becomes of it.

    Attributes:
        calls: The calls to be made, one after another.
        done: Done when they have been; None if nobody waits for that.
        is_begun: Whether the broker may have got something of it.
    """

    __slots__ = ("calls", "done", "is_begun")

    def __init__(self, calls: Sequence[Call], done: asyncio.Future[None] | None) -> None:
        self.calls = calls
        self.done = done
        self.is_begun = False

    @property
    def is_over(self) -> bool:
        """Whether whoever waited for it has his answer, or waits no more."""
        return self.done is not None and self.done.done()

    def answer(self, error: Exception | None = None) -> None:
        """Tell who waits for it that it is done, or what went wrong."""
        if self.done is None or self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


@dataclass(frozen=True, slots=True)
class Subscription:
    """A channel of the broker that is listened to.

    Attributes:
        block: Closing it unsubscribes.
        reading: The task that takes what has come.
    """

    block: AsyncExitStack
    reading: asyncio.Task[None]


class Link:
    """The way to the broker and back, kept up from `open` until `close`.

    What is asked is carried out in order, one thing at a time. While the broker is away it waits, no longer than
    `timeout` seconds; when the broker has been away for longer than that, it fails at once. What was begun and failed
    is not done again.

    Args:
        source: Where the Broadcast comes from.
        base: What the names of its channels begin with.
        node: The name of this process in the broker.
        crew: Runs its tasks.
        timeout: How long the broker may take, in seconds.
        counters: Where gaps are counted.
    """

    def __init__(self, source: Source, base: str, node: str, crew: Crew, timeout: float, counters: Counters) -> None:
        self._source = source
        self._broker = source.broker
        self._broadcast = source.make(self._break)
        self._is_ours = not (source.is_given and is_connected(self._broadcast))
        self._is_connected = False
        self._base = base
        self._node = node
        self._crew = crew
        self._loop = crew.loop
        self._timeout = timeout
        self._counters = counters
        # What is to be heard, by address, and what is heard, by channel; these differ where there is one channel only.
        self._own: dict[str, Deliver] = {}
        self._wanted: dict[str, Deliver] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._parts = Parts()
        self._parted = 0
        # What is asked for, and how whatever is being waited for is interrupted while there is a connection.
        self._requests: deque[Request] = deque()
        self._has_work = asyncio.Event()
        self._broken: asyncio.Timeout | None = None
        self._reason: Exception | None = None
        # The probe that is under way, if it isn't empty.
        self._probe_address = f"{base}.probe.{node}"
        self._probe = ""
        self._probed_at = 0.0
        self._is_probe_due = False
        self._echo = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        # How it is; no error means that it is up.
        self._error: Exception | None = LayerUnavailable("no answer yet")
        self._latency: float | None = None
        self._down_since = self._loop.time()
        self._was_up = False
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # Opening and closing

    def open(self, heard: Deliver | None) -> None:
        """Begin to connect.

        Args:
            heard: Called with what is sent to this process. None to listen to nothing, ever.
        """
        if heard is not None:
            # The probe's comes second, for the sake of broadcaster's own Redis backend: it is deaf until a second one.
            self._own = {self.node_address(self._node): heard, self._probe_address: self._heard_probe}
            self._wanted.update(self._own)
        self._task = self._start(self._keep())

    async def connected(self) -> None:
        """Wait until it is up.

        Raises:
            LayerUnavailable: It takes longer than the timeout.
            SettingsError: The broker does not take the credentials.
        """
        try:
            async with _time_limit(self._timeout):
                while self._error is not None:
                    if type(self._error).__name__ in WRONG_CREDENTIALS:
                        told = self._told(self._error)
                        raise SettingsError(f"{self._source.shown}: the server does not take these credentials: {told}")
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise self._unavailable() from self._error

    async def close(self) -> None:
        """Unsubscribe and disconnect, also if the broker hangs; who waits gets LayerUnavailable."""
        self._closing.set()
        self._break(closed())
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=3 * self._timeout)
            self._task.cancel()  # only a backend that doesn't heed a timeout has kept it from ending
            await asyncio.wait({self._task}, timeout=self._timeout)
        for request in self._requests:
            request.answer(closed())
        self._requests.clear()

    def health(self) -> Health:
        """Whether the broker answers, and this process hears itself."""
        if self._error is None:
            return Health(ok=True, latency=self._latency)
        return Health(False, f"{self._source.shown}: {self._told(self._error)}", False, False, self._latency)

    # What can be asked

    def node_address(self, node: str) -> str:
        """The address of a process."""
        return f"{self._base}.node.{node}"

    async def publish(self, address: str, data: bytes) -> None:
        """Send a message to an address; of two, the first is sent first.

        Raises:
            InvalidMessage: It is too large.
            LayerUnavailable: The broker is away, or did not take it.
        """
        await self._ask([partial(self._send, address, text) for text in self._texts(data)])

    async def subscribe(self, address: str, deliver: Deliver) -> None:
        """Listen to an address until `unsubscribe`, also when the broker has been lost and is back.

        Raises:
            LayerUnavailable: The broker is away, or has not confirmed it; it is not listened to.
        """
        self._wanted[address] = deliver
        try:
            await self._ask([partial(self._hear, address)])
        except BaseException:
            self.unsubscribe(address)
            raise

    def unsubscribe(self, address: str) -> None:
        """Listen to an address no more."""
        self._wanted.pop(address, None)
        if self._broken is not None:  # else nothing is listened to
            self._add(Request([partial(self._unhear, address)], None))

    async def _ask(self, calls: Sequence[Call]) -> None:
        if self._error is not None and self._loop.time() - self._down_since > self._timeout:
            raise self._unavailable() from self._error
        done = self._loop.create_future()
        request = Request(calls, done)
        self._add(request)
        try:
            async with _time_limit(self._timeout):
                await done
        except TimeoutError:
            if self._error is None and not request.is_begun:
                before = f"no answer within {self._timeout:g} s to what was asked before"
                raise LayerUnavailable(f"{self._source.shown}: {before}") from None
            raise self._unavailable(maybe_sent=request.is_begun) from self._error

    def _add(self, request: Request) -> None:
        self._requests.append(request)
        self._has_work.set()

    # Keeping it up

    async def _keep(self) -> None:
        pause = FIRST_PAUSE
        while not self._closing.is_set():
            self._reason = None
            patience = 0.0
            try:
                async with asyncio.timeout(None) as self._broken:
                    await self._connect()
                    pause = FIRST_PAUSE
                    await self._work()
            except Exception as error:  # whatever it is, it is tried again
                if self._error is None and self._closing.is_set():
                    patience = self._timeout
                self._went_down(self._reason or error)
            finally:
                await self._let_go(patience)
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, pause)):
                    await self._closing.wait()
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _connect(self) -> None:
        if self._is_ours:
            await self._within(self._timeout, self._broadcast.connect())
            self._is_connected = True
        for address in self._own:
            await self._within(self._timeout, self._hear(address))
        await self._hear_oneself()
        for address in list(self._wanted):  # what changes meanwhile is asked for
            await self._within(self._timeout, self._hear(address))
        self._came_up()

    async def _work(self) -> None:
        """Do what is asked for, until that is interrupted."""
        while True:
            if self._is_probe_due:
                await self._send_probe()
            elif self._requests:
                await self._carry_out(self._requests.popleft())
            else:
                self._has_work.clear()
                await self._has_work.wait()

    async def _carry_out(self, request: Request) -> None:
        try:
            for call in request.calls:
                if request.is_over:
                    return
                request.is_begun = True
                await self._within(self._timeout, call())
        except BaseException as error:
            told = self._told(self._reason or error)
            unavailable = LayerUnavailable(f"{self._source.shown}: {told}", maybe_sent=True)
            unavailable.__cause__ = error
            request.answer(unavailable)
            if isinstance(error, TimeoutError) or not isinstance(error, Exception):
                raise
            # Either only this has failed, or all is lost: the probe will tell.
            self._is_probe_due = True
        else:
            request.answer()

    async def _let_go(self, patience: float) -> None:
        """Be connected no more, whatever state the Broadcast is in.

        Args:
            patience: How long the broker may take to hear that nothing is listened to any more, in seconds.
        """
        self._broken = None
        if self._timer is not None:
            self._timer.cancel()
        self._probe = ""
        self._is_probe_due = False
        deadline = self._loop.time() + patience
        readings = [subscription.reading for subscription in self._subscriptions.values()]
        for channel in list(self._subscriptions):
            # Past the deadline it still forgets the channel, and only tells nobody.
            with suppress(Exception):
                await self._within(deadline - self._loop.time(), self._end(channel))
        if readings:
            await asyncio.wait(readings)
        if self._is_connected:
            self._is_connected = False
            with suppress(Exception):  # such as that of its listener
                await self._within(self._timeout, self._broadcast.disconnect())
            self._broadcast = self._source.make(self._break)  # not every backend can be connected twice
        self._parts = Parts()
        self._requests = deque(request for request in self._requests if request.done and not request.is_over)

    def _came_up(self) -> None:
        if self._was_up:
            missed = "; messages to its groups may be lost to this process" if self._own else ""
            lasted = self._loop.time() - self._down_since
            logger.warning("%s: connected again after %.1f s%s", self._source.shown, lasted, missed)
        self._was_up = True
        self._error = None
        self._news.set()

    def _went_down(self, error: Exception) -> None:
        if self._error is None and not self._closing.is_set():
            self._down_since = self._loop.time()
            self._counters.gaps += bool(self._own)
            logger.warning("%s: connection lost: %s", self._source.shown, self._told(error))
        self._error = error
        self._news.set()

    def _break(self, reason: Exception) -> None:
        """Give the connection up, whatever is being waited for."""
        if self._broken is not None:
            self._reason = reason
            self._broken.reschedule(self._loop.time())
            self._broken = None

    # The probe

    async def _hear_oneself(self) -> None:
        """Wait until a probe has come back; the first may come too early for a broker that was just subscribed to."""
        pause = FIRST_ECHO
        self._echo.clear()
        while not self._echo.is_set():
            await self._send_probe()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._echo.wait()
            pause *= 2

    async def _send_probe(self) -> None:
        self._is_probe_due = False
        if not self._probe:
            self._probe = secrets.token_hex(6)
            self._probed_at = self._loop.time()
            self._in(self._timeout, self._overdue)
        await self._within(self._timeout, self._send(self._probe_address, self._probe))
        if not self._own:  # there it ends: nothing is listened to
            self._heard_probe(self._probe_address, self._probe)

    def _heard_probe(self, address: str, text: str) -> None:
        if self._probe and text == self._probe:
            self._probe = ""
            self._latency = self._loop.time() - self._probed_at
            self._in(self._timeout / 2, self._probe_again)
            self._echo.set()

    def _probe_again(self) -> None:
        self._is_probe_due = True
        self._has_work.set()

    def _overdue(self) -> None:
        # If this process itself has stood still, it may hear the probe in a moment.
        silence = LayerUnavailable(f"what this process sends itself does not come back within {self._timeout:g} s")
        self._in(self._timeout / 10, partial(self._break, silence))

    def _in(self, seconds: float, call: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, call)

    # What is sent, and what is heard

    def _texts(self, data: bytes) -> list[str]:
        if self._broker.largest is None or len(data) <= self._broker.largest:
            return [data.decode()]
        if len(data) > LARGEST:
            raise InvalidMessage(f"a message of {len(data)} bytes; this broker's have at most {LARGEST}")
        self._parted += 1
        return parts_of(data, self._broker.largest, self._node, self._parted)

    def _channel(self, address: str) -> str:
        return f"{self._base}.all" if self._broker.has_one_channel else address

    async def _send(self, address: str, text: str) -> None:
        if self._broker.has_one_channel:
            text = f"{address}\n{text}"
        await self._broadcast.publish(self._channel(address), text)

    async def _hear(self, address: str) -> None:
        channel = self._channel(address)
        if channel in self._subscriptions or address not in self._wanted:
            return
        block = AsyncExitStack()
        try:
            subscriber = await block.enter_async_context(self._broadcast.subscribe(channel))
        except KeyError as error:
            # broadcaster 0.3.1 stumbles when it cleans up; what went wrong before that is of interest.
            raise error.__context__ or error from None
        self._subscriptions[channel] = Subscription(block, self._start(self._read(channel, subscriber.get)))

    async def _unhear(self, address: str) -> None:
        if address in self._subscriptions and address not in self._wanted:
            await self._end(address)

    async def _end(self, channel: str) -> None:
        subscription = self._subscriptions.pop(channel)
        subscription.reading.cancel()
        await subscription.block.aclose()

    async def _read(self, channel: str, get: Callable[[], Awaitable[Event]]) -> None:
        while True:
            for _ in range(BURST):
                event = await get()
                try:
                    self._received(channel, event.message)
                except Exception:
                    logger.exception("a message could not be delivered")
            await asyncio.sleep(0)

    def _received(self, channel: str, message: Any) -> None:
        address, text = channel, message if isinstance(message, str) else ""  # a backend gives what it likes
        if self._broker.has_one_channel:
            address, _, text = text.partition("\n")
        deliver = self._wanted.get(address)
        if deliver is not None:
            whole = self._parts.add(address, text)
            if whole is not None:
                deliver(address, whole)

    # Small things

    async def _within(self, seconds: float, call: Awaitable[Any]) -> None:
        """Await what somebody else has written, which may hang, and be cancelled without us."""
        try:
            async with _time_limit(seconds):
                await call
        except asyncio.CancelledError as error:
            assert self._task is not None
            raise not_cancelled(error, self._task) from error
        if self._reason is not None:  # `wait_for` of Python 3.11 may swallow the interruption
            raise self._reason

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._crew.start(coroutine, self._crew.context())

    def _told(self, error: BaseException) -> str:
        if isinstance(error, (TimeoutError, asyncio.CancelledError)):
            return f"no answer within {self._timeout:g} s"
        return self._source.without_secrets(str(error) or type(error).__name__)

    def _unavailable(self, *, maybe_sent: bool = False) -> LayerUnavailable:
        told = f"no answer within {self._timeout:g} s" if self._error is None else self._told(self._error)
        return LayerUnavailable(f"{self._source.shown} can't be reached: {told}", maybe_sent=maybe_sent)
