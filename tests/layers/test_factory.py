"""From a setting to a layer."""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from broadcaster import Broadcast
from cryptography.fernet import Fernet
from redis.asyncio import Redis

import fastapi_channels.layers
from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers import ChannelLayer, MemoryLayer, make_layer
from fastapi_channels.layers.broadcaster import BroadcasterLayer
from fastapi_channels.layers.redis import RedisLayer


class CustomLayer(MemoryLayer):
    """A layer that takes more than capacity and expiry."""

    def __init__(self, *, region: str = "eu", **config: Any) -> None:
        super().__init__(**config)
        if region == "moon":
            raise ValueError("there is no region 'moon'")
        self.region = region


NOT_A_LAYER = 7

HERE = __name__


def made(spec: Any) -> ChannelLayer:
    return make_layer(spec, capacity=1234, expiry=5.0)


def test_memory_url() -> None:
    """`memory://` is a MemoryLayer with the capacity and expiry of the settings."""
    layer = made("memory://")
    assert type(layer) is MemoryLayer
    assert (layer.capacity, layer.expiry) == (1234, 5.0)


def test_a_layer_object_is_taken_as_it_is() -> None:
    """A layer that was made elsewhere stays that object, with its own capacity."""
    layer = MemoryLayer(capacity=7)
    assert made(layer) is layer
    assert layer.capacity == 7


def test_django_form() -> None:
    """BACKEND names the class and CONFIG holds its arguments; the settings give what CONFIG leaves out."""
    layer = made({"BACKEND": f"{HERE}.CustomLayer", "CONFIG": {"region": "us", "capacity": 5}})
    assert isinstance(layer, CustomLayer)
    assert (layer.region, layer.capacity, layer.expiry) == ("us", 5, 5.0)


def test_django_form_without_config() -> None:
    """CONFIG may be absent, and BACKEND may be the class itself."""
    assert isinstance(made({"BACKEND": "fastapi_channels.layers.MemoryLayer"}), MemoryLayer)
    assert isinstance(made({"BACKEND": CustomLayer}), CustomLayer)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("amqp://user:hunter2@host/0", "there is no layer for amqp; there are memory://, redis://, "),
        ("memory", "there is no layer for a URL without a scheme; there are memory://, "),
        ("", "there is no layer for a URL without a scheme; there are memory://, "),
        ("redis://user:hunter2@host/x", "RedisLayer: redis://user:***@host/x: the database is a number"),
        ("redis://host/0?colour=red", "RedisLayer: redis://host/0: "),
        ("redis+sentinel://host", "RedisLayer: redis+sentinel://host: the name of the service is missing"),
        ("memory://localhost", "memory:// takes nothing behind it"),
        (7, "a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not "),
        (None, "a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not "),
        (MemoryLayer, "a layer is a URL, a dict with BACKEND and CONFIG, or a ChannelLayer, not "),
        ({"backend": "x", "BACKEND": "y"}, "a layer has BACKEND and CONFIG, not backend"),
        ({"BACKEND": f"{HERE}.NOT_A_LAYER"}, f"BACKEND '{HERE}.NOT_A_LAYER' is not a ChannelLayer"),
        ({"BACKEND": "builtins.dict"}, "BACKEND 'builtins.dict' is not a ChannelLayer"),
        (
            {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": {"hosts": []}},
            "MemoryLayer: got an unexpected keyword argument 'hosts'",
        ),
        (
            {"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": {"capacity": 0}},
            "MemoryLayer: capacity is at least 1, not 0",
        ),
        ({"BACKEND": f"{HERE}.CustomLayer", "CONFIG": {"region": "moon"}}, "CustomLayer: there is no region 'moon'"),
    ],
)
def test_what_is_told_of_a_bad_entry(spec: Any, told: str) -> None:
    """An entry that makes no layer is a settings error that says why."""
    with pytest.raises(SettingsError) as caught:
        made(spec)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("path", ["nowhere.Layer", "fastapi_channels.layers.NoSuchLayer", "MemoryLayer", "", None, 7])
