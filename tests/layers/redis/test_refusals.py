"""A server that is there and refuses: credentials, permissions, and states in which it takes no writes."""

import asyncio
import traceback
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers import Counters, LayerUnavailable
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import ask, redis7
from tests.layers.redis.conftest import MARKER, SOON, Start, become, healthy, logged, lost, member, receive, received

MESSAGE = {"type": "x"}
PASSWORD = "s3cret/@:?#%"
TIMEOUT = 0.5


@pytest.fixture
async def server(redis_server: RedisServer, redis_url: str) -> RedisServer:
    """The test's server."""
    return redis_server


def whole(error: BaseException) -> str:
    """All that is shown of an error, with its causes."""
    return "".join(traceback.format_exception(error, limit=0))


def with_user(server: RedisServer, user: str, password: str = PASSWORD) -> str:
    return f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{server.port}/0"


# Credentials


@pytest.fixture
async def locked(start: Start) -> AsyncIterator[RedisServer]:
    """A server with a password; `start` is closed first."""
    with RedisServer(options=["--requirepass", PASSWORD]) as server:
        yield server


@pytest.mark.parametrize("start_mode", ["fail", "degraded"])
@pytest.mark.parametrize("wrong", ["wr0ng/@:", ""])
async def test_wrong_passwords(locked: RedisServer, wrong: str, start_mode: str) -> None:
    """A wrong password, or none, is a mistake in the settings, and is not shown."""
    url = f"redis://:{quote(wrong, safe='')}@127.0.0.1:{locked.port}/0" if wrong else f"redis://127.0.0.1:{locked.port}"
    layer = RedisLayer(url, timeout=SOON, start=start_mode)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=f"127.0.0.1:{locked.port}") as caught:
        await layer.open()
    assert "wr0ng" not in whole(caught.value)
    assert not layer.is_open
    await layer.close()


