"""Channel layers: how consumers, views and other processes reach each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_channels.exceptions import (
    ChannelFull,
    InvalidGroupName,
    InvalidMessage,
    LayerError,
    LayerUnavailable,
    UnreadableMessage,
)
from fastapi_channels.layers.base import ChannelLayer, Health, Receipt, SyncChannelLayer
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.envelope import Envelope, Message
from fastapi_channels.layers.factory import BACKENDS, backend, make_layer
from fastapi_channels.layers.memory import MemoryLayer
from fastapi_channels.layers.names import safe_name
from fastapi_channels.layers.publisher import AsyncPublisher, Publisher
from fastapi_channels.layers.sink import Direct, Sink
from fastapi_channels.layers.wire import Serializer

if TYPE_CHECKING:
    from fastapi_channels.layers.broadcaster import BroadcasterLayer
    from fastapi_channels.layers.redis import RedisLayer

__all__ = [
    "AsyncPublisher",
    "BroadcasterLayer",
    "ChannelFull",
    "ChannelLayer",
    "Counters",
    "Direct",
    "Envelope",
    "Health",
    "InvalidGroupName",
    "InvalidMessage",
    "LayerError",
    "LayerUnavailable",
    "MemoryLayer",
    "Message",
    "Publisher",
    "Receipt",
    "RedisLayer",
    "Serializer",
    "Sink",
    "SyncChannelLayer",
    "UnreadableMessage",
    "make_layer",
    "safe_name",
]


def __getattr__(name: str) -> Any:
    """Import what needs an optional package when it is asked for."""
    if name in BACKENDS:
        return backend(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
