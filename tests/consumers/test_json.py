"""`JsonConsumer`: frames are JSON, and the annotation of `receive` is their schema."""

import datetime
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from fastapi_channels.consumers import JsonConsumer
from fastapi_channels.exceptions import ConsumerError
from fastapi_channels.testing import connect
from tests.conftest import app_with


class Join(BaseModel):
    kind: Literal["join"]
    room: Annotated[str, Field(min_length=1)]


class Leave(BaseModel):
    kind: Literal["leave"]
    at: datetime.datetime


class ModelConsumer(JsonConsumer):
    async def receive(self, data: Join) -> None:
        assert type(data) is Join
        await self.send_json(data)


class UnionConsumer(JsonConsumer):
    async def receive(self, message: Annotated[Join | Leave, Field(discriminator="kind")]) -> None:
        await self.send_json([type(message).__name__, message])


class AnyConsumer(JsonConsumer):
    async def receive(self, data: Any) -> None:
        await self.send_json([data])


class BareConsumer(JsonConsumer):
    async def receive(self, data):  # type: ignore[no-untyped-def]
        await self.send_json([data])


class DictConsumer(JsonConsumer):
    async def receive(self, data: dict[str, int]) -> None:
        await self.send_json(data)


class OptionalConsumer(JsonConsumer):
    async def receive(self, data: int | None) -> None:
        await self.send_json([data])


class DeafConsumer(JsonConsumer): ...


@pytest.mark.parametrize(
    ("consumer", "frame", "answer"),
    [
        (ModelConsumer, '{"kind": "join", "room": "☃"}', {"kind": "join", "room": "☃"}),
        (UnionConsumer, '{"kind": "join", "room": "a"}', ["Join", {"kind": "join", "room": "a"}]),
        (
            UnionConsumer,
            '{"kind": "leave", "at": "2024-02-29T00:00:00Z"}',
            ["Leave", {"kind": "leave", "at": "2024-02-29T00:00:00Z"}],
        ),
        (AnyConsumer, "null", [None]),
        (AnyConsumer, "false", [False]),
        (AnyConsumer, '""', [""]),
        (AnyConsumer, "[]", [[]]),
        (AnyConsumer, ' {"a": [1, 2.5]} ', [{"a": [1, 2.5]}]),
        (BareConsumer, "7", [7]),
        (DictConsumer, '{"a": "1"}', {"a": 1}),
        (OptionalConsumer, "null", [None]),
    ],
)
@pytest.mark.parametrize("kind", ["text", "binary"])
async def test_a_frame_is_what_receive_declares(
    consumer: type[JsonConsumer], frame: str, answer: Any, kind: str
) -> None:
    """`receive` gets what its annotation makes of the frame, which may be text or JSON in UTF-8 bytes."""
    async with connect(app_with(consumer), "/ws") as ws:
        await (ws.send_text(frame) if kind == "text" else ws.send_bytes(frame.encode()))
        assert await ws.receive_json() == answer


@pytest.mark.parametrize(
    ("consumer", "frame", "code", "places"),
    [
        (ModelConsumer, '{"kind": "join", "room": ""}', "invalid_data", [["room"]]),
        (ModelConsumer, "{}", "invalid_data", [["kind"], ["room"]]),
        (ModelConsumer, "null", "invalid_data", [[]]),
        (UnionConsumer, '{"kind": "other"}', "invalid_data", [[]]),
        (UnionConsumer, '{"kind": "leave", "at": "never"}', "invalid_data", [["leave", "at"]]),
        (DictConsumer, '{"a": 1, "b": "x"}', "invalid_data", [["b"]]),
        (DictConsumer, "[1]", "invalid_data", [[]]),
        (AnyConsumer, "", "invalid_frame", None),
        (AnyConsumer, "{'a': 1}", "invalid_frame", None),
        (AnyConsumer, "NaN", "invalid_frame", None),
        (DeafConsumer, "1", "invalid_frame", None),
    ],
)
async def test_a_frame_that_does_not_fit_is_answered(
    consumer: type[JsonConsumer], frame: str, code: str, places: Any
) -> None:
    """A frame that doesn't fit gets an error frame of the one shape there is, and the connection lives on."""
    async with connect(app_with(consumer), "/ws") as ws:
        for _ in range(2):
            await ws.send_text(frame)
            reply = await ws.receive_json()
            assert reply.keys() == {"type", "action", "request_id", "status", "data", "errors"}
            assert (reply["type"], reply["status"], reply["data"]) == ("response", "bad", None)
            assert (reply["action"], reply["request_id"], reply["errors"]["code"]) == (None, None, code)
            assert [finding["loc"] for finding in reply["errors"].get("errors", [])] == (places or [])


async def test_frames_are_received_in_order_and_errors_in_their_place() -> None:
    """Frames, good and bad, are answered in the order in which they came."""

    class Chat(JsonConsumer):
        async def receive(self, data: int) -> None:
            if data == 3:
                raise ConsumerError("no threes", code="three", n=data)
            if data == 4:
                raise RuntimeError("the secret")
            await self.send_json(data)

    async with connect(app_with(Chat), "/ws") as ws:
        for frame in ("1", "x", "3", "4", '"a"', "6"):
            await ws.send_text(frame)
        frames = [await ws.receive_json() for _ in range(6)]
        assert [frame if isinstance(frame, int) else frame["errors"]["code"] for frame in frames] == [
            *(1, "invalid_frame", "three", "internal_error", "invalid_data", 6)
        ]
        assert frames[2]["errors"] == {"code": "three", "detail": "no threes", "n": 3}


async def test_send_json_sends_what_pydantic_makes_of_it() -> None:
    """`send_json` takes models, dataclasses, dates and sets; NaN is null; what JSON can't hold raises a ValueError."""

    @dataclass
    class Point:
        x: float
        y: float

    class Chat(JsonConsumer):
        async def receive(self, data: Any) -> None:
            with pytest.raises(ValueError, match="JSON"):
                await self.send_json({"object": object()})
            with pytest.raises(ValueError, match="JSON"):
                await self.send_json("\ud800")
            content = [Point(1, float("nan")), Join(kind="join", room="☃"), datetime.date(2024, 2, 29), {7}, "\x00"]
            assert await self.send_json(content)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json(1)
        assert await ws.receive_json() == [
            {"x": 1, "y": None},
            {"kind": "join", "room": "☃"},
            "2024-02-29",
            [7],
            "\x00",
        ]
