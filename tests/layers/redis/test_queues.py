"""Named queues: lists in Redis that several processes write and read."""

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from fastapi_channels.layers import ChannelFull, ChannelLayer, Counters, LayerUnavailable
from tests.layers.redis.conftest import (
    MARKER,
    SOON,
    Start,
    become,
    commands,
    logged,
    member,
    numbered,
    receive,
    received,
)

MESSAGE = {"type": "x"}
KEY = "fc:{jobs}:q"


async def read_all(layer: ChannelLayer, into: list[int]) -> None:
    """Read the queue until a marker comes, which is left there for the other readers."""
    while (message := await receive(layer, "jobs")) != MARKER:
        into.append(message["number"])
    await layer.send("jobs", MARKER)


async def test_one_queue_for_all(start: Start) -> None:
    """What any process puts into a queue, any other takes out, oldest first."""
    one, two, three = [await start() for _ in range(3)]
    for number, layer in enumerate([one, two] * 5):
        await layer.send("jobs", {"type": "x", "number": number})
    await one.send("jobs", MARKER)
    assert await received(three, "jobs") == list(range(10))


async def test_each_message_to_one_reader(start: Start) -> None:
    """Many readers in several processes share the messages: each goes to one of them, and to each in order."""
    layers = [await start() for _ in range(3)]
    shares: list[list[int]] = [[] for _ in range(6)]
    reading = [asyncio.create_task(read_all(layer, share)) for layer, share in zip(layers * 2, shares, strict=True)]
    writing = asyncio.gather(
        *(
            layer.send("jobs", message)
            for sender, layer in enumerate(layers)
            for message in numbered(range(sender, 300, 3))
        )
    )
    await writing
    await layers[0].send("jobs", MARKER)
    await asyncio.gather(*reading)
    assert sorted(number for share in shares for number in share) == list(range(300))
    for share in shares:
        for sender in range(3):
            numbers = [number for number in share if number % 3 == sender]
            assert numbers == sorted(numbers)


async def test_a_waiting_reader_is_woken(start: Start, client: "Redis") -> None:
    """A reader that waits in another process is woken; while it waits it asks for nothing."""
    one, two = await start(), await start()
    for number in range(20):
        reading = asyncio.create_task(receive(two, "jobs"))
        if number == 0:
            await member(two, "room")  # by now the queue is subscribed to
            for _ in range(5):
                await two.group_send("room", MESSAGE)  # and by now it was found empty, before and after that
            await client.config_resetstat()
            await two.group_send("room", MESSAGE)
            assert await commands(client) == {"publish": 1}
        await one.send("jobs", {"type": "x", "number": number})
        assert (await reading)["number"] == number


async def test_readers_in_two_processes_are_woken(start: Start) -> None:
    """As many readers as there are messages get one, wherever they wait."""
    layers = [await start() for _ in range(3)]
    for _ in range(10):
        reading = [asyncio.create_task(receive(layer, "jobs")) for layer in layers for _ in range(2)]
        await asyncio.sleep(0)
        for message in numbered(range(6)):
            await layers[0].send("jobs", message)
        assert sorted(message["number"] for message in await asyncio.gather(*reading)) == list(range(6))


async def test_capacity_is_for_all(start: Start) -> None:
    """A queue holds as many messages as the capacity of who sends says, whoever has sent them."""
    one, two = await start(capacity=10), await start(capacity=10)
    for number in range(10):
        await (one if number % 2 else two).send("jobs", {"type": "x", "number": number})
    for layer in (one, two):
        with pytest.raises(ChannelFull):
            await layer.send("jobs", MESSAGE)
    assert (await receive(two, "jobs"))["number"] == 0
    await one.send("jobs", MARKER)
    assert await received(one, "jobs") == list(range(1, 10))


async def test_capacity_of_sends_at_once(start: Start) -> None:
    """Of many sends at once from two processes, exactly as many as have room are taken, and the others raise."""
    one, two = await start(capacity=25), await start(capacity=25)
    results = await asyncio.gather(
        *(layer.send("jobs", message) for message in numbered(range(50)) for layer in (one, two)),
        return_exceptions=True,
    )
    assert sum(result is None for result in results) == 25
    assert {type(result) for result in results} == {type(None), ChannelFull}
    assert len([await receive(one, "jobs") for _ in range(25)]) == 25


