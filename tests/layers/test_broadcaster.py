"""The broadcaster layer, on real brokers: what it carries, and what it does when they fail."""

import asyncio
import inspect
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import asyncpg  # type: ignore[import-untyped]
import psutil
import pytest
from broadcaster import Broadcast, BroadcastBackend, Event
from redis.asyncio import Redis
from typing_extensions import override

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers import ChannelLayer, InvalidMessage, LayerUnavailable, make_layer
from fastapi_channels.layers.broadcaster import BroadcasterLayer, parts, source
from fastapi_channels.layers.publisher import AsyncPublisher
from fastapi_channels.testing import LayerContract, RedisServer
from fastapi_channels.testing.server import free_port
from tests.brokers import Postgres, ask, redis7, tls_server
from tests.conftest import Forward

MESSAGE = {"type": "x"}
MARKER = {"type": "marker"}

#: Within how many seconds whatever a test waits for comes.
SOON = 15.0

#: How long a broker may take, in the tests in which it takes longer.
TIMEOUT = 0.5


# Brokers


class Broker(Protocol):
    """A server that a test can do without for a while."""

    @property
    def url(self) -> str: ...

    def kill(self) -> None: ...

    def freeze(self) -> None: ...

    def bring_back(self) -> None: ...


class RedisBroker:
    def __init__(self, server: RedisServer) -> None:
        self.server = server

    @property
    def url(self) -> str:
        return self.server.url

    def kill(self) -> None:
        self.server.kill()

    def freeze(self) -> None:
        self.server.pause()

    def bring_back(self) -> None:
        if self.server.is_running:
            self.server.resume()
        else:
            self.server.restart()


class PostgresBroker:
    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.frozen: list[psutil.Process] = []
        self.is_killed = False

    @property
    def url(self) -> str:
        return self.server.url

    def kill(self) -> None:
        self.server.kill()
        self.is_killed = True

    def freeze(self) -> None:
        main = psutil.Process(self.server.pid)
        self.frozen = [main, *main.children(recursive=True)]
        for process in self.frozen:
            process.suspend()

    def bring_back(self) -> None:
        if self.is_killed:
            self.server.restart()
            self.is_killed = False
        while self.frozen:
            with suppress(psutil.NoSuchProcess):
                self.frozen.pop().resume()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: Postgres) -> Iterator[PostgresBroker]:
    broker = PostgresBroker(postgres_server)
    yield broker
    broker.bring_back()


