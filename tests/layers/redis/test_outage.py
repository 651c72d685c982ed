"""Redis goes away and comes back, while processes have members: nothing is forgotten, and nothing is kept quiet."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from fastapi_channels.layers import Counters, LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import ask, redis7
from tests.layers.redis.conftest import (
    MARKER,
    SOON,
    Proxy,
    Start,
    become,
    connections,
    cut_off,
    deaf,
    healthy,
    logged,
    lost,
    member,
    numbered,
    receive,
    received,
)
from tests.layers.redis.load import Load

MESSAGE = {"type": "x"}

#: How long Redis may take in these tests.
TIMEOUT = 0.5

#: How much a client may leave unread before the server drops it.
LIMITS = "client-output-buffer-limit"


@pytest.fixture
async def server(redis_server: RedisServer, redis_url: str) -> RedisServer:
    """The test's server."""
    return redis_server


Lose = Callable[[RedisServer], None]


def kill(server: RedisServer) -> None:
    server.kill()


def freeze(server: RedisServer) -> None:
    server.pause()


async def bring_back(server: RedisServer) -> None:
    """Have it work again."""
    if server.is_running:
        server.resume()
    else:
        await asyncio.to_thread(server.restart)


async def said(caplog: pytest.LogCaptureFixture, text: str, times: int) -> None:
    """Wait until a text was logged so many times."""
    await become(lambda: sum(text in line for line in logged(caplog)) >= times, f"{times} times {text!r} in the log")


async def fails(call: Awaitable[Any], *, maybe_sent: bool) -> None:
    """A call raises LayerUnavailable in time, which says whether it was sent."""
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable) as caught:
            await call
    assert caught.value.maybe_sent is maybe_sent


# Members


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_members_stay(start: Start, server: RedisServer, caplog: pytest.LogCaptureFixture, lose: Lose) -> None:
    """Members of before the outage hear everything after it, in order; each process counts and logs it once."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    members = [(layer, await member(layer, "room", "other")) for layer in (one, two) for _ in range(2)]
    lose(server)
    await lost(one, two)
    for layer, channel in members:
        assert set(layer.groups_of(channel)) == {"room", "other"}
    await bring_back(server)
    await healthy(one, two)
    await asyncio.gather(*(one.group_send("room", message) for message in numbered(range(100))))
    await one.group_send("room", MARKER)
    await two.group_send("other", MARKER)
    for layer, channel in members:
        messages = [await receive(layer, channel) for _ in range(102)]
        assert [message["number"] for message in messages if message != MARKER] == list(range(100))
    assert one.counters == two.counters == Counters(gaps=1)
    assert ["connection lost" in line for line in logged(caplog)] == [True, True, False, False]
    assert all("connected again" in line and "may be lost" in line for line in logged(caplog)[2:])


async def test_subscribers_are_cut_off(
    start: Start, server: RedisServer, client: "Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """A process whose subscriber alone is cut off can send, says that it may have missed something, and hears again."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    members = [(layer, await member(layer, "room")) for layer in (one, two)]
    await cut_off(client, "pubsub")
    await one.group_send("room", MESSAGE)
    await said(caplog, "connected again", 2)
    assert await one.health()
    await one.group_send("room", MARKER)
    for layer, channel in members:
        assert await received(layer, channel) in ([], [MESSAGE])
    assert one.counters == two.counters == Counters(gaps=1)
    assert len(logged(caplog)) == 4
    assert await connections(client) == 4


