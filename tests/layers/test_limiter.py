"""Limiters: GCRA to the point, alike in memory and in a real Redis, and what happens when that is away."""

import asyncio
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fastapi_channels.exceptions import DefinitionError, LayerUnavailable
from fastapi_channels.layers import MemoryLayer, RedisLayer
from fastapi_channels.layers.limiter import GuardedLimiter, Limiter, MemoryLimiter, Rate
from fastapi_channels.testing import RedisServer
from tests.brokers import ask
from tests.conftest import ODD_KEYS, asked_until, until

#: Slow enough that nothing comes back while a test runs.
SLOW = Rate(5, 3600.0)

# Rates


@pytest.mark.parametrize(
    ("text", "count", "seconds"),
    [
        ("10/second", 10, 1),
        ("10/s", 10, 1),
        ("10/sec", 10, 1),
        ("10/seconds", 10, 1),
        ("5/10s", 5, 10),
        ("5/10seconds", 5, 10),
        ("5/10 seconds", 5, 10),
        ("100/minute", 100, 60),
        ("100/m", 100, 60),
        ("100/min", 100, 60),
        ("1/2minutes", 1, 120),
        ("1000/hour", 1000, 3600),
        ("1000/h", 1000, 3600),
        ("1/day", 1, 86400),
        ("1/d", 1, 86400),
        ("3/0.5s", 3, 0.5),
        ("1/1.5 hours", 1, 5400),
        ("10 / second", 10, 1),
        ("10/Second", 10, 1),
        ("10/MINUTE", 10, 60),
        ("007/s", 7, 1),
        ("1000000/s", 1_000_000, 1),
    ],
)
def test_rates(text: str, count: int, seconds: float) -> None:
    """A rate is a number, a slash, and a unit of time, of which there may be several."""
    assert Rate.parse(text) == Rate(count, seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "10/",
        "/s",
        "/",
        "0/s",
        "-1/s",
        "+1/s",
        "1.5/s",
        "1e3/s",
        "10/0s",
        "10/0.0s",
        "10/-1s",
        "10/week",
        "10/ms",
        "5/100ms",
        "10/ss",
        "10/hs",
        "10/secondss",
        "10/second/second",
        "10 per second",
        " 10/s",
        "10/s ",
        "10/s\n",
        "10//s",
        "1_000/s",
        "٣/s",
        "ten/second",
        "10/.5s",
        "10/5",
        "1/" + "9" * 400 + "d",
        "9" * 400 + "/s",
    ],
)
def test_what_is_no_rate(text: str) -> None:
    """What can't be read as a rate, or would let through nothing or anything, is an error that shows how to do it."""
    with pytest.raises(DefinitionError, match="rate"):
        Rate.parse(text)


@pytest.mark.parametrize("value", [None, 10, 10.5, b"10/s", (10, 1), ["10/s"], {}, object()])
def test_only_text_is_a_rate(value: Any) -> None:
    """Anything but text, or a `Rate`, is no rate."""
    with pytest.raises(DefinitionError, match="rate"):
        Rate.parse(value)


@pytest.mark.parametrize("text", ["10/second", "5/10s", "100/minute", "3/0.5s", "1/day", "7/1.5 hours", "1/14d"])
def test_a_rate_as_text(text: str) -> None:
    """What a rate is shown as can be read again, and is the same; a `Rate` is read as itself."""
    rate = Rate.parse(text)
    assert Rate.parse(str(rate)) == rate
    assert Rate.parse(rate) is rate


@pytest.mark.parametrize(
    ("count", "seconds"),
    [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, float("inf")), (1, float("nan")), (1, 1e10), (1_000_001, 1.0)],
)
def test_a_rate_that_limits_nothing_or_everything(count: int, seconds: float) -> None:
    """A rate under which nothing, or anything, would get through can't be made, however it is made."""
    with pytest.raises(DefinitionError, match="a rate is at least 1"):
        Rate(count, seconds)


