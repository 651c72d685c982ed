"""Encrypted messages: keys that are changed while all runs, nothing to read in Redis, and keys that are none."""

import asyncio
import base64
import pickle
import traceback
from typing import Any

import pytest
from cryptography.fernet import Fernet
from redis.asyncio import Redis

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers import Counters
from fastapi_channels.layers.factory import make_layer
from fastapi_channels.layers.redis import RedisLayer
from tests.layers.redis.conftest import MARKER, Start, logged, member, receive, received

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()

SECRET = "an awkward secret"
MESSAGE = {"type": "secret.message", "text": SECRET}

KEYS = {
    "text": "secret key",
    "empty": "",
    "short": Fernet.generate_key()[:-4],
    "long": base64.urlsafe_b64encode(bytes(range(48))),
    "no base64": "?" * 44,
    "a number": 7,
    "None": None,
    "not ASCII": "é" * 32,
}


async def test_keys_are_changed_without_a_gap(start: Start) -> None:
    """Processes with the old key, both, and the new one: whoever has a message's key reads it, at every step."""
    old = await start(encryption_keys=[OLD])
    both = await start(encryption_keys=[NEW, OLD])
    channels = {layer: await member(layer, "room") for layer in (old, both)}
    await old.group_send("room", {"type": "x", "number": 1})
    for layer, channel in channels.items():
        assert (await receive(layer, channel))["number"] == 1
    await old.close()
    new = await start(encryption_keys=[NEW])
    channels = {layer: await member(layer, "room") for layer in (new, both)}
    for number, layer in enumerate((new, both)):
        await layer.group_send("room", {"type": "x", "number": number})
        for other, channel in channels.items():
            assert (await receive(other, channel))["number"] == number
    assert both.counters == new.counters == Counters()


async def test_the_first_key_encrypts(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Messages are encrypted with the first key only: who hasn't got it skips them, counts them, and says so."""
    old, both = await start(encryption_keys=[OLD]), await start(encryption_keys=[NEW, OLD])
    channel = await member(old, "room")
    await both.group_send("room", MESSAGE)
    await both.send(channel, MESSAGE)
    await both.send("jobs", MESSAGE)
    await old.group_send("room", MARKER)
    await old.send("jobs", MARKER)
    assert await received(old, channel) == await received(old, "jobs") == []
    assert old.counters == Counters(unreadable=3)
    (text,) = logged(caplog)
    assert "none of the encryption_keys" in text
    assert SECRET not in text


async def test_all_that_the_new_key_does_not_read(start: Start) -> None:
    """A process that has dropped the old key reads nothing of it, and goes on."""
    old, new = await start(encryption_keys=[OLD]), await start(encryption_keys=[NEW])
    channel = await member(new, "room")
    for number in range(10):
        await old.group_send("room", MESSAGE)
        await new.group_send("room", {"type": "x", "number": number})
    await new.group_send("room", MARKER)
    assert await received(new, channel) == list(range(10))
    assert new.counters == Counters(unreadable=10)


async def test_with_and_without_keys(start: Start) -> None:
    """Neither hears the other."""
    plain, encrypted = await start(), await start(encryption_keys=[NEW])
    channels = {layer: await member(layer, "room") for layer in (plain, encrypted)}
    for layer in channels:
        await layer.group_send("room", {"type": "x", "number": 1})
        await layer.group_send("room", MARKER)
    for layer, channel in channels.items():
        assert await received(layer, channel) == [1]
        assert layer.counters == Counters(unreadable=2)


@pytest.mark.parametrize("options", [{}, {"serializer": pickle}], ids=["JSON", "pickle"])
async def test_nothing_to_read(start: Start, redis_url: str, options: dict[str, Any]) -> None:
    """Of what goes through Redis and what stays in it, nothing of a message can be read, nor who is left out."""
    one = await start(encryption_keys=[NEW], **options)
    two = await start(encryption_keys=[NEW], **options)
    channel = await member(two, "room")
    left_out = await member(two, "room")
    seen: list[str] = []
    async with Redis.from_url(redis_url, decode_responses=True) as client, client.monitor() as monitor:
        watching = asyncio.create_task(_watch(monitor, seen))
        await one.group_send("room", MESSAGE, exclude=[left_out])
        await one.group_send("room", MESSAGE, idempotency_key="a secret key of ours")
        await one.send(channel, MESSAGE)
        await one.send("jobs", MESSAGE)
        kept = await client.lrange("fc:{jobs}:q", 0, -1)
        assert await receive(two, "jobs") == MESSAGE
        assert [await receive(two, channel) for _ in range(3)] == [MESSAGE] * 3
        await client.echo("the end")
        await watching
    whole = "\n".join([*seen, *map(str, kept)])
    assert "PUBLISH" in whole.upper()
    assert "room" in whole  # names aren't encrypted
    for secret in (SECRET, "awkward", "secret.message", "a secret key of ours", left_out, channel, "expiry"):
        assert secret not in whole


async def _watch(monitor: Any, seen: list[str]) -> None:
    async for command in monitor.listen():
        seen.append(command["command"])
        if "the end" in command["command"]:
            return


async def test_messages_look_different_each_time(start: Start, client: "Redis") -> None:
    """The same message twice is not the same twice in Redis."""
    layer = await start(encryption_keys=[NEW])
    await layer.send("jobs", MESSAGE)
    await layer.send("jobs", MESSAGE)
    first, second = [str(element).partition(":")[2] for element in await client.lrange("fc:{jobs}:q", 0, -1)]
    assert first != second
    assert first.startswith("1e")


# Keys that are none


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_key(key: Any, place: int) -> None:
    """What is no Fernet key is refused, with its place and without the key, and so is it in the settings."""
    keys = [OLD, OLD]
    keys[place] = key
    with pytest.raises(ValueError, match=rf"encryption_keys\[{place}\] is not a Fernet key") as caught:
        RedisLayer(encryption_keys=keys)
    spec = {"BACKEND": "fastapi_channels.layers.redis.RedisLayer", "CONFIG": {"encryption_keys": keys}}
    with pytest.raises(SettingsError, match=rf"encryption_keys\[{place}\]") as caught_of_settings:
        make_layer(spec, capacity=1, expiry=1)
    for error in (caught.value, caught_of_settings.value):
        text = "".join(traceback.format_exception(error, limit=0))
        assert OLD not in text
        if isinstance(key, str | bytes) and key:
            assert repr(key).strip("b'") not in text


@pytest.mark.parametrize("keys", [OLD, OLD.encode(), "secret key"])
def test_one_key_is_no_list(keys: Any) -> None:
    """A key instead of a list of keys is refused, without showing it."""
    with pytest.raises(ValueError, match="encryption_keys is a list of keys") as caught:
        RedisLayer(encryption_keys=keys)
    assert OLD not in str(caught.value)
    assert "secret key" not in str(caught.value)
