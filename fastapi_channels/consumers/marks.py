"""`@event` and `@action`: the marks on a class's methods, and how a class collects them.

Only marked methods can be reached from outside. The table is made with the class, so that what contradicts itself is an
error there and not at a connection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from fastapi_channels.exceptions import DefinitionError

__all__ = ["ActionMark", "EventMark", "action", "event", "mark", "marked", "marks_of"]

Method = TypeVar("Method", bound=Callable[..., Any])
Mark = TypeVar("Mark")

_MARKS = "__fastapi_channels_marks__"


@dataclass(frozen=True, slots=True)
class EventMark:
    """What `@event` says: the type of the events; None derives it from the method's name."""

    type: str | None = None


@dataclass(frozen=True, slots=True)
class ActionMark:
    """What `@action` says; see there."""

    name: str | None = None
    permission_classes: tuple[Any, ...] = ()
    throttle_classes: tuple[Any, ...] = ()
    concurrency: int = 1
    timeout: float | None = None
    deprecated: bool = False
    summary: str | None = None
    tags: tuple[str, ...] = ()


@overload
def event(type: Method, /) -> Method: ...
@overload
def event(type: str | None = None, /) -> Callable[[Method], Method]: ...
def event(type: Any = None, /) -> Any:
    """Mark a method as the handler of an event from the layer.

    It is called with the event, decoded for it alone: as a dict, or as the pydantic model that its parameter is
    annotated with. An event that doesn't fit that model, and what the handler raises, is logged and counted; the client
    hears nothing of it. Events of one consumer are handled one at a time, in order.

    Args:
        type: The event's type, `@event("chat.message")`. Bare `@event` takes it from the method's name, with a dot for
            each underscore.
    """
    if not (type is None or isinstance(type, str)):
        return mark(type, EventMark())
    return lambda method: mark(method, EventMark(type))


@overload
def action(name: Method, /) -> Method: ...
@overload
def action(
    name: str | None = None,
    /,
    *,
    permission_classes: Sequence[Any] = (),
    throttle_classes: Sequence[Any] = (),
    concurrency: int = 1,
    timeout: float | None = None,
    deprecated: bool = False,
    summary: str | None = None,
    tags: Sequence[str] = (),
) -> Callable[[Method], Method]: ...
def action(
    name: Any = None,
    /,
    *,
    permission_classes: Sequence[Any] = (),
    throttle_classes: Sequence[Any] = (),
    concurrency: int = 1,
    timeout: float | None = None,
    deprecated: bool = False,
    summary: str | None = None,
    tags: Sequence[str] = (),
) -> Any:
    """Mark a method as an action, which clients may call.

    Its first parameter that is no `Depends` takes the frame's `data`, validated by its annotation. What it returns is
    the reply's `data`; a generator streams.

    Args:
        name: What clients call it; the method's name by default.
        permission_classes: Who may call it, of those who may send frames at all; see `permissions`.
        throttle_classes: How often, besides how often frames may be sent; see `throttling`.
        concurrency: How many calls of it run at once on one connection. With 1 the next frame waits for the reply; with
            more, later frames of any action go on meanwhile.
        timeout: After how many seconds a call is cancelled and answered with `timeout`; None for never.
        deprecated: Says so to those who read `Consumer.actions`.
        summary: One line about it; the first line of its docstring by default.
        tags: For those who read `Consumer.actions`.

    Spec:
        protocol.md, 1.
    """
    if not (name is None or isinstance(name, str)):
        return mark(name, ActionMark())
    if concurrency < 1:
        raise DefinitionError(f"an action's concurrency is at least 1, not {concurrency}")
    if timeout is not None and timeout <= 0:
        raise DefinitionError(f"an action's timeout is more than 0 seconds, not {timeout}")
    rules = tuple(permission_classes), tuple(throttle_classes)
    what = ActionMark(name, *rules, concurrency, timeout, deprecated, summary, tuple(tags))
    return lambda method: mark(method, what)


def mark(method: Any, what: Any) -> Any:
    """Put a mark on a function, and return it.

    Raises:
        DefinitionError: It is none.
    """
    if not inspect.isfunction(method):
        raise DefinitionError(f"@event and @action are for methods, not for a {type(method).__name__}")
    setattr(method, _MARKS, (*getattr(method, _MARKS, ()), what))
    return method


def marked(cls: type, kind: type[Mark], reserved: frozenset[str]) -> Iterator[tuple[str, Callable[..., Any], Mark]]:
    """The attribute, the function and the mark of every method of `cls` that is marked, inherited ones too.

    An override has the mark of what it overrides, decorated again or not; None in its place takes it away.

    Raises:
        DefinitionError: A marked method has the name of a hook or an API method, or two unrelated bases claim one.
    """
    attributes = {name: None for base in reversed(cls.__mro__) for name in vars(base)}
    for name in attributes:
        definers = [base for base in cls.__mro__ if name in vars(base)]
        marks = [(base, marks_of(vars(base)[name], kind)) for base in definers]
        claims = [(base, found) for base, found in marks if found]
        if not claims:
            continue
        if name in reserved:
            raise DefinitionError(f"{cls.__name__}.{name} is part of every consumer and can't be an event or action")
        for base, _ in claims:
            if base not in definers[0].__mro__:
                raise DefinitionError(
                    f"{cls.__name__}: {name!r} comes from {definers[0].__name__} and from {base.__name__}; "
                    "define it here to say which"
                )
        function = vars(definers[0])[name]
        if function is None:
            continue
        if not inspect.isfunction(function):
            raise DefinitionError(f"{cls.__name__}.{name} is marked, or overrides what is, and is no method")
        for mark in claims[0][1]:
            yield name, function, mark


def marks_of(value: Any, kind: type[Mark]) -> list[Mark]:
    """The marks of a kind that a function has, in the order in which they were put on it."""
    function = getattr(value, "__func__", value)  # of a static or class method
    return [mark for mark in getattr(function, _MARKS, ()) if isinstance(mark, kind)]
