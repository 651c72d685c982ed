"""The sections that go through a Redis, which they start: what the broker adds, and what it must not lose."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

from redis.asyncio import Redis

from benchmarks.load import LoadError, Member, NumberedMember, connected, deliver
from benchmarks.process import CONSUMERS, Server, cpu_of, serving, serving_all
from benchmarks.servers import message
from benchmarks.table import Plan, Row, compared, interleaved, means
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing.server import RedisServer

THROUGH_REDIS = "redis, two processes"
FAN_OUT_LIMIT = 1.15
RATE_FLOOR = 4.0
COMMAND_MEMBERS = (10, 100, 1000)
LONG_ENOUGH = 30.0
"""Seconds after which what has not come won't come any more. Nothing is measured by it."""


@asynccontextmanager
async def broker() -> AsyncIterator[RedisServer]:
    """Run a Redis for the length of the block."""
    server = RedisServer()
    try:
        await asyncio.to_thread(server.start)
    except RuntimeError as error:
        raise LoadError(str(error)) from None
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


async def redis_cpu(client: Redis) -> float:
    """Ask Redis for the CPU seconds it has used, in its own process."""
    used: dict[str, Any] = await client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


async def fan_out(plan: Plan) -> list[Row]:
    """Measure CPU µs per delivery to one large group whose members are in two processes."""
    rows: list[Row] = []
    async with (
        broker() as redis,
        Redis.from_url(redis.url) as client,
        serving_all(CONSUMERS, ["", "", "", redis.url, redis.url]) as (alone, *servers),
    ):
        processes = {
            "memory, two processes": servers[:2],
            "memory, one process": [alone],
            THROUGH_REDIS: servers[2:],
        }
        for consumer in ("forward", "handler"):
            rows += await _fan_out(plan, processes, client, consumer)
    return rows