def test_a_backend_that_is_not_there(path: Any) -> None:
    """A BACKEND that can't be imported is a settings error that shows the path."""
    with pytest.raises(SettingsError, match="BACKEND"):
        made({"BACKEND": path})


@pytest.mark.parametrize("config", [None, "memory://", ["capacity"], 7])
def test_a_config_that_is_no_dict(config: Any) -> None:
    """A CONFIG that is no dict is a settings error, and no crash."""
    with pytest.raises(SettingsError, match="CONFIG"):
        made({"BACKEND": "fastapi_channels.layers.MemoryLayer", "CONFIG": config})


def test_an_abstract_backend() -> None:
    """A BACKEND that is no complete layer is a settings error."""
    with pytest.raises(SettingsError, match="ChannelLayer: Can't instantiate abstract class"):
        made({"BACKEND": "fastapi_channels.layers.ChannelLayer"})


# Redis and broadcaster


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:hunter2@localhost:6380/3?protocol=3&client_name=x",
        "redis://[::1]:6379/0",
        "rediss://localhost:6380/0?ssl_ca_certs=/nowhere/ca.crt",
        "unix:///run/redis.sock?db=3",
        "redis+sentinel://:hunter2@one:26379,two/fc/3?sentinel_password=hunter2",
        "rediss+sentinel://one/fc",
        "redis+cluster://user:hunter2@one:6379,two,three:7000",
        "rediss+cluster://one/0?ssl_cert_reqs=none",
    ],
)
def test_redis_urls(url: str) -> None:
    """A Redis URL is a RedisLayer with the capacity and expiry of the settings, and connects to nothing yet."""
    layer = made(url)
    assert type(layer) is RedisLayer
    assert (layer.capacity, layer.expiry, layer.prefix, layer.start) == (1234, 5.0, "fc", "fail")


@pytest.mark.parametrize(
    "url",
    [
        "postgres://user:hunter2@localhost:5432/database",
        "postgresql://localhost/database",
        "redis-stream://localhost:6379/0",
        "broadcaster+redis://localhost:6379/0",
        "broadcaster+rediss://localhost:6379/0",
        "broadcaster+redis-stream://localhost:6379/0",
        "broadcaster+postgres://localhost/database",
        "broadcaster+memory://",
    ],
)
def test_broadcaster_urls(url: str) -> None:
    """What broadcaster speaks, and anything behind `broadcaster+`, is a BroadcasterLayer."""
    layer = made(url)
    assert type(layer) is BroadcasterLayer
    assert (layer.capacity, layer.expiry, layer.prefix) == (1234, 5.0, "fc")


@pytest.mark.parametrize(
    "backend",
    ["fastapi_channels.layers.RedisLayer", "fastapi_channels.layers.redis.RedisLayer", RedisLayer],
    ids=str,
)
def test_redis_in_djangos_form(backend: Any) -> None:
    """All arguments of RedisLayer may stand in CONFIG."""
    config = {
        "url": "redis://localhost/3",
        "prefix": "é",
        "capacity": 7,
        "expiry": 8.0,
        "timeout": 9.0,
        "encryption_keys": [Fernet.generate_key().decode()],
        "serializer": "pickle",
        "start": "degraded",
    }
    layer = made({"BACKEND": backend, "CONFIG": config})
    assert type(layer) is RedisLayer
    told = (layer.prefix, layer.capacity, layer.expiry, layer.timeout, layer.start)
    assert told == ("é", 7, 8.0, 9.0, "degraded")
    assert type(made({"BACKEND": backend})) is RedisLayer


def test_redis_by_a_client() -> None:
    """A client of redis-py may stand for the URL."""
    assert type(made({"BACKEND": RedisLayer, "CONFIG": {"url": Redis()}})) is RedisLayer


