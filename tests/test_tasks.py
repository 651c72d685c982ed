"""Crews and lanes: many handlers in few tasks, each as if it had a task of its own."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import pytest

from fastapi_channels._tasks import TURN, Crew, Lane, LaneFull, in_thread, not_cancelled, run_blocking

Handler = Callable[[Any], Awaitable[None] | None]

who: ContextVar[Any] = ContextVar("who", default="nobody")


class Worked(Lane[Any]):
    """A lane that handles its items with a function, and notes what failed."""

    def __init__(self, crew: Crew, handler: Handler, *, capacity: int = 1000, is_open: bool = True) -> None:
        super().__init__(crew, capacity)
        self.handler = handler
        self.failures: list[tuple[Any, Exception]] = []
        if is_open:
            self.open(crew.context())

    def begin(self, item: Any) -> Awaitable[None] | None:
        return self.handler(item)

    def failed(self, item: Any, error: Exception) -> Awaitable[None] | None:
        self.failures.append((item, error))
        return None


@pytest.fixture
async def crew() -> Crew:
    return Crew(asyncio.get_running_loop())


async def until(is_so: Callable[[], bool]) -> None:
    """Let everything else run until something is so."""
    for _ in range(10_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise TimeoutError


async def over(*lanes: Lane[Any]) -> None:
    """Wait until what was dispatched has been taken up, and these lanes have handled everything."""
    await until(lambda: not lanes[0]._crew.is_busy)
    async with asyncio.timeout(5):
        for lane in lanes:
            await lane.idle()


def appending(to: list[Any]) -> Handler:
    """A handler that never waits."""
    return lambda item: to.append(item)


class Waiting:
    """A handler that waits until it is told to go on, and notes when it begins and ends."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, Any]] = []
        self.go_on = asyncio.Event()

    async def __call__(self, item: Any) -> None:
        self.noted.append(("begins", item))
        await self.go_on.wait()
        self.noted.append(("ends", item))

    async def begun(self) -> None:
        await until(lambda: bool(self.noted))


# Order


async def test_a_lane_keeps_order(crew: Crew) -> None:
    """The items of a lane are handled one at a time, in the order in which they came, waiting or not."""
    noted: list[Any] = []

    async def handler(item: int) -> None:
        noted.append(("begins", item))
        for _ in range(item % 3):
            await asyncio.sleep(0)
        noted.append(("ends", item))

    lane = Worked(crew, handler)
    for item in range(100):
        lane.put(item)
    await over(lane)
    assert noted == [(what, item) for item in range(100) for what in ("begins", "ends")]


async def test_a_closed_lane_keeps_its_items(crew: Crew) -> None:
    """What comes before a lane is opened waits for that."""
    noted: list[Any] = []
    lane = Worked(crew, appending(noted), is_open=False)
    lane.put(1)
    lane.put(2)
    await asyncio.sleep(0)
    assert noted == []
    assert list(lane.waiting) == [1, 2]
    assert lane.is_active
    lane.open(crew.context())
    await over(lane)
    assert noted == [1, 2]
    assert not lane.is_active


async def test_dispatched_items_come_behind_what_waits(crew: Crew) -> None:
    """What is dispatched to a lane is handled after what was put into it before, also while it was closed."""
    noted: list[Any] = []
    lanes = [Worked(crew, appending(noted), is_open=False), Worked(crew, appending([]))]
    for item in (1, 2):
        lanes[0].put(item)
    lanes[0].open(crew.context())
    crew.dispatch(3, list(lanes))
    crew.dispatch(4, list(lanes))
    await over(*lanes)
    assert noted == [1, 2, 3, 4]


async def test_what_is_dispatched_first_is_handled_first_in_every_lane(crew: Crew) -> None:
    """No lane gets an item before all lanes that don't wait have got those before it."""
    noted: list[tuple[int, int]] = []

    def make(number: int) -> Handler:
        return lambda item: noted.append((item, number))

    lanes = [Worked(crew, make(number)) for number in range(10)]
    for item in range(3):
        crew.dispatch(item, list(lanes))
    await over(*lanes)
    assert noted == [(item, number) for item in range(3) for number in range(10)]


