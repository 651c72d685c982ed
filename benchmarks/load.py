"""The load: WebSocket clients by hand, so light that the server stays the bottleneck.

They know no more of RFC 6455 than they need: the servers send whole, unmasked frames and no pings; the mask of the
clients' frames is zero, which costs the server the same as any other.
"""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self, TypeVar, cast

HOST = "127.0.0.1"
TEXT = 1
OPENING_AT_ONCE = 100
OPENING_TIMEOUT = 10
SETTLING = 0.3
"""Seconds for what the server does after it has answered: joining its groups, or leaving them."""
_NUMBER = re.compile(rb'"n":(\d+)')
_SENT = re.compile(rb'"sent":(\d+)')


class LoadError(Exception):
    """The server didn't do its work: a message is missing, a reply is wrong, a connection was refused or lost."""


def handshake(path: str) -> bytes:
    """Make the request that opens a WebSocket at `path`."""
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {HOST}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def text_frame(payload: bytes) -> bytes:
    """Frame a client's text of less than 64 KiB."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2)
    return b"\x81" + length + bytes(4) + payload


class Connection(asyncio.Protocol):
    """One WebSocket that does nothing: the base of those that count or ask."""

    def __init__(self, path: str) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: LoadError | None = None
        self._path = path
        self._pending = b""
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(handshake(self._path))

    def data_received(self, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
        if not self.opened.done():
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._pending = head
                return
            self._open(head)
        self._pending = data[self._read_frames(data) :]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self.failed(LoadError(f"The server closed {self._path}: {exc or 'end of stream'}"))

    def close(self) -> None:
        """Cut the connection off."""
        self._closing = True
        self.transport.abort()

    def received(self, payload: bytes) -> None:
        """Take a text frame."""

    def failed(self, error: LoadError) -> None:
        """Take notice that the connection is of no use any more."""
        self.error = error
        if not self.opened.done():
            self.opened.set_exception(error)

    def _open(self, head: bytes) -> None:
        status = head.partition(b"\r\n")[0].decode()
        if " 101 " in status:
            self.opened.set_result(None)
        else:
            self.failed(LoadError(f"{self._path} was refused: {status}"))

    def _read_frames(self, data: bytes) -> int:
        """Read the complete frames, and return where they end."""
        position, end = 0, len(data)
        while position + 2 <= end:
            size, start = data[position + 1], position + 2
            if size >= 126:
                start += 2 if size == 126 else 8
                size = int.from_bytes(data[position + 2 : start])
            if start + size > end:
                break
            self._read_frame(data[position] & 0x0F, data[start : start + size])
            position = start + size
        return position

    def _read_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT:
            self.received(payload)
        else:
            self.failed(LoadError(f"{self._path} sent a frame of opcode {opcode}: {payload!r}"))


class Countdown:
    """Waits for a number of things to happen."""

    def __init__(self, count: int) -> None:
        self.left = count
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tick(self) -> None:
        """Count one."""
        self.left -= 1
        if self.left == 0 and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: LoadError) -> None:
        """Wait no longer."""
        if not self._done.done():
            self._done.set_exception(error)

    async def wait(self, timeout: float) -> None:
        """Wait until all have happened.

        Raises:
            LoadError: Some did not within `timeout` seconds, or something failed.
        """
        try:
            await asyncio.wait_for(self._done, timeout)
        except TimeoutError:
            raise LoadError(f"{self.left} did not arrive within {timeout:.0f} s") from None


class Member(Connection):
    """A connection that counts what it gets."""

    countdown: Countdown | None = None
    count = 0
    last = b""

    def received(self, payload: bytes) -> None:
        self.count += 1
        self.last = payload
        if self.countdown is not None:
            self.countdown.tick()

    def failed(self, error: LoadError) -> None:
        super().failed(error)
        if self.countdown is not None:
            self.countdown.fail(error)


class NumberedMember(Member):
    """A member that keeps the numbers of the messages that it gets."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.numbers: list[int] = []

    def received(self, payload: bytes) -> None:
        number = _NUMBER.search(payload)
        if number is None:
            self.failed(LoadError(f"A message without a number: {payload[:200]!r}"))
        else:
            self.numbers.append(int(number[1]))
        super().received(payload)


