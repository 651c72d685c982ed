"""What a client sees of refusals and endings, on every server and every WebSocket implementation that we support."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anyio.abc import Process
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

APP = "tests.servers.app:app"

COMMANDS = {
    "uvicorn websockets-sansio": ["uvicorn", APP, "--port", "{port}", "--ws", "websockets-sansio"],
    "uvicorn websockets": ["uvicorn", APP, "--port", "{port}", "--ws", "websockets"],
    "uvicorn wsproto": ["uvicorn", APP, "--port", "{port}", "--ws", "wsproto"],
    "hypercorn": ["hypercorn", APP, "--bind", "127.0.0.1:{port}", "--graceful-timeout", "2"],
}

REFUSALS = [
    ("http?number=401", 401, 4501, "not so"),
    ("http?number=403", 403, 4503, "not so"),
    ("http?number=404", 404, 4504, "not so"),
    ("http?number=429", 429, 4029, "not so"),
    ("http?number=503", 503, 1013, "not so"),
    ("refuse?number=4501", 401, 4501, "not so"),
    ("refuse?number=4009", 429, 4009, "not so"),
    ("refuse?number=4600", 403, 4600, "not so"),
    ("fail", 500, 1011, "Internal Server Error"),
    ("any?number=x", 422, 4500, "number: Input should be a valid integer, unable to parse string as an integer"),
]


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    name: str
    url: str
    process: Process


@pytest.fixture(params=COMMANDS)
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [part.format(port=port) for part in COMMANDS[request.param]]
    async with await anyio.open_process(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            with anyio.fail_after(30):
                await _until_listening(port)
            yield Running(request.param, f"ws://127.0.0.1:{port}", process)
        finally:
            if process.returncode is None:
                process.kill()


async def _until_listening(port: int) -> None:
    while True:
        try:
            async with await anyio.connect_tcp("127.0.0.1", port):
                return
        except OSError:
            await anyio.sleep(0.02)


async def _close_of(client: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed, anyio.fail_after(10):
        await _read_to_the_end(client)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


async def _read_to_the_end(client: ClientConnection) -> None:
    while True:
        await client.recv()


async def _event(client: ClientConnection, kind: str) -> dict[str, Any]:
    with anyio.fail_after(10):
        while True:
            event: dict[str, Any] = json.loads(await client.recv())
            if event["type"] == kind:
                return event


async def test_refusals_as_responses(server: Running) -> None:
    """A refused handshake is an HTTP response with its status, and the body of an internal error tells nothing."""
    for path, status, _, detail in REFUSALS:
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"{server.url}/http/{path}"):
                pass
        response = refused.value.response
        assert (path, response.status_code) == (path, status)
        if status != 422:
            assert json.loads(response.body)["detail"] == detail
        assert ("Retry-After" in response.headers) is path.startswith("http")


async def test_refusals_as_close_codes(server: Running) -> None:
    """With reject_mode="close" a refused handshake is accepted and closed with the code that says why."""
    for path, _, code, reason in REFUSALS:
        async with connect(f"{server.url}/close/{path}") as client:
            with contextlib.suppress(ConnectionClosed):
                await client.send('{"action": "say", "data": "never heard"}')
            assert (path, await _close_of(client)) == (path, (code, reason))


async def test_own_close_and_late_failure(server: Running) -> None:
    """A close from inside arrives with code and reason, and an error in connect after the accept as 1011."""
    async with connect(f"{server.url}/http/any") as client:
        await client.send('{"action": "bye"}')
        assert await _close_of(client) == (4600, "bye")
    async with connect(f"{server.url}/http/fail-late") as client:
        assert (await _close_of(client))[0] == 1011


async def test_ways_to_leave(server: Running) -> None:
    """The disconnect hook hears how the client went: with a code and a reason, or without a word."""
    async with connect(f"{server.url}/http/watching") as watching:
        leaving = await connect(f"{server.url}/http/leaving")
        await leaving.close(4005, "é")
        event = await _event(watching, "ended")
        if server.name != "hypercorn":  # which doesn't pass on what the close frame says
            assert (event["how"], event["code"], event["reason"]) == ("leaving", 4005, "é")
        vanishing = await connect(f"{server.url}/http/vanishing")
        vanishing.transport.abort()
        event = await _event(watching, "ended")
        assert (event["how"], event["code"], event["reason"]) == ("vanishing", 1006, "")


async def test_events_and_replies(server: Running) -> None:
    """A group_send reaches every member, and the reply the one that asked."""
    async with connect(f"{server.url}/http/one") as one, connect(f"{server.url}/http/two") as two:
        await one.send('{"action": "say", "request_id": "é", "data": "hello"}')
        assert (await _event(two, "said"))["text"] == "hello"
        assert (await _event(one, "response"))["request_id"] == "é"


async def test_a_shutdown_ends_open_connections(server: Running) -> None:
    """A server that is told to stop closes its clients and ends, though a connection is open."""
    async with connect(f"{server.url}/http/any") as client:
        server.process.terminate()
        code, _ = await _close_of(client)
        assert code in (1011, 1012)  # hypercorn says 1011
        with anyio.fail_after(15):
            await server.process.wait()