# Waiting


async def test_a_handler_that_waits_holds_up_no_other_lane(crew: Crew) -> None:
    """While one lane's handler waits, all others go on, and only what is behind it in its lane waits."""
    handler, noted = Waiting(), list[Any]()
    stuck = Worked(crew, handler)
    lanes = [Worked(crew, appending(noted)) for _ in range(3)]
    for item in range(3):
        crew.dispatch(item, [lanes[0], stuck, *lanes[1:]])
    await over(*lanes)
    assert noted == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert handler.noted == [("begins", 0)]
    handler.go_on.set()
    await over(stuck)
    assert handler.noted == [(what, item) for item in range(3) for what in ("begins", "ends")]


async def test_all_lanes_may_wait_at_once(crew: Crew) -> None:
    """Any number of handlers wait at the same time, and end in whichever order they can."""
    doors = [asyncio.Event() for _ in range(100)]
    noted: list[Any] = []

    def make(number: int) -> Handler:
        async def handler(item: Any) -> None:
            noted.append(("begins", number))
            await doors[number].wait()
            noted.append(("ends", number))

        return handler

    lanes = [Worked(crew, make(number)) for number in range(100)]
    crew.dispatch("x", list(lanes))
    await until(lambda: len(noted) == 100)
    assert noted == [("begins", number) for number in range(100)]
    for number in reversed(range(100)):
        doors[number].set()
        await over(lanes[number])
    assert noted[100:] == [("ends", number) for number in reversed(range(100))]


async def test_nothing_is_left_running(crew: Crew) -> None:
    """When everything has been handled, there is no task of the crew, and an idle lane costs none."""
    before = asyncio.all_tasks()
    handler = Waiting()
    lanes = [Worked(crew, handler if number == 3 else appending([])) for number in range(10)]
    assert asyncio.all_tasks() == before
    crew.dispatch("x", list(lanes))
    await handler.begun()
    assert len(asyncio.all_tasks() - before) == 1
    handler.go_on.set()
    await over(*lanes)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert not crew.is_busy


# As if it had a task of its own


async def test_current_task(crew: Crew) -> None:
    """A handler runs in one task from its first line to its last, and no two handlers that wait are in the same."""
    seen: dict[int, list[Any]] = {number: [] for number in range(6)}

    def make(number: int) -> Handler:
        async def handler(item: Any) -> None:
            for _ in range(1 + number % 3):
                seen[number].append(asyncio.current_task())
                await asyncio.sleep(0)
            seen[number].append(asyncio.current_task())

        return handler

    lanes = [Worked(crew, make(number)) for number in seen]
    crew.dispatch("x", list(lanes))
    await over(*lanes)
    tasks = [set(tasks) for tasks in seen.values()]
    assert all(len(each) == 1 for each in tasks)
    assert len(set.union(*tasks)) == len(seen)


async def test_lanes_that_do_not_wait_share_a_task(crew: Crew) -> None:
    """Handlers that don't wait are all handled in one task."""
    seen: list[Any] = []
    lanes = [Worked(crew, lambda item: seen.append(asyncio.current_task())) for _ in range(50)]
    crew.dispatch("x", list(lanes))
    await over(*lanes)
    assert len(seen) == 50
    assert len(set(seen)) == 1


