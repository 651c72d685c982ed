"""`self.sync`: a consumer's methods for plain `def` hooks and handlers, which run in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi_channels._tasks import run_blocking
from fastapi_channels.layers import Message, Receipt

if TYPE_CHECKING:
    from fastapi_channels.consumers.base import WebSocketConsumer

__all__ = ["SyncConsumer"]


class SyncConsumer:
    """The blocking twins of a consumer's methods; each waits until the event loop has carried out the call.

    Raises:
        RuntimeError: It was called on the event loop's own thread, where `await` is due.
    """

    __slots__ = ("_consumer", "_loop")

    def __init__(self, consumer: WebSocketConsumer, loop: asyncio.AbstractEventLoop) -> None:
        self._consumer = consumer
        self._loop = loop

    def accept(self, subprotocol: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        """See `WebSocketConsumer.accept`."""
        run_blocking(self._loop, self._consumer.accept(subprotocol, headers))

    def close(self, code: int = 1000, reason: str = "") -> None:
        """See `WebSocketConsumer.close`."""
        run_blocking(self._loop, self._consumer.close(code, reason))

    def send(self, text: str | None = None, bytes: bytes | None = None) -> bool:
        """See `WebSocketConsumer.send`."""
        return run_blocking(self._loop, self._consumer.send(text, bytes))

    def send_json(self, content: Any) -> bool:
        """See `WebSocketConsumer.send_json`."""
        return run_blocking(self._loop, self._consumer.send_json(content))

    def group_add(self, group: str) -> None:
        """See `WebSocketConsumer.group_add`."""
        run_blocking(self._loop, self._consumer.group_add(group))

    def group_discard(self, group: str) -> None:
        """See `WebSocketConsumer.group_discard`."""
        run_blocking(self._loop, self._consumer.group_discard(group))

    def group_send(
        self, group: str, event: Message, *, exclude_self: bool = False, idempotency_key: str | None = None
    ) -> Receipt:
        """See `WebSocketConsumer.group_send`."""
        return run_blocking(
            self._loop,
            self._consumer.group_send(group, event, exclude_self=exclude_self, idempotency_key=idempotency_key),
        )
