"""The memory layer: every channel and group of one process, with no broker behind it."""

from __future__ import annotations

from collections.abc import Collection

from typing_extensions import override

from fastapi_channels.layers.base import Receipt
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.local import LocalLayer

__all__ = ["MemoryLayer"]


class MemoryLayer(LocalLayer):
    """Carries messages within one process: `memory://`, the default.

    It waits for nothing: when `group_send` returns, what is forwarded has been sent or waits in an outbox, and handlers
    are about to be called. A drop for lack of room in a handler's inbox is counted when its turn comes.
    """

    def __init__(self, *, capacity: int = 1000, expiry: float = 60.0) -> None:
        super().__init__(capacity=capacity, expiry=expiry)
        self.reaches_others = False

    @override
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        if idempotency_key is not None and self._is_repeat(group, idempotency_key):
            return Receipt(duplicate=True)
        self._fan_out(group, envelope, exclude)
        return Receipt()
