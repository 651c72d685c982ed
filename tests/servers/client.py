"""A client that sends what it likes when it likes, also before its handshake is answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import anyio
import httpx
from anyio.abc import SocketStream
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Origin, Subprotocol
from websockets.uri import parse_uri

from fastapi_channels.testing.server import Watched

DEADLINE = 30.0


def ask(text: str) -> str:
    """The frame that asks for the action of every consumer here."""
    return json.dumps({"action": "say", "request_id": text, "data": text})


@dataclass(frozen=True)
class Server:
    """A server in a process of its own, with the application of `guarded.py`."""

    name: str
    port: int
    process: Watched
    http: httpx.AsyncClient

    async def handled(self, visit: str) -> Mapping[str, int]:
        """What was handled of a connection, once the application is done with it."""
        told: Mapping[str, int] = (await self.http.get(f"/visits/{visit}")).raise_for_status().json()
        return told

    async def tell(self, path: str) -> None:
        """Ask it to do something."""
        _ = (await self.http.post(path)).raise_for_status()


@dataclass
class Client:
    """One connection; see `come`."""

    visit: str
    _stream: SocketStream
    _protocol: ClientProtocol
    #: The text frames that have come and are not read yet.
    _frames: list[str] = field(default_factory=list)
    _response: Response | None = None

    @property
    def subprotocol(self) -> str | None:
        """The one that the handshake was answered with."""
        return self._protocol.subprotocol

    async def send(self, *frames: str) -> None:
        """Send text frames in one write, whatever the state of the connection; a server may have hung up."""
        with _hung_up():
            await self._stream.send(_serialized(frames))

    async def answer(self) -> Response:
        """How the handshake was answered."""
        while self._response is None:
            assert await self._read(), "no answer"
        return self._response

    async def frame(self) -> dict[str, Any]:
        """The next frame, as JSON."""
        while not self._frames:
            assert await self._read(), f"no frame but {self._protocol.close_rcvd}"
        content: dict[str, Any] = json.loads(self._frames.pop(0))
        return content

    async def ending(self) -> Close:
        """With what code and reason the server has closed the connection."""
        while self._protocol.close_rcvd is None:
            assert await self._read(), "no close frame"
        return self._protocol.close_rcvd

    async def leave(self) -> None:
        """Go without a word."""
        await self._stream.aclose()

    async def _read(self) -> bool:
        with anyio.fail_after(DEADLINE):
            try:
                data = await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return False
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                self._response = event
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._frames.append(bytes(event.data).decode())
        if self._protocol.close_rcvd is not None:
            with _hung_up():
                await self._stream.send(b"".join(self._protocol.data_to_send()))
        assert self._protocol.handshake_exc is None or isinstance(self._protocol.handshake_exc, InvalidHandshake)
        return True


@asynccontextmanager
async def come(
    port: int,
    path: str,
    *,
    token: str | None = None,
    origin: str | None = None,
    subprotocols: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    frames: Sequence[str] = (),
    host: str | None = None,
    query: Mapping[str, str] | None = None,
) -> AsyncIterator[Client]:
    """Connect, and send a handshake.

    Args:
        port: The server's.
        path: Of one of its doors.
        token: For the Authorization header.
        origin: For the Origin header.
        subprotocols: Those to offer.
        headers: More of them.
        frames: Text frames that go out in one write with the handshake.
        host: For the Host header; the server's own by default.
        query: More of the query.
    """
    visit = uuid4().hex
    url = httpx.URL(f"ws://{host or f'127.0.0.1:{port}'}{path}", params={"visit": visit, **(query or {})})
    protocol = ClientProtocol(
        parse_uri(str(url)),
        origin=None if origin is None else Origin(origin),
        subprotocols=[Subprotocol(name) for name in subprotocols] or None,
    )
    request = protocol.connect()
    if token is not None:
        request.headers["Authorization"] = f"Bearer {token}"
    request.headers.update(headers or {})
    protocol.send_request(request)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(b"".join(protocol.data_to_send()) + _serialized(frames))
        yield Client(visit, stream, protocol)


def _serialized(frames: Sequence[str]) -> bytes:
    return b"".join(Frame(Opcode.TEXT, frame.encode()).serialize(mask=True) for frame in frames)


def _hung_up() -> AbstractContextManager[None]:
    return suppress(anyio.BrokenResourceError)
