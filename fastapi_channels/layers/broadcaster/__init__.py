"""The broadcaster layer: groups over whatever the `broadcaster` package speaks, such as Postgres."""

from __future__ import annotations

from fastapi_channels.layers.broadcaster.layer import BroadcasterLayer

__all__ = ["BroadcasterLayer"]
