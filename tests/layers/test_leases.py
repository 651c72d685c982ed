"""Leases: places of which there are so many, alike in memory and in a real Redis, and what happens without that."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any

import pytest

from fastapi_channels.exceptions import LayerUnavailable
from fastapi_channels.layers import MemoryLayer, RedisLayer, guard
from fastapi_channels.layers.leases import GuardedLeases, Leases, MemoryLeases
from fastapi_channels.layers.redis import leases as in_redis
from fastapi_channels.layers.redis.leases import RedisLeases
from fastapi_channels.testing import RedisServer
from tests.brokers import Cluster, ask
from tests.conftest import ODD_KEYS, Forward, asked_until


async def counts(leases: Leases, key: str, number: int) -> None:
    """Wait until so many places are held."""

    async def is_so() -> bool:
        try:
            return await leases.count(key) == number
        except LayerUnavailable:
            return False

    await asked_until(is_so)


def keys(server: RedisServer) -> list[str]:
    found: list[str] = ask(server, "KEYS", "*")
    return found


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of connections that can't be counted."""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [record.getMessage() for record in caplog.records if "counted" in record.getMessage()]


def is_renewing() -> bool:
    """Whether a task renews places."""
    codes = [getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()]
    return any(code is not None and code.co_name == "_renew_all" for code in codes)


def starting(layer: RedisLayer) -> Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]:
    """What starts the tasks of leases."""
    return lambda renewing: layer.crew.start(renewing, Context())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places run out soon, and are renewed sooner."""
    monkeypatch.setattr(in_redis, "LEASE", 1.0)
    monkeypatch.setattr(in_redis, "RENEW_EVERY", 0.1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is asked again without a pause after it has failed."""
    monkeypatch.setattr(guard, "PAUSE", 0.0)


# What all keep to


@pytest.fixture(params=["memory", "redis", "guarded"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Leases, Leases]]:
    """The leases of two processes, which share what they count; in memory there is one."""
    if request.param == "memory":
        one = MemoryLayer().new_leases()
        yield one, one
        return
    redis_url = request.getfixturevalue("redis_url")
    async with RedisLayer(redis_url) as first, RedisLayer(redis_url) as second:
        both = first.new_leases(), second.new_leases()
        if request.param == "guarded":
            guarded = [
                GuardedLeases(inner, layer.counters, is_allowed=True)
                for inner, layer in zip(both, (first, second), strict=True)
            ]
            yield guarded[0], guarded[1]
            assert first.counters.uncounted == second.counters.uncounted == 0
        else:
            yield both


async def test_the_limit_is_exact(pair: tuple[Leases, Leases]) -> None:
    """Of 200 who want one of 50 places at the same moment, in two processes, exactly 50 get one."""
    for limit in (1, 50):
        wanting = [(pair[n % 2], f"{limit}.{n}") for n in range(200)]
        held = await asyncio.gather(*(leases.acquire(f"{limit}", holder, limit) for leases, holder in wanting))
        assert sum(held) == limit
        assert await pair[0].count(f"{limit}") == await pair[1].count(f"{limit}") == limit
        for (leases, holder), is_held in zip(wanting, held, strict=True):
            if is_held:
                await leases.release(f"{limit}", holder)
        assert await pair[0].count(f"{limit}") == 0


async def test_the_same_holder(pair: tuple[Leases, Leases]) -> None:
    """A holder that asks again has one place, also if there is none left, and one release gives it back."""
    one, other = pair
    assert [await one.acquire("a", "x", 2) for _ in range(3)] == [True] * 3
    assert await one.count("a") == 1
    assert await other.acquire("a", "y", 2)
    assert [await one.acquire("a", "x", 2), await other.acquire("a", "y", 2)] == [True, True]
    assert not await one.acquire("a", "z", 2)
    await one.release("a", "x")
    assert await other.acquire("a", "z", 2)
    assert not await one.acquire("a", "x", 2)
    for leases, holder in ((other, "y"), (other, "z")):
        await leases.release("a", holder)


