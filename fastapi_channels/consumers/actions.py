"""`ActionConsumer`: what clients may ask for, by name, with replies and streams."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from typing_extensions import override

from fastapi_channels._tasks import in_thread, not_cancelled
from fastapi_channels.consumers.base import API
from fastapi_channels.consumers.json import JsonConsumer
from fastapi_channels.consumers.marks import ActionMark, marked
from fastapi_channels.consumers.session import AUTH, is_request_id
from fastapi_channels.dependencies import Plan
from fastapi_channels.exceptions import (
    ActionCancelled,
    ActionTimeout,
    ConsumerError,
    DefinitionError,
    InvalidFrame,
    Throttled,
    UnknownAction,
)
from fastapi_channels.gate import Gate, Rules

__all__ = ["Action", "ActionConsumer"]

#: What clients ask of every consumer: to end a call. Frames of this and of `$auth` don't wait.
CANCEL: Final = "$cancel"

_ABSENT: Final = inspect.Parameter.empty
_OVER: Final = object()


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a consumer class.

    Attributes:
        name: What clients call it.
        plan: How it is called.
        permission_classes: Who may call it, besides what the consumer says.
        throttle_classes: How often, likewise.
        concurrency: How many calls run at once on one connection.
        timeout: After how many seconds a call is cancelled; None for never.
        deprecated: Whether new clients should do without it.
        summary: One line about it.
        tags: What it belongs to.
    """

    name: str
    plan: Plan
    permission_classes: tuple[Any, ...]
    throttle_classes: tuple[Any, ...]
    concurrency: int
    timeout: float | None
    deprecated: bool
    summary: str
    tags: tuple[str, ...]


class _Request:
    """A frame that asks for an action, until it has been answered.

    As a context manager it is a block of the running task in which `$cancel` finds the request, and which ends when the
    call is cancelled; the cancellation ends with the block. Code in it that awaits what somebody else has cancelled
    raises an error out of it.
    """

    __slots__ = ("_calls", "_is_interrupted", "_task", "action", "data", "error", "is_cancelled", "name", "request_id")

    def __init__(self, name: str | None, request_id: Any, data: Any, calls: dict[Any, _Request]) -> None:
        self.name = name
        self.request_id = request_id
        self.data = data
        self.action: Action | None = None
        self.error: Exception | None = None
        self.is_cancelled = False
        self._calls = calls
        self._is_interrupted = False
        self._task: asyncio.Task[Any] | None = None

    def cancel(self) -> None:
        """End the call as the client wishes; one that has not begun is not begun."""
        self.is_cancelled = True
        if self._task is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._task, self._is_interrupted = asyncio.current_task(), False
        if self.request_id is not _ABSENT and self.action is not None:
            self._calls[self.request_id] = self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> bool:
        task, self._task = self._task, None
        assert task is not None
        if self._calls.get(self.request_id) is self:
            del self._calls[self.request_id]
        is_over = False
        if isinstance(exc, asyncio.CancelledError):
            is_over = self._is_interrupted and task.cancelling() == 1
            if not is_over:
                raise not_cancelled(exc, task) from exc
        if self._is_interrupted:
            task.uncancel()
        return is_over