# In memory, to the point


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The event loop's clock, which stands still unless its one number is changed."""
    now = [1000.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    return now


async def test_burst_and_steady_rate(clock: list[float]) -> None:
    """`4/8s` lets 4 through at once, and from then on one every 2 seconds, for ever."""
    limiter, rate = MemoryLimiter(), Rate(4, 8.0)
    assert [await limiter.hit("a", rate) for _ in range(6)] == [0, 0, 0, 0, 2, 2]
    for _ in range(1000):
        clock[0] += 1.75
        assert await limiter.hit("a", rate) == 0.25
        clock[0] += 0.25
        assert await limiter.hit("a", rate) == 0
        assert await limiter.hit("a", rate) == 2


async def test_a_steady_client_is_never_refused(clock: list[float]) -> None:
    """Who keeps to the rate is never refused, for all the sums of rounded numbers."""
    for rate in (Rate(3, 1.0), Rate(7, 60.0), Rate(1000, 0.1), Rate(1, 86400.0)):
        limiter = MemoryLimiter()
        for n in range(2000):
            clock[0] = 1000.0 + n * (rate.seconds / rate.count)
            assert await limiter.hit("a", rate) == 0, (rate, n)


async def test_the_wait_is_exact(clock: list[float]) -> None:
    """The wait that is told is the shortest: a moment sooner is refused, and then it is let through."""
    limiter, rate = MemoryLimiter(), Rate(3, 10.0)
    for n in range(50):
        while not (wait := await limiter.hit("a", rate)):
            pass
        clock[0] += wait * 0.999
        assert await limiter.hit("a", rate) == pytest.approx(wait * 0.001), n
        clock[0] += wait * 0.001
        assert await limiter.hit("a", rate) == 0, n
        clock[0] += n % 7


async def test_refused_hits_cost_nothing(clock: list[float]) -> None:
    """However often a client tries while it has to wait, it has not to wait longer."""
    limiter, rate = MemoryLimiter(), Rate(2, 4.0)
    for _ in range(2):
        await limiter.hit("a", rate)
    assert {await limiter.hit("a", rate) for _ in range(1000)} == {2}
    clock[0] += 2
    assert await limiter.hit("a", rate) == 0


async def test_quiet_time_gives_no_more_than_the_burst(clock: list[float]) -> None:
    """After a long quiet time a key is as good as new, and no better."""
    limiter, rate = MemoryLimiter(), Rate(4, 8.0)
    for quiet in (8.0, 8.5, 100.0, 1e6):
        clock[0] += quiet
        assert [await limiter.hit("a", rate) for _ in range(5)] == [0, 0, 0, 0, 2]
    clock[0] += 5.0
    assert [await limiter.hit("a", rate) for _ in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(10))
async def test_random_hits(seed: int, clock: list[float]) -> None:
    """In no span of time more get through than the burst and the rate allow; who is refused couldn't get through."""
    chance = random.Random(seed)
    rate = Rate(chance.choice([1, 2, 4, 8]), 8.0)
    interval = rate.seconds / rate.count
    limiter = MemoryLimiter()
    admitted: list[float] = []

    def is_room(now: float) -> bool:
        times = [*admitted, now]
        return all(len(times) - i <= rate.count + (now - first) / interval for i, first in enumerate(times))

    for _ in range(300):
        clock[0] += chance.choice([0, 0, 0.25, 0.5, 1, 3])
        expected = is_room(clock[0])
        wait = await limiter.hit("a", rate)
        assert (wait == 0) is expected
        if wait:
            assert is_room(clock[0] + wait)
            assert not is_room(clock[0] + wait - 0.125)
        else:
            admitted.append(clock[0])


async def test_what_is_quiet_is_forgotten(clock: list[float]) -> None:
    """Keys whose time is over go by themselves as others come; what is remembered stays small."""
    limiter = MemoryLimiter()
    for n in range(5000):
        clock[0] += 0.01
        await limiter.hit(f"address:{n}", Rate(5, 1.0))
        assert len(limiter._arrivals) <= 25


async def test_the_number_of_keys_is_bounded(clock: list[float]) -> None:
    """Beyond `max_keys` the key is forgotten that was let through least recently; the others stay counted."""
    limiter = MemoryLimiter(max_keys=100)
    for n in range(1000):
        assert await limiter.hit(f"{n}", Rate(1, 3600.0)) == 0
        assert len(limiter._arrivals) <= 100
    assert await limiter.hit("999", Rate(1, 3600.0)) == 3600
    assert await limiter.hit("900", Rate(1, 3600.0)) == 3600
    assert await limiter.hit("899", Rate(1, 3600.0)) == 0


async def test_a_flood_of_keys_frees_nobody_who_is_active(clock: list[float]) -> None:
    """A key that is in use is not forgotten for all the keys that others make."""
    limiter = MemoryLimiter(max_keys=100)
    rate = Rate(10, 10.0)
    let_through = 0
    for n in range(1000):
        clock[0] += 0.01
        let_through += await limiter.hit("mine", rate) == 0
        await limiter.hit(f"other:{n}", Rate(1, 3600.0))
    assert let_through == 10 + 9


async def test_the_length_of_a_key_costs_nothing(clock: list[float]) -> None:
    """What strangers make a key of is counted, and not kept."""
    limiter = MemoryLimiter()
    assert await limiter.hit("x" * 100_000, Rate(1, 3600.0)) == 0
    assert await limiter.hit("x" * 100_000, Rate(1, 3600.0)) == 3600
    assert await limiter.hit("x" * 99_999, Rate(1, 3600.0)) == 0
    assert sum(map(sys.getsizeof, limiter._arrivals)) < 1000


async def test_every_memory_layer_counts_alone() -> None:
    """Two memory layers share nothing."""
    async with MemoryLayer() as one, MemoryLayer() as other:
        for layer in (one, other):
            limiter = layer.new_limiter()
            assert isinstance(limiter, MemoryLimiter)
            assert [await limiter.hit("a", Rate(1, 3600.0)) > 0 for _ in range(2)] == [False, True]


# The contract


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Limiter]:
    if request.param == "memory":
        async with MemoryLayer() as memory:
            yield memory.new_limiter()
    else:
        async with RedisLayer(request.getfixturevalue("redis_url")) as layer:
            yield layer.new_limiter()


