"""An application's channels: its settings and layers, how they open and close with it, and how to get hold of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Annotated, Any, ClassVar
from weakref import WeakSet

from fastapi import Depends
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from fastapi_channels import _fastapi, _fastapi_limiter
from fastapi_channels._server_logs import hide_tokens
from fastapi_channels.answers import answer_view
from fastapi_channels.exceptions import (
    ConsumerError,
    DefinitionError,
    InvalidGroupName,
    LayerUnavailable,
    RateLimitExceeded,
    SettingsError,
    WebSocketException,
    WebSocketExceptionHandler,
)
from fastapi_channels.layers import ChannelLayer, make_layer
from fastapi_channels.layers.factory import LAYER_SCHEMES, LayerSpec
from fastapi_channels.layers.guard import ThrottleGuard
from fastapi_channels.layers.leases import GuardedLeases, Leases, MemoryLeases
from fastapi_channels.layers.limiter import GuardedLimiter, Limiter, MemoryLimiter, Rate
from fastapi_channels.origins import Proxies, network_of
from fastapi_channels.settings import ChannelsSettings

__all__ = ["Channels", "Layer", "add_channel", "channel_layer", "get_channel_layer"]

logger = logging.getLogger("fastapi_channels")

SCOPE_KEY = "fastapi_channels"

#: Where the scope of a connection of a `BaseChannel` says which channel it is on.
CHANNEL_KEY = "fastapi_channels.channel"

#: Says whom to count, by the connection; `async def` or plain `def`.
Identifier = Callable[[Any], Any]

#: Called when a limit refuses: with the connection (and the response of an HTTP route) and the milliseconds to wait.
Callback = Callable[..., Any]

_current: ContextVar[Channels] = ContextVar("fastapi_channels")
_open: WeakSet[Channels] = WeakSet()
_without_app = State()


@dataclass(frozen=True, slots=True)
class Limiting:
    """How `throttling.limiter` counts, and fastapi-limiter where we initialise it.

    Attributes:
        storage: The client of redis-py that fastapi-limiter counts with, in place of one for LIMITER_URL.
        prefix: What the names of what is counted begin with.
        identifier: Whom to count; None for the user, or the address of a stranger.
        http_callback: Called where an HTTP route refuses.
        ws_callback: Called where a WebSocket refuses.
    """

    storage: Any = None
    prefix: str = "fastapi-channel"
    identifier: Identifier | None = None
    http_callback: Callback | None = None
    ws_callback: Callback | None = None


class Channels:
    """What one application has of this package; `app.state.channels` after `add_channel`.

    Its layers are opened and closed with the application's lifespan.

    Attributes:
        settings: The application's settings.
        layers: Its layers by alias.

    Raises:
        SettingsError: A layer can't be made of its setting.
    """

    #: What serves applications without `add_channel`, while `FastAPIChannel.init` has it so.
    fallback: ClassVar[Channels | None] = None

    def __init__(self, settings: ChannelsSettings, limiting: Limiting | None = None, *, broadcast: Any = None) -> None:
        self.settings = settings
        self.limiting = limiting or Limiting()
        #: The `Broadcast` that the default layer was made of, if it was.
        self.broadcast = broadcast
        self.layers: dict[str, ChannelLayer] = {}
        for alias, spec in settings.channel_layers.items():
            try:
                self.layers[alias] = make_layer(spec, capacity=settings.capacity, expiry=settings.expiry)
            except SettingsError as error:
                raise SettingsError(f"CHANNEL_LAYERS[{alias!r}]: {error}") from error
        self._limiting = self._limiting_layer()
        #: Counts for throttles.
        self.limiter: Limiter = self._limiting.new_limiter()
        #: Counts connections.
        self.leases: Leases = self._limiting.new_leases()
        counters = self._first_layer.counters
        is_allowed = settings.throttle_on_error == "allow"
        #: Stands before limiters of others.
        self.guard = ThrottleGuard(counters, allow=is_allowed)
        if not isinstance(self.limiter, MemoryLimiter):
            self.limiter = GuardedLimiter(self.limiter, counters, allow=is_allowed)
        if not isinstance(self.leases, MemoryLeases):
            self.leases = GuardedLeases(self.leases, counters, is_allowed=is_allowed)
        with _told("THROTTLE_RATES"):
            self.rates = {scope: Rate.parse(rate) for scope, rate in settings.throttle_rates.items()}
        with _told("TRUSTED_PROXIES"):
            self.proxies = Proxies(settings.trusted_proxies)
        #: How many connections each channel of `channels` has in this process, by name.
        self.present: Counter[str] = Counter()
        self._opened = AsyncExitStack()

    def _limiting_layer(self) -> ChannelLayer:
        """The layer that throttles count by: one for LIMITER_URL, or the default layer."""
        url = self.settings.limiter_url
        if url is None:
            return self._first_layer
        prefix = getattr(self._first_layer, "prefix", "fc")  # two applications on one Redis don't count together
        config = {"url": url, "prefix": prefix, "timeout": 0.5, "start": "degraded"}
        spec = {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": config}
        with _told("LIMITER_URL"):
            layer = make_layer(spec, capacity=self.settings.capacity, expiry=self.settings.expiry)
        layer.listens = False
        return layer

    @property
    def _first_layer(self) -> ChannelLayer:
        return self.layers.get("default") or next(iter(self.layers.values()))

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
        return all(layer.is_open for layer in (*self.layers.values(), self._limiting))

    @property
    def is_running(self) -> bool:
        """Whether all layers are open on an event loop that runs; to be asked from any thread."""
        return all(layer.is_running for layer in self.layers.values())

    async def open(self) -> None:
        """Open the layers that are not open on the running event loop."""
        if self.settings.query_token_key is not None:
            hide_tokens(self.settings.query_token_key)
        try:
            for layer in {*self.layers.values(), self._limiting}:
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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A block in which the layers are open, and what fastapi-limiter counts with is there."""
        limiting = self.limiting
        counting = _fastapi_limiter.counting(
            self.settings.limiter_url,
            storage=limiting.storage,
            prefix=limiting.prefix,
            identifier=limiting.identifier or default_identifier,
            http_callback=limiting.http_callback or http_default_callback,
            ws_callback=limiting.ws_callback or ws_default_callback,
        )
        async with counting:
            await self.open()
            try:
                yield
            finally:
                await self.close()

    @contextmanager
    def counted(self, channel: str) -> Iterator[None]:
        """Count a connection of a channel for the time of the block."""
        self.present[channel] += 1
        try:
            yield
        finally:
            self.present[channel] -= 1
            if not self.present[channel]:
                del self.present[channel]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make these the channels that `get_channel_layer` finds in the block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @classmethod
    def current(cls, alias: str = "default") -> Channels:
        """The channels in force, or those of the one application that is running; see `get_channel_layer`.

        Args:
            alias: For the error, which layer is wanted.

        Raises:
            SettingsError: No application is running, or more than one is.
        """
        channels = _current.get(None)
        if channels is not None:
            return channels
        running = [channels for channels in _open if channels.is_running]
        if not running:
            raise SettingsError("no application with channels is running here; get_channel_layer needs one")
        if len(running) > 1:
            raise SettingsError(
                f"{len(running)} applications with channels are running here; use app.state.channels.layer({alias!r})"
            )
        return running[0]

    @classmethod
    def of(cls, scope: Scope) -> Channels:
        """The channels that serve a connection: its application's, else the enclosing one's.

        An application without `add_channel` gets the fallback, else channels of its own, on defaults and the
        environment; consumers under no application at all share one.
        """
        if SCOPE_KEY not in scope and cls.fallback is not None:
            scope[SCOPE_KEY] = cls.fallback
        if SCOPE_KEY not in scope:
            state = getattr(scope.get("app"), "state", _without_app)
            if getattr(state, SCOPE_KEY, None) is None:
                setattr(state, SCOPE_KEY, cls(ChannelsSettings.load()))
            scope[SCOPE_KEY] = getattr(state, SCOPE_KEY)
        found: Channels = scope[SCOPE_KEY]
        return found


