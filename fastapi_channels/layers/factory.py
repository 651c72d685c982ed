"""From a setting to a layer: URLs, Django's form, layer objects."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from pydantic import ImportString, TypeAdapter, ValidationError

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers.base import ChannelLayer
from fastapi_channels.layers.memory import MemoryLayer

__all__ = ["BACKENDS", "backend", "make_layer"]

#: The layers that need an optional package: their module, and the extra that brings the package.
BACKENDS = {
    "BroadcasterLayer": ("fastapi_channels.layers.broadcaster", "broadcaster"),
    "RedisLayer": ("fastapi_channels.layers.redis", "redis"),
}

#: Which layer a URL is for; a broadcaster URL that would be somebody else's is written `broadcaster+redis://...`.
SCHEMES = {
    **dict.fromkeys(
        [
            "redis",
            "rediss",
            "unix",
            "redis+sentinel",
            "rediss+sentinel",
            "redis+cluster",
            "rediss+cluster",
        ],
        "RedisLayer",
    ),
    **dict.fromkeys(["postgres", "postgresql", "kafka", "redis-stream"], "BroadcasterLayer"),
}

#: The schemes that have a layer; to add_channel, any other is `broadcaster`'s.
LAYER_SCHEMES = frozenset({"memory", *SCHEMES})

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
    config = {"capacity": capacity, "expiry": expiry}
    if isinstance(spec, str):
        return _from_url(spec, config)
    if isinstance(spec, Mapping):
        return _from_backend(spec, config)
    # Never the entry itself in an error: it may hold a password.
    kind = type(spec).__name__
    raise SettingsError(f"a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not a {kind}")


def backend(name: str) -> type[ChannelLayer]:
    """The class of that name in `BACKENDS`.

    Raises:
        ImportError: The package that it needs is not installed; the text says how to install it.
    """
    module, extra = BACKENDS[name]
    try:
        return cast(type[ChannelLayer], getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'fastapi-channels[{extra}]'") from error


#: Those of ours by their dotted path; pydantic would not tell of the package that is missing.
OURS = {f"fastapi_channels.layers.{name}": partial(backend, name) for name in BACKENDS}


def _from_url(url: str, config: Mapping[str, Any]) -> ChannelLayer:
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme == "memory":
        if url != "memory://":
            raise SettingsError("memory:// takes nothing behind it")
        return MemoryLayer(**config)
    if scheme.startswith("broadcaster+"):
        name, url = "BroadcasterLayer", url.removeprefix("broadcaster+")
    elif scheme in SCHEMES:
        name = SCHEMES[scheme]
    else:
        known = ", ".join(f"{scheme}://" for scheme in ("memory", *SCHEMES, "broadcaster+..."))
        raise SettingsError(f"there is no layer for {scheme or 'a URL without a scheme'}; there are {known}")
    try:
        layer = backend(name)
    except ImportError as error:
        raise SettingsError(str(error)) from error
    return _make(layer, url, config=config)


def _from_backend(spec: Mapping[str, Any], config: Mapping[str, Any]) -> ChannelLayer:
    if unknown := set(spec) - {"BACKEND", "CONFIG"}:
        raise SettingsError(f"a layer has BACKEND and CONFIG, not {', '.join(sorted(map(str, unknown)))}")
    path = spec.get("BACKEND")
    try:
        layer = OURS[path]() if isinstance(path, str) and path in OURS else _dotted_path.validate_python(path)
    except ImportError as error:
        raise SettingsError(f"BACKEND: {error}") from error
    except ValidationError as error:
        if not (isinstance(path, str) and all(map(str.isidentifier, path.split(".")))):
            raise SettingsError("BACKEND is the dotted path of a ChannelLayer") from None
        raise SettingsError(f"BACKEND {path!r}: {error.errors()[0]['msg']}") from error
    if not (isinstance(layer, type) and issubclass(layer, ChannelLayer)):
        raise SettingsError(f"BACKEND {path!r} is not a ChannelLayer")
    given = spec.get("CONFIG", {})
    if not isinstance(given, Mapping):
        raise SettingsError(f"CONFIG is a dict, not a {type(given).__name__}")
    return _make(layer, config={**config, **given})


def _make(layer: type[ChannelLayer], *args: Any, config: Mapping[str, Any]) -> ChannelLayer:
    try:
        inspect.signature(layer).bind(*args, **config)
        return layer(*args, **config)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{layer.__name__}: {error}") from error
