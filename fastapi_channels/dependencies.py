"""FastAPI's `Depends` for each frame: what a handler asks for, resolved to a plan once and carried out per call.

`connect` has FastAPI's own resolver, once per connection. A handler is called far more often, so its tree of
dependencies is read when its class is made, and a call only runs it. It takes what FastAPI takes: sub-dependencies,
classes, `use_cache`, `Security` and `SecurityScopes`, `yield`, plain functions in the thread pool, and
`app.dependency_overrides`. Dependencies with `yield` are closed after each call.

What a dependency asks of the handshake (path, query, header, cookie) does not change from frame to frame: FastAPI
reads that at the first call on a connection (`HandshakeReader`), and each later call gets the same values.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from fastapi import BackgroundTasks, Request, Response, params
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.exceptions import FastAPIError
from fastapi.security import SecurityScopes
from pydantic import BaseModel, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from fastapi_channels._tasks import in_thread
from fastapi_channels.exceptions import DefinitionError, InvalidData
from fastapi_channels.handshake import HandshakeReader
from fastapi_channels.layers import Envelope

#: How many errors of one frame a client is told.
MAX_ERRORS = 100

__all__ = [
    "Handshake",
    "Plan",
    "asks_impossible",
    "depends_of",
    "is_websocket",
    "signature_of",
]

#: What dependencies asked of the handshake, by the dependency.
Handshake = dict[Callable[..., Any], Mapping[str, Any]]

_NO_DATA = inspect.Parameter.empty


def signature_of(function: Callable[..., Any], *, owner: type | None = None) -> inspect.Signature:
    """The signature with its annotations evaluated; without `self`, if it is a method of `owner`.

    Raises:
        DefinitionError: An annotation names what can't be found.
    """
    call = _called(function)
    annotated = call.__init__ if inspect.isclass(call) else call
    signature = inspect.signature(function)
    hints = dict(getattr(inspect.unwrap(annotated), "__annotations__", {}))
    hints.pop("return", None)
    try:
        hints = typing.get_type_hints(
            types.SimpleNamespace(__annotations__=hints),
            globalns=getattr(inspect.unwrap(annotated), "__globals__", {}),
            localns={} if owner is None else {owner.__name__: owner},
            include_extras=True,
        )
    except NameError as error:
        raise DefinitionError(f"{_name(function)}: {error} in an annotation") from error
    parameters = [
        parameter.replace(annotation=hints.get(name, parameter.annotation))
        for name, parameter in signature.parameters.items()
    ]
    return inspect.Signature(parameters if owner is None else parameters[1:])


@dataclass(slots=True, eq=False)
class _Node:
    """One dependency: what to call, and with what."""

    call: Callable[..., Any]
    dependencies: list[tuple[str, _Node]]
    websocket: Sequence[str]
    scopes: Mapping[str, SecurityScopes]
    reader: HandshakeReader | None
    use_cache: bool
    key: tuple[Any, ...]
    kind: str

    async def solve(self, context: _Solving) -> Any:
        if self.use_cache and self.key in context.cache:
            return context.cache[self.key]
        arguments: dict[str, Any] = dict(self.scopes)
        for name in self.websocket:
            arguments[name] = context.websocket
        if self.reader is not None:
            if self.call not in context.handshake:
                context.handshake[self.call] = await self.reader.read(context.websocket)
            arguments.update(context.handshake[self.call])
        for name, dependency in self.dependencies:
            arguments[name] = await dependency.solve(context)
        if self.kind == "coroutine":
            value = await self.call(**arguments)
        elif self.kind == "function":
            value = await in_thread(self.call, **arguments)
        elif self.kind == "async generator":
            value = await context.stack.enter_async_context(asynccontextmanager(self.call)(**arguments))
        else:
            manager = contextmanager_in_threadpool(contextmanager(self.call)(**arguments))
            value = await context.stack.enter_async_context(manager)
        context.cache[self.key] = value
        return value


@dataclass(slots=True, eq=False)
class _Solving:
    """One call of a handler while its dependencies are being found."""

    websocket: WebSocket
    handshake: Handshake
    stack: AsyncExitStack
    cache: dict[tuple[Any, ...], Any]


class Plan:
    """How to call one handler of a consumer: what takes the data, and what is depended upon.

    Args:
        function: The method, as it stands in the class.
        owner: The class, for annotations that name it.
        data: What the parameter for the data is called in errors; `"data"` or `"message"`.

    Attributes:
        is_simple: Whether `call` needs nothing but the data: no dependencies and no thread.
        is_plain: Whether it is simple and takes any JSON object as it is.
        is_stream: Whether the handler is a generator.

    Raises:
        DefinitionError: The signature asks for what a handler can't have.
    """

    def __init__(self, function: Callable[..., Any], owner: type, *, data: str = "data") -> None:
        self.function = function
        self.is_async_stream = inspect.isasyncgenfunction(function)
        self.is_stream = self.is_async_stream or inspect.isgeneratorfunction(function)
        self.is_async = self.is_async_stream or inspect.iscoroutinefunction(function)
        self.parameter: inspect.Parameter | None = None
        self._dependencies: list[tuple[str, params.Depends, Any]] = []
        self._websocket: list[str] = []
        for parameter in signature_of(function, owner=owner).parameters.values():
            self._add(parameter, data)
        self._adapter = None if self.parameter is None else _adapter(self.parameter, function)
        annotation = None if self.parameter is None else _bare(self.parameter.annotation)
        self._is_model = inspect.isclass(annotation) and issubclass(annotation, BaseModel)
        self.is_simple = self.is_async and not self._dependencies and not self._websocket
        self.is_plain = self.is_simple and annotation in (dict, dict[str, Any])
        self._nodes = self._tree({})
        self._with_overrides: tuple[tuple[Any, ...], list[tuple[str, _Node]]] | None = None

    def _add(self, parameter: inspect.Parameter, data: str) -> None:
        where = f"{_name(self.function)}, parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise DefinitionError(f"{where}: a handler has no {parameter.kind.description} parameters")
        depends = depends_of(parameter)
        if depends is not None:
            self._dependencies.append((parameter.name, depends, parameter.annotation))
        elif is_websocket(parameter):
            self._websocket.append(parameter.name)
        elif why := asks_impossible(parameter):
            raise DefinitionError(f"{where}: {why}")
        elif _field(parameter) is not None:
            raise DefinitionError(
                f"{where}: path, query, header and cookie parameters belong to the handshake; "
                "ask for them in connect, or in a dependency"
            )
        elif self.parameter is None:
            self.parameter = parameter
        else:
            raise DefinitionError(
                f"{where}: {self.parameter.name!r} takes the {data} already; the other parameters are Depends"
            )

    def _tree(self, overrides: Mapping[Any, Any]) -> list[tuple[str, _Node]]:
        return [(name, _node(depends, kind, (), overrides)) for name, depends, kind in self._dependencies]

    def validate(self, data: Any = _NO_DATA) -> Any:
        """What the handler's data parameter gets of a frame's data; absent data gives its default.

        Raises:
            InvalidData: It doesn't fit the annotation.
        """
        if self.parameter is None or self._adapter is None:
            return None
        if data is _NO_DATA:
            if self.parameter.default is not _NO_DATA:
                return copy.deepcopy(self.parameter.default)
            missing = {"type": "missing", "loc": [], "msg": "Field required"}
            raise InvalidData("the data is missing", errors=[missing])
        try:
            return self._adapter.validate_python(data)
        except ValidationError as error:
            raise _invalid(error) from error

    def begin_event(self, consumer: Any, envelope: Envelope, handshake: Handshake) -> Awaitable[Any]:
        """Call the handler of an event, decoded for it alone; see `begin`.

        Raises:
            InvalidData: The event doesn't fit the annotation.
        """
        if not self._is_model or self._adapter is None:
            return self.begin(consumer, self.validate(envelope.decode()), handshake)
        try:
            value = self._adapter.validate_json(envelope.payload)
        except ValidationError as error:
            raise _invalid(error) from error
        return self.begin(consumer, value, handshake)

    def begin(self, consumer: Any, value: Any, handshake: Handshake) -> Awaitable[Any]:
        """Call the handler with its data and dependencies; awaiting the result gives what it returns.

        Dependencies with `yield` see what the handler raises, and are closed when it has ended.
        """
        if self.is_simple:
            result: Awaitable[Any] = (
                self.function(consumer) if self.parameter is None else self.function(consumer, value)
            )
            return result
        return self._call(consumer, value, handshake)

    async def _call(self, consumer: Any, value: Any, handshake: Handshake) -> Any:
        async with self.solved(consumer, value, handshake) as keywords:
            if self.is_async:
                return await self.function(consumer, **keywords)
            return await in_thread(self.function, consumer, **keywords)

    @asynccontextmanager
    async def solved(self, consumer: Any, value: Any, handshake: Handshake) -> AsyncIterator[dict[str, Any]]:
        """The handler's arguments; its dependencies live as long as the block."""
        websocket = consumer.websocket
        keywords: dict[str, Any] = dict.fromkeys(self._websocket, websocket)
        if self.parameter is not None:
            keywords[self.parameter.name] = value
        if not self._dependencies:
            yield keywords
            return
        async with AsyncExitStack() as stack:
            solving = _Solving(websocket, handshake, stack, {})
            for name, node in self._nodes_for(websocket):
                keywords[name] = await node.solve(solving)
            yield keywords

    def _nodes_for(self, websocket: WebSocket) -> list[tuple[str, _Node]]:
        overrides = getattr(websocket.scope.get("app"), "dependency_overrides", None)
        if not overrides:
            return self._nodes
        key = tuple(overrides.items())
        if self._with_overrides is None or self._with_overrides[0] != key:
            self._with_overrides = key, self._tree(overrides)
        return self._with_overrides[1]


