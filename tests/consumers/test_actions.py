"""Actions: frames that ask, replies, streams, cancelling, and how many run at once."""

import asyncio
import datetime
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

import pytest
from fastapi import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field, field_validator
from starlette.websockets import WebSocket

from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.exceptions import ConsumerError, InvalidGroupName, LayerUnavailable
from fastapi_channels.testing import WebSocketSession, connect
from tests.conftest import app_with, until


class Say(BaseModel):
    text: Annotated[str, Field(min_length=1)]
    tags: list[str] = []


async def ask(ws: WebSocketSession, name: str, *, request_id: Any = 1, **frame: Any) -> Any:
    """Ask for an action, and return the reply, whose envelope is checked."""
    await ws.send_json({"action": name, "request_id": request_id, **frame})
    reply = await ws.receive_json()
    assert reply.keys() == {"type", "action", "request_id", "status", "data", "errors"}
    assert (reply["type"], reply["action"], reply["request_id"]) == ("response", name, request_id)
    assert (reply["status"] == "ok") == (reply["errors"] is None)
    return reply


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


# Data


class Data(ActionConsumer):
    @action
    async def model(self, message: Say) -> Any:
        assert type(message) is Say
        return message

    @action
    async def optional(self, message: Say | None = None) -> Any:
        return message

    @action
    async def number(self, n: int = 7) -> int:
        return n

    @action
    async def limited(self, n: Annotated[int, Field(ge=1, lt=10)]) -> int:
        return n

    @action
    async def anything(self, value) -> Any:  # type: ignore[no-untyped-def]
        return value

    @action
    async def many(self, items: list[Say]) -> Any:
        return items

    @action
    async def table(self, rows: dict[str, int]) -> Any:
        return rows

    @action
    async def none(self) -> str:
        return "none asked for"

    @action
    async def choice(self, of: Literal["a", "b"]) -> str:
        return of


GIVEN: list[Any] = [
    ("model", {"data": {"text": "☃"}}, {"text": "☃", "tags": []}),
    ("model", {"text": "☃", "tags": ["x"]}, {"text": "☃", "tags": ["x"]}),
    ("optional", {}, None),
    ("optional", {"data": None}, None),
    ("optional", {"data": {"text": "a"}}, {"text": "a", "tags": []}),
    ("number", {}, 7),
    ("number", {"data": 0}, 0),
    ("number", {"data": "12"}, 12),
    ("limited", {"data": 9}, 9),
    ("anything", {"data": None}, None),
    ("anything", {"data": [1, {"a": False}]}, [1, {"a": False}]),
    ("anything", {}, {}),
    ("anything", {"a": 1, "data": 2}, 2),
    ("anything", {"type": "x", "request-id": 2, "Data": 3}, {"type": "x", "request-id": 2, "Data": 3}),
    ("many", {"data": [{"text": "a"}, {"text": "b"}]}, [{"text": "a", "tags": []}, {"text": "b", "tags": []}]),
    ("many", {"data": []}, []),
    ("table", {"a": 1, "b": 2}, {"a": 1, "b": 2}),
    ("none", {}, "none asked for"),
    ("none", {"data": {"ignored": 1}}, "none asked for"),
    ("none", {"ignored": 1}, "none asked for"),
]


@pytest.mark.parametrize(("name", "frame", "expected"), GIVEN)
async def test_data_goes_to_the_parameter(name: str, frame: dict[str, Any], expected: Any) -> None:
    """`data`, or the frame without its envelope, is the value of the parameter; absent data takes the default."""
    async with connect(app_with(Data), "/ws") as ws:
        reply = await ask(ws, name, **frame)
        assert (reply["status"], reply["data"]) == ("ok", expected)


MISFITS: list[Any] = [
    ("model", {"data": {}}, [["text"]]),
    ("model", {}, [["text"]]),
    ("model", {"data": {"text": "", "tags": [1, "a", None]}}, [["text"], ["tags", 0], ["tags", 2]]),
    ("model", {"data": "text"}, [[]]),
    ("model", {"data": None}, [[]]),
    ("number", {"data": 1.5}, [[]]),
    ("number", {"data": {}}, [[]]),
    ("limited", {"data": 10}, [[]]),
    ("many", {"data": [{"text": "a"}, {"text": 3}]}, [[1, "text"]]),
    ("table", {"a": 1, "b": "x"}, [["b"]]),
    ("choice", {"data": "c"}, [[]]),
]


