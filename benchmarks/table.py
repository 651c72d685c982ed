"""How much is measured, how it is measured in turn, and how it is shown."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


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
    groups: int = 1000
    group_sends: int = 3
    commands_sends: int = 100
    burst_groups: int = 20
    burst_messages: int = 30
    burst_rounds: int = 3
    outages: int = 3
    outage_members: int = 5
    outage_groups: int = 5000
    outage_messages: int = 2000


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
    groups=200,
    commands_sends=10,
    burst_rounds=1,
    outages=1,
    outage_groups=2000,
    outage_messages=500,
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
    floor: float | None = None

    @property
    def within_limit(self) -> bool:
        """Whether the median, of the ratios if there are any, keeps to the limit, or to the floor."""
        median = statistics.median(self.ratios or self.values)
        return (self.limit is None or median <= self.limit) and (self.floor is None or median >= self.floor)


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


def means(values: Sequence[float], slices: int) -> list[float]:
    """Average what was noted beside `interleaved`, for each of its rounds but the first, which was to warm up."""
    return [statistics.fmean(values[start : start + slices]) for start in range(slices, len(values), slices)]


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
    """Print the rows, those of one section under its title."""
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            print(f"\n{section}")
        ratio = spread(row.ratios) if row.ratios else "-"
        limit = "" if row.limit is None else f"<= {row.limit:.2f} {'ok' if row.within_limit else 'EXCEEDED'}"
        if row.floor is not None:
            limit = f">= {row.floor:.2f} {'ok' if row.within_limit else 'MISSED'}"
        print(f"  {row.name:<32}{spread(row.values):>26} {row.unit:<18}{ratio:>20}  {limit}".rstrip(), flush=True)
