"""A message on its way: encoded once, decoded afresh for each that handles it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, from_json, to_json

from fastapi_channels.exceptions import InvalidMessage

__all__ = ["Envelope", "Message", "encode"]

#: What goes through a layer: a dict with a `type`, or a pydantic model that has one.
Message = Mapping[str, Any] | BaseModel

#: The built-in event that writes a frame; its `bytes` travel as base64, since JSON has none.
SEND = "websocket.send"

#: The built-in event that closes the connection.
CLOSE = "websocket.close"


def encode(content: Any) -> bytes:
    """The JSON of `content`, as pydantic writes it; NaN and the infinities are null, since browsers know no NaN.

    Raises:
        ValueError: Something in it is not for JSON.
    """
    try:
        return to_json(content, inf_nan_mode="null")
    except (PydanticSerializationError, UnicodeError) as error:
        raise ValueError(f"can't be sent as JSON: {error}") from error


class Envelope:
    """A message, its JSON, and the frame made of it; each is made at most once in a process.

    Attributes:
        type: The message's type.
        payload: The message as JSON.
        expires: When it is too old to be handled, on the event loop's clock.
    """

    __slots__ = ("_frame", "_message", "expires", "payload", "type")

    def __init__(self, type: str, payload: bytes, expires: float) -> None:
        self.type = type
        self.payload = payload
        self.expires = expires
        self._frame: dict[str, Any] | None = None
        self._message: dict[str, Any] | None = None

    @classmethod
    def received(cls, message: Any, payload: bytes, expires: float) -> Envelope:
        """A message that came from elsewhere, decoded already.

        Raises:
            InvalidMessage: It is none.
        """
        kind = message.get("type") if isinstance(message, dict) else None
        if not isinstance(kind, str) or not kind:
            raise InvalidMessage("a message is a dict with a `type`")
        envelope = cls(kind, payload, expires)
        if kind != SEND:
            envelope._message = message
        elif message.get("bytes") is not None:
            base64.b64decode(message["bytes"], validate=True)
        return envelope

    @classmethod
    def of(cls, message: Message, expires: float) -> Envelope:
        """Encode a message.

        Raises:
            InvalidMessage: It has no `type`, or holds what JSON can't.
        """
        kind = message.get("type") if isinstance(message, Mapping) else getattr(message, "type", None)
        if not isinstance(kind, str) or not kind:
            raise InvalidMessage(f"a message is a dict or a pydantic model with a `type`, not {_shown(message)}")
        if kind == SEND:
            message = _with_base64(message)
        try:
            return cls(kind, encode(dict(message) if isinstance(message, Mapping) else message), expires)
        except ValueError as error:
            raise InvalidMessage(f"the message {kind!r} {error}") from error

    def decode(self) -> dict[str, Any]:
        """The message as a new dict, which the caller may change."""
        if self._message is not None:
            known, self._message = self._message, None
            return known
        message: dict[str, Any] = from_json(self.payload)
        if self.type == SEND and message.get("bytes") is not None:
            message["bytes"] = base64.b64decode(message["bytes"])
        return message

    @property
    def frame(self) -> dict[str, Any]:
        """The ASGI event that sends the message to a client as it is; all receivers share it."""
        if self._frame is None:
            self._frame = {"type": "websocket.send", "text": self.payload.decode()}
        return self._frame


def _with_base64(message: Message) -> Message:
    """The event that writes a frame, with its bytes as they travel."""
    content = message if isinstance(message, Mapping) else dict(message)
    data = content.get("bytes")
    if data is None:
        return message
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidMessage(f"the bytes of {SEND} are bytes, not {type(data).__name__}")
    return {**content, "bytes": base64.b64encode(data).decode()}


def _shown(message: object) -> str:
    return f"a dict with the keys {sorted(map(str, message))}" if isinstance(message, Mapping) else repr(type(message))


def checked_close_code(code: Any) -> int:
    """Return `code` if an application may close with it.

    Raises:
        ValueError: RFC 6455 7.4 doesn't let it.
    """
    if isinstance(code, int) and not isinstance(code, bool):
        if 1000 <= code <= 1014 and code not in (1004, 1005, 1006):
            return code
        if 3000 <= code <= 4999:
            return code
    raise ValueError(f"a close code is 1000-1014 without 1004-1006, or 3000-4999, not {code!r}")