async def test_senders_are_cut_off(
    start: Start, server: RedisServer, client: "Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """A process whose other connection is cut off hears everything, and has no gap."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    channel = await member(two, "room")
    await cut_off(client, "normal")
    await client.publish("fc:0:{room}", b'1m{"expiry":60}\n{"type":"x"}')
    assert await receive(two, channel) == MESSAGE
    await said(caplog, "connected again", 2)
    await one.group_send("room", MARKER)
    assert await received(two, channel) == []
    assert one.counters == two.counters == Counters()
    assert not any("may be lost" in line for line in logged(caplog))
    assert len(logged(caplog)) == 4


async def test_again_and_again(start: Start, server: RedisServer, client: "Redis") -> None:
    """Each loss is counted, and the last one is survived as the first one was."""
    layer = await start(timeout=TIMEOUT)
    channel = await member(layer, "room")
    for number in range(5):
        await cut_off(client, "pubsub")
        await deaf(layer)
        await healthy(layer)
        await layer.group_send("room", {"type": "x", "number": number})
        assert (await receive(layer, channel))["number"] == number
    assert layer.counters == Counters(gaps=5)


async def test_five_thousand_groups(start: Start, server: RedisServer) -> None:
    """All groups of a process are heard again after a restart, however many."""
    one, two = await start(), await start()
    channels = {f"room.{number}": await one.new_channel() for number in range(5000)}
    await asyncio.gather(*(one.group_add(group, channel) for group, channel in channels.items()))
    server.kill()
    await lost(one, two)
    await bring_back(server)
    await healthy(one, two)
    await asyncio.gather(*(two.group_send(group, {"type": "x", "group": group}) for group in channels))
    for group, channel in channels.items():
        assert await receive(one, channel) == {"type": "x", "group": group}
    assert one.counters == Counters(gaps=1)


async def test_a_short_pause_is_no_outage(start: Start, client: "Redis", caplog: pytest.LogCaptureFixture) -> None:
    """A server that takes its time, but less than the timeout, has lost nothing."""
    layer = await start(timeout=5)
    channel = await member(layer, "room")
    await client.client_pause(300)
    await asyncio.gather(*(layer.group_send("room", message) for message in numbered(range(10))))
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) == list(range(10))
    assert layer.counters == Counters()
    assert logged(caplog) == []


async def test_a_process_that_is_busy_itself(start: Start, server: RedisServer) -> None:
    """A process whose event loop was blocked for longer than the timeout finds what Redis answered meanwhile."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    channel = await member(two, "room")
    for number in range(2):
        sending = asyncio.create_task(one.group_send("room", {"type": "x", "number": number}))
        await asyncio.sleep(0.2 * number)  # with and without a PING under way
        time.sleep(2 * TIMEOUT)  # noqa: ASYNC251
        await sending
    await one.group_send("room", MARKER)
    assert await received(two, channel) == [0, 1]
    assert one.counters == two.counters == Counters()


async def test_a_process_that_reads_too_slowly(start: Start) -> None:
    """A process that Redis cuts off, since it doesn't read for too long, counts that, and hears again."""
    with redis7(f"--{LIMITS}", "pubsub", "1mb", "0", "0") as server:
        one, two = await start(server.url), await start(server.url)
        channel = await member(two, "room")
        for _ in range(30):  # the event loop reads nothing while these block it
            ask(server, "PUBLISH", "fc:0:{room}", "x" * 1_000_000)
        await become(lambda: two.counters.gaps == 1, "the gap is counted")
        await healthy(one, two)
        await one.group_send("room", MARKER)
        assert await received(two, channel) == []
        assert one.counters == Counters()
        await asyncio.gather(one.close(), two.close())


@pytest.mark.parametrize("kind", ["cut off", "behind it"])
async def test_a_half_open_subscriber(start: Start, server: RedisServer, kind: str) -> None:
    """A subscriber that hears nothing any more though its connection stays open is found out, and heals."""
    async with Proxy(server.port) as proxy:
        one = await start(f"redis://127.0.0.1:{proxy.port}/0", timeout=TIMEOUT)
        two = await start(timeout=TIMEOUT)
        channel = await member(one, "room")
        proxy.cut_subscribers()
        if kind == "behind it":  # its pings are not the only ones who wait
            with pytest.raises(LayerUnavailable):
                await one.group_add("other", channel)
        await deaf(one)
        health = await one.health()
        assert health.can_send
        assert not health.can_receive
        assert await two.health()
        await one.group_send("room", MESSAGE)
        await healthy(one)
        await two.group_send("room", MARKER)
        assert await received(one, channel) == []
        assert one.counters == Counters(gaps=1)
        await one.close()


# What can be done meanwhile


