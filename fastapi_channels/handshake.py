"""What FastAPI reads from a handshake (path, query, header, cookie), for functions that are no endpoints.

FastAPI's reading of parameters is private, but a route is public: each set of parameters becomes the endpoint of a
route of its own, which is called with the connection's scope and answers nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_origin

from fastapi import Path, params
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.routing import APIWebSocketRoute
from pydantic_core import from_json, to_json
from starlette.types import Message
from starlette.websockets import WebSocket

from fastapi_channels import _fastapi
from fastapi_channels.exceptions import InvalidData

__all__ = ["HandshakeReader", "in_path"]

_WEBSOCKET = "fastapi_channels_websocket"
_VALUES = "fastapi_channels_values"


def in_path(parameter: inspect.Parameter, names: frozenset[str]) -> inspect.Parameter:
    """The parameter, marked as one of the path if it has one of these names and doesn't say what else it is."""
    annotation = parameter.annotation
    if (
        parameter.name not in names
        or get_origin(annotation) is Annotated
        or isinstance(parameter.default, (params.Depends, params.Param))
    ):
        return parameter
    return parameter.replace(annotation=Annotated[str if annotation is parameter.empty else annotation, Path()])


class HandshakeReader:
    """Reads one set of parameters from handshakes.

    Args:
        parameters: As they stand in a function's signature, with their annotations evaluated.

    Raises:
        FastAPIError, AssertionError: FastAPI can't read such parameters from a handshake.
    """

    def __init__(self, parameters: Sequence[inspect.Parameter]) -> None:
        self._parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        # FastAPI has to know what is in the path, which depends on the route that serves the connection.
        self._routes = {frozenset[str](): self._route(frozenset())}

    async def read(self, websocket: WebSocket) -> Mapping[str, Any]:
        """The values of the parameters on this connection.

        Raises:
            InvalidData: The handshake doesn't have them, or they don't fit.
        """
        names = frozenset(websocket.scope.get("path_params", {}))
        if names not in self._routes:
            self._routes[names] = self._route(names)
        scope = _fastapi.scope_without_handlers(websocket)
        try:
            await self._routes[names].handle(scope, _nothing_comes, _nothing_leaves)
        except WebSocketRequestValidationError as error:
            errors = [{key: finding[key] for key in ("type", "loc", "msg")} for finding in error.errors()]
            where = ".".join(map(str, errors[0]["loc"]))
            raise InvalidData(f"{where}: {errors[0]['msg']}", errors=from_json(to_json(errors))) from error
        values: Mapping[str, Any] = scope[_VALUES]
        return values

    def _route(self, names: frozenset[str]) -> APIWebSocketRoute:
        async def read(**values: Any) -> None:
            values.pop(_WEBSOCKET).scope[_VALUES] = values

        websocket = inspect.Parameter(_WEBSOCKET, inspect.Parameter.KEYWORD_ONLY, annotation=WebSocket)
        parameters = [websocket, *(in_path(parameter, names) for parameter in self._parameters)]
        read.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return APIWebSocketRoute("/", read)


async def _nothing_comes() -> Message:
    raise RuntimeError("nothing is received while a handshake is read")


async def _nothing_leaves(message: Message) -> None:
    raise RuntimeError("nothing is sent while a handshake is read")
