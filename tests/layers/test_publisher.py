"""Sending from processes that have no application, to those that have one, over a real server."""

import asyncio
import gc
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from itertools import count
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio
import pytest
from cryptography.fernet import Fernet
from fastapi import FastAPI
from pydantic import BaseModel

from fastapi_channels import add_channel
from fastapi_channels.consumers import JsonConsumer, event
from fastapi_channels.exceptions import (
    ChannelFull,
    InvalidGroupName,
    InvalidMessage,
    LayerUnavailable,
    SettingsError,
)
from fastapi_channels.layers import AsyncPublisher, MemoryLayer, Publisher, Receipt, RedisLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import RedisServer, connect
from tests.brokers import Cluster, Sentinels, ask
from tests.conftest import until

#: For whatever waits for another process.
DEADLINE = 30.0

#: For the thread of a Publisher.
THREAD = "fastapi-channels-publisher"

PASSWORD = "hunter2:/?#@%é"


class Said(BaseModel):
    type: Literal["chat.said"] = "chat.said"
    text: str


class Listener:
    """Is in a group, on a layer of its own, and collects what comes."""

    def __init__(self, layer: RedisLayer, group: str, channel: str) -> None:
        self.layer = layer
        self.group = group
        self.channel = channel
        self._markers = count()

    async def heard(self) -> list[dict[str, Any]]:
        """What has come since the last time, up to what is sent now."""
        marker = {"type": "marker", "number": next(self._markers)}
        await self.layer.group_send(self.group, marker)
        messages = []
        async with asyncio.timeout(DEADLINE):
            while (message := await self.layer.receive(self.channel)) != marker:
                messages.append(message)
        return messages

    async def numbers(self) -> list[Any]:
        """The same, where only the number of each message counts."""
        return [message["n"] for message in await self.heard()]


@asynccontextmanager
async def listening(url: str, group: str = "news", **config: Any) -> AsyncIterator[Listener]:
    """Somebody in the group, as in another process."""
    async with RedisLayer(url, **{"capacity": 10_000, **config}) as layer:
        channel = await layer.new_channel()
        await layer.group_add(group, channel)
        yield Listener(layer, group, channel)


async def done(result: Any) -> Any:
    """What a method has returned, of the blocking twin or of the other one."""
    return await result if inspect.isawaitable(result) else result


@asynccontextmanager
async def entered(publisher: Any) -> AsyncIterator[Any]:
    """The publisher as a context manager of its kind."""
    if isinstance(publisher, Publisher):
        with publisher as same:
            yield same
    else:
        async with publisher as same:
            yield same


@asynccontextmanager
async def closing_late(publisher: AsyncPublisher) -> AsyncIterator[AsyncPublisher]:
    """Leave the connecting to the first send."""
    try:
        yield publisher
    finally:
        await publisher.close()


