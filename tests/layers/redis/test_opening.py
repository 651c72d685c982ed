"""How a layer begins and ends: a server that isn't there yet, several who open it, one event loop after another."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from redis.asyncio import Redis

from fastapi_channels.layers import Counters, LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import ask
from tests.layers.redis.conftest import (
    MARKER,
    SOON,
    Start,
    become,
    connections,
    healthy,
    logged,
    member,
    receive,
    received,
    tasks_of_layers,
)

MESSAGE = {"type": "x"}
PASSWORD = "s3cret"
TIMEOUT = 0.3


@pytest.fixture
def absent() -> Iterator[RedisServer]:
    """A server with a password that isn't running; `restart` starts it."""
    with RedisServer(options=["--requirepass", PASSWORD]) as server:
        server.kill()
        yield server


def sockets(port: int) -> int:
    """How many connections to a port this process has."""
    return sum(bool(each.raddr) and each.raddr.port == port for each in psutil.Process().net_connections("tcp"))


async def test_no_server(absent: RedisServer) -> None:
    """Opening fails when there is no server: the error has the URL, not the password, and nothing is left running."""
    layer = RedisLayer(absent.url, timeout=TIMEOUT)
    with pytest.raises(LayerUnavailable, match=f"127.0.0.1:{absent.port}") as caught:
        await layer.open()
    assert PASSWORD not in str(caught.value)
    assert not layer.is_open
    assert not tasks_of_layers()
    with pytest.raises(LayerUnavailable):
        await layer.group_send("room", MESSAGE)
    await asyncio.to_thread(absent.restart)
    async with layer:
        channel = await member(layer, "room")
        await layer.group_send("room", MESSAGE)
        assert await receive(layer, channel) == MESSAGE


async def test_a_server_that_is_frozen(redis_server: RedisServer, redis_url: str) -> None:
    """Opening fails in time when the server doesn't answer, and leaves no connection."""
    redis_server.pause()
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable):
            await RedisLayer(redis_url, timeout=TIMEOUT).open()
    assert not tasks_of_layers()
    assert not sockets(redis_server.port)
    redis_server.resume()


async def test_a_host_that_there_is_not(start: Start) -> None:
    """Opening fails when nobody knows the host, and says which."""
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable, match=r"nowhere\.invalid"):
            await start("redis://nowhere.invalid", timeout=TIMEOUT)


async def test_what_is_no_redis(start: Start) -> None:
    """Opening fails in time when something else answers."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable, match=str(port)):
            await start(f"redis://127.0.0.1:{port}", timeout=TIMEOUT)
    server.close()


async def test_starting_without_it(start: Start, absent: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """With `start="degraded"` a layer opens without its server, says that it isn't well, and heals when it comes."""
    degraded = await start(absent.url, timeout=TIMEOUT, start="degraded")
    assert degraded.is_open
    health = await degraded.health()
    assert (health.ok, health.can_send, health.can_receive) == (False, False, False)
    assert f"127.0.0.1:{absent.port}" in health.detail
    channel = await degraded.new_channel()
    with pytest.raises(LayerUnavailable) as caught:
        await degraded.group_send("room", MESSAGE)
    assert not caught.value.maybe_sent
    with pytest.raises(LayerUnavailable):
        await degraded.group_add("room", channel)
    with pytest.raises(LayerUnavailable):
        await degraded.send("jobs", MESSAGE)
    await degraded.send(channel, {"type": "here"})
    reading = asyncio.create_task(receive(degraded, "jobs"))
    (text,) = logged(caplog)
    assert "starting without it" in text
    for said in (text, health.detail, str(caught.value)):
        assert PASSWORD not in said
    await asyncio.to_thread(absent.restart)
    await healthy(degraded)
    await degraded.group_add("room", channel)
    await degraded.group_send("room", MARKER)
    assert await received(degraded, channel) == [{"type": "here"}]
    await degraded.send("jobs", MESSAGE)
    assert await reading == MESSAGE
    assert degraded.counters == Counters()
    await degraded.close()