async def _fan_out(plan: Plan, processes: dict[str, list[Server]], client: Redis, consumer: str) -> list[Row]:
    """Connect the members to the processes, as many to each, and measure."""
    numbers, nothing = range(plan.messages), range(0)
    count = plan.members // 2 * 2
    of_redis: list[float] = []

    async with AsyncExitStack() as stack:
        members: dict[str, list[Member]] = {}
        for name, servers in processes.items():
            members[name] = []
            for server in servers:
                opening = connected(server.port, f"/ws/{consumer}", Member, count // len(servers))
                members[name] += await stack.enter_async_context(opening)

        async def publish(name: str) -> None:
            # Through Redis the other process is asked to publish nothing, so that it has as many requests as with
            # memory, where each has to publish for itself.
            others = nothing if name == THROUGH_REDIS else numbers
            first, *rest = processes[name]
            publishing = [first.publish(numbers, size=plan.message_size, pause=0)]
            publishing += [server.publish(others, size=plan.message_size, pause=0) for server in rest]
            await asyncio.gather(*publishing)

        async def cost(name: str) -> float:
            before = await redis_cpu(client)
            cpu = await cpu_of(processes[name], deliver(members[name], numbers, publish(name)))
            if name == THROUGH_REDIS:
                of_redis.append((await redis_cpu(client) - before) / (count * plan.messages) * 1e6)
            return cpu / (count * plan.messages) * 1e6

        costs = await interleaved(list(processes), cost, rounds=plan.rounds, slices=plan.slices)
    title = f"fan-out to {count} members through Redis, {consumer}"
    unit = "µs per delivery"
    return [
        *compared(title, unit, costs, {THROUGH_REDIS: FAN_OUT_LIMIT}),
        Row(title, "Redis itself, not in the above", unit, means(of_redis, plan.slices)),
    ]


async def commands_of(client: Redis, work: Awaitable[object]) -> dict[str, int]:
    """Do the work, and return how many commands of which name Redis got meanwhile, but for PING and INFO."""

    async def calls() -> dict[str, int]:
        stats: dict[str, Any] = await client.info("commandstats")
        names = {name: name.removeprefix("cmdstat_") for name in stats}
        return {names[name]: int(stat["calls"]) for name, stat in stats.items() if names[name] not in ("ping", "info")}

    before = await calls()
    await work
    after = await calls()
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


async def commands(plan: Plan) -> list[Row]:
    """Count the commands that Redis gets, per `group_send` and per join; half of the members are another layer's."""
    title = f"commands at Redis, members of 2 layers, {plan.commands_sends} sends"
    rows: list[Row] = []

    async def join(layer: RedisLayer, group: str, channels: Sequence[str]) -> None:
        for channel in channels:
            await layer.group_add(group, channel)

    async def send(layer: RedisLayer, group: str) -> None:
        for number in range(plan.commands_sends):
            await layer.group_send(group, message(number, plan.message_size))

    async with (
        broker() as redis,
        Redis.from_url(redis.url) as client,
        RedisLayer(redis.url) as one,
        RedisLayer(redis.url) as other,
    ):
        for size in COMMAND_MEMBERS:
            group = f"bench.{size}"
            channels = {layer: [await layer.new_channel() for _ in range(size // 2)] for layer in (one, other)}
            first = later = 0
            for layer, members in channels.items():
                first += _only("subscribe", 1, await commands_of(client, join(layer, group, members[:1])))
                later += _only("", 0, await commands_of(client, join(layer, group, members[1:])))
            sent = _only("publish", plan.commands_sends, await commands_of(client, send(one, group)))
            for layer, members in channels.items():
                for channel in members:
                    await _receive(layer, channel, range(plan.commands_sends))
            rows += [
                Row(title, f"group_send, {size} members", "PUBLISH each", [sent / plan.commands_sends]),
                Row(title, "  first join in a process", "SUBSCRIBE each", [first / 2]),
                Row(title, f"  the other {size - 2} joins", "in all", [later]),
            ]
    return rows


def _only(name: str, times: int, counted: dict[str, int]) -> int:
    """Insist on a number of commands of one name and no others, and return that number."""
    if counted != ({name: times} if times else {}):
        raise LoadError(f"Redis should have got {times} {name or 'commands'}, and got {counted}")
    return times


async def _receive(layer: RedisLayer, channel: str, numbers: range) -> None:
    """Take the messages of these numbers out of a channel's inbox, in order."""
    for number in numbers:
        try:
            async with asyncio.timeout(LONG_ENOUGH):
                received = (await layer.receive(channel))["n"]
        except TimeoutError:
            raise LoadError(f"{channel} did not get message {number}") from None
        if received != number:
            raise LoadError(f"{channel} got message {received} instead of {number}")


async def rate(plan: Plan) -> list[Row]:
    """Measure sends per second to many groups of one member, against one awaited PUBLISH of redis-py after another."""
    groups = [f"bench.{number}" for number in range(plan.groups)]
    numbers = count()

    async with (
        broker() as redis,
        Redis.from_url(redis.url) as client,
        RedisLayer(redis.url) as layer,
        RedisLayer(redis.url, prefix="deserted") as deserted,
    ):
        channels = [await layer.new_channel() for _ in groups]
        address, payload = await _published(client, layer, plan.message_size)
        for group, channel in zip(groups, channels, strict=True):
            await layer.group_add(group, channel)

        async def publish_each(name: str) -> None:
            for group in groups:
                await client.publish(name.format(group), payload)

        async def send_at_once(by: RedisLayer, number: int) -> None:
            content = message(number, plan.message_size)
            await asyncio.gather(*(by.group_send(group, content) for group in groups))

        async def drain(number: int) -> None:
            for channel in channels:
                received = (await layer.receive(channel))["n"]
                if received != number:
                    raise LoadError(f"{channel} got message {received} instead of {number}")

        async def redis_py() -> None:
            await publish_each("deserted:{}")

        async def redis_py_to_members() -> None:
            await publish_each(address)
            await drain(0)

        async def layer_to_members() -> None:
            number = next(numbers)
            await send_at_once(layer, number)
            await drain(number)

        async def layer_alone() -> None:
            await send_at_once(deserted, 0)

        variants: dict[str, tuple[Callable[[], Awaitable[None]], int]] = {
            "redis-py": (redis_py_to_members, 1),
            "layer": (layer_to_members, plan.group_sends),
            "redis-py, nobody hears": (redis_py, 1),
            "layer, nobody hears": (layer_alone, plan.group_sends),
        }
        cpu: dict[str, list[float]] = {name: [] for name in variants}

        async def cost(name: str) -> float:
            work, times = variants[name]
            cpu_before, before = time.process_time(), time.perf_counter()
            try:
                async with asyncio.timeout(LONG_ENOUGH):
                    for _ in range(times):
                        await work()
            except TimeoutError:
                raise LoadError(f"A message of {name} did not arrive within {LONG_ENOUGH:.0f} s") from None
            elapsed = time.perf_counter() - before
            cpu[name].append((time.process_time() - cpu_before) / times / plan.groups * 1e6)
            return elapsed / times / plan.groups

        costs = await interleaved(list(variants), cost, rounds=plan.rounds, slices=plan.slices)
    title = f"sends to {plan.groups} groups of one member through Redis"
    rows: list[Row] = []
    for names in (("redis-py", "layer"), ("redis-py, nobody hears", "layer, nobody hears")):
        rates = {name: [1 / value for value in costs[name]] for name in names}
        rows += [
            replace(row, floor=RATE_FLOOR) if row.name == names[1] else row
            for row in compared(title, "sends per second", rates, {})
        ]
    return [
        *rows,
        *compared(f"{title}, CPU of the process", "µs per send", {n: means(cpu[n], plan.slices) for n in cpu}, {}),
    ]


async def _published(client: Redis, layer: RedisLayer, size: int) -> tuple[str, bytes]:
    """Where the layer publishes, with {} for the group, and what, for message 0; heard from Redis."""
    group = "bench.heard"
    async with client.pubsub() as listener:
        await listener.psubscribe("*")
        await layer.group_send(group, message(0, size))
        async for heard in listener.listen():
            if heard["type"] == "pmessage":
                address = heard["channel"].decode().replace("{", "{{").replace("}", "}}")
                return address.replace(group, "{}"), heard["data"]
    raise LoadError("Redis did not hand out what was published")


async def burst(plan: Plan) -> list[Row]:
    """Count what arrives of a burst to groups of one member each, published by another process than the members'."""
    groups = [f"bench.{number}" for number in range(plan.burst_groups)]
    numbers = range(plan.burst_messages)
    title = f"{len(groups)} groups of one member, a burst of {len(numbers)} messages each through Redis"
    rows: list[Row] = []

    for consumer in ("forward", "handler"):
        paths = iter([f"/ws/{consumer}/{group}" for group in groups])

        def member(_: str, paths: Iterator[str] = paths) -> NumberedMember:
            return NumberedMember(next(paths))

        async with (
            broker() as redis,
            serving(CONSUMERS, redis.url) as server,
            connected(server.port, f"/ws/{consumer}/...", member, len(groups)) as members,
            RedisLayer(redis.url) as layer,
        ):
            arrived: list[float] = []
            for _ in range(plan.burst_rounds):
                for one in members:
                    one.numbers.clear()
                sends = [layer.group_send(group, message(n, plan.message_size)) for n in numbers for group in groups]
                await deliver(members, numbers, asyncio.gather(*sends), timeout=LONG_ENOUGH)
                if any(one.numbers != list(numbers) for one in members):
                    raise LoadError("A member got its messages in another order than they were sent")
                arrived.append(sum(len(one.numbers) for one in members))
        rows.append(Row(title, consumer, f"of {len(groups) * len(numbers)} arrived", arrived))
    return rows
