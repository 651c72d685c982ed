"""Consumers, groups and channel layers for FastAPI."""

from __future__ import annotations

from fastapi_channels.api import FastAPIChannel
from fastapi_channels.application import Channels, Layer, add_channel, channel_layer, get_channel_layer

__all__ = ["Channels", "FastAPIChannel", "Layer", "add_channel", "channel_layer", "get_channel_layer"]