@pytest.mark.parametrize(("name", "frame", "places"), MISFITS)
async def test_data_that_does_not_fit_is_told_with_its_places(
    name: str, frame: dict[str, Any], places: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Data that doesn't fit is `invalid_data` with pydantic's findings relative to `data`, and closes nothing."""
    async with connect(app_with(Data), "/ws") as ws:
        errors = (await ask(ws, name, **frame))["errors"]
        assert errors["code"] == "invalid_data"
        assert isinstance(errors["detail"], str)
        assert errors["detail"]
        assert [finding["loc"] for finding in errors["errors"]] == places
        for finding in errors["errors"]:
            assert {"type", "loc", "msg"} <= finding.keys() <= {"type", "loc", "msg", "ctx"}
        assert (await ask(ws, "none"))["status"] == "ok"
    assert not warnings(caplog)


async def test_a_validators_own_error_can_be_told() -> None:
    """What a model's own validator raises is told as text, though an exception is no JSON."""

    class Even(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def is_even(cls, n: int) -> int:
            if n % 2:
                raise ValueError("odd ✗")
            return n

    class Chat(ActionConsumer):
        @action
        async def half(self, data: Even) -> int:
            return data.n // 2

    async with connect(app_with(Chat), "/ws") as ws:
        errors = (await ask(ws, "half", data={"n": 3}))["errors"]
        assert errors["code"] == "invalid_data"
        assert "odd ✗" in errors["errors"][0]["msg"]


async def test_every_call_gets_a_default_of_its_own() -> None:
    """What a call does to the default of its parameter the next call doesn't see."""

    class Chat(ActionConsumer):
        @action
        async def add(self, items: list[str] = []) -> list[str]:  # noqa: B006
            items.append("x")
            return items

    async with connect(app_with(Chat), "/ws") as ws:
        for _ in range(2):
            assert (await ask(ws, "add"))["data"] == ["x"]


# Replies

REQUEST_IDS: list[Any] = ["", "7", "☃" * 100, 0, -1, 7, 1.5, 10**30, "null"]


@pytest.mark.parametrize("request_id", REQUEST_IDS)
async def test_a_request_id_comes_back(request_id: Any) -> None:
    """A string or a number comes back as it was, whatever the action returned."""

    class Chat(ActionConsumer):
        @action
        async def nothing(self) -> None: ...

    async with connect(app_with(Chat), "/ws") as ws:
        reply = await ask(ws, "nothing", request_id=request_id)
        assert type(reply["request_id"]) is type(request_id)
        assert (await ask(ws, "unknown", request_id=request_id))["errors"]["code"] == "unknown_action"


@pytest.mark.parametrize("request_id", [None, True, False, [], [1], {}, {"a": 1}])
async def test_another_request_id_is_no_frame(request_id: Any) -> None:
    """A `request_id` that is neither string nor number is an `invalid_frame`, and the action isn't called."""
    called = []

    class Chat(ActionConsumer):
        @action
        async def note(self) -> None:
            called.append(True)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "note", "request_id": request_id})
        reply = await ws.receive_json()
        assert reply["errors"]["code"] == "invalid_frame"
        assert "request_id" in reply["errors"]["detail"]
        assert (reply["status"], reply["request_id"], reply["data"]) == ("bad", None, None)
        assert not called


async def test_without_a_request_id_only_something_is_answered() -> None:
    """Without a `request_id` there is a reply only to a result other than None, and to a refusal, with a null id."""

    class Chat(ActionConsumer):
        @action
        async def nothing(self) -> None: ...

        @action
        async def something(self, value: Any) -> Any:
            return value

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "nothing"})
        values: list[Any] = [0, "", False, [], {}]
        for value in values:
            await ws.send_json({"action": "something", "data": value})
            reply = await ws.receive_json()
            assert (reply["request_id"], reply["data"], reply["status"]) == (None, value, "ok")
        await ws.send_json({"action": "something", "data": None})
        await ws.send_json({"action": "missing"})
        reply = await ws.receive_json()
        assert (reply["action"], reply["request_id"], reply["errors"]["code"]) == ("missing", None, "unknown_action")


async def test_a_result_is_what_pydantic_makes_of_it() -> None:
    """A result may hold what pydantic can write: models, dates, decimals, sets; NaN is null."""

    class Chat(ActionConsumer):
        @action
        async def all(self) -> Any:
            return [
                Say(text="☃"),
                datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
                Decimal("1.10"),
                {1: {2}},
                b"bytes",
                float("nan"),
                (None,),
            ]

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "all"))["data"] == [
            {"text": "☃", "tags": []},
            "2024-02-29T00:00:00Z",
            "1.10",
            {"1": [2]},
            "bytes",
            None,
            [None],
        ]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_result_that_is_not_for_json_is_an_internal_error(concurrency: int) -> None:
    """A result that can't be encoded is answered as an internal error, with the call's own request id."""

    class Chat(ActionConsumer):
        @action(concurrency=concurrency)
        async def bad(self) -> Any:
            return {"object": object()}

        @action(concurrency=concurrency)
        async def bad_stream(self) -> AsyncIterator[Any]:
            yield object()

    async with connect(app_with(Chat), "/ws") as ws:
        for name in ("bad", "bad_stream"):
            assert (await ask(ws, name, request_id=name))["errors"]["code"] == "internal_error"


@pytest.mark.parametrize("frame", ["bytes", "text"])
async def test_a_binary_frame_is_the_same_as_text(frame: str) -> None:
    """A binary frame carries the same object as UTF-8 JSON, and is answered in text."""
    async with connect(app_with(Data), "/ws") as ws:
        content = '{"action": "model", "request_id": "☃", "data": {"text": "é"}}'
        await (ws.send_text(content) if frame == "text" else ws.send_bytes(content.encode()))
        assert '"☃"' in await ws.receive_text()


