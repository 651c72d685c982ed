"""What the tests of the Redis layer share: layers that stand for processes, and what they have received."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol, Self

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from fastapi_channels.layers import ChannelLayer
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import RedisServer
from tests.brokers import Cluster, Sentinels, ask

#: Within how many seconds whatever a test waits for comes.
SOON = 15.0

MARKER = {"type": "marker"}


@pytest.fixture(scope="session")
def sentinels() -> Iterator[Sentinels]:
    """Sentinels for all tests; `heal` repairs them."""
    with Sentinels() as sentinels:
        yield sentinels


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Cluster with replicas for all tests; `heal` repairs it."""
    with Cluster(replicas=1) as cluster:
        yield cluster


class Start(Protocol):
    """Opens a layer, which is closed after the test; by default of the test's server."""

    async def __call__(self, url: Any = None, **options: Any) -> RedisLayer: ...


@pytest.fixture
async def start(request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """Open layers, each of which is a process to the others; when they are closed nothing of them is left here."""
    layers: list[RedisLayer] = []

    async def start(url: Any = None, **options: Any) -> RedisLayer:
        layer = RedisLayer(request.getfixturevalue("redis_url") if url is None else url, **options)
        layers.append(layer)
        await layer.open()
        return layer

    yield start
    async with asyncio.timeout(SOON):
        await asyncio.gather(*(layer.close() for layer in layers))
    assert not tasks_of_layers()


@pytest.fixture
async def client(redis_url: str) -> "AsyncIterator[Redis]":
    """A client of the test's server, with its own connection, that gives str for whatever there is."""
    client = Redis.from_url(
        redis_url, protocol=2, single_connection_client=True, decode_responses=True, encoding_errors="surrogateescape"
    )
    async with client:
        yield client


@pytest.fixture
def configure(redis_server: RedisServer, redis_url: str) -> Iterator[Callable[[str, str], None]]:
    """Set an option of the test's server for the time of the test."""
    usual: dict[str, str] = {}

    def configure(option: str, value: str) -> None:
        usual.setdefault(option, ask(redis_server, "CONFIG", "GET", option)[1])
        ask(redis_server, "CONFIG", "SET", option, value)

    yield configure
    redis_server.resume()
    for option, value in usual.items():
        ask(redis_server, "CONFIG", "SET", option, value)


def tasks_of_layers() -> list[asyncio.Task[Any]]:
    """The tasks of this event loop that a layer runs."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    return [task for task, code in codes.items() if code is not None and "/fastapi_channels/" in code.co_filename]


def numbered(numbers: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    """Messages with these numbers."""
    return [{"type": "x", "number": number, **more} for number in numbers]


async def member(layer: ChannelLayer, *groups: str) -> str:
    """A new channel in these groups."""
    channel = await layer.new_channel()
    for group in groups:
        await layer.group_add(group, channel)
    return channel


async def receive(layer: ChannelLayer, channel: str) -> dict[str, Any]:
    """The next message of a channel, which comes soon."""
    async with asyncio.timeout(SOON):
        return await layer.receive(channel)


async def received(layer: ChannelLayer, channel: str) -> list[Any]:
    """What comes before a marker: the number of each message that has one, and the others whole."""
    messages = []
    while (message := await receive(layer, channel)) != MARKER:
        messages.append(message.get("number", message))
    return messages


async def become(is_so: Callable[[], Awaitable[Any] | bool], what: str) -> None:
    """Wait until something is so."""
    deadline = asyncio.get_running_loop().time() + SOON
    while True:
        answer = is_so()
        if await answer if isinstance(answer, Awaitable) else answer:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {SOON} s: {what}"
        await asyncio.sleep(0.01)


async def healthy(*layers: ChannelLayer) -> None:
    """Wait until layers are healthy."""
    for layer in layers:
        await become(layer.health, "the layer is healthy")


async def lost(*layers: ChannelLayer) -> None:
    """Wait until layers have taken note that they can neither send nor hear."""
    for layer in layers:

        async def is_lost(layer: ChannelLayer = layer) -> bool:
            health = await layer.health()
            return not (health.can_send or health.can_receive)

        await become(is_lost, "the layer has lost both of its connections")


async def deaf(layer: ChannelLayer) -> None:
    """Wait until a layer has taken note that it can't hear."""

    async def is_deaf() -> bool:
        return not (await layer.health()).can_receive

    await become(is_deaf, "the layer has lost the connection that subscribes")


def logged(caplog: pytest.LogCaptureFixture, *, level: int = logging.WARNING) -> list[str]:
    """What the package has logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "fastapi_channels" and record.levelno >= level
    ]


async def cut_off(client: "Redis", kind: str) -> None:
    """Have the server drop its other connections that subscribe ("pubsub"), or those that don't ("normal")."""
    await client.client_kill_filter(_type=kind, skipme=True)


async def commands(client: "Redis") -> Counter[str]:
    """How often the server was asked what since CONFIG RESETSTAT; without what links and this test ask by the way."""
    stats = await client.info("commandstats")
    counted = Counter({name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()})
    for ours in ("ping", "info", "config|resetstat"):
        del counted[ours]
    return counted


async def connections(client: "Redis") -> int:
    """How many connections the server has, besides this one."""
    return len(await client.client_list()) - 1


async def published(pubsub: PubSub) -> str:
    """What is published next on a channel that is subscribed to."""
    async with asyncio.timeout(SOON):
        async for heard in pubsub.listen():
            if heard["type"] == "message":
                return str(heard["data"])
    raise AssertionError("the connection is lost")


class Proxy:
    """Stands between layers and a server, and can stop to forward the connections that subscribe.

    Args:
        port: Of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self._target = port
        self._server: asyncio.Server | None = None
        self._subscribers: set[asyncio.Event] = set()

    def cut_subscribers(self) -> None:
        """Carry nothing more for those who subscribe now, in either direction; they are told nothing."""
        for flows in self._subscribers:
            flows.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        flows = asyncio.Event()
        flows.set()

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if b"SUBSCRIBE" in data and source is reader:
                    self._subscribers.add(flows)
                await flows.wait()
                sink.write(data)

        forwarding = [asyncio.create_task(forward(reader, server_writer))]
        forwarding.append(asyncio.create_task(forward(server_reader, writer)))
        try:
            await asyncio.wait(forwarding, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # asyncio's own server would log it
        finally:
            for task in forwarding:
                task.cancel()
            self._subscribers.discard(flows)
            writer.close()
            server_writer.close()
