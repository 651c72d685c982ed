"""Counting for throttles in Redis, shared by all processes: one script, by the server's clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from typing_extensions import override

from fastapi_channels.layers.limiter import EPSILON, Limiter, Rate

__all__ = ["RedisLimiter"]

#: KEYS: the key. ARGV: the interval between two, and how long all of a rate take, in microseconds.
#: Returns for how many microseconds to wait; 0 if it was counted.
HIT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local arrival = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + ARGV[1]
local wait = arrival - ARGV[2] - now
if wait > 0 then return wait end
redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000))
return 0
"""


class RedisLimiter(Limiter):
    """Counts for all processes on one Redis.

    Args:
        run_script: `RedisLayer.run_script`.
        deadline: How many seconds Redis may take.
    """

    def __init__(self, run_script: Callable[..., Awaitable[Any]], deadline: float = 0.5) -> None:
        self._run_script = run_script
        self._deadline = deadline

    @override
    async def hit(self, key: str, rate: Rate) -> float:
        # Not more than it is: so many of them must not take longer than all.
        period = round(rate.seconds * 1e6)
        interval = period // rate.count
        wait = await self._run_script(HIT, "t", key, interval, period, deadline=self._deadline)
        return wait / 1e6 if wait > EPSILON * 1e6 else 0.0