async def test_frames_are_handled_and_answered_in_order() -> None:
    """With `concurrency=1` the next frame waits for the reply to the one before, whatever it is."""
    order: list[Any] = []

    class Chat(ActionConsumer):
        @action
        async def slow(self, n: int) -> int:
            order.append(f"{n} begins")
            await asyncio.sleep(0.01 if n % 2 else 0)
            order.append(f"{n} ends")
            return n

        @action
        def in_a_thread(self, n: int) -> int:
            order.append(f"{n} begins")
            time.sleep(0.005)
            order.append(f"{n} ends")
            return n

        @action
        async def items(self, n: int) -> AsyncIterator[int]:
            order.append(f"{n} begins")
            yield n
            await asyncio.sleep(0)
            order.append(f"{n} ends")

    async with connect(app_with(Chat), "/ws") as ws:
        names = ["slow", "items", "slow", "unknown", "in_a_thread", "items", "slow"]
        for number, name in enumerate(names):
            await ws.send_json({"action": name, "data": number, "request_id": number})
        replies = [await ws.receive_json() for _ in range(len(names) + 2)]
        assert [frame["request_id"] for frame in replies] == [0, 1, 1, 2, 3, 4, 5, 5, 6]
    handled = [number for number, name in enumerate(names) if name != "unknown"]
    assert order == [f"{number} {what}" for number in handled for what in ("begins", "ends")]


# Errors


