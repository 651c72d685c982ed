"""From a setting to a layer."""

from typing import Any

import pytest

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers import ChannelLayer, MemoryLayer, make_layer


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