async def test_timeouts_and_scopes_in_handlers(crew: Crew) -> None:
    """Timeouts, task groups and cancel scopes work in handlers, each in its own, also where others share the worker."""
    outcomes: list[str] = []

    async def asyncio_timeout(item: Any) -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            outcomes.append("asyncio.timeout")

    async def timeout_in_time(item: Any) -> None:
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        outcomes.append("in time")

    async def wait_for(item: Any) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        outcomes.append("asyncio.wait_for")

    async def task_group(item: Any) -> None:
        async def fail() -> None:
            raise KeyError

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.Event().wait()
        except* KeyError:
            outcomes.append("TaskGroup")

    async def anyio_scope(item: Any) -> None:
        with anyio.move_on_after(0.01) as scope:
            await asyncio.Event().wait()
        assert scope.cancelled_caught
        outcomes.append("move_on_after")

    async def anyio_group(item: Any) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(asyncio.Event().wait)
            await asyncio.sleep(0)
            group.cancel_scope.cancel()
        outcomes.append("create_task_group")

    handlers = [asyncio_timeout, timeout_in_time, wait_for, task_group, anyio_scope, anyio_group]
    lanes = [lane for handler in handlers for lane in (Worked(crew, appending([])), Worked(crew, handler))]
    for _ in range(2):
        crew.dispatch("x", list(lanes))
    await over(*lanes)
    expected = ["asyncio.timeout", "in time", "asyncio.wait_for", "TaskGroup", "move_on_after", "create_task_group"]
    assert sorted(outcomes) == sorted(expected * 2)
    assert all(lane.failures == [] for lane in lanes)


# Contexts


async def test_each_lane_has_its_own_context(crew: Crew) -> None:
    """A handler sees the context variables of its own lane, whoever dispatches and whoever shares the worker."""
    seen: list[tuple[str, Any]] = []

    async def handler(item: Any) -> None:
        seen.append((item, who.get()))
        await asyncio.sleep(0)
        seen.append((item, who.get()))

    lanes = []
    for name in ("ann", "bob", "ann"):
        token = who.set(name)
        lanes.append(Worked(crew, handler))
        who.reset(token)
    token = who.set("dispatcher")
    crew.dispatch("x", list(lanes))
    lanes[1].put("y")
    who.reset(token)
    await over(*lanes)
    assert sorted(seen) == sorted([("x", "ann"), ("x", "ann"), ("x", "bob")] * 2 + [("y", "bob")] * 2)


async def test_what_a_handler_changes_in_its_context_leaks_nowhere(crew: Crew) -> None:
    """A context variable that a handler sets is seen neither by its lane's next handler nor by other lanes."""
    seen: list[Any] = []

    def handler(item: Any) -> None:
        seen.append(who.get())
        who.set(item)

    async def waiting(item: Any) -> None:
        seen.append(who.get())
        who.set(item)
        await asyncio.sleep(0)
        seen.append("own" if who.get() == item else who.get())

    lanes = [Worked(crew, handler), Worked(crew, waiting), Worked(crew, handler)]
    for item in ("x", "y", "z"):
        crew.dispatch(item, list(lanes))
    lanes[0].put("last")
    await over(*lanes)
    assert sorted(seen) == sorted(["nobody"] * 10 + ["own"] * 3)


async def test_equal_contexts_are_one(crew: Crew) -> None:
    """Contexts that hold the same values are the same object, so that their lanes share a worker."""
    first = crew.context()
    assert crew.context() is first
    token = who.set("ann")
    changed = crew.context()
    assert changed is not first
    assert changed[who] == "ann"
    who.reset(token)
    seen: list[Any] = []
    lanes = [Worked(crew, lambda item: seen.append(asyncio.current_task())) for _ in range(2)]
    crew.dispatch("x", list(lanes))
    await over(*lanes)
    assert len(set(seen)) == 1


class Incomparable:
    """A value that can't even be compared with itself."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("what a question")

    __hash__ = object.__hash__


async def test_values_that_cannot_be_compared(crew: Crew) -> None:
    """A context variable whose value can't be compared costs a task, and breaks nothing."""
    seen: list[Any] = []

    def handler(item: Any) -> None:
        seen.append(type(who.get()).__name__)
        who.set(Incomparable())

    who.set(Incomparable())
    lanes = [Worked(crew, handler) for _ in range(3)]
    crew.dispatch("x", list(lanes))
    crew.dispatch("y", list(lanes))
    await over(*lanes)
    assert seen == ["Incomparable"] * 6
    assert all(lane.failures == [] for lane in lanes)