def redis_layer(url: str, **config: Any) -> dict[str, Any]:
    """An entry of CHANNEL_LAYERS."""
    return {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": url, **config}}


def said(number: Any) -> dict[str, Any]:
    return {"type": "said", "n": number}


def connections(server: RedisServer) -> list[dict[str, str]]:
    """What CLIENT LIST tells of each connection but the one that asks."""
    lines = [dict(word.split("=", 1) for word in line.split()) for line in ask(server, "CLIENT", "LIST").splitlines()]
    return [line for line in lines if line["cmd"] != "client|list"]


async def healthy(layer: RedisLayer, *, is_so: bool = True) -> None:
    """Wait until all is well with the layer, or not so."""
    async with asyncio.timeout(DEADLINE):
        for _ in count():
            if bool(await layer.health()) is is_so:
                return
            await asyncio.sleep(0.005)


def threads() -> list[threading.Thread]:
    """Those of publishers."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(params=[Publisher, AsyncPublisher], ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    """Which of the twins."""
    return request.param


@pytest.fixture
async def publisher(kind: Any, redis_url: str) -> AsyncIterator[Any]:
    made = kind(redis_url)
    yield made
    await done(made.close())


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server of the test's own, to be killed, and asked for its connections."""
    with RedisServer(binary=redis_server.binary) as server:
        yield server


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    deadline = time.monotonic() + 5
    while (left := set(threads()) - set(before)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not left


# What it sends


async def test_members_of_other_processes(publisher: Any, redis_url: str) -> None:
    """A group_send reaches the members on every layer there is, and returns a Receipt as a layer's does."""
    async with listening(redis_url) as one, listening(redis_url) as two, listening(redis_url, "others") as other:
        assert await done(publisher.group_send("news", said("é 🎉"))) == Receipt()
        await done(publisher.group_send("news", Said(text="\0")))
        expected = [said("é 🎉"), {"type": "chat.said", "text": "\0"}]
        assert await one.heard() == await two.heard() == expected
        assert await other.heard() == []


async def test_a_group_that_nobody_is_in(publisher: Any) -> None:
    """Sending to an empty group is no error."""
    assert await done(publisher.group_send("nobody's", said(1))) == Receipt()


async def test_consumers(kind: Any, redis_url: str) -> None:
    """The clients of an application get what is sent: to their handlers, as frames, and closes."""

    class Room(JsonConsumer):
        groups = ["news"]
        forward_events = ["said"]

        @event("chat.said")
        async def on_said(self, message: Said) -> None:
            await self.send_json({"handled": message.text})

    app = FastAPI()
    add_channel(app, channel_layers={"default": redis_url})
    app.include_router(ConsumerRouter([route("/ws", Room)]))
    async with connect(app, "/ws") as ws, entered(kind(redis_url)) as publisher:
        await done(publisher.group_send("news", Said(text="é")))
        await done(publisher.group_send("news", said(1)))
        await done(publisher.group_send("news", {"type": "websocket.send", "bytes": b"\xff"}))
        await done(publisher.group_send("news", {"type": "websocket.close", "code": 4600, "reason": "é"}))
        assert await ws.receive_json(DEADLINE) == {"handled": "é"}
        assert await ws.receive_json(DEADLINE) == said(1)
        assert await ws.receive_bytes(DEADLINE) == b"\xff"
        assert await ws.closed(DEADLINE) == (4600, "é")


async def test_exclude(publisher: Any, redis_url: str) -> None:
    """The members in `exclude` don't get it; one name where a collection should be is an error."""
    async with listening(redis_url) as one, listening(redis_url) as two:
        await done(publisher.group_send("news", said(1), exclude=[one.channel]))
        await done(publisher.group_send("news", said(2), exclude={one.channel, two.channel, "no.such!channel"}))
        with pytest.raises(TypeError, match="exclude is a collection"):
            await done(publisher.group_send("news", said(3), exclude=one.channel))
        assert await one.numbers() == []
        assert await two.numbers() == [1]


async def test_idempotency(publisher: Any, redis_url: str) -> None:
    """The same key again for the same group sends nothing, whoever of all senders says it."""
    async with listening(redis_url) as news, listening(redis_url, "other") as other:
        assert await done(publisher.group_send("news", said(1), idempotency_key="é\n")) == Receipt()
        assert await done(publisher.group_send("news", said(2), idempotency_key="é\n")) == Receipt(duplicate=True)
        assert await news.layer.group_send("news", said(3), idempotency_key="é\n") == Receipt(duplicate=True)
        with Publisher(redis_url) as again:
            assert again.group_send("news", said(4), idempotency_key="é\n") == Receipt(duplicate=True)
        assert await done(publisher.group_send("other", said(5), idempotency_key="é\n")) == Receipt()
        assert await done(publisher.group_send("news", said(6), idempotency_key="")) == Receipt()
        assert await news.numbers() == [1, 6]
        assert await other.numbers() == [5]


async def test_one_channel(publisher: Any, redis_url: str) -> None:
    """A send reaches the one channel of another process, and a channel that is no more is no error."""
    async with listening(redis_url) as one, listening(redis_url) as two:
        await done(publisher.send(one.channel, said(1)))
        await one.layer.detach(await one.layer.new_channel())
        for gone in ("specific.0123456789ab!1", one.channel.rpartition("!")[0] + "!ffff"):
            await done(publisher.send(gone, said(2)))
        async with asyncio.timeout(DEADLINE):
            assert await one.layer.receive(one.channel) == said(1)
        assert await one.heard() == await two.heard() == []


async def test_a_named_queue(publisher: Any, redis_url: str) -> None:
    """A send to a name without ! lies in the queue of that name until somebody reads it."""
    for number in range(3):
        await done(publisher.send("jobs", said(number)))
    async with RedisLayer(redis_url) as layer, asyncio.timeout(DEADLINE):
        assert [await layer.receive("jobs") for _ in range(3)] == [said(0), said(1), said(2)]


async def test_a_queue_that_is_full(kind: Any, redis_url: str) -> None:
    """A queue takes as many messages as the capacity that is configured."""
    async with entered(kind(redis_layer(redis_url, capacity=2))) as publisher:
        for number in range(2):
            await done(publisher.send("jobs", said(number)))
        with pytest.raises(ChannelFull):
            await done(publisher.send("jobs", said(2)))


@pytest.mark.parametrize(
    ("name", "message", "error"),
    [
        ("", said(1), InvalidGroupName),
        ("x" * 201, said(1), InvalidGroupName),
        ("a{b}", said(1), InvalidGroupName),
        (5, said(1), InvalidGroupName),
        ("news", {}, InvalidMessage),
        ("news", {"type": ""}, InvalidMessage),
        ("news", ["type"], InvalidMessage),
        ("news", None, InvalidMessage),
        ("news", {"type": "x", "o": object()}, InvalidMessage),
        ("news", {"type": "x", "text": "\ud800"}, InvalidMessage),
    ],
    ids=repr,
)
async def test_what_can_not_be_sent(
    kind: Any, publisher: Any, redis_url: str, name: Any, message: Any, error: type[Exception]
) -> None:
    """A bad name or message is told as by a layer, even with no server at all, and nothing is sent."""
    away = kind("redis://127.0.0.1:1/0")
    async with listening(redis_url) as listener:
        for each in (away, publisher):
            with pytest.raises(error):
                await done(each.group_send(name, message))
            with pytest.raises(error):
                await done(each.send(name, message))
        assert await listener.heard() == []
    await done(away.close())


async def test_the_layers_configuration(kind: Any, redis_url: str) -> None:
    """Prefix, keys and serializer are those of the application, and with others nothing is heard."""
    config: dict[str, Any] = {
        "prefix": "é",
        "encryption_keys": [Fernet.generate_key().decode()],
        "serializer": "pickle",
    }
    async with listening(redis_url, **config) as listener, entered(kind(redis_layer(redis_url, **config))) as publisher:
        await done(publisher.group_send("news", said(1)))
        others: list[dict[str, Any]] = [
            {"prefix": "e"},
            {"encryption_keys": [Fernet.generate_key()]},
            {"encryption_keys": []},
        ]
        for changed in others:
            async with entered(kind(redis_layer(redis_url, **{**config, **changed}))) as other:
                await done(other.group_send("news", said(2)))
        assert await listener.numbers() == [1]


async def test_a_serializer_that_can_not(kind: Any, redis_url: str) -> None:
    """A serializer that can't write the message makes it an invalid one."""

    def dumps(message: dict[str, Any]) -> bytes:
        raise KeyError("no")

    for serializer in ("json", SimpleNamespace(dumps=dumps, loads=lambda data: {})):  # json makes str
        async with entered(kind(redis_layer(redis_url, serializer=serializer))) as publisher:
            with pytest.raises(InvalidMessage, match="the serializer can't write the message 'said'"):
                await done(publisher.group_send("news", said(1)))


async def test_databases(kind: Any, redis_url: str) -> None:
    """A publisher on another database of the same server is not heard."""
    async with listening(redis_url) as listener, entered(kind(redis_url.removesuffix("/0") + "/1")) as publisher:
        await done(publisher.group_send("news", said(1)))
        assert await listener.heard() == []


# Order


async def test_order(publisher: Any, redis_url: str) -> None:
    """What one sender sends arrives in that order, of whatever kind the sends are."""
    async with listening(redis_url) as listener:
        for number in range(300):
            key = f"{number}" if number % 3 == 0 else None
            exclude = ["no.such!channel"] if number % 5 == 0 else []
            await done(publisher.group_send("news", said(number), exclude=exclude, idempotency_key=key))
        assert await listener.numbers() == list(range(300))


@pytest.mark.parametrize("size", [1, 30_000])
async def test_order_of_sends_that_are_not_awaited(redis_url: str, size: int) -> None:
    """Sends that were begun one after another arrive in that order, also when the first of them still connects."""
    async with listening(redis_url) as listener, closing_late(AsyncPublisher(redis_url)) as publisher:
        for _ in range(2):
            sends = [publisher.group_send("news", said(n) | {"text": "x" * size}) for n in range(300)]
            await asyncio.gather(*sends)
            assert await listener.numbers() == list(range(300))
            await publisher.close()


async def test_order_while_it_connects(redis_url: str) -> None:
    """A send that begins at any moment of the connecting does not overtake those that began before."""
    async with listening(redis_url) as listener, closing_late(AsyncPublisher(redis_url)) as publisher:
        for _ in range(20):
            tasks: list[asyncio.Task[Receipt]] = []
            while not (tasks and tasks[0].done()):
                tasks.append(asyncio.create_task(publisher.group_send("news", said(len(tasks)))))
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)
            assert await listener.numbers() == list(range(len(tasks)))
            await publisher.close()


async def test_the_first_send_is_cancelled(redis_url: str) -> None:
    """When the send that connects is cancelled, those that waited for its connection make one of their own."""
    async with listening(redis_url) as listener, closing_late(AsyncPublisher(redis_url)) as publisher:
        for turns in range(8):
            tasks = [asyncio.create_task(publisher.group_send("news", said(n))) for n in range(20)]
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[0].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert answers[1:] == [Receipt()] * 19
            assert [number for number in await listener.numbers() if number > 0] == list(range(1, 20))
            await publisher.close()


async def test_a_send_that_is_given_up(server: RedisServer) -> None:
    """A send that waits for the connection of another one can be given up at any time, and disturbs nobody."""
    async with closing_late(AsyncPublisher(redis_layer(server.url, timeout=DEADLINE))) as publisher:
        server.pause()
        first = asyncio.create_task(publisher.group_send("news", said(1)))
        given_up = [asyncio.create_task(publisher.group_send("news", said(2))) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in given_up:
            task.cancel()
        async with asyncio.timeout(DEADLINE / 2):
            await asyncio.wait(given_up)
        assert all(task.cancelled() for task in given_up)
        last = asyncio.create_task(publisher.group_send("news", said(3)))
        server.resume()
        assert (await first, await last) == (Receipt(), Receipt())


async def test_many_threads(redis_url: str) -> None:
    """Any number of threads share a Publisher, from the first send on; the messages of each keep their order."""
    sender = Publisher(redis_url)
    begin = threading.Barrier(16)

    def work(thread: int) -> None:
        begin.wait(DEADLINE)
        for number in range(25):
            sender.group_send("news", said([thread, number]))

    async with listening(redis_url) as listener:
        with ThreadPoolExecutor(16) as pool, closing(sender):
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(pool, work, n) for n in range(16)))
            assert len(threads()) == 1
        numbers = await listener.numbers()
    assert len(numbers) == 16 * 25
    for thread in range(16):
        assert [number for sender, number in numbers if sender == thread] == list(range(25))