async def test_contract_burst(limiter: Limiter) -> None:
    """As many as the rate says get through at once, and the next is told when."""
    waits = [await limiter.hit("a", SLOW) for _ in range(8)]
    assert waits[:5] == [0] * 5
    assert all(wait == pytest.approx(720, abs=5) for wait in waits[5:])


async def test_contract_wait(limiter: Limiter) -> None:
    """Who waits as long as was told gets through, again and again, and who doesn't is told the rest."""
    rate = Rate(2, 0.4)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        while not (wait := await limiter.hit("a", rate)):
            pass
        asked_at = loop.time()
        assert 0 < wait <= 0.2
        await asyncio.sleep(wait / 2)
        passed = loop.time() - asked_at
        assert await limiter.hit("a", rate) <= max(wait - passed, 0) + 0.02
        await asyncio.sleep(wait / 2 + 0.01)
        assert await limiter.hit("a", rate) == 0


async def test_contract_refused_hits_cost_nothing(limiter: Limiter) -> None:
    """However often a client tries while it has to wait, it has not to wait longer."""
    for _ in range(5):
        await limiter.hit("a", SLOW)
    first = await limiter.hit("a", SLOW)
    for _ in range(100):
        assert await limiter.hit("a", SLOW) <= first


@pytest.mark.parametrize("rate", [Rate(50, 3600.0), Rate(50, 86400.0), Rate(50, 10**6)], ids=str)
async def test_contract_concurrent_hits(limiter: Limiter, rate: Rate) -> None:
    """Of 200 hits at the same time exactly 50 get through when 50 may."""
    waits = await asyncio.gather(*(limiter.hit("a", rate) for _ in range(200)))
    assert sum(wait == 0 for wait in waits) == 50