async def test_sending_to_a_dead_server(start: Start, server: RedisServer) -> None:
    """While there is no server a send raises in time, says that nothing was sent, and nothing arrives later."""
    layer = await start(timeout=TIMEOUT)
    channel = await member(layer, "room")
    server.kill()
    await lost(layer)
    for _ in range(2):  # the first ones wait for a connection
        await asyncio.gather(
            fails(layer.group_send("room", MESSAGE), maybe_sent=False),
            fails(layer.group_send("room", MESSAGE, idempotency_key="k"), maybe_sent=False),
            fails(layer.send("jobs", MESSAGE), maybe_sent=False),
            fails(layer.send("specific.0123456789ab!1", MESSAGE), maybe_sent=False),
        )
    await layer.send(channel, {"type": "here"})
    await bring_back(server)
    await healthy(layer)
    assert not (await layer.group_send("room", MARKER, idempotency_key="k")).duplicate
    assert await received(layer, channel) == [{"type": "here"}]
    await layer.send("jobs", MARKER)
    assert await received(layer, "jobs") == []


async def test_sending_to_a_frozen_server(start: Start, server: RedisServer) -> None:
    """What was written to a server that doesn't answer was maybe sent; what comes later was not. None arrives twice."""
    layer = await start(timeout=TIMEOUT)
    channel = await member(layer, "room")
    server.pause()
    await fails(layer.group_send("room", {"type": "maybe"}), maybe_sent=True)
    await lost(layer)
    await fails(layer.group_send("room", {"type": "never"}), maybe_sent=False)
    server.resume()
    await healthy(layer)
    await layer.group_send("room", MARKER)
    assert await received(layer, channel) in ([], [{"type": "maybe"}])


async def test_too_much_to_send(start: Start, server: RedisServer, configure: Callable[[str, str], None]) -> None:
    """What waits for a server that reads nothing is bounded: what is more is refused at once, and was not sent."""
    one, two = await start(timeout=SOON), await start(timeout=SOON)
    channel = await member(two, "room")
    text = "x" * 1_000_000
    configure(LIMITS, "pubsub 0 0 0")
    server.pause()
    sends = [asyncio.create_task(one.group_send("room", message)) for message in numbered(range(120), text=text)]
    await become(lambda: any(send.done() for send in sends), "some are refused")
    for send in sends:
        if send.done():
            await fails(send, maybe_sent=False)
    server.resume()
    results = await asyncio.gather(*sends, return_exceptions=True)
    await one.group_send("room", MARKER)
    sent = [number for number, result in enumerate(results) if not isinstance(result, LayerUnavailable)]
    assert len(sent) > 50
    assert await received(two, channel) == sent


async def test_killed_in_the_middle_of_it(start: Start, server: RedisServer) -> None:
    """Sends that were under way when the server died were maybe sent, each of them."""
    layer = await start(timeout=SOON)
    server.pause()
    sends = [asyncio.create_task(layer.group_send("room", message)) for message in numbered(range(10))]
    sends.append(asyncio.create_task(layer.send("jobs", MESSAGE)))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    server.kill()
    for send in sends:
        await fails(send, maybe_sent=True)


