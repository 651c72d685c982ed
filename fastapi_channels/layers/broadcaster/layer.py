"""The broadcaster layer: groups over whatever the `broadcaster` package speaks, such as Postgres."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection
from functools import partial

from broadcaster import Broadcast, BroadcastBackend
from typing_extensions import override

from fastapi_channels.exceptions import UnreadableMessage
from fastapi_channels.layers.base import Health, Receipt, closed
from fastapi_channels.layers.broadcaster.link import Link
from fastapi_channels.layers.broadcaster.source import source_of
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.local import LocalLayer
from fastapi_channels.layers.names import checked_name
from fastapi_channels.layers.wire import Letter, Wire

__all__ = ["BroadcasterLayer"]

logger = logging.getLogger("fastapi_channels")

#: How many seconds pass between two log lines about what can't be read.
SELDOM = 60.0

_PLAIN_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,20}")


class BroadcasterLayer(LocalLayer):
    """Carries groups between processes over a broker that `broadcaster` speaks: Postgres, Kafka, and others.

    A process subscribes once to each group that it has members of and delivers to them itself. Memberships live in the
    process: when the broker is lost and comes back they are told to it anew, and no consumer is closed. What is sent
    meanwhile is lost to this process, which is logged and counted (`counters.gaps`).

    Named queues and idempotency keys are this process's own: a `Broadcast` has no place for them.

    Args:
        broadcast: A URL of `broadcaster`, a backend for a `Broadcast`, or a `Broadcast`. One that is connected when the
            layer is opened stays yours: the layer neither connects nor disconnects it, and when it has died, waits
            until you have connected it again. Any other the layer connects and disconnects, and has for itself.
        prefix: What the names of its channels in the broker begin with (a digest of it, if it isn't a short plain
            word); two applications with different ones don't hear each other.
        capacity: How many messages a named queue, or the inbox of a channel, holds.
        expiry: After how many seconds a message that nobody has handled is dropped.
        timeout: How many seconds the broker may take; what doesn't answer for so long counts as gone. Every half of
            it the process makes sure that it hears itself.

    Raises:
        ValueError: An argument is wrong, or a package is missing; the text holds no password.

    Spec:
        protocol.md, 4 (promises).
    """

    def __init__(
        self,
        broadcast: str | Broadcast | BroadcastBackend,
        *,
        prefix: str = "fc",
        capacity: int = 1000,
        expiry: float = 60.0,
        timeout: float = 5.0,
    ) -> None:
        super().__init__(capacity=capacity, expiry=expiry)
        if timeout <= 0:
            raise ValueError(f"timeout is more than 0 seconds, not {timeout}")
        self.prefix = checked_name(prefix)
        self.timeout = timeout
        self._source = source_of(broadcast)
        self.reaches_others = not (isinstance(broadcast, str) and broadcast.startswith("memory://"))
        self._base = prefix if _PLAIN_PREFIX.fullmatch(prefix) else _digest(prefix)[:20]
        self._wire = Wire()
        self._link: Link | None = None
        self._complain_at = 0.0

    @override
    async def _connect(self) -> None:
        link = Link(self._source, self._base, self._node, self.crew, self.timeout, self.counters)
        self._link = link
        link.open(self._heard_channel if self.listens else None)
        await link.connected()

    @override
    async def _disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    @override
    def _abandon(self) -> None:
        super()._abandon()
        self._link = None

    @override
    async def health(self) -> Health:
        return await super().health() if self._link is None else self._link.health()

    # Groups

    @override
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        link = self._connected()
        address = self._group_address(group)
        data = self._wire.pack(envelope, address, expiry=self.expiry, exclude=exclude)
        if idempotency_key is not None and self._is_repeat(group, idempotency_key):
            return Receipt(duplicate=True)
        try:
            await link.publish(address, data)
        except BaseException:
            if idempotency_key is not None:
                self._seen.pop((group, idempotency_key), None)  # a retry has to send, not to pretend
            raise
        return Receipt()

    @override
    async def _subscribe(self, group: str) -> None:
        await self._connected().subscribe(self._group_address(group), partial(self._heard_group, group))

    @override
    async def _unsubscribe(self, group: str) -> None:
        if self._link is not None:
            self._link.unsubscribe(self._group_address(group))

    def _heard_group(self, group: str, address: str, text: str) -> None:
        letter = self._unpacked(text, address, is_for_channel=False)
        if letter is not None:
            self._fan_out(group, letter.envelope, letter.exclude)

    # Channels of other processes

    @override
    async def _send_to_node(self, channel: str, envelope: Envelope) -> None:
        link = self._connected()
        address = link.node_address(channel.partition("!")[0].rpartition(".")[2])
        await link.publish(address, self._wire.pack(envelope, address, expiry=self.expiry, channel=channel))

    def _heard_channel(self, address: str, text: str) -> None:
        letter = self._unpacked(text, address, is_for_channel=True)
        if letter is not None and letter.channel is not None:
            self._deliver_here(letter.channel, letter.envelope)

    # Addresses and texts

    def _group_address(self, group: str) -> str:
        # Any name, in 63 bytes for Postgres, of letters, digits, ".", "_" and "-" for Kafka.
        return f"{self._base}.{_digest(group)}"

    def _unpacked(self, text: str, address: str, *, is_for_channel: bool) -> Letter | None:
        now = self.crew.loop.time()
        try:
            # Bytes that are no UTF-8 have come through a text like this.
            letter = self._wire.unpack(text.encode(errors="surrogateescape"), address, now)
            if (letter.channel is not None) is not is_for_channel:
                raise UnreadableMessage("it says no channel" if is_for_channel else "it says a channel")
            return letter
        except (UnreadableMessage, UnicodeEncodeError) as error:
            self.counters.unreadable += 1
            if now >= self._complain_at:  # strangers could fill the log
                self._complain_at = now + SELDOM
                logger.warning("a message in %s was skipped: %s", address, error)
            return None

    def _connected(self) -> Link:
        if self._link is None:
            raise closed()
        return self._link


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
