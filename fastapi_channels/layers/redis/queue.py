"""The named queues: lists in Redis that all processes share, each message to one reader.

A process fetches for its readers one message at a time, so that they get them in order. Nothing blocks in Redis: who
puts a message in also publishes that there is one, and whoever waits for one fetches then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi_channels.exceptions import LayerUnavailable

__all__ = ["FETCH", "PUT", "PUT_BACK", "QueueReader"]

#: How many seconds after a failed fetch it is tried again, if nothing else brings it about.
RETRY = 1.0

# An element is `<time of expiry in ms>:<message>`, by the server's clock. What isn't of that form is not ours; it is
# handed out all the same, so that somebody says so.

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function expires(element)
    return tonumber(string.match(element, '^(%d+):') or now + 1)
end
"""

#: KEYS: the queue. ARGV: capacity, expiry in ms, the message, the command that publishes, the channel of the queue.
#: Returns how many have expired, or -1 if there is no room.
PUT = (
    _NOW
    + """
local expired = 0
local first = redis.call('LINDEX', KEYS[1], 0)
while first and expires(first) <= now do
    redis.call('LPOP', KEYS[1])
    expired = expired + 1
    first = redis.call('LINDEX', KEYS[1], 0)
end
if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[1]) then return -1 end
redis.call('RPUSH', KEYS[1], string.format('%.0f', now + ARGV[2]) .. ':' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), tonumber(ARGV[2])))
redis.call(ARGV[4], ARGV[5], '')
return expired
"""
)

#: KEYS: the queue. ARGV: the time in ms from which on nobody waits for the answer: a server that was frozen carries out
#: late what it was asked. Returns how many have expired, the oldest element or nil, and the time in ms.
FETCH = (
    _NOW
    + """
local expired = 0
local first = false
if now <= tonumber(ARGV[1]) then
    first = redis.call('LPOP', KEYS[1])
    while first and expires(first) <= now do
        expired = expired + 1
        first = redis.call('LPOP', KEYS[1])
    end
end
return {expired, first, now}
"""
)

#: KEYS: the queue. ARGV: the element, the command that publishes, the channel of the queue.
PUT_BACK = (
    _NOW
    + """
local left = expires(ARGV[1]) - now
if left <= 0 then return 1 end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), left))
redis.call(ARGV[2], ARGV[3], '')
return 0
"""
)


class QueueReader:
    """Those of this process that read one named queue.

    Args:
        fetch: Asks for the oldest element; the future's result is None if there is none, and it is cancelled if
            that can't be told.
        put_back: Puts an element back to where it was taken from.
    """

    def __init__(
        self, fetch: Callable[[], asyncio.Future[bytes | None]], put_back: Callable[[bytes], asyncio.Future[Any]]
    ) -> None:
        self._fetch = fetch
        self._put_back = put_back
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._fetching: asyncio.Future[bytes | None] | None = None
        self._returning: set[asyncio.Future[Any]] = set()
        self._has_news = False
        self._retry: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a message."""
        return not self._waiting and self._fetching is None

    async def receive(self) -> bytes:
        """The oldest element; waits for one. Cancelling is safe: the element is put back."""
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self.go_on()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._give_back(waiting.result())
                self.go_on()
            raise

    def go_on(self) -> None:
        """Fetch for who waits: there may be a message."""
        while self._waiting and self._waiting[0].done():
            del self._waiting[0]
        self._has_news = self._fetching is not None
        if self._waiting and not self._has_news:
            fetching = self._fetch()
            self._fetching = fetching
            fetching.add_done_callback(self._fetched)

    def _fetched(self, fetching: asyncio.Future[bytes | None]) -> None:
        self._fetching = None
        if fetching.cancelled():
            if self._retry is None:
                self._retry = fetching.get_loop().call_later(RETRY, self._try_again)
            return
        element = fetching.result()
        if element is not None:
            self._hand_over(element)
        if element is not None or self._has_news:
            self.go_on()

    def _hand_over(self, element: bytes) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(element)
                return
        self._give_back(element)

    def _give_back(self, element: bytes) -> None:
        returning = self._put_back(element)
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)

    def _try_again(self) -> None:
        self._retry = None
        self.go_on()

    async def end(self, error: LayerUnavailable) -> None:
        """Have everybody who waits raise `error`, and put back what is on its way to them."""
        if self._retry is not None:
            self._retry.cancel()
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(error)
        if self._fetching is not None:
            await asyncio.wait({self._fetching})  # its element finds nobody here, and is put back
        if self._returning:
            await asyncio.wait(self._returning)