# Cancelling


async def test_cancelling_reaches_one_handler(crew: Crew) -> None:
    """Cancelling a lane ends the handler that waits in it and forgets what waits, and no other lane notices."""
    handlers = [Waiting() for _ in range(3)]
    lanes = [Worked(crew, handler) for handler in handlers]
    for item in ("x", "y"):
        crew.dispatch(item, list(lanes))
    await until(lambda: not crew.is_busy)
    assert all(list(lane.waiting) == ["y"] for lane in lanes)
    lanes[1].cancel()
    await over(lanes[1])
    for handler in handlers:
        handler.go_on.set()
    await over(*lanes)
    assert handlers[1].noted == [("begins", "x")]
    for handler in (handlers[0], handlers[2]):
        assert handler.noted == [("begins", "x"), ("ends", "x"), ("begins", "y"), ("ends", "y")]
    assert all(lane.failures == [] for lane in lanes)


async def test_a_lane_that_was_cancelled_goes_on(crew: Crew) -> None:
    """A lane whose handler was cancelled handles what comes after."""
    handler = Waiting()
    lane = Worked(crew, handler)
    lane.put("x")
    await handler.begun()
    lane.cancel()
    lane.put("y")
    handler.go_on.set()
    await over(lane)
    assert handler.noted == [("begins", "x"), ("begins", "y"), ("ends", "y")]


async def test_a_handler_that_does_not_let_itself_be_cancelled(crew: Crew) -> None:
    """A handler may see to its end when it is cancelled, and is waited for."""
    noted: list[str] = []
    begun = asyncio.Event()

    async def handler(item: Any) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            noted.append("seen to")

    lane = Worked(crew, handler)
    lane.put("x")
    await begun.wait()
    lane.cancel()
    await over(lane)
    assert noted == ["seen to"]
    assert lane.failures == []


@pytest.mark.parametrize("how", ["its lane", "its task"])
async def test_a_handler_that_cancels_itself_and_ends(crew: Crew, how: str) -> None:
    """A handler that cancels itself and ends without waiting takes no other with it."""
    noted: list[str] = []

    def cancelling(item: Any) -> None:
        if how == "its lane":
            lanes[0].cancel()
        else:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    async def waiting(item: Any) -> None:
        await asyncio.sleep(0)
        noted.append("not cancelled")

    lanes = [Worked(crew, cancelling), Worked(crew, waiting), Worked(crew, waiting)]
    crew.dispatch("x", list(lanes))
    await over(*lanes)
    assert noted == ["not cancelled"] * 2
    assert all(lane.failures == [] for lane in lanes)


async def test_awaiting_what_others_have_cancelled(crew: Crew) -> None:
    """A handler that awaits what somebody else has cancelled has failed; it was not cancelled itself."""
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    noted: list[Any] = []

    async def handler(item: Any) -> None:
        if item == "x":
            await cancelled
        noted.append(item)

    lane = Worked(crew, handler)
    lane.put("x")
    lane.put("y")
    await over(lane)
    assert noted == ["y"]
    ((item, error),) = lane.failures
    assert item == "x"
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, asyncio.CancelledError)


async def test_not_cancelled() -> None:
    """An error stays what it is, a stray cancellation becomes an error, and one that was asked for is raised."""
    task = asyncio.current_task()
    assert task is not None
    error = KeyError()
    assert not_cancelled(error, task) is error
    assert isinstance(not_cancelled(asyncio.CancelledError(), task), RuntimeError)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        not_cancelled(asyncio.CancelledError(), task)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    task.uncancel()


# Failing


