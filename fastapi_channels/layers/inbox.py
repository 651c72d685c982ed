"""The inbox behind `receive(channel)`: bounded, first in first out, each message to one reader."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from typing_extensions import override

from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.sink import Sink

__all__ = ["Inbox"]


class Inbox(Sink):
    """A sink that keeps messages until somebody receives them.

    Args:
        capacity: How many messages it holds.
        counters: Where a message is counted that nobody received in time.
    """

    def __init__(self, capacity: int, counters: Counters) -> None:
        self.capacity = capacity
        self._counters = counters
        self._messages: deque[Envelope] = deque()
        self._readers: deque[asyncio.Future[None]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether it holds no message and nobody waits for one."""
        self._drop_expired()
        return not self._messages and not self._readers

    @override
    def deliver(self, envelope: Envelope) -> bool:
        """Keep the message if there is room."""
        self._drop_expired()
        if len(self._messages) >= self.capacity:
            return False
        self._messages.append(envelope)
        self._wake_a_reader()
        return True

    async def receive(self) -> Envelope:
        """The oldest message; waits for one. Cancelling is safe: no message is lost."""
        while True:
            self._drop_expired()
            if self._messages:
                return self._messages.popleft()
            reader = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                await reader
            except BaseException:
                if reader.done() and not reader.cancelled() and reader.exception() is None:
                    self._wake_a_reader()  # it was woken and cancelled at once: the message is for another
                else:
                    with contextlib.suppress(ValueError):
                        self._readers.remove(reader)
                raise

    def clear(self) -> None:
        """Drop the messages; who waits goes on waiting."""
        self._messages.clear()

    def end(self, error: Exception) -> None:
        """Have everybody who waits raise `error`."""
        self._messages.clear()
        while self._readers:
            reader = self._readers.popleft()
            if not reader.done():
                reader.set_exception(error)

    def _wake_a_reader(self) -> None:
        while self._readers:
            reader = self._readers.popleft()
            if not reader.done():
                reader.set_result(None)
                return

    def _drop_expired(self) -> None:
        if self._messages:
            now = asyncio.get_running_loop().time()
            while self._messages and self._messages[0].expires <= now:
                self._messages.popleft()
                self._counters.expired += 1
