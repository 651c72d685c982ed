"""One connection to one server that is kept up: asked in order, answered in order, watched, and made anew when lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, ReadOnlyError, RedisError, ResponseError
from typing_extensions import override

from fastapi_channels._tasks import Crew
from fastapi_channels.exceptions import LayerUnavailable

Command = tuple[str | bytes | int, ...]

try:
    from hiredis import pack_command as _pack_command
except ImportError:
    pack_command: Callable[[Command], bytes] | None = None
else:
    pack_command = cast(Callable[[Command], bytes], _pack_command)

__all__ = ["Asked", "CommandLink", "Link", "Request", "SubscriberLink"]

logger = logging.getLogger("fastapi_channels")

#: How many replies are read before the rest of the process has its turn.
BURST = 32

#: How many bytes go out in one write.
BATCH_BYTES = 256 * 1024

#: How many bytes may wait to be written; more than that is refused at once.
WAITING_BYTES = 64 * 1024 * 1024

#: How long to wait before the connection is tried again: at most this, twice as much after each try, in seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0

#: By how many seconds a timer is so late that the event loop must have been blocked.
LATE = 0.1

#: How many seconds a connection has to be closed properly.
GOODBYE = 1.0


class Request:
    """A command, and what becomes of it.

    Attributes:
        key: The key or Pub/Sub channel that it is about, by which a Cluster's server is chosen; None for any.
        command: The command with its arguments.
        reply: What the server answered, or the error.
        expires: When the sender has waited long enough, on the event loop's clock.
        is_asked: Whether it is carried out by a server that doesn't have the key's slot yet, as ASK says.
    """

    __slots__ = ("command", "expires", "is_asked", "key", "reply", "size")

    def __init__(self, key: str | None, command: Command, reply: asyncio.Future[Any], expires: float) -> None:
        self.key = key
        self.command = command
        self.reply = reply
        self.expires = expires
        self.is_asked = False
        self.size = 0
        for part in command:
            if type(part) is bytes:
                self.size += len(part)

    def answer(self, reply: Any) -> None:
        """Give the reply, or the error, to who waits for it."""
        if self.reply.done():
            return
        if isinstance(reply, Exception):
            self.reply.set_exception(reply)
            self.reply.exception()  # whoever stopped waiting for it isn't told by the event loop either
        else:
            self.reply.set_result(reply)


@dataclass(frozen=True, slots=True)
class Asked:
    """The reply of a server that doesn't have the key's slot yet; nobody is subscribed there."""

    reply: Any


class Link(ABC):
    """A connection to one server, kept up until it is closed.

    Commands are written in the order in which they are asked, all that wait in one write, and replies come in the same
    order. While there is no connection they wait for one, no longer than `timeout` seconds; when it has been away for
    longer than that, they fail at once. A command that was written and got no reply is not written again.

    A server that doesn't answer within `timeout` seconds, though it was asked or was sent a PING, counts as gone.

    Args:
        name: The server, for people to read.
        connect: Makes a connection, which isn't connected yet.
        crew: Runs its task.
        timeout: In seconds.
        changed: Called when it has come up or gone down.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], AbstractConnection],
        crew: Crew,
        timeout: float,
        changed: Callable[[Link], None],
    ) -> None:
        self.name = name
        self.timeout = timeout
        #: Why it is down; None while it is up.
        self.error: Exception | None = LayerUnavailable("not connected yet")
        #: How long the server took for its last answer to a PING, in seconds.
        self.latency: float | None = None
        #: What the server's clock is ahead of the event loop's, in seconds.
        self.clock = 0.0
        #: Nothing is written while this is True.
        self.is_held = False
        self._connect = connect
        self._crew = crew
        self._loop = crew.loop
        self._changed = changed
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = 0
        self._written: deque[Request] = deque()
        self._is_answered = asyncio.Event()
        self._connection: AbstractConnection | None = None
        self._broken: asyncio.Timeout | None = None
        self._is_closing = False
        self._is_given_up = False
        self._is_writing = False
        self._writing: asyncio.Task[None] | None = None
        self._down_since = self._loop.time()
        self._heard = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._task = crew.start(self._keep(), copy_context())

    @property
    def is_up(self) -> bool:
        """Whether it is connected to a server that answers."""
        return self._connection is not None

    @property
    def is_new(self) -> bool:
        """Whether it has never been up, and has had no time for it."""
        return not self._heard and self._loop.time() - self._down_since < self.timeout

    def set_clock(self, now: float) -> None:
        """Take note of the time on the server, in seconds since the epoch."""
        self.clock = now - self._loop.time()

    def ask(self, *command: str | bytes | int) -> asyncio.Future[Any]:
        """Send a command; the future gets the reply, an error of redis-py, or LayerUnavailable."""
        request = Request(None, command, self._loop.create_future(), self._loop.time() + self.timeout)
        self.send(request)
        return request.reply

    def tell(self, *command: str | bytes | int) -> None:
        """Send a command whose reply nobody waits for."""
        self.send(Request(None, command, self._loop.create_future(), self._loop.time() + self.timeout))

    def send(self, request: Request) -> None:
        """Send a request behind the others."""
        if self._connection is None and self._loop.time() - self._down_since > self.timeout:
            request.answer(self._unavailable())
        elif self._waiting_bytes + request.size > WAITING_BYTES and self._waiting:
            request.answer(LayerUnavailable(f"{self.name}: too much waits to be sent"))
        else:
            self._waiting.append(request)
            self._waiting_bytes += request.size
            self._watch(request)
            self.go_on()

    def go_on(self) -> None:
        """Write what waits, soon."""
        if self._waiting and self._may_write and not self._is_writing:
            self._is_writing = True
            # Not at once: what else is sent in this turn of the loop goes out with it.
            self._loop.call_soon(self._begin_to_write)

    @property
    def _may_write(self) -> bool:
        return self._connection is not None and not self._is_given_up and not self.is_held

    def withdraw(self) -> list[Request]:
        """Take back what was not written yet, in order."""
        requests = list(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        return requests

    async def answered(self) -> None:
        """Wait until all that was written has its answer, or the connection is lost."""
        while self._written:
            self._is_answered.clear()
            await self._is_answered.wait()

    async def close(self) -> None:
        """Disconnect; whoever still waits gets LayerUnavailable."""
        self._is_closing = True
        self._task.cancel()
        await asyncio.wait({self._task})
        self._went_down(closed := LayerUnavailable("the channel layer was closed"))
        for request in self.withdraw():
            request.answer(closed)
        for timer in (self._deadline, self._beat):
            if timer is not None:
                timer.cancel()

    @abstractmethod
    def _received(self, reply: Any) -> None:
        """See to what the server has sent; an error is an exception."""

    def _oldest(self) -> Request:
        """The request that the next reply is for."""
        request = self._written.popleft()
        if not self._written:
            self._is_answered.set()
        return request

    # Keeping it up

    async def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            connection: AbstractConnection | None = None
            try:
                async with asyncio.timeout(self.timeout):
                    connection = self._connect()
                    await connection.connect()  # type: ignore[no-untyped-call]
                    # A frozen server's kernel connects too, and one that is loading its data answers all but PING.
                    await connection.send_command("PING", check_health=False)
                    await connection.read_response()
                    await connection.send_command("TIME", check_health=False)
                    now: Any = await connection.read_response()
                    seconds, microseconds = now
                    self.set_clock(int(seconds) + int(microseconds) / 1e6)
            except Exception as error:  # whatever it is, it is tried again
                self.error = error
            else:
                pause = FIRST_PAUSE
                self._came_up(connection)
                self._went_down(await self._serve(connection))
            finally:
                if connection is not None:
                    await self._disconnect(connection)
            self._changed(self)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _disconnect(self, connection: AbstractConnection) -> None:
        with contextlib.suppress(RedisError, OSError):  # it is gone either way
            async with asyncio.timeout(GOODBYE):
                await connection.disconnect(nowait=not self._is_closing)  # TLS takes its leave

    async def _serve(self, connection: AbstractConnection) -> Exception:
        """Read what the server sends until the connection is lost; returns why it was."""
        try:
            async with asyncio.timeout(None) as self._broken:
                while True:
                    for _ in range(BURST):
                        try:
                            reply = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
                        except ResponseError as error:
                            reply = error
                        self._heard = self._loop.time()
                        self._received(reply)
                    await asyncio.sleep(0)
        except TimeoutError:
            return LayerUnavailable(f"no answer within {self.timeout:g} s")
        except (RedisError, OSError) as error:
            return error
        except Exception as error:
            logger.exception("the connection to %s failed; it is made anew", self.name)
            return error
        finally:
            self._broken = None

    def _came_up(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._is_given_up = False
        self.error = None
        self._heard = self._loop.time()
        self._beat = self._loop.call_later(self.timeout / 4, self._keep_alive)
        self._changed(self)
        self.go_on()

    def _went_down(self, error: Exception) -> None:
        if self._connection is not None:
            self._connection = None
            self._down_since = self._loop.time()
        self.error = error
        if self._beat is not None:
            self._beat.cancel()
        if self._writing is not None:
            self._writing.cancel()  # it may wait for a server that reads nothing any more
            self._writing = None
        self._is_writing = False
        written = list(self._written)
        self._written.clear()
        self._is_answered.set()
        for request in written:
            request.answer(self._unavailable(maybe_sent=True))

    def _break(self) -> None:
        """Give the connection up."""
        if self._broken is not None and not self._is_given_up:
            self._is_given_up = True
            self._broken.reschedule(self._loop.time())

    def _unavailable(self, *, maybe_sent: bool = False) -> LayerUnavailable:
        unavailable = LayerUnavailable(f"{self.name} can't be reached: {self.error}", maybe_sent=maybe_sent)
        unavailable.__cause__ = self.error
        return unavailable

    # Writing

    def _begin_to_write(self) -> None:
        rest = self._crew.begin(self._write())
        if rest is not None:

            async def finish() -> None:
                await rest

            self._writing = self._crew.start(finish(), copy_context())

    async def _write(self) -> None:
        connection = self._connection
        try:
            while self._waiting and connection is not None and connection is self._connection and self._may_write:
                batch = []
                size = 0
                while self._waiting and size < BATCH_BYTES:
                    request = self._waiting.popleft()
                    self._waiting_bytes -= request.size
                    if not request.reply.done():  # nobody cancelled it, it isn't overdue
                        self._written.append(request)
                        batch.append(request.command)
                        size += request.size
                if batch:
                    await connection.send_packed_command(_packed(connection, batch), check_health=False)
        except (RedisError, OSError, RuntimeError):
            if connection is self._connection:
                self._break()
        if connection is self._connection:
            self._is_writing = False
            self._writing = None
            self.go_on()

    # Watching

    def _watch(self, request: Request) -> None:
        """See to it that the request doesn't wait longer than it may."""
        if self._deadline is not None:
            if self._deadline.when() <= request.expires:
                return
            self._deadline.cancel()
        self._deadline = self._loop.call_at(request.expires, self._look_at_the_clock, request.expires)

    def _look_at_the_clock(self, due: float) -> None:
        self._deadline = None
        now = self._loop.time()
        if now - due > LATE:
            # This process itself stood still: first it reads what has been answered meanwhile.
            self._deadline = self._loop.call_later(LATE / 2, self._look_at_the_clock, math.inf)
            return
        is_overdue = False
        for request in self._written:
            if request.expires > now:
                break
            is_overdue = is_overdue or not request.reply.done()
            request.answer(LayerUnavailable(f"{self.name}: no answer within {self.timeout:g} s", maybe_sent=True))
        if is_overdue and now - self._heard > self.timeout / 2:
            self._break()
        while self._waiting and self._waiting[0].expires <= now:
            request = self._waiting.popleft()
            self._waiting_bytes -= request.size
            request.answer(self._unavailable())
        for request in (*self._written, *self._waiting):
            if not request.reply.done():
                self._watch(request)
                break

    def _keep_alive(self) -> None:
        """Ask a server that has been silent whether it is there; so that nobody on the way forgets the connection."""
        self._beat = self._loop.call_later(self.timeout / 4, self._keep_alive)
        now = self._loop.time()
        if now - self._heard >= self.timeout / 4 and not (self._written or self._waiting or self.is_held):
            request = Request(None, ("PING",), self._loop.create_future(), now + self.timeout / 2)
            request.reply.add_done_callback(partial(self._measured, time.perf_counter()))
            self.send(request)

    def _measured(self, asked: float, reply: asyncio.Future[Any]) -> None:
        if not reply.cancelled() and reply.exception() is None:
            self.latency = time.perf_counter() - asked  # uvloop's clock has milliseconds


def _packed(connection: AbstractConnection, commands: list[Command]) -> list[bytes]:
    """The commands in RESP, by hiredis if it is there, which takes a tenth of the time."""
    if pack_command is None:
        return connection.pack_commands(commands)
    return [b"".join([pack_command(command) for command in commands])]


class CommandLink(Link):
    """The connection that publishes, and whatever else is asked of a server.

    Args:
        redirected: Called with a request that another server of the Cluster has to carry out.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], AbstractConnection],
        crew: Crew,
        timeout: float,
        changed: Callable[[Link], None],
        redirected: Callable[[CommandLink, Request, AskError], None],
    ) -> None:
        super().__init__(name, connect, crew, timeout, changed)
        self._redirected = redirected

    @override
    def _received(self, reply: Any) -> None:
        request = self._oldest()
        if isinstance(reply, AskError) and not request.reply.done():
            self._redirected(self, request, reply)
            return
        request.answer(Asked(reply) if request.is_asked and not isinstance(reply, Exception) else reply)
        if isinstance(reply, ReadOnlyError):
            self._break()  # it was the primary once; whoever is now is found by connecting anew


class SubscriberLink(Link):
    """The connection that subscribes.

    Args:
        deliver: Called with a Pub/Sub channel and what was published there.
        revoked: Called with a Pub/Sub channel that has moved to another server.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], AbstractConnection],
        crew: Crew,
        timeout: float,
        changed: Callable[[Link], None],
        deliver: Callable[[bytes, bytes], None],
        revoked: Callable[[bytes], None],
    ) -> None:
        super().__init__(name, connect, crew, timeout, changed)
        #: Whether what this process wants to hear from it is being asked for.
        self.is_restoring = False
        self._deliver = deliver
        self._revoked = revoked

    @override
    def _received(self, reply: Any) -> None:
        kind = reply[0] if type(reply) is list else None
        if kind in (b"message", b"smessage"):
            self._deliver(reply[1], reply[2])
        elif kind == b"sunsubscribe" and not self._has_asked_for(reply[1]):
            self._revoked(reply[1])
        else:
            self._oldest().answer(reply)

    def _has_asked_for(self, channel: bytes) -> bool:
        if not self._written:
            return False
        command = self._written[0].command
        return command[0] == "SUNSUBSCRIBE" and str(command[1]).encode() == channel
