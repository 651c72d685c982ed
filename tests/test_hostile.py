"""What hostile and broken clients do: they get an answer, the others notice nothing, and the log stays short.

Where the way there matters, a real server is attacked, while another client must go on `undisturbed`.
"""

import asyncio
import json
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI, HTTPException
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event, session
from fastapi_channels.layers import ChannelLayer
from fastapi_channels.testing import connect
from tests.conftest import Serve, Served, app_with, until

GROUP = "everyone"


class Chat(ActionConsumer):
    """What the tests attack; `calls` holds what was called."""

    calls: ClassVar[list[str]] = []
    groups = [GROUP]
    forward_events = ["news"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.calls = []

    @action
    async def ping(self) -> str:
        return "pong"

    @action
    async def echo(self, value: Any) -> Any:
        return value

    @action
    async def join(self, name: str) -> list[str]:
        await self.group_add(name)
        return sorted(self.groups)

    async def disconnect(self, code: int, reason: str) -> None:
        self.calls.append(f"disconnect {code}")


class Json(JsonConsumer):
    async def receive(self, data: dict[str, Any]) -> None:
        await self.send_json(data)


class Text(WebSocketConsumer):
    async def receive(self, data: str) -> None:
        await self.send(data)


class Bytes(WebSocketConsumer):
    async def receive(self, data: bytes) -> None:
        await self.send(bytes=data)


def the_log(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """What we have to say, and what the server and the event loop warn of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= (level if record.name == "fastapi_channels" else logging.WARNING)
    ]


@asynccontextmanager
async def undisturbed(served: Served, app: FastAPI) -> AsyncIterator[None]:
    """Another client, which is answered, gets every event, and stays connected while the block runs."""
    layer: ChannelLayer = app.state.channels.layer()
    is_over = False
    sent = 0

    async with connect_for_real(f"{served.url}/Bystander") as client:

        async def go_on() -> None:
            nonlocal sent
            while not is_over:
                await layer.group_send("bystanders", {"type": "news", "n": sent})
                assert json.loads(await client.recv()) == {"type": "news", "n": sent}
                await client.send('{"action": "ping", "request_id": 1}')
                assert json.loads(await client.recv())["data"] == "pong"
                sent += 1
                await asyncio.sleep(0.001)

        going_on = asyncio.create_task(go_on())
        try:
            yield
        finally:
            is_over = True
            await asyncio.wait_for(going_on, 5)
        assert sent > 0


class Bystander(ActionConsumer):
    groups = ["bystanders"]
    forward_events = ["news"]

    @action
    async def ping(self) -> str:
        return "pong"


async def ask(client: ClientConnection, frame: str | bytes) -> Any:
    await client.send(frame)
    return json.loads(await asyncio.wait_for(client.recv(), 5))


async def assert_alive(client: ClientConnection) -> None:
    reply = await ask(client, '{"action": "ping", "request_id": "alive"}')
    assert (reply["request_id"], reply["data"]) == ("alive", "pong")


Dial = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def dial(serve: Serve) -> AsyncIterator[Dial]:
    """Open bare sockets, and send a handshake with `more` bytes right behind it."""
    writers: list[asyncio.StreamWriter] = []

    async def dialled(
        served: Served, path: str, *, more: bytes = b"", answered: bool = True
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writers.append(writer)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            + more
        )
        if answered:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
            assert head.startswith(b"HTTP/1.1 101"), head
        return reader, writer

    yield dialled
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)


def frame(text: str) -> bytes:
    """A masked text frame of RFC 6455."""
    data = text.encode()
    length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack("!H", len(data))
    return b"\x81" + length + b"\0\0\0\0" + data


def reset(writer: asyncio.StreamWriter) -> None:
    """Be gone at once, as a process that was killed: the server gets a reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def gone(writer: asyncio.StreamWriter) -> None:
    """Close the socket without a close frame."""
    writer.close()


# Frames

NOT_A_FRAME: list[Any] = [
    pytest.param("", "invalid_frame", id="empty"),
    pytest.param("hello", "invalid_frame", id="not JSON"),
    pytest.param('{"action": "ping"', "invalid_frame", id="half of JSON"),
    pytest.param('{"action": "ping"} {}', "invalid_frame", id="JSON and more"),
    pytest.param("{'action': 'ping'}", "invalid_frame", id="Python"),
    pytest.param('\ufeff{"action": "ping"}', "invalid_frame", id="byte order mark"),
    pytest.param("[]", "invalid_frame", id="list"),
    pytest.param('[{"action": "ping"}]', "invalid_frame", id="list of frames"),
    pytest.param("7", "invalid_frame", id="number"),
    pytest.param("null", "invalid_frame", id="null"),
    pytest.param('"ping"', "invalid_frame", id="string"),
    pytest.param("true", "invalid_frame", id="true"),
    pytest.param("NaN", "invalid_frame", id="NaN"),
    pytest.param('{"action": "echo", "data": Infinity}', "invalid_frame", id="Infinity"),
    pytest.param("{}", "invalid_frame", id="empty object"),
    pytest.param('{"data": {}}', "invalid_frame", id="no action"),
    pytest.param('{"action": null}', "invalid_frame", id="null action"),
    pytest.param('{"action": 7}', "invalid_frame", id="number for an action"),
    pytest.param('{"action": ["ping"]}', "invalid_frame", id="list for an action"),
    pytest.param('{"action": {"ping": 1}}', "invalid_frame", id="object for an action"),
    pytest.param('{"action": "\\ud800"}', "invalid_frame", id="half a surrogate pair"),
    pytest.param("[" * 100_000, "invalid_frame", id="deep nesting"),
    pytest.param('{"a":' * 100_000, "invalid_frame", id="deep nesting of objects"),
    pytest.param("[" * 100_000 + "]" * 100_000, "invalid_frame", id="deep nesting that is closed"),
    pytest.param('{"action": "pong", "data": ' + "9" * 100_000 + "}", None, id="a number of 100,000 digits"),
    pytest.param(b"\xff\xfe", "invalid_frame", id="not UTF-8"),
    pytest.param(b"\x00" * 100, "invalid_frame", id="zeros"),
    pytest.param(b"", "invalid_frame", id="empty binary"),
    pytest.param('{"action": "$cancel"}', "invalid_frame", id="$cancel of nothing"),
    pytest.param('{"action": ""}', "unknown_action", id="empty action"),
    pytest.param('{"action": "pong"}', "unknown_action", id="unknown action"),
    pytest.param('{"action": "Ping"}', "unknown_action", id="other case"),
    pytest.param('{"action": " ping"}', "unknown_action", id="space"),
    pytest.param('{"action": "ping\\u0000"}', "unknown_action", id="zero byte"),
    *(
        pytest.param(json.dumps({"action": name, "self": 1, "scope": 1, "code": 4100}), "unknown_action", id=name)
        for name in (
            *("connect", "__init__", "close", "disconnect", "receive", "send", "send_json", "group_add", "accept"),
            *("_parse_frame", "_session", "__class__", "as_asgi", "actions", "sync", "calls", "$nothing"),
        )
    ),
]


def assert_refused(reply: Any, code: str | None) -> None:
    """The reply tells an error of that code and says what was wrong, in a sentence and not in a book."""
    assert reply.keys() == {"type", "action", "request_id", "status", "data", "errors"}
    assert (reply["type"], reply["data"]) == ("response", None)
    if code is not None:
        assert (reply["status"], reply["errors"]["code"]) == ("bad", code)
        assert 0 < len(reply["errors"]["detail"]) < 300


@pytest.mark.parametrize(("text", "code"), NOT_A_FRAME)
async def test_what_is_no_frame_is_answered_with_what_was_wrong(
    text: str | bytes, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken frame is answered with an error that says what was wrong, ends nothing, and is at most one line."""
    caplog.set_level(logging.INFO)

    class Victim(Chat): ...

    async with connect(app_with(Victim), "/ws") as ws:
        await (ws.send_text(text) if isinstance(text, str) else ws.send_bytes(text))
        assert_refused(await ws.receive_json(), code)
        await ws.send_json({"action": "ping", "request_id": "alive"})
        assert (await ws.receive_json())["data"] == "pong"
        assert Victim.calls == []
    assert len(the_log(caplog)) <= 1
    assert not the_log(caplog, logging.WARNING)


async def test_a_real_server_passes_broken_frames_on(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Over a real server the same frames, all in a row, are each answered, and all of them are one line in the log."""
    caplog.set_level(logging.INFO)

    class Victim(Chat): ...

    app = app_with(Victim, Bystander)
    served = await serve(app)
    async with undisturbed(served, app), connect_for_real(f"{served.url}/ws") as client:
        for case in NOT_A_FRAME:
            text, code = case.values
            assert_refused(await ask(client, text), code)
            await assert_alive(client)
        assert Victim.calls == []
    assert len(the_log(caplog)) <= 1, the_log(caplog)


@pytest.mark.parametrize("path", ["Json", "Text", "Bytes"])
async def test_other_consumers_answer_a_wrong_frame_too(serve: Serve, path: str) -> None:
    """On the other consumers a frame of the wrong kind gets an error frame of the same shape, and they live on."""
    served = await serve(app_with(Json, Text, Bytes))
    cases: dict[str, tuple[list[str | bytes], str | bytes]] = {
        "Json": (["[]", "7", "x", b"\xff", "[" * 10_000, "null"], '{"a": "☃"}'),
        "Text": ([b"", b"text", b"\xff"], "☃"),
        "Bytes": (["", "text", "{}"], b"\x00\xff"),
    }
    wrong, right = cases[path]
    async with connect_for_real(f"{served.url}/{path}") as client:
        for frame in wrong:
            reply = await ask(client, frame)
            assert reply["type"] == "response"
            assert (reply["status"], reply["request_id"], reply["action"]) == ("bad", None, None)
            assert reply["errors"]["code"] in ("invalid_frame", "invalid_data")
        await client.send(right)
        answer = await client.recv()
        assert (json.loads(answer) == json.loads(right)) if path == "Json" else (answer == right)


DATA_THAT_NAMES_THE_INSIDE: list[Any] = [
    {"self": 1, "scope": 1},
    {"self": 1, "scope": 1, "websocket": None, "handshake": {}, "cls": 0, "__class__": "x"},
    {"value": 1, "request_id": 2, "action": "close"},
]


@pytest.mark.parametrize("data", DATA_THAT_NAMES_THE_INSIDE)
async def test_data_is_never_spread_into_arguments(serve: Serve, data: dict[str, Any]) -> None:
    """Keys of a frame, or of its data, that are called like parameters are data and nothing else."""
    served = await serve(app_with(Chat))
    async with connect_for_real(f"{served.url}/ws") as client:
        reply = await ask(client, json.dumps({"action": "echo", "request_id": 1, "data": data}))
        assert reply["data"] == data
        spread = {key: value for key, value in data.items() if key not in ("action", "request_id")}
        reply = await ask(client, json.dumps({**spread, "action": "echo", "request_id": 1}))
        assert reply["data"] == spread
        reply = await ask(client, json.dumps({**spread, "action": "ping", "request_id": 1}))
        assert reply["data"] == "pong"


@pytest.mark.parametrize(
    "text",
    [
        '""',
        '"x"',
        "0",
        "-1",
        "1.5",
        "1e3",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "null",
        "true",
        "[]",
        "{}",
        "NaN",
        '"\\u0000"',
    ],
)
async def test_request_ids_of_every_json_type(text: str) -> None:
    """A `request_id` of any JSON type gets exactly one reply: its own id back, or `invalid_frame`."""
    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_text('{"action": "ping", "request_id": ' + text + "}")
        reply = await ws.receive_json()
        if reply["status"] == "ok":
            assert reply["request_id"] == json.loads(text)
        else:
            assert (reply["errors"]["code"], reply["request_id"]) == ("invalid_frame", None)
            assert text in ("null", "true", "[]", "{}", "NaN", "1e400") or len(text) > 1000
        await ws.send_json({"action": "ping", "request_id": "alive"})
        assert (await ws.receive_json())["request_id"] == "alive"


async def test_a_frame_of_10_megabytes_is_refused_and_the_connection_lives(serve: Serve) -> None:
    """A frame above `MAX_FRAME_SIZE` is answered with `too_large`, text or binary, in one piece or in fragments."""
    app = app_with(Chat, Bystander)
    served = await serve(app)
    async with undisturbed(served, app), connect_for_real(f"{served.url}/ws", compression=None) as client:
        large = '{"action": "echo", "data": "' + "x" * 10_000_000 + '"}'
        fragments = (large[start : start + 1_000_000] for start in range(0, len(large), 1_000_000))
        for frame in (large, large.encode(), fragments):
            await client.send(frame)
            reply = json.loads(await client.recv())
            assert reply["errors"]["code"] == "too_large"
            assert len(json.dumps(reply)) < 500
            await assert_alive(client)


async def test_a_frame_above_the_servers_own_limit_is_1009(serve: Serve) -> None:
    """Above the server's own limit the server closes with 1009, and the hook is told once."""

    class Victim(Chat): ...

    app = app_with(Victim, Bystander)
    served = await serve(app, ws_max_size=100_000)
    async with undisturbed(served, app), connect_for_real(f"{served.url}/ws", compression=None) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await ask(client, "x" * 200_000)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        await until(lambda: bool(Victim.calls))
    assert Victim.calls == ["disconnect 1009"]


# Many


async def test_a_burst_of_10_000_frames_is_answered_in_order(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A burst of 10,000 frames, good and bad, gets an answer each, in order, and at most one line in the log."""
    caplog.set_level(logging.INFO)
    app = app_with(Chat, Bystander)
    served = await serve(app)
    bad = ["hello", "[]", "{}", '{"action": "pong"}', '{"action": "join"}', '{"action": "$nothing", "request_id": 1}']
    async with (
        undisturbed(served, app),
        connect_for_real(f"{served.url}/ws", compression=None, max_queue=None) as client,
    ):

        async def burst() -> None:
            for number in range(10_000):
                good = f'{{"action": "echo", "request_id": {number}, "data": {number}}}'
                await client.send(bad[number // 10 % len(bad)] if number % 10 == 9 else good)

        bursting = asyncio.create_task(burst())
        for number in range(10_000):
            reply = json.loads(await asyncio.wait_for(client.recv(), 5))
            assert reply["status"] == ("bad" if number % 10 == 9 else "ok")
            assert reply["data"] == (None if number % 10 == 9 else number)
        await bursting
    assert len(the_log(caplog)) <= 1, the_log(caplog)[:5]


async def test_a_burst_of_connections_that_are_refused_or_vanish(
    serve: Serve, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred clients that come at once, and go without a word, leave no channel behind and nothing in the log."""
    names: list[str] = []

    class Named(Chat):
        async def connect(self) -> None:
            names.append(self.channel_name)

    app = app_with(Named, Bystander)
    layer: ChannelLayer = app.state.channels.layer()
    served = await serve(app)
    async with undisturbed(served, app):
        writers = [(await dial(served, "/ws"))[1] for _ in range(100)]
        for number, writer in enumerate(writers):
            (reset if number % 2 else gone)(writer)
        await until(lambda: len(Named.calls) == 100)
    for name in names:
        with pytest.raises(ValueError, match="not a channel"):
            layer.groups_of(name)
    assert not the_log(caplog, logging.WARNING)


async def test_garbage_of_every_kind_never_ends_a_connection(serve: Serve) -> None:
    """Thousands of frames made at random from the pieces of good ones leave the connection as it was."""
    pieces = [
        '{"action": ',
        '"echo"',
        '"ping"',
        ', "request_id": ',
        "7",
        '"x"',
        ', "data": ',
        "[",
        "]",
        "{",
        "}",
        "null",
    ]
    pieces += ['"$cancel"', "\x00", "☃", "\\", '"', ":", ",", "1e309", "-", "\ud7ff", "true", " ", "\n"]
    rng = random.Random(7)
    served = await serve(app_with(Chat))
    async with connect_for_real(f"{served.url}/ws", compression=None, max_queue=None) as client:
        for _ in range(2000):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
            await client.send(text if rng.random() < 0.8 else text.encode())
        await client.send('{"action": "ping", "request_id": "the end"}')
        async with asyncio.timeout(5):
            while json.loads(await client.recv())["request_id"] != "the end":
                pass


async def test_a_thousand_events_of_an_unknown_type_are_one_line(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand events of an unknown type end nothing, are counted, and are one line in the log."""
    caplog.set_level(logging.INFO)

    class Victim(Chat): ...

    app = app_with(Victim, Bystander)
    served = await serve(app)
    layer: ChannelLayer = app.state.channels.layer()
    async with undisturbed(served, app), connect_for_real(f"{served.url}/ws") as client:
        for number in range(1000):
            await layer.group_send(GROUP, {"type": "nobody.knows", "n": number})
            if number % 100 == 0:
                await asyncio.sleep(0)
        await layer.group_send(GROUP, {"type": "news", "n": "after"})
        assert json.loads(await client.recv()) == {"type": "news", "n": "after"}
        await assert_alive(client)
        assert layer.counters.unhandled == 1000
    assert len(the_log(caplog)) == 1


# Group names


@pytest.mark.parametrize("name", ["", "x" * 10_000, "a\nb", "\x00", "{a}", "\x85", "a\u2028b\r"])
async def test_a_bad_group_name_in_an_action_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A group name that is none is `invalid_data` in an action, which says why and doesn't repeat the name."""
    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "join", "data": name})
        assert_refused(await ws.receive_json(), "invalid_data")
        await ws.send_json({"action": "join", "data": "a name ☃"})
        assert (await ws.receive_json())["data"] == ["a name ☃", GROUP]
    assert not the_log(caplog, logging.WARNING)


async def test_a_bad_group_name_in_connect_is_422(serve: Serve) -> None:
    """A group name that is none refuses the handshake with 422, which says why and doesn't repeat the name."""

    class Room(Chat):
        async def connect(self, room: str) -> None:
            await self.group_add(room)

    served = await serve(app_with(Room))
    for name in ("", "x" * 5_000, "a%0Ab", "%00", "%7Ba%7D"):
        with pytest.raises(InvalidStatus) as refused:
            await connect_for_real(f"{served.url}/ws?room={name}")
        assert refused.value.response.status_code == 422
        assert b"name" in refused.value.response.body
        assert len(refused.value.response.body) < 300
    assert Room.calls == ["disconnect 4500"] * 5


async def test_a_refused_handshake_is_no_error_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A client that is refused, again and again, leaves no warning and no error in the log."""

    class Victim(Chat):
        async def connect(self, how: str) -> None:
            if how == "close":
                await self.close(4503)
            raise HTTPException(401)

    served = await serve(app_with(Victim))
    for how in ("?how=raise", "?how=close", ""):
        for _ in range(3):
            with pytest.raises(InvalidStatus):
                await connect_for_real(f"{served.url}/ws{how}")
    assert not the_log(caplog, logging.WARNING)


# Clients that vanish


class Hanging(Chat):
    """Waits for ever in the part that the path's query names, and notes what becomes of it."""

    notes: ClassVar[list[str]] = []

    async def connect(self, where: str = "") -> None:
        self.where = where
        if where == "accepted connect":
            await self.accept()
        if where in ("connect", "accepted connect"):
            await self.hang("connect")

    async def hang(self, name: str) -> None:
        self.notes.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            self.notes.append(f"{name} ended")

    @action
    async def wait(self) -> None:
        await self.hang("action")

    @action(concurrency=2)
    async def wait_beside(self) -> None:
        await self.hang("beside")

    @action
    async def stream(self) -> AsyncIterator[int]:
        yield 1
        await self.hang("stream")

    @event
    async def wait_all(self) -> None:
        await self.hang("event")

    async def disconnect(self, code: int, reason: str) -> None:
        self.notes.append(f"disconnect {code}")
        if self.where == "disconnect":
            await self.hang("disconnect")


class HangingReceive(JsonConsumer):
    notes: ClassVar[list[str]] = Hanging.notes

    async def receive(self, data: Any) -> None:
        self.notes.append("receive")
        try:
            await asyncio.Event().wait()
        finally:
            self.notes.append("receive ended")

    async def disconnect(self, code: int, reason: str) -> None:
        self.notes.append(f"disconnect {code}")


VANISHING: list[Any] = [
    pytest.param("/ws?where=connect", None, "connect", id="connect"),
    pytest.param("/ws?where=accepted%20connect", None, "connect", id="connect that has accepted"),
    pytest.param("/HangingReceive", "1", "receive", id="receive"),
    pytest.param("/ws", '{"action": "wait"}', "action", id="action"),
    pytest.param("/ws", '{"action": "wait_beside"}', "beside", id="action beside others"),
    pytest.param("/ws", '{"action": "stream"}', "stream", id="stream"),
    pytest.param("/ws", "event", "event", id="event handler"),
    pytest.param("/ws?where=disconnect", None, "disconnect", id="disconnect"),
]


@pytest.mark.parametrize("leave", [reset, gone])
@pytest.mark.parametrize(("path", "text", "where"), VANISHING)
async def test_a_client_that_vanishes_in_the_middle(
    serve: Serve,
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    leave: Any,
    path: str,
    text: str | None,
    where: str,
) -> None:
    """A client that vanishes while any hook or handler runs ends it, and has one `disconnect` with 1006."""
    monkeypatch.setattr(session, "GRACE", 0.02)
    Hanging.notes.clear()
    app = app_with(Hanging, HangingReceive, Bystander, drain_timeout=0.1)
    layer: ChannelLayer = app.state.channels.layer()
    served = await serve(app)
    async with undisturbed(served, app):
        _, writer = await dial(served, path, answered=path != "/ws?where=connect")
        if text == "event":
            await layer.group_send(GROUP, {"type": "wait.all"})
        elif text is not None:
            writer.write(frame(text))
        if where != "disconnect":
            await until(lambda: where in Hanging.notes)
        leave(writer)
        await until(lambda: "disconnect 1006" in Hanging.notes)
        await until(lambda: f"{where} ended" in Hanging.notes)
    expected = [where, f"{where} ended", "disconnect 1006"]
    if where == "disconnect":
        expected = ["disconnect 1006", "disconnect", "disconnect ended"]
        assert [line for line in the_log(caplog, logging.WARNING) if "DRAIN_TIMEOUT" in line]
    else:
        assert not the_log(caplog, logging.WARNING)
    assert Hanging.notes == expected


async def test_a_client_that_vanishes_before_it_is_answered(
    serve: Serve, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that are gone before the handshake is answered leave nothing behind, and no line in the log."""

    class Victim(Chat):
        async def connect(self) -> None:
            self.calls.append("connect")
            await asyncio.sleep(0)

    app = app_with(Victim, Bystander)
    served = await serve(app)
    async with undisturbed(served, app):
        for number in range(20):
            _, writer = await dial(served, "/ws", answered=False)
            if number % 3:
                await asyncio.sleep(0)
            (reset if number % 2 else gone)(writer)
        await until(lambda: _is_quiet(Victim.calls))
    ends = [call for call in Victim.calls if call != "connect"]
    assert len(ends) == Victim.calls.count("connect")
    assert set(ends) <= {"disconnect 1006"}
    assert not the_log(caplog, logging.WARNING)


def _is_quiet(calls: list[str]) -> bool:
    return len(calls) > 0 and len(calls) == 2 * calls.count("connect")


async def test_a_client_that_closes_during_connect_is_gone(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A close frame while `connect` runs ends it with the client's code, and nothing else is handled."""

    class Victim(Chat):
        async def connect(self) -> None:
            await self.accept()
            try:
                await asyncio.Event().wait()
            finally:
                self.calls.append("connect ended")

        @action
        async def ping(self) -> str:
            self.calls.append("ping")
            return "pong"

    app = app_with(Victim, Bystander)
    served = await serve(app)
    async with undisturbed(served, app):
        client = await connect_for_real(f"{served.url}/ws")
        await client.close(4321, "bored")
        await until(lambda: len(Victim.calls) >= 2)
    assert Victim.calls == ["connect ended", "disconnect 4321"]
    assert not the_log(caplog, logging.WARNING)


async def test_a_handler_that_never_returns_holds_up_nobody_else(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty clients whose handlers hang, also ones that ignore their cancellation, don't hold up another client."""
    monkeypatch.setattr(session, "GRACE", 0.02)
    Hanging.notes.clear()
    go_on = asyncio.Event()

    class Stubborn(Hanging):
        @action
        async def refuse(self) -> None:
            while not go_on.is_set():
                with suppress(asyncio.CancelledError):
                    await go_on.wait()

    app = app_with(Stubborn, Bystander, drain_timeout=0.05)
    served = await serve(app)
    async with undisturbed(served, app):
        clients = [await connect_for_real(f"{served.url}/ws") for _ in range(20)]
        for number, client in enumerate(clients):
            await client.send(json.dumps({"action": ["wait", "wait_beside", "refuse"][number % 3], "request_id": 1}))
        for client in clients:
            client.transport.abort()
        await until(lambda: Hanging.notes.count("disconnect 1006") == 20)
        go_on.set()
        for client in clients:
            await client.wait_closed()


# Frames before the handshake is answered


async def test_frames_sent_before_the_handshake_is_answered_wait(serve: Serve, dial: Dial) -> None:
    """Frames that the server passes on while `connect` runs are handled after it, in order, and none is lost."""
    go_on = asyncio.Event()

    class Victim(Chat):
        async def connect(self) -> None:
            self.calls.append("connect")
            await go_on.wait()
            self.calls.append("connected")

        @action
        async def note(self, value: str) -> str:
            self.calls.append(value)
            return value

    served = await serve(app_with(Victim))
    reader, writer = await dial(served, "/ws", answered=False)
    await until(lambda: "connect" in Victim.calls)
    for value in ("early", "also early"):
        writer.write(frame('{"action": "note", "data": "' + value + '"}'))
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)).startswith(b"HTTP/1.1 101")
    writer.write(frame('{"action": "note", "data": "in time"}'))
    await asyncio.wait_for(reader.readuntil(b'"in time"'), 2)
    assert Victim.calls == ["connect", "connected", "early", "also early", "in time"]


@pytest.mark.parametrize("how", ["HTTP", "close"])
async def test_frames_of_a_client_that_is_refused_are_never_handled(serve: Serve, dial: Dial, how: str) -> None:
    """Frames that a client sends before it knows that it is refused reach no handler, whatever the way of refusing."""

    class Victim(Chat):
        reject_mode = "close" if how == "close" else "http"

        async def connect(self) -> None:
            await asyncio.sleep(0.02)
            await self.close(4503, "no")

        @action
        async def note(self) -> None:
            self.calls.append("handled")

    served = await serve(app_with(Victim))
    early = b"".join(frame('{"action": "note"}') for _ in range(3))
    reader, writer = await dial(served, "/ws", more=early, answered=False)
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert (b" 101 " in answer) == (how == "close")
    with suppress(ConnectionError):
        writer.write(frame('{"action": "note"}'))
        await asyncio.wait_for(reader.readuntil(b"no"), 2)
    reset(writer)
    await until(lambda: "disconnect 4503" in Victim.calls)
    await served.stop()
    assert Victim.calls == ["disconnect 4503"]


async def test_a_stranger_to_the_protocol_disturbs_nobody(serve: Serve, dial: Dial) -> None:
    """Bytes that are no handshake, half a handshake, and frames that break RFC 6455 disturb nobody."""

    class Victim(Chat): ...

    app = app_with(Victim, Bystander)
    served = await serve(app)
    broken: Iterable[bytes] = [
        b"\x81\x05hello",
        b"\xff" * 50,
        b"\x83\x80\0\0\0\0",
        frame("\x00")[:3],
        b"\x88\x81\0\0\0\0x",
    ]
    async with undisturbed(served, app):
        for raw in (b"", b"\x00" * 1000, b"GET /ws HTTP/1.1\r\n", b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"):
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(raw)
            reset(writer)
            await asyncio.sleep(0)
        writers = []
        for raw in broken:
            _, writer = await dial(served, "/ws", more=b"")
            writer.write(raw)
            writers.append(writer)
        await asyncio.sleep(0.02)
        for writer in writers:
            gone(writer)
        await until(lambda: len(Victim.calls) == len(writers))
