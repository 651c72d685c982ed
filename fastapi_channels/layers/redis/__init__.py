"""The layer over Redis or Valkey: many processes, many machines."""

from __future__ import annotations

from fastapi_channels.layers.redis.layer import RedisLayer

__all__ = ["RedisLayer"]
