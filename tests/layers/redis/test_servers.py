"""Which servers a URL or a client names, and what is said of it to people."""

import traceback
from typing import Any
from urllib.parse import quote

import pytest
from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.sentinel import Sentinel
from redis.credentials import UsernamePasswordCredentialProvider

from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers.factory import make_layer
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.layers.redis.servers import Cluster, OneServer, Sentinels, Servers, servers_of, shown_url
from fastapi_channels.testing import RedisServer
from tests.brokers import ask
from tests.layers.redis.conftest import Start, member, receive

PASSWORD = "s3cret:@/?#[]%é "
ENCODED = quote(PASSWORD, safe="")

ONE = {
    "redis://localhost": ("localhost", 6379, 0),
    "redis://": ("localhost", 6379, 0),
    "redis://localhost:7000": ("localhost", 7000, 0),
    "redis://localhost:7000/": ("localhost", 7000, 0),
    "redis://localhost:7000/5": ("localhost", 7000, 5),
    "redis://localhost?db=5": ("localhost", 6379, 5),
    "redis://10.0.0.1:7000/5": ("10.0.0.1", 7000, 5),
    "redis://[::1]": ("::1", 6379, 0),
    "redis://[::1]:7000/5": ("::1", 7000, 5),
    "redis://user:pw@[fe80::1]:7000": ("fe80::1", 7000, 0),
    "redis://redis.example.com:7000/5": ("redis.example.com", 7000, 5),
    "redis://redis_1:7000": ("redis_1", 7000, 0),
}


def connection(servers: Servers, name: str | None = None) -> Any:
    """A connection to a server, which isn't connected."""
    return servers.connection(name or next(iter(servers.names())), 5.0)


@pytest.mark.parametrize(("url", "place"), ONE.items(), ids=str)
async def test_one_server(url: str, place: tuple[str, int, int]) -> None:
    """A URL names host, port and database; each has a default."""
    servers = servers_of(url, 5.0)
    assert isinstance(servers, OneServer)
    made = connection(servers)
    assert type(made) is Connection
    assert (made.host, made.port, made.db) == place
    assert servers.db == place[2]


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster"])
@pytest.mark.parametrize("user", ["", "user", "us%40er"])
async def test_credentials(scheme: str, user: str) -> None:
    """User and password are percent-encoded, whatever is in them."""
    path = "/service" if scheme == "redis+sentinel" else ""
    servers = servers_of(f"{scheme}://{user}:{ENCODED}@localhost:7000{path}", 5.0)
    if isinstance(servers, Cluster):
        options: dict[str, Any] = servers._client.connection_kwargs
        credentials = options["username"] or None, options["password"]
    else:
        made = connection(servers, "localhost:7000")
        credentials = made.username or None, made.password
    assert credentials == (user.replace("%40", "@") or None, PASSWORD)
    for sign in ("s3cret", ENCODED, "%40/"):
        assert sign not in servers.shown


async def test_tls() -> None:
    """With `rediss` the connection is encrypted, and options say how."""
    made = connection(servers_of("rediss://localhost:7000/5?ssl_ca_certs=/ca.pem&ssl_check_hostname=false", 5.0))
    assert type(made) is SSLConnection
    assert (made.host, made.port, made.db) == ("localhost", 7000, 5)
    assert (made.ca_certs, made.check_hostname) == ("/ca.pem", False)


async def test_a_unix_socket() -> None:
    """A path names a socket, and an option the database."""
    servers = servers_of("unix://user:pw@/run/redis.sock?db=5", 5.0)
    made = connection(servers)
    assert type(made) is UnixDomainSocketConnection
    assert (made.path, made.db, made.username, made.password) == ("/run/redis.sock", 5, "user", "pw")
    assert servers.db == 5


