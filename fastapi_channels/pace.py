"""How fast, and after how long a silence, one client may talk: MAX_FRAMES_PER_SECOND, FIRST_FRAME_TIMEOUT and so on.

What is counted here is one connection's own, and costs a few additions a frame; throttles count a client over all of
its connections.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from fastapi_channels.layers.limiter import EPSILON

__all__ = ["Pace", "Silence", "Tally"]

MINUTE = 60.0


class Pace:
    """Frames and bytes per second of one connection: a second's worth at once, and from then on by GCRA.

    Args:
        frames: How many frames a second; None for any number.
        size: How many bytes a second. A frame that is larger gets through when nothing came before it, and what comes
            next waits for as long as it is worth.
    """

    __slots__ = ("_byte_costs", "_bytes_until", "_frame_costs", "_frames_until")

    def __init__(self, frames: float | None, size: float | None) -> None:
        self._frame_costs = 0.0 if frames is None else 1 / frames
        self._byte_costs = 0.0 if size is None else 1 / size
        self._frames_until = self._bytes_until = 0.0

    def wait(self, now: float, size: int) -> float:
        """Count a frame.

        Args:
            now: On a monotonic clock, in seconds.
            size: Of the frame, in bytes.

        Returns:
            0 if it is within the pace; else in how many seconds one like it is, and it was not counted.
        """
        frames_until = max(self._frames_until, now) + self._frame_costs
        bytes_until = max(self._bytes_until, now) + self._byte_costs * size
        wait = max(frames_until - now - max(1, self._frame_costs), min(bytes_until - now - 1, self._bytes_until - now))
        if wait > EPSILON:
            return wait
        self._frames_until, self._bytes_until = frames_until, bytes_until
        return 0.0


class Tally:
    """Counts what happens within a minute, which begins with the first of it."""

    __slots__ = ("_count", "_since")

    def __init__(self) -> None:
        self._since = -math.inf
        self._count = 0

    def add(self, now: float) -> int:
        """Count one more; returns how many there were in this minute.

        Args:
            now: On a monotonic clock, in seconds.
        """
        if now - self._since >= MINUTE:
            self._since, self._count = now, 0
        self._count += 1
        return self._count


class Silence:
    """Calls when a client has said nothing for too long; a timer that a frame doesn't touch.

    Args:
        loop: The event loop.
        first: For how many seconds it may be silent before its first frame; None for ever.
        later: And after any frame.
        is_busy: Whether something of its own is being seen to, so that it is not silent but waits.
        end: Called, once, with what was missing.
    """

    __slots__ = ("_end", "_heard_at", "_is_busy", "_is_first", "_later", "_loop", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        first: float | None,
        later: float | None,
        is_busy: Callable[[], bool],
        end: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._later = later
        self._is_busy = is_busy
        self._end = end
        self._heard_at = loop.time()
        self._is_first = first is not None and (later is None or first <= later)
        self._timer: asyncio.TimerHandle | None = None
        self._watch(first if self._is_first else later)

    def heard(self) -> None:
        """A frame has come."""
        self._heard_at = self._loop.time()
        if self._is_first:
            self._is_first = False
            self._watch(self._later)

    def cancel(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self, seconds: float | None) -> None:
        self.cancel()
        if seconds is not None:
            self._timer = self._loop.call_at(self._heard_at + seconds, self._look, seconds)

    def _look(self, seconds: float) -> None:
        if not self._is_first and self._is_busy():
            self.heard()
        if self._loop.time() < self._heard_at + seconds:
            self._watch(seconds)
        else:
            self._end("no first frame came in time" if self._is_first else "nothing came for too long")
