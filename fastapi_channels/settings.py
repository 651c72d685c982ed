"""The settings of one application, from four sources, as one validated value.

Strongest first: the arguments of `add_channel`, environment variables (`CHANNELS_` and the setting's name), the
settings module (`add_channel(app, settings="app.settings")`, or `FASTAPI_CHANNELS_SETTINGS=app.settings`), defaults.
A name that is no setting, or a value that doesn't fit, stops the start and is told with where it came from.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, ValidationError
from pydantic_core import from_json
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from fastapi_channels.exceptions import SettingsError

__all__ = ["ChannelsSettings", "OverflowPolicy", "RejectMode"]

ENV_PREFIX = "CHANNELS_"
MODULE_VARIABLE = "FASTAPI_CHANNELS_SETTINGS"

#: What happens when a client's outbox is full: close it with 4008; drop its oldest or the newest frame; or keep only
#: the newest frame of each key (`outbox_key`) and, if that isn't enough, drop the oldest.
OverflowPolicy = Literal["close", "drop_oldest", "drop_newest", "latest"]

#: How a handshake is refused: by an HTTP response, or by accepting it and closing with a code that browsers can read.
RejectMode = Literal["http", "close"]

# Settings of the design that this version can't keep. Taking them in silence would be worse than not having them.
_NOT_YET = frozenset(
    {
        "ASYNCAPI_URL",
        "CONSOLE_URL",
        "GROUPS",
    }
)


class ChannelsSettings(BaseSettings):
    """Every setting, under its lower-case name; make it with `load`. It doesn't change afterwards."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    channel_layers: Annotated[dict[str, Any], Field(min_length=1)] = {"default": "memory://"}
    """The layers by alias: a URL, `{"BACKEND": "dotted.path", "CONFIG": {...}}`, or a layer object."""

    capacity: Annotated[int, Field(ge=1000)] = 1000
    """How many messages, and how many frames, wait for one consumer before it counts as full."""

    expiry: Annotated[float, Field(gt=0)] = 60.0
    """After how many seconds a message that nobody has handled is dropped."""

    allowed_origins: list[str] | None = None
    """The origins of pages that may connect, `https://*.example.org` for sub-domains, `*` for all; None: the own."""

    trusted_proxies: list[str] = []
    """Addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Host are believed."""

    authentication_classes: list[Any] = []
    """Who finds out who a client is: classes or instances, or their dotted paths."""

    query_token_key: str | None = None
    """The query parameter that may carry a token; None for none, since URLs are logged."""

    cookie_token_key: str | None = None
    """The cookie that may carry a token."""

    permission_classes: list[Any] = []
    """What all clients need: permissions or their dotted paths. A consumer's own stand in their place."""

    throttle_classes: list[Any] = []
    """What holds all clients back: throttles, rates, or dotted paths. A consumer's own stand in their place."""

    throttle_rates: dict[str, str] = {}
    """The rates of throttles that have none of their own, by scope, such as `{"user": "100/minute"}`."""

    throttle_on_error: Literal["allow", "deny"] = "allow"
    """What happens to what is throttled while the server that counts can't be reached."""

    limiter_url: str | None = None
    """The Redis that counts for throttles; None for the default layer's, or this process if that has none."""

    max_violations: Annotated[int, Field(ge=1)] | None = 100
    """How many refused frames a minute a connection may send before it is closed with 4029; None for any number."""

    max_connections: Annotated[int, Field(ge=0)] | None = None
    """How many connections each consumer class may have, over all processes that share a Redis."""

    max_connections_per_user: Annotated[int, Field(ge=0)] | None = None
    """How many connections a user may have; a consumer's own number is counted for that consumer alone."""

    max_connections_per_address: Annotated[int, Field(ge=0)] | None = None
    """How many connections may come from one address (of IPv6, one /64), likewise."""

    max_frame_size: Annotated[int, Field(ge=1)] = 1024 * 1024
    """How many bytes a client's frame may have."""

    max_frames_per_second: Annotated[float, Field(gt=0)] | None = None
    """How many frames a second one connection may send; what is more is refused."""

    max_bytes_per_second: Annotated[float, Field(gt=0)] | None = None
    """How many bytes a second one connection may send; what is more is refused."""

    first_frame_timeout: Annotated[float, Field(gt=0)] | None = None
    """After how many seconds a connection is closed with 1001 if no frame has come; None for never."""

    idle_timeout: Annotated[float, Field(gt=0)] | None = None
    """After how many seconds in which no frame has come a connection is closed with 1001; None for never."""

    outbox_frames: Annotated[int, Field(ge=1)] = 1000
    """How many frames may wait for one client's socket."""

    outbox_bytes: Annotated[int, Field(ge=1)] = 4 * 1024 * 1024
    """How many bytes may wait for one client's socket; a single frame may be larger."""

    overflow: OverflowPolicy = "close"
    """What happens to an event for a client whose outbox is full."""

    reject_mode: RejectMode = "http"
    """How a handshake is refused."""

    layer_grace: Annotated[float | None, Field(gt=0)] = None
    """For how many seconds a layer may be unavailable before its consumers are closed with 4010; None for ever."""

    drain_timeout: Annotated[float, Field(ge=0)] = 10.0
    """How many seconds a `disconnect` hook may take."""

    @classmethod
    def load(cls, module: str | ModuleType | None = None, options: Mapping[str, Any] | None = None) -> Self:
        """Read all four sources.

        Args:
            module: The settings module or its dotted path; without one, what `FASTAPI_CHANNELS_SETTINGS` names.
            options: The arguments of `add_channel`, strongest of all. None counts as not given, but for a setting that
                may be None and by default isn't.

        Raises:
            SettingsError: A name that is no setting or a value that doesn't fit, with its source.
            TypeError: An option that is no setting.
        """
        for name in options or {}:
            if name.upper() not in _names() or name != name.lower():
                hint = _hint(name.lower())
                raise TypeError(f"add_channel() got an unexpected keyword argument {name!r}{hint}")
        given = {name: value for name, value in (options or {}).items() if value is not None or _is_set_by_none(name)}
        module = module if module is not None else os.environ.get(MODULE_VARIABLE) or None
        from_environment = _check_environment()
        in_module = {} if module is None else _from_module(module)
        origins = {
            **{name: f"settings module {_module_name(module)}" for name in in_module},
            **{name: f"environment variable {variable}" for name, variable in from_environment.items()},
            **dict.fromkeys(given, "argument of add_channel"),
        }
        for name, origin in origins.items():
            if name.upper() in _NOT_YET:
                raise SettingsError(f"{name.upper()} ({origin}) is not supported by this version of fastapi-channels")

        class Sources(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                # One source, merged here: pydantic-settings would merge the dicts of several into each other.
                values = {**in_module, **env_settings(), **given}
                return (InitSettingsSource(settings_cls, init_kwargs=values),)

        Sources.__name__ = Sources.__qualname__ = cls.__name__
        try:
            settings = cast(Self, Sources())
        except ValidationError as error:
            raise SettingsError(_told(error, origins)) from None
        except SourceError as error:
            raise SettingsError(_told_json(from_environment) or str(error)) from None
        return settings


def _names() -> set[str]:
    return {name.upper() for name in ChannelsSettings.model_fields} | _NOT_YET


def _is_set_by_none(name: str) -> bool:
    """Whether None says something of a setting that its default doesn't."""
    field = ChannelsSettings.model_fields.get(name)
    return field is not None and field.default is not None and type(None) in get_args(field.annotation)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name.upper(), _names(), n=1, cutoff=0.86)
    if not close:
        return ""
    return f"; did you mean {close[0] if name.isupper() else close[0].lower()}?"


