"""An application's channels: its settings and layers, how they open and close with it, and how to get hold of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Annotated, Any
from weakref import WeakSet

from fastapi import Depends
from starlette.datastructures import State
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_channels import _fastapi
from fastapi_channels.answers import answer_view
from fastapi_channels.exceptions import ConsumerError, InvalidGroupName, LayerUnavailable, SettingsError
from fastapi_channels.layers import ChannelLayer, make_layer
from fastapi_channels.settings import ChannelsSettings

__all__ = ["Channels", "Layer", "add_channel", "channel_layer", "get_channel_layer"]

logger = logging.getLogger("fastapi_channels")

SCOPE_KEY = "fastapi_channels"

_current: ContextVar[Channels] = ContextVar("fastapi_channels")
_open: WeakSet[Channels] = WeakSet()
_without_app = State()


class Channels:
    """What one application has of this package; `app.state.channels` after `add_channel`.

    Its layers are opened and closed with the application's lifespan.

    Attributes:
        settings: The application's settings.
        layers: Its layers by alias.

    Raises:
        SettingsError: A layer can't be made of its setting.
    """

    def __init__(self, settings: ChannelsSettings) -> None:
        self.settings = settings
        self.layers: dict[str, ChannelLayer] = {}
        for alias, spec in settings.channel_layers.items():
            try:
                self.layers[alias] = make_layer(spec, capacity=settings.capacity, expiry=settings.expiry)
            except SettingsError as error:
                raise SettingsError(f"CHANNEL_LAYERS[{alias!r}]: {error}") from error
        self._opened = AsyncExitStack()

    def layer(self, alias: str = "default") -> ChannelLayer:
        """The layer of that alias.

        Raises:
            SettingsError: There is none; the text lists those there are.
        """
        try:
            return self.layers[alias]
        except KeyError:
            known = ", ".join(sorted(self.layers))
            raise SettingsError(f"there is no channel layer {alias!r} in CHANNEL_LAYERS, only: {known}") from None

    @property
    def is_open(self) -> bool:
        """Whether all layers are open on the running event loop."""
        return all(layer.is_open for layer in self.layers.values())

    @property
    def is_running(self) -> bool:
        """Whether all layers are open on an event loop that runs; to be asked from any thread."""
        return all(layer.is_running for layer in self.layers.values())

    async def open(self) -> None:
        """Open the layers that are not open on the running event loop."""
        try:
            for layer in self.layers.values():
                if not layer.is_open:
                    await self._opened.enter_async_context(layer)
                    if self.settings.layer_grace is not None:
                        layer.close_consumers_after(self.settings.layer_grace)
        except BaseException:
            await self.close()
            raise
        _open.add(self)

    async def close(self) -> None:
        """Close the layers that `open` has opened."""
        _open.discard(self)
        await self._opened.aclose()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make these the channels that `get_channel_layer` finds in the block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @classmethod
    def of(cls, scope: Scope) -> Channels:
        """The channels that serve a connection: its application's, else the enclosing one's.

        An application without `add_channel` gets channels of its own, on defaults and the environment; consumers
        under no application at all share one.
        """
        if SCOPE_KEY not in scope:
            state = getattr(scope.get("app"), "state", _without_app)
            if getattr(state, SCOPE_KEY, None) is None:
                setattr(state, SCOPE_KEY, cls(ChannelsSettings.load()))
            scope[SCOPE_KEY] = getattr(state, SCOPE_KEY)
        found: Channels = scope[SCOPE_KEY]
        return found


class ChannelsMiddleware:
    """Tells everything below which application's channels are in force; the innermost application's are."""

    def __init__(self, app: ASGIApp, channels: Channels) -> None:
        self.app = app
        self.channels = channels

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one connection or request, or the lifespan."""
        scope[SCOPE_KEY] = self.channels
        if scope["type"] == "websocket":
            # The session puts its hooks and handlers in the application's context: a coroutine less for a connection.
            return self.app(scope, receive, send)
        return self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.channels.in_force():
            await self.app(scope, receive, send)


def add_channel(
    app: Any, *, settings: str | ModuleType | None = None, add_exception_handlers: bool = True, **options: Any
) -> Channels:
    """Give a FastAPI application its channels: read the settings, open and close the layers with it.

    Call it once, before the application starts; before or after `include_router` is the same.

    Args:
        app: The FastAPI application.
        settings: The settings module or its dotted path.
        add_exception_handlers: Whether views, and dependencies around a consumer's route, may raise `ConsumerError`,
            `InvalidGroupName` and `LayerUnavailable` and have them answered (403, 422, 503), where the application has
            no handler of its own for them.
        options: Every setting in lower case, such as `channel_layers={"default": "memory://"}`; stronger than the
            environment and the module.

    Returns:
        What is `app.state.channels` from then on.

    Raises:
        SettingsError: A setting is wrong; the text names it and where it came from.
        TypeError: An option that is no setting.
        RuntimeError: The application has channels already, or has started.
    """
    if getattr(app.state, "channels", None) is not None:
        raise RuntimeError("add_channel was called twice on one application")
    channels = Channels(ChannelsSettings.load(settings, options))
    app.add_middleware(ChannelsMiddleware, channels=channels)
    app.state.channels = channels
    if add_exception_handlers:
        for error in (ConsumerError, InvalidGroupName, LayerUnavailable):
            app.exception_handlers.setdefault(error, answer_view)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        _check_routes(app, channels)
        await channels.open()
        try:
            yield
        finally:
            await channels.close()

    _fastapi.add_outer_lifespan(app, lifespan)
    return channels


def _check_routes(app: Any, channels: Channels) -> None:
    """Ask what every consumer's route has to say against these settings."""
    for path, endpoint, innermost in _fastapi.websocket_endpoints(app):
        check = getattr(endpoint, "check_settings", None)
        if check is not None:
            try:
                check(getattr(innermost.state, "channels", None) or channels)
            except SettingsError as error:
                raise SettingsError(f"{path}: {error}") from error


def get_channel_layer(alias: str = "default") -> ChannelLayer:
    """The layer of that alias, of the application in force: in views, consumers, their tasks and threads.

    Elsewhere in the process (a scheduled job, a shell) it is the one application that is running.

    Raises:
        SettingsError: There is no such layer, no application is running, or more than one is.
    """
    channels = _current.get(None)
    if channels is None:
        running = [channels for channels in _open if channels.is_running]
        if not running:
            raise SettingsError("no application with channels is running here; get_channel_layer needs one")
        if len(running) > 1:
            raise SettingsError(
                f"{len(running)} applications with channels are running here; use app.state.channels.layer({alias!r})"
            )
        channels = running[0]
    return channels.layer(alias)


def channel_layer(alias: str) -> Callable[[HTTPConnection], Awaitable[ChannelLayer]]:
    """A dependency that gives the layer of that alias: `Annotated[ChannelLayer, Depends(channel_layer("jobs"))]`."""

    async def layer_of_this_application(connection: HTTPConnection) -> ChannelLayer:
        channels = Channels.of(connection.scope)
        layer = channels.layer(alias)
        if not layer.is_open:
            await channels.open()
        return layer

    return layer_of_this_application


#: The default layer, in the signature of a view or a hook: `async def view(layer: Layer)`.
Layer = Annotated[ChannelLayer, Depends(channel_layer("default"))]