# Connections


async def test_one_connection(kind: Any, server: RedisServer) -> None:
    """It holds one connection, from entering or the first send on until it is closed, and subscribes to nothing."""
    publisher = kind(server.url)
    assert connections(server) == []
    for _ in range(2):
        for number in range(20):
            await done(publisher.group_send("news", said(number)))
            await done(publisher.send("specific.0123456789ab!1", said(number)))
        (connection,) = connections(server)
        assert connection["sub"] == connection["psub"] == connection.get("ssub", "0") == "0"
        assert connection["cmd"] in ("publish", "ping")
        await done(publisher.close())
        await until(lambda: not connections(server), DEADLINE)
    async with entered(publisher) as same:
        assert same is publisher
        assert len(connections(server)) == 1
        await done(publisher.group_send("news", said(1)))
    await until(lambda: not connections(server), DEADLINE)


async def test_closing(kind: Any, redis_url: str) -> None:
    """It may be closed unused, again and again, inside of its block, and is of use again afterwards."""
    publisher = kind(redis_url)
    await done(publisher.close())
    async with listening(redis_url) as listener:
        async with entered(publisher):
            await done(publisher.group_send("news", said(1)))
            await done(publisher.close())
            await done(publisher.close())
            await done(publisher.group_send("news", said(2)))
        await done(publisher.group_send("news", said(3)))
        async with entered(publisher), entered(publisher):
            await done(publisher.group_send("news", said(4)))
        await done(publisher.close())
        assert await listener.numbers() == [1, 2, 3, 4]


