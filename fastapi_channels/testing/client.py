"""`connect`: a WebSocket client that talks to an application in-process, with no server and no thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

from fastapi_channels.exceptions import ChannelsError

__all__ = ["ConnectionClosed", "RefusedResponse", "WebSocketSession", "connect"]

#: How many seconds the application has to end when the client has left.
END_TIMEOUT = 15.0


class ConnectionClosed(ChannelsError):
    """The connection is closed, so there is nothing to receive.

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

    Attributes:
        accepted: Whether the handshake was answered with yes.
        subprotocol: The one that the application chose, or None.
        headers: Those that the application sent with its yes, by lower-case name.
        response: The refusal, or None.
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
        self._to_client: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # The client's side

    async def send_text(self, text: str) -> None:
        """Send a text frame."""
        await self._send({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame."""
        await self._send({"type": "websocket.receive", "bytes": data})

    async def send_json(self, content: Any) -> None:
        """Send a text frame with `content` as JSON."""
        await self.send_text(json.dumps(content))

    async def receive_text(self, timeout: float = 1.0) -> str:
        """The next frame, which is text.

        Args:
            timeout: How many seconds to wait; passing cancels nothing of the application.

        Raises:
            TimeoutError: There was none in time.
            ConnectionClosed: There will be none.
        """
        frame = await self._receive(timeout)
        text = frame.get("text")
        assert text is not None, f"a text frame was expected, not {frame!r}"
        return str(text)

    async def receive_bytes(self, timeout: float = 1.0) -> bytes:
        """The next frame, which is binary; otherwise like `receive_text`."""
        frame = await self._receive(timeout)
        data = frame.get("bytes")
        assert data is not None, f"a binary frame was expected, not {frame!r}"
        return bytes(data)

    async def receive_json(self, timeout: float = 1.0) -> Any:
        """The next frame, as JSON; otherwise like `receive_text`."""
        frame = await self._receive(timeout)
        return json.loads(frame["bytes"] if frame.get("text") is None else frame["text"])

    async def receive_nothing(self, timeout: float = 0.1) -> bool:
        """Whether no frame comes within `timeout` seconds; one that comes stays to be received."""
        try:
            frame = await self._receive(timeout)
        except (TimeoutError, ConnectionClosed):
            return True
        queued = [frame]
        while not self._to_client.empty():
            queued.append(self._to_client.get_nowait())
        for message in queued:
            self._to_client.put_nowait(message)
        return False

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection with a close frame, and wait until the application is through with it."""
        await self._leave({"type": "websocket.disconnect", "code": code, "reason": reason})

    async def vanish(self) -> None:
        """Be gone without a close frame, as by a lost network, and wait until the application is through with it."""
        await self._leave({"type": "websocket.disconnect", "code": 1005})

    async def closed(self, timeout: float = 1.0) -> tuple[int, str]:
        """Wait until the application has closed the connection, and return the code and the reason.

        Raises:
            TimeoutError: It has not in time.
        """
        assert self._task is not None
        await asyncio.wait({self._task}, timeout=timeout)
        self._raise_failure()
        if self.close_code is None:
            raise TimeoutError("the application has not closed the connection")
        return self.close_code, self.close_reason or ""

    # The application's side

    async def _send_to_client(self, message: Any) -> None:
        kind = message["type"]
        if self.close_code is not None or self.response is not None and kind != "websocket.http.response.body":
            raise OSError("the connection is closed")
        if kind == "websocket.accept":
            self.accepted = True
            self.subprotocol = message.get("subprotocol")
            self.headers = _decoded(message.get("headers", ()))
            self._answered.set()
        elif kind == "websocket.send":
            self._to_client.put_nowait(message)
        elif kind == "websocket.close":
            self._closed(message.get("code", 1000), message.get("reason") or "")
            if not self.accepted:
                self.response = RefusedResponse(403)
            self._to_app.put_nowait({"type": "websocket.disconnect", "code": self.close_code, "reason": self.close_reason})
        elif kind == "websocket.http.response.start":
            self.response = RefusedResponse(message["status"], _decoded(message.get("headers", ())))
        elif kind == "websocket.http.response.body":
            assert self.response is not None
            content = self.response.content + message.get("body", b"")
            self.response = RefusedResponse(self.response.status_code, self.response.headers, content)
            if not message.get("more_body", False):
                self._closed(1006, "")
                self._to_app.put_nowait({"type": "websocket.disconnect", "code": 1006})
        else:
            raise RuntimeError(f"not an ASGI event of a WebSocket: {kind!r}")

    def _closed(self, code: int, reason: str) -> None:
        if self.close_code is None:
            self.close_code, self.close_reason = code, reason
        self._answered.set()
        self._to_client.put_nowait({"type": "closed"})

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._to_app.get, self._send_to_client)
        finally:
            self._closed(1006, "")  # an application that ends without a word

    # Both

    async def _send(self, message: dict[str, Any]) -> None:
        if self.close_code is not None:
            self._raise_failure()
            raise ConnectionClosed(self.close_code, self.close_reason or "")
        self._to_app.put_nowait(message)

    async def _receive(self, timeout: float) -> dict[str, Any]:
        if self.close_code is not None and self._to_client.empty():
            raise ConnectionClosed(self.close_code, self.close_reason or "")
        async with asyncio.timeout(timeout):
            message = await self._to_client.get()
        if message["type"] == "closed":
            self._raise_failure()
            raise ConnectionClosed(self.close_code or 1006, self.close_reason or "")
        return message

    async def _leave(self, message: dict[str, Any]) -> None:
        assert self._task is not None
        if self.close_code is None:
            self.close_code, self.close_reason = message["code"], message.get("reason", "")
            self._to_app.put_nowait(message)
        _, pending = await asyncio.wait({self._task}, timeout=END_TIMEOUT)
        if pending:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise TimeoutError(f"the application did not end within {END_TIMEOUT:g} s after the client had left")
        self._raise_failure()

    def _raise_failure(self) -> None:
        task = self._task
        if task is not None and task.done() and not task.cancelled() and (error := task.exception()) is not None:
            self._task = _finished()
            raise error

    async def __aenter__(self) -> Self:
        self._to_app.put_nowait({"type": "websocket.connect"})
        self._task = asyncio.create_task(self._run())
        answered = asyncio.ensure_future(self._answered.wait())
        try:
            await asyncio.wait({answered, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answered.cancel()
        return self

    async def __aexit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        try:
            await self.close()
        except Exception:
            if exc is None:
                raise


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def _finished() -> asyncio.Task[None]:
    """A task that has nothing more to say."""

    async def nothing() -> None: ...

    return asyncio.create_task(nothing())


_lifespans: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


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

    Runs the application's lifespan unless it is running; connections inside of each other share one. A refused
    handshake doesn't raise: see `response`. What leaves the application as an exception is raised here.

    Args:
        app: An ASGI application.
        path: The path, with a query if there is one.
        headers: The client's headers.
        subprotocols: Those that it offers.
        client: Its address.
    """
    url = urlsplit(path)
    subprotocols = list(subprotocols)
    raw = [(b"host", b"testserver")]
    raw += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
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
        "path": unquote(url.path),
        "raw_path": url.path.encode("ascii"),
        "query_string": url.query.encode("ascii"),
        "headers": raw,
        "subprotocols": subprotocols,
        "extensions": {"websocket.http.response": {}},
    }
    async with _lifespan(app) as state:
        scope["state"] = dict(state)
        async with WebSocketSession(app, scope) as session:
            yield session


@asynccontextmanager
async def _lifespan(app: Any) -> AsyncIterator[Mapping[str, Any]]:
    """Run the application's lifespan, or join in where it is running."""
    running = _lifespans.get(app)
    if running is not None:
        running[0] += 1
        try:
            yield running[1]
        finally:
            running[0] -= 1
        return
    channels = getattr(getattr(app, "state", None), "channels", None)
    if channels is not None and channels.is_open:
        yield {}  # somebody else runs it
        return
    try:
        from asgi_lifespan import LifespanManager
    except ImportError as error:
        raise RuntimeError("fastapi_channels.testing needs: pip install 'fastapi-channels[testing]'") from error
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(LifespanManager(app, startup_timeout=30, shutdown_timeout=30))
        state: Mapping[str, Any] = getattr(manager, "_state", {})
        _lifespans[app] = [1, state]
        try:
            yield state
        finally:
            del _lifespans[app]