def _check_environment() -> dict[str, str]:
    """The environment's variables by setting; raises for one that begins like ours and is none."""
    found = {}
    for variable in os.environ:
        if variable.upper().startswith(ENV_PREFIX):
            name = variable[len(ENV_PREFIX) :]
            if name.upper() not in _names():
                raise SettingsError(f"environment variable {variable}: there is no setting {name}{_hint(name)}")
            found[name.lower()] = variable
    return found


def _from_module(module: str | ModuleType) -> dict[str, Any]:
    if isinstance(module, str):
        try:
            module = importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:  # a name such as ".settings" or "" is the last two
            raise SettingsError(f"settings module {module!r} can't be imported: {error}") from error
    values = {}
    for name, value in vars(module).items():
        if name in _names():
            values[name.lower()] = value
        elif name.isupper() and not name.startswith("_") and (hint := _hint(name)):
            raise SettingsError(f"settings module {module.__name__}: there is no setting {name}{hint}")
    return values


def _module_name(module: str | ModuleType | None) -> str:
    return module.__name__ if isinstance(module, ModuleType) else str(module)


def _told(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for finding in error.errors(include_url=False, include_input=False):
        name, *path = finding["loc"]
        where = "".join(f"[{part!r}]" for part in path)
        lines.append(f"{str(name).upper()}{where} ({origins.get(str(name), 'default')}): {finding['msg']}")
    return "; ".join(lines)


def _told_json(variables: Mapping[str, str]) -> str | None:
    for name, variable in variables.items():
        try:
            from_json(os.environ[variable])
        except ValueError as error:
            if name == "channel_layers":
                return f"{name.upper()} (environment variable {variable}): not JSON: {error}"
    return None