async def test_the_right_password(start: Start, locked: RedisServer) -> None:
    """A password with signs of a URL in it, percent-encoded, is right."""
    layer = await start(locked.url)
    channel = await member(layer, "room")
    await layer.group_send("room", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    await layer.close()


async def test_a_password_that_is_changed(start: Start, server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A password that isn't right any more is one of the ways to be lost; it heals when it is right again."""
    ask(server, "ACL", "SETUSER", "app", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    try:
        layer = await start(with_user(server, "app"), timeout=TIMEOUT)
        channel = await member(layer, "room")
        ask(server, "ACL", "SETUSER", "app", "resetpass", ">other")
        ask(server, "CLIENT", "KILL", "USER", "app")
        await lost(layer)
        with pytest.raises(LayerUnavailable) as caught:
            await layer.group_send("room", MESSAGE)
        for text in (whole(caught.value), (await layer.health()).detail, *logged(caplog)):
            assert "s3cret" not in text
        ask(server, "ACL", "SETUSER", "app", f">{PASSWORD}")
        await healthy(layer)
        await layer.group_send("room", MARKER)
        assert await received(layer, channel) == []
        await layer.close()
    finally:
        ask(server, "ACL", "DELUSER", "app")


# Permissions


@pytest.fixture
async def limited(start: Start, server: RedisServer) -> AsyncIterator[RedisLayer]:
    """A layer whose user may use one group, `fc:0:{mine}`, and queues that begin with `mine`."""
    rules = ["resetchannels", "&fc:0:node:*", "&fc:0:{mine}", "&fc:0:{mine*}:q", "~fc:{mine*", "+@all"]
    ask(server, "ACL", "SETUSER", "limited", "on", f">{PASSWORD}", *rules)
    layer = await start(with_user(server, "limited"), timeout=TIMEOUT)
    yield layer
    await layer.close()
    ask(server, "ACL", "DELUSER", "limited")


async def test_a_group_that_is_not_allowed(limited: RedisLayer, server: RedisServer) -> None:
    """A group that the server doesn't let us hear or send to raises LayerUnavailable; all else goes on."""
    channel = await member(limited, "mine")
    for _ in range(2):
        with pytest.raises(LayerUnavailable, match=r"(?i)no permission|noperm"):
            await limited.group_add("other", channel)
    with pytest.raises(LayerUnavailable, match=r"(?i)no permission|noperm") as caught:
        await limited.group_send("other", MESSAGE)
    assert not caught.value.maybe_sent
    assert set(limited.groups_of(channel)) == {"mine"}
    assert await limited.health()
    await limited.group_send("mine", MARKER)
    assert await received(limited, channel) == []
    assert limited.counters == Counters()


async def test_a_permission_that_comes_later(limited: RedisLayer, server: RedisServer) -> None:
    """A group that was refused can be joined as soon as the server allows it."""
    channel = await limited.new_channel()
    with pytest.raises(LayerUnavailable):
        await limited.group_add("other", channel)
    ask(server, "ACL", "SETUSER", "limited", "&fc:0:{other}")
    await limited.group_add("other", channel)
    await limited.group_send("other", MESSAGE)
    assert await receive(limited, channel) == MESSAGE


async def test_a_permission_that_is_withdrawn(
    limited: RedisLayer, start: Start, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A group that the server doesn't let us hear any more is logged as an error; all else goes on."""
    other = await start()
    ask(server, "ACL", "SETUSER", "limited", "&fc:0:{other}")
    channel = await member(limited, "mine", "other")
    rules = ["resetchannels", "&fc:0:node:*", "&fc:0:{mine}"]
    ask(server, "ACL", "SETUSER", "limited", *rules)  # it drops those who subscribe to what is not allowed now
    text = "does not let this process hear"
    await become(lambda: any(text in line for line in logged(caplog)), "the refusal is logged")
    await healthy(limited)
    await other.group_send("other", MESSAGE)
    await other.group_send("mine", MARKER)
    assert await received(limited, channel) == []
    assert limited.counters == Counters(gaps=1)
    await limited.group_discard("other", channel)
    ask(server, "ACL", "SETUSER", "limited", "&fc:0:{other}")
    await limited.group_add("other", channel)
    await other.group_send("other", MESSAGE)
    assert await receive(limited, channel) == MESSAGE


async def test_a_queue_that_is_not_allowed(
    limited: RedisLayer, start: Start, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue that isn't allowed raises LayerUnavailable at who sends; who reads it waits, which is logged."""
    with pytest.raises(LayerUnavailable, match=r"(?i)no permission|noperm"):
        await limited.send("jobs", MESSAGE)
    reading = asyncio.create_task(receive(limited, "jobs"))
    await become(lambda: bool(logged(caplog)), "it is logged")
    ask(server, "ACL", "SETUSER", "limited", "allchannels", "allkeys")
    await (await start()).send("jobs", MESSAGE)
    assert await reading == MESSAGE


async def test_not_even_our_own_channel(server: RedisServer) -> None:
    """A server that lets us subscribe to nothing can't be opened, and says why."""
    ask(server, "ACL", "SETUSER", "deaf", "on", f">{PASSWORD}", "resetchannels", "allkeys", "+@all")
    layer = RedisLayer(with_user(server, "deaf"), timeout=TIMEOUT)
    with pytest.raises((LayerUnavailable, SettingsError), match=r"(?i)no permission|noperm") as caught:
        await layer.open()
    assert "s3cret" not in whole(caught.value)
    await layer.close()
    ask(server, "ACL", "DELUSER", "deaf")


# States in which it takes no writes


@pytest.mark.parametrize(
    ("refusal", "setting", "value", "normal"),
    [("maxmemory", "maxmemory", "1", "0"), ("replicas", "min-replicas-to-write", "1", "0")],
)
async def test_no_writes(
    start: Start, server: RedisServer, refusal: str, setting: str, value: str, normal: str
) -> None:
    """What has to be written isn't sent, and says so; messages to plain groups need no memory, and arrive."""
    one, two = await start(timeout=TIMEOUT), await start(timeout=TIMEOUT)
    channel = await member(two, "room")
    await one.send("jobs", {"type": "x", "number": 1})
    ask(server, "CONFIG", "SET", setting, value)
    try:
        for call in (
            one.send("jobs", MESSAGE),
            one.send("other", MESSAGE),
            one.group_send("room", MESSAGE, idempotency_key="k"),
        ):
            with pytest.raises(LayerUnavailable, match=refusal) as caught:
                await call
            assert not caught.value.maybe_sent
        await one.group_send("room", {"type": "x", "number": 2})
        await one.send(channel, {"type": "x", "number": 3})
        second = await member(two, "new")
        await one.group_send("new", MARKER)
        assert await received(two, second) == []
    finally:
        ask(server, "CONFIG", "SET", setting, normal)
    receipt = await one.group_send("room", {"type": "x", "number": 4}, idempotency_key="k")
    assert not receipt.duplicate
    await one.group_send("room", MARKER)
    assert await received(two, channel) == [2, 3, 4]
    await one.send("jobs", MARKER)
    assert await received(two, "jobs") == [1]
    assert one.counters == two.counters == Counters()


async def test_an_expired_queue_in_a_full_server(start: Start, server: RedisServer) -> None:
    """Without memory, a message to a queue in which others have expired is taken or refused, and nothing between."""
    one = await start(expiry=0.01)
    await one.send("jobs", {"type": "expired"})
    one.expiry = 60
    await one.send("jobs", MESSAGE)
    await asyncio.sleep(0.02)
    ask(server, "CONFIG", "SET", "maxmemory", "1")
    try:
        sent = await asyncio.gather(*(one.send("jobs", MESSAGE) for _ in range(5)), return_exceptions=True)
    finally:
        ask(server, "CONFIG", "SET", "maxmemory", "0")
    refused = [result for result in sent if isinstance(result, LayerUnavailable)]
    assert len(refused) >= 4
    await one.send("jobs", MARKER)
    assert await received(one, "jobs") == [MESSAGE] * (1 + 5 - len(refused))
    assert one.counters == Counters(expired=1)


@pytest.mark.parametrize("has_primary", [True, False])
async def test_a_replica(start: Start, server: RedisServer, has_primary: bool) -> None:
    """A server that has become a replica, with or without its primary, takes nothing that has to be written."""
    with redis7() as primary:
        one = await start(timeout=TIMEOUT)
        channel = await member(one, "room")
        if not has_primary:
            ask(server, "CONFIG", "SET", "replica-serve-stale-data", "no")
            primary.kill()
        ask(server, "REPLICAOF", "127.0.0.1", primary.port)
        try:
            with pytest.raises(LayerUnavailable, match="read only replica" if has_primary else "(?i)link with master"):
                await one.send("jobs", MESSAGE)
            for _ in range(3):
                with pytest.raises(LayerUnavailable):
                    await one.group_send("room", MESSAGE, idempotency_key="k")
        finally:
            ask(server, "REPLICAOF", "NO", "ONE")
            ask(server, "CONFIG", "SET", "replica-serve-stale-data", "yes")
        await healthy(one)
        assert not (await one.group_send("room", MARKER, idempotency_key="k")).duplicate
        await one.send("jobs", MARKER)
        assert await received(one, channel) == await received(one, "jobs") == []


async def test_a_server_that_is_loading(start: Start) -> None:
    """A server that reads its data after a restart is not there yet; when it is, members hear everything."""
    slow = ["--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"]
    with redis7(*slow) as server:
        one, two = await start(server.url, timeout=TIMEOUT), await start(server.url, timeout=TIMEOUT)
        channel = await member(two, "room")
        ask(server, "EVAL", "for i = 1, 1000 do redis.call('SET', i, string.rep('x', 100)) end", 0)
        ask(server, "SAVE")
        server.kill()
        await lost(one, two)
        await asyncio.to_thread(server.restart)
        assert ask(server, "INFO", "persistence")["loading"]
        refused = []
        while not await one.health():
            try:
                await one.group_send("room", {"type": "early"})
            except LayerUnavailable as error:
                refused.append(error.maybe_sent)
            await asyncio.sleep(0.01)
        assert not ask(server, "INFO", "persistence")["loading"]
        assert refused
        assert not any(refused)
        await healthy(one, two)
        await one.group_send("room", MARKER)
        assert all(message == {"type": "early"} for message in await received(two, channel))
        assert one.counters == two.counters == Counters(gaps=1)
        await asyncio.gather(one.close(), two.close())


async def test_too_many_clients() -> None:
    """A server that has no room for another client can't be opened, and can when it has."""
    with RedisServer(options=["--maxclients", "4"]) as server:
        layers = [RedisLayer(server.url, timeout=TIMEOUT) for _ in range(3)]
        await layers[0].open()
        await layers[1].open()
        with pytest.raises(LayerUnavailable):
            await layers[2].open()
        await layers[1].close()
        await layers[2].open()
        assert await layers[2].health()
        for layer in layers:
            await layer.close()