async def test_a_key_makes_a_retry_safe(start: Start, server: RedisServer) -> None:
    """What maybe was sent with an idempotency key can be sent again, and arrives once at most."""
    one, two = await start(timeout=TIMEOUT), await start()
    channel = await member(two, "room")
    server.pause()
    await fails(one.group_send("room", MESSAGE, idempotency_key="k"), maybe_sent=True)
    server.resume()
    await healthy(one, two)
    await one.group_send("room", MESSAGE, idempotency_key="k")
    await one.group_send("room", MARKER)
    assert await received(two, channel) == [MESSAGE]
    assert two.counters == Counters()


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_joining(start: Start, server: RedisServer, lose: Lose) -> None:
    """A new group can't be joined meanwhile, which leaves nothing behind; one that the process has can be."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    first = await member(one, "known")
    second, third = await one.new_channel(), await one.new_channel()
    lose(server)
    async with asyncio.timeout(SOON):
        await one.group_add("known", second)
    joins = [("new", second), ("both", second), ("both", third)]
    async with asyncio.timeout(SOON):
        results = await asyncio.gather(*(one.group_add(*join) for join in joins), return_exceptions=True)
    assert [type(result) for result in results] == [LayerUnavailable] * 3
    assert (set(one.groups_of(second)), set(one.groups_of(third))) == ({"known"}, set())
    await bring_back(server)
    await healthy(one, two)
    assert ask(server, "PUBSUB", "CHANNELS", "*{*") == ["fc:0:{known}"]
    await one.group_add("new", second)
    for group in ("known", "new"):
        await two.group_send(group, {"type": "x", "group": group})
        await two.group_send(group, MARKER)
    assert await received(one, first) == [{"type": "x", "group": "known"}]
    assert await received(one, second) == [{"type": "x", "group": "known"}]
    assert await received(one, second) == [{"type": "x", "group": "new"}]


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_leaving(start: Start, server: RedisServer, lose: Lose) -> None:
    """Leaving neither waits nor raises meanwhile; what was left isn't heard again before it is joined again."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    stays, goes = await member(one, "room", "left", "at once"), await member(one, "room", "detached")
    lose(server)
    async with asyncio.timeout(SOON):
        await one.group_discard("at once", stays)
        await lost(one, two)
        await one.group_discard("left", stays)
        await one.detach(goes)
        with pytest.raises(LayerUnavailable):
            await one.group_add("left", stays)
    await bring_back(server)
    await healthy(one, two)
    assert ask(server, "PUBSUB", "CHANNELS", "*{*") == ["fc:0:{room}"]
    await one.group_add("left", stays)
    await two.group_send("left", MARKER)
    assert await received(one, stays) == []
    await two.group_send("room", MARKER)
    assert await received(one, stays) == []


async def test_joining_at_the_moment_it_comes_back(start: Start, server: RedisServer) -> None:
    """A group_add that waits when Redis comes back succeeds, and its channel hears what is sent then."""
    one, two = await start(timeout=SOON), await start(timeout=SOON)
    channel = await one.new_channel()
    server.kill()
    await lost(one, two)
    joining = asyncio.create_task(one.group_add("room", channel))
    sending = [asyncio.create_task(two.group_send("other", MESSAGE)) for _ in range(3)]
    await bring_back(server)
    async with asyncio.timeout(SOON):
        await joining
        await asyncio.gather(*sending)
    await two.group_send("room", MARKER)
    assert await received(one, channel) == []


@pytest.mark.parametrize("lose", [kill, freeze])
@pytest.mark.parametrize("when", ["at once", "later"])
async def test_closing(start: Start, server: RedisServer, lose: Lose, when: str) -> None:
    """Closing meanwhile ends, and so does whoever waits for the layer, with LayerUnavailable."""
    layer = await start(timeout=TIMEOUT if when == "later" else 1)
    channel = await member(layer, "room")
    calls: list[Awaitable[Any]] = [layer.receive(channel), layer.receive("jobs")]
    waiting = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    lose(server)
    if when == "later":
        await lost(layer)
    calls = [
        layer.group_send("room", MESSAGE),
        layer.send("jobs", MESSAGE),
        layer.group_add("new", channel),
        layer.receive("other"),
    ]
    waiting += [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(SOON):
        await layer.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in results} == {LayerUnavailable}


async def test_health(start: Start) -> None:
    """It says what is wrong, for as long as it is, and never the password."""
    password = "s3cret/@:?#"
    with RedisServer(options=["--requirepass", password]) as server:
        layer = await start(server.url, timeout=0.2)
        await become(lambda: _has_latency(layer), "the latency is measured")
        health = await layer.health()
        assert (health.ok, health.detail, health.can_send, health.can_receive) == (True, "", True, True)
        server.kill()
        await lost(layer)
        health = await layer.health()
        assert (health.can_send, health.can_receive) == (False, False)
        assert f"127.0.0.1:{server.port}" in health.detail
        with pytest.raises(LayerUnavailable) as caught:
            await layer.group_send("room", MESSAGE)
        for text in (health.detail, str(caught.value), repr(caught.value.__cause__)):
            assert "s3cret" not in text
        await bring_back(server)
        await healthy(layer)
        await layer.close()
    health = await layer.health()
    assert (health.ok, health.detail) == (False, "the channel layer is not open")


