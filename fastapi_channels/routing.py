"""The routing table: which consumer serves which path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.params import Depends

from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.consumers.endpoint import make_endpoint, with_attributes
from fastapi_channels.exceptions import DefinitionError

__all__ = ["ConsumerRoute", "ConsumerRouter", "route"]

ConsumerT = TypeVar("ConsumerT", bound=type[WebSocketConsumer])


@dataclass(frozen=True, slots=True)
class ConsumerRoute:
    """An entry of the routing table; made by `route`."""

    path: str
    consumer: type[WebSocketConsumer]
    name: str | None = None
    init: dict[str, Any] = field(default_factory=dict)


def route(path: str, consumer: type[WebSocketConsumer], name: str | None = None, **init: Any) -> ConsumerRoute:
    """An entry of the routing table.

    Args:
        path: As FastAPI has it, such as `"/ws/chat/{room}"`.
        consumer: The class that serves it.
        name: For `url_path_for`; the class's name by default.
        init: Attributes of the class that are different on this route, such as `groups=["news"]`.
    """
    return ConsumerRoute(path, consumer, name, init)


class ConsumerRouter(APIRouter):
    """FastAPI's router, with consumers on it.

    Prefixes, nested `include_router`, dependencies of routers and mounts work as FastAPI's do, and HTTP routes may
    stand on it too. Dependencies of a router run before those of `connect`.

    Args:
        routes: The table's entries.
        options: What `APIRouter` takes.

    Raises:
        DefinitionError: A consumer's `connect` asks for what a WebSocket doesn't have, or an entry names an attribute
            that its class doesn't have.
    """

    def __init__(self, routes: Iterable[ConsumerRoute] = (), **options: Any) -> None:
        super().__init__(**options)
        for entry in routes:
            self.add_consumer(entry)

    def add_consumer(self, entry: ConsumerRoute, *, dependencies: Sequence[Depends] = ()) -> None:
        """Add an entry to the table.

        Args:
            entry: Made by `route`.
            dependencies: Carried out before those of `connect`, for what they do and not for what they give.
        """
        if not isinstance(entry, ConsumerRoute):
            raise DefinitionError(f"an entry of the table is made by route(), not {entry!r}")
        consumer = with_attributes(entry.consumer, entry.init)
        endpoint: Any = make_endpoint(consumer)
        own = self.dependencies
        self.dependencies = [endpoint.session, *own]  # first of all, so that what the others raise is answered by it
        try:
            name = entry.name or consumer.__name__
            self.add_api_websocket_route(entry.path, endpoint, name, dependencies=list(dependencies))
        finally:
            self.dependencies = own

    def consumer(
        self, path: str, name: str | None = None, *, dependencies: Sequence[Depends] = (), **init: Any
    ) -> Callable[[ConsumerT], ConsumerT]:
        """Add the decorated class to the table; see `route`."""

        def add(consumer: ConsumerT) -> ConsumerT:
            self.add_consumer(route(path, consumer, name, **init), dependencies=dependencies)
            return consumer

        return add
