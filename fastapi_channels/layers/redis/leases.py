"""Leases in Redis, shared by all processes: one sorted set for each key, by the server's clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from typing_extensions import override

from fastapi_channels.exceptions import LayerUnavailable
from fastapi_channels.layers.leases import Leases

__all__ = ["RedisLeases"]

logger = logging.getLogger("fastapi_channels")

#: For how many seconds a place is held without being renewed, and how often it is renewed.
LEASE = 60.0
RENEW_EVERY = 20.0

#: How many places one command renews.
AT_ONCE = 500

#: KEYS: the sorted set of holders by the end of their lease, in ms. ARGV: the lease in ms, the limit, the holder.
#: Returns whether it holds a place. The first write is one that is refused when Redis has no memory left.
ACQUIRE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZSCORE', KEYS[1], ARGV[3])
if not (due and tonumber(due) > now)
    and redis.call('ZCOUNT', KEYS[1], '(' .. now, '+inf') >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""

#: KEYS: likewise. ARGV: the lease in ms, and the holders. Who has lost its place gets one: Redis may have been emptied.
RENEW = """
local time = redis.call('TIME')
local due = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for index = 2, #ARGV do redis.call('ZADD', KEYS[1], due, ARGV[index]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""

#: KEYS: likewise. ARGV: the holder.
RELEASE = "redis.call('ZREM', KEYS[1], ARGV[1])"

#: KEYS: likewise. Returns how many places are held.
COUNT = """
local time = redis.call('TIME')
return redis.call('ZCOUNT', KEYS[1], '(' .. (time[1] * 1000 + math.floor(time[2] / 1000)), '+inf')
"""


class RedisLeases(Leases):
    """Who holds what in all processes on one Redis.

    What is held is told to Redis anew with each renewal, so that what was taken unasked, or lost by Redis, is counted.

    Args:
        run_script: `RedisLayer.run_script`.
        start: Starts a task, which renews places while any are held.
        deadline: How many seconds Redis may take.
    """

    def __init__(
        self,
        run_script: Callable[..., Awaitable[Any]],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        deadline: float = 0.5,
    ) -> None:
        self._run_script = run_script
        self._start = start
        self._deadline = deadline
        self._held: dict[str, set[str]] = {}
        self._renewing: asyncio.Task[None] | None = None

    @override
    async def acquire(self, key: str, holder: str, limit: int) -> bool:
        is_held = bool(await self._run(ACQUIRE, key, _ms(LEASE), limit, holder))
        if is_held:
            self.hold(key, holder)
        return is_held

    @override
    def hold(self, key: str, holder: str) -> None:
        self._held.setdefault(key, set()).add(holder)
        if self._renewing is None or self._renewing.done():
            self._renewing = self._start(self._renew_all())

    @override
    async def release(self, key: str, holder: str) -> None:
        self._forget(key, holder)
        try:
            await self._run(RELEASE, key, holder)
        except LayerUnavailable as error:
            logger.debug("a place could not be given back, and will run out", exc_info=error)

    @override
    async def count(self, key: str) -> int:
        return int(await self._run(COUNT, key))

    def _forget(self, key: str, holder: str) -> None:
        holders = self._held.get(key, set())
        holders.discard(holder)
        if not holders:
            self._held.pop(key, None)
            if not self._held and self._renewing is not None:
                self._renewing.cancel()
                self._renewing = None

    async def _renew_all(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY)
            for key, holders in list(self._held.items()):
                names = list(holders)
                for start in range(0, len(names), AT_ONCE):
                    still = [name for name in names[start : start + AT_ONCE] if name in holders]
                    if still:
                        await self._renew(key, still)

    async def _renew(self, key: str, holders: Sequence[str]) -> None:
        try:
            await self._run(RENEW, key, _ms(LEASE), *holders)
        except LayerUnavailable as error:
            logger.debug("places could not be renewed", exc_info=error)

    async def _run(self, script: str, key: str, *arguments: str | int) -> Any:
        return await self._run_script(script, "l", key, *arguments, deadline=self._deadline)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