async def _has_latency(layer: RedisLayer) -> bool:
    return (await layer.health()).latency is not None


async def test_a_cancelled_send(start: Start, server: RedisServer) -> None:
    """A send that is cancelled arrives once or not at all, and disturbs no other."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    sends = []
    for message in numbered(range(300)):
        send = asyncio.create_task(one.group_send("room", message, idempotency_key=str(message["number"])))
        sends.append(send)
        for _ in range(message["number"] % 4):
            await asyncio.sleep(0)
        if message["number"] % 3 == 0:
            send.cancel()
    results = await asyncio.gather(*sends, return_exceptions=True)
    await one.group_send("room", MARKER)
    arrived = await received(two, channel)
    assert arrived == sorted(set(arrived))
    assert {number for number, result in enumerate(results) if not isinstance(result, BaseException)} <= set(arrived)
    assert all(number % 3 == 0 for number in set(range(300)) - set(arrived))


# Readers of queues


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_a_reader_waits_through_it(start: Start, server: RedisServer, lose: Lose) -> None:
    """Who waits for a message of a queue goes on waiting, and gets the first that comes."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    reading = [asyncio.create_task(receive(two, "jobs")) for _ in range(2)]
    await member(two, "room")
    await two.group_send("room", MESSAGE)
    lose(server)
    await lost(one, two)
    reading.append(asyncio.create_task(receive(two, "jobs")))
    await bring_back(server)
    await healthy(one, two)
    for message in numbered(range(3)):
        await one.send("jobs", message)
    assert sorted(message["number"] for message in await asyncio.gather(*reading)) == [0, 1, 2]


async def test_a_message_that_nobody_was_told_of(start: Start, server: RedisServer, client: "Redis") -> None:
    """A message that came while the reader's process was deaf is found when it hears again."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    for number in range(10):
        reading = asyncio.create_task(receive(two, "jobs"))
        await member(two, "room")
        await two.group_send("room", MESSAGE)
        await cut_off(client, "pubsub")
        await one.send("jobs", {"type": "x", "number": number})
        assert (await reading)["number"] == number
        await healthy(one, two)


async def test_a_message_asked_of_a_frozen_server(start: Start, server: RedisServer) -> None:
    """A message that a frozen server was asked for, whose answer comes too late for anybody, isn't lost."""
    one, two = await start(timeout=TIMEOUT), await start()
    await two.send("jobs", MESSAGE)
    server.pause()
    reading = asyncio.create_task(receive(one, "jobs"))
    await lost(one)
    server.resume()
    assert await reading == MESSAGE


# Under load


@pytest.fixture
async def load(start: Start, server: RedisServer) -> AsyncIterator[Load]:
    async with Load(await start(timeout=TIMEOUT), await start(timeout=TIMEOUT), "room") as load:
        yield load


async def cut_both(client: "Redis") -> None:
    for kind in ("pubsub", "normal"):
        await cut_off(client, kind)


@pytest.mark.parametrize("way", ["killed", "frozen", "cut off"])
async def test_under_load(load: Load, server: RedisServer, client: "Redis", way: str) -> None:
    """What was acknowledged before it began, or when both are healthy again, has arrived, once and in order."""
    before = await load.more()
    if way == "cut off":
        await cut_both(client)
    else:
        (server.kill if way == "killed" else server.pause)()
        await lost(load.writer, load.reader)
        await bring_back(server)
    await become(lambda: load.reader.counters.gaps > 0, "the gap is counted")
    await healthy(load.reader, load.writer)
    begin = len(load.acknowledged)
    await load.end()
    arrived = set(load.arrived)
    assert load.arrived == sorted(arrived)
    assert set(before) <= arrived
    assert set(load.acknowledged[begin:]) <= arrived
    assert not arrived & set(load.never_sent)
    assert load.reader.counters == Counters(gaps=1)
