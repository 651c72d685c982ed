"""The coefficients of docs/scaling.md: `python -m benchmarks.scaling`.

What a process and Redis pay for each subscription and for each message, measured on a Redis of its own. CPU is user and
system time, of this process by the operating system, of Redis by its INFO.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
from collections.abc import Awaitable, Callable

import psutil
from redis.asyncio import Redis

from fastapi_channels.layers import Envelope, RedisLayer, Sink
from fastapi_channels.testing import RedisServer

GROUPS = 20_000
MESSAGES = 5_000
ROUNDS = 5
MESSAGE = {"type": "chat.message", "text": "x" * 80}


class Counting(Sink):
    """Takes every message and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def deliver(self, envelope: Envelope) -> bool:
        self.count += 1
        return True


class Meter:
    """CPU time of this process and of Redis, and memory of both."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.process = psutil.Process()

    async def cpu(self) -> tuple[float, float]:
        own = self.process.cpu_times()
        info = await self.redis.info("cpu")
        return own.user + own.system, info["used_cpu_user"] + info["used_cpu_sys"]

    async def memory(self) -> tuple[int, int]:
        gc.collect()
        info = await self.redis.info("memory")
        return self.process.memory_info().rss, info["used_memory"]

    async def cost(self, work: Callable[[], Awaitable[None]], count: int) -> tuple[float, float]:
        """Microseconds of CPU for each of `count`, here and in Redis: the median of some rounds."""
        rounds = []
        for _ in range(ROUNDS):
            before = await self.cpu()
            await work()
            after = await self.cpu()
            rounds.append([(then - now) / count * 1e6 for now, then in zip(before, after, strict=True)])
        here, there = (statistics.median(values) for values in zip(*rounds, strict=True))
        return here, there


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def subscriptions(url: str, meter: Meter) -> None:
    """Groups with one member each: what joining costs, what it holds, and what it takes to restore."""
    async with RedisLayer(url) as layer:
        sinks = [Counting() for _ in range(GROUPS)]
        channels = [layer.attach(sink) for sink in sinks]
        before, cpu = await meter.memory(), await meter.cpu()
        for start in range(0, GROUPS, 500):
            numbers = range(start, start + 500)
            await asyncio.gather(*(layer.group_add(f"group.{number}", channels[number]) for number in numbers))
        after, cpu_after = await meter.memory(), await meter.cpu()
        print(f"memory of a group with members:   process {(after[0] - before[0]) / GROUPS:6.0f} bytes", end="")
        print(f"   Redis {(after[1] - before[1]) / GROUPS:5.0f} bytes")
        print(f"first join of a group:            process {(cpu_after[0] - cpu[0]) / GROUPS * 1e6:6.1f} us", end="")
        print(f"      Redis {(cpu_after[1] - cpu[1]) / GROUPS * 1e6:5.1f} us")
        cpu = await meter.cpu()
        await meter.redis.client_kill_filter(_type="pubsub")
        while await layer.health():  # noqa: ASYNC110
            await asyncio.sleep(0)
        while not await layer.health():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        cpu_after = await meter.cpu()
        print(f"restoring a subscription:         process {(cpu_after[0] - cpu[0]) / GROUPS * 1e6:6.1f} us", end="")
        print(f"      Redis {(cpu_after[1] - cpu[1]) / GROUPS * 1e6:5.1f} us")


async def messages(url: str, meter: Meter) -> None:
    """One group: what sending costs, and what hearing costs beyond that."""
    async with RedisLayer(url) as sender, RedisLayer(url) as hearer:

        async def send() -> None:
            for start in range(0, MESSAGES, 100):
                await asyncio.gather(*(sender.group_send("group", MESSAGE) for _ in range(start, start + 100)))

        async def send_one_by_one() -> None:
            for _ in range(MESSAGES):
                await sender.group_send("group", MESSAGE)

        here, there = await meter.cost(send, MESSAGES)
        print(f"group_send, 100 at a time:        process {here:6.1f} us      Redis {there:5.1f} us")
        alone, there_alone = await meter.cost(send_one_by_one, MESSAGES)
        print(f"group_send, one after another:    process {alone:6.1f} us      Redis {there_alone:5.1f} us")
        sink = Counting()
        await hearer.group_add("group", hearer.attach(sink))

        async def send_and_hear() -> None:
            wanted = sink.count + MESSAGES
            await send()
            await until(lambda: sink.count >= wanted)

        heard, told = await meter.cost(send_and_hear, MESSAGES)
        print(f"hearing it, in each process:      process {heard - here:6.1f} us      Redis {told - there:5.1f} us")


async def processes(url: str, meter: Meter) -> None:
    """One group that many processes hear: what each costs Redis."""
    costs = []
    for count in (1, 8, 32):
        clients = [Redis.from_url(url) for _ in range(count)]
        listening = []
        for client in clients:
            pubsub = client.pubsub()
            await pubsub.subscribe("fc:0:{group}")
            listening.append(asyncio.create_task(drained(pubsub)))
        async with RedisLayer(url) as layer:

            async def send(layer: RedisLayer = layer) -> None:
                for start in range(0, 1000, 100):
                    await asyncio.gather(*(layer.group_send("group", MESSAGE) for _ in range(start, start + 100)))

            costs.append((count, (await meter.cost(send, 1000))[1]))
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)
        for client in clients:
            await client.aclose()
    (few, least), (many, most) = costs[0], costs[-1]
    told = ", ".join(f"{cost:.1f} us for {count}" for count, cost in costs)
    print(f"PUBLISH by subscribed processes:  Redis {told}; {(most - least) / (many - few):.2f} us for each more")


async def drained(pubsub: object) -> None:
    async for _ in pubsub.listen():  # type: ignore[attr-defined]
        pass


async def main() -> None:
    with RedisServer() as server:
        redis = Redis.from_url(server.url)
        meter = Meter(redis)
        print(f"{os.uname().machine}, {os.cpu_count()} cores, Redis {(await redis.info('server'))['redis_version']}")
        await subscriptions(server.url, meter)
        await messages(server.url, meter)
        await processes(server.url, meter)
        await redis.aclose()


if __name__ == "__main__":
    asyncio.run(main())