async def test_an_error_in_its_block(kind: Any, server: RedisServer) -> None:
    """An error in the block is passed on, and the publisher is closed."""
    with pytest.raises(KeyError, match="own"):
        async with entered(kind(server.url)):
            raise KeyError("own")
    await until(lambda: not connections(server), DEADLINE)


async def test_closing_while_others_send_on_the_loop(server: RedisServer) -> None:
    """Sends at the time of a close are carried out or raise LayerUnavailable; nobody hangs, no connection is left."""
    publisher = AsyncPublisher(server.url)
    async with asyncio.timeout(DEADLINE):
        for turns in range(40):
            send = publisher.group_send("news", said(0))
            first = asyncio.create_task(publisher.group_send("news", said(1)))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            answers = await asyncio.gather(
                publisher.close(),
                send,
                publisher.close(),
                publisher.group_send("news", said(2)),
                first,
                return_exceptions=True,
            )
            assert all(answer is None or isinstance(answer, Receipt | LayerUnavailable) for answer in answers)
        assert await publisher.group_send("news", said(3)) == Receipt()
    assert len(connections(server)) == 1
    await publisher.close()
    await until(lambda: not connections(server), DEADLINE)


async def test_closing_while_other_threads_send(server: RedisServer) -> None:
    """A Publisher that one thread closes loses nothing of what others send meanwhile."""
    publisher = Publisher(server.url)
    sent = [0] * 8
    is_over = threading.Event()

    def work(thread: int) -> None:
        while not is_over.is_set():
            publisher.group_send("news", said([thread, sent[thread]]))
            sent[thread] += 1

    async with listening(server.url) as listener:
        with ThreadPoolExecutor(8) as pool:
            working = [asyncio.get_running_loop().run_in_executor(pool, work, thread) for thread in range(8)]
            for _ in range(40):
                await asyncio.to_thread(publisher.close)
            is_over.set()
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*working)
        publisher.close()
        numbers = await listener.numbers()
        for thread in range(8):
            assert [number for sender, number in numbers if sender == thread] == list(range(sent[thread]))
        assert sum(sent) > 0
    await until(lambda: not connections(server), DEADLINE)