@pytest.fixture(params=["redis", "postgres"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each broker that there is a server of, running."""
    if request.param == "redis":
        request.getfixturevalue("redis_url")
        return RedisBroker(request.getfixturevalue("redis_server"))
    postgres: PostgresBroker = request.getfixturevalue("postgres")
    return postgres


@pytest.fixture
def one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is used as Kafka is."""
    monkeypatch.setitem(source.BROKERS, "redis", source.BROKERS["kafka"])


# Layers


class Start(Protocol):
    """Opens a layer, which is closed after the test."""

    async def __call__(self, broadcast: Any, **options: Any) -> BroadcasterLayer: ...


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Open layers, each of which is a process to the others; when they are closed nothing of them is left here."""
    layers: list[BroadcasterLayer] = []

    async def start(broadcast: Any, **options: Any) -> BroadcasterLayer:
        layer = BroadcasterLayer(broadcast, **options)
        layers.append(layer)
        await layer.open()
        return layer

    yield start
    async with asyncio.timeout(SOON):
        await asyncio.gather(*(layer.close() for layer in layers))
    await become(lambda: not tasks_of_layers(), "no task is left")


def tasks_of_layers() -> list[asyncio.Task[Any]]:
    """The tasks of this event loop that a layer, a Broadcast or a client of a broker runs."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    places = ("/fastapi_channels/", "/broadcaster/", "/redis/", "/asyncpg/")
    return [task for task, code in codes.items() if code and any(place in code.co_filename for place in places)]


async def become(is_so: Callable[[], Awaitable[Any] | Any], what: str) -> None:
    """Wait until something is so."""
    deadline = asyncio.get_running_loop().time() + SOON
    while True:
        answer = is_so()
        if await answer if inspect.isawaitable(answer) else answer:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {SOON} s: {what}"
        await asyncio.sleep(0.01)


async def healthy(*layers: ChannelLayer) -> None:
    for layer in layers:
        await become(layer.health, "the layer is healthy")


async def lost(*layers: ChannelLayer) -> None:
    for layer in layers:

        async def is_lost(layer: ChannelLayer = layer) -> bool:
            return not await layer.health()

        await become(is_lost, "the layer has noticed that it has lost the broker")


async def gap(layer: ChannelLayer, number: int = 1) -> None:
    """Wait until a layer has counted this many gaps."""
    await become(lambda: layer.counters.gaps == number, f"{number} losses are counted")


async def member(layer: ChannelLayer, *groups: str) -> str:
    """A new channel in these groups."""
    channel = await layer.new_channel()
    for group in groups:
        await layer.group_add(group, channel)
    return channel


async def receive(layer: ChannelLayer, channel: str) -> dict[str, Any]:
    async with asyncio.timeout(SOON):
        return await layer.receive(channel)


async def numbers(layer: ChannelLayer, channel: str) -> list[Any]:
    """The numbers of the messages that come before a marker."""
    received = []
    while (message := await receive(layer, channel)) != MARKER:
        received.append(message["number"])
    return received


def losses(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about the connection: "lost" or "again"."""
    return [
        "lost" if "connection lost" in record.message else "again"
        for record in caplog.records
        if record.name == "fastapi_channels" and "connect" in record.message
    ]


# The contract


class TestOnMemory(LayerContract):
    @pytest.fixture
    async def layer(self) -> AsyncIterator[ChannelLayer]:
        async with BroadcasterLayer("memory://", capacity=20) as layer:
            yield layer


class TestOnRedis(LayerContract):
    @pytest.fixture
    async def layer(self, redis_url: str) -> AsyncIterator[ChannelLayer]:
        async with BroadcasterLayer(redis_url, capacity=20) as layer:
            yield layer


class TestOnPostgres(LayerContract):
    @pytest.fixture
    async def layer(self, postgres: PostgresBroker) -> AsyncIterator[ChannelLayer]:
        async with BroadcasterLayer(postgres.url, capacity=20) as layer:
            yield layer


class TestInOneChannel(LayerContract):
    @pytest.fixture
    async def layer(self, redis_url: str, one_channel: None) -> AsyncIterator[ChannelLayer]:
        async with BroadcasterLayer(redis_url, capacity=20) as layer:
            yield layer


class TestOnABroadcast(LayerContract):
    @pytest.fixture
    async def layer(self, postgres: PostgresBroker) -> AsyncIterator[ChannelLayer]:
        async with Broadcast(postgres.url) as broadcast, BroadcasterLayer(broadcast, capacity=20) as layer:
            yield layer


# Several processes


@pytest.fixture(params=["redis", "postgres", "streams", "one channel", "a Broadcast"])
async def url(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """What several layers may be opened with, and hear each other."""
    if request.param == "a Broadcast":
        async with Broadcast("memory://") as broadcast:
            yield broadcast
        return
    if request.param == "postgres":
        yield request.getfixturevalue("postgres").url
        return
    if request.param == "one channel":
        request.getfixturevalue("one_channel")
    redis_url: str = request.getfixturevalue("redis_url")
    yield redis_url.replace("redis:", "redis-stream:") if request.param == "streams" else redis_url


async def test_groups_across_processes(start: Start, url: Any) -> None:
    """A message to a group reaches its members in every process, except those left out, wherever they are."""
    one, two = await start(url), await start(url)
    here, there = await member(one, "room"), await member(two, "room")
    left_out = await member(two, "room")
    for sender in (one, two):
        await sender.group_send("room", MESSAGE, exclude=[left_out])
        assert await receive(one, here) == await receive(two, there) == MESSAGE
    await one.group_send("room", MARKER)
    assert await receive(two, left_out) == MARKER


async def test_channels_of_other_processes(start: Start, url: Any) -> None:
    """A message to a channel of another process reaches it, in order; one that is no more is counted there."""
    one, two, three = await start(url), await start(url), await start(url)
    channel, other = await two.new_channel(), await three.new_channel()
    gone = await two.new_channel()
    await two.detach(gone)
    await one.send(gone, MESSAGE)
    await asyncio.gather(*(one.send(channel, {"type": "x", "number": number}) for number in range(20)))
    await one.send(channel, MARKER)
    assert await numbers(two, channel) == list(range(20))
    assert two.counters.unreachable == 1
    await one.send(other, MARKER)
    assert await numbers(three, other) == []


async def test_order_across_processes(start: Start, url: Any) -> None:
    """What a process sends to a group without waiting arrives elsewhere in the order of the calls, large or small."""
    one, two = await start(url), await start(url)
    channels = [await member(two, "room") for _ in range(2)]
    sizes = [20_000 if number % 7 == 0 else 1 for number in range(40)]
    sends = [one.group_send("room", {"type": "x", "number": n, "text": "é" * size}) for n, size in enumerate(sizes)]
    await asyncio.gather(*sends)
    await one.group_send("room", MARKER)
    for channel in channels:
        assert await numbers(two, channel) == list(range(40))


async def test_another_prefix(start: Start, url: Any) -> None:
    """Layers with different prefixes don't hear each other, whatever the prefixes look like."""
    prefixes = ["fc", "Fc", "fc.", "é" * 200, "x" * 200, "x" * 199]
    layers = [await start(url, prefix=prefix) for prefix in prefixes]
    channels = [await member(layer, "room") for layer in layers]
    for number, layer in enumerate(layers):
        await layer.group_send("room", {"type": "x", "number": number})
    for number, (layer, channel) in enumerate(zip(layers, channels, strict=True)):
        await layer.group_send("room", MARKER)
        assert await numbers(layer, channel) == [number]


@pytest.mark.parametrize("prefix", ["", "postgres"])
async def test_publisher(start: Start, redis_url: str, postgres: PostgresBroker, prefix: str) -> None:
    """A process that only sends is heard, and listens to nothing."""
    url = postgres.url if prefix else f"broadcaster+{redis_url}"
    layer = await start(url.removeprefix("broadcaster+"))
    channel = await member(layer, "room")
    async with AsyncPublisher(url) as publisher:
        await publisher.group_send("room", MESSAGE)
        await publisher.send(channel, {"type": "y"})
        assert {(await receive(layer, channel))["type"] for _ in range(2)} == {"x", "y"}
        async with Redis.from_url(redis_url, decode_responses=True) as redis:
            assert len(await redis.pubsub_channels("fc.*")) == (0 if prefix else 3)


async def test_what_is_sent_to_a_group_says_no_channel(start: Start, redis_url: str) -> None:
    """A message that was written for a channel is none for a group, and the other way round."""
    one, two = await start(redis_url), await start(redis_url)
    channel = await member(two, "room")
    async with Redis.from_url(redis_url) as redis, redis.pubsub() as listening:
        await listening.psubscribe("fc.*")
        await one.group_send("room", {"type": "to.group"})
        await one.send(channel, {"type": "to.channel"})
        sent: list[dict[str, Any]] = []
        async with asyncio.timeout(SOON):
            while len(sent) < 2:
                message = await listening.get_message(ignore_subscribe_messages=True, timeout=SOON)
                if message is not None and message["data"].startswith(b"1m"):
                    sent.append(message)
        for message, other in zip(sent, reversed(sent), strict=True):
            await redis.publish(other["channel"], message["data"])
        await one.send(channel, MARKER)
        await become(lambda: two.counters.unreadable == 2, "both have been skipped")
    assert {(await receive(two, channel))["type"] for _ in range(3)} == {"to.group", "to.channel", "marker"}


# Large messages


@pytest.mark.parametrize("size", [0, 1, 7800, 7850, 7900, 8000, 16_000, 300_000])
async def test_sizes(start: Start, postgres: PostgresBroker, size: int) -> None:
    """A message of any size goes through Postgres, whose own have less than 8000 bytes."""
    layer = await start(postgres.url)
    channel = await member(layer, "room")
    for text in ("x" * size, "🎉" * (size // 4), "x" + "é" * (size // 2)):
        await layer.group_send("room", {"type": "x", "text": text})
        assert await receive(layer, channel) == {"type": "x", "text": text}


async def test_large_messages_of_several_at_once(start: Start, postgres: PostgresBroker) -> None:
    """The parts of messages that several processes send at the same time are not mixed up."""
    layers = [await start(postgres.url) for _ in range(3)]
    channel = await member(layers[0], "room")

    async def sender(name: int, layer: ChannelLayer) -> None:
        for number in range(5):
            await layer.group_send("room", {"type": "x", "number": (name, number), "text": str(name) * 50_000})

    await asyncio.gather(*(sender(name, layer) for name, layer in enumerate(layers)))
    received = [await receive(layers[0], channel) for _ in range(15)]
    assert all(message["text"] == str(message["number"][0]) * 50_000 for message in received)
    for name in range(3):
        assert [number for of, number in (m["number"] for m in received) if of == name] == list(range(5))


async def test_what_is_too_large(start: Start, postgres: PostgresBroker) -> None:
    """A message beyond what can be put together again is refused before anything is sent."""
    layer = await start(postgres.url)
    channel = await member(layer, "room")
    with pytest.raises(InvalidMessage, match="have at most 16777216"):
        await layer.group_send("room", {"type": "x", "text": "x" * parts.LARGEST}, idempotency_key="k")
    assert not (await layer.group_send("room", MARKER, idempotency_key="k")).duplicate
    assert await receive(layer, channel) == MARKER


def test_parts_that_are_missing() -> None:
    """A message that lacks a part is dropped, and the next one of that sender is not."""
    text = "1m" + "0123456789é" * 20
    for missing in range(5):
        together = parts.Parts()
        sent = parts.parts_of(text.encode(), 114, "sender", 1)
        assert len(sent) == 5
        assert all(len(part.encode()) <= 114 for part in sent)
        del sent[missing]
        assert [together.add("a", part) for part in sent] == [None] * 4
        again = parts.parts_of(text.encode(), 114, "sender", 2)
        assert [together.add("a", part) for part in again] == [None] * 4 + [text]


def test_parts_in_between() -> None:
    """Parts of other senders and of other addresses, and whole messages, may come between those of a message."""
    together = parts.Parts()
    texts = {(address, sender): f"{address}{sender}" * 100 for address in "ab" for sender in "xy"}
    sent = {key: parts.parts_of(text.encode(), 114, key[1], 7) for key, text in texts.items()}
    for number in range(4):
        for (address, sender), text in texts.items():
            whole = together.add(address, sent[address, sender][number])
            assert whole == (text if number == 3 else None)
            assert together.add(address, "1m whole") == "1m whole"


def test_parts_that_repeat() -> None:
    """A part that comes twice ends its message, also if it is the last."""
    together = parts.Parts()
    sent = parts.parts_of(b"x" * 100, 114, "sender", 1)
    assert [together.add("a", part) for part in (sent[0], sent[0], sent[1])] == [None, None, "x" * 100]
    assert [together.add("a", part) for part in (sent[1], sent[0], *sent[1:])] == [None, None, "x" * 100]


def test_unfinished_messages_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many senders begin a message and don't end it, a bounded amount of them is kept, the newest."""
    monkeypatch.setattr(parts, "UNFINISHED", 1000)
    together = parts.Parts()
    senders = {f"s{number}": parts.parts_of(b"x" * 200, 164, f"s{number}", 1) for number in range(100)}
    for sent in senders.values():
        assert together.add("a", sent[0]) is None
    finished = [sender for sender, sent in senders.items() if together.add("a", sent[1]) is not None]
    assert 0 < len(finished) < 10
    assert finished == list(senders)[-len(finished) :]


# Joining


async def test_the_first_member_gets_the_first_message(start: Start, broker: Broker) -> None:
    """A process whose very first subscription is a group's hears the first message to it."""
    one, two = await start(broker.url), await start(broker.url)
    for number in range(5):
        channel = await member(two, f"room{number}")
        await one.group_send(f"room{number}", {"type": "x", "number": number})
        assert (await receive(two, channel))["number"] == number


async def test_first_members_at_once(start: Start, broker: Broker) -> None:
    """Of several that join new groups at the same moment, each hears each of its groups."""
    one, two = await start(broker.url), await start(broker.url)
    channels = [await two.new_channel() for _ in range(10)]
    groups = ["a", "b", "c"]
    await asyncio.gather(*(two.group_add(group, channel) for channel in channels for group in groups))
    for group in groups:
        await one.group_send(group, {"type": "x", "group": group})
    for channel in channels:
        assert {(await receive(two, channel))["group"] for _ in groups} == set(groups)


async def test_churn(start: Start, broker: Broker) -> None:
    """Whoever is in a group when a message is sent to it gets that, however many come and go meanwhile."""
    one, two = await start(broker.url), await start(broker.url)
    witness = await member(two, "room0")

    async def come_and_go(name: int) -> None:
        for number in range(20):
            group = f"room{(name + number) % 4}"
            channel = await member(two, group)
            await one.group_send(group, {"type": "x", "number": (name, number)})
            while (await receive(two, channel))["number"] != [name, number]:
                pass
            await two.detach(channel)

    await asyncio.gather(*(come_and_go(name) for name in range(5)))
    await one.group_send("room0", MARKER)
    expected = [[name, number] for name in range(5) for number in range(20) if (name + number) % 4 == 0]
    assert sorted(await numbers(two, witness)) == expected
    assert two.counters.inbox_dropped == 0


async def test_leaving_ends_the_subscription(start: Start, redis_url: str) -> None:
    """A group that was left by all, or whose joining was cancelled, is not subscribed to; at the end nothing is."""
    layer = await start(redis_url)
    async with Redis.from_url(redis_url, decode_responses=True) as redis:

        async def subscriptions() -> int:
            return len(await redis.pubsub_channels("fc.*"))

        own = await subscriptions()
        channel = await member(layer, "one", "two")
        assert await subscriptions() == own + 2
        await layer.group_discard("one", channel)
        for turns in range(20):
            joining = asyncio.create_task(layer.group_add(f"room{turns}", channel))
            for _ in range(turns):
                await asyncio.sleep(0)
            joining.cancel()
            await asyncio.wait({joining})
            await layer.group_discard(f"room{turns}", channel)

        async def is_one_left() -> bool:
            return await subscriptions() == own + 1

        await become(is_one_left, "one group is subscribed to")
        await layer.close()

        async def is_none_left() -> bool:
            return await subscriptions() == 0

        await become(is_none_left, "nothing is subscribed to")


async def test_one_channel_for_all(start: Start, redis_url: str, one_channel: None) -> None:
    """Where there is one channel, that is all that is subscribed to, and leaving a group leaves it alone."""
    one, two = await start(redis_url), await start(redis_url)
    here, there = await member(one, "room", "other"), await member(two, "room")
    await one.group_discard("other", here)
    await one.group_send("room", MESSAGE)
    assert await receive(one, here) == await receive(two, there) == MESSAGE
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        assert await redis.pubsub_channels("*") == ["fc.all"]
        await redis.publish("fc.all", "nonsense")
        await redis.publish("fc.all", b"\xff\n\xff")
    await one.group_send("room", MARKER)
    assert await receive(two, there) == MARKER


# What others say


async def test_strangers_in_redis(start: Start, redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """What isn't ours is skipped and counted, and logged once; what is ours goes on arriving."""
    layer = await start(redis_url)
    channel = await member(layer, "room")
    strange = [b"\xff\xfe", b"", b"hello", b"1m", b"1m{}\n{}", b'1m{"expiry":1}\n{"type":"\xff"}', b"p", b"p1:2:0:1 x"]
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        addresses = await redis.pubsub_channels("fc.*")
        assert len(addresses) == 3
        for address in addresses:
            for data in strange:
                await redis.publish(address, data)
    await layer.group_send("room", MARKER)
    assert await receive(layer, channel) == MARKER
    await become(lambda: layer.counters.unreadable == 2 * len(strange), "all have been skipped")
    assert len([record for record in caplog.records if "was skipped" in record.message]) == 1
    assert layer.counters.gaps == 0
    assert await layer.health()


async def test_strangers_in_postgres(start: Start, postgres: PostgresBroker) -> None:
    """What isn't ours is skipped and counted in Postgres too."""
    layer = await start(postgres.url)
    channel = await member(layer, "room")
    stranger = await asyncpg.connect(postgres.url)
    for text in ("hello", "", "1m{}\n{}"):
        await stranger.execute("SELECT pg_notify($1, $2)", layer._group_address("room"), text)
    await stranger.close()
    await layer.group_send("room", MARKER)
    assert await receive(layer, channel) == MARKER
    assert layer.counters.unreadable == 3


# Losing the broker


def kill(broker: Broker) -> None:
    broker.kill()


def freeze(broker: Broker) -> None:
    broker.freeze()


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_losing_the_broker(
    start: Start, broker: Broker, lose: Callable[[Broker], None], caplog: pytest.LogCaptureFixture
) -> None:
    """While the broker is away nobody pretends; when it is back all who were members hear, and nobody was told off."""
    one, two = await start(broker.url, timeout=TIMEOUT), await start(broker.url, timeout=TIMEOUT)
    here, there = await member(one, "room", "left"), await member(two, "room")
    await asyncio.to_thread(lose, broker)
    await lost(one, two)
    health = await one.health()
    assert (health.can_send, health.can_receive) == (False, False)
    assert health.detail
    for call in (
        one.group_send("room", MESSAGE),
        one.send(there, MESSAGE),
        one.group_add("new", here),
    ):
        with pytest.raises(LayerUnavailable):
            await call
    assert set(one.groups_of(here)) == {"room", "left"}
    await one.group_discard("left", here)
    late = await one.new_channel()
    await one.group_add("room", late)  # this process has that group
    await asyncio.to_thread(broker.bring_back)
    await healthy(one, two)
    await two.group_add("left", there)
    for group in ("left", "new", "room"):
        await two.group_send(group, {"type": "x", "group": group})
    for layer, channel in ((one, here), (one, late)):
        assert (await receive(layer, channel))["group"] == "room"
    assert [(await receive(two, there))["group"] for _ in range(2)] == ["left", "room"]
    await one.group_add("new", here)
    await two.group_send("new", MARKER)
    assert await receive(one, here) == MARKER
    assert (one.counters.gaps, two.counters.gaps) == (1, 1)
    assert sorted(losses(caplog)) == ["again", "again", "lost", "lost"]


async def test_a_send_that_finds_out(start: Start, broker: Broker) -> None:
    """A send that is under way when the broker freezes may have arrived, and says so; later ones have not."""
    layer = await start(broker.url, timeout=TIMEOUT)
    await member(layer, "room")
    await asyncio.to_thread(broker.freeze)
    with pytest.raises(LayerUnavailable) as first:
        await layer.group_send("room", MESSAGE)
    assert first.value.maybe_sent
    await lost(layer)
    with pytest.raises(LayerUnavailable) as later:
        await layer.group_send("room", MESSAGE)
    assert not later.value.maybe_sent
    # Whatever else has been asked meanwhile has its answer in time too.
    sends = [layer.group_send("room", MESSAGE) for _ in range(50)]
    async with asyncio.timeout(SOON):
        results = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(result) for result in results} == {LayerUnavailable}


async def test_sends_wait_for_a_broker_that_comes_back_soon(start: Start, redis_url: str, redis_server: Any) -> None:
    """A short restart delays what is sent meanwhile and loses none of it, but what was on its way."""
    layer = await start(redis_url)
    channel = await member(layer, "room")
    await asyncio.to_thread(redis_server.kill)
    await lost(layer)
    sends = [asyncio.create_task(layer.group_send("room", {"type": "x", "number": number})) for number in range(20)]
    await asyncio.sleep(0)
    await asyncio.to_thread(redis_server.restart)
    await asyncio.gather(*sends)
    await layer.group_send("room", MARKER)
    assert await numbers(layer, channel) == list(range(20))


async def test_a_restart_is_a_gap(start: Start, redis_url: str, redis_server: Any) -> None:
    """A broker that is gone for a moment only has lost its subscriptions: that is noticed, mended and counted."""
    layer = await start(redis_url)
    channel = await member(layer, "room")
    for number in range(1, 4):
        await asyncio.to_thread(redis_server.restart)
        await gap(layer, number)
        await healthy(layer)
        await layer.group_send("room", {"type": "x", "number": number})
        assert (await receive(layer, channel))["number"] == number


async def test_streams_that_are_lost(start: Start, redis_url: str, redis_server: RedisServer) -> None:
    """With streams too a restart is noticed and mended, though broadcaster's listener dies of it."""
    layer = await start(redis_url.replace("redis:", "redis-stream:"), timeout=TIMEOUT)
    channel = await member(layer, "room")
    await asyncio.to_thread(redis_server.kill)
    await lost(layer)
    await asyncio.to_thread(redis_server.restart)
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_one_connection_is_closed(start: Start, redis_url: str, kind: str) -> None:
    """If Redis closes only the connection that listens, or only the other, that is noticed and mended too."""
    layer = await start(redis_url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    async with Redis.from_url(redis_url) as redis:
        await redis.client_kill_filter(_type=kind)
    await gap(layer)
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE


async def test_postgres_ends_the_connection(start: Start, postgres: PostgresBroker) -> None:
    """If an administrator ends the session in Postgres, that is noticed and mended."""
    layer = await start(postgres.url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    stranger = await asyncpg.connect(postgres.url)
    await stranger.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    await stranger.close()
    await gap(layer)
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_a_process_that_only_sends(broker: Broker, lose: Callable[[Broker], None]) -> None:
    """A process that listens to nothing notices too that the broker is gone, and counts no gap."""
    layer = BroadcasterLayer(broker.url, timeout=TIMEOUT)
    layer.listens = False
    async with layer:
        await asyncio.to_thread(lose, broker)
        await lost(layer)
        with pytest.raises(LayerUnavailable):
            await layer.group_send("room", MESSAGE)
        await asyncio.to_thread(broker.bring_back)
        await healthy(layer)
        await layer.group_send("room", MESSAGE)
        assert layer.counters.gaps == 0


async def test_too_much_at_once(start: Start) -> None:
    """What a slow broker does not come to in time is refused, and certainly not sent."""
    backend = FragileBackend()
    backend.delay = 0.1
    layer = await start(backend, timeout=1.0)
    channel = await member(layer, "room")
    sends = [layer.group_send("room", {"type": "x", "number": number}) for number in range(50)]
    results = await asyncio.gather(*sends, return_exceptions=True)
    sent = [number for number, result in enumerate(results) if not isinstance(result, BaseException)]
    unsent = [result for result in results if isinstance(result, LayerUnavailable) and not result.maybe_sent]
    assert sent
    assert len(sent) + len(unsent) in (49, 50)  # one may have been under way
    assert {str(result) for result in unsent} == {"FragileBackend: no answer within 1 s to what was asked before"}
    backend.delay = 0.0
    await layer.group_send("room", MARKER)
    assert [number for number in await numbers(layer, channel) if number in sent] == sent
    assert layer.counters.gaps == 0


async def test_a_retry_with_the_same_key(start: Start, broker: Broker) -> None:
    """A send that failed is no reason to take the retry for a repeat; one that succeeded is."""
    layer = await start(broker.url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    await asyncio.to_thread(broker.kill)
    with pytest.raises(LayerUnavailable):
        await layer.group_send("room", MESSAGE, idempotency_key="k")
    await asyncio.to_thread(broker.bring_back)
    await healthy(layer)
    receipts = [await layer.group_send("room", MESSAGE, idempotency_key="k") for _ in range(2)]
    assert [receipt.duplicate for receipt in receipts] == [False, True]
    await layer.group_send("room", MARKER)
    assert await receive(layer, channel) == MESSAGE
    assert await receive(layer, channel) == MARKER


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_closing_without_the_broker(broker: Broker, lose: Callable[[Broker], None]) -> None:
    """A layer closes though its broker hangs or is gone, whether it has noticed or not; who waits is told."""
    for notices in (False, True):
        layer = BroadcasterLayer(broker.url, timeout=TIMEOUT)
        await layer.open()
        channel = await member(layer, *(f"room{number}" for number in range(20)))
        await asyncio.to_thread(lose, broker)
        if notices:
            await lost(layer)
        waiting = [
            asyncio.create_task(call)
            for call in (layer.group_send("room", MESSAGE), layer.group_add("new", channel), layer.receive(channel))
        ]
        await asyncio.sleep(0)
        async with asyncio.timeout(SOON):
            await layer.close()
            await asyncio.wait(waiting)
        assert {type(task.exception()) for task in waiting} == {LayerUnavailable}
        assert not layer.is_open
        assert not await layer.health()
        await asyncio.to_thread(broker.bring_back)
        await become(lambda: not tasks_of_layers(), "no task is left")


async def test_open_again(start: Start, broker: Broker) -> None:
    """A layer that was closed can be opened again, and so can one whose broker was not there."""
    layer = await start(broker.url, timeout=TIMEOUT)
    await layer.close()
    await asyncio.to_thread(broker.kill)
    with pytest.raises(LayerUnavailable):
        await layer.open()
    await asyncio.to_thread(broker.bring_back)
    await layer.open()
    channel = await member(layer, "room")
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE


@pytest.mark.parametrize("is_closed", [True, False])
def test_another_event_loop(redis_url: str, is_closed: bool) -> None:
    """A layer can be opened on a new event loop, also if the last one ended without its being closed."""
    layer = BroadcasterLayer(redis_url)

    async def run(*, closes: bool) -> None:
        await layer.open()
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        if closes:
            await layer.close()

    asyncio.run(run(closes=is_closed))
    asyncio.run(run(closes=is_closed))
    asyncio.run(run(closes=True))


async def test_tls(start: Start) -> None:
    """Redis over TLS, with redis-py's options in the URL."""
    with tls_server() as server:
        layer = await start(f"{server.url}?ssl_ca_certs={server.ca_path}")
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        await layer.close()


@pytest.mark.parametrize("scheme", ["redis", "postgres", "redis-stream"])
async def test_no_broker(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where no broker is, opening says so, and where it was looked for, without the password."""
    layer = BroadcasterLayer(f"{scheme}://me:s%C3%A9cret@127.0.0.1:{free_port()}/0?password=hush", timeout=TIMEOUT)
    with pytest.raises(
        LayerUnavailable, match=rf"{scheme}://me:\*\*\*@127\.0\.0\.1:\d+/0 can't be reached: .+"
    ) as told:
        await layer.open()
    said = f"{told.value}{caplog.text}{layer!r}"
    assert not any(secret in said for secret in ("s%C3%A9cret", "sécret", "hush"))
    assert not layer.is_open


async def test_a_broker_that_hangs(postgres: PostgresBroker, redis_url: str, redis_server: RedisServer) -> None:
    """A broker that takes the connection and says nothing is no broker."""
    for broker in (postgres, RedisBroker(redis_server)):
        await asyncio.to_thread(broker.freeze)
        with pytest.raises(LayerUnavailable, match="can't be reached"):
            await BroadcasterLayer(broker.url, timeout=TIMEOUT).open()
        await asyncio.to_thread(broker.bring_back)


async def test_wrong_credentials(postgres: PostgresBroker) -> None:
    """Credentials that the broker doesn't take are a setting that is wrong, which is said at once."""
    with redis7("--requirepass", "right") as server:
        urls = [server.url.replace("right", "wrong"), postgres.url.replace("postgres@", "nobody:wrong@")]
        for url in urls:
            with pytest.raises(SettingsError, match="does not take these credentials") as told:
                await BroadcasterLayer(url).open()
            assert "wrong" not in str(told.value)


async def test_rights_that_are_missing(start: Start, redis_url: str, redis_server: RedisServer) -> None:
    """A group that Redis lets nobody hear is refused with what Redis says, and all else goes on."""
    rights = ["reset", "on", ">secret", "+@all", "&fc.node.*", "&fc.probe.*"]
    ask(redis_server, "ACL", "SETUSER", "chat", *rights)
    layer = await start(redis_url.replace("redis://", "redis://chat:secret@"))
    channel = await layer.new_channel()
    for call in (layer.group_add("room", channel), layer.group_send("room", MESSAGE)):
        with pytest.raises(LayerUnavailable, match=r"(?i)no permissions"):
            await call
    ask(redis_server, "ACL", "SETUSER", "chat", "&fc.*")
    await layer.group_add("room", channel)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    assert layer.counters.gaps == 0
    await layer.close()
    ask(redis_server, "ACL", "DELUSER", "chat")


async def test_standing_still(start: Start, broker: Broker) -> None:
    """A process that stood still while it waited for an answer takes it, late as it is."""
    layer = await start(broker.url, timeout=TIMEOUT)
    channel = await member(layer, "room")
    for number in range(3):
        sending = asyncio.create_task(layer.group_send("room", {"type": "x", "number": number}))
        for _ in range(number + 1):
            await asyncio.sleep(0)
        time.sleep(TIMEOUT + 0.2)  # noqa: ASYNC251
        await sending
        assert (await receive(layer, channel))["number"] == number
    assert layer.counters.gaps == 0


async def test_time_flies(start: Start, forward: Forward) -> None:
    """A process that stood still for long has not lost its broker."""
    layer = await start("memory://")
    channel = await member(layer, "room")
    for _ in range(5):
        forward(100)
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        assert await layer.health()
    assert layer.counters.gaps == 0


# Broadcasts and backends that were handed in


async def test_a_broadcast_that_is_connected_stays_so(start: Start, broker: Broker) -> None:
    """A Broadcast that was connected before is neither connected anew nor disconnected, and works on after."""
    async with Broadcast(broker.url) as broadcast, broadcast.subscribe("mine") as mine:
        layer = await start(broadcast)
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        await layer.close()
        await broadcast.publish("mine", "still here")
        async with asyncio.timeout(SOON):
            assert (await mine.get()).message == "still here"


async def test_a_broadcast_that_is_not_connected(start: Start, broker: Broker) -> None:
    """A Broadcast that was not connected is connected and disconnected with the layer, as often as that is opened."""
    layer = await start(Broadcast(broker.url))
    for _ in range(3):
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
        await layer.close()
        await layer.open()


async def test_a_listener_that_dies_unseen(start: Start, redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The listener of broadcaster's own Redis backend dies of what is no text; the layer hears that, and mends it."""
    layer = await start(Broadcast(redis_url), timeout=TIMEOUT)
    channel = await member(layer, "room")
    async with Redis.from_url(redis_url) as redis:
        await redis.publish(layer._group_address("room"), b"\xff")
    await gap(layer)
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    assert losses(caplog) == ["lost", "again"]


async def test_a_listener_that_is_the_users(start: Start, redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A Broadcast that is the user's is not touched when it is deaf; the layer waits until it hears again."""
    broadcast = Broadcast(redis_url)
    await broadcast.connect()
    layer = await start(broadcast, timeout=TIMEOUT)
    channel = await member(layer, "room")
    async with Redis.from_url(redis_url) as redis:
        await redis.publish(layer._group_address("room"), b"\xff")
    await lost(layer)
    with pytest.raises(LayerUnavailable):
        await layer.group_send("room", MESSAGE)
    await broadcast.disconnect()
    await broadcast.connect()
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    assert layer.counters.gaps == 1
    assert losses(caplog) == ["lost", "again"]
    await layer.close()
    await broadcast.disconnect()


class FragileBackend(BroadcastBackend):
    """Carries within the process, and fails when it is told to."""

    def __init__(self) -> None:
        self.subscribed: set[str] = set()
        self.published: asyncio.Queue[Event] = asyncio.Queue()
        self.calls = 0
        #: What goes wrong: the name of a method, and what it raises; None to hang.
        self.wrong: dict[str, Exception | None] = {}
        self.refused = ""
        #: How long a call takes, in seconds.
        self.delay = 0.0

    async def called(self, method: str) -> None:
        # No other call may be under way, as with asyncpg's connections.
        self.calls += 1
        assert self.calls == 1
        try:
            await asyncio.sleep(self.delay)
            if method in self.wrong:
                error = self.wrong[method]
                if error is not None:
                    raise error
                await asyncio.Event().wait()
        finally:
            self.calls -= 1

    @override
    async def connect(self) -> None:
        self.published = asyncio.Queue()
        self.subscribed = set()
        await self.called("connect")

    @override
    async def disconnect(self) -> None:
        await self.called("disconnect")

    @override
    async def subscribe(self, group: str) -> None:
        await self.called("subscribe")
        self.subscribed.add(group)

    @override
    async def unsubscribe(self, group: str) -> None:
        await self.called("unsubscribe")
        self.subscribed.discard(group)

    @override
    async def publish(self, channel: str, message: Any) -> None:
        if self.refused and self.refused in message:
            raise ValueError("not this one")
        await self.called("publish")
        self.published.put_nowait(Event(channel, message))

    @override
    async def next_published(self) -> Event:
        while True:
            if "next_published" in self.wrong and (error := self.wrong["next_published"]) is not None:
                raise error
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    event = await self.published.get()
                    if event.channel in self.subscribed and "next_published" not in self.wrong:
                        return event


class Broken(Exception):
    """What a backend raises."""


@pytest.mark.parametrize("error", [Broken("it broke"), None], ids=["raises", "hangs"])
@pytest.mark.parametrize("method", ["next_published", "publish"])
async def test_a_backend_that_fails(
    start: Start, method: str, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever fails in a backend, and however, the layer notices and goes on when it works again."""
    backend = FragileBackend()
    layer = await start(backend, timeout=0.2)
    channel = await member(layer, "room")
    backend.wrong[method] = error
    await lost(layer)
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable):
            await layer.group_send("room", MESSAGE)
    backend.wrong.clear()
    await healthy(layer)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    assert layer.counters.gaps == 1
    assert losses(caplog) == ["lost", "again"]


@pytest.mark.parametrize("error", [Broken("it broke"), None], ids=["raises", "hangs"])
@pytest.mark.parametrize("method", ["disconnect", "unsubscribe"])
async def test_a_backend_that_does_not_let_go(start: Start, method: str, error: Exception | None) -> None:
    """A backend that can't unsubscribe or disconnect is left alone in the end; nothing that matters to others fails."""
    backend = FragileBackend()
    layer = await start(backend, timeout=0.2)
    channel = await member(layer, "room", "other")
    backend.wrong[method] = error
    await layer.group_discard("room", channel)
    async with asyncio.timeout(SOON):
        await layer.close()


@pytest.mark.parametrize("error", [Broken("it broke"), None], ids=["raises", "hangs"])
async def test_a_subscription_that_fails(start: Start, error: Exception | None) -> None:
    """A channel whose subscription fails is no member, is told so, and can try again."""
    backend = FragileBackend()
    layer = await start(backend, timeout=1.0)
    channel = await layer.new_channel()
    backend.wrong["subscribe"] = error
    with pytest.raises(LayerUnavailable, match="it broke" if error else "no answer within 1 s"):
        await layer.group_add("room", channel)
    assert list(layer.groups_of(channel)) == []
    backend.wrong.clear()
    await healthy(layer)
    await layer.group_add("room", channel)
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE


async def test_a_message_that_is_refused(start: Start) -> None:
    """A broker that refuses one message is not lost; the sender is told, and the next message goes through."""
    backend = FragileBackend()
    layer = await start(backend)
    channel = await member(layer, "room")
    backend.refused = "wicked"
    with pytest.raises(LayerUnavailable, match="FragileBackend: not this one") as told:
        await layer.group_send("room", {"type": "wicked"})
    assert told.value.maybe_sent
    await layer.group_send("room", MARKER)
    assert await receive(layer, channel) == MARKER
    assert layer.counters.gaps == 0


async def test_one_call_at_a_time(start: Start) -> None:
    """The backend never has two calls to do at once, whatever is asked of the layer."""
    layer = await start(FragileBackend(), timeout=2)

    async def work(name: int) -> None:
        for number in range(10):
            channel = await member(layer, f"room{name}")
            await layer.group_send(f"room{name}", {"type": "x", "number": number})
            assert (await receive(layer, channel))["number"] == number
            await layer.detach(channel)

    await asyncio.gather(*(work(name) for name in range(10)))
    assert layer.counters.gaps == 0


async def test_messages_that_are_no_text(start: Start) -> None:
    """A backend that gives something else than text is not understood, and goes on being heard."""
    backend = FragileBackend()
    layer = await start(backend)
    channel = await member(layer, "room")
    for message in (b"1m{}", None, 7, "\ud800"):
        backend.published.put_nowait(Event(layer._group_address("room"), message))  # type: ignore[arg-type]
    await layer.group_send("room", MARKER)
    assert await receive(layer, channel) == MARKER
    assert layer.counters.unreadable == 4


# Settings


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("", "not a URL of broadcaster"),
        ("hush", "not a URL of broadcaster"),
        ("hush://me:hush@host", "not a URL of broadcaster; it has kafka://, memory://"),
        ("redis://me:hush@host:port/0", r"redis://me:\*\*\*@host:port/0: not a URL"),
        ("redis://me:h/ush@host:1/0", "percent-encoded"),
        ("redis://me:h#ush@host:1/0", "percent-encoded"),
        ("redis://me:hush@host:1/0?hushness=1", "not a URL|hushness"),
        (b"memory://", "a URL, a Broadcast, or a backend of one, not a bytes"),
        (None, "not a NoneType"),
        (7, "not a int"),
    ],
)
def test_what_is_no_broadcast(given: Any, match: str) -> None:
    """What nothing can be made of is refused, in words without the password."""
    with pytest.raises(ValueError, match=match) as told:
        BroadcasterLayer(given)
    assert "hush" not in str(told.value).replace("hushness", "")
    assert "h/ush" not in str(told.value)


def test_options_that_are_wrong() -> None:
    with pytest.raises(ValueError, match="timeout is more than 0 seconds, not 0"):
        BroadcasterLayer("memory://", timeout=0)
    with pytest.raises(ValueError, match="capacity is at least 1"):
        BroadcasterLayer("memory://", capacity=0)
    with pytest.raises(ValueError, match="a group or channel name"):
        BroadcasterLayer("memory://", prefix="{}")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("postgres://host/db", "asyncpg", "postgres"),
        ("kafka://host", "aiokafka", "kafka"),
        ("redis://host", "redis", "redis"),
        ("redis-stream://host", "redis", "redis"),
    ],
)
def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str) -> None:
    """A URL whose package isn't installed is refused with what is to be installed."""
    for name in list(sys.modules):
        if name.startswith((f"{package}.", "broadcaster._backends.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    with pytest.raises(ValueError, match=rf"needs {package}.*: pip install 'broadcaster\[{extra}\]'"):
        BroadcasterLayer(url)


async def test_from_settings() -> None:
    """A URL in the settings makes the layer, with the settings' capacity and expiry."""
    layer = make_layer("broadcaster+memory://", capacity=7, expiry=3.0)
    assert isinstance(layer, BroadcasterLayer)
    assert (layer.capacity, layer.expiry) == (7, 3.0)
    async with layer:
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE
