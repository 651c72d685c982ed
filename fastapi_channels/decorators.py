"""`@action`: marks methods of a `Channel` as what clients may ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from starlette.websockets import WebSocket

from fastapi_channels._tasks import call
from fastapi_channels.consumers.marks import mark, marked, marks_of
from fastapi_channels.exceptions import DefinitionError
from fastapi_channels.permissions import BasePermission, permissions_of
from fastapi_channels.throttling import BaseThrottle, limits_of

__all__ = ["ChannelAction", "ChannelMark", "action", "actions_of", "channel_action", "granted", "mark_of"]

#: What actions are called with.
ARGUMENTS = frozenset({"websocket", "channel", "data"})

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ChannelMark:
    """What `@action` says; see there."""

    name: str | None = None
    permission: Any = None
    deprecated: bool = False
    summary: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChannelAction:
    """One action of a channel.

    Attributes:
        name: What clients call it.
        function: What is called.
        definitions: The function as it was decorated, and what it overrides.
        mark: What `@action` says.
        arguments: Which of `websocket`, `channel` and `data` it takes.
    """

    name: str
    function: Callable[..., Any]
    definitions: tuple[Callable[..., Any], ...]
    mark: ChannelMark
    arguments: frozenset[str]

    @property
    def permissions(self) -> tuple[BasePermission, ...]:
        """Who may call it, of those who may send frames at all."""
        return granted(self.mark.permission) or ()

    @property
    def limits(self) -> tuple[BaseThrottle, ...]:
        """How often, as `@limiter` says; an override that says nothing keeps the limits of what it overrides."""
        return next(filter(None, map(limits_of, self.definitions)), ())

    async def __call__(self, **arguments: Any) -> Any:
        """Call it with what it takes of these; an awaitable that it returns is awaited."""
        result = await call(self.function, **{name: arguments[name] for name in self.arguments})
        return await result if inspect.isawaitable(result) else result


@overload
def action(name: Function) -> Function: ...
@overload
def action(
    name: str | None = None,
    *,
    permission: Any = None,
    detached: bool = False,
    deprecated: bool | None = None,
    summary: str | None = None,
    description: str | None = None,
    tags: Sequence[str] | None = None,
    dependencies: None = None,
) -> Callable[[Function], Function]: ...
def action(
    name: Any = None,
    *,
    permission: Any = None,
    detached: bool = False,
    deprecated: bool | None = None,
    summary: str | None = None,
    description: str | None = None,
    tags: Sequence[str] | None = None,
    dependencies: None = None,
) -> Any:
    """Mark a method of a `Channel` as an action.

    It is called with what it declares of `websocket`, `channel` (the channel's name) and `data` (the whole object that
    the client has sent). It may be plain `def`. What it returns is the reply's `data`; None sends no reply.

    Args:
        name: What clients call it; the method's name by default.
        permission: Who may call it, besides what the channel says: a permission, a list of them, a callable, a bool.
        detached: Not supported: True is an error.
        deprecated: Refuse to call it.
        summary: One line about it.
        description: More about it.
        tags: What it belongs to.
        dependencies: Not supported: anything but None is an error.

    Raises:
        DefinitionError: It can't be called with these arguments, the permission is none, or something isn't supported.
    """
    if callable(name):
        return mark(name, ChannelMark())
    if detached:
        raise DefinitionError("action(detached=True) is not supported")
    if dependencies is not None:
        raise DefinitionError("action(dependencies=...) is not supported; an ActionConsumer's actions have Depends")
    granted(permission)
    what = ChannelMark(name, permission, bool(deprecated), summary, description, tuple(tags or ()))
    return lambda function: mark(function, what)


def mark_of(function: Any) -> ChannelMark:
    """What `@action` has said last of a function."""
    found: ChannelMark = marks_of(function, ChannelMark)[-1]
    return found


def granted(permission: Any) -> tuple[BasePermission, ...] | None:
    """The permissions that one stands for, or several in a list; None stands for nothing.

    A callable may take `(websocket, action, permission)`, of which the last is itself, as in the original package.

    Raises:
        DefinitionError: It is none.
    """
    if permission is None:
        return None
    several = permission if isinstance(permission, list | tuple) else [permission]
    return permissions_of([_with_itself(one) for one in several])


def _with_itself(permission: Any) -> Any:
    if not (inspect.isfunction(permission) or inspect.ismethod(permission)):
        return permission
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(permission).parameters.values()
    if sum(p.kind in kinds and p.default is p.empty for p in parameters) < 3:
        return permission

    async def ask(websocket: WebSocket, action: str | None) -> Any:
        return await call(permission, websocket, action, permission)

    return ask


def actions_of(cls: type) -> Iterator[tuple[str, str, tuple[Callable[..., Any], ...], ChannelMark]]:
    """Of a class's actions, inherited ones too: name, attribute, all functions under that attribute, and the mark.

    Raises:
        DefinitionError: Two claim one name, or a function has a limit and is no action.
    """
    found: dict[str, str] = {}
    for attribute, _, what in marked(cls, ChannelMark, frozenset()):
        name = what.name or attribute
        if name in found:
            raise DefinitionError(f"{cls.__name__}: {found[name]} and {attribute} are both the action {name!r}")
        found[name] = attribute
        yield name, attribute, _defined(cls, attribute), what
    for attribute in {name for base in cls.__mro__ for name in vars(base)} - set(found.values()):
        if any(map(limits_of, _defined(cls, attribute)[:1])):
            raise DefinitionError(f"{cls.__name__}.{attribute} has a limiter and is no action")


def _defined(cls: type, attribute: str) -> tuple[Callable[..., Any], ...]:
    return tuple(vars(base)[attribute] for base in cls.__mro__ if attribute in vars(base))


def channel_action(
    name: str, function: Callable[..., Any], definitions: tuple[Callable[..., Any], ...], what: ChannelMark
) -> ChannelAction:
    """One action of a channel.

    Args:
        name: What clients call it.
        function: What is called.
        definitions: The function as it was decorated, and what it overrides.
        what: What `@action` says.

    Raises:
        DefinitionError: It can't be called with `websocket`, `channel` and `data`.
    """
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if not needed <= ARGUMENTS:
        wrong = ", ".join(sorted(needed - ARGUMENTS))
        raise DefinitionError(f"the action {name!r} takes websocket, channel and data, not {wrong}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return ChannelAction(name, function, definitions, what, ARGUMENTS if takes_all else ARGUMENTS & named)
