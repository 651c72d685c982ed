"""The settings: four sources, what wins, and what is told of a mistake."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from fastapi_channels import add_channel
from fastapi_channels.consumers import ActionConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import ChannelsError, SettingsError
from fastapi_channels.layers import MemoryLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.settings import ChannelsSettings

RESERVED = ["GROUPS", "ASYNCAPI_URL", "CONSOLE_URL"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the person who runs the tests is none of theirs."""
    for name in list(os.environ):
        if "CHANNELS_" in name.upper():
            monkeypatch.delenv(name)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that modules are imported from."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def module(**values: Any) -> ModuleType:
    """A settings module with these names."""
    made = ModuleType("app.settings")
    vars(made).update(values)
    return made


def told(module: ModuleType | str | None = None, **options: Any) -> str:
    """What is told when these settings stop the start."""
    with pytest.raises(SettingsError) as caught:
        ChannelsSettings.load(module, options)
    return str(caught.value)


# Where a setting comes from


def test_defaults() -> None:
    """Without any source the settings are those that the documentation names."""
    assert ChannelsSettings.load().model_dump() == {
        "channel_layers": {"default": "memory://"},
        "capacity": 1000,
        "expiry": 60.0,
        "allowed_origins": None,
        "trusted_proxies": [],
        "authentication_classes": [],
        "query_token_key": None,
        "cookie_token_key": None,
        "permission_classes": [],
        "throttle_classes": [],
        "throttle_rates": {},
        "throttle_on_error": "allow",
        "limiter_url": None,
        "max_violations": 100,
        "max_connections": None,
        "max_connections_per_user": None,
        "max_connections_per_address": None,
        "max_frame_size": 1024 * 1024,
        "max_frames_per_second": None,
        "max_bytes_per_second": None,
        "first_frame_timeout": None,
        "idle_timeout": None,
        "outbox_frames": 1000,
        "outbox_bytes": 4 * 1024 * 1024,
        "overflow": "close",
        "reject_mode": "http",
        "layer_grace": None,
        "drain_timeout": 10.0,
    }


def test_arguments_are_stronger_than_the_environment_than_the_module_than_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all sources that name a setting, the strongest counts."""
    in_module = module(CAPACITY=2000, EXPIRY=2.0, OUTBOX_FRAMES=2)
    monkeypatch.setenv("CHANNELS_CAPACITY", "3000")
    monkeypatch.setenv("CHANNELS_EXPIRY", "3.0")
    settings = ChannelsSettings.load(in_module, {"capacity": 4000})
    assert (settings.capacity, settings.expiry, settings.outbox_frames) == (4000, 3.0, 2)
    assert settings.outbox_bytes == 4 * 1024 * 1024


def test_one_source_replaces_the_whole_of_a_weaker_ones_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a stronger source stand alone, and are not merged into those of a weaker one."""
    in_module = module(CHANNEL_LAYERS={"default": "memory://", "jobs": "memory://"})
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", json.dumps({"mail": "memory://"}))
    assert ChannelsSettings.load(in_module).channel_layers == {"mail": "memory://"}
    options = {"channel_layers": {"other": "memory://"}}
    assert ChannelsSettings.load(in_module, options).channel_layers == {"other": "memory://"}


def test_every_setting_has_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting can be given as CHANNELS_ and its name; lists and dicts as JSON."""
    given: dict[str, Any] = {
        "channel_layers": {"a": {"BACKEND": "x.Y", "CONFIG": {"k": [1]}}},
        "capacity": 1001,
        "expiry": 1.5,
        "allowed_origins": ["https://example.org"],
        "trusted_proxies": ["10.0.0.0/8"],
        "authentication_classes": ["app.Token"],
        "query_token_key": "token",
        "cookie_token_key": "session",
        "permission_classes": [True],
        "throttle_classes": ["5/second"],
        "throttle_rates": {"user": "1/s"},
        "throttle_on_error": "deny",
        "limiter_url": "redis://localhost",
        "max_violations": 7,
        "max_connections": 8,
        "max_connections_per_user": 9,
        "max_connections_per_address": 10,
        "max_frame_size": 2,
        "max_frames_per_second": 11.5,
        "max_bytes_per_second": 12.0,
        "first_frame_timeout": 13.0,
        "idle_timeout": 14.0,
        "outbox_frames": 3,
        "outbox_bytes": 4,
        "overflow": "latest",
        "reject_mode": "close",
        "layer_grace": 5.0,
        "drain_timeout": 0.0,
    }
    assert given.keys() == ChannelsSettings.model_fields.keys()
    for name, value in given.items():
        text = json.dumps(value) if isinstance(value, dict | list) else str(value)
        monkeypatch.setenv(f"CHANNELS_{name.upper()}", text)
    assert ChannelsSettings.load().model_dump() == given


def test_the_environment_does_not_mind_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in lower case is the same variable."""
    monkeypatch.setenv("channels_capacity", "3000")
    assert ChannelsSettings.load().capacity == 3000