async def test_an_error_of_the_application_is_told_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """`ConsumerError` becomes `errors` with its detail, its code and what else it carries; nothing is logged."""

    class RoomFull(ConsumerError):
        code = "room_full"

    class Chat(ActionConsumer):
        @action
        async def join(self, how: str) -> None:
            if how == "class":
                raise RoomFull("no room ✗", seats=0, waiting=[Say(text="x")])
            raise ConsumerError(code="quiet")

    async with connect(app_with(Chat), "/ws") as ws:
        errors = {"code": "room_full", "detail": "no room ✗", "seats": 0, "waiting": [{"text": "x", "tags": []}]}
        assert (await ask(ws, "join", data="class"))["errors"] == errors
        assert (await ask(ws, "join", data="plain"))["errors"] == {"code": "quiet", "detail": ""}
    assert not warnings(caplog)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_an_error_that_is_not_for_json_is_an_internal_error(
    concurrency: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An error whose extra keys can't be encoded is answered as an internal error, with the call's request id."""

    class Chat(ActionConsumer):
        @action(concurrency=concurrency)
        async def join(self) -> None:
            raise ConsumerError("full", code="room_full", seats=object())

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "join", request_id="☃"))["errors"]["code"] == "internal_error"
    assert len(warnings(caplog)) == 1


HTTP_ERRORS: list[Any] = [
    (HTTPException(401, "who?"), {"code": "not_authenticated", "detail": "who?"}),
    (HTTPException(403), {"code": "permission_denied", "detail": "Forbidden"}),
    (HTTPException(404, {"room": "☃"}), {"code": "http_404", "detail": {"room": "☃"}}),
    (HTTPException(422, ["x"]), {"code": "invalid_data", "detail": ["x"]}),
    (HTTPException(429), {"code": "throttled", "detail": "Too Many Requests"}),
    (HTTPException(503, "later"), {"code": "http_503", "detail": "later"}),
]


@pytest.mark.parametrize(("error", "errors"), HTTP_ERRORS)
async def test_an_http_exception_is_told_with_a_code(
    error: Exception, errors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """`HTTPException` in an action becomes `errors` with its detail and the code of its status."""

    class Chat(ActionConsumer):
        @action
        async def fail(self) -> None:
            raise error

    async with connect(app_with(Chat), "/ws") as ws:
        for _ in range(2):
            assert (await ask(ws, "fail"))["errors"] == errors
    assert not warnings(caplog)


async def test_an_exception_is_told_without_its_text_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Another exception is `internal_error` with nothing of the inside, one line with its traceback, and no end."""

    class Chat(ActionConsumer):
        @action
        async def fail(self) -> None:
            raise RuntimeError("the secret")

        @action
        def fail_in_a_thread(self) -> None:
            raise LookupError("the secret")

    async with connect(app_with(Chat), "/ws") as ws:
        for number, name in enumerate(("fail", "fail_in_a_thread"), 1):
            reply = await ask(ws, name)
            assert reply["errors"] == {"code": "internal_error", "detail": "Internal Server Error"}
            assert len(warnings(caplog)) == number
            assert warnings(caplog)[-1].exc_info is not None


async def test_debug_tells_the_inside() -> None:
    """With `app.debug` the client is told what went wrong inside."""

    class Chat(ActionConsumer):
        @action
        async def fail(self) -> None:
            raise RuntimeError("no secret")

    app = app_with(Chat)
    app.debug = True
    async with connect(app, "/ws") as ws:
        errors = (await ask(ws, "fail"))["errors"]
        assert errors["code"] == "internal_error"
        assert "RuntimeError: no secret" in errors["detail"]


async def test_errors_of_layers_and_names_are_told() -> None:
    """A bad group name is `invalid_data`; a layer that is away is told without its address, and when to come back."""

    class Chat(ActionConsumer):
        @action
        async def join(self, name: str) -> None:
            await self.group_add(name)

        @action
        async def away(self) -> None:
            raise LayerUnavailable("redis://:secret@host is down")

    async with connect(app_with(Chat), "/ws") as ws:
        for name in ("", "x" * 10_000, "a\nb", "{a}"):
            assert (await ask(ws, "join", data=name))["errors"]["code"] == "invalid_data"
        assert (await ask(ws, "join", data="x" * 200))["status"] == "ok"
        errors = (await ask(ws, "away"))["errors"]
        assert "secret" not in errors["detail"]
        assert errors["retry_after"] > 0
    assert issubclass(InvalidGroupName, ValueError)


class Teapot(Exception):
    pass


class Chatter(ActionConsumer):
    @action
    async def brew(self, kind: str) -> None:
        raise Teapot(kind)

    @action
    async def http(self, status: int) -> None:
        raise HTTPException(status, "own detail")

    @action
    async def ping(self) -> str:
        return "pong"


async def test_the_applications_exception_handlers_are_asked_first(caplog: pytest.LogCaptureFixture) -> None:
    """What `app.exception_handlers` return is mapped like an `HTTPException`; sync or async, by class or by status."""
    app = app_with(Chatter)

    @app.exception_handler(Teapot)
    async def teapot(websocket: WebSocket, error: Teapot) -> JSONResponse:
        return JSONResponse({"detail": {"kind": str(error)}}, 418)

    @app.exception_handler(403)
    def forbidden(websocket: WebSocket, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("not for you ✗", 429)

    async with connect(app, "/ws") as ws:
        assert (await ask(ws, "brew", data="mint"))["errors"] == {"code": "http_418", "detail": {"kind": "mint"}}
        assert (await ask(ws, "http", data=403))["errors"] == {"code": "throttled", "detail": "not for you ✗"}
        assert (await ask(ws, "http", data=404))["errors"] == {"code": "http_404", "detail": "own detail"}
    assert not warnings(caplog)


async def test_an_exception_handler_may_send(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that returns None may have sent something; the error is still answered, and the connection lives."""
    app = app_with(Chatter)

    @app.exception_handler(Teapot)
    async def teapot(websocket: WebSocket, error: Teapot) -> None:
        await websocket.send_json({"from": "the handler"})

    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "brew", "data": "x", "request_id": 1})
        assert await ws.receive_json() == {"from": "the handler"}
        reply = await ws.receive_json()
        assert (reply["status"], reply["request_id"]) == ("bad", 1)
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_an_exception_handler_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """If the application's handler fails itself, the client is told of the first error in our words."""
    app = app_with(Chatter)

    @app.exception_handler(Teapot)
    async def teapot(websocket: WebSocket, error: Teapot) -> None:
        raise ZeroDivisionError("the secret")

    async with connect(app, "/ws") as ws:
        assert (await ask(ws, "brew", data="x"))["errors"]["code"] == "internal_error"
        assert (await ask(ws, "ping"))["data"] == "pong"
    assert any("exception handler" in record.getMessage() for record in warnings(caplog))


async def test_an_exception_handler_answers_a_refused_handshake() -> None:
    """In `connect` the handler's response refuses the handshake as it is."""

    class Chat(ActionConsumer):
        async def connect(self) -> None:
            raise Teapot

    app = app_with(Chat)

    @app.exception_handler(Teapot)
    async def teapot(websocket: WebSocket, error: Teapot) -> JSONResponse:
        return JSONResponse({"pot": "tea"}, 418, {"x-kind": "mint"})

    async with connect(app, "/ws") as ws:
        assert ws.response is not None
        assert (ws.response.status_code, ws.response.json()) == (418, {"pot": "tea"})
        assert ws.response.headers["x-kind"] == "mint"


async def test_awaiting_what_somebody_else_cancelled_is_an_error_reply() -> None:
    """A CancelledError that nobody asked of the call is an internal error, and the connection lives."""

    class Chat(ActionConsumer):
        @action
        async def wait(self) -> None:
            task = asyncio.create_task(asyncio.sleep(10))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task

        @action(concurrency=2)
        async def wait_beside(self) -> None:
            raise asyncio.CancelledError

        @action(timeout=5)
        async def wait_with_timeout(self) -> None:
            raise asyncio.CancelledError

        @action
        async def wait_in_stream(self) -> AsyncIterator[int]:
            raise asyncio.CancelledError
            yield 1

        @action
        async def ping(self) -> str:
            return "pong"

    async with connect(app_with(Chat), "/ws") as ws:
        for name in ("wait", "wait_beside", "wait_with_timeout", "wait_in_stream"):
            assert (await ask(ws, name))["errors"]["code"] == "internal_error"
        assert (await ask(ws, "ping"))["data"] == "pong"


# Timeouts


async def test_a_call_that_takes_longer_than_its_timeout_is_cancelled() -> None:
    """After `timeout` seconds a call is cancelled and answered with `timeout`; a stream and a thread too."""
    ends = []

    class Chat(ActionConsumer):
        @action(timeout=0.05)
        async def slow(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("slow")

        @action(timeout=0.05)
        async def slow_stream(self) -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                ends.append("slow_stream")

        @action(timeout=0.05)
        def slow_thread(self) -> None:
            time.sleep(0.15)

        @action(timeout=5)
        async def own(self) -> None:
            raise TimeoutError("my own")

        @action(timeout=5)
        async def quick(self) -> str:
            return "quick"

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "slow"))["errors"]["code"] == "timeout"
        await ws.send_json({"action": "slow_stream", "request_id": 1})
        assert (await ws.receive_json())["type"] == "stream"
        assert (await ws.receive_json())["errors"]["code"] == "timeout"
        assert ends == ["slow", "slow_stream"]
        assert (await ask(ws, "slow_thread"))["errors"]["code"] == "timeout"
        assert (await ask(ws, "own"))["errors"]["code"] == "internal_error"
        assert (await ask(ws, "quick"))["data"] == "quick"


# Streams


class Streams(ActionConsumer):
    ended: ClassVar[list[str]] = []

    @action
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @action
    def count_in_a_thread(self, to: int) -> Iterator[int]:
        assert threading.current_thread() is not threading.main_thread()
        yield from range(to)

    @action
    async def fail(self) -> AsyncIterator[int]:
        yield 1
        raise ConsumerError("half way", code="broken")

    @action
    def fail_in_a_thread(self) -> Iterator[int]:
        yield 1
        raise ConsumerError("half way", code="broken")

    @action
    async def endless(self) -> AsyncIterator[int]:
        number = 0
        try:
            while True:
                yield number
                number += 1
                await asyncio.sleep(0)
        finally:
            self.ended.append("endless")

    @action
    async def waiting(self) -> AsyncIterator[str]:
        try:
            yield "begun"
            await asyncio.Event().wait()
        finally:
            self.ended.append("waiting")

    @action
    async def ping(self) -> str:
        return "pong"


@pytest.mark.parametrize("name", ["count", "count_in_a_thread"])
@pytest.mark.parametrize("to", [0, 3])
async def test_a_generator_streams_and_ends_with_a_reply(name: str, to: int) -> None:
    """Each item is a stream frame with the request's id; a reply with `ok` and no data ends it."""
    async with connect(app_with(Streams), "/ws") as ws:
        await ws.send_json({"action": name, "request_id": "☃", "data": to})
        for number in range(to):
            part = await ws.receive_json()
            assert part == {"type": "stream", "action": name, "request_id": "☃", "data": number}
        end = await ws.receive_json()
        assert (end["type"], end["status"], end["data"], end["request_id"]) == ("response", "ok", None, "☃")


async def test_a_stream_without_a_request_id_ends_without_a_reply() -> None:
    """Without a `request_id` the parts carry a null id, and nothing ends the stream."""
    async with connect(app_with(Streams), "/ws") as ws:
        await ws.send_json({"action": "count", "data": 2})
        for number in range(2):
            part = {"type": "stream", "action": "count", "request_id": None, "data": number}
            assert await ws.receive_json() == part
        assert (await ask(ws, "ping"))["data"] == "pong"


@pytest.mark.parametrize("name", ["fail", "fail_in_a_thread"])
async def test_an_error_in_the_middle_of_a_stream_ends_it(name: str) -> None:
    """What a generator raises ends its stream with a reply that tells it."""
    async with connect(app_with(Streams), "/ws") as ws:
        await ws.send_json({"action": name, "request_id": 1})
        assert (await ws.receive_json())["data"] == 1
        end = await ws.receive_json()
        assert (end["type"], end["status"]) == ("response", "bad")
        assert end["errors"] == {"code": "broken", "detail": "half way"}
        assert (await ask(ws, "ping"))["data"] == "pong"


@pytest.mark.parametrize("name", ["endless", "waiting"])
async def test_cancel_ends_a_stream_with_ok(name: str) -> None:
    """`$cancel` ends a stream: its closing reply is `ok`, it gets none itself, and the next frame has its turn."""
    Streams.ended.clear()
    async with connect(app_with(Streams), "/ws") as ws:
        await ws.send_json({"action": name, "request_id": 1})
        assert (await ws.receive_json())["type"] == "stream"
        await ws.send_json({"action": "$cancel", "request_id": 1})
        while (frame := await ws.receive_json())["type"] == "stream":
            assert frame["request_id"] == 1
        assert (frame["action"], frame["status"], frame["data"], frame["errors"]) == (name, "ok", None, None)
        assert Streams.ended == [name]
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_cancel_ends_a_plain_generator_whose_thread_is_busy() -> None:
    """`$cancel` of a plain generator that is at work in its thread ends the stream with `ok`, and closes it after."""
    is_busy, go_on, is_closed = threading.Event(), threading.Event(), threading.Event()

    class Chat(ActionConsumer):
        @action
        def busy(self) -> Iterator[int]:
            try:
                yield 0
                is_busy.set()
                go_on.wait(1)
                yield 1
            finally:
                is_closed.set()

        @action
        async def ping(self) -> str:
            return "pong"

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "busy", "request_id": 1})
        assert (await ws.receive_json())["data"] == 0
        assert await asyncio.to_thread(is_busy.wait, 1)
        await ws.send_json({"action": "$cancel", "request_id": 1})
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        frame = await ws.receive_json()
        assert (frame["type"], frame["status"]) == ("response", "ok"), frame
        assert (await ask(ws, "ping"))["data"] == "pong"
        assert await asyncio.to_thread(is_closed.wait, 1)


