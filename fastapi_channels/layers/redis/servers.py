"""Which Redis servers there are, which of them keeps what, and connections to them: the door to redis-py.

redis-py opens the connections (TLS, credentials, database, RESP), asks the Sentinels for the primary and the Cluster
for its slots. It doesn't reconnect, retry or subscribe here: that is the links' business, which know what was written.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import RedisError
from typing_extensions import override

from fastapi_channels.exceptions import LayerUnavailable

__all__ = ["Cluster", "OneServer", "Sentinels", "Servers", "servers_of"]

#: What a connection of ours is like, whatever the client that was handed in is like. The deadlines are the link's own:
#: one of redis-py's would make a task of every write on Python 3.11.
_LINK: dict[str, Any] = {
    "decode_responses": False,
    "encoding": "utf-8",
    "encoding_errors": "strict",
    "health_check_interval": 0,
    "protocol": 2,
    "retry_on_error": [],
    "retry_on_timeout": False,
    "socket_timeout": None,
}

#: What belongs to a client's own pool: redis-py has these announce maintenance, by RESP3.
_NOT_FOR_LINKS = ("maint", "oss_cluster_maint", "orig_")


class Servers(ABC):
    """The servers behind one layer.

    Attributes:
        shown: Where they are, for people to read; without the password.
        db: The database number.
        publish: The name of the command that publishes.
        subscribe: The one that subscribes.
        unsubscribe: The one that unsubscribes.
        can_change: Whether a key can move from one server to another.
        asks_regularly: Whether nobody tells us when one does.
    """

    publish = "PUBLISH"
    subscribe = "SUBSCRIBE"
    unsubscribe = "UNSUBSCRIBE"
    can_change = False
    asks_regularly = False

    def __init__(self, shown: str, db: int) -> None:
        self.shown = shown
        self.db = db

    @abstractmethod
    def of(self, key: str) -> str:
        """The name of the server that has this key, or Pub/Sub channel.

        Raises:
            LayerUnavailable: There is none.
        """

    @abstractmethod
    def names(self) -> Collection[str]:
        """The names of all servers that have keys."""

    @abstractmethod
    def connection(self, name: str, connect_timeout: float) -> AbstractConnection:
        """A new connection to that server, not connected yet."""

    async def find(self) -> Sequence[str]:
        """Ask which server has which slot; `use` puts the answer to use.

        Raises:
            Exception: None could be asked.
        """
        return ()

    def losing(self, found: Sequence[str]) -> Collection[str]:
        """The servers that have less than before, if that is so."""
        return ()

    def use(self, found: Sequence[str]) -> None:
        """Choose servers by what was found from now on."""

    async def close(self) -> None:
        """Let go of what was needed to find servers."""


class OneServer(Servers):
    """A single server."""

    def __init__(self, pool: ConnectionPool, shown: str) -> None:
        super().__init__(shown, int(pool.connection_kwargs.get("db") or 0))
        self._pool = pool

    @override
    def of(self, key: str) -> str:
        return self.shown

    @override
    def names(self) -> Collection[str]:
        return (self.shown,)

    @override
    def connection(self, name: str, connect_timeout: float) -> AbstractConnection:
        return _connection(self._pool.connection_class, self._pool.connection_kwargs, connect_timeout)


class Sentinels(Servers):
    """The one server that the Sentinels name as the primary, now another than before.

    Spec:
        Redis Sentinel's guidelines for clients.
    """

    can_change = True
    # A primary that is replaced on purpose goes on for some seconds as if it knew nothing of it.
    asks_regularly = True

    def __init__(self, pool: SentinelConnectionPool, shown: str, *, is_ours: bool) -> None:
        super().__init__(shown, int(pool.connection_kwargs.get("db") or 0))
        self._pool = pool
        self._is_ours = is_ours
        self._primary: Sequence[str] = ()

    @override
    def of(self, key: str) -> str:
        if not self._primary:
            raise LayerUnavailable(f"{self.shown}: the Sentinels name no primary")
        return self._primary[0]

    @override
    def names(self) -> Collection[str]:
        return self._primary

    @override
    def connection(self, name: str, connect_timeout: float) -> AbstractConnection:
        host, _, port = name.rpartition(":")
        options = {**self._pool.connection_kwargs, "host": host, "port": int(port)}
        del options["connection_pool"]
        is_tls = issubclass(self._pool.connection_class, SSLConnection)
        return _connection(SSLConnection if is_tls else Connection, options, connect_timeout)

    @override
    async def find(self) -> Sequence[str]:
        try:
            host, port = await self._pool.sentinel_manager.discover_master(self._pool.service_name)
        except MasterNotFoundError:  # whose text is a page of objects
            raise LayerUnavailable(f"none of the Sentinels names a primary of {self._pool.service_name!r}") from None
        return (f"{host}:{port}",)

    @override
    def losing(self, found: Sequence[str]) -> Collection[str]:
        return set(self._primary) - set(found)

    @override
    def use(self, found: Sequence[str]) -> None:
        self._primary = found

    @override
    async def close(self) -> None:
        if self._is_ours:
            for client in self._pool.sentinel_manager.sentinels:
                await client.aclose()


class Cluster(Servers):
    """The primaries of a Cluster, with sharded Pub/Sub: a channel lives where the key of that name would.

    Spec:
        Redis Cluster specification; sharded Pub/Sub since Redis 7.0.
    """

    publish = "SPUBLISH"
    subscribe = "SSUBSCRIBE"
    unsubscribe = "SUNSUBSCRIBE"
    can_change = True

    def __init__(self, client: RedisCluster, shown: str, *, is_ours: bool) -> None:
        super().__init__(shown, 0)
        self._client = client
        self._is_ours = is_ours
        self._slots: Sequence[str] = ()

    @override
    def of(self, key: str) -> str:
        name = self._slots[self._client.keyslot(key)] if self._slots else ""
        if not name:
            raise LayerUnavailable(f"{self.shown}: no server is known that has the slot of this name")
        return name

    @override
    def names(self) -> Collection[str]:
        return {name for name in self._slots if name}

    @override
    def connection(self, name: str, connect_timeout: float) -> AbstractConnection:
        node = self._client.get_node(node_name=name)
        if node is None:
            raise LayerUnavailable(f"{name} is no server of the Cluster any more")
        return _connection(node.connection_class, node.connection_kwargs, connect_timeout)

    @override
    async def find(self) -> Sequence[str]:
        nodes = self._client.nodes_manager
        await nodes.initialize()
        slots = [""] * REDIS_CLUSTER_HASH_SLOTS
        for slot, (primary, *_) in nodes.slots_cache.items():
            slots[slot] = str(primary.name)
        if self._is_ours:  # the connections were needed to ask
            for node in (*nodes.nodes_cache.values(), *nodes.startup_nodes.values()):
                await node.disconnect()
        return slots

    @override
    def losing(self, found: Sequence[str]) -> Collection[str]:
        return {before for before, after in zip(self._slots, found, strict=False) if before != after}

    @override
    def use(self, found: Sequence[str]) -> None:
        self._slots = found

    @override
    async def close(self) -> None:
        if self._is_ours:
            await self._client.aclose()


def servers_of(source: str | Redis | RedisCluster, timeout: float) -> Servers:
    """The servers that a URL or a redis-py client names.

    Args:
        source: `redis://[[user]:password@]host[:port][/db]`, `rediss://` with TLS, `unix://path`,
            `redis+sentinel://[user:password@]host:port[,host:port]/service[/db]`,
            `redis+cluster://[user:password@]host:port[,host:port]`, the last two also as `rediss+...`, each with
            redis-py's options behind a question mark; or a client of `redis.asyncio`.
        timeout: For asking Sentinels and Cluster nodes, in seconds.

    Raises:
        ValueError: It is none of these; the text holds no password.
    """
    if isinstance(source, Redis):
        pool = source.connection_pool
        if isinstance(pool, SentinelConnectionPool):
            return Sentinels(pool, f"the Sentinels' {pool.service_name}", is_ours=False)
        return OneServer(pool, _shown_client(pool.connection_kwargs))
    if isinstance(source, RedisCluster):
        return Cluster(source, "the Cluster of the client", is_ours=False)
    if not isinstance(source, str):
        raise ValueError(f"a Redis URL or a client of redis.asyncio, not a {type(source).__name__}")
    try:
        return _from_url(source, timeout)
    except _WrongURL as error:
        raise ValueError(f"{shown_url(source)}: {error}") from None
    except TypeError as error:  # redis-py's, with the name of an option
        raise ValueError(f"{shown_url(source)}: redis-py doesn't take it: {error}") from None
    except (RedisError, ValueError):  # urllib's, which repeats parts of what it was given
        raise ValueError(f"{shown_url(source)}: not a URL; signs in a password are percent-encoded") from None


class _WrongURL(ValueError):
    """What is wrong with a URL, in words that hold nothing of it."""


def shown_url(url: str) -> str:
    """A URL for people to read: without a password, and without what is behind a question mark, which may hold one."""
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")  # the last one, whatever signs are in the password
    user = credentials.partition(":")[0] if re.fullmatch(r"\w*:.*", credentials, re.DOTALL) else ""
    return f"{scheme}://{user}{':***@' if at else ''}{place.partition('?')[0]}"


def _shown_client(kwargs: dict[str, Any]) -> str:
    where = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"
    return f"redis://{where}/{kwargs.get('db') or 0}"


def _from_url(url: str, timeout: float) -> Servers:
    scheme, _, rest = url.partition("://")
    tls, _, kind = scheme.partition("+")
    if tls not in ("redis", "rediss", "unix") or kind not in ("", "sentinel", "cluster") or (tls == "unix" and kind):
        raise _WrongURL("not a Redis URL")
    if "#" in rest or "@" in rest.partition("?")[2]:
        raise _WrongURL("what is not a sign of the URL itself, such as @, / or # in a password, is percent-encoded")
    shown = shown_url(url)
    if not kind:
        if tls != "unix":
            authority, path, _ = _pieces(rest)
            _address(authority.rpartition("@")[2] or "localhost", 6379)
            _database(path)
        server = OneServer(ConnectionPool.from_url(url), shown)
        server.connection(shown, timeout)  # raises for an option that there isn't
        return server
    authority, path, query = _pieces(rest)
    credentials, _, hosts = authority.rpartition("@")
    addresses = [_address(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(",")]
    # redis-py reads the credentials and options, as it does for a single server.
    options: dict[str, Any] = {**parse_url(f"{tls}://{credentials}{'@' if credentials else ''}localhost?{query}")}
    del options["host"]
    options["ssl"] = options.pop("connection_class", None) is not None
    if kind == "sentinel":
        servers = _sentinels(addresses, path, options, timeout, shown)
        servers.connection("localhost:1", timeout)
        return servers
    if path not in ("", "0"):
        raise _WrongURL("a Cluster has one database, 0")
    nodes = [ClusterNode(host, port) for host, port in addresses]
    client = {
        "protocol": 2,
        "require_full_coverage": False,
        "socket_connect_timeout": timeout / 2,
        "socket_timeout": timeout / 2,
        **options,
    }
    return Cluster(RedisCluster(startup_nodes=nodes, **client), shown, is_ours=True)


def _sentinels(
    addresses: list[tuple[str, int]], path: str, options: dict[str, Any], timeout: float, shown: str
) -> Sentinels:
    service, _, db = path.partition("/")
    if not service:
        raise _WrongURL("the name of the service is missing: redis+sentinel://host:port/service/db")
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options
    }
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        addresses,
        sentinel_kwargs={
            "retry": Retry(NoBackoff(), 0),
            "socket_connect_timeout": timeout / 4,
            "socket_timeout": timeout / 4,
            **sentinel_options,
        },
    )
    pool = SentinelConnectionPool(service, sentinel, db=_database(db), **options)  # type: ignore[no-untyped-call]
    return Sentinels(pool, shown, is_ours=True)


def _database(path: str) -> int:
    if path and not path.isdecimal():
        raise _WrongURL("the database is a number")
    return int(path or 0)


def _pieces(rest: str) -> tuple[str, str, str]:
    """What stands before the path, in it, and behind the question mark."""
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    return authority, path.rstrip("/"), query


def _address(text: str, default_port: int) -> tuple[str, int]:
    parsed = urlsplit(f"//{text}")
    if not parsed.hostname:
        raise _WrongURL("a host is missing")
    try:
        return parsed.hostname, parsed.port or default_port
    except ValueError:
        raise _WrongURL("a port is a number up to 65535") from None


def _connection(kind: type[AbstractConnection], options: dict[str, Any], connect_timeout: float) -> AbstractConnection:
    given: dict[str, Any] = {name: value for name, value in options.items() if not name.startswith(_NOT_FOR_LINKS)}
    return kind(**{**given, **_LINK, "retry": Retry(NoBackoff(), 0), "socket_connect_timeout": connect_timeout})