async def test_a_running_event_loop(redis_url: str) -> None:
    """A Publisher blocks the event loop that it is called on, and works."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with listening(redis_url) as listener:
        counting = asyncio.create_task(count_turns())
        with Publisher(redis_url) as publisher:
            for number in range(10):
                assert publisher.group_send("news", said(number)) == Receipt()
        assert turns == 0
        counting.cancel()
        assert await listener.numbers() == list(range(10))


def test_one_event_loop_after_another(redis_url: str) -> None:
    """An AsyncPublisher may be used on one event loop and then on another, whether it was closed in between or not."""
    publisher = AsyncPublisher(redis_url)

    async def talk(number: int) -> None:
        await asyncio.gather(*(publisher.send("jobs", said([number, n])) for n in range(3)))
        if number % 2:
            await publisher.close()

    async def collect() -> list[Any]:
        async with RedisLayer(redis_url) as layer, asyncio.timeout(DEADLINE):
            return [(await layer.receive("jobs"))["n"] for _ in range(12)]

    for number in range(4):
        asyncio.run(talk(number))
    assert asyncio.run(collect()) == [[number, n] for number in range(4) for n in range(3)]


@pytest.mark.filterwarnings("error")
def test_making_one_connects_to_nothing() -> None:
    """Making a publisher, for whatever kind of server, needs no event loop, connects to nothing and leaves nothing."""
    urls = [
        "redis://127.0.0.1:1/0",
        "rediss://127.0.0.1:1/0",
        "unix:///nowhere",
        "redis+sentinel://127.0.0.1:1,127.0.0.1:2/fc/0",
        "redis+cluster://127.0.0.1:1,127.0.0.1:2",
    ]
    for url in urls:
        Publisher(url).close()
        Publisher(url)
        AsyncPublisher(url)
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("brokers", [Sentinels, Cluster])
async def test_several_servers(kind: Any, brokers: Any) -> None:
    """It sends over a Cluster, and over the primary that the Sentinels name."""
    groups = [f"news.{number}" for number in range(12)]
    with brokers() as started:
        async with RedisLayer(started.url) as layer, entered(kind(started.url)) as publisher:
            channel = await layer.new_channel()
            for group in groups:
                await layer.group_add(group, channel)
            for group in groups:
                await done(publisher.group_send(group, said(group)))
            async with asyncio.timeout(DEADLINE):
                heard = [(await layer.receive(channel))["n"] for _ in groups]
            assert sorted(heard) == sorted(groups)


async def test_one_that_is_forgotten(server: RedisServer) -> None:
    """A Publisher that nobody has any more ends its thread and its connection by itself."""
    for number in range(3):
        assert Publisher(server.url).group_send("news", said(number)) == Receipt()
    gc.collect()
    await until(lambda: not threads() and not connections(server), DEADLINE)


def test_nothing_is_left_of_each_use(redis_url: str) -> None:
    """A Publisher for life that is entered for each job does not grow with their number."""

    def loops() -> int:
        gc.collect()
        return sum(isinstance(thing, asyncio.AbstractEventLoop) for thing in gc.get_objects())

    publisher = Publisher(redis_url)
    before = loops()
    for number in range(10):
        with publisher:
            publisher.group_send("news", said(number))
    assert loops() <= before + 1


# The server goes away


async def test_a_server_that_was_killed_and_restarted(kind: Any, server: RedisServer) -> None:
    """When the server is back, sends reach the members again, by the same publisher."""
    publisher = kind(redis_layer(server.url, timeout=1.0))
    async with listening(server.url, timeout=1.0) as listener, entered(publisher):
        for number in range(3):
            server.kill()
            await healthy(listener.layer, is_so=False)  # else it might not have noticed: a Publisher blocks it
            with pytest.raises(LayerUnavailable):
                await done(publisher.group_send("news", said("never")))
            server.restart()
            await _sent_again(publisher, said("who knows"))
            await healthy(listener.layer)
            await done(publisher.group_send("news", said(number)))
            assert (await listener.numbers())[-1] == number


async def _sent_again(publisher: Any, message: dict[str, Any]) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await done(publisher.group_send("news", message))
                return
            except LayerUnavailable:
                await asyncio.sleep(0.005)


async def test_a_short_absence_is_waited_for(kind: Any, server: RedisServer) -> None:
    """A send that waits for the server is carried out when that is back within the timeout."""
    async with entered(kind(redis_layer(server.url, timeout=DEADLINE))) as publisher:
        await done(publisher.group_send("news", said(1)))
        server.kill()
        await until(lambda: not server.is_running, DEADLINE)
        restarting = threading.Timer(0.3, server.restart)
        restarting.start()
        try:
            await _sent_again(publisher, said(2))  # the first may be lost with the connection
            await done(publisher.send("jobs", said(3)))
        finally:
            restarting.join()
        async with RedisLayer(server.url) as layer, asyncio.timeout(DEADLINE):
            assert await layer.receive("jobs") == said(3)


async def test_no_server(kind: Any, redis_server: RedisServer) -> None:
    """With the server away from the start a send says so, without the password, and the next one tries again."""
    with RedisServer(binary=redis_server.binary, options=["--requirepass", PASSWORD]) as server:
        server.kill()
        publisher = kind(redis_layer(server.url, timeout=0.2))
        for attempt in (publisher.group_send, publisher.send):
            with pytest.raises(LayerUnavailable) as caught:
                await done(attempt("jobs", said("never")))
            _tells_where_but_not_the_password(caught.value, server)
            assert not caught.value.maybe_sent
        with pytest.raises(LayerUnavailable) as caught:
            async with entered(publisher):
                pass
        _tells_where_but_not_the_password(caught.value, server)
        server.restart()
        await done(publisher.send("jobs", said("later")))
        async with RedisLayer(server.url) as layer, asyncio.timeout(DEADLINE):
            assert await layer.receive("jobs") == said("later")
        await done(publisher.close())


async def test_a_server_that_goes(kind: Any, redis_server: RedisServer) -> None:
    """With the server gone after the first send another says so, without the password."""
    with RedisServer(binary=redis_server.binary, options=["--requirepass", PASSWORD]) as server:
        async with entered(kind(redis_layer(server.url, timeout=0.2))) as publisher:
            await done(publisher.group_send("news", said(1)))
            server.kill()
            for _ in range(3):
                with pytest.raises(LayerUnavailable) as caught:
                    await done(publisher.group_send("news", said(2)))
                _tells_where_but_not_the_password(caught.value, server)


def _tells_where_but_not_the_password(error: LayerUnavailable, server: RedisServer) -> None:
    assert f"127.0.0.1:{server.port}" in str(error)
    one: BaseException | None = error
    while one is not None:
        assert "hunter2" not in str(one)
        assert "hunter2" not in repr(one)
        one = one.__cause__ or one.__context__


async def test_many_sends_with_no_server(kind: Any) -> None:
    """Sends that wait for the same server, in threads or not awaited, do not wait for each other's timeouts."""
    publisher = kind(redis_layer("redis://127.0.0.1:1/0", timeout=0.5))
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(40) as pool:
        if kind is Publisher:
            sends = [loop.run_in_executor(pool, publisher.group_send, "news", said(n)) for n in range(40)]
        else:
            sends = [publisher.group_send("news", said(n)) for n in range(40)]
        async with asyncio.timeout(10):  # one after another they would take twice as long
            answers = await asyncio.gather(*sends, return_exceptions=True)
    assert {type(answer) for answer in answers} == {LayerUnavailable}
    await done(publisher.close())


async def test_a_server_that_hangs(kind: Any, server: RedisServer) -> None:
    """A server that answers nothing counts as gone after the timeout: what was written may have been sent."""
    async with listening(server.url) as listener, entered(kind(redis_layer(server.url, timeout=0.5))) as publisher:
        await done(publisher.group_send("news", said(1)))
        server.pause()
        with pytest.raises(LayerUnavailable) as caught:
            await done(publisher.group_send("news", said(2)))
        assert caught.value.maybe_sent
        server.resume()
        await _sent_again(publisher, said(3))
        assert await listener.numbers() in ([1, 2, 3], [1, 3])


async def test_a_server_that_hangs_from_the_start(kind: Any, server: RedisServer) -> None:
    """A server that lets us connect and answers nothing is away."""
    server.pause()
    with pytest.raises(LayerUnavailable):
        async with entered(kind(redis_layer(server.url, timeout=0.2))):
            pass
    server.resume()