def _node(depends: params.Depends, annotation: Any, scopes: tuple[str, ...], overrides: Mapping[Any, Any]) -> _Node:
    declared = depends.dependency if depends.dependency is not None else _bare(annotation)
    call = overrides.get(declared, declared)
    scopes = (*scopes, *getattr(depends, "scopes", ()))
    dependencies: list[tuple[str, _Node]] = []
    websocket: list[str] = []
    security: dict[str, SecurityScopes] = {}
    asked: list[inspect.Parameter] = []
    for parameter in signature_of(call).parameters.values():
        inner = depends_of(parameter)
        if inner is not None:
            dependencies.append((parameter.name, _node(inner, parameter.annotation, scopes, overrides)))
        elif is_websocket(parameter):
            websocket.append(parameter.name)
        elif _bare(parameter.annotation) is SecurityScopes:
            security[parameter.name] = SecurityScopes(list(scopes))
        elif why := asks_impossible(parameter):
            raise DefinitionError(f"the dependency {_name(call)}, parameter {parameter.name!r}: {why}")
        else:
            asked.append(parameter)
    try:
        reader = HandshakeReader(asked) if asked else None
    except (FastAPIError, AssertionError) as error:
        raise DefinitionError(f"the dependency {_name(call)}: {error}") from error
    key = (call, scopes if security or dependencies else ())
    return _Node(call, dependencies, websocket, security, reader, bool(depends.use_cache), key, _kind(call))


