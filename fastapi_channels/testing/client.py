"""`connect`: a WebSocket client that talks to an application in-process, with no server and no thread."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

from fastapi_channels.exceptions import ChannelsError
from fastapi_channels.testing.lifespan import running

__all__ = ["ConnectionClosed", "RefusedResponse", "WebSocketSession", "connect"]

#: How many seconds the application has to end when the client has left.
END_TIMEOUT = 15.0

#: RFC 6455 5.5: a control frame has 125 bytes, of which the code takes two.
MAX_REASON = 123

#: Stays as it is in a path; everything else that is not ASCII letters and digits is percent-encoded.
_SAFE_IN_PATH = "/%:@!$&'()*+,;=-._~"
_SAFE_IN_QUERY = _SAFE_IN_PATH + "?"


class ConnectionClosed(ChannelsError):
    """The connection is closed, so nothing can be sent and there is nothing to receive.

    Attributes:
        code: The close code.
        reason: The close reason.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the connection is closed: {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RefusedResponse:
    """The HTTP response of a refused handshake.

    Attributes:
        status_code: The status.
        headers: Its headers, by lower-case name.
        content: Its body.
    """

    status_code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""

    def json(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.content)


class WebSocketSession:
    """A client's side of one connection; `connect` makes it.

    What leaves the application as an exception is raised by what the test does next on the session, and at the latest
    when the block of `connect` is left.

    Attributes:
        accepted: Whether the handshake was answered with yes.
        subprotocol: The one that the application chose, or None.
        headers: Those that the application sent with its yes, by lower-case name.
        response: The refusal, or None. An application that ends without an answer refuses with 500, as under a server.
        close_code: How the connection ended, or None while it is open.
        close_reason: Likewise.
    """

    def __init__(self, app: Any, scope: dict[str, Any]) -> None:
        self.accepted = False
        self.subprotocol: str | None = None
        self.headers: Mapping[str, str] = {}
        self.response: RefusedResponse | None = None
        self.close_code: int | None = None
        self.close_reason: str | None = None
        self._app = app
        self._scope = scope
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._frames: deque[Mapping[str, Any]] = deque()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._was_raised = False

    # The client's side

    async def send_text(self, text: str) -> None:
        """Send a text frame.

        Raises:
            ConnectionClosed: The connection is closed.
        """
        self._send({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame; otherwise like `send_text`."""
        self._send({"type": "websocket.receive", "bytes": data})

    async def send_json(self, content: Any) -> None:
        """Send a text frame with `content` as JSON; otherwise like `send_text`."""
        await self.send_text(json.dumps(content))

    async def receive_text(self, timeout: float = 1.0) -> str:
        """The next frame, which is text.

        Args:
            timeout: How many seconds to wait; passing cancels nothing of the application.

        Raises:
            TimeoutError: There was none in time.
            ConnectionClosed: There will be none.
            AssertionError: It is binary.
        """
        frame = await self._receive(timeout)
        if frame.get("text") is None:
            raise AssertionError(f"a text frame was expected, not {frame!r}")
        return str(frame["text"])

    async def receive_bytes(self, timeout: float = 1.0) -> bytes:
        """The next frame, which is binary; otherwise like `receive_text`."""
        frame = await self._receive(timeout)
        if frame.get("bytes") is None:
            raise AssertionError(f"a binary frame was expected, not {frame!r}")
        return bytes(frame["bytes"])

    async def receive_json(self, timeout: float = 1.0) -> Any:
        """What the next frame, of text or bytes, holds as JSON; otherwise like `receive_text`."""
        frame = await self._receive(timeout)
        return json.loads(frame["bytes"] if frame.get("text") is None else frame["text"])

    async def receive_nothing(self, timeout: float = 0.1) -> bool:
        """Whether no frame comes within `timeout` seconds; one that comes stays to be received.

        A frame that comes later goes unseen. Where the order of frames is known, it is surer, and quicker, to send
        something that is answered and to see that the answer is the next frame.
        """
        is_there = await self._frame_comes(timeout)
        if not is_there:
            self._raise_failure()
        return not is_there

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection with a close frame, and wait until the application is through with it.

        Does nothing on one that is closed but wait.

        Raises:
            TimeoutError: The application had not ended after 15 s; it was cancelled.
        """
        await self._leave({"type": "websocket.disconnect", "code": code, "reason": reason})

    async def vanish(self) -> None:
        """Be gone without a close frame, as by a lost network; otherwise like `close`."""
        await self._leave({"type": "websocket.disconnect", "code": 1005})

    async def closed(self, timeout: float = 1.0) -> tuple[int, str]:
        """Wait until the application is through with the connection, and return the close code and the reason.

        Args:
            timeout: How many seconds to wait; passing cancels nothing of the application.

        Raises:
            TimeoutError: It was not in time.
        """
        assert self._task is not None
        await asyncio.wait({self._task}, timeout=timeout)
        self._raise_failure()
        if self.close_code is None or not self._task.done():
            raise TimeoutError("the application has not closed the connection")
        return self.close_code, self.close_reason or ""

    # The application's side

    async def _send_to_client(self, message: Any) -> None:
        """The `send` of the ASGI connection scope, as strict as a server's."""
        kind = message["type"]
        if self.close_code is not None:
            raise OSError(f"{kind} after the connection was closed")
        if self.response is not None:
            expected = ["websocket.http.response.body"]
        elif self.accepted:
            expected = ["websocket.send", "websocket.close"]
        else:
            expected = ["websocket.accept", "websocket.close", "websocket.http.response.start"]
        if kind not in expected:
            raise RuntimeError(f"the application sent {kind!r}, where {' or '.join(expected)} is due")
        if kind == "websocket.accept":
            self.accepted = True
            self.subprotocol = message.get("subprotocol")
            self.headers = _decoded(message.get("headers", ()))
        elif kind == "websocket.send":
            self._frames.append(message)
        elif kind == "websocket.close":
            code, reason = message.get("code", 1000), message.get("reason") or ""
            if not self.accepted:
                self.response = RefusedResponse(403)
                reason = str(reason)  # FastAPI's is a list; servers don't look at it
            elif len(reason.encode()) > MAX_REASON:
                raise ValueError(f"a close reason has at most {MAX_REASON} bytes, not {len(reason.encode())}")
            self._to_app.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self._close(code, reason)
        elif kind == "websocket.http.response.start":
            self.response = RefusedResponse(message["status"], _decoded(message.get("headers", ())))
        else:
            assert self.response is not None
            content = self.response.content + message.get("body", b"")
            self.response = RefusedResponse(self.response.status_code, self.response.headers, content)
            if not message.get("more_body", False):
                for _ in range(2):  # as uvicorn: when the response is sent, and when the connection is lost
                    self._to_app.put_nowait({"type": "websocket.disconnect", "code": 1006})
                self._close(1006, "")
        self._news.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._to_app.get, self._send_to_client)
        except Exception as error:
            self._failure = error
        finally:
            if not self.accepted and self.response is None:
                self.response = RefusedResponse(500)
            self._close(1006, "")  # an application that ends without a word

    # Both

    def _close(self, code: int, reason: str) -> None:
        if self.close_code is None:
            self.close_code, self.close_reason = code, reason
        self._news.set()

    def _send(self, message: dict[str, Any]) -> None:
        if self.close_code is not None:
            raise self._end()
        self._to_app.put_nowait(message)

    async def _receive(self, timeout: float) -> Mapping[str, Any]:
        if await self._frame_comes(timeout):
            return self._frames.popleft()
        if self.close_code is None:
            raise TimeoutError(f"no frame came within {timeout:g} s")
        raise self._end()

    async def _frame_comes(self, timeout: float) -> bool:
        """Wait until there is a frame, or can be none any more."""
        try:
            async with asyncio.timeout(timeout):
                while not self._frames and self.close_code is None:
                    self._news.clear()
                    await self._news.wait()
                if not self._frames and self._task is not None:
                    await asyncio.wait({self._task})  # it may have closed because it is about to fail
        except TimeoutError:
            pass
        return bool(self._frames)

    def _end(self) -> Exception:
        """Why nothing can be sent or received any more."""
        if self._failure is not None:
            self._was_raised = True
            return self._failure
        return ConnectionClosed(self.close_code or 1006, self.close_reason or "")

    def _raise_failure(self) -> None:
        if self._failure is not None and not self._was_raised:
            raise self._end()

    async def _leave(self, message: dict[str, Any]) -> None:
        assert self._task is not None
        if self.close_code is None:
            self._to_app.put_nowait(message)
            self._close(message["code"], message.get("reason", ""))
        _, pending = await asyncio.wait({self._task}, timeout=END_TIMEOUT)
        if pending:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise TimeoutError(f"the application did not end within {END_TIMEOUT:g} s after the client had left")
        self._raise_failure()

    async def __aenter__(self) -> Self:
        self._to_app.put_nowait({"type": "websocket.connect"})
        self._task = asyncio.create_task(self._run())
        try:
            while not self.accepted and self.close_code is None:
                self._news.clear()
                await self._news.wait()
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except Exception:
            # The failure of the application is why the test failed, or else the test's own is what counts.
            if exc is None or (isinstance(exc, Exception) and self._failure is not None):
                raise


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


@asynccontextmanager
async def connect(
    app: Any,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    subprotocols: Iterable[str] = (),
    client: tuple[str, int] | None = ("testclient", 50000),
) -> AsyncIterator[WebSocketSession]:
    """Open a connection to an application, with no server and no thread between.

    Runs the application's lifespan unless it is running; connections inside of each other share one. Waits until the
    handshake is answered; a refused one doesn't raise: see `WebSocketSession.response`. Leaving the block closes the
    connection, and waits until the application is through with it.

    Args:
        app: An ASGI application.
        path: The path, with a query if there is one.
        headers: The client's headers.
        subprotocols: Those that it offers.
        client: Its address, a host and a port.

    Raises:
        Exception: What left the application, here or by what is done with the session.
        RuntimeError: The `testing` extra is not installed.
    """
    path, _, query = path.partition("?")
    raw_path = quote(path, safe=_SAFE_IN_PATH)
    subprotocols = list(subprotocols)
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    if not any(name == b"host" for name, _ in raw):
        raw.insert(0, (b"host", b"testserver"))
    if subprotocols:
        raw.append((b"sec-websocket-protocol", ", ".join(subprotocols).encode("latin-1")))
    scope: dict[str, Any] = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "server": ("testserver", 80),
        "client": client,
        "root_path": "",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("ascii"),
        "query_string": quote(query, safe=_SAFE_IN_QUERY).encode("ascii"),
        "headers": raw,
        "subprotocols": subprotocols,
        "extensions": {"websocket.http.response": {}},
    }
    async with running(app) as started, WebSocketSession(started, scope) as session:
        yield session
