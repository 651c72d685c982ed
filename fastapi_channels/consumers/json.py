"""`JsonConsumer`: frames are JSON, and the annotation of `receive` is their schema."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from typing_extensions import override

from fastapi_channels.consumers.base import WebSocketConsumer
from fastapi_channels.dependencies import Plan
from fastapi_channels.exceptions import DefinitionError, InvalidFrame

__all__ = ["JsonConsumer"]


class JsonConsumer(WebSocketConsumer):
    """A consumer whose frames are JSON.

    `receive` gets what a frame holds, validated by the annotation of its parameter: a model, a discriminated union, a
    dict. Other parameters of it are `Depends`, resolved for each frame. A frame that is not JSON or doesn't fit is
    answered with an error frame. A binary frame is JSON in UTF-8.
    """

    @classmethod
    @override
    def _read_receive(cls) -> None:
        cls._receive_plan = Plan(cls.receive, cls)
        if cls._receive_plan.is_stream:
            raise DefinitionError(f"{cls.__name__}.receive can't be a generator")

    if not TYPE_CHECKING:

        async def receive(self, data: Any) -> None:
            """Called with the content of each frame, one at a time, in order; see `WebSocketConsumer.receive`."""
            raise InvalidFrame("this connection takes no frames")

    @override
    def _parse_frame(self, frame: str | bytes) -> Any:
        try:
            return from_json(frame, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidFrame(f"the frame is not JSON: {error}") from error

    @override
    def _handle_frame(self, parsed: Any) -> Awaitable[Any]:
        plan = self._receive_plan
        return plan.begin(self, plan.validate(parsed), self._session.handshake)
