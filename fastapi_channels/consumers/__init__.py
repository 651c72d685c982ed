"""Consumers: one connection's life, in hooks, events and actions."""

from __future__ import annotations

from fastapi_channels.consumers.actions import Action, ActionConsumer
from fastapi_channels.consumers.base import WebSocketConsumer
from fastapi_channels.consumers.blocking import SyncConsumer
from fastapi_channels.consumers.json import JsonConsumer
from fastapi_channels.consumers.marks import action, event

__all__ = [
    "Action",
    "ActionConsumer",
    "JsonConsumer",
    "SyncConsumer",
    "WebSocketConsumer",
    "action",
    "event",
]
