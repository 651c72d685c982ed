"""What a channel's messages are handed to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi_channels._tasks import Lane
from fastapi_channels.layers.envelope import Envelope

__all__ = ["Direct", "Sink"]

#: An async function that takes the ASGI event of a frame, and may be begun by hand.
Direct = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


class Sink(ABC):
    """What a channel's messages are handed to: a consumer's connection, or an inbox.

    `deliver` is all it needs. The rest are short cuts for the way to many members, which the layer takes by itself.

    Attributes:
        lane: Where its messages are handled; None if it has none.
        direct: Sends the frame of a message on at once, while nothing waits before it; None where or while it can't.
        forwards: By the type of a message, whether `direct` is the way for it.
    """

    __slots__ = ()

    lane: Lane[Envelope] | None = None
    direct: Direct | None = None
    forwards: Mapping[str, bool] = {}

    @abstractmethod
    def deliver(self, envelope: Envelope) -> bool:
        """Take a message at once, without waiting. False means that there is no room: it was not taken."""

    def left_behind(self, rest: Awaitable[None]) -> None:
        """See to the rest of a `direct` call that waits: somebody has to await it."""
        raise TypeError("a sink with a direct way sees to its rest")

    def lost(self, error: Exception) -> None:
        """Take note that a `direct` call has failed."""
        raise error
