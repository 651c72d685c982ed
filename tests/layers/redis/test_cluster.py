"""A Cluster: groups on all nodes, slots that move while messages are under way, nodes that die."""

import asyncio
from collections.abc import Iterator
from typing import Self

import pytest
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from fastapi_channels.layers import Counters, LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import Cluster, ask, info
from tests.layers.redis.conftest import MARKER, SOON, Start, become, healthy, logged, member, receive, received
from tests.layers.redis.load import Load

MESSAGE = {"type": "x"}
TIMEOUT = 1.0
ADDRESS = "fc:0:{room}"
SLOT = key_slot(b"room")


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.heal()


@pytest.fixture
def whole(shared: Cluster) -> Cluster:
    """A Cluster of three primaries with a replica each, and nothing in it, whatever the test before has done to it."""
    shared.heal()
    for server in primaries(shared):
        server.flush()
    return shared


def primaries(cluster: Cluster) -> list[RedisServer]:
    return [server for server in cluster.servers if ask(server, "ROLE")[0] == "master"]


def other_than(cluster: Cluster, server: RedisServer) -> RedisServer:
    return next(each for each in primaries(cluster) if each is not server)


def groups_by_node(cluster: Cluster) -> dict[RedisServer, list[str]]:
    """Three groups of each node."""
    found: dict[RedisServer, list[str]] = {server: [] for server in primaries(cluster)}
    number = 0
    while any(len(groups) < 3 for groups in found.values()):
        groups = found[cluster.node_of(f"fc:0:{{room.{number}}}")]
        if len(groups) < 3:
            groups.append(f"room.{number}")
        number += 1
    return found


def subscribers(server: RedisServer, address: str = ADDRESS) -> int:
    counted: int = ask(server, "PUBSUB", "SHARDNUMSUB", address)[1]
    return counted


def clients(server: RedisServer) -> int:
    """How many connections of ours a node has: neither its replica's nor the one that asks."""
    theirs = ("cmd=client|list", "flags=M", "flags=S")
    lines = ask(server, "CLIENT", "LIST").splitlines()
    return len([line for line in lines if not any(each in line for each in theirs)])


# Where what is


async def test_groups_on_all_nodes(start: Start, whole: Cluster) -> None:
    """Each group is on the node of its slot, by sharded Pub/Sub: one SSUBSCRIBE a process, one SPUBLISH a message."""
    one, two = await start(whole.url), await start(whole.url)
    groups = groups_by_node(whole)
    channels = {group: await member(two, group) for each in groups.values() for group in each}
    for group, channel in channels.items():
        await two.group_add(group, await two.new_channel())
        assert list(two.groups_of(channel)) == [group]
    for server, its in groups.items():
        assert [subscribers(server, f"fc:0:{{{group}}}") for group in its] == [1, 1, 1]
        assert ask(server, "PUBSUB", "CHANNELS") == []
        ask(server, "CONFIG", "RESETSTAT")
    for group in channels:
        await one.group_send(group, {"type": "x", "group": group})
    for group, channel in channels.items():
        assert await receive(two, channel) == {"type": "x", "group": group}
    for server in groups:
        stats = info(server, "commandstats")
        assert stats["cmdstat_spublish"]["calls"] == 3
        assert "cmdstat_publish" not in stats


async def test_two_connections_to_each_node(start: Start, whole: Cluster) -> None:
    """A process has two connections to each primary, whatever is in it, and none to a replica; closed, it has none."""
    layers = [await start(whole.url) for _ in range(2)]
    for layer in layers:
        for groups in groups_by_node(whole).values():
            await member(layer, *groups)
            await asyncio.gather(*(layer.group_send(group, MESSAGE) for group in groups))
    for server in whole.servers:
        assert clients(server) == (4 if server in primaries(whole) else 0)
    for layer in layers:
        await layer.close()
    await become(lambda: not any(clients(server) for server in whole.servers), "all have left")


async def test_channels_queues_and_flush(start: Start, whole: Cluster) -> None:
    """Channels of other processes, queues and idempotency keys are on any node, and flush finds all that is kept."""
    layers = [await start(whole.url) for _ in range(3)]
    channels = {layer: await layer.new_channel() for layer in layers}
    names = [name for groups in groups_by_node(whole).values() for name in groups]
    for sender in layers:
        for layer, channel in channels.items():
            await sender.send(channel, MESSAGE)
            assert await receive(layer, channel) == MESSAGE
    for number, name in enumerate(names):
        await layers[0].send(name, {"type": "x", "number": number})
        await layers[0].send(name, MARKER)
        assert await received(layers[1], name) == [number]
        await layers[0].send(name, MESSAGE)
        assert not (await layers[0].group_send(name, MESSAGE, idempotency_key="k")).duplicate
        assert (await layers[1].group_send(name, MESSAGE, idempotency_key="k")).duplicate
    assert all(ask(server, "DBSIZE") for server in primaries(whole))
    await layers[2].flush()
    assert not any(ask(server, "DBSIZE") for server in primaries(whole))
    assert all(layer.counters == Counters() for layer in layers)


