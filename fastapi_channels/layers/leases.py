"""Leases: who holds a place of which there are so many, over all processes that share a Redis, or in this one.

A place in Redis is held for a while only, and its process renews it; so those of a process that was killed come free.

Spec:
    decisions.md, 21 and 35 (leases use the server's clock).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

from typing_extensions import override

from fastapi_channels.exceptions import LayerUnavailable
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.guard import Guard

__all__ = ["GuardedLeases", "Leases", "MemoryLeases"]


class Leases(ABC):
    """Who holds what, by key."""

    @abstractmethod
    async def acquire(self, key: str, holder: str, limit: int) -> bool:
        """Take a place, unless `limit` others hold one.

        Args:
            key: What there are so many places of, such as `user:7`; any text.
            holder: Whose place it is; again is the same as once.
            limit: How many places there are.

        Returns:
            Whether it holds one now.

        Raises:
            LayerUnavailable: Nobody can say.
        """

    @abstractmethod
    def hold(self, key: str, holder: str) -> None:
        """Take a place unasked, and however many hold one: whoever counts is told as soon as that can be."""

    @abstractmethod
    async def release(self, key: str, holder: str) -> None:
        """Give a place back; does nothing if it isn't held. Raises nothing: what can't be given back runs out."""

    @abstractmethod
    async def count(self, key: str) -> int:
        """How many places are held.

        Raises:
            LayerUnavailable: Nobody can say.
        """


class MemoryLeases(Leases):
    """The places of this process."""

    def __init__(self) -> None:
        self._holders: dict[str, set[str]] = {}

    @override
    async def acquire(self, key: str, holder: str, limit: int) -> bool:
        holders = self._holders.get(key, ())
        if holder not in holders:
            if len(holders) >= limit:
                return False
            self.hold(key, holder)
        return True

    @override
    def hold(self, key: str, holder: str) -> None:
        self._holders.setdefault(key, set()).add(holder)

    @override
    async def release(self, key: str, holder: str) -> None:
        holders = self._holders.get(key, set())
        holders.discard(holder)
        if not holders:
            self._holders.pop(key, None)

    @override
    async def count(self, key: str) -> int:
        return len(self._holders.get(key, ()))


class GuardedLeases(Leases):
    """Leases of a broker; while that is away those of this process count, or nobody gets a place.

    Args:
        inner: The broker's, which have to hold what is acquired meanwhile.
        counters: Where acquisitions that it didn't see are counted.
        is_allowed: Whether places are given while it is away.
    """

    def __init__(self, inner: Leases, counters: Counters, *, is_allowed: bool) -> None:
        self._inner = inner
        self._own = MemoryLeases()
        done = "each process counts its own" if is_allowed else "none is given"
        fails = f"connections can't be counted, so that {done}"
        self._guard = Guard(counters, allow=is_allowed, fails=fails, heals="connections are counted again")

    @override
    async def acquire(self, key: str, holder: str, limit: int) -> bool:
        if not await self._own.acquire(key, holder, limit):
            return False
        try:
            is_held = await self._guard.ask(partial(self._inner.acquire, key, holder, limit))
            if is_held is None and not self._guard.allow:
                raise LayerUnavailable("connections can't be counted")
        except BaseException:
            await self.release(key, holder)
            raise
        if is_held is None:
            self._inner.hold(key, holder)
        elif not is_held:
            await self._own.release(key, holder)
        return is_held is not False

    @override
    def hold(self, key: str, holder: str) -> None:
        self._own.hold(key, holder)
        self._inner.hold(key, holder)

    @override
    async def release(self, key: str, holder: str) -> None:
        await self._own.release(key, holder)
        await self._inner.release(key, holder)

    @override
    async def count(self, key: str) -> int:
        return await self._inner.count(key)
