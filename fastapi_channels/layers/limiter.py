"""Counting for throttles: GCRA, in memory or in Redis.

`5/10s` lets 5 through at once, and one more every 2 seconds. All that is kept for a key is one number, the theoretical
arrival time: when the key would be as good as new. So it is known exactly when the next one gets through, a refused one
costs the client nothing, and a key that has been quiet is forgotten.

Spec:
    ITU-T I.371, annex A (the virtual scheduling algorithm).
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from fastapi_channels.exceptions import DefinitionError
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.guard import ThrottleGuard

__all__ = ["GuardedLimiter", "Limiter", "MemoryLimiter", "Rate"]

logger = logging.getLogger("fastapi_channels")

#: What is less than this is no wait, but the rounding of a sum, in seconds.
EPSILON = 1e-6

#: How many in a second are the most: one in a microsecond, which is how finely Redis counts.
MOST = 1_000_000

#: How many seconds a rate may be over at the longest: a hundred years, which a float holds to the microsecond.
LONGEST = 36525 * 86400.0

_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
_RATE = re.compile(r"([0-9]{1,15}) ?/ ?([0-9]{1,15}(?:\.[0-9]{1,15})?)? ?([a-z]+)")


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in so many seconds.

    Attributes:
        count: How many.
        seconds: In how many seconds.

    Raises:
        DefinitionError: Nothing would get through, or nothing would be counted.
    """

    count: int
    seconds: float

    def __post_init__(self) -> None:
        if not (self.count >= 1 and 0 < self.seconds <= LONGEST and self.count <= self.seconds * MOST):
            raise DefinitionError(
                f"a rate is at least 1 in more than 0 seconds, at most {MOST} a second, and over a hundred "
                f"years at the longest, not {self}"
            )

    def __str__(self) -> str:
        return f"{self.count}/{self.seconds:.15g}s"

    @classmethod
    def parse(cls, rate: str | Rate) -> Rate:
        """Read `"10/second"`, `"5/10s"`, `"100/minute"` or `"1000/day"`.

        Raises:
            DefinitionError: It is nothing of the kind.
        """
        if isinstance(rate, Rate):
            return rate
        match = _RATE.fullmatch(rate.lower()) if isinstance(rate, str) else None
        if match is None or match[3] not in _UNITS:
            raise DefinitionError(f'a rate is written "10/second", "5/10s" or "100/minute", not {rate!r}')
        return cls(int(match[1]), float(match[2] or 1) * _UNITS[match[3]])


class Limiter(ABC):
    """Counts for throttles."""

    @abstractmethod
    async def hit(self, key: str, rate: Rate) -> float:
        """Count one more for a key.

        Returns:
            0 if it may go on; else in how many seconds it may, and it was not counted.
        """


class GuardedLimiter(Limiter):
    """Counts with another limiter, behind a guard.

    Args:
        inner: The one that counts.
        counters: Where failures are counted.
        allow: Whether what can't be counted is let through.
    """

    def __init__(self, inner: Limiter, counters: Counters, *, allow: bool) -> None:
        self._inner = inner
        self._guard = ThrottleGuard(counters, allow=allow)

    @override
    async def hit(self, key: str, rate: Rate) -> float:
        return await self._guard.wait(partial(self._inner.hit, key, rate))


class MemoryLimiter(Limiter):
    """Counts for this process.

    Args:
        max_keys: How many keys are remembered; beyond that the one is forgotten that was seen least recently.
    """

    def __init__(self, max_keys: int = 100_000) -> None:
        self._max_keys = max_keys
        #: The theoretical arrival times, on the event loop's clock, seen least recently first. The keys are hashes:
        #: what strangers send is in a key, and that may be long.
        self._arrivals: OrderedDict[int, float] = OrderedDict()

    @override
    async def hit(self, key: str, rate: Rate) -> float:
        now = asyncio.get_running_loop().time()
        arrivals, hashed = self._arrivals, hash(key)
        arrival = max(arrivals.get(hashed, now), now) + rate.seconds / rate.count
        wait = arrival - rate.seconds - now
        if wait > EPSILON:
            arrivals.move_to_end(hashed)
            return wait
        arrivals[hashed] = arrival
        arrivals.move_to_end(hashed)
        # Two old ones for each new one, so that what is out of date goes by itself.
        for _ in range(2):
            oldest = next(iter(arrivals))
            if arrivals[oldest] > now and len(arrivals) <= self._max_keys:
                break
            del arrivals[oldest]
        return 0.0