async def test_closing_does_not_wait_for_a_server_that_hangs(kind: Any, server: RedisServer) -> None:
    """Closing takes no answer of the server."""
    publisher = kind(redis_layer(server.url, timeout=10 * DEADLINE))
    await done(publisher.group_send("news", said(1)))
    server.pause()
    async with asyncio.timeout(DEADLINE):
        await (asyncio.to_thread(publisher.close) if kind is Publisher else publisher.close())
    server.resume()


async def test_closing_while_a_send_waits(server: RedisServer) -> None:
    """A send that waits for an answer when the AsyncPublisher is closed raises LayerUnavailable."""
    async with closing_late(AsyncPublisher(redis_layer(server.url, timeout=10 * DEADLINE))) as publisher:
        await publisher.group_send("news", said(1))
        server.pause()
        sending = asyncio.create_task(publisher.group_send("news", said(2)))
        await asyncio.sleep(0.05)  # to be written, or not: both end the same
        await publisher.close()
        with pytest.raises(LayerUnavailable):
            async with asyncio.timeout(DEADLINE):
                await sending
        server.resume()


async def test_a_degraded_start(kind: Any, server: RedisServer) -> None:
    """With start="degraded" entering succeeds without the server, and a send still says that it isn't there."""
    server.kill()
    async with entered(kind(redis_layer(server.url, timeout=0.2, start="degraded"))) as publisher:
        with pytest.raises(LayerUnavailable):
            await done(publisher.group_send("news", said(1)))
        server.restart()
        await _sent_again(publisher, said(2))


async def test_wrong_credentials(kind: Any, redis_server: RedisServer) -> None:
    """A server that takes no such password makes it a settings error at the first send, without the password."""
    with RedisServer(binary=redis_server.binary, options=["--requirepass", "right"]) as server:
        place = urlsplit(server.url).netloc.rpartition("@")[2]
        for credentials in ("", ":hunter2@", "somebody:hunter2@"):
            publisher = kind(f"redis://{credentials}{place}/0")
            for _ in range(2):
                with pytest.raises(SettingsError, match=place) as caught:
                    await done(publisher.group_send("news", said(1)))
                assert "hunter2" not in str(caught.value)
            await done(publisher.close())


async def test_a_block_that_is_not_entered_leaves_nothing(kind: Any) -> None:
    """When entering fails no thread is left, though nobody can close the publisher."""
    with pytest.raises(LayerUnavailable):
        async with entered(kind(redis_layer("redis://127.0.0.1:1/0", timeout=0.1))):
            pass
    await until(lambda: not threads())


# Processes


