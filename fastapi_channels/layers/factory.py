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
    raise SettingsError(f"a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not {spec!r}")


def _from_url(url: str, capacity: int, expiry: float) -> ChannelLayer:
    scheme = urlsplit(url).scheme
    if scheme != "memory":
        # The URL may hold a password: only its scheme is shown.
        raise SettingsError(
            f"there is no layer for {scheme or 'a URL without a scheme'}://; this version has memory://"
        )
    if url != "memory://":
        raise SettingsError(f"memory:// takes nothing behind it, but there is {url.removeprefix('memory://')!r}")
    return MemoryLayer(capacity=capacity, expiry=expiry)


def _from_backend(spec: Mapping[str, Any], capacity: int, expiry: float) -> ChannelLayer:
    if unknown := set(spec) - {"BACKEND", "CONFIG"}:
        raise SettingsError(f"a layer has BACKEND and CONFIG, not {', '.join(sorted(map(str, unknown)))}")
    path = spec.get("BACKEND")
    try:
        backend = _dotted_path.validate_python(path)
    except ValidationError as error:
        raise SettingsError(f"BACKEND {path!r}: {error.errors()[0]['msg']}") from error
    if not (isinstance(backend, type) and issubclass(backend, ChannelLayer)):
        raise SettingsError(f"BACKEND {path!r} is not a ChannelLayer")
    config = {"capacity": capacity, "expiry": expiry, **spec.get("CONFIG", {})}
    try:
        return backend(**config)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{backend.__name__}: {error}") from error