async def test_nothing_of_a_cancelled_stream_follows_its_reply() -> None:
    """Once a stream was cancelled and its closing reply has come, no part of it comes any more, thread or not."""

    class Chat(Streams):
        @action
        def endless_in_a_thread(self) -> Iterator[int]:
            yield from range(1_000_000)

    async with connect(app_with(Chat), "/ws") as ws:
        for number in range(40):
            name = ("endless", "endless_in_a_thread")[number % 2]
            await ws.send_json({"action": name, "request_id": number})
            assert (await ws.receive_json())["type"] == "stream"
            await ws.send_json({"action": "$cancel", "request_id": number})
            while (await ws.receive_json())["type"] == "stream":
                pass
            assert (await ask(ws, "ping", request_id="marker"))["data"] == "pong"


async def test_a_plain_generator_is_closed_in_a_thread() -> None:
    """The cleanup of a plain generator runs where the rest of it ran, so that it may block and use `self.sync`."""
    cleaned = []

    class Chat(ActionConsumer):
        @action
        def watch(self) -> Iterator[Any]:
            try:
                yield "begun"
                yield object()
            finally:
                cleaned.append(threading.current_thread() is not threading.main_thread())

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "watch", "request_id": 1})
        assert [(await ws.receive_json())["type"] for _ in range(2)] == ["stream", "response"]
        await ws.close()
    assert cleaned == [True]


