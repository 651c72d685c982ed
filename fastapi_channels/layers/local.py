"""What a layer keeps for itself where no broker keeps it: the named queues and the idempotency keys of one process."""

from __future__ import annotations

from collections import OrderedDict

from typing_extensions import override

from fastapi_channels.exceptions import ChannelFull
from fastapi_channels.layers.base import REMEMBERED, SWEEP, ChannelLayer, closed
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.inbox import Inbox

__all__ = ["LocalLayer"]


class LocalLayer(ChannelLayer):
    """The base of layers whose named queues and idempotency keys don't leave the process."""

    def __init__(self, *, capacity: int = 1000, expiry: float = 60.0) -> None:
        super().__init__(capacity=capacity, expiry=expiry)
        self._queues: dict[str, Inbox] = {}
        self._sweep_queues_at = SWEEP
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()

    @override
    async def close(self) -> None:
        await super().close()
        for queue in self._queues.values():
            queue.end(closed())
        self._queues.clear()
        self._seen.clear()

    @override
    async def flush(self) -> None:
        await super().flush()
        for queue in self._queues.values():
            queue.clear()
        self._seen.clear()

    @override
    def _abandon(self) -> None:
        super()._abandon()
        self._queues.clear()
        self._seen.clear()

    def _is_repeat(self, group: str, key: str) -> bool:
        """Whether the key was used for the group within `REMEMBERED` seconds; it has been, from now on."""
        now = self._now()
        while self._seen and next(iter(self._seen.values())) <= now:
            self._seen.popitem(last=False)
        if (group, key) in self._seen:
            return True
        self._seen[group, key] = now + REMEMBERED
        return False

    @override
    async def _enqueue(self, name: str, envelope: Envelope) -> None:
        if not self._queue(name).deliver(envelope):
            raise ChannelFull(name)

    @override
    async def _dequeue(self, name: str) -> Envelope:
        return await self._queue(name).receive()

    def _queue(self, name: str) -> Inbox:
        queue = self._queues.get(name)
        if queue is None:
            if len(self._queues) >= self._sweep_queues_at:
                self._queues = {name: queue for name, queue in self._queues.items() if not queue.is_idle}
                self._sweep_queues_at = max(SWEEP, 2 * len(self._queues))
            queue = self._queues[name] = Inbox(self.capacity, self.counters)
        return queue