@pytest.mark.parametrize("broadcast", ["postgres://localhost/database", Broadcast("memory://")], ids=str)
def test_broadcaster_in_djangos_form(broadcast: Any) -> None:
    """A URL or a Broadcast stands in the CONFIG of a BroadcasterLayer."""
    config = {"broadcast": broadcast, "prefix": "é", "timeout": 9.0}
    layer = made({"BACKEND": "fastapi_channels.layers.BroadcasterLayer", "CONFIG": config})
    assert type(layer) is BroadcasterLayer
    assert (layer.prefix, layer.capacity, layer.expiry, layer.timeout) == ("é", 1234, 5.0, 9.0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"url": "redis://:hunter2@host/x"}, "redis://:***@host/x: the database is a number"),
        ({"url": "redis://host/0?password=hunter2&x=y"}, "redis://host/0: "),
        ({"url": "memory://"}, "memory://: not a Redis URL"),
        ({"url": "http://:hunter2@host"}, "http://:***@host: not a Redis URL"),
        ({"url": 5}, "a Redis URL or a client of redis.asyncio, not a int"),
        ({"hosts": ["hunter2"]}, "got an unexpected keyword argument 'hosts'"),
        ({"prefix": ""}, "a group or channel name can't be empty"),
        ({"prefix": "a{b"}, "a group or channel name can't hold control characters, { or }"),
        ({"capacity": 0}, "capacity is at least 1, not 0"),
        ({"expiry": 0}, "expiry is more than 0 seconds, not 0"),
        ({"timeout": 0}, "timeout is more than 0 seconds, not 0"),
        ({"timeout": -1.0}, "timeout is more than 0 seconds, not -1.0"),
        ({"start": "never"}, 'start is "fail" or "degraded", not \'never\''),
        ({"encryption_keys": "hunter2"}, "encryption_keys is a list of keys, not one key"),
        ({"encryption_keys": ["hunter2"]}, "encryption_keys[0] is not a Fernet key"),
        ({"serializer": "nowhere.serializer"}, "serializer: Invalid python path: No module named 'nowhere'"),
        ({"serializer": "math"}, "a serializer has dumps and loads"),
    ],
    ids=str,
)
def test_what_is_told_of_a_bad_redis_configuration(config: dict[str, Any], told: str) -> None:
    """A RedisLayer that can't be made is a settings error that says why, without a password or key."""
    with pytest.raises(SettingsError) as caught:
        made({"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": config})
    assert str(caught.value).startswith(f"RedisLayer: {told}")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            "broadcaster+amqp://:hunter2@host",
            "BroadcasterLayer: not a URL of broadcaster; it has kafka://, memory://, ",
        ),
        ("broadcaster+", "there is no layer for a URL without a scheme"),
        ("broadcaster+://", "BroadcasterLayer: not a URL of broadcaster; it has kafka://, "),
        ("postgres://user:hunter2/@host/database", "BroadcasterLayer: postgres://***: what is not a sign"),
        ({"BACKEND": "fastapi_channels.layers.BroadcasterLayer"}, "BroadcasterLayer: missing a required argument: "),
        ("REDIS://:hunter2@host", "there is no layer for REDIS; there are memory://, redis://, "),
        (" redis://:hunter2@host", "there is no layer for "),
    ],
    ids=str,
)
def test_what_is_told_of_a_bad_broadcaster(spec: Any, told: str) -> None:
    """An entry that makes no BroadcasterLayer is a settings error that says why, without a password."""
    with pytest.raises(SettingsError) as caught:
        made(spec)
    assert str(caught.value).startswith(told)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


# Optional packages


