"""`add_channel`, and `FastAPIChannel` for applications without it, where the original package has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI

from fastapi_channels._fastapi_limiter import mend_http_limiter
from fastapi_channels.application import (
    Callback,
    Channels,
    Identifier,
    Limiting,
    add_channel,
    as_list,
    default_identifier,
    http_default_callback,
    make_channels,
    ws_default_callback,
)
from fastapi_channels.exceptions import SettingsError
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
    async def init(
        cls,
        *,
        url: str | None = None,
        backend: Any = None,
        broadcast: Any = None,
        limiter_url: str | None = None,
        limiter_backend: None = None,
        storage: Any = None,
        prefix: str = "fastapi-channel",
        identifier: Identifier | None = None,
        http_callback: Callback | None = None,
        ws_callback: Callback | None = None,
        permission_classes: Any = None,
        throttle_classes: Any = None,
        pagination_class: None = None,
        query_token_key: str | None = None,
        cookie_token_key: str | None = None,
        debug: bool = False,
    ) -> None:
        """Open the layer, on the running event loop; to be called when the application starts, before any connection.

        Args:
            url: As for `add_channel`, as are all others but these.
            backend: See `url`.
            broadcast: See `url`.
            limiter_url: See `url`.
            limiter_backend: Not supported: anything but None is an error.
            storage: See `url`.
            prefix: See `url`.
            identifier: See `url`.
            http_callback: See `url`.
            ws_callback: See `url`.
            permission_classes: See `url`.
            throttle_classes: See `url`.
            pagination_class: See `url`.
            query_token_key: See `url`.
            cookie_token_key: See `url`.
            debug: Of no effect: what clients see of an internal error is what `app.debug` says.

        Raises:
            SettingsError: A setting is wrong; the text names it and where it came from.
            RuntimeError: It has been initialised already.
        """
        if cls._running is not None:
            raise RuntimeError("FastAPIChannel.init was called twice; close() it first")
        if limiter_backend is not None:
            raise SettingsError("limiter_backend is not supported: throttles count in the Redis of limiter_url")
        channels = make_channels(
            None,
            {
                "limiter_url": limiter_url,
                "permission_classes": as_list(permission_classes),
                "throttle_classes": as_list(throttle_classes),
                "query_token_key": query_token_key,
                "cookie_token_key": cookie_token_key,
            },
            Limiting(storage, prefix, identifier, http_callback, ws_callback),
            layers=(url, backend, broadcast),
            pagination_class=pagination_class,
        )
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