async def default_identifier(connection: HTTPConnection) -> str:
    """Whom limits count by default: an address, on each path alone. X-Forwarded-For is believed of TRUSTED_PROXIES."""
    address = Channels.of(connection.scope).proxies.address_of(connection)
    return f"{network_of(address)}:{connection.scope['path']}"


async def http_default_callback(request: Request, response: Response, pexpire: int) -> None:
    """Refuse a request with 429 and Retry-After.

    Args:
        request: The request.
        response: Its response.
        pexpire: The milliseconds to wait.
    """
    seconds = math.ceil(pexpire / 1000)
    raise HTTPException(429, "Too Many Requests", headers={"Retry-After": f"{seconds}"})


async def ws_default_callback(ws: WebSocket, pexpire: int) -> None:
    """Refuse a frame.

    Args:
        ws: The connection.
        pexpire: The milliseconds to wait.
    """
    seconds = math.ceil(pexpire / 1000)
    raise RateLimitExceeded(error_msg=f"Too Many Requests. Retry after {seconds} seconds.")


@contextmanager
def _told(setting: str) -> Iterator[None]:
    """Say of which setting an error is."""
    try:
        yield
    except (DefinitionError, ValueError) as error:
        raise SettingsError(f"{setting}: {error}") from error


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
    app: Any,
    *,
    add_exception_handlers: bool = True,
    url: str | None = None,
    backend: Any = None,
    broadcast: Any = None,
    limiter_url: str | None = None,
    storage: Any = None,
    prefix: str = "fastapi-channel",
    identifier: Identifier | None = None,
    http_callback: Callback | None = None,
    ws_callback: Callback | None = None,
    permission_classes: Any = None,
    throttle_classes: Any = None,
    pagination_class: None = None,
    query_token_key: str | None = None,
    cookie_token_key: str | None = None,
    settings: str | ModuleType | None = None,
    **options: Any,
) -> Channels:
    """Give a FastAPI application its channels: read the settings, open and close the layers with it.

    Call it once, before the application starts; before or after `include_router` is the same.

    Args:
        app: The FastAPI application.
        add_exception_handlers: Whether views, and dependencies around a consumer's route, may raise `ConsumerError`,
            `InvalidGroupName` and `LayerUnavailable` and have them answered (403, 422, 503), and WebSocket routes and
            channels `WebSocketException`, where the application has no handler of its own for them.
        url: The URL of the default layer, whatever CHANNEL_LAYERS says of it; any that `broadcaster` knows will do.
        backend: A backend of `broadcaster` in its place.
        broadcast: A `Broadcast` in its place.
        limiter_url: LIMITER_URL, the Redis that throttles count in; fastapi-limiter 0.1 too, if it is installed and the
            application doesn't initialise it by itself.
        storage: A client of redis-py for fastapi-limiter 0.1 to count with. It stays yours.
        prefix: What the names of what `throttling.limiter` and fastapi-limiter count begin with.
        identifier: Whom these count, by the connection or request.
        http_callback: Called with the request, the response and the milliseconds to wait when fastapi-limiter 0.1
            refuses a request; what it raises is the answer.
        ws_callback: Called with the connection and the milliseconds to wait when one of these refuses a frame.
        permission_classes: PERMISSION_CLASSES; one need not be in a list.
        throttle_classes: THROTTLE_CLASSES; one need not be in a list.
        pagination_class: There is no pagination: anything but None is an error.
        query_token_key: QUERY_TOKEN_KEY.
        cookie_token_key: COOKIE_TOKEN_KEY.
        settings: The settings module or its dotted path.
        options: Every other setting in lower case, such as `channel_layers={"jobs": "memory://"}`; stronger than the
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
    options |= {
        "url": url,
        "backend": backend,
        "broadcast": broadcast,
        "limiter_url": limiter_url,
        "storage": storage,
        "prefix": prefix,
        "identifier": identifier,
        "http_callback": http_callback,
        "ws_callback": ws_callback,
        "permission_classes": permission_classes,
        "throttle_classes": throttle_classes,
        "pagination_class": pagination_class,
        "query_token_key": query_token_key,
        "cookie_token_key": cookie_token_key,
    }
    channels = make_channels(settings, options)
    app.add_middleware(ChannelsMiddleware, channels=channels)
    app.state.channels = channels
    if add_exception_handlers:
        for error in (ConsumerError, InvalidGroupName, LayerUnavailable):
            app.exception_handlers.setdefault(error, answer_view)
        app.exception_handlers.setdefault(WebSocketException, WebSocketExceptionHandler)
    _fastapi_limiter.mend_http_limiter()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        _check_routes(app, channels)
        async with channels.running():
            yield

    _fastapi.add_outer_lifespan(app, lifespan)
    return channels


def make_channels(module: str | ModuleType | None, options: Mapping[str, Any]) -> Channels:
    """The channels that `add_channel` and `FastAPIChannel.init` make of their arguments.

    Args:
        module: The settings module or its dotted path.
        options: The arguments of `add_channel` by name; None counts as not given.

    Raises:
        SettingsError: One of them is wrong, or can't be kept.
        TypeError: There is no such argument.
    """
    given = dict(options)
    if given.pop("pagination_class", None) is not None:
        raise SettingsError("pagination_class: there is no pagination in this version of fastapi-channels")
    layers = _taken(given, ("url", "backend", "broadcast"))
    limiting = Limiting(**_taken(given, [field.name for field in fields(Limiting)]))
    for name in ("permission_classes", "throttle_classes"):
        if given.get(name) is not None and not isinstance(given[name], list | tuple):
            given[name] = [given[name]]
    names = [*layers, *(["channel_layers"] if "default" in (given.get("channel_layers") or {}) else [])]
    if len(names) > 1 and layers:
        raise SettingsError(f"{' and '.join(names)} both say what the default layer is: give one")
    loaded = ChannelsSettings.load(module, given)
    for name, value in layers.items():
        layer = _default_layer(name, value, loaded)
        loaded = loaded.model_copy(update={"channel_layers": {**loaded.channel_layers, "default": layer}})
    if not _fastapi_limiter.has_process_wide():
        for name in ("storage", "http_callback"):
            if getattr(limiting, name) is not None:
                raise SettingsError(f"{name} is for fastapi-limiter 0.1, which is not installed")
    elif limiting.http_callback is not None and limiting.storage is None and loaded.limiter_url is None:
        raise SettingsError("http_callback is for fastapi-limiter, which needs a limiter_url or a storage")
    return Channels(loaded, limiting, broadcast=layers.get("broadcast"))


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the options of these names out, and return those that are given."""
    return {name: value for name in names if (value := options.pop(name, None)) is not None}


def _default_layer(name: str, value: Any, settings: ChannelsSettings) -> ChannelLayer:
    """The layer for a URL of `add_channel`, which may be any that `broadcaster` knows, or for one of its objects."""
    spec: LayerSpec = {"BACKEND": "fastapi_channels.layers.BroadcasterLayer", "CONFIG": {"broadcast": value}}
    if name == "url" and (value.partition("://")[0] in LAYER_SCHEMES or value.startswith("broadcaster+")):
        spec = value
    with _told(name):
        return make_layer(spec, capacity=settings.capacity, expiry=settings.expiry)


def _check_routes(app: Any, channels: Channels) -> None:
    """Ask what every consumer's route, and every throttle of a route, has to say against these settings."""
    for path, function, innermost in _fastapi.called_by_routes(app):
        check = getattr(function, "check_settings", None)
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
    return Channels.current(alias).layer(alias)


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
