"""The contract on real servers: Redis, Valkey, behind Sentinels, as a Cluster, and every way to get at them."""

import pickle
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from redis.asyncio import Redis

from fastapi_channels.layers import ChannelLayer
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import LayerContract, RedisServer
from tests.brokers import Cluster, Sentinels, TlsServer, redis7, tls_server, valkey


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's Unix socket is."""
    return tmp_path_factory.mktemp("redis") / "redis.sock"


@pytest.fixture(scope="module")
def redis(socket_path: Path) -> Iterator[RedisServer]:
    with redis7("--unixsocket", str(socket_path)) as server:
        yield server


@pytest.fixture(scope="module")
def redis_with_tls() -> Iterator[TlsServer]:
    with tls_server("--requirepass", "s3cret/@") as server:
        yield server


@pytest.fixture(scope="module")
def other() -> Iterator[RedisServer]:
    """A Valkey."""
    with valkey() as server:
        yield server


class RedisContract(LayerContract):
    """Each test has a prefix of its own, on a server that all share."""

    options: dict[str, Any] = {}

    @pytest.fixture
    async def layer(self, source: Any) -> AsyncIterator[ChannelLayer]:
        async with RedisLayer(source, prefix=f"fc.{secrets.token_hex(4)}", capacity=20, **self.options) as layer:
            yield layer


class TestRedis(RedisContract):
    @pytest.fixture
    def source(self, redis: RedisServer) -> str:
        return redis.url


class TestValkey(RedisContract):
    @pytest.fixture
    def source(self, other: RedisServer) -> str:
        return other.url


class TestSentinels(RedisContract):
    @pytest.fixture
    def source(self, sentinels: Sentinels) -> str:
        return sentinels.url


class TestCluster(RedisContract):
    @pytest.fixture
    def source(self, cluster: Cluster) -> str:
        return cluster.url


class TestClient(RedisContract):
    """A client that was handed in stays as it is."""

    @pytest.fixture
    async def source(self, redis: RedisServer) -> "AsyncIterator[Redis]":
        async with Redis(port=redis.port) as client:
            yield client
            assert await client.set("key", b"\xff")
            assert await client.get("key") == b"\xff"


class TestDecodingClient(RedisContract):
    """What a client does to replies is of no consequence; its database is ours."""

    @pytest.fixture
    async def source(self, redis: RedisServer) -> "AsyncIterator[Redis]":
        client = Redis(port=redis.port, db=3, decode_responses=True, encoding="latin-1", socket_timeout=0.001)
        yield client
        await client.aclose()


class TestUnixSocket(RedisContract):
    """By a path instead of a port, and with a serializer."""

    options = {"serializer": pickle}

    @pytest.fixture
    def source(self, redis: RedisServer, socket_path: Path) -> str:
        return f"unix://{socket_path}?db=4"


class TestEncrypted(RedisContract):
    """By TLS, and encrypted besides."""

    options = {"encryption_keys": [Fernet.generate_key(), Fernet.generate_key()]}

    @pytest.fixture
    def source(self, redis_with_tls: TlsServer) -> str:
        return f"{redis_with_tls.url}?ssl_ca_certs={redis_with_tls.ca_path}"
