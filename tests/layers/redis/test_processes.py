"""Several layers on one server, as several processes are: what they hear of each other, and what it costs."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from fastapi_channels.layers import Counters
from tests.layers.redis.conftest import (
    MARKER,
    Start,
    become,
    commands,
    connections,
    member,
    numbered,
    receive,
    received,
)

MESSAGE = {"type": "x"}


async def test_groups_reach_all_processes(start: Start) -> None:
    """A message to a group reaches each member in every process once, whoever has sent it."""
    layers = [await start() for _ in range(3)]
    members = [(layer, await member(layer, "room")) for layer in layers for _ in range(2)]
    for number, layer in enumerate(layers):
        await layer.group_send("room", {"type": "x", "number": number})
    await layers[0].group_send("room", MARKER)
    for layer, channel in members:
        assert await received(layer, channel) == [0, 1, 2]


async def test_a_sender_without_members(start: Start) -> None:
    """A process that is in no group itself sends to all who are."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    await one.group_send("room", MESSAGE)
    assert await receive(two, channel) == MESSAGE


async def test_exclude(start: Start) -> None:
    """Channels are left out wherever they are."""
    one, two = await start(), await start()
    here, there, left_out = await member(one, "room"), await member(two, "room"), await member(two, "room")
    await one.group_send("room", {"type": "x", "number": 1}, exclude={left_out})
    await two.group_send("room", {"type": "x", "number": 2}, exclude=[here, there])
    await one.group_send("room", MARKER)
    assert await received(one, here) == await received(two, there) == [1]
    assert await received(two, left_out) == [2]


async def test_a_channel_of_another_process(start: Start) -> None:
    """A message to a channel of another process arrives there, in order, awaited or not."""
    one, two = await start(), await start()
    channel, other = await two.new_channel(), await two.new_channel()
    await asyncio.gather(*(one.send(channel, message) for message in numbered(range(100))))
    for layer_channel in (channel, other):
        await one.send(layer_channel, MARKER)
    assert await received(two, channel) == list(range(100))
    assert await received(two, other) == []
    assert one.counters == two.counters == Counters()


async def test_a_channel_that_is_no_more(start: Start) -> None:
    """Who has a message for a channel that is gone counts it: its process if that runs, or else the sender."""
    one, two = await start(), await start()
    gone, marked = await two.new_channel(), await two.new_channel()
    await two.detach(gone)
    await one.send(gone, MESSAGE)
    await one.send(marked, MARKER)
    assert await received(two, marked) == []
    assert (one.counters, two.counters) == (Counters(), Counters(unreachable=1))
    await two.close()
    await one.send(marked, MESSAGE)
    assert one.counters == Counters(unreachable=1)


async def test_a_channel_of_an_earlier_life(start: Start) -> None:
    """A layer that was closed and opened again is another process; its old channels are no more."""
    one, two = await start(), await start()
    old = await member(two, "room")
    await two.close()
    await two.open()
    new = await member(two, "room")
    assert old != new
    await one.send(old, MESSAGE)
    await one.group_send("room", MARKER)
    assert await received(two, new) == []
    assert one.counters == Counters(unreachable=1)


async def test_a_full_channel_elsewhere(start: Start) -> None:
    """What has no room in the inbox of another process is dropped and counted there, whichever way it came."""
    one, two = await start(), await start(capacity=3)
    full, witness = await member(two, "room"), await member(two, "room")
    for message in numbered(range(5)):
        await one.send(full, message)
    await one.group_send("room", {"type": "x", "number": 5})
    assert await receive(two, witness) == {"type": "x", "number": 5}
    assert [(await receive(two, full))["number"] for _ in range(3)] == [0, 1, 2]
    assert (one.counters, two.counters) == (Counters(), Counters(inbox_dropped=3))
    await one.group_send("room", MARKER)
    assert await received(two, full) == []


async def test_a_group_of_another_process_is_not_joined(start: Start) -> None:
    """A process can't put a channel of another one into a group."""
    one, two = await start(), await start()
    channel = await two.new_channel()
    with pytest.raises(ValueError, match="is not a channel of this process"):
        await one.group_add("room", channel)


# Order


async def test_order_of_two_senders(start: Start) -> None:
    """Un-awaited sends of two processes keep each sender's order, and all members see one sequence."""
    layers = [await start() for _ in range(3)]
    members = [(layer, await member(layer, "room")) for layer in layers for _ in range(2)]
    sends = [
        asyncio.create_task(layer.group_send("room", {"type": "x", "sender": sender, "number": number}))
        for number in range(200)
        for sender, layer in enumerate(layers[:2])
    ]
    await asyncio.gather(*sends)
    await layers[2].group_send("room", MARKER)
    sequences = []
    for layer, channel in members:
        messages = [await receive(layer, channel) for _ in range(401)]
        assert messages.pop() == MARKER
        sequences.append([(message["sender"], message["number"]) for message in messages])
    for sender in (0, 1):
        assert [number for its, number in sequences[0] if its == sender] == list(range(200))
    assert all(sequence == sequences[0] for sequence in sequences)


