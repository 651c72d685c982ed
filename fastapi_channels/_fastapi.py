"""What we need of FastAPI and Starlette that their documentation doesn't promise; all of it is here.

Tested on the oldest and the newest FastAPI that we support (`tests/test_fastapi_versions.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import fastapi.exception_handlers
import fastapi.routing
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Mount
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

__all__ = [
    "add_outer_lifespan",
    "bare_receive",
    "bare_send",
    "called_by_routes",
    "can_be_stepped",
    "exception_handler",
    "http_routes",
    "is_async",
    "on_exit",
    "redirect",
    "route_path",
    "scope_without_handlers",
]

#: Servers whose `send` doesn't care which task calls it: it looks at no current task and opens no cancel scope.
STEPPABLE_SERVERS = frozenset({"uvicorn", "hypercorn", "fastapi_channels"})


#: Modules of exception handlers that applications have without having asked for them.
DEFAULT_HANDLERS = frozenset(
    {fastapi.exception_handlers.__name__, "fastapi_channels.answers", "fastapi_channels.exceptions"}
)


def add_outer_lifespan(app: Any, lifespan: Callable[[Any], AbstractAsyncContextManager[None]]) -> None:
    """Enter `lifespan` before the application's own and leave it after; works with `on_event` handlers too."""
    own = app.router.lifespan_context

    @asynccontextmanager
    async def merged(app: Any) -> AsyncIterator[Any]:
        async with lifespan(app), own(app) as state:
            yield state

    app.router.lifespan_context = merged


def called_by_routes(app: Any) -> Iterator[tuple[str, Any, Any]]:
    """Path, function and innermost application of every endpoint and dependency, with included routers and mounts."""
    for route, path, endpoint, dependant in _flattened(app.routes):
        if isinstance(route, Mount):
            inner = route.app if hasattr(route.app, "state") else app
            for path_within, function, innermost in called_by_routes(route):
                yield path + path_within, function, inner if innermost is route else innermost
        else:
            for function in (endpoint, *_dependencies(dependant)):
                yield path, function, app


def _flattened(routes: Iterable[BaseRoute]) -> Iterator[tuple[BaseRoute, str, Any, Any]]:
    for route in _contexts(routes):
        path, endpoint = getattr(route, "path", None) or "", getattr(route, "endpoint", None)
        yield getattr(route, "original_route", route), path, endpoint, getattr(route, "dependant", None)


def _contexts(routes: Iterable[BaseRoute]) -> Iterable[Any]:
    # Since 0.137 an included router is one object in `routes`, and this gives what it stands for.
    contexts = getattr(fastapi.routing, "iter_route_contexts", None)
    return routes if contexts is None else contexts(routes)


def _dependencies(dependant: Any) -> Iterator[Any]:
    for inner in getattr(dependant, "dependencies", ()):
        yield inner.call
        yield from _dependencies(inner)


def route_path(scope: Scope) -> str:
    """The path of the route that serves a connection, as it is written, with the prefixes of routers and of mounts.

    A mount whose path has parameters is known by their names: what a client puts there doesn't make another route.
    """
    route = scope.get("route")
    # Since 0.137 the path with the prefix of an included router is here.
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and context.original_route is route:
        route = context
    of_mounts = scope.get("path_params", {}).keys() - getattr(route, "param_convertors", {}).keys()
    mount = "".join(f"/{{{name}}}" for name in sorted(of_mounts)) or scope.get("root_path", "")
    return f"{mount}{getattr(route, 'path', '')}"


def http_routes(app: Any) -> list[Any]:
    """Every HTTP route of an application, those of included routers too: each has path, methods and dependencies."""
    return [route for route in _contexts(app.routes) if getattr(route, "methods", None)]


def exception_handler(app: Any, error: Exception) -> Callable[..., Any] | None:
    """The application's own handler for an error, by status code or by class; nobody's defaults count."""
    handlers: dict[Any, Callable[..., Any]] = getattr(app, "exception_handlers", None) or {}
    keys: list[Any] = [error.status_code] if isinstance(error, HTTPException) else []
    for key in [*keys, *type(error).__mro__]:
        handler = handlers.get(key)
        if handler is not None and getattr(handler, "__module__", None) not in DEFAULT_HANDLERS:
            return handler
    return None


def scope_without_handlers(websocket: WebSocket) -> Scope:
    """The scope of a connection for a route whose errors are the caller's, not the exception handlers'."""
    return {**websocket.scope, "starlette.exception_handlers": ({}, {})}


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an `async def`, or an object with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def on_exit(websocket: WebSocket, callback: Callable[..., Awaitable[bool]]) -> None:
    """Have `callback` called as an `__aexit__` when the route is left, after the dependencies that are still to come.

    A dependency with `yield` would do the same, at the price of 2.5 kB for each connection.
    """
    stack: AsyncExitStack = websocket.scope["fastapi_inner_astack"]
    stack.push_async_exit(callback)


def bare_receive(websocket: WebSocket) -> Receive:
    """The `receive` behind a WebSocket, without the check of its state, which we keep ourselves."""
    receive: Receive = getattr(websocket, "_receive", websocket.receive)
    return receive


def bare_send(websocket: WebSocket) -> Send:
    """The `send` behind a WebSocket, without what Starlette puts around it that does nothing for a WebSocket.

    `WebSocket.send` checks a state that we keep ourselves, and the wrapper of the exception handlers looks for
    `http.response.start`; together they cost a tenth of a delivery.
    """
    send: Send = getattr(websocket, "_send", websocket.send)
    while getattr(send, "__module__", None) == "starlette._exception_handler" and (inner := _wrapped(send)) is not None:
        send = inner
    return send


def redirect(websocket: WebSocket, receive: Receive, send: Send) -> None:
    """Have all that is done with a WebSocket go through these; `bare_receive` and `bare_send` don't notice."""
    websocket.__dict__.update(receive=receive, send=send)


def can_be_stepped(send: Send) -> bool:
    """Whether `send` may be begun outside of a task of the connection's own.

    True if a server known for it is at its end and every wrapper on the way is Starlette's. Middleware of others may
    open a timeout or a cancel scope around its `send`, which belongs to the task that it runs in.
    """
    while inspect.isfunction(send) and send.__module__.startswith("starlette."):
        inner = _wrapped(send)
        if inner is None:
            return False
        send = inner
    if not inspect.iscoroutinefunction(send):
        return False
    return send.__module__.partition(".")[0] in STEPPABLE_SERVERS


def _wrapped(send: Any) -> Send | None:
    """The `send` that a wrapper's function closes over, if there is one."""
    names = send.__code__.co_freevars
    if "send" not in names:
        return None
    inner: Send = send.__closure__[names.index("send")].cell_contents
    return inner
