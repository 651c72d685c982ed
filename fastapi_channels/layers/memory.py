"""The memory layer: every channel and group of one process, with no broker behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from typing_extensions import override

from fastapi_channels.exceptions import ChannelFull
from fastapi_channels.layers.base import SWEEP, ChannelLayer, Receipt, closed
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.inbox import Inbox

__all__ = ["MemoryLayer"]

#: How many seconds an idempotency key is remembered.
REMEMBERED = 300.0


class MemoryLayer(ChannelLayer):
    """Carries messages within one process: `memory://`, the default.

    It waits for nothing: when `group_send` returns, what is forwarded has been sent or waits in an outbox, and handlers
    are about to be called. A drop for lack of room in a handler's inbox is counted when its turn comes.
    """

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
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        if idempotency_key is not None and self._is_repeat(group, idempotency_key):
            return Receipt(duplicate=True)
        self._fan_out(group, envelope, exclude)
        return Receipt()

    def _is_repeat(self, group: str, key: str) -> bool:
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