async def test_a_place_that_was_given_back(pair: tuple[Leases, Leases]) -> None:
    """A place that is given back is there for anybody; to give back what isn't held does nothing."""
    one, other = pair
    for n in range(20):
        giver, taker = pair[n % 2], pair[(n + 1) % 2]
        assert await giver.acquire("a", "x", 1)
        assert not await taker.acquire("a", "y", 1)
        await taker.release("a", "y")
        assert not await taker.acquire("a", "y", 1)
        await giver.release("a", "x")
        await giver.release("a", "x")
    await one.release("unknown", "x")
    assert await other.count("a") == await other.count("unknown") == 0


async def test_keys_are_apart(pair: tuple[Leases, Leases]) -> None:
    """Whatever text a key is, it is counted for itself alone."""
    one, other = pair
    for key in ODD_KEYS:
        assert await one.acquire(key, "x", 1), key[:20]
    for key in ODD_KEYS:
        assert not await other.acquire(key, "y", 1), key[:20]
        assert await other.count(key) == 1
    for key in ODD_KEYS:
        await one.release(key, "x")
        assert await other.count(key) == 0


async def test_limits_that_differ(pair: tuple[Leases, Leases]) -> None:
    """The limit is whatever the asker says: with 0 there is no place, and who has one when it sinks keeps it."""
    one, other = pair
    assert not await one.acquire("a", "x", 0)
    assert await one.count("a") == 0
    for n in range(5):
        assert await one.acquire("a", f"{n}", 5)
    assert not await other.acquire("a", "x", 3)
    assert await one.acquire("a", "0", 3)
    assert await other.acquire("a", "x", 6)
    for n in range(5):
        await one.release("a", f"{n}")
    await other.release("a", "x")


async def test_memory_forgets() -> None:
    """Nothing is left of keys that nobody holds, nor of those that were refused."""
    leases = MemoryLeases()
    for n in range(100):
        assert await leases.acquire(f"{n}", "x", 1)
        assert not await leases.acquire(f"{n}", "y", 1)
        assert not await leases.acquire(f"none {n}", "y", 0)
        await leases.release(f"{n}", "x")
        await leases.release(f"other {n}", "x")
    assert not leases._holders


# In Redis


async def test_nothing_is_left_in_redis(redis_url: str, redis_server: RedisServer) -> None:
    """What was given back is gone from Redis, and no task of it is left."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        for key in ODD_KEYS:
            for n in range(3):
                assert await leases.acquire(key, f"{n}", 3)
        assert len(keys(redis_server)) == len(ODD_KEYS)
        assert is_renewing()
        for key in ODD_KEYS:
            for n in range(3):
                await leases.release(key, f"{n}")
        assert keys(redis_server) == []
        await asked_until(lambda: asyncio.sleep(0, not is_renewing()))


async def test_what_is_in_redis(redis_url: str, redis_server: RedisServer) -> None:
    """A key is a digest of one length, whatever strangers have put into it, and runs out by itself."""
    async with RedisLayer(redis_url, prefix="mine") as layer:
        leases = layer.new_leases()
        for key in ODD_KEYS:
            assert await leases.acquire(key, "x", 1)
        now = int(ask(redis_server, "TIME")[0]) * 1000
        for name in keys(redis_server):
            holder, due = ask(redis_server, "ZRANGE", name, 0, -1, "WITHSCORES")
            assert (holder, 50_000 < float(due) - now <= 61_000) == ("x", True)
            assert name.startswith("mine:l:{")
            assert len(name) == len("mine:l:{}") + 32
            assert 50_000 < ask(redis_server, "PTTL", name) <= 60_000
        for key in ODD_KEYS:
            await leases.release(key, "x")


async def test_prefixes_and_databases_are_apart(redis_url: str) -> None:
    """Layers with another prefix, or in another database, count for themselves."""
    for url, prefix in ((redis_url, "a"), (redis_url, "b"), (redis_url.removesuffix("/0") + "/1", "a")):
        async with RedisLayer(url, prefix=prefix) as layer:
            leases = layer.new_leases()
            assert await leases.acquire("k", "x", 1)
            assert not await leases.acquire("k", "y", 1)
            leases._forget("k", "x")  # type: ignore[attr-defined]


async def test_flush_keeps_places(redis_url: str) -> None:
    """`flush` drops messages and memberships; connections that are open stay counted."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert await leases.acquire("a", "x", 1)
        await layer.flush()
        assert await leases.count("a") == 1
        await leases.release("a", "x")