SENTINELS = {
    "redis+sentinel://a:1,b:2/service": ([("a", 1), ("b", 2)], "service", 0),
    "redis+sentinel://a,b/service/": ([("a", 26379), ("b", 26379)], "service", 0),
    "redis+sentinel://a:1,b/my-service_1.x/5": ([("a", 1), ("b", 26379)], "my-service_1.x", 5),
    "redis+sentinel://[::1]:1,[fe80::1]/service": ([("::1", 1), ("fe80::1", 26379)], "service", 0),
}


@pytest.mark.parametrize(("url", "named"), SENTINELS.items(), ids=str)
async def test_sentinels(url: str, named: tuple[list[tuple[str, int]], str, int]) -> None:
    """A URL names the Sentinels, the service and the database."""
    servers = servers_of(url, 5.0)
    assert isinstance(servers, Sentinels)
    manager = servers._pool.sentinel_manager
    asked = [
        (each.connection_pool.connection_kwargs["host"], each.connection_pool.connection_kwargs["port"])
        for each in manager.sentinels
    ]
    assert (asked, servers._pool.service_name, servers.db) == named
    made = connection(servers, "10.0.0.1:6379")
    assert type(made) is Connection
    assert (made.host, made.port, made.db) == ("10.0.0.1", 6379, named[2])
    await servers.close()


async def test_sentinels_with_passwords() -> None:
    """The Sentinels have credentials of their own; the URL's are the servers'."""
    url = f"rediss+sentinel://user:{ENCODED}@a:1/service/5?sentinel_username=su&sentinel_password={ENCODED}"
    servers = servers_of(url, 5.0)
    assert isinstance(servers, Sentinels)
    options = servers._pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
    assert (options["username"], options["password"]) == ("su", PASSWORD)
    made = connection(servers, "10.0.0.1:6379")
    assert type(made) is SSLConnection
    assert (made.username, made.password) == ("user", PASSWORD)
    assert servers.shown == "rediss+sentinel://user:***@a:1/service/5"


async def test_sentinels_without_a_primary() -> None:
    """Until a Sentinel has named a primary, there is no server for anything."""
    servers = servers_of("redis+sentinel://a:1/service", 5.0)
    assert list(servers.names()) == []
    servers.use(["10.0.0.1:6379"])
    assert (servers.of("key"), list(servers.names())) == ("10.0.0.1:6379", ["10.0.0.1:6379"])
    assert servers.losing(["10.0.0.2:6379"]) == {"10.0.0.1:6379"}


CLUSTERS = {
    "redis+cluster://a:1,b:2": [("a", 1), ("b", 2)],
    "redis+cluster://a,b/": [("a", 6379), ("b", 6379)],
    "redis+cluster://a/0": [("a", 6379)],
    "redis+cluster://[::1]:1,[fe80::1]": [("::1", 1), ("fe80::1", 6379)],
}


@pytest.mark.parametrize(("url", "nodes"), CLUSTERS.items(), ids=str)
async def test_clusters(url: str, nodes: list[tuple[str, int]]) -> None:
    """A URL names some of a Cluster's nodes."""
    servers = servers_of(url, 5.0)
    assert isinstance(servers, Cluster)
    assert [(node.host, node.port) for node in servers._client.nodes_manager.startup_nodes.values()] == nodes
    assert servers.db == 0
    await servers.close()


# Clients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_responses": True, "encoding": "latin-1", "protocol": 3},
        {"socket_timeout": 0.1, "socket_connect_timeout": 0.1, "health_check_interval": 1},
        {"username": "user", "password": PASSWORD, "db": 5, "client_name": "app"},
        {"credential_provider": UsernamePasswordCredentialProvider("user", PASSWORD)},
        {"max_connections": 1, "single_connection_client": True},
    ],
    ids=["plain", "decoding", "hasty", "credentials", "provider", "single"],
)
async def test_a_client(options: dict[str, Any]) -> None:
    """A client's way to connect is taken, and nothing that would change what arrives, nor its patience."""
    client = Redis(host="10.0.0.1", port=7000, **options)
    servers = servers_of(client, 5.0)
    made = connection(servers)
    assert (made.host, made.port, made.db) == ("10.0.0.1", 7000, options.get("db", 0))
    assert (made.username, made.password) == (options.get("username"), options.get("password"))
    assert made.credential_provider is options.get("credential_provider")
    assert (made.protocol, made.socket_timeout, made.health_check_interval) == (2, None, 0)
    assert not made.encoder.decode_responses
    assert servers.shown == f"redis://10.0.0.1:7000/{options.get('db', 0)}"
    assert servers.db == options.get("db", 0)


