"""Where tasks are started: the crew that runs short jobs, and the lanes that keep the jobs of a connection in order.

An asyncio task for each frame or event costs more than most handlers do. A `Crew` therefore runs many jobs in one
task, one after another, and still gives each the guarantees of a task of its own:

- A job that waits holds up nobody. Right after a worker's first step, `_relieve` looks whether it got through; if it
  did not, the worker stays with the job that waits and another one takes the rest.
- `asyncio.current_task()` is the same from a job's first line to its last, so timeouts, task groups and cancel scopes
  work in it, and cancelling that task while the job waits reaches that job alone.
- A job runs in a copy of its own connection's context. Jobs share a worker only while their contexts are equal, and a
  worker whose context was changed by a job takes no other after it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

import anyio.to_thread

logger = logging.getLogger("fastapi_channels")

#: Called with the task that it runs in.
Job = Callable[[asyncio.Task[Any]], Awaitable[None]]
Item = TypeVar("Item")
Result = TypeVar("Result")

#: How many items of one lane are handled before other connections have their turn.
TURN = 32


class Crew:
    """Runs jobs in as few tasks as possible; one for each application and event loop.

    Only the loop's own thread may call it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: list[Job] | None = None
        self._context: contextvars.Context | None = None
        self._known = contextvars.Context()

    def context(self) -> contextvars.Context:
        """The current context; the same object as the last one if it holds the same values, so that jobs share it."""
        context = contextvars.copy_context()
        if not _is_equal(self._known, context):
            self._known = context
        return self._known

    def submit(self, job: Job, context: contextvars.Context) -> None:
        """Run `job` soon, after the jobs submitted before it have begun, in a copy of `context` (see there)."""
        jobs = self._jobs
        if jobs is None or context is not self._context:
            self._jobs = jobs = []
            self._context = context
            self.start(self._work(jobs), context)
        jobs.append(job)

    def start(self, coroutine: Coroutine[Any, Any, None], context: contextvars.Context) -> asyncio.Task[None]:
        """Run `coroutine` in a task of its own; what it raises is logged."""
        task = self.loop.create_task(coroutine, context=context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of fastapi-channels failed", exc_info=error)

    async def _work(self, jobs: list[Job]) -> None:
        if jobs is self._jobs:
            self._jobs = None  # what is submitted from here on waits for the next worker: no job starves the loop
        await self._work_off(iter(jobs))

    async def _work_off(self, jobs: Iterator[Job]) -> None:
        task = asyncio.current_task()
        assert task is not None
        context = contextvars.copy_context()
        self.loop.call_soon(self._relieve, jobs, context)
        try:
            for job in jobs:
                await job(task)
                if not _is_equal(contextvars.copy_context(), context):
                    break
        finally:
            self._relieve(jobs, context)

    def _relieve(self, jobs: Iterator[Job], context: contextvars.Context) -> None:
        """Hand the jobs that a worker has not begun to another; it shares the iterator, so it ends after its own."""
        if rest := list(jobs):
            self.start(self._work_off(iter(rest)), context)


class Lane(Generic[Item]):
    """Handles the items of one connection one at a time, in order; costs nothing while there are none.

    It is made closed, and keeps its items until `open` is called.

    Args:
        crew: Who does the work.
        begin: Called with each item; does what can be done at once, and returns the rest to be awaited, or None.
        failed: Called with an item and what `begin` or its rest raised.
    """

    __slots__ = ("_begin", "_context", "_crew", "_failed", "_idle", "_room", "_task", "is_active", "waiting")

    def __init__(
        self,
        crew: Crew,
        begin: Callable[[Item], Awaitable[Any] | None],
        failed: Callable[[Item, Exception], Awaitable[None] | None],
    ) -> None:
        #: The items that have not been begun, oldest first.
        self.waiting: list[Item] = []
        #: Whether an item is waiting or being handled, or the lane is not open yet.
        self.is_active = True
        self._begin = begin
        self._failed = failed
        self._crew = crew
        self._context: contextvars.Context | None = None
        self._task: asyncio.Task[Any] | None = None
        self._room: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None

    def open(self, context: contextvars.Context) -> None:
        """Begin to handle the items, each in a copy of `context`, which is the crew's."""
        self._context = context
        self._go_on()

    def put(self, item: Item) -> None:
        """Add an item behind the others; never waits, and doesn't look at any capacity."""
        self.waiting.append(item)
        if not self.is_active:
            self._go_on()

    def holds(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether `task` is the one that handles an item of this lane at this moment."""
        return task is not None and task is self._task

    async def room(self) -> None:
        """Wait until an item has been taken from those waiting. Cancelling is safe: nothing changes."""
        self._room = self._crew.loop.create_future()
        try:
            await self._room
        finally:
            self._room = None

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
        if self._task is not None:
            self._task.cancel()

    async def _run(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        waiting = self.waiting
        try:
            for _ in range(TURN):
                item = waiting.pop(0)
                if self._room is not None and not self._room.done():
                    self._room.set_result(None)
                try:
                    rest = self._begin(item)
                    if rest is not None:
                        await rest
                except (Exception, asyncio.CancelledError) as error:
                    rest = self._failed(item, not_cancelled(error, task))
                    if rest is not None:
                        await rest
                if not waiting:
                    break
        finally:
            self._task = None
            self._go_on()

    def _go_on(self) -> None:
        if self.waiting:
            assert self._context is not None
            self.is_active = True
            self._crew.submit(self._run, self._context)
            return
        self.is_active = False
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


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