SCRIPT = """
import asyncio, gc, multiprocessing, os, signal, sys, threading, traceback
from fastapi_channels.layers import AsyncPublisher, LayerUnavailable, Publisher

signal.alarm(60)
url = sys.argv[1]

def said(n):
    return {"type": "said", "n": n}

def fork(work):
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(60)
    try:
        work()
        gc.collect()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    if sys.argv[2:] == ["os._exit"]:
        os._exit(0)
    sys.exit(0)

def ended(*pids):
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


async def run(script: str, url: str, *arguments: str) -> None:
    """Run a script in a Python of its own. It has to end well, and say nothing of warnings or errors."""
    # Python 3.12 warns of every fork with threads about.
    command = [sys.executable, "-W", "always", "-W", "ignore::DeprecationWarning"]
    with anyio.fail_after(2 * DEADLINE):
        ended = await anyio.run_process([*command, "-c", SCRIPT + dedent(script), url, *arguments], check=False)
    assert (ended.returncode, ended.stderr.decode()) == (0, "")


FORKS = {
    "used in the child only": """
        publisher = Publisher(url)
        ended(fork(lambda: publisher.group_send("news", said("child"))))
    """,
    "used before": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        ended(fork(lambda: publisher.group_send("news", said("child"))))
        publisher.close()
    """,
    "used before and after": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        ended(fork(lambda: publisher.group_send("news", said("child"))))
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "forked in its block": """
        with Publisher(url) as publisher:
            def work():
                publisher.group_send("news", said("child"))
                publisher.close()
                publisher.group_send("news", said("child"))
                publisher.close()
            ended(fork(work))
            publisher.group_send("news", said("after"))
    """,
    "closed before": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        publisher.close()
        ended(fork(lambda: publisher.group_send("news", said("child"))))
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "closed in the child unused": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        ended(fork(publisher.close))
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "grandchildren": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        def work():
            publisher.group_send("news", said("child"))
            ended(fork(lambda: publisher.group_send("news", said("grandchild"))))
            publisher.group_send("news", said("child"))
        ended(fork(work))
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "both at once": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        def work():
            for _ in range(50):
                publisher.group_send("news", said("child"))
        children = [fork(work) for _ in range(4)]
        for _ in range(50):
            publisher.group_send("news", said("after"))
        ended(*children)
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "threads that send": """
        publisher = Publisher(url)
        is_over = threading.Event()
        def send():
            while not is_over.is_set():
                publisher.group_send("others", said("thread"))
        sending = [threading.Thread(target=send) for _ in range(4)]
        for thread in sending:
            thread.start()
        for _ in range(5):
            ended(fork(lambda: publisher.group_send("news", said("child"))))
        is_over.set()
        for thread in sending:
            thread.join()
        publisher.close()
    """,
    "a thread that forks": """
        sys.argv[2:] = ["os._exit"]  # the other one would be for the thread only
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        def work():
            ended(fork(lambda: publisher.group_send("news", said("child"))))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
    "two publishers": """
        publishers = [Publisher(url), Publisher(url)]
        publishers[0].group_send("news", said("before"))
        def work():
            for publisher in publishers:
                publisher.group_send("news", said("child"))
        ended(fork(work))
        for publisher in publishers:
            publisher.group_send("news", said("after"))
            publisher.close()
    """,
    "an AsyncPublisher": """
        publisher = AsyncPublisher(url)
        async def say(who):
            await publisher.group_send("news", said(who))
        asyncio.run(say("before"))
        ended(fork(lambda: asyncio.run(say("child"))))
        asyncio.run(say("after"))
    """,
    "multiprocessing": """
        publisher = Publisher(url)
        publisher.group_send("news", said("before"))
        def work(number):
            publisher.group_send("news", said("child"))
        with multiprocessing.get_context("fork").Pool(3) as pool:
            pool.map(work, range(20), chunksize=1)
            publisher.group_send("news", said("after"))
            pool.close()
            pool.join()
        publisher.group_send("news", said("after"))
        publisher.close()
    """,
}

#: How often each is heard.
HEARD = {
    "used in the child only": {"child": 1},
    "used before": {"before": 1, "child": 1},
    "used before and after": {"before": 1, "child": 1, "after": 1},
    "forked in its block": {"child": 2, "after": 1},
    "closed before": {"before": 1, "child": 1, "after": 1},
    "closed in the child unused": {"before": 1, "after": 1},
    "grandchildren": {"before": 1, "child": 2, "grandchild": 1, "after": 1},
    "both at once": {"before": 1, "child": 200, "after": 51},
    "threads that send": {"child": 5},
    "a thread that forks": {"before": 1, "child": 1, "after": 1},
    "two publishers": {"before": 1, "child": 2, "after": 2},
    "an AsyncPublisher": {"before": 1, "child": 1, "after": 1},
    "multiprocessing": {"before": 1, "child": 20, "after": 2},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("end", ["sys.exit", "os._exit"])
async def test_forks(server: RedisServer, how: str, end: str) -> None:
    """What was made before a process forks is of use in the parent and in the child, and neither disturbs the other."""
    async with listening(server.url) as listener:
        await run(FORKS[how], server.url, end)
        heard = await listener.numbers()
        assert {who: heard.count(who) for who in heard} == HEARD[how]
        await until(lambda: len(connections(server)) == 2, DEADLINE)  # the listener's own


EXITS = {
    "at the end": """
        publisher = Publisher(url)
        publisher.group_send("news", said(1))
    """,
    "in its block": """
        with Publisher(url) as publisher:
            publisher.group_send("news", said(1))
            sys.exit()
    """,
    "entered by hand": """
        publisher = Publisher(url)
        publisher.__enter__()
        publisher.group_send("news", said(1))
    """,
    "while others send": """
        publisher = Publisher(url)
        publisher.group_send("news", said(1))
        def work():
            while True:
                publisher.group_send("others", said(2))
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
    """,
    "several": """
        publishers = [Publisher(url) for _ in range(5)]
        for publisher in publishers:
            publisher.group_send("others", said(1))
        publisher.group_send("news", said(1))
    """,
    "at exit": """
        import atexit
        publisher = Publisher(url)
        publisher.group_send("others", said(0))
        atexit.register(publisher.close)
        atexit.register(publisher.group_send, "news", said(1))
    """,
    "dropped": """
        Publisher(url).group_send("news", said(1))
        gc.collect()
    """,
    "an AsyncPublisher": """
        publisher = AsyncPublisher(url)
        asyncio.run(publisher.group_send("news", said(1)))
    """,
    "an AsyncPublisher that is gone before its loop": """
        async def work():
            await AsyncPublisher(url).group_send("news", said(1))
            gc.collect()
        asyncio.run(work())
    """,
}


@pytest.mark.parametrize("how", EXITS)
async def test_a_process_that_ends_without_closing(server: RedisServer, how: str) -> None:
    """A process that forgets to close its publisher ends at once and without a word."""
    async with listening(server.url) as listener:
        await run(EXITS[how], server.url)
        assert await listener.numbers() == [1]
        await until(lambda: len(connections(server)) == 2, DEADLINE)


async def test_a_process_that_ends_while_the_server_hangs(server: RedisServer) -> None:
    """A process doesn't wait, at its end, for a thread whose send gets no answer."""
    script = """
        publisher = Publisher({"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": url, "timeout": 600}})
        publisher.group_send("news", said(1))
        os.kill(int(sys.argv[2]), signal.SIGSTOP)
        threading.Thread(target=publisher.group_send, args=("news", said(2)), daemon=True).start()
    """
    await run(script, server.url, str(server.pid))


async def test_an_interrupted_send(server: RedisServer) -> None:
    """Ctrl-C ends a script whose send gets no answer."""
    script = """
        publisher = Publisher({"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": url, "timeout": 600}})
        publisher.group_send("news", said(1))
        os.kill(int(sys.argv[2]), signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            publisher.group_send("news", said(2))
        except KeyboardInterrupt:
            pass
        else:
            sys.exit("it got an answer")
    """
    await run(script, server.url, str(server.pid))


# Settings


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty settings module, to be imported as `news_settings`."""
    module = ModuleType("news_settings")
    monkeypatch.setitem(sys.modules, "news_settings", module)
    return module


async def _hears(publisher: Any, url: str) -> None:
    async with listening(url) as listener:
        await done(publisher.group_send("news", said(1)))
        assert await listener.numbers() == [1]
    await done(publisher.close())


async def test_a_settings_module(kind: Any, redis_url: str, settings: Any) -> None:
    """The application's settings module, or its dotted path, names the layer, in any of its forms."""
    for entry in (redis_url, redis_layer(redis_url)):
        settings.CHANNEL_LAYERS = {"default": entry}
        await _hears(kind(settings=settings), redis_url)
        await _hears(kind(settings="news_settings"), redis_url)


