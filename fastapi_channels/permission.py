"""The permissions, where the original package has them; see `permissions`."""

from __future__ import annotations

from fastapi_channels.permissions import AllowAny, BasePermission, DenyAll, HasScope, IsAuthenticated

__all__ = ["AllowAny", "BasePermission", "DenyAll", "HasScope", "IsAuthenticated"]