async def test_other_clients() -> None:
    """Clients with a pool of their own, of Sentinels and of a Cluster are taken for what they are."""
    pool = BlockingConnectionPool.from_url("redis://user:pw@10.0.0.1:7000/5")
    assert connection(servers_of(Redis(connection_pool=pool), 5.0)).host == "10.0.0.1"
    unix = servers_of(Redis(unix_socket_path="/run/redis.sock"), 5.0)
    assert connection(unix).path == "/run/redis.sock"
    tls = servers_of(Redis(ssl=True, ssl_check_hostname=False), 5.0)
    assert type(connection(tls)) is SSLConnection
    sentinel = Sentinel([("a", 1)])  # type: ignore[no-untyped-call]
    master = servers_of(sentinel.master_for("service", db=5), 5.0)
    assert isinstance(master, Sentinels)
    assert (master.shown, master.db) == ("the Sentinels' service", 5)
    cluster = servers_of(RedisCluster(startup_nodes=[ClusterNode("a", 1)]), 5.0)
    assert isinstance(cluster, Cluster)


async def test_a_client_stays_its_owners(start: Start, redis_server: RedisServer, redis_url: str) -> None:
    """A client that was handed in works before, while and after the layer is open, with its own connections."""
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        await client.set("key", "é")
        layer = await start(client)
        channel = await member(layer, "room")
        await layer.group_send("room", {"type": "x"})
        assert await receive(layer, channel) == {"type": "x"}
        assert await client.get("key") == "é"
        await layer.close()
        assert await client.get("key") == "é"
        assert len(await client.client_list()) == 1


# What is shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:s3cret@localhost/0", "redis://:***@localhost/0"),
        ("redis://user:s3cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://s3cret@localhost/0", "redis://:***@localhost/0"),
        ("redis://user:s3@cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://user:s3/cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://user:s3?cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://user:s3#cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://user:s3:cret@localhost/0", "redis://user:***@localhost/0"),
        ("redis://user:s3%40cret@[::1]:7000/0", "redis://user:***@[::1]:7000/0"),
        ("redis://localhost/0?password=s3cret", "redis://localhost/0"),
        ("redis://s3/cret:x@localhost", "redis://:***@localhost"),
        (
            "redis+sentinel://user:s3cret@a:1,b:2/service?sentinel_password=s3cret",
            "redis+sentinel://user:***@a:1,b:2/service",
        ),
        ("unix://user:s3cret@/run/redis.sock", "unix://user:***@/run/redis.sock"),
    ],
)
def test_shown_url(url: str, shown: str) -> None:
    """A URL is shown without its password and its options, also if it is none."""
    assert shown_url(url) == shown


# What is no URL

