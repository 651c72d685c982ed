"""What an error looks like from outside: the one place that turns it into a frame, a close code or an HTTP response.

What the client may see tells nothing of the inside: an error that was not raised to be told is an internal error.

Spec:
    protocol.md, 1 (errors), 2 and 3; the tables are those of decisions 3, 11 and 25.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from fastapi_channels import _fastapi
from fastapi_channels._tasks import in_thread
from fastapi_channels.exceptions import (
    ConsumerError,
    InvalidData,
    InvalidGroupName,
    LayerUnavailable,
    NotAuthenticated,
    Throttled,
    TooManyConnections,
)

__all__ = ["Answer", "answer_to", "answer_view", "ask_application", "close_code_of", "refusal", "status_code_of"]

#: Seconds after which a client may try again when the layer is away, or there are too many connections.
RETRY_AFTER = 5

_CLOSE_CODES = {401: 4501, 403: 4503, 404: 4504, 422: 4500, 429: 4029, 503: 1013}
_STATUS_CODES = {4501: 401, 4503: 403, 4504: 404, 4009: 429, 4029: 429}
_ERROR_CODES = {401: "not_authenticated", 403: "permission_denied", 422: "invalid_data", 429: "throttled"}

logger = logging.getLogger("fastapi_channels")

_INTERNAL = "Internal Server Error"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is told of an error.

    Attributes:
        status_code: Of the HTTP response that refuses a handshake.
        close_code: Of the close frame, where there is one instead.
        code: For programs; the `code` of an error frame.
        detail: For people, or what an `HTTPException` carries as its detail.
        extra: More keys of the error object.
        headers: Of the HTTP response.
        is_expected: Whether the error was raised to be told; any other belongs into the log.
        response: What the application's own exception handler made of it.
        body: Of the HTTP response; by default it is `{"detail": ...}`, as FastAPI has it.
    """

    status_code: int
    close_code: int
    code: str
    detail: Any
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] | None = None
    is_expected: bool = True
    response: Response | None = None
    body: Mapping[str, Any] | None = None

    def to_response(self) -> Response:
        """The HTTP response that refuses a handshake, or that a view gives.

        Raises:
            TypeError: The error carries what JSON can't hold.
        """
        return self.response or JSONResponse(self.body or {"detail": self.detail}, self.status_code, self.headers)

    @property
    def errors(self) -> dict[str, Any]:
        """The error object of a frame."""
        return {"code": self.code, "detail": self.detail, **self.extra}

    @property
    def reason(self) -> str:
        """The reason of a close frame: the detail, of which a list of findings is too long and told by its first."""
        match self.detail:
            case str():
                return self.detail
            case [{"loc": [*_, name], "msg": str(message)}, *_]:
                return f"{name}: {message}"
            case _:
                return HTTPStatus(self.status_code).phrase


def close_code_of(status_code: int) -> int:
    """The close code that says what an HTTP status says."""
    return _CLOSE_CODES.get(status_code, 4500 if status_code < 500 else 1011)


def status_code_of(close_code: int) -> int:
    """The HTTP status of a handshake that is refused with a close code."""
    return _STATUS_CODES.get(close_code, 403)


def refusal(close_code: int, reason: str = "") -> Answer:
    """How a handshake is refused with a close code."""
    status_code = status_code_of(close_code)
    code = _ERROR_CODES.get(status_code, "error")
    return Answer(status_code, close_code, code, reason or HTTPStatus(status_code).phrase)


def _of_status(status_code: int, detail: Any, headers: Mapping[str, str] | None = None) -> Answer:
    code = _ERROR_CODES.get(status_code, f"http_{status_code}")
    return Answer(status_code, close_code_of(status_code), code, detail, headers=headers)


def answer_to(error: Exception, *, debug: bool = False) -> Answer:
    """What a client is told of an error when the application has no exception handler for it.

    Args:
        error: The error.
        debug: Whether the client may see what went wrong inside; `app.debug`.
    """
    match error:
        case ConsumerError():
            close_code = error.close_code or close_code_of(error.status_code)
            body = {"detail": error.detail, "code": error.code, **error.extra}
            return Answer(
                error.status_code, close_code, error.code, error.detail, error.extra, _headers(error), body=body
            )
        case HTTPException():
            return _of_status(error.status_code, error.detail, error.headers)
        case WebSocketException():
            return refusal(error.code, error.reason or "")
        case WebSocketRequestValidationError() | RequestValidationError():
            return Answer(422, 4500, InvalidData.code, jsonable_encoder(error.errors()))
        case InvalidGroupName():
            return Answer(422, 4500, InvalidData.code, str(error))
        case LayerUnavailable():
            detail = "the service is not available now"
            return Answer(
                503, 1013, "unavailable", detail, {"retry_after": RETRY_AFTER}, {"Retry-After": f"{RETRY_AFTER}"}
            )
        case _:
            detail = f"{type(error).__name__}: {error}" if debug else _INTERNAL
            return Answer(500, 1011, "internal_error", detail, is_expected=False)


def _headers(error: ConsumerError) -> Mapping[str, str] | None:
    match error:
        case Throttled(retry_after=seconds) if math.isfinite(seconds):
            return {"Retry-After": f"{math.ceil(seconds)}"}
        case TooManyConnections():
            return {"Retry-After": f"{RETRY_AFTER}"}
        case NotAuthenticated():
            return {"WWW-Authenticate": "Bearer"}  # RFC 6750, 3
        case _:
            return None


async def answer_view(request: Request, error: Exception) -> Response:
    """The exception handler that `add_channel` gives an application for our own errors."""
    return answer_to(error).to_response()


async def ask_application(websocket: WebSocket, error: Exception) -> Answer:
    """What a client is told of an error: what the application's exception handler says, else `answer_to`.

    A handler that returns None may have sent something itself; the client is told of the error all the same.
    """
    app = websocket.scope.get("app")
    answer = answer_to(error, debug=bool(getattr(app, "debug", False)))
    handler = _fastapi.exception_handler(app, error)
    if handler is None:
        return answer
    try:
        is_async = _fastapi.is_async(handler)
        response = await (handler(websocket, error) if is_async else in_thread(handler, websocket, error))
    except Exception:
        logger.exception("the exception handler for %s failed", type(error).__qualname__)
        return answer
    if not isinstance(response, Response):
        return replace(answer, is_expected=True)
    mapped = _of_status(response.status_code, _detail(response), answer.headers)
    return replace(mapped, response=response)


def _detail(response: Response) -> Any:
    try:
        body = from_json(bytes(response.body))
    except ValueError:
        return bytes(response.body).decode("utf-8", "replace")
    return body.get("detail", body) if isinstance(body, dict) else body