async def test_the_environment(kind: Any, redis_url: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither URL nor settings the environment says: which module, or, stronger, which layers."""
    settings.CHANNEL_LAYERS = {"default": redis_url}
    monkeypatch.setenv("FASTAPI_CHANNELS_SETTINGS", "news_settings")
    await _hears(kind(), redis_url)
    settings.CHANNEL_LAYERS = {"default": "memory://"}
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", f'{{"default": "{redis_url}"}}')
    await _hears(kind(), redis_url)
    await _hears(kind(settings="news_settings"), redis_url)
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", '{"default": "redis://127.0.0.1:1/0"}')
    await _hears(kind(redis_url), redis_url)


async def test_an_alias(kind: Any, redis_url: str, settings: Any) -> None:
    """An alias chooses one of the layers; the others are not made."""
    settings.CHANNEL_LAYERS = {"default": "memory://", "jobs": redis_url, "bad": "amqp://"}
    await _hears(kind(settings=settings, alias="jobs"), redis_url)
    for alias in ("mail", "", "Jobs"):
        with pytest.raises(SettingsError) as caught:
            kind(settings=settings, alias=alias)
        told = f"there is no channel layer {alias!r} in CHANNEL_LAYERS, only: bad, default, jobs"
        assert str(caught.value) == told


async def test_capacity_and_expiry_of_the_settings(kind: Any, server: RedisServer, settings: Any) -> None:
    """What the settings say of expiry counts for what is sent, unless the layer's own configuration says else."""
    settings.EXPIRY = 70.0
    settings.CHANNEL_LAYERS = {"default": server.url, "own": redis_layer(server.url, expiry=7.0)}
    for alias, expiry in (("default", 70_000), ("own", 7_000)):
        async with entered(kind(settings=settings, alias=alias)) as publisher:
            await done(publisher.send(alias, said(1)))
        assert expiry - 6_000 < ask(server, "PTTL", f"fc:{{{alias}}}:q") <= expiry


@pytest.mark.parametrize(
    "entry",
    [
        "memory://",
        "broadcaster+memory://",
        {"BACKEND": "fastapi_channels.layers.MemoryLayer"},
        {"BACKEND": f"{__name__}.OwnMemoryLayer"},
    ],
    ids=str,
)
def test_a_layer_that_reaches_nobody(kind: Any, settings: Any, entry: Any) -> None:
    """A layer that reaches no other process is refused when the publisher is made."""
    settings.CHANNEL_LAYERS = {"default": entry}
    for given in ({"url": entry}, {"settings": settings}):
        with pytest.raises(SettingsError, match="memory:// reaches no other process; a Publisher needs a broker"):
            kind(**given)


class OwnMemoryLayer(MemoryLayer):
    """Somebody's own."""


def test_the_default_reaches_nobody(kind: Any, settings: Any) -> None:
    """With no setting at all the layer is memory://, and refused."""
    for given in ({}, {"settings": settings}):
        with pytest.raises(SettingsError, match="memory:// reaches no other process"):
            kind(**given)


def test_a_layer_object(kind: Any, redis_url: str, settings: Any) -> None:
    """A layer object, which may be open elsewhere, is refused."""
    layer = RedisLayer(redis_url)
    settings.CHANNEL_LAYERS = {"default": layer}
    for given in ({"url": layer}, {"settings": settings}):
        with pytest.raises(SettingsError, match="a Publisher makes a layer of its own"):
            kind(**given)


def test_both_a_url_and_settings(kind: Any, redis_url: str, settings: Any) -> None:
    """A URL and settings are one too many."""
    with pytest.raises(TypeError, match="a URL or settings, not both"):
        kind(redis_url, settings=settings)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"url": ""}, "there is no layer for a URL without a scheme"),
        ({"url": "amqp://user:hunter2@host/0"}, "there is no layer for amqp"),
        ({"url": "redis://user:hunter2@host/x"}, "RedisLayer: redis://user:***@host/x: the database is a number"),
        ({"url": "redis://:hunter2@ü:x/0"}, "RedisLayer: redis://:***@ü:x/0: "),
        ({"url": {"BACKEND": "nowhere.Layer"}}, "BACKEND 'nowhere.Layer'"),
        ({"url": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"x": "hunter2"}}}, "RedisLayer: "),
        ({"url": 5}, "a layer is a URL"),
        ({"settings": "nowhere.settings"}, "settings module 'nowhere.settings' can't be imported"),
        ({"settings": ""}, "settings module '' can't be imported"),
        ({"settings": ".relative"}, "settings module '.relative' can't be imported"),
    ],
    ids=str,
)
def test_wrong_settings(kind: Any, given: Any, told: str) -> None:
    """What is wrong with URL or settings is told when the publisher is made, without the password."""
    with pytest.raises(SettingsError) as caught:
        kind(**given)
    assert str(caught.value).startswith(told)
    assert "hunter2" not in str(caught.value)


async def test_settings_are_read_once(
    kind: Any, redis_url: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes in environment and module after the publisher was made changes nothing for it."""
    monkeypatch.setenv("CHANNELS_CHANNEL_LAYERS", f'{{"default": "{redis_url}"}}')
    publisher = kind()
    monkeypatch.delenv("CHANNELS_CHANNEL_LAYERS")
    for _ in range(2):
        await _hears(publisher, redis_url)
    settings.CHANNEL_LAYERS = {"default": redis_url}
    publisher = kind(settings=settings)
    settings.CHANNEL_LAYERS = {"default": "memory://"}
    for _ in range(2):
        await _hears(publisher, redis_url)
