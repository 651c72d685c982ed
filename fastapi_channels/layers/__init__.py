"""Channel layers: how consumers, views and other processes reach each other."""

from __future__ import annotations

from fastapi_channels.exceptions import (
    ChannelFull,
    InvalidGroupName,
    InvalidMessage,
    LayerError,
    LayerUnavailable,
)
from fastapi_channels.layers.base import ChannelLayer, Receipt, SyncChannelLayer
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.envelope import Envelope, Message
from fastapi_channels.layers.factory import make_layer
from fastapi_channels.layers.memory import MemoryLayer
from fastapi_channels.layers.names import safe_name
from fastapi_channels.layers.sink import Direct, Sink

__all__ = [
    "ChannelFull",
    "ChannelLayer",
    "Counters",
    "Direct",
    "Envelope",
    "InvalidGroupName",
    "InvalidMessage",
    "LayerError",
    "LayerUnavailable",
    "MemoryLayer",
    "Message",
    "Receipt",
    "Sink",
    "SyncChannelLayer",
    "make_layer",
    "safe_name",
]
