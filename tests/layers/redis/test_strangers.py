"""What is published in Redis and isn't ours, or not for us: counted, logged, skipped, and the next message arrives."""

import asyncio

import pytest
from cryptography.fernet import Fernet
from redis.asyncio import Redis

from fastapi_channels.layers import Counters
from fastapi_channels.layers.redis import RedisLayer
from tests.layers.redis.conftest import MARKER, Start, logged, member, published, receive, received

MESSAGE = {"type": "x"}
ADDRESS = "fc:0:{room}"
KEY, OTHER_KEY = Fernet.generate_key(), Fernet.generate_key()

STRANGE = {
    "nothing": b"",
    "another version": b'2m{"expiry":60}\n{"type":"x"}',
    "a version only": b"1",
    "another kind": b'1z{"expiry":60}\n{"type":"x"}',
    "no header": b"1m",
    "no message": b'1m{"expiry":60}\n',
    "no line break": b'1m{"expiry":60}{"type":"x"}',
    "garbage behind the version": b"1m\xff\x00\xfe{[",
    "garbage behind the header": b'1m{"expiry":60}\n{[',
    "garbage instead of a token": b"1egarbage",
    "JSON of nobody's": b'{"type":"x"}',
    "text": b"hello",
    "bytes": bytes(range(256)),
    "no JSON": b'1m{"expiry":60}\nhello',
    "a list": b'1m{"expiry":60}\n["type"]',
    "no type": b'1m{"expiry":60}\n{"text":"x"}',
    "a type that is no string": b'1m{"expiry":60}\n{"type":1}',
    "an empty type": b'1m{"expiry":60}\n{"type":""}',
    "half a message": b'1m{"expiry":60}\n{"type":"x","text":"',
    "two messages": b'1m{"expiry":60}\n{"type":"x"}\n{"type":"x"}',
    "no UTF-8": b'1m{"expiry":60}\n{"type":"x","text":"\xff"}',
    "half a character": b'1m{"expiry":60}\n{"type":"x","text":"\\ud800"}',
    "infinite": b'1m{"expiry":60}\n{"type":"x","number":Infinity}',
    "no base64": b'1m{"expiry":60}\n{"type":"websocket.send","bytes":"?"}',
    "no text for bytes": b'1m{"expiry":60}\n{"type":"websocket.send","bytes":7}',
    "nested far too deeply": b'1m{"expiry":60}\n{"type":"x","list":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a header that is a list": b'1m[]\n{"type":"x"}',
    "a header that is null": b'1mnull\n{"type":"x"}',
    "no expiry": b'1m{}\n{"type":"x"}',
    "an expiry that is text": b'1m{"expiry":"soon"}\n{"type":"x"}',
    "an expiry that is null": b'1m{"expiry":null}\n{"type":"x"}',
    "an expiry that is no number": b'1m{"expiry":NaN}\n{"type":"x"}',
    "channels left out that are a number": b'1m{"expiry":60,"exclude":7}\n{"type":"x"}',
    "channels left out that are null": b'1m{"expiry":60,"exclude":null}\n{"type":"x"}',
    "channels left out that are text": b'1m{"expiry":60,"exclude":"specific"}\n{"type":"x"}',
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
async def test_strange_messages(
    start: Start, client: "Redis", caplog: pytest.LogCaptureFixture, strange: bytes
) -> None:
    """A message to a group that isn't ours is skipped, counted and logged, with nothing of it in the log."""
    layer = await start()
    channel = await member(layer, "room")
    assert await client.publish(ADDRESS, strange) == 1
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == []
    assert layer.counters == Counters(unreadable=1)
    (text,) = logged(caplog)
    assert text.startswith(f"a message in {ADDRESS} was skipped: ")
    assert len(text) < 200
    assert await layer.health()


STRANGE_TO_A_CHANNEL = {
    **{name: STRANGE[name] for name in ("nothing", "another version", "garbage behind the version")},
    "no channel": b'1m{"expiry":60}\n{"type":"x"}',
    "a channel that is a number": b'1m{"expiry":60,"channel":7}\n{"type":"x"}',
    "a channel that is a list": b'1m{"expiry":60,"channel":["a"]}\n{"type":"x"}',
    "a channel that is an object": b'1m{"expiry":60,"channel":{}}\n{"type":"x"}',
}


@pytest.mark.parametrize("strange", STRANGE_TO_A_CHANNEL.values(), ids=STRANGE_TO_A_CHANNEL)
async def test_strange_messages_to_a_process(
    start: Start, client: "Redis", caplog: pytest.LogCaptureFixture, strange: bytes
) -> None:
    """A message to a process that isn't ours, or is for no channel, is skipped, counted and logged."""
    one, two = await start(), await start()
    channel = await two.new_channel()
    node = channel.partition("!")[0].partition(".")[2]
    assert await client.publish(f"fc:0:node:{node}", strange) == 1
    await one.send(channel, MARKER)
    assert await received(two, channel) == []
    assert two.counters == Counters(unreadable=1)
    (text,) = logged(caplog)
    assert text.startswith(f"a message in fc:0:node:{node} was skipped: ")


async def test_a_channel_that_never_was(start: Start, client: "Redis") -> None:
    """A message to a process for a channel that it never had is counted as any that is too late."""
    one, two = await start(), await start()
    channel = await two.new_channel()
    node = channel.partition("!")[0].partition(".")[2]
    await client.publish(f"fc:0:node:{node}", b'1m{"expiry":60,"channel":"nobody"}\n{"type":"x"}')
    await one.send(channel, MARKER)
    assert await received(two, channel) == []
    assert two.counters == Counters(unreachable=1)


async def test_many_strange_messages(start: Start, client: "Redis", caplog: pytest.LogCaptureFixture) -> None:
    """Strangers can't fill the log: what they publish is counted each time and logged once a minute."""
    layer = await start()
    channel = await member(layer, "room")
    for number in range(100):
        await client.publish(ADDRESS, f"hello {number}")
        await layer.group_send("room", {"type": "x", "number": number})
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == list(range(100))
    assert layer.counters == Counters(unreadable=100)
    assert len(logged(caplog)) == 1


async def test_an_expired_message(start: Start, client: "Redis") -> None:
    """A message that says that it has expired is dropped and counted when it is read."""
    layer = await start()
    channel = await member(layer, "room")
    await client.publish(ADDRESS, b'1m{"expiry":-1}\n{"type":"x"}')
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == []
    assert layer.counters == Counters(expired=1)


async def test_what_is_more_in_a_header(start: Start, client: "Redis") -> None:
    """A header with more in it than this version knows is no trouble."""
    layer = await start()
    channel = await member(layer, "room")
    await client.publish(ADDRESS, b'1m{"expiry":60,"later":[1]}\n{"type":"x"}')
    assert await receive(layer, channel) == MESSAGE


async def test_a_huge_message(start: Start, client: "Redis", caplog: pytest.LogCaptureFixture) -> None:
    """Twenty megabytes that aren't ours are skipped like a byte."""
    layer = await start()
    channel = await member(layer, "room")
    await client.publish(ADDRESS, b"1m" + b"x" * 20_000_000)
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == []
    assert layer.counters == Counters(unreadable=1)
    assert len(logged(caplog)[0]) < 200


async def test_strange_messages_while_everything_goes_on(start: Start, client: "Redis") -> None:
    """Among strange messages to group, process and queue, all of ours arrive, in order."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    node = channel.partition("!")[0].partition(".")[2]
    pipeline = client.pipeline(transaction=False)
    for strange in STRANGE.values():
        _ = pipeline.publish(ADDRESS, strange)
        _ = pipeline.publish(f"fc:0:node:{node}", strange)
        _ = pipeline.publish("fc:0:{jobs}:q", strange)
        _ = pipeline.rpush("fc:{jobs}:q", strange)
    reading = asyncio.create_task(receive(two, "jobs"))
    sends = [one.group_send("room", {"type": "x", "number": number}) for number in range(100)]
    await asyncio.gather(pipeline.execute(), *sends)
    await one.send(channel, MESSAGE)
    await one.group_send("room", MARKER)
    await one.send("jobs", MESSAGE)
    assert [number for number in await received(two, channel) if number != MESSAGE] == list(range(100))
    assert await reading == MESSAGE
    assert two.counters == Counters(unreadable=3 * len(STRANGE))


# With keys


async def skips(layer: RedisLayer, client: "Redis", data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Publish what a layer can't read."""
    channel = await member(layer, "room")
    await client.publish(ADDRESS, data)
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == []
    assert layer.counters == Counters(unreadable=1)
    assert why in logged(caplog)[0]


async def test_unencrypted(start: Start, client: "Redis", caplog: pytest.LogCaptureFixture) -> None:
    """A layer with keys takes nothing that isn't encrypted."""
    layer = await start(encryption_keys=[KEY])
    await skips(layer, client, b'1m{"expiry":60}\n{"type":"x"}', "it is not encrypted", caplog)


async def test_encrypted_for_nobody(start: Start, client: "Redis", caplog: pytest.LogCaptureFixture) -> None:
    """A layer without keys says that it needs some."""
    layer = await start()
    token = Fernet(KEY).encrypt(ADDRESS.encode() + b'\n{"expiry":60}\n{"type":"x"}')
    await skips(layer, client, b"1e" + token, "no encryption_keys", caplog)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (Fernet(OTHER_KEY).encrypt(ADDRESS.encode() + b'\n{"expiry":60}\n{"type":"x"}'), "decrypts"),
        (Fernet(KEY).encrypt(ADDRESS.encode() + b'\n{"expiry":60}\n{"type":"x"}')[:-4], "decrypts"),
        (Fernet(KEY).encrypt(b'fc:0:{other}\n{"expiry":60}\n{"type":"x"}'), "another place"),
        (Fernet(KEY).encrypt(b'{"expiry":60}\n{"type":"x"}'), "another place"),
        (Fernet(KEY).encrypt(ADDRESS.encode()), "content"),
        (Fernet(KEY).encrypt(ADDRESS.encode() + b'\n{"expiry":60}\nhello'), "content"),
        (b"", "decrypts"),
        (b"\xff\x00", "decrypts"),
    ],
    ids=["another key", "cut", "another place", "no place", "no content", "no JSON", "empty", "bytes"],
)
async def test_wrongly_encrypted(
    start: Start, client: "Redis", caplog: pytest.LogCaptureFixture, token: bytes, why: str
) -> None:
    """What is encrypted with another key, for another place, or is no token is skipped."""
    await skips(await start(encryption_keys=[KEY]), client, b"1e" + token, why, caplog)


async def test_a_replayed_message(start: Start, client: "Redis") -> None:
    """An encrypted message that a stranger copies into another group, queue or process is good for nothing there."""
    one, two = await start(encryption_keys=[KEY]), await start(encryption_keys=[KEY])
    channel = await member(two, "room", "other")
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(ADDRESS)
        await one.group_send("room", MESSAGE)
        data = await published(pubsub)
    node = channel.partition("!")[0].partition(".")[2]
    assert await client.publish("fc:0:{other}", data) == 1
    assert await client.publish(f"fc:0:node:{node}", data) == 1
    await client.rpush("fc:{jobs}:q", f"99999999999999:{data}")
    await one.send("jobs", MARKER)
    await one.group_send("other", MARKER)
    assert await received(two, channel) == [MESSAGE]
    assert await received(two, "jobs") == []
    assert two.counters == Counters(unreadable=3)
