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
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import uvloop

from benchmarks.load import (
    HOST,
    Caller,
    Connection,
    LoadError,
    Member,
    StalledMember,
    TimedMember,
    ask,
    connected,
    deliver,
)

ROOT = Path(__file__).resolve().parent.parent
SERVERS = "benchmarks.servers:app"
CONSUMERS = "benchmarks.consumers:app"
UVICORN = (
    "--loop uvloop --ws auto --ws-per-message-deflate false --ws-ping-interval 0 --no-access-log --log-level warning"
)
STALLED_LIMIT_MB = 6.0
"""What one stalled member may cost: the default OUTBOX_BYTES, and half as much for what else goes on in the process."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured. The sizes are bytes, the pause is seconds."""

    rounds: int = 7
    slices: int = 20
    members: int = 500
    messages: int = 10
    message_size: int = 128
    clients: int = 50
    calls: int = 50
    idle: int = 2000
    idle_before: int = 500
    idle_rounds: int = 3
    readers: int = 20
    stall_messages: int = 1000
    stall_size: int = 16 * 1024
    stall_pause: float = 0.002
    stall_rounds: int = 3


QUICK = Plan(
    rounds=2,
    slices=2,
    members=100,
    clients=10,
    idle=200,
    idle_before=50,
    idle_rounds=1,
    readers=5,
    stall_messages=400,
    stall_size=32 * 1024,
    stall_rounds=1,
)


@dataclass(frozen=True)
class Row:
    """One line of the table: the values of all rounds, and their ratios to the yardstick's, where it has one."""

    section: str
    name: str
    unit: str
    values: list[float]
    ratios: list[float] | None = None
    limit: float | None = None

    @property
    def within_limit(self) -> bool:
        """Whether the median, of the ratios if there are any, keeps to the limit."""
        return self.limit is None or statistics.median(self.ratios or self.values) <= self.limit


class Server:
    """A uvicorn process that serves one of the applications."""

    def __init__(self, app: str) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", app, "--host", HOST, "--port", str(self.port), *UVICORN.split()]
        settings = ("CHANNELS_", "FASTAPI_CHANNELS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        self._memory = psutil.Process(self._process.pid)

    async def started(self, timeout: float = 30) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self.usage()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise LoadError("The server did not start") from None
                await asyncio.sleep(0.1)
            else:
                return

    async def usage(self, *, collect: bool = False) -> dict[str, Any]:
        """Ask for `servers.Usage`."""
        usage: dict[str, Any] = await self._request("GET", "/usage", collect=collect)
        return usage

    async def publish(self, numbers: range, *, size: int, pause: float) -> None:
        """Let the server publish the messages of these numbers."""
        await self._request("POST", "/publish", first=numbers.start, count=len(numbers), size=size, pause=pause)

    async def cpu_of(self, work: Awaitable[object]) -> float:
        """Do the work, and return the CPU seconds the server spent meanwhile."""
        before = await self.usage()
        await work
        after = await self.usage()
        return float(after["cpu"] - before["cpu"])

    def resident(self) -> int:
        """Return the resident memory of the process in bytes."""
        return int(self._memory.memory_info().rss)

    def stop(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def _request(self, method: str, path: str, **query: object) -> Any:
        return await asyncio.to_thread(self._blocking_request, method, f"{path}?{urlencode(query)}")

    def _blocking_request(self, method: str, target: str) -> Any:
        connection = HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise LoadError(f"{method} {target}: {response.status} {body[:500]!r}")
        return json.loads(body)


@asynccontextmanager
async def serving(app: str) -> AsyncIterator[Server]:
    """Run a server for the length of the block."""
    server = Server(app)
    try:
        await server.started()
        yield server
    finally:
        server.stop()


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


async def requests(plan: Plan) -> list[Row]:
    """Measure CPU µs per request and reply."""
    async with AsyncExitStack() as stack:
        callers = {}
        for name, app in {"bare": SERVERS, "action": CONSUMERS}.items():
            server = await stack.enter_async_context(serving(app))
            callers[name] = (
                server,
                await stack.enter_async_context(connected(server.port, "/ws/echo", Caller, plan.clients)),
            )

        async def cost(name: str) -> float:
            server, clients = callers[name]
            return await server.cpu_of(ask(clients, plan.calls)) / (plan.clients * plan.calls) * 1e6

        costs = await interleaved(list(callers), cost, rounds=plan.rounds, slices=plan.slices)
    title = f"request and reply, {plan.clients} clients"
    return compared(title, "µs per round trip", costs, {"action": 1.10})


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


async def interleaved(
    names: Sequence[str], cost: Callable[[str], Awaitable[float]], *, rounds: int, slices: int = 1, warm_up: bool = True
) -> dict[str, list[float]]:
    """Measure the variants in turn; a first round, to warm up, doesn't count.

    Args:
        names: The variants.
        cost: Measures a variant once.
        rounds: How many values each variant gets.
        slices: How many measurements are averaged to a value. The variants take turns after every slice, so that what
            else the machine does in a round meets all of them.
        warm_up: Whether there is a first round.
    """
    values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + warm_up):
        measured: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(slices):
            for name in names:
                measured[name].append(await cost(name))
        for name in names:
            values[name].append(statistics.fmean(measured[name]))
    return {name: of_rounds[int(warm_up) :] for name, of_rounds in values.items()}


def compared(title: str, unit: str, costs: dict[str, list[float]], limits: dict[str, float]) -> list[Row]:
    """Make the rows of a section whose first variant is the yardstick."""
    yardstick = next(iter(costs.values()))
    return [
        Row(title, name, unit, values, [a / b for a, b in zip(values, yardstick, strict=True)], limits.get(name))
        for name, values in costs.items()
    ]


def spread(values: Sequence[float]) -> str:
    """Write the median, the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rows of one section."""
    print(f"\n{rows[0].section}")
    for row in rows:
        ratio = spread(row.ratios) if row.ratios else "-"
        limit = "" if row.limit is None else f"<= {row.limit:.2f} {'ok' if row.within_limit else 'EXCEEDED'}"
        print(f"  {row.name:<32}{spread(row.values):>26} {row.unit:<18}{ratio:>20}  {limit}".rstrip(), flush=True)


SECTIONS: dict[str, Callable[[Plan], Awaitable[list[Row]]]] = {
    "fan-out": fan_out,
    "requests": requests,
    "memory": memory,
    "stalled": stalled,
}
SIZES = ("rounds", "slices", "members", "messages", "clients", "calls", "idle")


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
    packages = ("fastapi", "starlette", "uvicorn", "uvloop", "websockets", "pydantic")
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
