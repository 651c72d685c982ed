"""For your tests: a client without a server, and the contract that every layer keeps."""

from __future__ import annotations

from fastapi_channels.testing.client import ConnectionClosed, RefusedResponse, WebSocketSession, connect

__all__ = ["ConnectionClosed", "RefusedResponse", "WebSocketSession", "connect"]