def test_a_module_by_its_path(on_path: Path) -> None:
    """The settings module may be named by its dotted path."""
    (on_path / "shop").mkdir()
    (on_path / "shop" / "settings.py").write_text("CAPACITY = 5000\nDEBUG = True\ncapacity = 'mine'\n")
    assert ChannelsSettings.load("shop.settings").capacity == 5000


def test_a_module_named_by_the_environment(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTAPI_CHANNELS_SETTINGS names the module, unless one is given."""
    (on_path / "named_settings.py").write_text("CAPACITY = 5000\n")
    monkeypatch.setenv("FASTAPI_CHANNELS_SETTINGS", "named_settings")
    assert ChannelsSettings.load().capacity == 5000
    assert ChannelsSettings.load(module(CAPACITY=6000)).capacity == 6000
    monkeypatch.setenv("FASTAPI_CHANNELS_SETTINGS", "")
    assert ChannelsSettings.load().capacity == 1000


def test_an_argument_of_none_is_not_given() -> None:
    """None as an argument leaves the setting to the other sources."""
    assert ChannelsSettings.load(module(CAPACITY=2000), {"capacity": None, "overflow": None}).capacity == 2000


def test_an_argument_of_none_that_says_something() -> None:
    """Where None is a value, and not the default, it counts as an argument; where it is the default it doesn't."""
    found = ChannelsSettings.load(
        module(MAX_VIOLATIONS=5, LAYER_GRACE=7), {"max_violations": None, "layer_grace": None}
    )
    assert found.max_violations is None
    assert found.layer_grace == 7


def test_names_in_a_module_that_are_the_users_own() -> None:
    """What looks like no setting, is in lower case or begins with an underscore is not ours to judge."""
    own = module(DEBUG=True, DATABASE_URL="x", SECRET_KEY="x", ALLOWED_HOSTS=[], CORS_ALLOWED_ORIGINS=[])
    vars(own).update(_GROUPS={}, capasity=1, capacity="x", Capacity=1)
    assert ChannelsSettings.load(own).model_dump() == ChannelsSettings.load().model_dump()


def test_no_file_is_read(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .env file that lies about is not a source."""
    (on_path / ".env").write_text("CHANNELS_CAPACITY=3000\n")
    monkeypatch.chdir(on_path)
    assert ChannelsSettings.load().capacity == 1000


def test_settings_do_not_change() -> None:
    """Settings can't be set once they are made."""
    settings = ChannelsSettings.load()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "capacity", 2000)  # noqa: B010  (type checkers see that it's frozen)


# What is told


def test_errors_are_value_errors_and_ours() -> None:
    """A settings error can be caught as the package's and as a ValueError."""
    assert issubclass(SettingsError, ValueError)
    assert issubclass(SettingsError, ChannelsError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("capasity", "; did you mean capacity?"),
        ("channel_layer", "; did you mean channel_layers?"),
        ("permission_class", "; did you mean permission_classes?"),
        ("CAPACITY", "; did you mean capacity?"),
        ("Capacity", "; did you mean capacity?"),
        ("colour", ""),
    ],
)
@pytest.mark.parametrize("value", [2000, None])
def test_an_argument_that_is_no_setting(name: str, hint: str, value: int | None) -> None:
    """An argument that is no setting is a TypeError as for any function, with what may have been meant."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(TypeError) as caught:
        add_channel(FastAPI(), **options)
    assert str(caught.value) == f"add_channel() got an unexpected keyword argument {name!r}{hint}"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("CHANNELS_CAPASITY", "there is no setting CAPASITY; did you mean CAPACITY?"),
        ("CHANNELS_LAYERS", "there is no setting LAYERS"),
        ("channels_capasity", "there is no setting capasity; did you mean capacity?"),
    ],
)
def test_a_variable_that_is_no_setting(variable: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that begins like ours and is none stops the start, with what may have been meant."""
    monkeypatch.setenv(variable, "x")
    assert told() == f"environment variable {variable}: {expected}"


