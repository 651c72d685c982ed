"""What we know of the package fastapi-limiter, 0.1 and 0.2; all of it is here.

Its objects are recognised by where their classes come from, so that nothing is imported where it isn't installed. 0.1
counts in a Redis that belongs to the process (`FastAPILimiter.init`), 0.2 with a `Limiter` that each object is given.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection, Request

from fastapi_channels import _fastapi
from fastapi_channels.exceptions import LayerUnavailable, SettingsError
from fastapi_channels.exceptions import WebSocketException as OurWebSocketException

__all__ = ["Foreign", "counting", "has_process_wide", "is_limiter", "mend_http_limiter"]

logger = logging.getLogger("fastapi_channels")

PACKAGE = "fastapi_limiter"

#: How many seconds its Redis has to answer.
TIMEOUT = 0.5

#: What a client waits where nothing says how long.
UNKNOWN_WAIT = 1.0

#: The classes of redis-py's exceptions that mean that the server is away, by name: it is imported only if need be.
AWAY = frozenset({"BusyLoadingError", "ConnectionError", "ReadOnlyError", "TimeoutError"})

Identifier = Callable[[Any], Awaitable[str]]
Callback = Callable[..., Awaitable[Any]]


def is_limiter(spec: object) -> bool:
    """Whether something is a `WebSocketRateLimiter` or `RateLimiter` of fastapi-limiter."""
    modules = (base.__module__.partition(".")[0] for base in type(spec).__mro__)
    return PACKAGE in modules and callable(spec) and hasattr(spec, "identifier")


class _Refused(Exception):
    """What a limiter's callback raises in place of its own.

    Attributes:
        milliseconds: How long it says to wait; None for 0.2, which doesn't.
    """

    def __init__(self, milliseconds: Any = None) -> None:
        super().__init__()
        self.milliseconds = milliseconds if isinstance(milliseconds, int | float) else None


class Foreign:
    """One of its limiters, asked for frames.

    Its own callback is called when it refuses, unless that is the package's; what that raises beyond a plain 429 is
    the answer. In place of the package's identifier, which believes any X-Forwarded-For, stands ours.

    Args:
        limiter: A `WebSocketRateLimiter`, or a `RateLimiter`, whose callback is for HTTP and is not called.
        identifier: Whom to count, where the limiter has nothing of its own.
    """

    def __init__(self, limiter: Any, identifier: Identifier) -> None:
        self._identifier = identifier
        # A copy: the same object may be a dependency of an HTTP route.
        self._limiter = copy.copy(limiter)
        self._limiter.callback = self._refuse
        depends = sys.modules[f"{PACKAGE}.depends"]
        is_for_websockets = isinstance(limiter, depends.WebSocketRateLimiter)
        self._callback = limiter.callback if is_for_websockets else None
        self._is_for_websockets = is_for_websockets
        self._call = (type(limiter) if is_for_websockets else depends.WebSocketRateLimiter).__call__
        self._own_identifier = limiter.identifier
        self._is_process_wide = has_process_wide()

    def __repr__(self) -> str:
        return f"<{type(self._limiter).__name__} of fastapi-limiter>"

    def check(self) -> None:
        """Say in the log what would surprise: 0.2 counts all clients together, unless its buckets are by name."""
        factory = getattr(getattr(self._limiter, "limiter", None), "bucket_factory", None)
        if type(factory).__name__ == "SingleBucketFactory":
            logger.warning("a Limiter of pyrate_limiter has one bucket for all clients: give it a BucketFactory")

    async def wait(self, websocket: HTTPConnection, context_key: str) -> float:
        """How long a client has to wait; 0 if it need not, which has been counted.

        Raises:
            LayerUnavailable: Its Redis is away.
            SettingsError: 0.1, and nobody has called `FastAPILimiter.init`.
        """
        self._limiter.identifier = self._identifier_now()
        try:
            await self._ask(websocket, context_key)
        except _Refused as refused:
            await self._tell(websocket, refused)
            milliseconds = refused.milliseconds
            return self._longest() if milliseconds is None else max(milliseconds, 1) / 1000
        return 0.0

    async def _ask(self, websocket: HTTPConnection, context_key: str) -> None:
        if not self._is_process_wide:
            await self._call(self._limiter, websocket, context_key)
            return
        shared = _shared()
        if shared.redis is None:
            raise SettingsError(
                f"{type(self._limiter).__name__} counts nothing before `await FastAPILimiter.init(redis)`: "
                "call it when the application starts, or give add_channel a limiter_url"
            )
        try:
            async with asyncio.timeout(TIMEOUT):
                try:
                    await self._call(self._limiter, websocket, context_key)
                except Exception as error:
                    if type(error).__name__ != "NoScriptError":
                        raise
                    # Redis has been restarted; 0.1.6 looks for that on HTTP routes only.
                    shared.lua_sha = await shared.redis.script_load(shared.lua_script)
                    await self._call(self._limiter, websocket, context_key)
        except (OSError, TimeoutError) as error:
            raise LayerUnavailable(f"the Redis of fastapi-limiter: {error}") from error
        except Exception as error:
            if AWAY.isdisjoint(base.__name__ for base in type(error).__mro__):
                raise
            raise LayerUnavailable(f"the Redis of fastapi-limiter: {error}") from error

    def _identifier_now(self) -> Identifier:
        own = self._own_identifier
        if own is None and self._is_process_wide:
            own = _shared().identifier
        return self._identifier if own is None or _is_theirs(own) else own

    async def _refuse(self, websocket: HTTPConnection, milliseconds: Any = None) -> None:
        raise _Refused(milliseconds)

    async def _tell(self, websocket: HTTPConnection, refused: _Refused) -> None:
        callback = self._callback
        if callback is None and self._is_for_websockets and self._is_process_wide:
            callback = _shared().ws_callback
        if callback is None or _is_theirs(callback) or callback.__module__.startswith("fastapi_channels."):
            return
        try:
            told = callback(websocket, *(() if refused.milliseconds is None else (refused.milliseconds,)))
            if inspect.isawaitable(told):
                await told
        except OurWebSocketException:
            raise  # it says more than that the client has to wait
        except WebSocketException:
            return
        except HTTPException as error:
            if error.status_code != 429:
                raise

    def _longest(self) -> float:
        """The period of the shortest rate of 0.2's limiter: by then something has become free."""
        try:
            rates = [rate for bucket in self._limiter.limiter.buckets() for rate in bucket.rates]
            return max(float(min(rate.interval for rate in rates)) / 1000, 0.001)
        except (AttributeError, TypeError, ValueError):
            return UNKNOWN_WAIT


