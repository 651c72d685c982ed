"""One process writes numbers as fast as it can, and another one reads them, whatever happens to their servers."""

import asyncio
from types import TracebackType
from typing import Self

from fastapi_channels.layers import LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from tests.layers.redis.conftest import MARKER, become, member, receive


class Load:
    """Numbers on their way through a group, several at once, for the time of a block.

    Attributes:
        acknowledged: Those whose `group_send` has returned, in that order.
        never_sent: Those that weren't sent, as LayerUnavailable says.
        arrived: Those that the reader has got, in that order.
    """

    def __init__(self, writer: RedisLayer, reader: RedisLayer, group: str) -> None:
        self.writer = writer
        self.reader = reader
        self.group = group
        self.acknowledged: list[int] = []
        self.never_sent: list[int] = []
        self.arrived: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def more(self) -> list[int]:
        """What was acknowledged so far, when more has been: by then all of it has left the server."""
        so_far = list(self.acknowledged)
        await become(lambda: len(self.acknowledged) >= len(so_far) + 100, "more is acknowledged")
        return so_far

    async def end(self) -> None:
        """Send some more, then a marker; returns when the reader has it."""
        await self.more()
        writing, reading = self._tasks
        writing.cancel()
        await asyncio.wait({writing})
        await self.writer.group_send(self.group, MARKER)
        await reading

    async def __aenter__(self) -> Self:
        channel = await member(self.reader, self.group)
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read(channel))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert ended is None or isinstance(ended, asyncio.CancelledError)

    async def _write(self) -> None:
        number = 0
        while True:
            async with asyncio.TaskGroup() as group:
                for more in range(10):
                    group.create_task(self._send(number + more))
            number += 10
            await asyncio.sleep(0.001)

    async def _send(self, number: int) -> None:
        try:
            await self.writer.group_send(self.group, {"type": "x", "number": number})
        except LayerUnavailable as error:
            if not error.maybe_sent:
                self.never_sent.append(number)
        else:
            self.acknowledged.append(number)

    async def _read(self, channel: str) -> None:
        while (message := await receive(self.reader, channel)) != MARKER:
            self.arrived.append(message["number"])