async def test_starting_and_ending_without_it(start: Start, absent: RedisServer) -> None:
    """A layer that never had a server closes, and is opened again."""
    degraded = await start(absent.url, timeout=TIMEOUT, start="degraded")
    await degraded.close()
    assert not tasks_of_layers()
    await degraded.open()
    assert degraded.is_open


async def test_a_wrong_password_that_is_found_out_late(
    start: Start, absent: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer that was opened without its server says later that the password is wrong, without showing it."""
    layer = await start(absent.url.replace(PASSWORD, "wr0ng"), timeout=TIMEOUT, start="degraded")
    await asyncio.to_thread(absent.restart)

    async def is_said() -> bool:
        detail = (await layer.health()).detail
        assert "wr0ng" not in detail
        return "password" in detail

    await become(is_said, "health tells of the password")
    assert not await layer.health()
    assert not any("wr0ng" in text for text in logged(caplog))
    await layer.close()


async def test_several_open_it(redis_url: str, client: "Redis") -> None:
    """However many open a layer at once, it is opened once."""
    layer = RedisLayer(redis_url)
    await asyncio.gather(*(layer.open() for _ in range(10)))
    assert await connections(client) == 2
    await layer.open()
    channel = await member(layer, "room")
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    await layer.close()


async def test_several_close_it(redis_url: str) -> None:
    """However many close a layer at once, also while somebody opens it, nothing is left of it, and it opens again."""
    layer = RedisLayer(redis_url)
    await layer.open()
    await asyncio.gather(*(layer.close() for _ in range(10)))
    await asyncio.gather(layer.open(), layer.close(), return_exceptions=True)
    await layer.close()
    assert not tasks_of_layers()
    async with layer:
        assert await layer.health()
    assert not tasks_of_layers()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21])
async def test_opening_that_is_cancelled(redis_url: str, client: "Redis", steps: int) -> None:
    """Opening that is cancelled leaves nothing behind, and can be tried again."""
    layer = RedisLayer(redis_url)
    opening = asyncio.create_task(layer.open())
    for _ in range(steps):
        await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening})
    await layer.close()
    assert not tasks_of_layers()
    async with layer:
        assert await layer.health()
        assert await connections(client) == 2


async def test_again_and_again(redis_url: str, client: "Redis") -> None:
    """A layer can be opened and closed many times, and each time all its connections go."""
    layer = RedisLayer(redis_url)
    for _ in range(20):
        async with layer:
            channel = await member(layer, "room")
            await layer.group_send("room", MESSAGE)
            assert await receive(layer, channel) == MESSAGE

    async def are_gone() -> bool:
        return not await connections(client)

    await become(are_gone, "the connections are gone")


async def test_what_was_sent_before_it_is_closed(start: Start) -> None:
    """What was acknowledged before the layer is closed arrives in the other processes."""
    one, two = await start(), await start()
    channel = await member(two, "room")
    await asyncio.gather(*(one.group_send("room", {"type": "x", "number": number}) for number in range(100)))
    await one.close()
    await two.group_send("room", MARKER)
    assert await received(two, channel) == list(range(100))


async def use(layer: RedisLayer) -> None:
    """Hear and send, by a group and a queue."""
    channel = await member(layer, "room")
    reading = asyncio.create_task(layer.receive("jobs"))
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    await layer.send("jobs", MESSAGE)
    assert await asyncio.wait_for(reading, SOON) == MESSAGE


def test_one_event_loop_after_another(redis_url: str) -> None:
    """A layer that was closed on one event loop works on the next."""
    layer = RedisLayer(redis_url)

    async def once() -> None:
        async with layer:
            await use(layer)

    for _ in range(3):
        asyncio.run(once())


def test_an_event_loop_that_ends_without_closing(redis_server: RedisServer, redis_url: str) -> None:
    """A layer that wasn't closed before its event loop ended is opened on the next one, and hears its groups there."""
    layer = RedisLayer(redis_url)

    async def once() -> None:
        await layer.open()
        await use(layer)

    asyncio.run(once())
    asyncio.run(once())

    async def and_closed() -> None:
        await once()
        await layer.close()

    asyncio.run(and_closed())
    assert not sockets(redis_server.port)
    assert ask(redis_server, "PUBSUB", "CHANNELS") == []
