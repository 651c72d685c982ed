"""Where tasks are started: the crew that runs short jobs, and the lanes that keep the jobs of a connection in order.

An asyncio task for each frame or event costs more than most handlers do. A `Crew` therefore works off many lanes in one
task, one after another, and still gives each the guarantees of a task of its own:

- A handler that waits holds up nobody. Right after a worker's first step, `_relieve` looks whether it got through; if it
  did not, the worker stays with the lane that waits and another one takes the rest.
- `asyncio.current_task()` is the same from a handler's first line to its last, so timeouts, task groups and cancel
  scopes work in it, and cancelling that task while the handler waits reaches that handler alone.
- A handler runs in a copy of its own connection's context. Lanes share a worker only while their contexts are equal, and
  a worker whose context was changed by a handler takes no other lane after it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

import anyio.to_thread

logger = logging.getLogger("fastapi_channels")

Item = TypeVar("Item")
Result = TypeVar("Result")

#: How many items of one lane are handled before other connections have their turn.
TURN = 32

_OVER: Any = object()


class Crew:
    """Runs the work of connections in as few tasks as possible; one for each application and event loop.

    Only the loop's own thread may call it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes: list[Lane[Any]] | None = None
        self._context: contextvars.Context | None = None
        self._known = contextvars.Context()
        self._stepper: Generator[Any, Any, None] | None = None

    def context(self) -> contextvars.Context:
        """The current context; the same object as the last one if it holds the same values, so that lanes share it."""
        context = contextvars.copy_context()
        if not _is_equal(self._known, context):
            self._known = context
        return self._known

    def start(self, coroutine: Coroutine[Any, Any, None], context: contextvars.Context) -> asyncio.Task[None]:
        """Run `coroutine` in a task of its own; what it raises is logged."""
        task = self.loop.create_task(coroutine, context=context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def begin(self, function: Callable[[Any], Awaitable[None]], argument: Any) -> Awaitable[None] | None:
        """Call an async function and run it, without a task, for as long as it doesn't wait.

        Returns:
            None if it is over; else the rest of it, which somebody has to await.
        """
        stepper = self._stepper
        if stepper is None:
            stepper = self._stepper = _step()
            next(stepper)
        try:
            waits_for = stepper.send((function, argument))
        except BaseException:
            self._stepper = None
            raise
        if waits_for is _OVER:
            return None
        self._stepper = None  # it stays with what it waits for
        return rest_of(stepper, waits_for)

    def submit(self, lane: Lane[Any], context: contextvars.Context) -> None:
        """Work a lane off soon, after the lanes submitted before it, in a copy of `context` (see there)."""
        lanes = self._lanes
        if lanes is None or context is not self._context:
            self._lanes = lanes = []
            self._context = context
            self.start(self._work(lanes), context)
        lanes.append(lane)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of fastapi-channels failed", exc_info=error)

    async def _work(self, lanes: list[Lane[Any]]) -> None:
        if lanes is self._lanes:
            self._lanes = None  # what is submitted from here on waits for the next worker: no lane starves the loop
        await self._work_off(iter(lanes))

    async def _work_off(self, lanes: Iterator[Lane[Any]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        context = contextvars.copy_context()
        self.loop.call_soon(self._relieve, lanes, context)
        try:
            for lane in lanes:
                lane.task = task
                waiting = lane.waiting
                turn = TURN
                try:
                    while waiting and turn:
                        turn -= 1
                        item = waiting.pop(0)
                        if lane.wants_room:
                            lane.make_room()
                        try:
                            rest = lane.begin(item)
                            if rest is not None:
                                await rest
                        except (Exception, asyncio.CancelledError) as error:
                            rest = lane.failed(item, not_cancelled(error, task))
                            if rest is not None:
                                await rest
                finally:
                    lane.task = None
                    lane.go_on()
                if not _is_equal(contextvars.copy_context(), context):
                    break
        finally:
            self._relieve(lanes, context)

    def _relieve(self, lanes: Iterator[Lane[Any]], context: contextvars.Context) -> None:
        """Hand the lanes that a worker has not begun to another; it shares the iterator, so it ends after its own."""
        if rest := list(lanes):
            self.start(self._work_off(iter(rest)), context)


class Lane(Generic[Item]):
    """Handles the items of one connection one at a time, in order; costs nothing while there are none.

    It is made closed, and keeps its items until `open` is called.

    Args:
        crew: Who does the work.
        begin: Called with each item; does what can be done at once, and returns the rest to be awaited, or None.
        failed: Called with an item and what `begin` or its rest raised.

    Attributes:
        waiting: The items that have not been begun, oldest first.
        is_active: Whether an item is waiting or being handled, or the lane is not open yet.
        task: The one that handles an item at this moment.
        wants_room: Whether somebody waits for `room`.
    """

    __slots__ = ("_context", "_crew", "_idle", "_room", "begin", "failed", "is_active", "task", "waiting", "wants_room")

    def __init__(
        self,
        crew: Crew,
        begin: Callable[[Item], Awaitable[Any] | None],
        failed: Callable[[Item, Exception], Awaitable[None] | None],
    ) -> None:
        self.waiting: list[Item] = []
        self.is_active = True
        self.task: asyncio.Task[Any] | None = None
        self.wants_room = False
        self.begin = begin
        self.failed = failed
        self._crew = crew
        self._context: contextvars.Context | None = None
        self._room: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None

    def open(self, context: contextvars.Context) -> None:
        """Begin to handle the items, each in a copy of `context`, which is the crew's."""
        self._context = context
        self.go_on()

    def put(self, item: Item) -> None:
        """Add an item behind the others; never waits, and doesn't look at any capacity."""
        self.waiting.append(item)
        if not self.is_active:
            self.is_active = True
            assert self._context is not None
            self._crew.submit(self, self._context)

    async def room(self) -> None:
        """Wait until an item has been taken from those waiting. Cancelling is safe: nothing changes."""
        self._room = self._crew.loop.create_future()
        self.wants_room = True
        try:
            await self._room
        finally:
            self._room = None
            self.wants_room = False

    def make_room(self) -> None:
        """Tell who waits for `room` that there is some."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def idle(self) -> None:
        """Wait until every item has been handled, if it is open. Cancelling is safe: the lane goes on."""
        while self.is_active and self._context is not None:
            self._idle = self._crew.loop.create_future()
            try:
                await self._idle
            finally:
                self._idle = None

    def cancel(self) -> None:
        """Forget the items that wait and cancel the one that is being handled."""
        self.waiting.clear()
        if self.task is not None:
            self.task.cancel()

    def go_on(self) -> None:
        """Have the crew work off what waits, if anything does."""
        if self.waiting:
            assert self._context is not None
            self.is_active = True
            self._crew.submit(self, self._context)
            return
        self.is_active = False
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


@types.coroutine
def _step() -> Generator[Any, Any, None]:
    """Runs the async functions that are sent into it, one after another, and yields `_OVER` after each.

    A function that waits makes it yield what it waits for, as it would to a task. This way one that doesn't wait costs
    no StopIteration, which is dearer than all the rest.
    """
    function, argument = yield _OVER
    while True:
        yield from function(argument)
        function, argument = yield _OVER


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


def _is_equal(one: contextvars.Context, other: contextvars.Context) -> bool:
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
