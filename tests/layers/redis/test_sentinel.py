"""Sentinels name another primary: on purpose, or since it was killed. Members go on hearing."""

import asyncio
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from fastapi_channels.layers import Counters, LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import Sentinels, ask, info
from tests.layers.redis.conftest import (
    MARKER,
    SOON,
    Start,
    become,
    healthy,
    logged,
    member,
    receive,
    received,
)
from tests.layers.redis.load import Load

MESSAGE = {"type": "x"}
TIMEOUT = 1.0
ADDRESS = "fc:0:{room}"


@pytest.fixture(scope="module")
def shared(sentinels: Sentinels) -> Iterator[Sentinels]:
    yield sentinels
    sentinels.heal()


@pytest.fixture
def whole(shared: Sentinels) -> Sentinels:
    """The Sentinels, a primary with nothing in it, and its replica, whatever the test before has done to them."""
    shared.heal()
    shared.primary().flush()
    return shared


async def settled(server: RedisServer, *layers: RedisLayer, subscribers: int) -> None:
    """Wait until layers are healthy, and so many hear the group from this server."""
    await become(lambda: ask(server, "PUBSUB", "NUMSUB", ADDRESS)[1] == subscribers, "all hear from the new primary")
    await healthy(*layers)


def clients(server: RedisServer) -> list[str]:
    """Who is connected to a server: ours, not its replica, its primary, the Sentinels or the one that asks."""
    theirs = ("cmd=client|list", "name=sentinel", "flags=M", "flags=S")
    return [line for line in ask(server, "CLIENT", "LIST").splitlines() if not any(each in line for each in theirs)]


async def test_a_primary_that_is_killed(start: Start, whole: Sentinels, caplog: pytest.LogCaptureFixture) -> None:
    """When the primary is killed all processes follow the replica, under load, and go on with what is in the queues."""
    one, two = await start(whole.url, timeout=TIMEOUT), await start(whole.url, timeout=TIMEOUT)
    await one.send("jobs", {"type": "x", "number": 1})
    reading = asyncio.create_task(receive(two, "other"))
    async with Load(one, two, "room") as load:
        before = await load.more()
        old = whole.primary()
        ask(old, "WAIT", 1, 5000)
        await asyncio.to_thread(whole.kill_primary)
        new = await asyncio.to_thread(whole.wait_for_new_primary, old)
        await settled(new, one, two, subscribers=1)
        begin = len(load.acknowledged)
        await load.more()
        await asyncio.to_thread(whole.heal)
        await load.end()
    arrived = set(load.arrived)
    assert load.arrived == sorted(arrived)
    assert {*before, *load.acknowledged[begin:]} <= arrived
    assert load.never_sent
    assert not arrived & set(load.never_sent)
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == [1]
    await one.send("other", MESSAGE)
    assert await reading == MESSAGE
    assert [info(each, "replication")["role"] for each in (old, new)] == ["slave", "master"]
    assert [len(clients(each)) for each in (old, new)] == [0, 4]
    assert one.counters == two.counters == Counters(gaps=1)
    assert ["connection lost" in line for line in logged(caplog)] == [True, True, False, False]


async def test_failing_over_on_purpose(start: Start, whole: Sentinels) -> None:
    """When primary and replica change places all processes follow, the one with a client of its own too."""
    sentinel = Sentinel([("127.0.0.1", each.port) for each in whole.sentinels])  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(whole.name)
    one, two = await start(whole.url, timeout=TIMEOUT), await start(client, timeout=TIMEOUT)
    old = whole.primary()
    async with Load(one, two, "room") as load:
        before = await load.more()
        new = await asyncio.to_thread(whole.fail_over)
        await settled(new, one, two, subscribers=1)
        await asyncio.to_thread(whole.heal)  # by now the old one is no primary for anybody
        await become(lambda: not clients(old), "nobody is connected to the old primary")
        await healthy(one, two)
        begin = len(load.acknowledged)
        await load.end()
    arrived = set(load.arrived)
    assert load.arrived == sorted(arrived)
    assert {*before, *load.acknowledged[begin:]} <= arrived
    assert not arrived & set(load.never_sent)
    assert two.counters.gaps >= 1
    await two.close()
    assert await client.set("key", "value")  # it is its owner's, and knows the primary itself
    await client.aclose()
    for each in sentinel.sentinels:
        await each.aclose()


async def test_sentinels_that_are_gone(start: Start, whole: Sentinels) -> None:
    """One Sentinel is enough to open; when all are gone an open layer goes on, and another one can't be opened."""
    first, *others = whole.sentinels
    first.kill()
    layer = await start(whole.url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    for sentinel in others:
        sentinel.kill()
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable) as caught:
            await start(whole.url, timeout=0.2)
    assert len(str(caught.value)) < 500
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == []
    assert await layer.health()
    assert layer.counters == Counters()


async def test_a_service_that_there_is_not(start: Start, whole: Sentinels) -> None:
    """A service that no Sentinel knows is unavailable, by its name."""
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable, match="nobody"):
            await start(whole.url.replace("/fc/", "/nobody/"), timeout=0.2)


async def test_starting_without_sentinels(start: Start, whole: Sentinels) -> None:
    """A layer that was opened while there were no Sentinels heals when they come."""
    for sentinel in whole.sentinels:
        sentinel.kill()
    layer = await start(whole.url, timeout=0.5, start="degraded")
    with pytest.raises(LayerUnavailable):
        await layer.group_send("room", MESSAGE)
    await asyncio.to_thread(whole.heal)
    await healthy(layer)
    channel = await member(layer, "room")
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