async def test_contract_keys_count_alone(limiter: Limiter) -> None:
    """Every key counts for itself, whatever it is made of."""
    rate = Rate(1, 3600.0)
    for key in ODD_KEYS:
        assert await limiter.hit(key, rate) == 0, key[:20]
    for key in ODD_KEYS:
        assert await limiter.hit(key, rate) > 3000, key[:20]


async def test_contract_a_quiet_key_is_as_good_as_new(limiter: Limiter) -> None:
    """When the time of a rate has passed, the whole burst is there again."""
    rate = Rate(3, 0.15)
    for _ in range(2):
        waits = [await limiter.hit("a", rate) for _ in range(3)]
        assert waits == [0, 0, 0]
        await asyncio.sleep(0.16)


@pytest.mark.parametrize("rate", [Rate(3, 1.0), Rate(7, 1.0), Rate(1, 1e9), Rate(1_000_000, 1.0)], ids=str)
async def test_contract_uneven_rates(limiter: Limiter, rate: Rate) -> None:
    """Rates that don't divide evenly, and very long and very short ones, let through a burst and no more than due."""
    waits = await asyncio.gather(*(limiter.hit("a", rate) for _ in range(min(rate.count, 20))))
    assert set(waits) == {0}
    if rate.count < 20:
        assert 0 < await limiter.hit("a", rate) <= rate.seconds / rate.count


# In Redis


def limiter_keys(server: RedisServer) -> list[str]:
    keys: list[str] = ask(server, "KEYS", "*")
    return keys


async def test_two_layers_share_a_limit(redis_url: str) -> None:
    """All processes on one Redis count together: of 200 hits over two layers exactly 50 get through."""
    async with RedisLayer(redis_url) as one, RedisLayer(redis_url) as other:
        limiters = one.new_limiter(), other.new_limiter()
        waits = await asyncio.gather(*(limiters[n % 2].hit("a", Rate(50, 3600.0)) for n in range(200)))
        assert sum(wait == 0 for wait in waits) == 50
        assert await limiters[0].hit("a", Rate(50, 3600.0)) == pytest.approx(
            await limiters[1].hit("a", Rate(50, 3600.0)), abs=1
        )


async def test_prefixes_and_databases_are_apart(redis_url: str) -> None:
    """Layers with another prefix, or in another database, count for themselves."""
    urls = [(redis_url, "a"), (redis_url, "b"), (redis_url.removesuffix("/0") + "/1", "a")]
    for url, prefix in urls:
        async with RedisLayer(url, prefix=prefix) as layer:
            limiter = layer.new_limiter()
            assert [await limiter.hit("k", Rate(1, 3600.0)) > 0 for _ in range(2)] == [False, True]


async def test_a_limit_outlives_the_process(redis_url: str) -> None:
    """What was counted is still counted after the layer was closed and another one opened."""
    for is_refused in (False, True):
        async with RedisLayer(redis_url) as layer:
            assert (await layer.new_limiter().hit("a", Rate(1, 3600.0)) > 0) is is_refused


