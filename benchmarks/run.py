"""Measure what the package costs, in CPU of the server process, as ratios to hand-written FastAPI.

Run it with `python -m benchmarks.run`; README.md says what is measured, and why so.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import outage, redis
from benchmarks.load import Caller, Connection, LoadError, Member, StalledMember, TimedMember, ask, connected, deliver
from benchmarks.process import CONSUMERS, SERVERS, Server, serving
from benchmarks.table import QUICK, Plan, Row, compared, interleaved, print_rows

STALLED_LIMIT_MB = 6.0
"""What one stalled member may cost: the default OUTBOX_BYTES, and half as much for what else goes on in the process."""


async def fan_out(plan: Plan) -> list[Row]:
    """Measure CPU µs per delivery to one large group."""
    variants = {
        "bare": (SERVERS, "/ws/member"),
        "forward": (CONSUMERS, "/ws/forward"),
        "handler": (CONSUMERS, "/ws/handler"),
    }

    numbers = range(plan.messages)
    async with AsyncExitStack() as stack:
        groups = {}
        for name, (app, path) in variants.items():
            server = await stack.enter_async_context(serving(app))
            groups[name] = server, await stack.enter_async_context(connected(server.port, path, Member, plan.members))

        async def cost(name: str) -> float:
            server, members = groups[name]
            publishing = server.publish(numbers, size=plan.message_size, pause=0)
            return await server.cpu_of(deliver(members, numbers, publishing)) / (plan.members * plan.messages) * 1e6

        costs = await interleaved(list(variants), cost, rounds=plan.rounds, slices=plan.slices)
    title = f"fan-out to {plan.members} members"
    return compared(title, "µs per delivery", costs, {"forward": 0.90, "handler": 1.15})


async def round_trips(plan: Plan, title: str, variants: dict[str, tuple[str, str]], limit: float) -> list[Row]:
    """Measure CPU µs per request and reply; the limit is for the second variant, and the first is its yardstick."""
    async with AsyncExitStack() as stack:
        callers = {}
        for name, (app, path) in variants.items():
            server = await stack.enter_async_context(serving(app))
            clients = await stack.enter_async_context(connected(server.port, path, Caller, plan.clients))
            callers[name] = server, clients

        async def cost(name: str) -> float:
            server, clients = callers[name]
            return await server.cpu_of(ask(clients, plan.calls)) / (plan.clients * plan.calls) * 1e6

        costs = await interleaved(list(callers), cost, rounds=plan.rounds, slices=plan.slices)
    _, judged = variants
    return compared(f"{title}, {plan.clients} clients", "µs per round trip", costs, {judged: limit})


async def requests(plan: Plan) -> list[Row]:
    """Measure a request and its reply."""
    variants = {"bare": (SERVERS, "/ws/echo"), "action": (CONSUMERS, "/ws/echo")}
    return await round_trips(plan, "request and reply", variants, 1.10)


async def gate(plan: Plan) -> list[Row]:
    """Measure a request and its reply, with a permission and a throttle and without."""
    variants = {"action": (CONSUMERS, "/ws/echo"), "gated action": (CONSUMERS, "/ws/gated")}
    return await round_trips(plan, "a permission and a throttle in memory", variants, 1.30)


async def memory(plan: Plan) -> list[Row]:
    """Measure kB of resident memory, and asyncio tasks, per idle connection; every round is a fresh process."""
    variants = {"bare": (SERVERS, "/ws/member"), "consumer": (CONSUMERS, "/ws/forward")}
    tasks: dict[str, list[float]] = {name: [] for name in variants}

    async def cost(name: str) -> float:
        app, path = variants[name]
        async with (
            serving(app) as server,
            connected(server.port, path, Connection, plan.idle_before),
        ):
            tasks_before = (await server.usage(collect=True))["tasks"]
            resident_before = server.resident()
            async with connected(server.port, path, Connection, plan.idle):
                tasks_after = (await server.usage(collect=True))["tasks"]
                resident_after = server.resident()
        tasks[name].append(tasks_after - tasks_before - plan.idle)
        return (resident_after - resident_before) / plan.idle / 1024

    costs = await interleaved(list(variants), cost, rounds=plan.idle_rounds, warm_up=False)
    title = f"{plan.idle} idle connections"
    more = [consumer - bare for consumer, bare in zip(costs["consumer"], costs["bare"], strict=True)]
    return [
        *compared(title, "kB each", costs, {}),
        Row(title, "consumer - bare", "kB each", more, limit=3.0),
        Row(title, "bare, tasks beyond one each", "tasks in all", tasks["bare"]),
        Row(title, "consumer, tasks beyond one each", "tasks in all", tasks["consumer"], limit=0),
    ]


async def stalled(plan: Plan) -> list[Row]:
    """Measure what one member that stops reading does to the others, and to the memory of the process."""
    app, path = CONSUMERS, "/ws/forward"
    published = plan.stall_messages * plan.stall_size / 1024 / 1024
    growth: list[float] = []
    numbers = range(plan.stall_messages)

    async with serving(app) as server, connected(server.port, path, TimedMember, plan.readers) as members:

        async def publish_all() -> float:
            """Return the p99 of the messages' ages in milliseconds."""
            for member in members:
                member.ages.clear()
            await deliver(members, numbers, server.publish(numbers, size=plan.stall_size, pause=plan.stall_pause))
            return statistics.quantiles([age for member in members for age in member.ages], n=100)[98] * 1e3

        async def cost(name: str) -> float:
            if name == "all read":
                return await publish_all()
            before = server.resident()
            async with peak_resident(server) as peak:
                with StalledMember(server.port, path):
                    p99 = await publish_all()
            growth.append((max(peak) - before) / 1024 / 1024)
            await asyncio.sleep(0.3)  # The server notices that the member has gone.
            return p99

        costs = await interleaved(["all read", "one stalled"], cost, rounds=plan.stall_rounds)
    title = f"one of {plan.readers + 1} members stops reading"
    return [
        *compared(title, "ms p99", costs, {}),
        Row(title, f"memory, {published:.0f} MB published", "MB more", growth[1:], limit=STALLED_LIMIT_MB),
    ]