async def test_places_of_a_process_that_is_gone(quick: None, redis_url: str, redis_server: RedisServer) -> None:
    """The places of a process that went without a word come free, those of the others stay; nothing is left then."""
    async with RedisLayer(redis_url) as one:
        stays = one.new_leases()
        async with RedisLayer(redis_url) as other:
            goes = other.new_leases()
            assert await stays.acquire("a", "stays", 2)
            assert await goes.acquire("a", "gone", 2)
            assert await goes.acquire("b", "gone", 1)
        assert not await stays.acquire("a", "new", 2)
        await asked_until(lambda: stays.acquire("a", "new", 2))
        await asked_until(lambda: stays.acquire("b", "new", 1))
        assert await stays.count("a") == 2
        assert not await stays.acquire("a", "third", 2)
        for key, holder in (("a", "stays"), ("a", "new"), ("b", "new")):
            await stays.release(key, holder)
        assert keys(redis_server) == []
        goes._forget("a", "gone")  # type: ignore[attr-defined]
        goes._forget("b", "gone")  # type: ignore[attr-defined]


async def test_a_place_that_has_run_out(redis_url: str, redis_server: RedisServer) -> None:
    """Who has stood still until its place ran out, and asks for it anew, gets one only if there is one."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert await leases.acquire("a", "late", 1)
        (key,) = keys(redis_server)
        ask(redis_server, "ZADD", key, 1, "late")
        assert await leases.acquire("a", "new", 1)
        ask(redis_server, "ZADD", key, 1, "late")
        assert not await leases.acquire("a", "late", 1)
        await leases.release("a", "new")
        assert await leases.acquire("a", "late", 1)
        await leases.release("a", "late")


async def test_renewal(quick: None, redis_url: str, redis_server: RedisServer) -> None:
    """Places that are held are renewed, so that none of them runs out in many times the time they are given."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        for n in range(3):
            assert await leases.acquire("a", f"{n}", 3)
        assert await leases.acquire("b", "0", 1)
        names = sorted(keys(redis_server))
        for _ in range(5):
            before = [ask(redis_server, "ZRANGE", name, 0, -1, "WITHSCORES") for name in names]

            async def are_renewed(before: list[Any] = before) -> bool:
                now = [ask(redis_server, "ZRANGE", name, 0, -1, "WITHSCORES") for name in names]
                return all(
                    float(new) > float(old)
                    for olds, news in zip(before, now, strict=True)
                    for old, new in zip(olds[1::2], news[1::2], strict=True)
                )

            await asked_until(are_renewed)
            assert await leases.count("a") == 3
        for key, holder in (("a", "0"), ("a", "1"), ("a", "2"), ("b", "0")):
            await leases.release(key, holder)


async def test_many_places_are_renewed(
    quick: None, monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_server: RedisServer
) -> None:
    """More places of one key than go into one command are renewed all."""
    monkeypatch.setattr(in_redis, "AT_ONCE", 7)
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert all(await asyncio.gather(*(leases.acquire("a", f"{n}", 100) for n in range(100))))
        redis_server.flush()
        await counts(leases, "a", 100)
        await asyncio.gather(*(leases.release("a", f"{n}") for n in range(100)))
        assert keys(redis_server) == []


