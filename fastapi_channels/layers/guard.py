"""A guard: what is done while that which counts, in a broker, can't be asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi_channels.exceptions import LayerUnavailable
from fastapi_channels.layers.counters import Counters

__all__ = ["Guard", "ThrottleGuard"]

logger = logging.getLogger("fastapi_channels")

Answer = TypeVar("Answer")

#: For how many seconds what has failed isn't asked.
PAUSE = 1.0


class Guard:
    """Asks what counts in a broker; after a failure not for a second, so that its timeout isn't waited for each time.

    A failure is logged once, and so is that it works again.

    Args:
        counters: Where what was not counted is counted.
        allow: Whether that is let through; the caller sees to it.
        fails: What the log says when it can't be asked.
        heals: What the log says when it can again.
    """

    def __init__(self, counters: Counters, *, allow: bool, fails: str, heals: str) -> None:
        self.allow = allow
        self._counters = counters
        self._fails = fails
        self._heals = heals
        self._again_at = 0.0
        self._has_failed = False

    async def ask(self, count: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """What `count` gives; None if it raised `LayerUnavailable`, or did so less than a second ago."""
        if asyncio.get_running_loop().time() >= self._again_at:
            try:
                answer = await count()
            except LayerUnavailable as error:
                self._again_at = asyncio.get_running_loop().time() + PAUSE
                if not self._has_failed:
                    self._has_failed = True
                    logger.warning("%s: %s", self._fails, error)
            else:
                if self._has_failed:
                    self._has_failed = False
                    logger.warning("%s", self._heals)
                return answer
        self._counters.uncounted += 1
        return None


class ThrottleGuard(Guard):
    """Stands before limiters: what can't be counted is let through, or has to wait for a second.

    Args:
        counters: Where what was not counted is counted.
        allow: Whether that is let through.
    """

    def __init__(self, counters: Counters, *, allow: bool) -> None:
        done = "let through" if allow else "refused"
        fails = f"throttles can't count, so that everything is {done}"
        super().__init__(counters, allow=allow, fails=fails, heals="throttles count again")

    async def wait(self, count: Callable[[], Awaitable[float]]) -> float:
        """How long to wait, as `count` says; it raises `LayerUnavailable` if it can't say."""
        wait = await self.ask(count)
        if wait is None:
            return 0.0 if self.allow else PAUSE
        return wait