async def test_a_burst_to_twenty_groups(start: Start) -> None:
    """Of 20 groups with 30 messages each, sent at once, all 600 arrive in their order."""
    one, two = await start(), await start()
    channels = {f"room.{group}": await member(two, f"room.{group}") for group in range(20)}
    await asyncio.gather(*(one.group_send(group, message) for message in numbered(range(30)) for group in channels))
    for group, channel in channels.items():
        await one.group_send(group, MARKER)
        assert await received(two, channel) == list(range(30))
    assert one.counters == two.counters == Counters()


async def test_group_add_waits_for_its_confirmation(start: Start) -> None:
    """What another process sends when group_add has returned always arrives."""
    one, two = await start(), await start()
    for number in range(200):
        group = f"room.{number % 50}"  # some are new, some were left before
        channel = await member(one, group)
        await two.group_send(group, {"type": "x", "number": number})
        assert (await receive(one, channel))["number"] == number
        await one.detach(channel)


async def test_leaving_and_joining_at_once(start: Start) -> None:
    """However fast the last member leaves and another comes, whose group_add has returned hears the group."""
    one, two = await start(), await start()
    staying = await member(one, "room")
    for number in range(50):
        joining = await one.new_channel()
        await asyncio.gather(one.group_discard("room", staying), one.group_add("room", joining))
        await two.group_send("room", {"type": "x", "number": number})
        assert (await receive(one, joining))["number"] == number
        staying = joining


# What it costs


@pytest.mark.parametrize("members", [10, 100, 1000])
async def test_one_command_whatever_the_number_of_members(start: Start, client: "Redis", members: int) -> None:
    """A message to a group is one PUBLISH, and the group one subscription, whatever the number of members."""
    one, two = await start(), await start()
    channels = [await member(two, "room") for _ in range(members)]
    await client.config_resetstat()
    await one.group_send("room", MESSAGE)
    for channel in channels:
        assert await receive(two, channel) == MESSAGE
    assert await commands(client) == {"publish": 1}
    assert await client.pubsub_numsub("fc:0:{room}") == [("fc:0:{room}", 1)]
    assert await connections(client) == 4


async def test_joining_what_the_process_has_joined(start: Start, client: "Redis") -> None:
    """Joining a group that the process is in asks Redis for nothing, nor does leaving one that it stays in."""
    layer = await start()
    first = await member(layer, "room")
    await client.config_resetstat()
    for _ in range(10):
        await layer.group_discard("room", await member(layer, "room"))
    assert await commands(client) == {}
    await layer.group_discard("room", first)
    await member(layer, "other")  # replies come in order
    assert await commands(client) == {"unsubscribe": 1, "subscribe": 1}


async def test_one_subscription_for_group_and_process(start: Start, client: "Redis") -> None:
    """Each process that has members subscribes once, whoever joins and leaves; who has none any more doesn't."""
    layers = [await start() for _ in range(3)]
    channels = [(layer, await member(layer, "room", "other")) for layer in layers for _ in range(5)]
    assert dict(await client.pubsub_numsub("fc:0:{room}", "fc:0:{other}")) == {"fc:0:{room}": 3, "fc:0:{other}": 3}
    for layer, channel in channels[:7]:
        await layer.group_discard("room", channel)

    async def two_are_left() -> bool:
        return bool(await client.pubsub_numsub("fc:0:{room}") == [("fc:0:{room}", 2)])

    await become(two_are_left, "the process without members has unsubscribed")


async def test_two_connections_whatever_is_in_it(start: Start, client: "Redis") -> None:
    """A process has two connections, whatever its groups, members and readers, and none when it is closed."""
    layer = await start()
    for group in range(100):
        await member(layer, f"room.{group}", "room")
    readers = [asyncio.create_task(layer.receive(f"jobs.{number}")) for number in range(20)]
    await asyncio.gather(*(layer.group_send(f"room.{group}", MESSAGE) for group in range(100)))
    assert await connections(client) == 2
    await layer.close()
    await asyncio.gather(*readers, return_exceptions=True)

    async def are_gone() -> bool:
        return not await connections(client)

    await become(are_gone, "the connections are gone")