async def test_expiry_is_by_the_servers_clock(start: Start, client: "Redis") -> None:
    """When a message expires is in the queue, by Redis's clock; the reader's process counts what has."""
    one, two = await start(expiry=30), await start()
    before = await client.time()
    await one.send("jobs", MESSAGE)
    after = await client.time()
    expires = int(str(await client.lindex(KEY, 0)).partition(":")[0])
    earliest, latest = [(seconds + 30) * 1000 + microseconds // 1000 for seconds, microseconds in (before, after)]
    assert earliest <= expires <= latest
    one.expiry = 0.05
    await one.send("jobs", {"type": "old"})
    gone_by = (await client.time())[0] * 1000 + (await client.time())[1] // 1000 + 51

    async def is_over() -> bool:
        seconds, microseconds = await client.time()
        return seconds * 1000 + microseconds // 1000 > gone_by

    await become(is_over, "Redis's clock goes on")
    one.expiry = 30
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == [MESSAGE]
    assert (one.counters, two.counters) == (Counters(), Counters(expired=1))


async def test_a_lasting_message_outlives_a_short_one(start: Start, client: "Redis") -> None:
    """A queue stays until the last of its messages has expired, in whichever order they came."""
    one, two = await start(expiry=60), await start(expiry=5)
    await one.send("jobs", MESSAGE)
    await two.send("jobs", MESSAGE)
    assert 55_000 < await client.pttl(KEY) <= 60_000


async def test_order_with_a_group(start: Start) -> None:
    """A queue and a group of one name are two things, in Redis too."""
    one, two = await start(), await start()
    channel = await member(two, "jobs", "jobs:q")
    await one.send("jobs", {"type": "x", "number": 1})
    await one.group_send("jobs", {"type": "x", "number": 2})
    await one.group_send("jobs:q", MARKER)
    assert await received(two, channel) == [2]
    assert (await receive(two, "jobs"))["number"] == 1


async def test_flushing_while_readers_wait(start: Start) -> None:
    """Who waits for a message of a queue goes on waiting when all is flushed."""
    one, two = await start(), await start()
    reading = asyncio.create_task(receive(two, "jobs"))
    await member(two, "room")
    for layer in (one, two):
        await layer.flush()
    await one.send("jobs", MESSAGE)
    assert await reading == MESSAGE


# Readers that go away


async def test_a_reader_cancelled_at_any_moment(start: Start) -> None:
    """Readers that are cancelled while they wait, while a message is fetched or when it has come lose none."""
    one, two = await start(), await start()
    moments = random.Random(7)
    taken: list[int] = []
    for number in range(200):
        reading = asyncio.create_task(two.receive("jobs"))
        for _ in range(moments.randrange(4)):
            await asyncio.sleep(0)
        sending = asyncio.create_task(one.send("jobs", {"type": "x", "number": number}))
        await asyncio.sleep(moments.choice([0, 0, 0.0002, 0.0005, 0.001]))
        reading.cancel()
        with suppress(asyncio.CancelledError):
            taken.append((await reading)["number"])
        await sending
    await one.send("jobs", MARKER)
    taken += await received(two, "jobs")
    assert sorted(taken) == list(range(200))


async def test_a_cancelled_reader_leaves_it_to_another_process(start: Start) -> None:
    """A message whose reader is cancelled while it is fetched goes to a reader that waits elsewhere."""
    one, two, three = [await start() for _ in range(3)]
    for number in range(30):
        reading = asyncio.create_task(two.receive("jobs"))
        await asyncio.sleep(0)
        await one.send("jobs", {"type": "x", "number": number})
        waiting = asyncio.create_task(receive(three, "jobs"))
        await asyncio.sleep(0)
        reading.cancel()
        got = (await asyncio.gather(reading, return_exceptions=True))[0]
        if isinstance(got, dict):
            assert got["number"] == number
            await one.send("jobs", {"type": "x", "number": number})
        assert (await waiting)["number"] == number


async def test_closing_while_readers_wait(start: Start) -> None:
    """Readers of a layer that is closed raise LayerUnavailable, and what was on its way to them stays in the queue."""
    one = await start()
    taken = []
    for number in range(50):
        two = await start()
        reading = [asyncio.create_task(two.receive("jobs")) for _ in range(2)]
        await asyncio.sleep(0)
        sending = asyncio.create_task(one.send("jobs", {"type": "x", "number": number}))
        await asyncio.sleep(0.0001 * (number % 10))
        await two.close()
        await sending
        for result in await asyncio.gather(*reading, return_exceptions=True):
            if isinstance(result, dict):
                taken.append(result["number"])
            else:
                assert isinstance(result, LayerUnavailable)
    await one.send("jobs", MARKER)
    taken += await received(one, "jobs")
    assert sorted(taken) == list(range(50))


async def test_cancelling_and_closing(start: Start) -> None:
    """What was fetched for readers that are cancelled just before their layer is closed stays in the queue."""
    one = await start()
    taken = []
    for number in range(50):
        two = await start()
        reading = asyncio.create_task(two.receive("jobs"))
        await asyncio.sleep(0)
        sending = asyncio.create_task(one.send("jobs", {"type": "x", "number": number}))
        await asyncio.sleep(0.0001 * (number % 10))
        reading.cancel()
        with suppress(asyncio.CancelledError):
            taken.append((await reading)["number"])
        await two.close()
        await sending
    await one.send("jobs", MARKER)
    taken += await received(one, "jobs")
    assert sorted(taken) == list(range(50))


async def test_many_queues(start: Start, client: "Redis") -> None:
    """Queues that nobody reads any more are let go of; those with readers are not."""
    one, two = await start(), await start()
    reading = asyncio.create_task(receive(two, "kept"))
    for number in range(300):
        await one.send(f"jobs.{number}", {"type": "x", "number": number})
        assert (await receive(two, f"jobs.{number}"))["number"] == number
    await member(two, "room")
    assert len(await client.pubsub_channels("fc:*:q")) < 150
    await one.send("kept", MESSAGE)
    assert await reading == MESSAGE


# What isn't ours


STRANGE = {
    "text": b"hello",
    "empty": b"",
    "a colon": b":",
    "a number": b"5",
    "no message": b"99999999999999:",
    "a message without expiry": b'1m{"expiry":60}\n{"type":"x"}',
    "not a number": b"soon:hello",
    "a fraction": b"99999999999999.5:hello",
    "negative": b"-1:hello",
    "far too late": b"9" * 400 + b":hello",
    "binary": bytes(range(256)),
    "a script": b"return redis.call('FLUSHALL')",
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
async def test_strange_elements(
    start: Start, client: "Redis", caplog: pytest.LogCaptureFixture, strange: bytes
) -> None:
    """An element of a queue that isn't ours is skipped, counted and logged, and what comes behind it arrives."""
    one, two = await start(), await start()
    reading = asyncio.create_task(receive(two, "jobs"))
    await one.send("jobs", MESSAGE)
    assert await reading == MESSAGE
    await client.rpush(KEY, strange)
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == []
    assert (one.counters, two.counters) == (Counters(), Counters(unreadable=1))
    (text,) = logged(caplog)
    assert "skipped" in text
    assert await client.exists(KEY) == 0


async def test_strange_elements_and_cancelled_readers(start: Start, client: "Redis") -> None:
    """An element that isn't ours is no trouble when its reader is cancelled, either."""
    one, two = await start(), await start()
    for strange in STRANGE.values():
        reading = asyncio.create_task(two.receive("jobs"))
        await asyncio.sleep(0)
        await client.rpush(KEY, strange)
        await one.send("jobs", MESSAGE)
        reading.cancel()
        got = (await asyncio.gather(reading, return_exceptions=True))[0]
        await one.send("jobs", MARKER)
        assert await received(two, "jobs") == [MESSAGE] * (got != MESSAGE)


async def test_an_expired_strange_element(start: Start, client: "Redis") -> None:
    """What looks like one of ours that has expired is dropped as such."""
    one, two = await start(), await start()
    await client.rpush(KEY, b"1:hello")
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == []
    assert one.counters == Counters(expired=1)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that could not read try it again soon."""
    monkeypatch.setattr("fastapi_channels.layers.redis.queue.RETRY", 0.02)


async def test_a_key_of_another_type(
    start: Start, client: "Redis", soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    """While somebody else's key is in its place the queue takes nothing; readers wait, and are told when it works."""
    one, two = await start(), await start()
    await client.set(KEY, "hello")
    with pytest.raises(LayerUnavailable, match="WRONGTYPE") as caught:
        await one.send("jobs", MESSAGE)
    assert not caught.value.maybe_sent
    reading = asyncio.create_task(receive(two, "jobs"))
    await become(lambda: bool(logged(caplog)), "it is logged that the queue can't be read")
    assert "'jobs'" in logged(caplog)[0]
    await client.delete(KEY)
    await one.send("jobs", MESSAGE)
    assert await reading == MESSAGE


async def test_a_reader_waits_until_the_key_is_right(start: Start, client: "Redis", soon: None) -> None:
    """A reader that could not read looks again by itself, also when nobody tells of what is there now."""
    one, two = await start(), await start()
    await one.send("jobs", MESSAGE)
    await client.rename(KEY, "aside")
    await client.set(KEY, "hello")
    reading = asyncio.create_task(receive(two, "jobs"))
    await member(two, "room")
    await client.rename("aside", KEY)
    assert await reading == MESSAGE


async def test_messages_of_a_size(start: Start) -> None:
    """Large messages, many at once, get through a queue."""
    one, two = await start(), await start()
    text = "x" * 1_000_000
    await asyncio.gather(*(one.send("jobs", message) for message in numbered(range(20), text=text)))
    async with asyncio.timeout(SOON):
        messages: list[dict[str, Any]] = [await two.receive("jobs") for _ in range(20)]
    assert messages == numbered(range(20), text=text)
