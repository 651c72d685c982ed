"""`JsonConsumer`: frames are JSON, and the annotation of `receive` is their schema."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from typing_extensions import override

from fastapi_channels.connection import State
from fastapi_channels.consumers.base import WebSocketConsumer
from fastapi_channels.consumers.session import AUTH, is_request_id
from fastapi_channels.dependencies import Plan
from fastapi_channels.exceptions import DefinitionError, InvalidFrame

__all__ = ["JsonConsumer"]


class JsonConsumer(WebSocketConsumer):
    """A consumer whose frames are JSON.

    `receive` gets what a frame holds, validated by the annotation of its parameter: a model, a discriminated union, a
    dict. Other parameters of it are `Depends`, resolved for each frame. A frame that is not JSON or doesn't fit is
    answered with an error frame. A binary frame is JSON in UTF-8.
    """

    _renewing: asyncio.Task[None] | None = None

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
    def _handle_at_once(self, parsed: Any) -> bool:
        return self._brings_token(parsed) and self._renew_at_once(*self._token_of(parsed))

    @override
    def _handle_frame(self, parsed: Any) -> Awaitable[Any]:
        if self._brings_token(parsed):
            return self._renew(*self._token_of(parsed))
        return super()._handle_frame(parsed)

    def _brings_token(self, parsed: Any) -> bool:
        """Whether it is a frame of `$auth`; where nobody looks for tokens it is like any other."""
        return self._session.gate.authenticates and isinstance(parsed, dict) and parsed.get("action") == AUTH

    def _token_of(self, parsed: Any) -> tuple[Any, Any]:
        """The request_id of such a frame, and the data in which the token is."""
        request_id = parsed.get("request_id")
        return request_id if is_request_id(request_id) else None, parsed.get("data", parsed)

    def _renew_at_once(self, request_id: Any, data: Any) -> bool:
        """Take a new token beside the frames, if none is being taken and there is somebody to answer; else False."""
        is_renewing = self._renewing is not None and not self._renewing.done()
        if is_renewing or self._connection.state is not State.OPEN:
            return False
        self._renewing = self._session.start(self._renew(request_id, data))
        return True

    async def _renew(self, request_id: Any, data: Any) -> None:
        """Take a new token, and answer."""
        try:
            await self._session.gate.pass_frame(self.websocket, None, is_control=True)
            if self._connection.closed_here:  # meanwhile
                return
            told = await self._session.renew(data.get("token") if isinstance(data, dict) else None)
            await self._reply_ok(AUTH, request_id, told)
        except Exception as error:
            await self._session.answer_error(error, AUTH, request_id)

    @override
    def _begin_receive(self, parsed: Any) -> Awaitable[Any]:
        plan = self._receive_plan
        return plan.begin(self, plan.validate(parsed), self._session.handshake)