async def test_a_client_of_a_cluster(start: Start, whole: Cluster) -> None:
    """A client that was handed in knows the nodes, and stays its owner's."""
    async with RedisCluster(host="127.0.0.1", port=whole.servers[0].port, decode_responses=True) as client:
        layer = await start(client)
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        await layer.close()
        await client.set("key", "é")
        assert await client.get("key") == "é"


async def test_nodes_that_are_not_there(start: Start, whole: Cluster) -> None:
    """One node of those in the URL is enough to open; without any, opening fails in time, by its URL."""
    servers = [f"127.0.0.1:{server.port}" for server in whole.servers[:1]]
    layer = await start(f"redis+cluster://127.0.0.1:1,{servers[0]}", timeout=TIMEOUT)
    channel = await member(layer, "room")
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable, match=r"redis\+cluster://user:\*\*\*@127.0.0.1:1"):
            await start("redis+cluster://user:s3cret@127.0.0.1:1", timeout=0.2)


# Slots that move


async def moved(cluster: Cluster, to: RedisServer, *layers: RedisLayer, processes: int = 1) -> None:
    """Give the slot of the group to another node, and wait until so many processes hear it from there."""
    await asyncio.to_thread(cluster.move_slot, SLOT, to)
    await become(lambda: subscribers(to) == processes, "all hear from the new node")
    await healthy(*layers)


async def test_a_slot_that_moves_under_load(start: Start, whole: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """While a slot moves to and fro no order is lost, and no message but in a gap that is counted and logged."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    source = whole.node_of(ADDRESS)
    target = other_than(whole, source)
    async with Load(one, two, "room") as load:
        before = await load.more()
        for to in (target, source, target, source):
            await moved(whole, to, one, two)
            await load.more()
        begin = len(load.acknowledged)
        await load.end()
    arrived = set(load.arrived)
    assert load.arrived == sorted(arrived)
    assert {*before, *load.acknowledged[begin:]} <= arrived
    assert set(load.acknowledged) <= arrived or two.counters.gaps > 0
    assert not arrived & set(load.never_sent)
    assert subscribers(target) == 0
    assert two.counters == Counters(gaps=two.counters.gaps)
    assert two.counters.gaps <= 4
    assert len([line for line in logged(caplog) if "may be lost" in line]) <= two.counters.gaps + one.counters.gaps


async def test_a_slot_that_moves_while_nothing_is_sent(start: Start, whole: Cluster) -> None:
    """A process that only listens is told that a slot has moved, and hears its groups from the new node."""
    layer = await start(whole.url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    source = whole.node_of(ADDRESS)
    target = other_than(whole, source)
    for to in (target, source):
        await moved(whole, to, layer)
        sender = await start(whole.url)
        await sender.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
    assert layer.counters == Counters(gaps=2)


async def test_leaving_and_joining_while_a_slot_moves(start: Start, whole: Cluster) -> None:
    """Who joins while the slot moves hears the group when group_add has returned; who left doesn't come back."""
    one, two = await start(whole.url, timeout=SOON), await start(whole.url, timeout=SOON)
    source = whole.node_of(ADDRESS)
    target = other_than(whole, source)
    for to in (target, source):
        moving = asyncio.create_task(asyncio.to_thread(whole.move_slot, SLOT, to))
        while not moving.done():
            channel = await member(one, "room")
            await one.group_discard("room", channel)
        await moving
        channel = await member(one, "room")
        await two.group_send("room", MESSAGE)
        assert await receive(one, channel) == MESSAGE
        await one.group_discard("room", channel)
        await become(lambda: not (subscribers(source) or subscribers(target)), "nobody hears the group")


class Migration:
    """A slot on its way from one node to another, key by key, for the time of a block."""

    def __init__(self, cluster: Cluster, slot: int) -> None:
        self.cluster = cluster
        self.slot = slot
        self.source = cluster.node_of_slot(slot)
        self.target = other_than(cluster, self.source)
        ask(self.target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ask(self.source, "CLUSTER", "MYID"))
        ask(self.source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ask(self.target, "CLUSTER", "MYID"))

    def move(self, key: str) -> None:
        """Move a key."""
        assert ask(self.source, "MIGRATE", self.target.host, self.target.port, key, 0, 5000) == "OK"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.cluster.move_slot, self.slot, self.target)