@asynccontextmanager
async def peak_resident(server: Server) -> AsyncIterator[list[int]]:
    """Sample the memory of the server for the length of the block."""
    samples = [server.resident()]

    async def sample() -> None:
        while True:
            await asyncio.sleep(0.02)
            samples.append(server.resident())

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()


SECTIONS: dict[str, Callable[[Plan], Awaitable[list[Row]]]] = {
    "fan-out": fan_out,
    "requests": requests,
    "gate": gate,
    "memory": memory,
    "stalled": stalled,
    "redis-fan-out": redis.fan_out,
    "redis-commands": redis.commands,
    "redis-rate": redis.rate,
    "redis-burst": redis.burst,
    "redis-outage": outage.outage,
}
SIZES = ("rounds", "slices", "members", "messages", "clients", "calls", "idle", "groups", "outages")


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files, which the servers inherit.

    Raises:
        LoadError: The hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise LoadError(f"{count} open files are needed, and the limit is {hard}: use --idle and --members")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def measure(plan: Plan, sections: Sequence[str]) -> list[Row]:
    """Measure the sections one after the other, printing each when it is done."""
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # No server is left behind.
    rows: list[Row] = []
    for section in sections:
        rows += (measured := await SECTIONS[section](plan))
        print_rows(measured)
    return rows


def report(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Make the report for `--json`."""
    packages = ("fastapi", "starlette", "uvicorn", "uvloop", "websockets", "pydantic", "redis", "hiredis")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version(name) for name in packages},
        "plan": asdict(plan),
        "rows": [asdict(row) | {"within_limit": row.within_limit} for row in rows],
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Costs as ratios to bare FastAPI.")
    parser.add_argument("--quick", action="store_true", help="few of everything: to see that it works, not to compare")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="measure this section (may be repeated)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"default {getattr(Plan, name)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return the exit code: 1 if something was lost, or with `--check` exceeded a limit."""
    options = parse_arguments(arguments)
    chosen = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    plan = replace(QUICK if options.quick else Plan(), **chosen)
    try:
        allow_open_files(3 * plan.members + plan.idle + plan.idle_before + 200)
        rows = uvloop.run(measure(plan, options.only or list(SECTIONS)))
    except (LoadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(report(plan, rows), indent=2) + "\n")
    return 1 if options.check and not all(row.within_limit for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