async def test_what_is_in_redis(redis_url: str, redis_server: RedisServer) -> None:
    """Every key is a digest, of one length whatever was counted, and expires when it is as good as new."""
    rates = [Rate(1, 0.5), Rate(5, 3600.0), Rate(20, 600.0), Rate(3, 1e6)]
    async with RedisLayer(redis_url) as layer:
        limiter = layer.new_limiter()
        for key in ODD_KEYS:
            for _ in range(3):
                await limiter.hit(key, rates[2])
        keys = limiter_keys(redis_server)
        assert len(keys) == len(ODD_KEYS)
        for key in keys:
            assert key.startswith("fc:t:{")
            assert key.endswith("}")
            assert set(key[6:-1]) <= set("0123456789abcdef")
            assert len(key) == 6 + 32 + 1
            assert 0 < ask(redis_server, "PTTL", key) <= 3 * 30_000 + 1
        for rate in rates:
            redis_server.flush()
            ttl = 0
            for hits in range(1, rate.count + 1):
                assert await limiter.hit("a", rate) == 0
                (key,) = limiter_keys(redis_server)
                ttl = ask(redis_server, "PTTL", key)
                assert 0 < ttl <= hits * rate.seconds / rate.count * 1000 + 1
            # A refused one does not lengthen it.
            if rate.seconds > 10:
                assert await limiter.hit("a", rate) > 0
                assert 0 < ask(redis_server, "PTTL", limiter_keys(redis_server)[0]) <= ttl


async def test_nothing_stays_in_redis(redis_url: str, redis_server: RedisServer) -> None:
    """A key that has been quiet is gone from Redis by itself."""
    async with RedisLayer(redis_url) as layer:
        limiter = layer.new_limiter()
        for n in range(100):
            await limiter.hit(f"address:{n}", Rate(10, 1.0))
        await until(lambda: not limiter_keys(redis_server))


async def test_the_servers_clock_counts(redis_url: str, redis_server: RedisServer) -> None:
    """What is kept is a time by the server's clock, so that the clocks of processes may differ."""
    async with RedisLayer(redis_url) as layer:
        await layer.new_limiter().hit("a", Rate(5, 50.0))
        (key,) = limiter_keys(redis_server)
        seconds, micros = ask(redis_server, "TIME")
        arrival = int(ask(redis_server, "GET", key))
        left = arrival - (int(seconds) * 1_000_000 + int(micros))
        assert 9_000_000 < left <= 10_000_000


async def test_scripts_that_redis_has_forgotten(redis_url: str, redis_server: RedisServer) -> None:
    """It goes on counting when Redis has lost its scripts."""
    async with RedisLayer(redis_url) as layer:
        limiter = layer.new_limiter()
        assert await limiter.hit("a", Rate(1, 3600.0)) == 0
        ask(redis_server, "SCRIPT", "FLUSH")
        assert await limiter.hit("a", Rate(1, 3600.0)) > 0


async def test_a_key_that_is_no_number(redis_url: str, redis_server: RedisServer) -> None:
    """What somebody else has put where a count should be is an error of the layer, and not one of the client's."""
    async with RedisLayer(redis_url) as layer:
        limiter = layer.new_limiter()
        await limiter.hit("a", SLOW)
        (key,) = limiter_keys(redis_server)
        ask(redis_server, "DEL", key)
        ask(redis_server, "LPUSH", key, "x")
        with pytest.raises(LayerUnavailable):
            await limiter.hit("a", SLOW)


async def test_a_closed_layer_counts_nothing(redis_url: str) -> None:
    """On a layer that is closed, or was never opened, counting raises what an outage raises."""
    layer = RedisLayer(redis_url)
    limiter = layer.new_limiter()
    with pytest.raises(LayerUnavailable):
        await limiter.hit("a", SLOW)
    async with layer:
        assert await limiter.hit("a", SLOW) == 0
    with pytest.raises(LayerUnavailable):
        await limiter.hit("a", SLOW)


# Without Redis