async def test_redis_was_emptied(quick: None, redis_url: str, redis_server: RedisServer) -> None:
    """When Redis has lost everything, the places that are held are there again with the next renewal."""
    async with RedisLayer(redis_url) as one, RedisLayer(redis_url) as other:
        both = one.new_leases(), other.new_leases()
        for n in range(6):
            assert await both[n % 2].acquire("a", f"{n}", 6)
        ask(redis_server, "FLUSHALL")
        ask(redis_server, "SCRIPT", "FLUSH")
        await counts(both[0], "a", 6)
        assert not await both[1].acquire("a", "x", 6)
        for n in range(6):
            await both[n % 2].release("a", f"{n}")
        assert keys(redis_server) == []


async def test_a_key_that_is_something_else(quick: None, redis_url: str, redis_server: RedisServer) -> None:
    """What a stranger has put in the place of one key makes that one fail, and holds up no other."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert await leases.acquire("a", "x", 1)
        (key,) = keys(redis_server)
        ask(redis_server, "SET", key, "stranger")
        with pytest.raises(LayerUnavailable):
            await leases.acquire("a", "y", 2)
        assert await leases.acquire("b", "x", 1)
        other = next(name for name in keys(redis_server) if name != key)
        ask(redis_server, "DEL", other)
        await counts(leases, "b", 1)
        ask(redis_server, "DEL", key)
        await counts(leases, "a", 1)
        await leases.release("a", "x")
        await leases.release("b", "x")


async def test_giving_back_during_a_renewal(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_server: RedisServer
) -> None:
    """A place that is given back while places are being renewed stays given back."""
    monkeypatch.setattr(in_redis, "RENEW_EVERY", 0.0)  # it renews all the time
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert await leases.acquire("a", "stays", 2)
        for n in range(200):
            assert await leases.acquire("a", f"{n}", 2)
            for _ in range(n % 5):
                await asyncio.sleep(0)
            await leases.release("a", f"{n}")
            assert await leases.count("a") == 1
        await leases.release("a", "stays")
        assert keys(redis_server) == []


async def test_no_memory_left(redis_url: str, redis_server: RedisServer) -> None:
    """A Redis that is full gives no places, says so, and changes nothing; what is held can be given back."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        assert await leases.acquire("a", "x", 2)
        ask(redis_server, "CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(LayerUnavailable):
                await leases.acquire("a", "y", 2)
            assert await leases.count("a") == 1
            await leases.release("a", "x")
        finally:
            ask(redis_server, "CONFIG", "SET", "maxmemory", "0")
        assert keys(redis_server) == []


async def test_a_closed_layer(redis_url: str) -> None:
    """On a layer that is closed nobody can say who holds what; to give back raises nothing."""
    layer = RedisLayer(redis_url)
    leases = layer.new_leases()
    for _ in range(2):
        with pytest.raises(LayerUnavailable):
            await leases.acquire("a", "x", 1)
        with pytest.raises(LayerUnavailable):
            await leases.count("a")
        await leases.release("a", "x")
        async with layer:
            assert await leases.acquire("a", "x", 1)
            await leases.release("a", "x")
    assert not is_renewing()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


async def test_in_a_cluster(quick: None, cluster: Cluster) -> None:
    """Processes on a Cluster share places too, whichever node has the key, and renew them."""
    async with RedisLayer(cluster.url) as one, RedisLayer(cluster.url) as other:
        both = one.new_leases(), other.new_leases()
        for key in ODD_KEYS:
            held = await asyncio.gather(*(both[n % 2].acquire(key, f"{n}", 5) for n in range(20)))
            assert sum(held) == 5
        for server in cluster.servers[:3]:
            server.flush()
        for key in ODD_KEYS:
            await counts(one.new_leases(), key, 5)
            for n in range(20):
                await both[n % 2].release(key, f"{n}")
            assert await both[0].count(key) == 0


# Without Redis

Break = Callable[[RedisServer], None]
OUTAGES: list[Any] = [
    pytest.param(RedisServer.kill, RedisServer.restart, id="killed"),
    pytest.param(RedisServer.pause, RedisServer.resume, id="paused"),
]


@pytest.mark.parametrize(("stop", "go_on"), OUTAGES)
async def test_an_outage_allowed(
    stop: Break,
    go_on: Break,
    quick: None,
    redis_url: str,
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While Redis is away each process counts its own, which is told once; when it is back, all are counted there."""
    async with RedisLayer(redis_url) as one, RedisLayer(redis_url) as other:
        both = [GuardedLeases(layer.new_leases(), layer.counters, is_allowed=True) for layer in (one, other)]
        assert await both[0].acquire("a", "before", 3)
        stop(redis_server)
        async with asyncio.timeout(5):
            for n in range(5):
                assert await both[0].acquire("a", f"0.{n}", 3) is (n < 2)
                assert await both[1].acquire("a", f"1.{n}", 3) is (n < 3)
        assert (one.counters.uncounted, other.counters.uncounted) == (2, 3)
        assert len(told(caplog)) == 2
        assert all("counts its own" in line for line in told(caplog))
        await both[0].release("a", "0.0")
        await asyncio.to_thread(go_on, redis_server)
        await counts(both[0], "a", 5)
        await asked_until(lambda: asyncio.sleep(0, len(told(caplog)) == 2))

        async def is_asked_again(leases: Leases, layer: RedisLayer) -> bool:
            before = layer.counters.uncounted
            await leases.acquire("b", "x", 1)
            return layer.counters.uncounted == before

        for leases, layer in zip(both, (one, other), strict=True):
            await asked_until(lambda leases=leases, layer=layer: is_asked_again(leases, layer))  # type: ignore[misc]
            assert not await leases.acquire("a", "late", 3)
            await leases.release("b", "x")
        assert [line for line in told(caplog) if "counted again" in line] == ["connections are counted again"] * 2
        assert len(told(caplog)) == 4
        for number, holders in ((0, ("before", "0.1")), (1, ("1.0", "1.1", "1.2"))):
            for holder in holders:
                await both[number].release("a", holder)
        await counts(both[0], "a", 0)


@pytest.mark.parametrize(("stop", "go_on"), OUTAGES)
async def test_an_outage_denied(
    stop: Break,
    go_on: Break,
    impatient: None,
    redis_url: str,
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With "deny" nobody gets a place while Redis is away; what was refused then holds none when it is back."""
    async with RedisLayer(redis_url) as layer:
        leases = GuardedLeases(layer.new_leases(), layer.counters, is_allowed=False)
        assert await leases.acquire("a", "before", 3)
        stop(redis_server)
        async with asyncio.timeout(10):
            for n in range(3):
                with pytest.raises(LayerUnavailable):
                    await leases.acquire("a", f"{n}", 3)
        assert layer.counters.uncounted == 3
        (line,) = told(caplog)
        assert "none is given" in line
        await asyncio.to_thread(go_on, redis_server)

        async def is_given() -> bool:
            try:
                return await leases.acquire("b", "x", 1)
            except LayerUnavailable:
                return False

        await asked_until(is_given)
        assert [line for line in told(caplog) if "again" in line] == ["connections are counted again"]
        assert await leases.acquire("a", "before", 3)
        assert await leases.count("a") == 1
        await leases.release("a", "before")
        await leases.release("b", "x")
        assert not is_renewing()


async def test_many_at_once_in_an_outage(
    redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many who wait for a Redis that hangs so many get a place as there are here; that is one line in the log."""
    async with RedisLayer(redis_url) as layer:
        leases = GuardedLeases(layer.new_leases(), layer.counters, is_allowed=True)
        redis_server.pause()
        async with asyncio.timeout(3):
            held = await asyncio.gather(*(leases.acquire("a", f"{n}", 50) for n in range(200)))
        assert sum(held) == 50
        assert layer.counters.uncounted == 50
        assert len(told(caplog)) == 1
        redis_server.resume()
        for n in range(200):
            await leases.release("a", f"{n}")
        await counts(leases, "a", 0)


async def test_pauses(redis_url: str, redis_server: RedisServer, forward: Forward) -> None:
    """After a failure Redis isn't waited for with each connection, but for one in a second."""
    async with RedisLayer(redis_url) as layer:
        asked: list[str] = []

        class Asked(RedisLeases):
            async def acquire(self, key: str, holder: str, limit: int) -> bool:
                asked.append(holder)
                return await super().acquire(key, holder, limit)

        leases = GuardedLeases(Asked(layer.run_script, starting(layer), 0.01), layer.counters, is_allowed=True)
        redis_server.pause()
        for n in range(10):
            assert await leases.acquire("a", f"{n}", 100)
        assert asked == ["0"]
        forward(1.0)
        for n in range(10, 20):
            assert await leases.acquire("a", f"{n}", 100)
        assert asked == ["0", "10"]
        redis_server.resume()
        for n in range(20):
            await leases.release("a", f"{n}")


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_cancelling(is_allowed: bool, quick: None, redis_url: str, redis_server: RedisServer) -> None:
    """Who is cancelled while it waits holds nothing, here or in Redis, now or with the next renewal."""
    async with RedisLayer(redis_url) as layer:
        inner = RedisLeases(layer.run_script, starting(layer), 0.05)
        leases = GuardedLeases(inner, layer.counters, is_allowed=is_allowed)
        assert await leases.acquire("a", "stays", 2)
        for pauses in (False, True):
            if pauses:
                redis_server.pause()
            for n in range(20):
                task = asyncio.create_task(leases.acquire("a", f"{n}", 2))
                for _ in range(n % 4 + 1):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                assert task.cancelled()
            redis_server.resume()
            await counts(leases, "a", 1)
            assert await leases.acquire("a", "x", 2)
            await leases.release("a", "x")
        before = ask(redis_server, "INFO", "commandstats")
        await asked_until(lambda: asyncio.sleep(0, ask(redis_server, "INFO", "commandstats") != before))
        assert await leases.count("a") == 1
        assert layer.counters.uncounted == 0
        await leases.release("a", "stays")
        assert keys(redis_server) == []
        assert not is_renewing()


async def test_places_given_back_in_an_outage(
    quick: None, redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What is given back while Redis hangs is given back, at the latest when it runs out; the log stays quiet."""
    async with RedisLayer(redis_url) as layer:
        leases = GuardedLeases(layer.new_leases(), layer.counters, is_allowed=True)
        for n in range(3):
            assert await leases.acquire("a", f"{n}", 3)
        redis_server.pause()
        async with asyncio.timeout(5):
            await leases.release("a", "0")
        redis_server.resume()
        await counts(leases, "a", 2)
        assert await leases.acquire("a", "new", 3)
        for holder in ("1", "2", "new"):
            await leases.release("a", holder)
        assert told(caplog) == []


HOLDING = """
import asyncio
from fastapi_channels.layers.redis import RedisLayer, leases
leases.LEASE, leases.RENEW_EVERY = 1.0, 0.1

async def hold():
    async with RedisLayer({url!r}) as layer:
        assert await layer.new_leases().acquire("room", "killed", 1)
        print("held", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""


async def test_a_process_that_is_killed(quick: None, redis_url: str) -> None:
    """The place of a process is held while it lives, longer than a lease, and comes free when it was killed."""
    async with RedisLayer(redis_url) as layer:
        leases = layer.new_leases()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDING.format(url=redis_url), stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"held\n"
            until = asyncio.get_running_loop().time() + 2 * in_redis.LEASE
            while asyncio.get_running_loop().time() < until:
                assert not await leases.acquire("room", "other", 1)
        finally:
            process.kill()
            await process.wait()

        async def is_free() -> bool:
            return await leases.acquire("room", "other", 1)

        await asked_until(is_free)
        await leases.release("room", "other")