def python(directory: Path, *code: str, without: Iterable[str] = ()) -> str:
    """What a Python of its own prints, where some packages are not installed."""
    for name in without:
        # As the import system says it; what is first on the path hides what is installed.
        text = f"raise ModuleNotFoundError({f'No module named {name!r}'!r}, name={name!r})"
        (directory / f"{name}.py").write_text(text, "utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.strip()


OPTIONAL = ["redis", "hiredis", "broadcaster", "asyncpg", "cryptography"]

IMPORTED = f"import sys; print(sorted(set({OPTIONAL}) & set(sys.modules)))"


def test_nothing_optional_is_imported(tmp_path: Path) -> None:
    """Importing all that needs no broker, and working in memory, imports no optional package, and needs none."""
    code = """
from fastapi import FastAPI
import fastapi_channels, fastapi_channels.consumers, fastapi_channels.routing, fastapi_channels.settings
import fastapi_channels.testing.plugin, fastapi_channels.cli
from fastapi_channels.layers import AsyncPublisher, ChannelLayer, MemoryLayer, Publisher, make_layer
fastapi_channels.add_channel(FastAPI())
"""
    assert python(tmp_path, code, IMPORTED) == "[]"
    assert python(tmp_path, code, IMPORTED, without=OPTIONAL) == "[]"


def test_a_layer_is_imported_when_it_is_asked_for(tmp_path: Path) -> None:
    """`from fastapi_channels.layers import RedisLayer` imports redis-py, and nothing else that is optional."""
    code = "from fastapi_channels.layers import RedisLayer; RedisLayer('redis://localhost')"
    imported = python(tmp_path, code, IMPORTED)
    assert "'redis'" in imported
    assert "broadcaster" not in imported
    assert python(tmp_path, code, without=["broadcaster", "cryptography", "hiredis"]) == ""


def test_the_names_of_optional_layers() -> None:
    """A layer is the same by all its paths, and a name that there isn't is an AttributeError."""
    assert fastapi_channels.layers.RedisLayer is RedisLayer
    assert fastapi_channels.layers.BroadcasterLayer is BroadcasterLayer
    assert not hasattr(fastapi_channels.layers, "KafkaLayer")
    with pytest.raises(ImportError, match="KafkaLayer"):
        from fastapi_channels.layers import KafkaLayer  # noqa: F401


@pytest.mark.parametrize(
    ("name", "extra", "url"),
    [("RedisLayer", "redis", "redis://:hunter2@host"), ("BroadcasterLayer", "broadcaster", "postgres://:hunter2@host")],
)
def test_a_package_that_is_not_there(tmp_path: Path, name: str, extra: str, url: str) -> None:
    """Without its package a layer, however it is asked for, is an error that says how to install it."""
    told = python(
        tmp_path,
        "from fastapi_channels.exceptions import SettingsError",
        "from fastapi_channels.layers import make_layer",
        "try:",
        f"    from fastapi_channels.layers import {name}",
        "except ImportError as error:",
        "    print(error)",
        f"for spec in ({url!r}, {{'BACKEND': 'fastapi_channels.layers.{name}'}}):",
        "    try:",
        "        make_layer(spec, capacity=1, expiry=1.0)",
        "    except SettingsError as error:",
        "        print(error)",
        without=[extra],
    ).splitlines()
    assert len(told) == 3
    for line in told:
        assert f"{name} needs {extra}: pip install 'fastapi-channels[{extra}]'" in line
        assert "hunter2" not in line


def test_cryptography_that_is_not_there(tmp_path: Path) -> None:
    """Without `cryptography`, encryption_keys are a settings error that says how to install it."""
    told = python(
        tmp_path,
        "from fastapi_channels.exceptions import SettingsError",
        "from fastapi_channels.layers import make_layer",
        "config = {'encryption_keys': ['hunter2']}",
        "try:",
        "    make_layer({'BACKEND': 'fastapi_channels.layers.RedisLayer', 'CONFIG': config}, capacity=1, expiry=1.0)",
        "except SettingsError as error:",
        "    print(error)",
        without=["cryptography"],
    )
    assert told == "RedisLayer: encryption needs cryptography: pip install 'fastapi-channels[encryption]'"


@pytest.mark.parametrize(
    ("package", "url"), [("asyncpg", "postgres://:hunter2@host/x"), ("redis", "redis-stream://host")]
)
def test_a_package_of_broadcasters_that_is_not_there(tmp_path: Path, package: str, url: str) -> None:
    """Without the driver that a URL of broadcaster needs, the settings error names the package."""
    told = python(
        tmp_path,
        "from fastapi_channels.exceptions import SettingsError",
        "from fastapi_channels.layers import make_layer",
        "try:",
        f"    make_layer({url!r}, capacity=1, expiry=1.0)",
        "except SettingsError as error:",
        "    print(error)",
        without=[package],
    )
    assert f"needs {package}: pip install '" in told
    assert "hunter2" not in told