async def test_a_handler_that_fails(crew: Crew) -> None:
    """What a handler raises, before it waits or after, is told with its item, and the lane goes on."""
    noted: list[Any] = []

    def at_once(item: Any) -> None:
        raise KeyError(item)

    async def before(item: Any) -> None:
        raise KeyError(item)

    async def after(item: Any) -> None:
        await asyncio.sleep(0)
        raise KeyError(item)

    lanes = [Worked(crew, handler) for handler in (at_once, before, after)]
    other = Worked(crew, appending(noted))
    for item in ("x", "y"):
        crew.dispatch(item, [*lanes, other])
    await over(*lanes, other)
    for lane in lanes:
        assert [(item, repr(error)) for item, error in lane.failures] == [
            ("x", "KeyError('x')"),
            ("y", "KeyError('y')"),
        ]
    assert noted == ["x", "y"]


async def test_seeing_to_a_failure_may_wait(crew: Crew) -> None:
    """What `failed` returns is awaited before the next item is handled."""
    noted: list[Any] = []

    class Answering(Worked):
        async def answer(self, item: Any) -> None:
            await asyncio.sleep(0)
            noted.append(f"answered {item}")

        def failed(self, item: Any, error: Exception) -> Awaitable[None]:
            return self.answer(item)

    def handler(item: Any) -> None:
        noted.append(item)
        raise KeyError

    lane = Answering(crew, handler)
    lane.put("x")
    lane.put("y")
    await over(lane)
    assert noted == ["x", "answered x", "y", "answered y"]