BAD = {
    "": "",
    "no scheme": "localhost:6379",
    "another scheme": "http://s3cret@localhost",
    "another kind": "redis+cloud://s3cret@localhost",
    "a kind of Unix socket": "unix+cluster://s3cret@/run/redis.sock",
    "a port that is no number": "redis://:s3cret@localhost:x/0",
    "a port that is too large": "redis://:s3cret@localhost:65536",
    "no port": "redis://:s3cret@localhost:x",
    "a database that is no number": "redis://:s3cret@localhost/x",
    "a negative database": "redis://:s3cret@localhost/-1",
    "two databases": "redis://:s3cret@localhost/1/2",
    "/ in a password": "redis://:s3cret/x@localhost:6379/0",
    "? in a password": "redis://:s3cret?x@localhost:6379/0",
    "# in a password": "redis://:s3cret#x@localhost:6379/0",
    "[ in a password": "redis://:s3cret[x@localhost:6379/0",
    "half a bracket": "redis://:s3cret@[::1",
    "an option that there isn't": "redis://:s3cret@localhost?colour=s3cret",
    "an option that there isn't for Sentinels": "redis+sentinel://:s3cret@localhost/service?colour=s3cret",
    "an option that there isn't for a Cluster": "redis+cluster://:s3cret@localhost?colour=s3cret",
    "a wrong value of an option": "redis://:s3cret@localhost?socket_timeout=s3cret",
    "a wrong value of a database": "redis://:s3cret@localhost?db=s3cret",
    "Sentinels without a service": "redis+sentinel://:s3cret@localhost",
    "Sentinels with a wrong database": "redis+sentinel://:s3cret@localhost/service/x",
    "no host of a Sentinel": "redis+sentinel://:s3cret@/service",
    "no host of one of the Sentinels": "redis+sentinel://:s3cret@a,,b/service",
    "a Sentinel with a wrong port": "redis+sentinel://:s3cret@a:x/service",
    "a Cluster with a database": "redis+cluster://:s3cret@localhost/1",
    "a Cluster with another database": "redis+cluster://:s3cret@localhost/x",
    "no host of a Cluster": "redis+cluster://:s3cret@",
    "a Cluster with a wrong port": "redis+cluster://:s3cret@a:99999",
}


@pytest.mark.parametrize("url", BAD.values(), ids=BAD)
def test_what_is_no_url(url: str) -> None:
    """What can't be a URL of servers is refused when the layer is made, with the password nowhere in the error."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is looked at below
        RedisLayer(url)
    with pytest.raises(SettingsError) as caught_of_settings:
        make_layer(url, capacity=1, expiry=1)
    for error in (caught.value, caught_of_settings.value):
        text = "".join(traceback.format_exception(error, limit=0))
        assert "s3cret" not in text
        assert 10 < len(text) < 500


@pytest.mark.parametrize("source", [None, 7, b"redis://localhost", ["redis://localhost"], object()])
def test_what_is_no_source(source: Any) -> None:
    """What is neither a URL nor a client is refused."""
    with pytest.raises(ValueError, match="a Redis URL or a client"):
        RedisLayer(source)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"start": "later"}, "start"),
        ({"capacity": 0}, "capacity"),
        ({"expiry": 0}, "expiry"),
        ({"serializer": "no.such.module"}, "serializer"),
        ({"serializer": object()}, "serializer"),
        ({"prefix": ""}, "name"),
        ({"prefix": "a{b"}, "name"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], text: str) -> None:
    """Wrong arguments are refused when the layer is made, by their name."""
    with pytest.raises(ValueError, match=text):
        RedisLayer(**options)


async def test_options_reach_the_connection(start: Start, redis_server: RedisServer, redis_url: str) -> None:
    """Options behind the question mark are redis-py's, and are used."""
    await start(f"{redis_url}?client_name=our-app")
    clients = ask(redis_server, "CLIENT", "LIST")
    assert clients.count("name=our-app") == 2


async def test_percent_encoded_passwords_are_right(start: Start, redis_server: RedisServer, redis_url: str) -> None:
    """A user and a password full of a URL's own signs get in."""
    ask(redis_server, "ACL", "SETUSER", "us@er:/", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    user = quote("us@er:/", safe="")
    layer = await start(f"redis://{user}:{ENCODED}@127.0.0.1:{redis_server.port}/0")
    assert await layer.health()
    await layer.close()
    ask(redis_server, "ACL", "DELUSER", "us@er:/")