def _is_theirs(function: Any) -> bool:
    return bool(getattr(function, "__module__", "").partition(".")[0] == PACKAGE)


# What belongs to the process


def has_process_wide() -> bool:
    """Whether a fastapi-limiter is installed that counts in one Redis for the process: 0.1."""
    return _is_installed() and hasattr(importlib.import_module(PACKAGE), "FastAPILimiter")


def _is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def _shared() -> Any:
    return importlib.import_module(PACKAGE).FastAPILimiter


@asynccontextmanager
async def counting(
    url: str | None,
    *,
    storage: Any = None,
    prefix: str,
    identifier: Identifier,
    http_callback: Callback,
    ws_callback: Callback,
) -> AsyncIterator[None]:
    """Have `FastAPILimiter` initialised for the time of a block, unless the application has done it by itself.

    Redis need not be there: that is told in the log.

    Args:
        url: The URL of its Redis.
        storage: A client of redis-py in its place, which stays the caller's.
        prefix: As for `FastAPILimiter.init`, as are the others.
        identifier: Whom to count.
        http_callback: Called where an HTTP route refuses.
        ws_callback: Called where a WebSocket refuses.
    """
    shared = _shared() if has_process_wide() else None
    if shared is None or shared.redis is not None or (url is None and storage is None):
        yield
        return
    own = _client(url) if storage is None else None
    client = own if storage is None else storage
    try:
        await shared.init(
            client, prefix=prefix, identifier=identifier, http_callback=http_callback, ws_callback=ws_callback
        )
    except Exception as error:
        # What it was given it has; what is missing is the script's name, and whoever misses the script loads it.
        shared.lua_sha = hashlib.sha1(shared.lua_script.encode(), usedforsecurity=False).hexdigest()
        level = logging.WARNING if own is None else logging.INFO  # of LIMITER_URL it has been told already
        logger.log(level, "the Redis of fastapi-limiter can't be reached, and is tried again: %s", error)
    try:
        yield
    finally:
        if shared.redis is client:  # and not the application's, which came after ours
            shared.redis = None
        if own is not None:
            await own.aclose()


def _client(url: str | None) -> Any:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    assert url is not None
    retry: Any = Retry(NoBackoff(), 1)  # a connection of the pool may be one that a restart has ended
    try:
        return Redis.from_url(url, retry=retry, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
    except ValueError as error:
        raise SettingsError(f"LIMITER_URL: {error}") from error


# HTTP routes


class _Flattened:
    """An application whose `routes` are its HTTP routes, with those of included routers."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.routes = _fastapi.http_routes(app)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)


class _FlattenedRequest(Request):
    """A request whose application shows its routes flattened; otherwise it is the request that it was made of."""

    @property
    def app(self) -> Any:
        """The application, flattened."""
        return _Flattened(self.scope["app"])


def mend_http_limiter() -> None:
    """Make `RateLimiter` work on applications with included routers, if fastapi-limiter is there.

    It asks every entry of `app.routes` for its path, and since FastAPI 0.137 an included router is one and has none.
    To go when fastapi-limiter has mended that.
    """
    try:
        limiter = importlib.import_module(f"{PACKAGE}.depends").RateLimiter
    except ImportError:
        return  # it isn't installed, or lacks what it needs
    theirs = limiter.__call__
    if getattr(theirs, "__wrapped__", None) is not None:
        return

    @functools.wraps(theirs)
    async def mended(self: Any, request: Request, response: Any) -> Any:
        flattened = object.__new__(_FlattenedRequest)
        flattened.__dict__ = request.__dict__  # what one has read of the body, the other has
        return await theirs(self, flattened, response)

    limiter.__call__ = mended