class ActionConsumer(JsonConsumer):
    """A consumer whose frames ask for actions: methods marked with `@action`.

    A frame is `{"action": "say", "request_id": 7, "data": {...}}`. With a `request_id` there is always a reply; without
    one only if the action returned something or was refused. Only marked methods can be asked for.

    Spec:
        protocol.md, 1.
    """

    actions: ClassVar[Mapping[str, Action]] = {}
    """The actions of the class by name, inherited ones too."""

    _calls: dict[Any, _Request] | None = None
    _at_once: dict[str, set[asyncio.Task[None]]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.receive is not ActionConsumer.receive:
            raise DefinitionError(f"{cls.__name__}.receive would never be called: the frames of it are actions")
        actions: dict[str, Action] = {}
        for attribute, function, mark in marked(cls, ActionMark, API | {"actions"}):
            name = mark.name or attribute
            if name.startswith("$"):
                raise DefinitionError(f"{cls.__name__}.{attribute}: an action's name can't begin with $")
            if name in actions:
                other = actions[name].plan.function.__name__
                raise DefinitionError(f"{cls.__name__}: {other} and {attribute} are both the action {name!r}")
            summary = mark.summary if mark.summary is not None else (inspect.getdoc(function) or "").partition("\n")[0]
            plan = Plan(function, cls)
            actions[name] = Action(
                name,
                plan,
                mark.permission_classes,
                mark.throttle_classes,
                mark.concurrency,
                mark.timeout,
                mark.deprecated,
                summary,
                mark.tags,
            )
        cls.actions = actions
        Gate.check(cls._rules(), cls._action_rules())

    @override
    @classmethod
    def _action_rules(cls) -> Mapping[str, Rules]:
        return {
            action.name: Rules(
                cls,
                permission_classes=action.permission_classes,
                throttle_classes=action.throttle_classes,
                action=action.name,
            )
            for action in cls.actions.values()
        }

    @override
    def _parse_frame(self, frame: str | bytes) -> Any:
        content = super()._parse_frame(frame)
        if not isinstance(content, dict):
            raise InvalidFrame("a frame is a JSON object with an action")
        name = content.pop("action", None)
        request_id = content.pop("request_id", _ABSENT)
        data = content.get("data", content or _ABSENT)
        if request_id is not _ABSENT and not is_request_id(request_id):
            raise InvalidFrame("a request_id is a string or a number")
        if self._calls is None:
            self._calls = {}
        request = _Request(name if isinstance(name, str) else None, request_id, data, self._calls)
        if not isinstance(name, str):
            request.error = InvalidFrame("a frame has an action, which is a string")
        elif name == CANCEL and request_id is _ABSENT:
            request.error = InvalidFrame("$cancel needs the request_id of the call to end")
        elif name not in (CANCEL, AUTH):
            request.action = self.actions.get(name)
            if request.action is None:
                request.error = UnknownAction(f"there is no action {_shortened(name)!r}")
        return request

    @override
    def _refused(self, parsed: _Request, error: ConsumerError) -> Any:
        parsed.error = error
        return parsed

    @override
    def _handle_at_once(self, parsed: _Request) -> bool:
        if parsed.error is not None:
            return False
        if parsed.name == CANCEL:
            self._cancel(parsed.request_id)
            return not self._session.gate.asks_of_frames  # by which it is counted in its turn
        return super()._handle_at_once(parsed)

    @override
    def _brings_token(self, parsed: _Request) -> bool:
        return parsed.name == AUTH and parsed.error is None

    @override
    def _token_of(self, parsed: _Request) -> tuple[Any, Any]:
        return None if parsed.request_id is _ABSENT else parsed.request_id, parsed.data

    def _cancel(self, request_id: Any) -> None:
        request = (self._calls or {}).get(request_id)
        if request is None:
            waiting = (item for item in self._session.waiting_frames if isinstance(item, _Request))
            request = next((item for item in waiting if item.request_id == request_id), None)
        if request is not None:
            request.cancel()

    @override
    def _handle_frame(self, parsed: _Request) -> Awaitable[None]:
        if self._brings_token(parsed):
            return self._renew(*self._token_of(parsed))
        if parsed.action is None or parsed.action.concurrency == 1:
            return self._answer(parsed)
        return self._answer_beside(parsed, parsed.action)

    async def _answer_beside(self, request: _Request, action: Action) -> None:
        """Carry out a request while others of the connection go on, once there is room among those of its kind."""
        if self._at_once is None:
            self._at_once = {}
        running = self._at_once.setdefault(action.name, set())
        if len(running) >= action.concurrency:
            with request:
                while len(running) >= action.concurrency:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if request.is_cancelled:
            await self._answer(request)
            return
        task = self._session.start(self._answer(request))
        running.add(task)
        task.add_done_callback(running.discard)

    async def _answer(self, request: _Request) -> None:
        """Carry out a request and answer it, whatever becomes of it."""
        has_id = request.request_id is not _ABSENT
        request_id = request.request_id if has_id else None
        try:
            result = None
            with request:
                is_too_fast = isinstance(request.error, Throttled)
                if self._session.gate.asks_of_frames and not (request.is_cancelled or is_too_fast):
                    name = None if request.action is None else request.action.name
                    is_control = request.name == CANCEL
                    await self._session.gate.pass_frame(self.websocket, name, is_control=is_control)
                if self._connection.closed_here:  # while it waited for the gate, or for room
                    return
                if request.error is not None:
                    raise request.error
                if request.name == CANCEL:
                    return
                if not request.is_cancelled:
                    assert request.action is not None
                    result = await self._begin(request.action, request.data, request_id)
            if request.is_cancelled and result is None:
                _check_cancelled(request)
            if has_id or result is not None:
                await self._reply_ok(request.name, request_id, result)
        except Exception as error:
            await self._session.answer_error(error, request.name, request_id)

    def _begin(self, action: Action, data: Any, request_id: Any) -> Awaitable[Any]:
        """Call an action; awaiting the result gives what it returns, which is None for a stream."""
        if action.timeout is not None:
            return self._end_in_time(action, action.timeout, data, request_id)
        return self._begin_plan(action, data, request_id)

    def _begin_plan(self, action: Action, data: Any, request_id: Any) -> Awaitable[Any]:
        plan = action.plan
        if data is _ABSENT and (plan.parameter is None or plan.parameter.default is _ABSENT):
            data = {}
        value = plan.validate(data)
        if plan.is_stream:
            return self._stream(action, value, request_id)
        return plan.begin(self, value, self._session.handshake)

    async def _end_in_time(self, action: Action, seconds: float, data: Any, request_id: Any) -> Any:
        timeout = asyncio.timeout(seconds)
        try:
            async with timeout:
                return await self._begin_plan(action, data, request_id)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise ActionTimeout(f"{action.name} took longer than {seconds:g} s") from error

    async def _stream(self, action: Action, value: Any, request_id: Any) -> None:
        async def send_part(item: Any) -> bool:
            return await self._reply({"type": "stream", "action": action.name, "request_id": request_id, "data": item})

        plan = action.plan
        async with plan.solved(self, value, self._session.handshake) as keywords:
            generator = plan.function(self, **keywords)
            if plan.is_async:
                async with aclosing(generator):
                    async for item in generator:
                        if not await send_part(item):
                            break
            else:
                await _stream_from_thread(generator, send_part)


async def _stream_from_thread(generator: Generator[Any, Any, Any], send_part: Callable[[Any], Awaitable[bool]]) -> None:
    """Send what a plain generator yields; it runs in the thread pool, item by item, and so does its cleanup."""
    at_work = threading.Lock()  # a thread that was left behind by a cancellation may still be at an item

    def step() -> Any:
        with at_work:
            return next(generator, _OVER)

    def close() -> None:
        with at_work:
            generator.close()

    try:
        while (item := await in_thread(step)) is not _OVER:
            if not await send_part(item):
                break
    finally:
        await in_thread(close)


def _check_cancelled(request: _Request) -> None:
    """A stream that the client has cancelled is over; any other call has failed.

    Raises:
        ActionCancelled: It was no stream.
    """
    if request.action is None or not request.action.plan.is_stream:
        raise ActionCancelled("cancelled by the client")


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."