async def test_a_queue_that_is_being_moved(start: Start, whole: Cluster) -> None:
    """A queue is used wherever its key is, before, while and after its slot moves; its messages keep their order."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    key, numbers = "fc:{jobs}:q", iter(range(100))

    async def send() -> None:
        await one.send("jobs", {"type": "x", "number": next(numbers)})

    await send()
    await send()
    async with Migration(whole, key_slot(b"jobs")) as migration:
        await send()
        migration.move(key)
        await send()
        assert [(await receive(two, "jobs"))["number"] for _ in range(3)] == [0, 1, 2]
        await send()
        await asyncio.gather(*(one.send("jobs", {"type": "x", "number": next(numbers)}) for _ in range(10)))
    await send()
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == list(range(3, 16))
    assert one.counters == two.counters == Counters()


async def test_readers_of_a_queue_that_is_being_moved(start: Start, whole: Cluster) -> None:
    """A reader that waits while the slot is on its way gets what is put in, at the latest when the slot has moved."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    reading = [asyncio.create_task(receive(two, "jobs")) for _ in range(3)]
    await member(two, "room")
    async with Migration(whole, key_slot(b"jobs")):
        for number in range(2):
            await one.send("jobs", {"type": "x", "number": number})
    await one.send("jobs", {"type": "x", "number": 2})
    assert sorted(message["number"] for message in await asyncio.gather(*reading)) == [0, 1, 2]


@pytest.mark.parametrize("key", [None, "k"], ids=["plain", "idempotent"])
async def test_groups_of_a_slot_that_is_being_moved(start: Start, whole: Cluster, key: str | None) -> None:
    """While a slot is on its way its groups are heard as before, whether the message has an idempotency key or not."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    channel = await member(two, "room")
    async with Migration(whole, SLOT) as migration:
        for number in range(3):
            key = key and f"k{number}"
            receipt = await one.group_send("room", {"type": "x", "number": number}, idempotency_key=key)
            assert not receipt.duplicate
            if key:
                assert (await one.group_send("room", MESSAGE, idempotency_key=key)).duplicate
        await one.group_send("room", MARKER)
        assert await received(two, channel) == [0, 1, 2]
        second = await member(one, "room")
        await two.group_send("room", MARKER)
        assert await received(one, second) == []
    await become(lambda: subscribers(migration.target) == 2, "both hear from the new node")
    await healthy(one, two)
    if key:
        assert (await one.group_send("room", MESSAGE, idempotency_key=key)).duplicate
    await one.group_send("room", {"type": "last"})
    assert await receive(one, second) == {"type": "last"}


# Nodes that die


async def test_a_node_that_is_killed(start: Start, whole: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """When a node is killed its replica takes over, and all go on there; when it is back it is the replica."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    await one.send("room", {"type": "x", "number": 1})
    old = whole.node_of(ADDRESS)
    ask(old, "WAIT", 1, 5000)
    elsewhere = next(groups[0] for server, groups in groups_by_node(whole).items() if server is not old)
    witness = await member(two, elsewhere)
    async with Load(one, two, "room") as load:
        before = await load.more()
        old.kill()
        await become(lambda: bool(load.never_sent), "sends raise")
        assert not await one.health()
        await become(lambda: whole.node_of(ADDRESS) is not old, "the replica takes over")
        new = whole.node_of(ADDRESS)
        await become(lambda: subscribers(new) == 1, "all hear from the new node")
        await healthy(one, two)
        begin = len(load.acknowledged)
        await load.more()
        await asyncio.to_thread(whole.heal)
        await load.end()
    arrived = set(load.arrived)
    assert load.arrived == sorted(arrived)
    assert {*before, *load.acknowledged[begin:]} <= arrived
    assert not arrived & set(load.never_sent)
    await one.group_send(elsewhere, MARKER)
    assert await received(two, witness) == []
    await one.send("room", MARKER)
    assert await received(two, "room") == [1]
    assert ask(old, "ROLE")[0] == "slave"
    await become(lambda: [clients(server) for server in (old, new)] == [0, 4], "nobody is connected to the old one")
    assert two.counters.gaps >= 1
    assert two.counters == Counters(gaps=two.counters.gaps)
    assert sum("connection lost" in line for line in logged(caplog)) >= 2


async def test_all_nodes_are_restarted(start: Start, whole: Cluster) -> None:
    """When the whole Cluster was away, all groups on all nodes are heard again."""
    layer = await start(whole.url, timeout=TIMEOUT)
    groups = [group for its in groups_by_node(whole).values() for group in its]
    channels = {group: await member(layer, group) for group in groups}
    for server in whole.servers:
        server.pause()
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable):
            await layer.group_send(groups[0], MESSAGE)
    for server in whole.servers:
        server.resume()
    await asyncio.to_thread(whole.heal)
    await healthy(layer)
    for group, channel in channels.items():
        await layer.group_send(group, MARKER)
        assert await received(layer, channel) in ([], [MESSAGE])
