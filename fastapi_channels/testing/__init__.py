"""For your tests: a client without a server, a Redis server, and the contract that every layer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_channels.testing.client import ConnectionClosed, RefusedResponse, WebSocketSession, connect
from fastapi_channels.testing.server import RedisServer, find_server

if TYPE_CHECKING:
    from fastapi_channels.testing.contract import LayerContract

__all__ = [
    "ConnectionClosed",
    "LayerContract",
    "RedisServer",
    "RefusedResponse",
    "WebSocketSession",
    "connect",
    "find_server",
]


def __getattr__(name: str) -> Any:
    # The contract is made of pytest's fixtures; `connect` is of use without pytest.
    if name == "LayerContract":
        from fastapi_channels.testing.contract import LayerContract

        return LayerContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
