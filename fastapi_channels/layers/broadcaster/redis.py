"""A backend for `broadcaster` over Redis that says when it is lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from broadcaster import BroadcastBackend, Event
from typing_extensions import override

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = ["RedisBackend"]

#: How many seconds a connection has to be closed properly.
GOODBYE = 1.0


class RedisBackend(BroadcastBackend):
    """Redis for a Broadcast: a connection that publishes, and one that listens.

    broadcaster's own is deaf in its first channel (redis-py 8 on Python 3.11), reconnects without a word of what it has
    missed, or dies unseen, also of a message that is no UTF-8.

    Args:
        url: `redis://...` or `rediss://...`, with redis-py's options.
        lost: Called when the connection that listens is lost.
    """

    def __init__(self, url: str, lost: Callable[[Exception], None]) -> None:
        from redis.asyncio.connection import Connection, parse_url
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import ResponseError

        options: dict[str, Any] = {**parse_url(url)}
        kind = options.pop("connection_class", Connection)
        # The deadlines, and when to try again, are the link's business.
        options |= {"protocol": 2, "socket_timeout": None, "health_check_interval": 0, "retry": Retry(NoBackoff(), 0)}
        kind(**options)  # raises for an option that there isn't
        self._make: Callable[[], AbstractConnection] = partial(kind, **options)
        self._refusal = ResponseError
        self._lost = lost
        self._publisher = self._subscriber = self._make()
        self._asked: deque[asyncio.Future[None]] = deque()

    @override
    async def connect(self) -> None:
        """Make both connections, or none."""
        self._asked.clear()
        self._publisher, self._subscriber = self._make(), self._make()
        try:
            for connection in (self._publisher, self._subscriber):
                await connection.connect()
        except BaseException:
            await self.disconnect()
            raise

    @override
    async def disconnect(self) -> None:
        """Close both connections."""
        for connection in (self._publisher, self._subscriber):
            with suppress(Exception):  # it is gone either way
                async with asyncio.timeout(GOODBYE):
                    await connection.disconnect()  # TLS takes its leave

    @override
    async def subscribe(self, group: str) -> None:
        """Listen to a channel; returns when Redis has confirmed it."""
        await self._ask("SUBSCRIBE", group)

    @override
    async def unsubscribe(self, group: str) -> None:
        """Listen to a channel no more."""
        await self._ask("UNSUBSCRIBE", group)

    @override
    async def publish(self, channel: str, message: str) -> None:
        """Send a message to who listens to a channel."""
        await _write(self._publisher, "PUBLISH", channel, message)
        await self._publisher.read_response()

    @override
    async def next_published(self) -> Event:
        """The next message; waits for one."""
        while True:
            try:
                reply: Any = await self._subscriber.read_response(disable_decoding=True)
            except self._refusal as error:
                self._asked.popleft().set_exception(error)
                continue
            except Exception as error:
                self._lost(error)
                raise
            kind, channel, data = reply
            if kind == b"message":
                # What is no UTF-8 is skipped later, and no reason to hear nothing more.
                return Event(channel.decode(), data.decode(errors="surrogateescape"))
            confirmed = self._asked.popleft()
            if not confirmed.done():
                confirmed.set_result(None)

    async def _ask(self, command: str, channel: str) -> None:
        confirmed = asyncio.get_running_loop().create_future()
        self._asked.append(confirmed)
        await _write(self._subscriber, command, channel)
        await confirmed


async def _write(connection: AbstractConnection, *command: str) -> None:
    if not connection.is_connected:  # redis-py would connect it again, and say nothing
        raise ConnectionError("the connection is lost")
    await connection.send_command(*command, check_health=False)
