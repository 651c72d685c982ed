"""The lifespan of an application under test: one for all connections that are open at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi_channels import application

__all__ = ["running"]

#: How many seconds the application has to start, and to stop.
TIMEOUT = 30.0


class _Lifespan:
    """The lifespan of one application on one event loop, from its first user to its last."""

    def __init__(self, app: Any) -> None:
        self.users = 0
        self._app = app
        self._lock = asyncio.Lock()
        self._stack: AsyncExitStack | None = None

    async def enter(self) -> Any:
        self.users += 1
        async with self._lock:
            if self._stack is None:
                async with AsyncExitStack() as starting:
                    self._started = await starting.enter_async_context(_started(self._app))
                    self._stack = starting.pop_all()
        return self._started

    async def leave(self) -> None:
        self.users -= 1
        async with self._lock:
            if self.users == 0 and self._stack is not None:
                stack, self._stack = self._stack, None
                await stack.aclose()


_lifespans: dict[tuple[asyncio.AbstractEventLoop, int], _Lifespan] = {}


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[Any]:
    """Have the lifespan of an application run in the block; gives the application with its lifespan's state.

    Blocks that overlap share one, and the last one left ends it. One that somebody else runs is left alone, if the
    application has `add_channel`; that of any other can't be seen.

    Raises:
        RuntimeError: The `testing` extra is not installed.
    """
    if _is_run_by_others(app):
        yield app
        return
    key = asyncio.get_running_loop(), id(app)
    lifespan = _lifespans.setdefault(key, _Lifespan(app))
    try:
        yield await lifespan.enter()
    finally:
        try:
            await lifespan.leave()
        finally:
            if lifespan.users == 0:
                _lifespans.pop(key, None)


def _is_run_by_others(app: Any) -> bool:
    if (asyncio.get_running_loop(), id(app)) in _lifespans:
        return False
    channels = getattr(getattr(app, "state", None), "channels", None)
    return channels is not None and channels in application._open and channels.is_open


@asynccontextmanager
async def _started(app: Any) -> AsyncIterator[Any]:
    try:
        from asgi_lifespan import LifespanManager, LifespanNotSupported
    except ImportError as error:
        raise RuntimeError("fastapi_channels.testing needs: pip install 'fastapi-channels[testing]'") from error
    manager = LifespanManager(app, startup_timeout=TIMEOUT, shutdown_timeout=TIMEOUT)
    async with AsyncExitStack() as stack:
        # ASGI, lifespan protocol: an application that raises on this scope is served without.
        with suppress(LifespanNotSupported):
            await stack.enter_async_context(manager)
        yield manager.app