Break = Callable[[RedisServer], None]
OUTAGES: list[Any] = [
    pytest.param(RedisServer.kill, RedisServer.restart, id="killed"),
    pytest.param(RedisServer.pause, RedisServer.resume, id="paused"),
]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of throttles."""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [record.getMessage() for record in caplog.records if "throttles" in record.getMessage()]


@pytest.mark.parametrize(("stop", "go_on"), OUTAGES)
async def test_redis_does_not_answer(stop: Break, go_on: Break, redis_url: str, redis_server: RedisServer) -> None:
    """A hit that Redis doesn't answer raises within the deadline, and hits work again when it is back."""
    async with RedisLayer(redis_url) as layer:
        limiter = layer.new_limiter()
        assert await limiter.hit("a", SLOW) == 0
        stop(redis_server)
        async with asyncio.timeout(2):
            with pytest.raises(LayerUnavailable):
                await limiter.hit("a", SLOW)
        go_on(redis_server)

        async def is_back() -> bool:
            try:
                await limiter.hit("b", SLOW)
            except LayerUnavailable:
                return False
            return True

        await asked_until(is_back)


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize(("stop", "go_on"), OUTAGES)
async def test_an_outage(
    stop: Break, go_on: Break, allow: bool, redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is away everything is let through, or nothing, as is set; told once, counted, and over when it is."""
    async with RedisLayer(redis_url) as layer:
        limiter = GuardedLimiter(layer.new_limiter(), layer.counters, allow=allow)
        assert [await limiter.hit("a", Rate(1, 3600.0)) > 0 for _ in range(2)] == [False, True]
        assert layer.counters.uncounted == 0
        stop(redis_server)
        async with asyncio.timeout(2):
            first = await limiter.hit("a", Rate(1, 3600.0))
        async with asyncio.timeout(0.4):
            waits = [await limiter.hit("a", Rate(1, 3600.0)) for _ in range(99)]
        assert {first, *waits} == ({0.0} if allow else {1.0})
        assert layer.counters.uncounted == 100
        (line,) = told(caplog)
        assert ("let through" if allow else "refused") in line
        go_on(redis_server)

        async def counts_again() -> bool:
            return await limiter.hit("b", Rate(1, 3600.0)) > 2  # what Redis has counted is told so many seconds

        await asked_until(counts_again)
        assert len(told(caplog)) == 2
        assert told(caplog)[1] == "throttles count again"
        counted = layer.counters.uncounted
        assert await limiter.hit("b", Rate(1, 3600.0)) > 2
        assert layer.counters.uncounted == counted


async def test_many_at_once_in_an_outage(
    redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Hits that wait for Redis together when it hangs are let through together, and are one line in the log."""
    async with RedisLayer(redis_url) as layer:
        limiter = GuardedLimiter(layer.new_limiter(), layer.counters, allow=True)
        await limiter.hit("a", SLOW)
        redis_server.pause()
        async with asyncio.timeout(2):
            waits = await asyncio.gather(*(limiter.hit("a", SLOW) for _ in range(200)))
        assert set(waits) == {0.0}
        assert layer.counters.uncounted == 200
        assert len(told(caplog)) == 1
        redis_server.resume()


async def test_a_second_outage_is_told_again(
    redis_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Every outage is told once, and so is its end."""
    async with RedisLayer(redis_url) as layer:
        limiter = GuardedLimiter(layer.new_limiter(), layer.counters, allow=False)
        for n in (1, 2):
            redis_server.kill()
            async with asyncio.timeout(5):
                while await limiter.hit(f"{n}", SLOW) == 0:
                    pass
            redis_server.restart()

            async def counts_again(key: str = f"again {n}") -> bool:
                return await limiter.hit(key, SLOW) == 0

            await asked_until(counts_again)
            assert len(told(caplog)) == 2 * n


async def test_cancelling_a_hit(redis_url: str, redis_server: RedisServer) -> None:
    """A hit that is cancelled while it waits is over at once, and the next one works."""
    async with RedisLayer(redis_url) as layer:
        limiter = GuardedLimiter(layer.new_limiter(), layer.counters, allow=True)
        redis_server.pause()
        task = asyncio.create_task(limiter.hit("a", SLOW))
        await asyncio.wait({task}, timeout=0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        redis_server.resume()
        assert await limiter.hit("b", SLOW) == 0
        assert layer.counters.uncounted == 0
