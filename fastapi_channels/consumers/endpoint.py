"""From a consumer class to what FastAPI and ASGI servers call.

The hook's parameters become those of an endpoint that is given to FastAPI's public `add_api_websocket_route`, so they
are FastAPI's in every way. The session is the endpoint's first dependency, and stays on the route's exit stack: what
the other dependencies, the parameters or `connect` raise passes through it, and is answered there.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import Depends
from fastapi.routing import APIWebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from fastapi_channels import _fastapi
from fastapi_channels._tasks import Crew
from fastapi_channels.application import Channels
from fastapi_channels.authentication import USER_ID
from fastapi_channels.connection import Connection, Limits
from fastapi_channels.consumers.base import WebSocketConsumer
from fastapi_channels.consumers.session import Session
from fastapi_channels.dependencies import asks_impossible, signature_of
from fastapi_channels.exceptions import DefinitionError
from fastapi_channels.gate import Gate
from fastapi_channels.handshake import in_path
from fastapi_channels.layers import ChannelLayer

__all__ = ["ConsumerApp", "Sessions", "make_endpoint", "with_attributes"]

_SESSION = "fastapi_channels_session"


def with_attributes(consumer: type[WebSocketConsumer], attributes: Mapping[str, Any]) -> type[WebSocketConsumer]:
    """The class with other values of its attributes, as a route may have it.

    Raises:
        DefinitionError: The class has no such attribute.
    """
    if not (isinstance(consumer, type) and issubclass(consumer, WebSocketConsumer)):
        raise DefinitionError(f"a route needs a consumer class, not {consumer!r}")
    for name in attributes:
        if name.startswith("_") or not hasattr(consumer, name) or _is_api(name):
            raise DefinitionError(f"{consumer.__name__} has no attribute {name!r} that a route could set")
    if not attributes:
        return consumer
    namespace = {"__module__": consumer.__module__, "__qualname__": consumer.__qualname__, **attributes}
    return types.new_class(consumer.__name__, (consumer,), exec_body=lambda body: body.update(namespace))


def _is_api(name: str) -> bool:
    """Whether a name is a hook, a method or a property of every consumer."""
    value = vars(WebSocketConsumer).get(name)
    return callable(value) or isinstance(value, (property, classmethod))


def make_endpoint(consumer: type[WebSocketConsumer], path_params: frozenset[str] = frozenset()) -> Callable[..., Any]:
    """The endpoint that serves one route with a consumer class.

    Args:
        consumer: The class.
        path_params: Names of parameters that are in the path, where FastAPI doesn't know the path.

    Raises:
        DefinitionError: `connect` asks for what a WebSocket doesn't have.
    """

    def endpoint(**values: Any) -> Awaitable[None]:
        session: Session = values.pop(_SESSION)
        return session.serve(values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    session = Depends(_session_dependency(consumer))
    parameters = [inspect.Parameter(_SESSION, keyword, annotation=Annotated[Session, session])]
    parameters += [_connect_parameter(consumer, given, path_params) for given in _connect_signature(consumer)]
    endpoint.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    endpoint.__name__ = consumer.__name__
    endpoint.__qualname__ = consumer.__qualname__
    endpoint.__doc__ = consumer.__doc__
    endpoint.session = session  # type: ignore[attr-defined]
    endpoint.check_settings = lambda channels: _served(consumer, channels)  # type: ignore[attr-defined]
    return endpoint


def _connect_signature(consumer: type[WebSocketConsumer]) -> list[inspect.Parameter]:
    return list(signature_of(consumer.connect, owner=consumer).parameters.values())


def _connect_parameter(
    consumer: type[WebSocketConsumer], parameter: inspect.Parameter, path_params: frozenset[str]
) -> inspect.Parameter:
    where = f"{consumer.__qualname__}.connect, parameter {parameter.name!r}"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise DefinitionError(f"{where}: a hook has no {parameter.kind.description} parameters")
    if why := asks_impossible(parameter):
        raise DefinitionError(f"{where}: {why}")
    return in_path(parameter, path_params).replace(kind=parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class _Served:
    """What connections of one consumer class in one application have in common."""

    layer: ChannelLayer
    limits: Limits
    gate: Gate


def _served(consumer: type[WebSocketConsumer], channels: Channels) -> _Served:
    def setting(name: str) -> Any:
        own = getattr(consumer, name)
        return getattr(channels.settings, name, None) if own is None else own

    limits = Limits(**{field.name: setting(field.name) for field in fields(Limits)})
    gate = Gate(channels, consumer._rules(), consumer._action_rules())
    return _Served(channels.layer(consumer.channel_layer_alias), limits, gate)


class Sessions:
    """Opens the sessions of one consumer class.

    Args:
        consumer: The class.
    """

    def __init__(self, consumer: type[WebSocketConsumer]) -> None:
        self._consumer = consumer
        self._known: WeakKeyDictionary[Channels, _Served] = WeakKeyDictionary()

    async def begin(self, websocket: WebSocket) -> Session:
        """A session for a client whose handshake is not answered yet; `Session.admit` lets it through the gate."""
        channels = Channels.of(websocket.scope)
        served = self._known.get(channels)
        if served is None:
            served = self._known[channels] = _served(self._consumer, channels)
        layer = served.layer
        failure = None if layer.is_open else await _failure_of(channels.open)
        await websocket.receive()  # websocket.connect
        instance = self._consumer()
        crew = layer.crew if layer.is_open else Crew(asyncio.get_running_loop())
        connection = Connection(websocket, served.limits, crew, layer.counters)
        instance._connection = connection
        session = instance._session = Session(instance, connection, layer, channels, served.gate)
        session.failure = failure
        instance.layer = layer
        if self._consumer.user_id is not WebSocketConsumer.user_id:
            websocket.scope[USER_ID] = instance.user_id
        return session


def _session_dependency(consumer: type[WebSocketConsumer]) -> Callable[[WebSocket], Awaitable[Session]]:
    sessions = Sessions(consumer)

    async def session(websocket: WebSocket) -> Session:
        session = await sessions.begin(websocket)
        _fastapi.on_exit(websocket, session.leave)
        await session.admit()
        return session

    return session


async def _failure_of(call: Callable[[], Awaitable[None]]) -> Exception | None:
    try:
        await call()
    except Exception as error:
        return error
    return None


class ConsumerApp:
    """A consumer as an ASGI application; `WebSocketConsumer.as_asgi` makes it.

    An object and not a function, which Starlette's routes would take for a view.
    """

    def __init__(self, consumer: type[WebSocketConsumer]) -> None:
        self.consumer = consumer
        self._routes: dict[tuple[Any, frozenset[str]], APIWebSocketRoute] = {}
        self._route(None, frozenset())  # what is wrong with the class is wrong now, and not at a connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "websocket":
            raise RuntimeError(f"{self.consumer.__qualname__} serves WebSockets, not {scope['type']!r}")
        route = self._route(scope.get("app"), frozenset(scope.get("path_params", {})))
        await route.handle(scope, receive, send)

    def _route(self, outer: Any, path_params: frozenset[str]) -> APIWebSocketRoute:
        key = outer, path_params
        if key not in self._routes:
            provider = outer if hasattr(outer, "dependency_overrides") else None
            endpoint = make_endpoint(self.consumer, path_params)
            self._routes[key] = APIWebSocketRoute("/", endpoint, dependency_overrides_provider=provider)
        return self._routes[key]
