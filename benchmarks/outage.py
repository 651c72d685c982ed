"""The section that kills Redis: what was promised has to arrive all the same."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise

from redis.asyncio import Redis

from benchmarks.consumers import GROUP
from benchmarks.load import LoadError, NumberedMember, connected
from benchmarks.process import CONSUMERS, Server, serving
from benchmarks.redis import LONG_ENOUGH, broker
from benchmarks.servers import message
from benchmarks.table import Plan, Row
from fastapi_channels.exceptions import LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing.server import RedisServer

WINDOW = 500
"""How many messages of the writer are on their way at most."""
AT_ONCE = 5
"""How many it sends each time, before it sleeps for a millisecond."""


class Writer:
    """Sends numbered messages to a group without end, some at a time, and notes what became of each."""

    def __init__(self, layer: RedisLayer, size: int) -> None:
        self.sent = 0
        self.acknowledged: set[int] = set()
        self.unavailable: set[int] = set()
        self._layer = layer
        self._size = size
        self._window = asyncio.Semaphore(WINDOW)
        self._is_over = False

    async def run(self) -> None:
        """Send until `stop` is called, and wait for the answers."""
        async with asyncio.TaskGroup() as tasks:
            while not self._is_over:
                for _ in range(AT_ONCE):
                    await self._window.acquire()
                    tasks.create_task(self._send(self.sent))
                    self.sent += 1
                await asyncio.sleep(0.001)

    def stop(self) -> None:
        """Send no more."""
        self._is_over = True

    async def _send(self, number: int) -> None:
        try:
            await self._layer.group_send(GROUP, message(number, self._size))
            self.acknowledged.add(number)
        except LayerUnavailable:
            self.unavailable.add(number)
        finally:
            self._window.release()


@dataclass
class Outage:
    """What was sent around the loss of one Redis, by the messages' numbers.

    Attributes:
        before: Those that were acknowledged before the kill was begun, from the last outage on.
        during: Those after them, up to when all processes were well again. Nothing is promised of these.
        healing: How many seconds after the restart all were well.
        after: How many were sent from then on: up to the next kill, or the end.
    """

    before: range
    during: range
    healing: float
    after: range = range(0)


async def outage(plan: Plan) -> list[Row]:
    """Kill Redis under load, restart it, and compare what was promised with what arrived."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(broker())
        servers = [await stack.enter_async_context(serving(CONSUMERS, redis.url)) for _ in range(2)]
        for server in servers:
            await server.join(plan.outage_groups)  # first: what has to be restored before the members' group
        members: list[NumberedMember] = []
        for server, path in zip(servers, ("/ws/forward", "/ws/handler"), strict=True):
            opening = connected(server.port, path, NumberedMember, plan.outage_members)
            members += await stack.enter_async_context(opening)
        layer = await stack.enter_async_context(RedisLayer(redis.url))
        writer = Writer(layer, plan.message_size)
        writing = asyncio.create_task(writer.run())
        outages: list[Outage] = []
        first = 0
        try:
            for _ in range(plan.outages):
                outages.append(await kill_and_restart(redis, layer, servers, writer, first, plan.outage_messages))
                first = outages[-1].during.stop
            await acknowledged(writer, first, plan.outage_messages)
        finally:
            writer.stop()
            await writing

        async def is_over() -> bool:
            return all(member.numbers[-1:] == [writer.sent - 1] for member in members)

        await until(is_over, "The last message did not arrive at every member")
    for one, following in pairwise(outages):
        one.after = following.before
    outages[-1].after = range(first, writer.sent)
    return rows_of(outages, writer, members)


async def kill_and_restart(
    redis: RedisServer, layer: RedisLayer, servers: Sequence[Server], writer: Writer, first: int, messages: int
) -> Outage:
    """Wait for acknowledgements of some messages from number `first` on, kill Redis, and see it healed."""

    async def are_well() -> list[bool]:
        return [bool(await layer.health()), *[(await server.health())["ok"] for server in servers]]

    async def none_is_well() -> bool:
        return not any(await are_well())

    async def all_are_well() -> bool:
        return all(await are_well())

    last = await acknowledged(writer, first, messages)
    # Redis may write the writer's answer before it writes to the subscribers, and be killed in between. When it has
    # answered a later command of somebody else, it has written both.
    async with Redis.from_url(redis.url) as client:
        await client.ping()
    await asyncio.to_thread(redis.kill)
    await until(none_is_well, "A process has not noticed that Redis is gone")
    await asyncio.to_thread(redis.restart)
    restarted = time.monotonic()
    await until(all_are_well, "A process has not healed after the restart of Redis")
    return Outage(range(first, last + 1), range(last + 1, writer.sent), time.monotonic() - restarted)


async def acknowledged(writer: Writer, first: int, messages: int) -> int:
    """Wait until that many messages from number `first` on were acknowledged, and return the last one's number."""

    async def are_enough() -> bool:
        return len([number for number in writer.acknowledged if number >= first]) >= messages

    await until(are_enough, "The writer gets no acknowledgements")
    return max(writer.acknowledged)


async def until(is_so: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait until something is so.

    Raises:
        LoadError: It never came to that.
    """
    deadline = time.monotonic() + LONG_ENOUGH
    while not await is_so():
        if time.monotonic() > deadline:
            raise LoadError(otherwise)
        await asyncio.sleep(0.01)


def rows_of(outages: Sequence[Outage], writer: Writer, members: Sequence[NumberedMember]) -> list[Row]:
    """Count what arrived, and make the rows of the table.

    Raises:
        LoadError: A message that was promised is missing, or one came twice or late.
    """
    if any(one >= other for member in members for one, other in pairwise(member.numbers)):
        raise LoadError("A member got a message twice, or behind one that was sent later")
    everywhere = set.intersection(*(set(member.numbers) for member in members))
    for what, numbers in [
        *(("after health() was true again", one.after) for one in outages),
        *(("before the kill", one.before) for one in outages),
    ]:
        refused = [number for number in numbers if number not in writer.acknowledged]
        if refused:
            raise LoadError(f"Of {len(numbers)} messages sent {what}, {len(refused)} were not acknowledged")
        lost = [number for number in numbers if number not in everywhere]
        if lost:
            raise LoadError(f"Of {len(numbers)} messages sent {what}, {len(lost)} did not arrive: {lost[:10]}")

    title = f"Redis killed and restarted under load, {len(members)} members in 2 processes"

    def row(name: str, counted: Callable[[Outage], int]) -> Row:
        return Row(title, name, "messages", [counted(one) for one in outages])

    def of(numbers: range, among: set[int]) -> int:
        return len(among.intersection(numbers))

    return [
        row("acknowledged before the kill", lambda one: len(one.before)),
        row("  of these, arrived everywhere", lambda one: of(one.before, everywhere)),
        row("sent in between", lambda one: len(one.during)),
        row("  of these, acknowledged", lambda one: of(one.during, writer.acknowledged)),
        row("  of these, LayerUnavailable", lambda one: of(one.during, writer.unavailable)),
        row("  of these, arrived everywhere", lambda one: of(one.during, everywhere)),
        row("sent when all were well again", lambda one: len(one.after)),
        row("  of these, arrived everywhere", lambda one: of(one.after, everywhere)),
        Row(title, "from the restart to well", "s", [one.healing for one in outages]),
    ]
