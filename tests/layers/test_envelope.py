"""A message on its way."""

from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from fastapi_channels.exceptions import InvalidMessage
from fastapi_channels.layers import Envelope
from fastapi_channels.layers.envelope import encode


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Frame(BaseModel):
    type: Literal["websocket.send"] = "websocket.send"
    bytes: Any


def test_type_and_payload() -> None:
    """An envelope knows its message's type, and holds its JSON."""
    envelope = Envelope.of({"type": "say", "text": "é"}, 7.0)
    assert (envelope.type, envelope.expires) == ("say", 7.0)
    assert envelope.payload == '{"type":"say","text":"é"}'.encode()


def test_a_model_is_a_message() -> None:
    """A pydantic model makes the same envelope as the dict that it stands for."""
    assert Envelope.of(Say(text="x"), 0).payload == Envelope.of({"type": "say", "text": "x"}, 0).payload


def test_a_type_may_be_an_enum() -> None:
    """A member of a StrEnum is a type."""

    class Kind(StrEnum):
        SAY = "say"

    envelope = Envelope.of({"type": Kind.SAY}, 0)
    assert envelope.type == "say"
    assert envelope.decode() == {"type": "say"}


def test_any_mapping_is_a_message() -> None:
    """A mapping that is no dict is a message as well, on its own and with bytes for a frame."""
    message = MappingProxyType({"type": "say", "text": "x"})
    assert Envelope.of(message, 0).decode() == {"type": "say", "text": "x"}
    frame = MappingProxyType({"type": "websocket.send", "bytes": b"\xff"})
    assert Envelope.of(frame, 0).decode() == {"type": "websocket.send", "bytes": b"\xff"}


def test_decoding_gives_a_new_object_each_time() -> None:
    """What one receiver does to its message changes no other's."""
    envelope = Envelope.of({"type": "x", "list": []}, 0)
    envelope.decode()["list"].append(1)
    assert envelope.decode() == {"type": "x", "list": []}


def test_one_frame_for_all() -> None:
    """The frame of an envelope is made once, and all receivers share it."""
    envelope = Envelope.of({"type": "x", "text": "é"}, 0)
    assert envelope.frame == {"type": "websocket.send", "text": '{"type":"x","text":"é"}'}
    assert envelope.frame is envelope.frame


@pytest.mark.parametrize("data", [b"", b"abc", b"abcd", bytes(range(256))])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("make", [dict, Frame])
def test_bytes_for_a_frame(make: Any, kind: Any, data: bytes) -> None:
    """The bytes of a `websocket.send` arrive as they were, in a dict as in a model, whatever kind of bytes they are."""
    envelope = Envelope.of(make(type="websocket.send", bytes=kind(data)), 0)
    assert envelope.decode() == {"type": "websocket.send", "bytes": data}


@pytest.mark.parametrize("value", ["abcd", "a", 7, ["x"]])
@pytest.mark.parametrize("make", [dict, Frame])
def test_no_bytes_for_a_frame(make: Any, value: Any) -> None:
    """What stands for the bytes of a `websocket.send` and is none raises at the sender."""
    with pytest.raises(InvalidMessage):
        Envelope.of(make(type="websocket.send", bytes=value), 0)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({}, "a message is a dict or a pydantic model with a `type`, not a dict with the keys []"),
        (
            {"text": 1, 2: 3},
            "a message is a dict or a pydantic model with a `type`, not a dict with the keys ['2', 'text']",
        ),
        ([], "a message is a dict or a pydantic model with a `type`, not <class 'list'>"),
    ],
)
def test_what_is_told_of_no_message(message: Any, told: str) -> None:
    """The error of what is no message shows its keys or its class, and none of its values."""
    with pytest.raises(InvalidMessage) as caught:
        Envelope.of(message, 0)
    assert str(caught.value) == told


def test_what_is_told_of_what_is_not_for_json() -> None:
    """The error of a message that JSON can't hold names its type, and the class that is to blame."""
    with pytest.raises(InvalidMessage, match=r"^the message 'say' can't be sent as JSON: .*object"):
        Envelope.of({"type": "say", "value": object()}, 0)


def test_no_nan_in_json() -> None:
    """NaN and the infinities become null, since browsers know no NaN."""
    assert encode([float("nan"), float("inf"), -float("inf"), 1.5]) == b"[null,null,null,1.5]"


def test_what_refers_to_itself_is_not_for_json() -> None:
    """A list that holds itself raises ValueError."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="can't be sent as JSON"):
        encode(endless)