async def test_a_failure_that_nobody_sees_to(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """If `failed` itself raises, that is logged, and this lane and the others go on."""
    noted: list[Any] = []

    class Helpless(Worked):
        def failed(self, item: Any, error: Exception) -> None:
            raise error

    def handler(item: Any) -> None:
        if item == "x":
            raise KeyError("unseen")
        noted.append(item)

    lanes = [Helpless(crew, handler), Worked(crew, appending(noted))]
    for item in ("x", "y"):
        crew.dispatch(item, list(lanes))
    await over(*lanes)
    assert sorted(noted) == ["x", "y", "y"]
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "a task of fastapi-channels failed"
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "KeyError('unseen')"


# Fairness


async def test_a_busy_lane_gives_others_their_turn(crew: Crew) -> None:
    """A lane with much to do is set back after some items, so that others and the event loop get on."""
    noted: list[Any] = []
    busy, other = Worked(crew, lambda item: noted.append("busy")), Worked(crew, lambda item: noted.append("other"))
    for item in range(10 * TURN):
        busy.put(item)
    other.put("x")
    asyncio.get_running_loop().call_soon(noted.append, "loop")
    await over(busy, other)
    assert len(noted) == 10 * TURN + 2
    assert noted.index("other") <= TURN
    assert noted.index("loop") <= TURN + 1


async def test_lanes_that_feed_each_other_do_not_starve_the_loop(crew: Crew) -> None:
    """Two lanes that never stop giving each other work let everything else run."""
    handled = 0
    is_playing = True

    def make(number: int) -> Handler:
        def handler(item: Any) -> None:
            nonlocal handled
            handled += 1
            if is_playing:
                lanes[1 - number].put(item)
                crew.dispatch(item, [lanes[number]])
                lanes[number].clear()

        return handler

    lanes = [Worked(crew, make(number)) for number in range(2)]
    lanes[0].put("ball")
    for _ in range(50):
        before = handled
        await asyncio.sleep(0)
        assert handled - before <= 4 * TURN
    assert handled > 10
    is_playing = False
    await over(*lanes)


async def test_a_lane_that_feeds_itself_does_not_starve_the_loop(crew: Crew) -> None:
    """A handler that puts a new item into its own lane each time lets everything else run."""
    handled = 0
    is_playing = True

    def handler(item: Any) -> None:
        nonlocal handled
        handled += 1
        if is_playing:
            lane.put(item)

    lane = Worked(crew, handler)
    lane.put("x")
    for _ in range(50):
        before = handled
        await asyncio.sleep(0)
        assert handled - before <= TURN
    assert handled > TURN
    is_playing = False
    await over(lane)


# Room


async def test_capacity(crew: Crew) -> None:
    """What is dispatched to a lane that is full fails with LaneFull; `put` doesn't look at the capacity."""
    handler = Waiting()
    lane, other = Worked(crew, handler, capacity=2), Worked(crew, appending([]))
    for item in range(5):
        crew.dispatch(item, [lane, other])
    await over(other)
    assert list(lane.waiting) == [1, 2]
    assert [(item, type(error)) for item, error in lane.failures] == [(3, LaneFull), (4, LaneFull)]
    lane.put(5)
    assert list(lane.waiting) == [1, 2, 5]
    handler.go_on.set()
    await over(lane)
    assert [item for what, item in handler.noted if what == "ends"] == [0, 1, 2, 5]


async def test_reserving(crew: Crew) -> None:
    """A place that was reserved counts as taken until the item is dispatched and taken up."""
    handler = Waiting()
    lane = Worked(crew, handler, capacity=2)
    for item in range(2):
        assert lane.reserve()
        crew.dispatch(item, [lane])
    assert not lane.reserve()
    await handler.begun()
    await asyncio.sleep(0)
    assert lane.reserve()
    crew.dispatch(2, [lane])
    assert not lane.reserve()
    handler.go_on.set()
    await over(lane)
    assert lane.failures == []
    assert lane.reserve()


async def test_room(crew: Crew) -> None:
    """Who waits for room is told when the next item has been taken from those waiting."""
    handler = Waiting()
    lane = Worked(crew, handler)
    for item in range(3):
        lane.put(item)
    await handler.begun()
    room = asyncio.ensure_future(lane.room())
    await asyncio.sleep(0)
    assert not room.done()
    handler.go_on.set()
    async with asyncio.timeout(5):
        await room
    await over(lane)


async def test_idle(crew: Crew) -> None:
    """Who waits for idleness is told when the last item has been handled; cancelling that leaves the lane to go on."""
    handler = Waiting()
    lane = Worked(crew, handler)
    await over(lane)
    lane.put("x")
    lane.put("y")
    waiting = asyncio.ensure_future(lane.idle())
    await handler.begun()
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait({waiting})
    waiting = asyncio.ensure_future(lane.idle())
    await asyncio.sleep(0)
    handler.go_on.set()
    async with asyncio.timeout(5):
        await waiting
    assert handler.noted[-1] == ("ends", "y")


async def test_a_lane_that_was_never_opened_is_waited_for_by_nobody(crew: Crew) -> None:
    """Waiting for the idleness of a lane that is closed returns at once."""
    lane = Worked(crew, appending([]), is_open=False)
    lane.put("x")
    await over(lane)
    assert list(lane.waiting) == ["x"]


# All of it at once


@pytest.mark.parametrize("seed", range(5))
async def test_any_mix(crew: Crew, seed: int) -> None:
    """Whatever handlers do and however items come, each lane handles each of its items once, in order."""
    dice = random.Random(seed)
    handled: list[list[int]] = [[] for _ in range(8)]
    expected: list[list[int]] = [[] for _ in range(8)]

    def make(number: int) -> Handler:
        async def slow(item: int) -> None:
            assert who.get() == f"lane {number % 3}"
            task = asyncio.current_task()
            if item % 7 == 0:
                who.set("changed")
            for _ in range(item % 5):
                await asyncio.sleep(0)
            assert asyncio.current_task() is task
            handled[number].append(item)
            if item % 11 == 0:
                raise KeyError(item)

        def handler(item: int) -> Awaitable[None] | None:
            if item % 3:
                return slow(item)
            assert who.get() == f"lane {number % 3}"
            handled[number].append(item)
            return None

        return handler

    lanes = []
    for number in range(8):
        token = who.set(f"lane {number % 3}")
        lanes.append(Worked(crew, make(number)))
        who.reset(token)
    for item in range(500):
        numbers = sorted(dice.sample(range(8), dice.randint(1, 8)))
        if dice.random() < 0.5:
            crew.dispatch(item, [lanes[number] for number in numbers])
        else:
            numbers = numbers[:1]
            # Behind what was dispatched before and has not been taken up yet.
            await until(lambda: not crew.is_busy)
            lanes[numbers[0]].put(item)
        for number in numbers:
            expected[number].append(item)
        if dice.random() < 0.2:
            await asyncio.sleep(0)
    await over(*lanes)
    assert handled == expected
    for number, lane in enumerate(lanes):
        assert [item for item, _ in lane.failures] == [n for n in expected[number] if n % 11 == 0 and n % 3]
        assert all(isinstance(error, KeyError) for _, error in lane.failures)


# Stepping by hand


class Stepped:
    """An async function that does what the argument says, and what came of it."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    async def __call__(self, futures: list[Any]) -> None:
        try:
            for future in futures:
                if isinstance(future, BaseException):
                    raise future
                self.noted.append(await (asyncio.sleep(0) if future is None else future))
            self.noted.append("over")
        except BaseException as error:
            self.noted.append(type(error).__name__)
            raise


async def finished(rest: Awaitable[None] | None) -> None:
    assert rest is not None
    async with asyncio.timeout(5):
        await rest


async def test_a_function_that_does_not_wait(crew: Crew) -> None:
    """A function that doesn't wait is over when `begin` returns, and has needed no task."""
    before = asyncio.all_tasks()
    stepped = Stepped()
    for _ in range(3):
        assert crew.begin(stepped([])) is None
    assert stepped.noted == ["over"] * 3
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_function_that_waits(crew: Crew, times: int) -> None:
    """A function that waits leaves its rest to be awaited, with the results of what it waits for."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(times)]
    stepped = Stepped()
    rest = crew.begin(stepped(futures))
    assert stepped.noted == []
    for number, future in enumerate(futures):
        loop.call_soon(future.set_result, number)
    await finished(rest)
    assert stepped.noted == [*range(times), "over"]


async def test_a_function_that_yields(crew: Crew) -> None:
    """A function that only lets others run, as by `sleep(0)`, goes on in the rest."""
    stepped = Stepped()
    rest = crew.begin(stepped([None, None]))
    assert stepped.noted == []
    await finished(rest)
    assert stepped.noted == [None, None, "over"]


async def test_a_function_that_raises_before_it_waits(crew: Crew) -> None:
    """What a function raises before it waits is raised by `begin`, and the next function is not affected."""
    stepped = Stepped()
    for _ in range(2):
        with pytest.raises(KeyError):
            crew.begin(stepped([KeyError()]))
        assert crew.begin(stepped([])) is None
    assert stepped.noted == ["KeyError", "over"] * 2


async def test_a_function_that_raises_after_it_has_waited(crew: Crew) -> None:
    """What a function raises later is raised by its rest, also if it is what it waited for that failed."""
    loop = asyncio.get_running_loop()
    stepped, failing = Stepped(), loop.create_future()
    rests = [crew.begin(stepped([None, KeyError()])), crew.begin(stepped([failing]))]
    failing.set_exception(KeyError())
    for rest in rests:
        with pytest.raises(KeyError):
            await finished(rest)
    assert stepped.noted == [None, "KeyError", "KeyError"]
    assert crew.begin(stepped([])) is None


async def test_a_function_that_is_cancelled(crew: Crew) -> None:
    """Cancelling who awaits the rest reaches the function where it waits."""
    stepped = Stepped()
    rest = crew.begin(stepped([asyncio.get_running_loop().create_future()]))
    waiting = asyncio.create_task(finished(rest))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert stepped.noted == ["CancelledError"]


async def test_a_function_that_does_not_let_itself_be_cancelled(crew: Crew) -> None:
    """A function may wait again after it was cancelled, and its rest ends with it."""
    noted: list[str] = []

    async def stubborn(argument: Any) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            noted.append("seen to")

    waiting = asyncio.create_task(finished(crew.begin(stubborn(None))))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert noted == ["seen to"]


async def test_many_functions_wait_at_once(crew: Crew) -> None:
    """Each function that waits has a rest of its own, and they end in any order."""
    loop = asyncio.get_running_loop()
    stepped = [Stepped() for _ in range(5)]
    futures = [loop.create_future() for _ in range(5)]
    rests = [crew.begin(one([future])) for one, future in zip(stepped, futures, strict=True)]
    for number in (3, 1, 4, 0, 2):
        futures[number].set_result(number)
        await finished(rests[number])
        assert stepped[number].noted == [number, "over"]


# Tasks and threads


async def test_starting_a_task(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """A task runs in a copy of the context that it is given; what it raises is logged, and its cancellation is not."""
    seen: list[Any] = []

    async def look(*, fails: bool) -> None:
        seen.append(who.get())
        who.set("changed")
        if fails:
            raise KeyError("unseen")
        await asyncio.Event().wait()

    token = who.set("ann")
    context = copy_context()
    who.reset(token)
    failing, waiting = crew.start(look(fails=True), context), crew.start(look(fails=False), context)
    await asyncio.wait({failing})
    waiting.cancel()
    await asyncio.wait({waiting})
    await asyncio.sleep(0)
    assert seen == ["ann", "ann"]
    assert context[who] == "ann"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "a task of fastapi-channels failed")
    ]


async def test_blocking_from_another_thread() -> None:
    """`run_blocking` gives another thread what a coroutine returns or raises, and refuses the loop's own thread."""
    loop = asyncio.get_running_loop()

    async def answer() -> threading.Thread:
        await asyncio.sleep(0)
        return threading.current_thread()

    async def fail() -> None:
        raise KeyError

    assert await asyncio.to_thread(lambda: run_blocking(loop, answer())) is threading.current_thread()
    with pytest.raises(KeyError):
        await asyncio.to_thread(lambda: run_blocking(loop, fail()))
    with pytest.raises(RuntimeError, match="on the event loop use await"):
        run_blocking(loop, answer())


async def test_blocking_from_another_event_loop() -> None:
    """A thread that runs an event loop of its own may block on another's."""
    loop = asyncio.get_running_loop()

    async def answer() -> str:
        return "answer"

    async def ask() -> str:
        return run_blocking(loop, answer())

    assert await asyncio.to_thread(lambda: asyncio.run(ask())) == "answer"


async def test_in_thread() -> None:
    """`in_thread` calls a function in another thread, in a copy of the context."""
    token = who.set("ann")

    def look(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        seen = who.get()
        who.set("changed")
        return seen, args, kwargs, threading.current_thread()

    seen, args, kwargs, thread = await in_thread(look, 1, two=2)
    assert (seen, args, kwargs) == ("ann", (1,), {"two": 2})
    assert thread is not threading.current_thread()
    assert who.get() == "ann"
    who.reset(token)
    with pytest.raises(KeyError):
        await in_thread(dict[str, int]().__getitem__, "x")


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_thread_that_is_cancelled(how: str) -> None:
    """Cancelling `in_thread` returns at once, and the thread runs on with nobody listening."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    scope = anyio.CancelScope()

    def work() -> None:
        begun.set()
        go_on.wait(5)
        ended.set()

    async def working() -> None:
        with scope:
            await in_thread(work)

    task = asyncio.create_task(working())
    await asyncio.to_thread(begun.wait, 5)
    if how == "task":
        task.cancel()
    else:
        scope.cancel()
    await asyncio.wait({task}, timeout=4)
    assert task.done()
    assert not ended.is_set()
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 5)
