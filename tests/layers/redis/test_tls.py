"""Over TLS: who isn't trusted, and connections that can't say goodbye."""

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from fastapi_channels.layers import Counters, LayerUnavailable
from tests.brokers import TlsServer, tls_server
from tests.layers.redis.conftest import MARKER, SOON, Start, become, healthy, lost, member, receive, received

MESSAGE = {"type": "x"}
TIMEOUT = 0.5


@pytest.fixture(scope="module")
def shared() -> Iterator[TlsServer]:
    with tls_server("--requirepass", "s3cret") as server:
        yield server


@pytest.fixture
def server(shared: TlsServer) -> TlsServer:
    """A server with TLS that works, whatever the test before has done to it."""
    if shared.is_running:
        shared.resume()
        shared.flush()
    else:
        shared.restart()
    return shared


def url(server: TlsServer) -> str:
    return f"{server.url}?ssl_ca_certs={server.ca_path}"


def sockets(port: int) -> int:
    """How many connections to a port this process has."""
    return sum(bool(each.raddr) and each.raddr.port == port for each in psutil.Process().net_connections("tcp"))


@pytest.mark.parametrize(
    ("scheme", "options", "why"),
    [
        ("rediss", "", "(?i)certificate"),
        ("redis", "", None),
    ],
    ids=["an unknown authority", "no TLS"],
)
async def test_who_is_not_trusted(start: Start, server: TlsServer, scheme: str, options: str, why: str | None) -> None:
    """A server whose certificate isn't trusted, or that wants TLS where we don't, can't be opened."""
    place = f"{scheme}://:s3cret@127.0.0.1:{server.port}/0{options}"
    async with asyncio.timeout(SOON):
        with pytest.raises(LayerUnavailable, match=why) as caught:
            await start(place, timeout=TIMEOUT)
    assert "s3cret" not in str(caught.value)
    assert str(server.port) in str(caught.value)


async def test_names_and_addresses(start: Start, server: TlsServer) -> None:
    """Processes that know the server by its name, by its address, and that check nothing, hear each other."""
    urls = [url(server), url(server).replace("127.0.0.1", "localhost"), f"{server.url}?ssl_cert_reqs=none"]
    layers = [await start(each) for each in urls]
    channels = {layer: await member(layer, "room") for layer in layers}
    for number, layer in enumerate(layers):
        await layer.group_send("room", {"type": "x", "number": number, "text": "x" * 100_000})
    await layers[0].group_send("room", MARKER)
    for layer, channel in channels.items():
        assert await received(layer, channel) == [0, 1, 2]


@pytest.mark.parametrize("lose", ["kill", "freeze"])
async def test_an_outage(start: Start, server: TlsServer, lose: str) -> None:
    """Members stay when the server goes away and comes back."""
    one, two = await start(url(server), timeout=TIMEOUT), await start(url(server), timeout=TIMEOUT)
    channel = await member(two, "room")
    (server.kill if lose == "kill" else server.pause)()
    await lost(one, two)
    await asyncio.to_thread(server.restart if lose == "kill" else server.resume)
    await healthy(one, two)
    await one.group_send("room", MESSAGE)
    assert await receive(two, channel) == MESSAGE
    assert two.counters == Counters(gaps=1)


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_closing_while_the_server_is_frozen(start: Start, server: TlsServer, when: str) -> None:
    """A server that answers no goodbye doesn't hold up who closes; no connection is left when it goes on."""
    layer = await start(url(server), timeout=TIMEOUT)
    server.pause()
    if when == "later":
        await lost(layer)
    async with asyncio.timeout(SOON):
        await layer.close()
    server.resume()
    await become(lambda: not sockets(server.port), "no connection is left")