async def test_what_is_left_in_redis(start: Start, client: "Redis") -> None:
    """A closed layer leaves no key without an end: what it leaves are its queues and idempotency keys."""
    one, two = await start(), await start(expiry=30)
    for layer in (one, two):
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        await layer.group_send("room", MESSAGE, idempotency_key="k")
        await layer.send(channel, MESSAGE)
        await layer.send("jobs", MESSAGE)
        await layer.send("read", MESSAGE)
        assert await receive(layer, "read") == MESSAGE
    await one.close()
    await two.close()
    keys = [str(key) for key in await client.keys("*")]
    left = {key.partition("}")[0]: await client.pttl(key) for key in keys}
    assert set(left) == {"fc:{room", "fc:{jobs"}
    assert all(0 < ttl <= 300_000 for ttl in left.values())
    assert 30_000 < left["fc:{jobs"] <= 60_000  # the longest that one of its messages lasts


# Apart


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"prefix": "fc"}, {"prefix": "fd"}),
        ({"prefix": "fc"}, {"prefix": "fc:0"}),
        ({"prefix": "f*"}, {"prefix": "fc"}),
        ({"prefix": "f?"}, {"prefix": "fc"}),
        ({"prefix": "[fg]c"}, {"prefix": "fc"}),
        ({"prefix": "fc\\"}, {"prefix": "fc"}),
        ({"prefix": "日本"}, {"prefix": "日"}),
        ({"db": 0}, {"db": 3}),
    ],
    ids=lambda part: "".join(map(str, part.values())),
)
async def test_apart(start: Start, redis_url: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Other prefixes and other databases are other worlds: nothing is heard, read or flushed there."""
    one, two = [
        await start(f"{redis_url[:-1]}{of.get('db', 0)}", prefix=of.get("prefix", "fc")) for of in (ours, theirs)
    ]
    channels = [(layer, await member(layer, "room")) for layer in (one, two)]
    for number, layer in enumerate((one, two)):
        await layer.group_send("room", {"type": "x", "number": number}, idempotency_key="k")
        await layer.send("jobs", {"type": "x", "number": number})
        await layer.group_send("room", MARKER)
    for number, (layer, channel) in enumerate(channels):
        assert await received(layer, channel) == [number]
    await one.flush()
    await two.send("jobs", MARKER)
    assert await received(two, "jobs") == [1]
    await one.send("jobs", MARKER)
    assert await received(one, "jobs") == []
    assert not (await one.group_send("room", MESSAGE, idempotency_key="k")).duplicate
    assert (await two.group_send("room", MESSAGE, idempotency_key="k")).duplicate


async def test_flush_is_for_all_processes(start: Start) -> None:
    """What was in Redis is gone for the others too; their members are theirs."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    await two.send("jobs", MESSAGE)
    await one.flush()
    await one.group_send("room", MARKER)
    assert await received(two, channel) == []
    await two.send("jobs", MARKER)
    assert await received(one, "jobs") == []


async def test_flush_with_many_keys(start: Start, client: "Redis") -> None:
    """All keys are flushed, however many, and none that only looks like ours."""
    layer = await start()
    await asyncio.gather(*(layer.send(f"jobs.{number}", MESSAGE) for number in range(3000)))
    strangers = ["fc", "fc:x", "fcc:{jobs}:q", "fc:jobs:q"]
    for key in strangers:
        await client.set(key, 1)
    await layer.flush()
    assert sorted(map(str, await client.keys("*"))) == sorted(strangers)


# The same once


async def test_idempotency_across_processes(start: Start) -> None:
    """A key that one process has used is a duplicate for every other; of many at once, one sends."""
    one, two = await start(), await start()
    channel = await member(one, "room")
    receipts = await asyncio.gather(
        *(layer.group_send("room", MESSAGE, idempotency_key="k") for layer in [one, two] * 20)
    )
    assert sum(not receipt.duplicate for receipt in receipts) == 1
    await two.group_send("room", MARKER)
    assert await received(one, channel) == [MESSAGE]


@pytest.mark.parametrize("key", ["", "x" * 10_000, "\n{}*\x00", "\ud800", "日本語"], ids=repr)
async def test_any_idempotency_key(start: Start, key: str) -> None:
    """Any text is a key, and is another one than any other."""
    one, two = await start(), await start()
    assert not (await one.group_send("room", MESSAGE, idempotency_key=key + ".")).duplicate
    assert not (await one.group_send("room", MESSAGE, idempotency_key=key)).duplicate
    assert (await two.group_send("room", MESSAGE, idempotency_key=key)).duplicate


async def test_idempotent_and_other_messages_keep_one_order(start: Start) -> None:
    """Messages with and without keys, un-awaited, arrive in the order in which they were sent."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    keys = [str(number) if number % 3 else None for number in range(60)]
    await asyncio.gather(
        *(
            one.group_send("room", message, idempotency_key=key)
            for message, key in zip(numbered(range(60)), keys, strict=True)
        )
    )
    await one.group_send("room", MARKER)
    assert await received(two, channel) == list(range(60))
