"""From a setting to a layer: URLs, Django's form, layer objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import ImportString, TypeAdapter, ValidationError

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers.base import ChannelLayer
from fastapi_channels.layers.memory import MemoryLayer

__all__ = ["make_layer"]

_dotted_path: TypeAdapter[Any] = TypeAdapter(ImportString)

#: What an entry of CHANNEL_LAYERS may be.
LayerSpec = str | Mapping[str, Any] | ChannelLayer


def make_layer(spec: LayerSpec, *, capacity: int, expiry: float) -> ChannelLayer:
    """Make the layer that a `CHANNEL_LAYERS` entry describes.

    Args:
        spec: A URL, `{"BACKEND": "dotted.path", "CONFIG": {...}}`, or a layer, which is returned as it is.
        capacity: For a layer whose own configuration says nothing else.
        expiry: Likewise, in seconds.

    Raises:
        SettingsError: There is no such layer, or it doesn't take that configuration.
    """
    if isinstance(spec, ChannelLayer):
        return spec
    if isinstance(spec, str):
        return _from_url(spec, capacity, expiry)
    if isinstance(spec, Mapping):
        return _from_backend(spec, capacity, expiry)
    # Never the entry itself in an error: it may hold a password.
    kind = type(spec).__name__
    raise SettingsError(f"a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not a {kind}")


def _from_url(url: str, capacity: int, expiry: float) -> ChannelLayer:
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise SettingsError("not a URL") from error
    if scheme != "memory":
        raise SettingsError(
            f"there is no layer for {scheme or 'a URL without a scheme'}://; this version has memory://"
        )
    if url != "memory://":
        raise SettingsError("memory:// takes nothing behind it")
    return MemoryLayer(capacity=capacity, expiry=expiry)


def _from_backend(spec: Mapping[str, Any], capacity: int, expiry: float) -> ChannelLayer:
    if unknown := set(spec) - {"BACKEND", "CONFIG"}:
        raise SettingsError(f"a layer has BACKEND and CONFIG, not {', '.join(sorted(map(str, unknown)))}")
    path = spec.get("BACKEND")
    try:
        backend = _dotted_path.validate_python(path)
    except ValidationError as error:
        if not (isinstance(path, str) and all(map(str.isidentifier, path.split(".")))):
            raise SettingsError("BACKEND is the dotted path of a ChannelLayer") from None
        raise SettingsError(f"BACKEND {path!r}: {error.errors()[0]['msg']}") from error
    if not (isinstance(backend, type) and issubclass(backend, ChannelLayer)):
        raise SettingsError(f"BACKEND {path!r} is not a ChannelLayer")
    given = spec.get("CONFIG", {})
    if not isinstance(given, Mapping):
        raise SettingsError(f"CONFIG is a dict, not a {type(given).__name__}")
    config = {"capacity": capacity, "expiry": expiry, **given}
    try:
        return backend(**config)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{backend.__name__}: {error}") from error