class TimedMember(Member):
    """A member that also notes how old each message is when it comes, in seconds."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.ages: list[float] = []

    def received(self, payload: bytes) -> None:
        sent = _SENT.search(payload)
        if sent is None:
            self.failed(LoadError(f"A message without a time stamp: {payload[:200]!r}"))
        else:
            self.ages.append((time.monotonic_ns() - int(sent[1])) / 1e9)
        super().received(payload)


class Caller(Connection):
    """A connection that asks, awaits the reply, and asks again."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._request_id = 0
        self._left = 0
        self._countdown: Countdown | None = None

    def ask(self, times: int, countdown: Countdown) -> None:
        """Begin to ask; every right reply is a tick of the countdown."""
        self._left, self._countdown = times, countdown
        self._ask()

    def received(self, payload: bytes) -> None:
        if b'"request_id":%d,' % self._request_id not in payload or b'"status":"ok"' not in payload:
            self.failed(LoadError(f"Not the reply to {self._request_id}: {payload!r}"))
            return
        self._left -= 1
        if self._left:
            self._ask()
        elif json.loads(payload) != self._reply():
            self.failed(LoadError(f"A reply of another shape: {payload!r}"))
            return
        if self._countdown is not None:
            self._countdown.tick()

    def failed(self, error: LoadError) -> None:
        super().failed(error)
        if self._countdown is not None:
            self._countdown.fail(error)

    def _ask(self) -> None:
        number = self._request_id = self._request_id + 1
        request = b'{"action":"echo","request_id":%d,"data":{"text":"%s","n":%d}}' % (number, b"x" * 64, number)
        self.transport.write(text_frame(request))

    def _reply(self) -> dict[str, object]:
        number = self._request_id
        data = {"text": "x" * 64, "n": number}
        return {
            "type": "response",
            "action": "echo",
            "request_id": number,
            "status": "ok",
            "data": data,
            "errors": None,
        }


class StalledMember:
    """A member that completes the handshake and then never reads, with the smallest receive buffer there is."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self._socket.settimeout(10)
        self._address, self._path = (HOST, port), path

    def __enter__(self) -> Self:
        self._socket.connect(self._address)
        self._socket.sendall(handshake(self._path))
        head = b""
        while b"\r\n\r\n" not in head:
            head += self._socket.recv(1) or b"\r\n\r\n"
        if b" 101 " not in head:
            raise LoadError(f"{self._path} was refused: {head!r}")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


C = TypeVar("C", bound=Connection)


@asynccontextmanager
async def connected(port: int, path: str, kind: Callable[[str], C], count: int) -> AsyncIterator[list[C]]:
    """Keep a number of connections to `path` open for the length of the block.

    Raises:
        LoadError: One was refused, not answered, or lost within the block.
    """
    loop = asyncio.get_running_loop()
    connections: list[C] = []

    async def open_one() -> None:
        _, connection = await loop.create_connection(lambda: kind(path), HOST, port)
        connections.append(connection)
        try:
            await asyncio.wait_for(connection.opened, OPENING_TIMEOUT)
        except TimeoutError:
            raise LoadError(f"{path} was not answered") from None

    try:
        for first in range(0, count, OPENING_AT_ONCE):
            await asyncio.gather(*(open_one() for _ in range(min(OPENING_AT_ONCE, count - first))))
        await asyncio.sleep(SETTLING)
        yield connections
        for connection in connections:
            if connection.error is not None:
                raise connection.error
    finally:
        for connection in connections:
            connection.close()
        await asyncio.sleep(SETTLING)


async def deliver(
    members: Sequence[Member], numbers: range, publishing: Awaitable[object], timeout: float = 60
) -> None:
    """Publish the messages of these numbers, and wait until every member has got every one.

    Raises:
        LoadError: A message is missing, came twice or was overtaken by the last one.
    """
    countdown = Countdown(len(numbers) * len(members))
    before = {member: member.count for member in members}
    for member in members:
        member.countdown = countdown
    await publishing
    await countdown.wait(timeout)
    for member in members:
        count, last = member.count - before[member], json.loads(member.last)["n"]
        if (count, last) != (len(numbers), numbers[-1]):
            raise LoadError(f"Of the messages {numbers} a member got {count}, number {last} being the last")


async def ask(callers: Sequence[Caller], times: int, timeout: float = 30) -> None:
    """Let every caller ask a number of times, one question after the other.

    Raises:
        LoadError: A reply is missing or wrong.
    """
    countdown = Countdown(times * len(callers))
    for caller in callers:
        caller.ask(times, countdown)
    await countdown.wait(timeout)
