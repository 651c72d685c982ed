"""Where tasks are started: the crew that runs short jobs, and the lanes that keep the jobs of a connection in order.

An asyncio task for each frame or event costs more than most handlers do. A `Crew` therefore works off many lanes in
one task, one after another, and still gives each the guarantees of a task of its own:

- A handler that waits holds up nobody. Right after a worker's first step, `_relieve` looks whether it got through; if
  it did not, the worker stays with the lane that waits and another one goes on with the queue.
- `asyncio.current_task()` is the same from a handler's first line to its last, so timeouts, task groups and cancel
  scopes work in it, and cancelling that task while the handler waits reaches that handler alone.
- A handler runs in a copy of its own connection's context. Lanes share a worker only while their contexts are equal,
  and a worker whose context was changed by a handler takes no other lane after it.
- Order: the queue is one, and a lane that is busy keeps what comes. So what is dispatched first is handled first, in
  every lane.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar, cast

import anyio.to_thread

logger = logging.getLogger("fastapi_channels")

Item = TypeVar("Item")
Result = TypeVar("Result")

#: How many items of one lane are handled before other connections have their turn.
TURN = 32

_OVER: Any = object()
_WAITING: Any = object()


class LaneFull(Exception):
    """A lane has no room for an item that was dispatched to it."""


class Crew:
    """Works off the lanes of many connections in as few tasks as possible; one for each layer and event loop.

    Its queue is worked off in order by one worker at a time: the next one takes over where the last one got stuck.
    Only the loop's own thread may call it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: The loop's time when the item at hand was taken up, or a moment before: not later than a worker's first step.
        self.now = loop.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._queue: deque[tuple[Any, Iterator[Lane[Any]], Context]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._known = Context()
        self._stepper = _new_stepper()

    @property
    def is_busy(self) -> bool:
        """Whether something was dispatched that no worker has taken up yet."""
        return bool(self._queue)

    def context(self) -> Context:
        """The current context; the same object as the last one if it holds the same values, so that lanes share it."""
        context = copy_context()
        if not _is_equal(self._known, context):
            self._known = context
        return self._known

    def start(self, coroutine: Coroutine[Any, Any, None], context: Context) -> asyncio.Task[None]:
        """Run `coroutine` in a task of its own; what it raises is logged."""
        task = self.loop.create_task(coroutine, context=context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
        """Run a coroutine, without a task, for as long as it doesn't wait.

        Returns:
            None if it is over; else the rest of it, which somebody has to await.
        """
        stepper = self._stepper
        try:
            waits_for = stepper.send(coroutine)
        except BaseException:
            self._stepper = _new_stepper()
            raise
        if waits_for is _OVER:
            return None
        self._stepper = _new_stepper()  # this one stays with what it waits for
        return rest_of(stepper, waits_for)

    def dispatch(self, item: Any, lanes: list[Lane[Any]]) -> None:
        """Have one item handled in each of these lanes soon, behind what waits in it.

        A lane without room for it gets `LaneFull` as the item's failure.
        """
        context = lanes[0].context
        self._add(item, lanes, self._known if context is None else context)

    def submit(self, lane: Lane[Any], context: Context) -> None:
        """Have what waits in a lane handled soon, in a copy of `context` (see there)."""
        self._add(_WAITING, (lane,), context)

    def _add(self, item: Any, lanes: Iterable[Lane[Any]], context: Context) -> None:
        self._queue.append((item, iter(lanes), context))
        if self._worker is None:
            self._next_worker()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of fastapi-channels failed", exc_info=error)

    def _next_worker(self) -> None:
        self._worker = None
        if self._queue:
            context = self._queue[0][2]
            self._worker = self.start(self._work(context), context)

    def _relieve(self, worker: asyncio.Task[None]) -> None:
        """Let another worker go on, if this one has not got through in its first step."""
        if self._worker is worker:
            self._next_worker()

    async def _work(self, context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.loop.call_soon(self._relieve, task)
        self.now = self.loop.time()
        queue = self._queue
        try:
            for _ in range(len(queue)):  # what is added from here on is for the next worker: nobody starves the loop
                item, lanes, job_context = queue[0]
                if job_context is not context:
                    return
                for lane in lanes:
                    if item is _WAITING:
                        if lane._waiting is None:
                            lane.go_on()
                            continue
                        current = lane.take()
                    else:
                        if lane.reserved:
                            lane.reserved -= 1
                        if lane.is_active or lane.context is not context:
                            lane.offer(item)
                            continue
                        lane.is_active = True
                        current = item
                    lane.task = task
                    turn = TURN
                    try:
                        while True:
                            try:
                                rest = lane.begin(current)
                                if rest is not None:
                                    await rest
                            except (Exception, asyncio.CancelledError) as error:
                                rest = lane.failed(current, not_cancelled(error, task))
                                if rest is not None:
                                    await rest
                            turn -= 1
                            # A task that was cancelled, by its handler perhaps, is no good for another one.
                            try:
                                is_changed = copy_context() != context or task.cancelling() > 0
                            except Exception:  # a value that can't be compared is another value
                                is_changed = True
                            if is_changed or lane._waiting is None or not turn:
                                break
                            if self._worker is not task:
                                self.now = self.loop.time()
                            current = lane.take()
                    finally:
                        lane.task = None
                        if lane._waiting is not None or lane.is_watched:
                            lane.go_on()
                        else:
                            lane.is_active = False
                    if is_changed or self._worker is not task:
                        return
                queue.popleft()
        finally:
            if self._worker is task:
                self._next_worker()


class Lane(ABC, Generic[Item]):
    """Handles the items of one connection one at a time, in order; costs nothing while there are none.

    Subclasses say how. It is made closed, and keeps its items until `open` is called.

    Args:
        crew: Who does the work.
        capacity: How many items wait before a dispatched one fails; `put` doesn't look at it.

    Attributes:
        reserved: How many items have been announced by `reserve` and not been dispatched yet.
        is_active: Whether an item is waiting or being handled, or the lane is not open yet.
        is_watched: Whether somebody waits for `room` or `idle`.
        task: The one that handles an item at this moment.
        context: In a copy of which items are handled; None until the lane is open.
    """

    __slots__ = (
        "_crew",
        "_idle",
        "_room",
        "_waiting",
        "capacity",
        "context",
        "is_active",
        "is_watched",
        "reserved",
        "task",
    )

    def __init__(self, crew: Crew, capacity: int) -> None:
        self._waiting: list[Item] | None = None
        self.reserved = 0
        self.is_active = True
        self.is_watched = False
        self.task: asyncio.Task[Any] | None = None
        self.context: Context | None = None
        self.capacity = capacity
        self._crew = crew
        self._room: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None

    @abstractmethod
    def begin(self, item: Item) -> Awaitable[Any] | None:
        """Handle an item: do what can be done at once, and return the rest to be awaited, or None."""

    @abstractmethod
    def failed(self, item: Item, error: Exception) -> Awaitable[None] | None:
        """See to an item whose `begin` or the rest of it raised, or that got `LaneFull`."""

    @property
    def waiting(self) -> Sequence[Item]:
        """The items that have not been begun, oldest first."""
        return self._waiting or ()

    def open(self, context: Context) -> None:
        """Begin to handle the items, each in a copy of `context`, which is the crew's."""
        self.context = context
        self.go_on()

    def put(self, item: Item) -> None:
        """Add an item behind the others; never waits."""
        if self._waiting is None:
            self._waiting = [item]
        else:
            self._waiting.append(item)
        if not self.is_active:
            self.go_on()

    def offer(self, item: Item) -> None:
        """Add an item behind the others if there is room; else it fails with `LaneFull`."""
        if len(self.waiting) < self.capacity:
            self.put(item)
        else:
            self.failed(item, LaneFull())

    def reserve(self) -> bool:
        """Whether there is room for one more item, which is then to be dispatched."""
        if len(self.waiting) + self.reserved >= self.capacity:
            return False
        self.reserved += 1
        return True

    def take(self) -> Item:
        """The oldest item that waits, which is being handled from now on."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        assert self._waiting is not None
        item = self._waiting.pop(0)
        if not self._waiting:
            self._waiting = None
        return item

    async def room(self) -> None:
        """Wait until an item has been taken from those waiting. Cancelling is safe: nothing changes."""
        self._room = self._crew.loop.create_future()
        self.is_watched = True
        try:
            await self._room
        finally:
            self._room = None
            self.is_watched = self._idle is not None

    async def idle(self) -> None:
        """Wait until every item has been handled, if it is open. Cancelling is safe: the lane goes on."""
        while self.is_active and self.context is not None:
            self._idle = self._crew.loop.create_future()
            self.is_watched = True
            try:
                await self._idle
            finally:
                self._idle = None
                self.is_watched = self._room is not None

    def clear(self) -> None:
        """Forget the items that wait."""
        self._waiting = None

    def cancel(self) -> None:
        """Forget the items that wait and cancel the one that is being handled."""
        self.clear()
        if self.task is not None:
            self.task.cancel()

    def go_on(self) -> None:
        """Have the crew work off what waits, if anything does."""
        if self._waiting is not None:
            assert self.context is not None
            self.is_active = True
            self._crew.submit(self, self.context)
            return
        self.is_active = False
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


@types.coroutine
def _step() -> Generator[Any, Any, None]:
    """Runs the coroutines that are sent into it, one after another, and yields `_OVER` after each.

    One that waits makes it yield what it waits for, as it would to a task. This way one that doesn't wait costs
    no StopIteration, which is dearer than all the rest.
    """
    coroutine = yield _OVER
    while True:
        yield from coroutine
        coroutine = yield _OVER


def _new_stepper() -> Generator[Any, Any, None]:
    stepper = cast(Generator[Any, Any, None], _step())
    next(stepper)
    return stepper


@types.coroutine
def rest_of(begun: Any, waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine that was begun by hand and waits for something, to be awaited in a task."""
    try:
        while waits_for is not _OVER:
            try:
                value = yield waits_for
            except BaseException as error:
                waits_for = begun.throw(error)
            else:
                waits_for = begun.send(value)
    except StopIteration:
        return


def not_cancelled(error: BaseException, task: asyncio.Task[Any]) -> Exception:
    """The error, if it is one; a cancellation that nobody asked of `task` becomes one, and any other is raised again.

    Code that awaits what somebody else has cancelled raises CancelledError without being cancelled itself.
    """
    if isinstance(error, Exception):
        return error
    if task.cancelling():
        raise error
    stray = RuntimeError("something that was awaited has been cancelled")
    stray.__cause__ = error
    return stray


def _is_equal(one: Context, other: Context) -> bool:
    """Whether two contexts hold the same values; at once if neither was changed since one was copied of the other."""
    try:
        return bool(one == other)
    except Exception:  # a value whose own comparison fails is another value
        return False


def run_blocking(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run `coroutine` on `loop` from another thread and wait for its result.

    Raises:
        RuntimeError: This is the loop's own thread, where waiting would never end: use `await` there.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        coroutine.close()
        raise RuntimeError("the blocking methods (.sync) are for other threads; on the event loop use await")
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


async def in_thread(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Run a plain function in the thread pool that FastAPI uses, in a copy of this context.

    Cancelling is safe: it returns at once, and the thread, which can't be stopped, runs on with nobody listening.
    """
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs), abandon_on_cancel=True)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Begin to call a function of the user's, in the thread pool unless it is `async def`; to be awaited at once."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:  # the usual case, in a tenth of the time
        result: Awaitable[Any] = function(*args, **kwargs)
        return result
    return _call(function, *args, **kwargs)


async def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(*args, **kwargs)
    result = await in_thread(function, *args, **kwargs)
    return await result if inspect.isawaitable(result) else result