@pytest.mark.parametrize("name", ["endless", "waiting"])
async def test_a_stream_ends_when_the_client_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator is closed when its client has left."""
    monkeypatch.setattr("fastapi_channels.consumers.session.GRACE", 0.05)
    Streams.ended.clear()
    async with connect(app_with(Streams), "/ws") as ws:
        await ws.send_json({"action": name, "request_id": 1})
        await ws.receive_json()
        await ws.vanish()
        assert Streams.ended == [name]


async def test_a_stream_to_nobody_is_closed_and_not_cancelled() -> None:
    """A generator that goes on yielding when its client is gone is closed at its next item."""
    ends = []

    class Chat(ActionConsumer):
        @action
        async def count(self) -> AsyncIterator[int]:
            try:
                for number in range(1_000_000):
                    yield number
                    await asyncio.sleep(0)
            except BaseException as error:
                ends.append(type(error))
                raise

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "count", "request_id": 1})
        await ws.receive_json()
        await ws.vanish()
    assert ends == [GeneratorExit]


# $cancel


class Cancellable(ActionConsumer):
    begun: ClassVar[list[Any]] = []
    ended: ClassVar[list[Any]] = []

    @action
    async def one(self) -> None:
        await self.stay("one")

    @action(concurrency=2)
    async def two(self, name: Any = "two") -> None:
        await self.stay(name)

    @action
    def in_a_thread(self) -> None:
        self.begun.append("thread")
        time.sleep(0.1)

    @action
    async def catch(self) -> str:
        try:
            await self.stay("catch")
        except asyncio.CancelledError:
            return "a part of it"
        return "all of it"

    @action
    async def stray(self) -> None:
        raise asyncio.CancelledError

    @action
    async def ping(self) -> str:
        return "pong"

    async def stay(self, name: Any) -> None:
        self.begun.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(name)


@pytest.fixture
def cancellable(monkeypatch: pytest.MonkeyPatch) -> type[Cancellable]:
    monkeypatch.setattr("fastapi_channels.consumers.session.GRACE", 0.05)
    Cancellable.begun.clear()
    Cancellable.ended.clear()
    return Cancellable


async def _until_begun(name: Any) -> None:
    await until(lambda: name in Cancellable.begun)


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("request_id", ["☃", 7, 1.5])
async def test_cancel_ends_a_running_call(cancellable: type[Cancellable], name: str, request_id: Any) -> None:
    """`$cancel` cancels a running call, which is answered with `bad` and `cancelled`; what waits has its turn."""
    async with connect(app_with(cancellable), "/ws") as ws:
        await ws.send_json({"action": name, "request_id": request_id})
        await _until_begun(name)
        await ws.send_json({"action": "ping", "request_id": "behind"})
        await ws.send_json({"action": "$cancel", "request_id": request_id})
        replies = [await ws.receive_json() for _ in range(2)]
        (cancelled,) = (reply for reply in replies if reply["request_id"] == request_id)
        assert (cancelled["action"], cancelled["status"]) == (name, "bad")
        assert cancelled["errors"]["code"] == "cancelled"
        assert cancellable.ended == [name]
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_cancel_of_a_thread_is_answered_at_once(cancellable: type[Cancellable]) -> None:
    """`$cancel` of a plain function doesn't wait for its thread, which can't be stopped."""
    async with connect(app_with(cancellable), "/ws") as ws:
        await ws.send_json({"action": "in_a_thread", "request_id": 1})
        await _until_begun("thread")
        began = time.monotonic()
        await ws.send_json({"action": "$cancel", "request_id": 1})
        assert (await ws.receive_json())["errors"]["code"] == "cancelled"
        assert time.monotonic() - began < 0.09


async def test_cancel_of_a_call_that_waits_keeps_it_from_being_begun(cancellable: type[Cancellable]) -> None:
    """`$cancel` of a call behind another one is answered in its turn, and it is never begun."""
    async with connect(app_with(cancellable), "/ws") as ws:
        await ws.send_json({"action": "one", "request_id": 1})
        await _until_begun("one")
        await ws.send_json({"action": "two", "request_id": 2, "data": "never"})
        await ws.send_json({"action": "$cancel", "request_id": 2})
        await ws.send_json({"action": "$cancel", "request_id": 1})
        replies = [await ws.receive_json() for _ in range(2)]
        assert [(reply["request_id"], reply["errors"]["code"]) for reply in replies] == [
            (1, "cancelled"),
            (2, "cancelled"),
        ]
        assert cancellable.begun == ["one"]


async def test_cancel_of_a_call_for_which_there_is_no_room_yet(cancellable: type[Cancellable]) -> None:
    """`$cancel` of the call above `concurrency` is answered without waiting for room, and it is never begun."""
    async with connect(app_with(cancellable), "/ws") as ws:
        for number in range(3):
            await ws.send_json({"action": "two", "request_id": number, "data": number})
        await _until_begun(1)
        await ws.send_json({"action": "$cancel", "request_id": 2})
        await ws.send_json({"action": "$cancel", "request_id": 0})
        replies = [await ws.receive_json() for _ in range(2)]
        assert {reply["request_id"] for reply in replies} == {0, 2}
        assert {reply["errors"]["code"] for reply in replies} == {"cancelled"}
        assert cancellable.begun == [0, 1]


async def test_cancel_of_nothing_is_ignored(cancellable: type[Cancellable]) -> None:
    """`$cancel` with an id that is unknown, answered already, or absent from every call gets no reply."""
    async with connect(app_with(cancellable), "/ws") as ws:
        assert (await ask(ws, "ping", request_id=5))["data"] == "pong"
        for request_id in (5, "5", "unknown", 10**30, -0.5):
            for _ in range(2):
                await ws.send_json({"action": "$cancel", "request_id": request_id})
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_a_second_cancel_changes_nothing(cancellable: type[Cancellable]) -> None:
    """Cancelling a call twice is the same as once."""
    async with connect(app_with(cancellable), "/ws") as ws:
        await ws.send_json({"action": "one", "request_id": 1})
        await _until_begun("one")
        await ws.send_json({"action": "$cancel", "request_id": 1})
        await ws.send_json({"action": "$cancel", "request_id": 1})
        assert (await ws.receive_json())["errors"]["code"] == "cancelled"
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_a_call_that_catches_its_cancellation_is_answered_and_harms_none(
    cancellable: type[Cancellable],
) -> None:
    """A call that ends by itself when it is cancelled gives its result, and the frames behind it are as any other."""
    async with connect(app_with(cancellable), "/ws") as ws:
        await ws.send_json({"action": "catch", "request_id": 1})
        await _until_begun("catch")
        for number, name in enumerate(("stray", "ping"), 2):
            await ws.send_json({"action": name, "request_id": number})
        await ws.send_json({"action": "$cancel", "request_id": 1})
        replies = [await ws.receive_json() for _ in range(3)]
        assert [reply["request_id"] for reply in replies] == [1, 2, 3]
        assert replies[0]["data"] == "a part of it"
        assert replies[1]["errors"]["code"] == "internal_error"
        assert replies[2]["data"] == "pong"


# Concurrency


class Gated(ActionConsumer):
    gates: ClassVar[dict[Any, asyncio.Event]] = {}
    running: ClassVar[list[Any]] = []

    @action(concurrency=3)
    async def work(self, name: Any) -> Any:
        self.running.append(name)
        gate = self.gates.setdefault(name, asyncio.Event())
        await gate.wait()
        self.running.remove(name)
        return name

    @action
    async def ping(self) -> str:
        return "pong"


@pytest.fixture
def gated() -> type[Gated]:
    Gated.gates.clear()
    Gated.running.clear()
    return Gated


async def test_with_concurrency_n_calls_run_at_once(gated: type[Gated]) -> None:
    """Up to n calls run at once and are answered as they end; other actions go on meanwhile."""
    async with connect(app_with(gated), "/ws") as ws:
        for number in range(3):
            await ws.send_json({"action": "work", "request_id": number, "data": number})
        assert (await ask(ws, "ping", request_id="ping"))["data"] == "pong"
        assert sorted(gated.running) == [0, 1, 2]
        for number in (2, 0, 1):
            gated.gates[number].set()
            assert (await ws.receive_json())["data"] == number


async def test_the_call_above_concurrency_holds_what_is_behind_it(gated: type[Gated]) -> None:
    """The n+1st call waits for room, and holds the frames behind it; then they go on in order."""
    async with connect(app_with(gated), "/ws") as ws:
        for number in range(4):
            await ws.send_json({"action": "work", "request_id": number, "data": number})
        await ws.send_json({"action": "ping", "request_id": "behind"})
        assert await ws.receive_nothing(0.02)
        assert sorted(gated.running) == [0, 1, 2]
        gated.gates[1].set()
        assert (await ws.receive_json())["data"] == 1
        assert (await ws.receive_json())["request_id"] == "behind"
        assert sorted(gated.running) == [0, 2, 3]
        for number in (0, 2, 3):
            gated.gates[number].set()
        assert sorted([(await ws.receive_json())["data"] for _ in range(3)]) == [0, 2, 3]


async def test_concurrency_counts_for_each_connection(gated: type[Gated]) -> None:
    """What one connection runs takes no room from another."""
    app = app_with(gated)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        for number in range(3):
            await one.send_json({"action": "work", "request_id": number, "data": f"one {number}"})
        await two.send_json({"action": "work", "request_id": 0, "data": "two"})
        assert (await ask(two, "ping"))["data"] == "pong"
        assert "two" in gated.running
        for gate in gated.gates.values():
            gate.set()
        assert (await two.receive_json())["data"] == "two"


async def test_a_hundred_calls_at_once_are_all_answered() -> None:
    """Many calls that end in any order are answered exactly once each."""

    class Chat(ActionConsumer):
        @action(concurrency=10)
        async def work(self, n: int) -> int:
            for _ in range(n % 7):
                await asyncio.sleep(0)
            return n

    async with connect(app_with(Chat), "/ws") as ws:
        for number in range(100):
            await ws.send_json({"action": "work", "request_id": number, "data": number})
        replies = [await ws.receive_json() for _ in range(100)]
    assert sorted(reply["request_id"] for reply in replies) == list(range(100))
    assert all(reply["data"] == reply["request_id"] for reply in replies)


# Inheritance


async def test_actions_are_inherited_and_overridden() -> None:
    """A subclass has the actions of its bases and mixins; an override replaces one, decorated again or not."""

    class Pings:
        @action
        async def ping(self) -> str:
            return "mixin"

    class Base(ActionConsumer):
        @action("speak", timeout=5)
        async def say(self) -> str:
            return "base"

        @action
        async def whisper(self) -> str:
            return "base"

        @action
        async def shout(self) -> str:
            return "base"

    class Chat(Pings, Base):
        async def say(self) -> str:
            return "override, " + await super().say()

        @action("murmur")
        async def whisper(self) -> str:
            return "decorated again"

        shout = None  # type: ignore[assignment]

        @action
        async def own(self) -> str:
            return "own"

    app = app_with(Chat, Base)
    async with connect(app, "/ws") as ws, connect(app, "/Base") as base:
        assert (await ask(ws, "ping"))["data"] == "mixin"
        assert (await ask(ws, "speak"))["data"] == "override, base"
        assert (await ask(ws, "murmur"))["data"] == "decorated again"
        assert (await ask(ws, "own"))["data"] == "own"
        for gone in ("say", "whisper", "shout"):
            assert (await ask(ws, gone))["errors"]["code"] == "unknown_action"
        for name in ("speak", "whisper", "shout"):
            assert (await ask(base, name))["data"] == "base"
        assert (await ask(base, "own"))["errors"]["code"] == "unknown_action"
    assert set(Chat.actions) == {"ping", "speak", "murmur", "own"}
    assert Chat.actions["speak"].timeout == 5
    assert set(Base.actions) == {"speak", "whisper", "shout"}


def test_an_action_tells_about_itself() -> None:
    """`Consumer.actions` holds what the decorator and the docstring say."""

    class Chat(ActionConsumer):
        @action(concurrency=4, timeout=1.5, deprecated=True, tags=["a", "b"])
        async def old(self) -> None:
            """The first line.

            And more.
            """

        @action("☃", summary="")
        async def new(self) -> None:
            """Not this."""

    old, new = Chat.actions["old"], Chat.actions["☃"]
    assert (old.concurrency, old.timeout, old.deprecated, old.tags) == (4, 1.5, True, ("a", "b"))
    assert old.summary == "The first line."
    assert (new.name, new.summary, new.deprecated, new.concurrency) == ("☃", "", False, 1)


async def test_a_deprecated_action_works() -> None:
    """`deprecated=True` is only told to readers; the action answers."""

    class Chat(ActionConsumer):
        @action(deprecated=True)
        async def old(self) -> str:
            return "still here"

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "old"))["data"] == "still here"


async def test_more_errors_than_anybody_reads() -> None:
    """Of a frame with hundreds of errors the client is told the number: the list would be far larger than the frame."""
    async with connect(app_with(Data), "/ws") as ws:
        for count, listed in ((100, 100), (101, 0)):
            errors = (await ask(ws, "many", data=[1] * count))["errors"]
            assert (errors["code"], len(errors["errors"])) == ("invalid_data", listed)
            assert listed or "101 errors" in errors["detail"]


async def test_a_watch_from_the_accept_on() -> None:
    """What ends a connection by itself does so while `connect` goes on after its own accept, too."""

    class Pushes(ActionConsumer):
        idle_timeout = 0.05

        async def connect(self) -> None:
            await self.accept()
            await asyncio.Event().wait()

    async with connect(app_with(Pushes), "/ws") as ws:
        assert (await ws.closed(timeout=5))[0] == 1001
