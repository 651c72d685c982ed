"""`add_channel`, and `FastAPIChannel` for applications without it, where the original package has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI

from fastapi_channels._fastapi_limiter import mend_http_limiter
from fastapi_channels.application import (
    Channels,
    add_channel,
    default_identifier,
    http_default_callback,
    make_channels,
    ws_default_callback,
)
from fastapi_channels.permissions import AllowAny
from fastapi_channels.settings import ChannelsSettings

__all__ = [
    "DEFAULT_COOKIE_TOKEN_KEY",
    "DEFAULT_PERMISSION_CLASSES",
    "DEFAULT_QUERY_TOKEN_KEY",
    "FastAPIChannel",
    "ParentT",
    "add_channel",
    "default_identifier",
    "http_default_callback",
    "ws_default_callback",
]

#: What the original package's `add_channel` took and returned; ours takes applications.
ParentT = TypeVar("ParentT", APIRouter, FastAPI)

#: A usual name for the query parameter of a token; to be given, for nothing is read from a URL by default.
DEFAULT_QUERY_TOKEN_KEY = "token"
#: A usual name for the cookie of a token; to be given likewise.
DEFAULT_COOKIE_TOKEN_KEY = "token"
#: Who may come in where nothing says otherwise.
DEFAULT_PERMISSION_CLASSES = (AllowAny,)

_DEFAULTS = ChannelsSettings.model_construct()


class _Views(type):
    """The type of `FastAPIChannel`, whose attributes show what is in force."""

    @property
    def broadcast(cls) -> Any:
        """The `Broadcast` that the layer was made of, if it was."""
        return None if Channels.fallback is None else Channels.fallback.broadcast

    @property
    def limiter_url(cls) -> str | None:
        """LIMITER_URL."""
        return cls._settings.limiter_url

    @property
    def query_token_key(cls) -> str | None:
        """QUERY_TOKEN_KEY."""
        return cls._settings.query_token_key

    @property
    def cookie_token_key(cls) -> str | None:
        """COOKIE_TOKEN_KEY."""
        return cls._settings.cookie_token_key

    @property
    def permission_classes(cls) -> Sequence[Any]:
        """PERMISSION_CLASSES; `DEFAULT_PERMISSION_CLASSES` where there are none."""
        return cls._settings.permission_classes or DEFAULT_PERMISSION_CLASSES

    @property
    def throttle_classes(cls) -> Sequence[Any] | None:
        """THROTTLE_CLASSES; None where there are none."""
        return cls._settings.throttle_classes or None

    @property
    def pagination_class(cls) -> None:
        """None: there is no pagination."""

    @property
    def _settings(cls) -> ChannelsSettings:
        return _DEFAULTS if Channels.fallback is None else Channels.fallback.settings


class FastAPIChannel(metaclass=_Views):
    """Channels for the applications of this process that have none of their own from `add_channel`.

    Its attributes show what it was initialised with.
    """

    _running: AsyncExitStack | None = None

    @classmethod
    async def init(cls, *, settings: str | ModuleType | None = None, **options: Any) -> None:
        """Open the layer, on the running event loop; to be called when the application starts, before any connection.

        Args:
            settings: As for `add_channel`.
            options: Likewise.

        Raises:
            SettingsError: A setting is wrong; the text names it and where it came from.
            TypeError: An option that `add_channel` doesn't have.
            RuntimeError: It has been initialised already.
        """
        if cls._running is not None:
            raise RuntimeError("FastAPIChannel.init was called twice; close() it first")
        channels = make_channels(settings, options)
        mend_http_limiter()
        running = cls._running = AsyncExitStack()
        try:
            await running.enter_async_context(channels.running())
        except BaseException:
            cls._running = None
            raise
        Channels.fallback = channels

    @classmethod
    async def close(cls) -> None:
        """Close the layer; does nothing where nothing was initialised."""
        running, cls._running, Channels.fallback = cls._running, None, None
        if running is not None:
            await running.aclose()
