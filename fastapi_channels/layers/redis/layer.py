"""The Redis layer: consumers of many processes and machines, over Redis or Valkey as they are."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Collection, Sequence
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from redis.exceptions import RedisError
from typing_extensions import override

from fastapi_channels.exceptions import ChannelFull, InvalidMessage, LayerUnavailable, UnreadableMessage
from fastapi_channels.layers.base import REMEMBERED, SWEEP, ChannelLayer, Health, Receipt, closed
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.leases import Leases
from fastapi_channels.layers.limiter import Limiter
from fastapi_channels.layers.names import checked_name
from fastapi_channels.layers.redis.leases import RedisLeases
from fastapi_channels.layers.redis.limiter import RedisLimiter
from fastapi_channels.layers.redis.link import Asked
from fastapi_channels.layers.redis.links import Links
from fastapi_channels.layers.redis.queue import FETCH, PUT, PUT_BACK, QueueReader
from fastapi_channels.layers.redis.servers import servers_of
from fastapi_channels.layers.wire import Letter, Serializer, Wire

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

__all__ = ["RedisLayer"]

logger = logging.getLogger("fastapi_channels")

#: KEYS: the idempotency key. ARGV: for how many ms it is remembered, the command that publishes, the channel, the
#: message. Returns whether it was published. The first write is one that is refused when Redis has no memory left.
PUBLISH_ONCE = """
if not redis.call('SET', KEYS[1], '', 'NX', 'PX', ARGV[1]) then return 0 end
redis.call(ARGV[2], ARGV[3], ARGV[4])
return 1
"""

#: How many seconds pass between two log lines about what can't be read.
SELDOM = 60.0


class RedisLayer(ChannelLayer):
    """Carries messages between processes over Redis 6.2+ or Valkey: one server, Sentinel, or a Cluster of Redis 7+.

    A process subscribes once to each group that it has members of and delivers to them itself: `group_send` is one
    command, whatever the number of members and processes. To each server it holds two connections, whatever the
    number of consumers. Memberships live in the process: when Redis is lost and comes back they are told to it anew,
    and no consumer is closed. What is sent to plain groups while this process is cut off is lost to it, which is logged
    and counted (`counters.gaps`).

    Args:
        url: `redis://[[user]:password@]host[:port][/database]`, `rediss://` for TLS,
            `redis+sentinel://[user:password@]host:port,host:port/service[/database]`,
            `redis+cluster://[user:password@]host:port,host:port`, and `rediss+...` of these; redis-py's options may
            follow behind a question mark, such as `ssl_ca_certs=` or `sentinel_password=`. Or a client of
            `redis.asyncio`, whose way to connect is used; it stays yours to close.
        prefix: What its keys and Pub/Sub channels in Redis begin with; two applications with different ones, or with
            different databases, don't hear each other.
        capacity: How many messages a named queue, or the inbox of a channel, holds.
        expiry: After how many seconds a message that nobody has handled is dropped.
        timeout: How many seconds Redis may take; what doesn't answer for so long counts as gone.
        encryption_keys: Fernet keys, the first of which encrypts and any decrypts; messages that none decrypts are
            logged and skipped. Needs `cryptography`. Names of groups and queues are not encrypted.
        serializer: How messages are written in Redis: an object or module with `dumps` and `loads`, or its dotted
            path; None for JSON.
        start: Whether opening it fails when Redis is not there, or succeeds, and heals when Redis comes.

    Raises:
        ValueError: An argument is wrong; the text holds no password and no key.

    Spec:
        protocol.md, 4 (promises) and 6 (what is in Redis).
    """

    def __init__(
        self,
        url: str | Redis | RedisCluster = "redis://localhost:6379/0",
        *,
        prefix: str = "fc",
        capacity: int = 1000,
        expiry: float = 60.0,
        timeout: float = 5.0,
        encryption_keys: Sequence[str | bytes] = (),
        serializer: str | Serializer | None = None,
        start: Literal["fail", "degraded"] = "fail",
    ) -> None:
        super().__init__(capacity=capacity, expiry=expiry)
        if timeout <= 0:
            raise ValueError(f"timeout is more than 0 seconds, not {timeout}")
        if start not in ("fail", "degraded"):
            raise ValueError(f'start is "fail" or "degraded", not {start!r}')
        self.prefix = checked_name(prefix)
        self.timeout = timeout
        self.start = start
        self._wire = Wire(encryption_keys, serializer)
        self._servers = servers_of(url, timeout)
        self._links: Links | None = None
        self._queues: dict[str, QueueReader] = {}
        self._sweep_queues_at = SWEEP
        self._complain_at = 0.0

    @override
    async def _connect(self) -> None:
        links = self._links = Links(self._servers, self.crew, self.timeout, self.counters, listens=self.listens)
        links.open()
        if self.listens:
            links.subscribe(self._node_address(self._node), self._heard_channel, is_due=True)
        try:
            await links.connected()
        except LayerUnavailable as error:
            if self.start == "fail":
                raise
            logger.warning("%s; starting without it", error)

    @override
    async def _disconnect(self) -> None:
        links, self._links = self._links, None
        queues, self._queues = self._queues, {}
        if links is not None:
            links.give_up()
            await asyncio.gather(*(queue.end(closed()) for queue in queues.values()))
            await links.close()

    @override
    def _abandon(self) -> None:
        super()._abandon()
        self._links = None
        self._queues.clear()

    @override
    async def flush(self) -> None:
        """Drop every message and membership, and whatever this layer has in Redis, of all processes."""
        await super().flush()
        pattern = re.sub(r"([\\*?\[\]^-])", r"\\\1", self.prefix) + ":{*"
        for link in self._connected().command_links:
            cursor: Any = b"0"
            while True:
                cursor, keys = await self._answer(link.ask("SCAN", cursor, "MATCH", pattern, "COUNT", 1000))
                for key in keys:
                    await self._answer(link.ask("UNLINK", key))
                if cursor == b"0":
                    break

    @override
    async def health(self) -> Health:
        return await super().health() if self._links is None else self._links.health()

    # Groups

    @override
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        links = self._connected()
        address = self._group_address(group)
        data = self._packed(envelope, address, exclude=exclude)
        publish = self._servers.publish
        if idempotency_key is None:
            await self._answer(links.ask(address, publish, address, data))
            return Receipt()
        digest = hashlib.sha256(idempotency_key.encode("utf-8", "surrogatepass")).hexdigest()
        key = f"{self.prefix}:{{{group}}}:i:{digest}"
        ttl = int(REMEMBERED * 1000)
        asking = links.ask(key, "EVAL", PUBLISH_ONCE, 1, key, ttl, publish, address, data)
        is_new = await self._answer(asking)
        if is_new and isinstance(asking.result(), Asked):
            await self._answer(links.ask(address, publish, address, data))  # where the subscribers are
        return Receipt(duplicate=not is_new)

    @override
    async def _subscribe(self, group: str) -> None:
        links = self._connected()
        address = self._group_address(group)
        subscription = links.subscribe(address, partial(self._heard_group, group))
        try:
            await links.confirmation(subscription)
        except BaseException:
            links.unsubscribe(address)
            raise

    @override
    async def _unsubscribe(self, group: str) -> None:
        if self._links is not None:
            self._links.unsubscribe(self._group_address(group))

    def _heard_group(self, group: str, data: bytes) -> None:
        letter = self._unpacked(data, self._group_address(group))
        if letter is not None:
            self._fan_out(group, letter.envelope, letter.exclude)

    # Channels of other processes

    @override
    async def _send_to_node(self, channel: str, envelope: Envelope) -> None:
        node = channel.partition("!")[0].rpartition(".")[2]
        address = self._node_address(node)
        data = self._packed(envelope, address, channel=channel)
        if not await self._answer(self._connected().ask(address, self._servers.publish, address, data)):
            self.counters.unreachable += 1

    def _heard_channel(self, data: bytes) -> None:
        letter = self._unpacked(data, self._node_address(self._node), is_for_channel=True)
        if letter is not None:
            assert letter.channel is not None
            self._deliver_here(letter.channel, letter.envelope)

    # Named queues

    @override
    async def _enqueue(self, name: str, envelope: Envelope) -> None:
        key = self._queue_key(name)
        data = self._packed(envelope, key)
        ttl = max(1, int(self.expiry * 1000))
        expired = await self._answer(
            self._connected().ask(
                key, "EVAL", PUT, 1, key, self.capacity, ttl, data, self._servers.publish, self._queue_address(name)
            )
        )
        if expired < 0:
            raise ChannelFull(name)
        self.counters.expired += expired

    @override
    async def _dequeue(self, name: str) -> Envelope:
        while True:
            element = await self._queue(name).receive()
            letter = self._unpacked(element.partition(b":")[2], self._queue_key(name))
            if letter is not None:
                return letter.envelope

    def _queue(self, name: str) -> QueueReader:
        reader = self._queues.get(name)
        if reader is None:
            links = self._connected()
            if len(self._queues) >= self._sweep_queues_at:
                for idle in [name for name, reader in self._queues.items() if reader.is_idle]:
                    del self._queues[idle]
                    links.unsubscribe(self._queue_address(idle))
                self._sweep_queues_at = max(SWEEP, 2 * len(self._queues))
            reader = QueueReader(partial(self._fetch, links, name), partial(self._put_back, links, name))
            self._queues[name] = reader
            links.subscribe(self._queue_address(name), lambda _: reader.go_on(), reader.go_on)
        return reader

    def _fetch(self, links: Links, name: str) -> asyncio.Future[bytes | None]:
        key = self._queue_key(name)
        element = self.crew.loop.create_future()
        link = links.link_of(key)
        clock = 0.0 if link is None else link.clock
        deadline = int((self.crew.loop.time() + self.timeout + clock) * 1000)

        def fetched(reply: asyncio.Future[Any]) -> None:
            error = None if reply.cancelled() else reply.exception()
            if isinstance(error, RedisError):
                self._complain(f"the queue {name!r} can't be read: {error}")
            if reply.cancelled() or error is not None:
                element.cancel()
                return
            answer = reply.result()
            expired, first, now = answer.reply if isinstance(answer, Asked) else answer
            if link is not None:
                link.set_clock(now / 1000)
            self.counters.expired += expired
            if now > deadline:
                element.cancel()  # so it isn't known whether there is one
            else:
                element.set_result(first)

        links.ask(key, "EVAL", FETCH, 1, key, deadline).add_done_callback(fetched)
        return element

    def _put_back(self, links: Links, name: str, element: bytes) -> asyncio.Future[Any]:
        key = self._queue_key(name)
        return links.ask(key, "EVAL", PUT_BACK, 1, key, element, self._servers.publish, self._queue_address(name))

    # For what else is kept in Redis

    @override
    def new_limiter(self) -> Limiter:
        return RedisLimiter(self.run_script)

    @override
    def new_leases(self) -> Leases:
        return RedisLeases(self.run_script, lambda renewing: self.crew.start(renewing, Context()))

    async def run_script(self, script: str, kind: str, key: str, *arguments: str | int, deadline: float) -> Any:
        """Run a Lua script on the server that has a key.

        Args:
            script: Its text; `KEYS[1]` is the key, `ARGV` the arguments.
            kind: What keys like this begin with in Redis.
            key: Any text. A digest of it stands in Redis: it holds what strangers send, which may be long.
            arguments: Its arguments.
            deadline: How many seconds Redis may take.

        Raises:
            LayerUnavailable: Redis is away, takes longer, or the script failed.
        """
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        name = f"{self.prefix}:{kind}:{{{digest}}}"
        try:
            async with asyncio.timeout(deadline):
                return await self._answer(self._connected().ask(name, "EVAL", script, 1, name, *arguments))
        except TimeoutError:
            raise LayerUnavailable(f"Redis has not answered within {deadline:g} s") from None

    # Names in Redis, and what is sent there

    def _group_address(self, group: str) -> str:
        return f"{self.prefix}:{self._servers.db}:{{{group}}}"

    def _node_address(self, node: str) -> str:
        return f"{self.prefix}:{self._servers.db}:node:{node}"

    def _queue_address(self, name: str) -> str:
        return f"{self.prefix}:{self._servers.db}:{{{name}}}:q"

    def _queue_key(self, name: str) -> str:
        return f"{self.prefix}:{{{name}}}:q"

    def _packed(
        self, envelope: Envelope, address: str, *, exclude: Collection[str] = (), channel: str | None = None
    ) -> bytes:
        try:
            return self._wire.pack(envelope, address, expiry=self.expiry, exclude=exclude, channel=channel)
        except Exception as error:  # a serializer raises what it likes
            raise InvalidMessage(f"the serializer can't write the message {envelope.type!r}: {error}") from error

    def _unpacked(self, data: bytes, address: str, *, is_for_channel: bool = False) -> Letter | None:
        try:
            letter = self._wire.unpack(data, address, self.crew.loop.time())
            if is_for_channel is (letter.channel is None):
                raise UnreadableMessage("it says no channel" if is_for_channel else "it says a channel")
        except UnreadableMessage as error:
            self.counters.unreadable += 1
            self._complain(f"a message in {address} was skipped: {error}")
            return None
        return letter

    def _complain(self, text: str) -> None:
        """Log a warning, unless one was logged a short while ago: strangers could fill the log."""
        now = self.crew.loop.time()
        if now >= self._complain_at:
            self._complain_at = now + SELDOM
            logger.warning("%s", text)

    async def _answer(self, reply: asyncio.Future[Any]) -> Any:
        if reply.done():
            await asyncio.sleep(0)  # who tries again and again lets the connection be made meanwhile
        try:
            answer = await reply
            return answer.reply if isinstance(answer, Asked) else answer
        except RedisError as error:
            raise LayerUnavailable(f"{self._servers.shown}: {error}") from error

    def _connected(self) -> Links:
        if self._links is None:
            raise closed()
        return self._links