def test_a_name_in_the_module_that_is_nearly_a_setting() -> None:
    """An upper-case name in the module that is close to a setting's stops the start."""
    expected = "settings module app.settings: there is no setting CAPASITY; did you mean CAPACITY?"
    assert told(module(CAPASITY=1)) == expected
    assert told(module(GROUP={})) == "settings module app.settings: there is no setting GROUP; did you mean GROUPS?"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"capacity": 5}, "CAPACITY ({}): Input should be greater than or equal to 1000"),
        (
            {"capacity": "many"},
            "CAPACITY ({}): Input should be a valid integer, unable to parse string as an integer",
        ),
        ({"expiry": 0}, "EXPIRY ({}): Input should be greater than 0"),
        (
            {"overflow": "drop"},
            "OVERFLOW ({}): Input should be 'close', 'drop_oldest', 'drop_newest' or 'latest'",
        ),
        ({"reject_mode": "HTTP"}, "REJECT_MODE ({}): Input should be 'http' or 'close'"),
        ({"drain_timeout": -1}, "DRAIN_TIMEOUT ({}): Input should be greater than or equal to 0"),
        (
            {"channel_layers": {}},
            "CHANNEL_LAYERS ({}): Dictionary should have at least 1 item after validation, not 0",
        ),
        ({"channel_layers": ["memory://"]}, "CHANNEL_LAYERS ({}): Input should be a valid dictionary"),
    ],
)
def test_a_bad_value(options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that doesn't fit is told with the setting's name and where it came from, from each source."""
    assert told(**options) == expected.format("argument of add_channel")

    (name, value), *_ = options.items()
    assert told(module(**{name.upper(): value})) == expected.format("settings module app.settings")

    monkeypatch.setenv(f"CHANNELS_{name.upper()}", value if isinstance(value, str) else json.dumps(value))
    assert told() == expected.format(f"environment variable CHANNELS_{name.upper()}")


def test_the_source_that_counts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sources of a bad value, the one that counts is told; a bad value that is overruled is no matter."""
    monkeypatch.setenv("CHANNELS_CAPACITY", "5")
    expected = "CAPACITY (environment variable CHANNELS_CAPACITY): Input should be greater than or equal to 1000"
    assert told(module(CAPACITY=6)) == expected
    assert ChannelsSettings.load(module(CAPACITY=6), {"capacity": 2000}).capacity == 2000


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has several mistakes reads of all of them."""
    monkeypatch.setenv("CHANNELS_EXPIRY", "soon")
    assert told(module(OVERFLOW="x"), capacity=5) == (
        "CAPACITY (argument of add_channel): Input should be greater than or equal to 1000; "
        "EXPIRY (environment variable CHANNELS_EXPIRY): "
        "Input should be a valid number, unable to parse string as a number; "
        "OVERFLOW (settings module app.settings): "
        "Input should be 'close', 'drop_oldest', 'drop_newest' or 'latest'"
    )


def test_an_entry_of_a_dict_is_pointed_at() -> None:
    """An error inside of a setting says where inside."""
    assert told(channel_layers={1: "memory://"}).startswith("CHANNEL_LAYERS[1]")


@pytest.mark.parametrize("text", ["redis://:hunter2@host", "{", "{'default': 'redis://:hunter2@host'}", ""])
def test_a_variable_that_is_not_json(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that has to hold JSON and doesn't is told, without what is in it."""
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", text)
    message = told()
    assert message.startswith("CHANNEL_LAYERS (environment variable CHANNELS_CHANNEL_LAYERS): not JSON: ")
    assert "hunter2" not in message


def test_a_module_that_is_not_there(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that can't be imported is told with its path and why."""
    assert told("nowhere.settings") == "settings module 'nowhere.settings' can't be imported: No module named 'nowhere'"
    (on_path / "imports_nothing.py").write_text("import no_such_module\n")
    monkeypatch.setenv("FASTAPI_CHANNELS_SETTINGS", "imports_nothing")
    assert told() == "settings module 'imports_nothing' can't be imported: No module named 'no_such_module'"


def test_an_error_in_the_module_is_its_own(on_path: Path) -> None:
    """What a settings module raises reaches the developer as it is."""
    (on_path / "divides.py").write_text("CAPACITY = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        ChannelsSettings.load("divides")


@pytest.mark.parametrize("name", RESERVED)
def test_settings_of_later_versions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that this version can't keep stops the start, from whichever source it comes."""
    expected = f"{name} ({{}}) is not supported by this version of fastapi-channels"
    options: dict[str, Any] = {name.lower(): {}}
    assert told(**options) == expected.format("argument of add_channel")
    assert told(module(**{name: 1})) == expected.format("settings module app.settings")
    monkeypatch.setenv(f"CHANNELS_{name}", "{}")
    assert told() == expected.format(f"environment variable CHANNELS_{name}")


# Layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("amqp://localhost", "CHANNEL_LAYERS['jobs']: there is no layer for amqp; there are memory://, redis://, "),
        (
            {"BACKEND": "nowhere.Layer"},
            "CHANNEL_LAYERS['jobs']: BACKEND 'nowhere.Layer': Invalid python path: No module named 'nowhere",
        ),
        (
            {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": {"expiry": 0}},
            "CHANNEL_LAYERS['jobs']: MemoryLayer: expiry is more than 0 seconds, not 0",
        ),
        ({"BACKEND": "builtins.dict"}, "CHANNEL_LAYERS['jobs']: BACKEND 'builtins.dict' is not a ChannelLayer"),
    ],
)
def test_a_layer_that_cannot_be_made(spec: Any, expected: str) -> None:
    """An entry of CHANNEL_LAYERS that makes no layer stops the start with its alias."""
    with pytest.raises(SettingsError) as caught:
        add_channel(FastAPI(), channel_layers={"default": "memory://", "jobs": spec})
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "spec",
    [
        "amqp://user:hunter2@host/0",
        "redis://user:hunter2@host/zero",
        "redis://user:hunter2@host:port",
        "redis://:/hunter2@host",
        "redis://:?hunter2@host",
        "redis://:#hunter2@host",
        "redis://:@hunter2@host:x",
        "redis+sentinel://user:hunter2@host",
        "redis+cluster://user:hunter2@host,:1/0",
        "redis+sentinel://host/fc?sentinel_password=hunter2&colour=red",
        "user:hunter2@host",
        "memory://user:hunter2@host",
        "redis://user:hunter2@[::1",
        "redis://user:hunter2@ho\u2100st",
        {"BACKEND": "redis://user:hunter2@host/0"},
        {"BACKEND": "nowhere", "url": "redis://user:hunter2@host/0"},
        {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": "redis://user:hunter2@host/0"},
        {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": {"url": "redis://user:hunter2@host/0"}},
        ["redis://user:hunter2@host/0"],
        b"redis://user:hunter2@host/0",
    ],
)
def test_no_password_is_told(spec: Any) -> None:
    """Whatever is wrong with an entry, the error names its alias and shows no password."""
    with pytest.raises(SettingsError) as caught:
        add_channel(FastAPI(), channel_layers={"jobs": spec})
    assert str(caught.value).startswith("CHANNEL_LAYERS['jobs']: ")
    assert "hunter2" not in str(caught.value)


def test_layers_take_capacity_and_expiry_from_the_settings() -> None:
    """A layer that says nothing else has the CAPACITY and EXPIRY of the settings."""
    channels = add_channel(
        FastAPI(),
        capacity=2000,
        expiry=5,
        channel_layers={
            "default": "memory://",
            "own": {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": {"expiry": 7}},
        },
    )
    assert (channels.layer().capacity, channels.layer().expiry) == (2000, 5.0)
    assert (channels.layer("own").capacity, channels.layer("own").expiry) == (2000, 7)


# Whose settings


def test_two_applications_have_two_configurations() -> None:
    """What one application sets, the other does not see."""
    one = add_channel(FastAPI(), capacity=2000, channel_layers={"one": "memory://"})
    two = add_channel(FastAPI(), settings=module(CAPACITY=3000))
    three = add_channel(FastAPI())
    assert (one.settings.capacity, two.settings.capacity, three.settings.capacity) == (2000, 3000, 1000)
    assert (list(one.layers), list(two.layers)) == (["one"], ["default"])
    assert isinstance(two.layer(), MemoryLayer)
    assert two.layer() is not three.layer()


def test_nothing_is_read_when_a_class_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumers and routes can be made in a broken environment; only add_channel stops."""
    monkeypatch.setenv("CHANNELS_CAPASITY", "1")
    monkeypatch.setenv("FASTAPI_CHANNELS_SETTINGS", "nowhere")

    class Plain(WebSocketConsumer):
        groups = ["news"]
        channel_layer_alias = "nowhere"

    class Acting(ActionConsumer):
        @action
        async def ping(self) -> str:
            return "pong"

    app = FastAPI()
    app.include_router(ConsumerRouter([route("/plain", Plain), route("/acting", Acting)]))
    Acting.as_asgi()
    with pytest.raises(SettingsError):
        add_channel(app)


def test_the_environment_is_read_by_add_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of add_channel reads the environment as it is then."""
    monkeypatch.setenv("CHANNELS_CAPACITY", "2000")
    one = add_channel(FastAPI())
    monkeypatch.setenv("CHANNELS_CAPACITY", "3000")
    two = add_channel(FastAPI())
    assert (one.settings.capacity, two.settings.capacity) == (2000, 3000)