def _kind(call: Callable[..., Any]) -> str:
    inspected = _called(call)
    if inspect.isasyncgenfunction(inspected):
        return "async generator"
    if inspect.isgeneratorfunction(inspected):
        return "generator"
    return "coroutine" if inspect.iscoroutinefunction(inspected) else "function"


def _called(call: Callable[..., Any]) -> Callable[..., Any]:
    """The function or class behind a callable: of a partial, of an object with `__call__`, or itself."""
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isroutine(call) or inspect.isclass(call):
        return call
    behind: Callable[..., Any] = type(call).__call__
    return behind


def _field(parameter: inspect.Parameter) -> Any:
    """The `Depends`, `Query`, `Header` ... of a parameter, in its annotation or its default."""
    if get_origin(parameter.annotation) is Annotated:
        for extra in reversed(get_args(parameter.annotation)[1:]):
            if isinstance(extra, (params.Depends, params.Param, params.Body)):
                return extra
    default = parameter.default
    return default if isinstance(default, (params.Depends, params.Param, params.Body)) else None


def depends_of(parameter: inspect.Parameter) -> params.Depends | None:
    """The `Depends` of a parameter, if it has one."""
    field = _field(parameter)
    return field if isinstance(field, params.Depends) else None


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def is_websocket(parameter: inspect.Parameter) -> bool:
    """Whether a parameter wants the connection itself, as Starlette's object."""
    bare = _bare(parameter.annotation)
    return inspect.isclass(bare) and issubclass(bare, HTTPConnection) and not issubclass(bare, Request)


def asks_impossible(parameter: inspect.Parameter) -> str | None:
    """Why a parameter can't be had on a WebSocket, if so."""
    bare = _bare(parameter.annotation)
    if not inspect.isclass(bare):
        return None
    if issubclass(bare, Request):
        return "there is no Request on a WebSocket; ask for a WebSocket or an HTTPConnection"
    if issubclass(bare, (BackgroundTasks, Response)):
        return f"there is no response here that a {bare.__name__} could belong to"
    return None


def _adapter(parameter: inspect.Parameter, function: Callable[..., Any]) -> TypeAdapter[Any]:
    annotation = parameter.annotation
    try:
        return TypeAdapter(Any if annotation is parameter.empty else annotation)
    except PydanticSchemaGenerationError as error:
        raise DefinitionError(f"{_name(function)}, parameter {parameter.name!r}: {error.message}") from error


def _invalid(error: ValidationError) -> InvalidData:
    if error.error_count() > MAX_ERRORS:  # a megabyte of nonsense would be answered with sixty
        return InvalidData(f"there are {error.error_count()} errors, which are too many to list", errors=[])
    errors = from_json(error.json(include_url=False, include_input=False))
    first = errors[0]
    where = ".".join(map(str, first["loc"]))
    return InvalidData(f"{where}: {first['msg']}" if where else first["msg"], errors=errors)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
