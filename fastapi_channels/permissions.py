"""Permissions: a yes or no before the handshake, and again before each frame or action.

```python
class IsMember(BasePermission):
    async def has_permission(self, websocket, action=None, **kwargs) -> bool:
        return await is_member(websocket.user, websocket.path_params["room"])
```

Only True lets in. `A & B`, `A | B` and `~A` combine classes, instances, callables and booleans; they are asked from
left to right, and no more of them than is needed. An exception, or an answer that is no bool, is a failure: `~failure`
is one too, `failure & x` denies, `failure | True` allows, and a failure that is left in the end denies and is logged.
A `ConsumerError` is a failure that was raised to be told: the client hears it, and nothing is logged.

Spec:
    decisions.md, 22 and 23.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from starlette.websockets import WebSocket
from typing_extensions import override

from fastapi_channels._specs import entries_of, instance_of
from fastapi_channels._tasks import call
from fastapi_channels.authentication import is_known
from fastapi_channels.exceptions import ConsumerError, DefinitionError, NotAuthenticated, PermissionDenied

__all__ = [
    "AllowAny",
    "BasePermission",
    "DenyAll",
    "HasScope",
    "IsAuthenticated",
    "PermissionSpec",
    "ask",
    "permission_of",
    "permissions_of",
]

logger = logging.getLogger("fastapi_channels")

#: What is asked: whether the client may connect, or send this frame.
Question = Literal["connect", "frame"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What kept a permission from saying yes or no.

    Attributes:
        permission: Which one.
        error: What it raised, or what its answer was.
    """

    permission: BasePermission
    error: Exception

    def denial(self) -> ConsumerError:
        """What the client is told: what was raised to be told. Of anything else it hears nothing, and the log all."""
        if isinstance(self.error, ConsumerError):
            return self.error
        logger.error("the permission %r failed, which denies", self.permission, exc_info=self.error)
        return PermissionDenied(BasePermission.message)


#: None for yes; for no what the client is told; or a failure, which is neither.
Verdict = ConsumerError | Failure | None


class _Operators:
    """`&`, `|` and `~`, alike for classes of permissions and for their instances."""

    def __and__(self, other: Any) -> BasePermission:
        return _And(permission_of(self), permission_of(other))

    def __rand__(self, other: Any) -> BasePermission:
        return _And(permission_of(other), permission_of(self))

    def __or__(self, other: Any) -> Any:
        return _Or(permission_of(self), permission_of(other))

    def __ror__(self, other: Any) -> Any:
        return _Or(permission_of(other), permission_of(self))

    def __invert__(self) -> BasePermission:
        return _Not(permission_of(self))


class _PermissionType(_Operators, ABCMeta):
    """The type of permission classes, which combine as their instances do."""


class BasePermission(_Operators, metaclass=_PermissionType):
    """Says whether a client may do something; subclass it and define `has_permission`.

    Methods may be plain `def`, which run in the thread pool. `websocket.scope["user"]` and `["auth"]` hold who the
    client is, `websocket.path_params` what the path says.
    """

    #: What the client is told when it says no.
    message: str = "you do not have permission to do this"

    @abstractmethod
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        """Whether the client may send a frame; only True is a yes.

        Args:
            websocket: The connection.
            action: The action that the frame asks for; None for a frame that asks for none, and before the handshake.
            kwargs: For what may be added; ignore it.
        """

    async def can_connect(self, websocket: WebSocket) -> bool:
        """Whether the client may connect, before the handshake is answered; what `has_permission` says by default."""
        return cast(bool, await call(self.has_permission, websocket, None))

    def denial(self, websocket: WebSocket) -> ConsumerError:
        """What the client is told when it says no."""
        return PermissionDenied(self.message)

    async def verdict(self, question: Question, websocket: WebSocket, action: str | None) -> Verdict:
        """The answer to a question, which for a combination is that of its parts."""
        try:
            if question == "connect":
                answer = await call(self.can_connect, websocket)
            else:
                answer = await call(self.has_permission, websocket, action)
        except Exception as error:
            return Failure(self, error)
        if answer is True:
            return None
        if answer is False:
            try:
                return self.denial(websocket)
            except Exception as error:
                return Failure(self, error)
        return Failure(self, TypeError(f"a permission answers True or False, not {answer!r}"))


class AllowAny(BasePermission):
    """Says yes."""

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return True


class DenyAll(BasePermission):
    """Says no."""

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return False


class IsAuthenticated(BasePermission):
    """Says yes to a client that is known. A stranger is refused with 401 and 4501."""

    message = "authentication is required"

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return is_known(websocket.scope.get("user"))

    @override
    def denial(self, websocket: WebSocket) -> ConsumerError:
        return NotAuthenticated(self.message)


class HasScope(BasePermission):
    """Says yes to a client whose credentials (`auth.scopes`) have all of these scopes.

    Args:
        scopes: Their names, at least one.
    """

    def __init__(self, *scopes: str) -> None:
        if not scopes or not all(isinstance(scope, str) for scope in scopes):
            raise DefinitionError("HasScope takes one or more names of scopes")
        self.scopes = frozenset(scopes)

    def __repr__(self) -> str:
        return f"HasScope({', '.join(map(repr, sorted(self.scopes)))})"

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        held = getattr(websocket.scope.get("auth"), "scopes", ())
        return self.scopes <= set(held.split() if isinstance(held, str) else held)

    @override
    def denial(self, websocket: WebSocket) -> ConsumerError:
        if is_known(websocket.scope.get("user")):
            return PermissionDenied(self.message)
        return NotAuthenticated(IsAuthenticated.message)


class _Callable(BasePermission):
    """A function `(websocket, action)`, or with fewer of these, as a permission."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._takes = _count_positional(function, at_most=2)

    def __repr__(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return cast(bool, await call(self._function, *(websocket, action)[: self._takes]))


class _Combination(BasePermission):
    """Permissions that answer together; asked as one is, it says whether the verdict is yes."""

    @override
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return await self.verdict("frame", websocket, action) is None

    @override
    async def can_connect(self, websocket: WebSocket) -> bool:
        return await self.verdict("connect", websocket, None) is None

    @override
    @abstractmethod
    async def verdict(self, question: Question, websocket: WebSocket, action: str | None) -> Verdict: ...


class _And(_Combination):
    def __init__(self, left: BasePermission, right: BasePermission) -> None:
        self._left, self._right = left, right

    def __repr__(self) -> str:
        return f"({self._left!r} & {self._right!r})"

    @override
    async def verdict(self, question: Question, websocket: WebSocket, action: str | None) -> Verdict:
        left = await self._left.verdict(question, websocket, action)
        return await self._right.verdict(question, websocket, action) if left is None else left


class _Or(_Combination):
    def __init__(self, left: BasePermission, right: BasePermission) -> None:
        self._left, self._right = left, right

    def __repr__(self) -> str:
        return f"({self._left!r} | {self._right!r})"

    @override
    async def verdict(self, question: Question, websocket: WebSocket, action: str | None) -> Verdict:
        left = await self._left.verdict(question, websocket, action)
        if left is None:
            return None
        right = await self._right.verdict(question, websocket, action)
        if right is None or isinstance(right, Failure):
            return right
        # Who might be let in once he is known is told so.
        return left if isinstance(left, Failure | NotAuthenticated) else right


class _Not(_Combination):
    def __init__(self, inner: BasePermission) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return f"~{self._inner!r}"

    @override
    async def verdict(self, question: Question, websocket: WebSocket, action: str | None) -> Verdict:
        inner = await self._inner.verdict(question, websocket, action)
        if isinstance(inner, Failure):
            return inner
        return PermissionDenied(self.message) if inner is None else None


#: What `permission_classes` may hold.
PermissionSpec = type[BasePermission] | BasePermission | Callable[..., Any] | bool


def permission_of(spec: Any) -> BasePermission:
    """The permission that an entry of `permission_classes` stands for.

    Raises:
        DefinitionError: It is none.
    """
    if isinstance(spec, BasePermission):
        return spec
    if isinstance(spec, type) and issubclass(spec, BasePermission):
        return instance_of(spec)
    if isinstance(spec, bool):
        return AllowAny() if spec else DenyAll()
    if callable(spec) and not isinstance(spec, type):
        return _Callable(spec)
    raise DefinitionError(
        f"{spec!r} is no permission: a class, an instance, a combination, a callable or a bool is one"
    )


def permissions_of(specs: Sequence[Any] | Any) -> tuple[BasePermission, ...]:
    """The permissions of a `permission_classes`, all of which have to say yes; one need not be in a list.

    Raises:
        DefinitionError: An entry is none.
    """
    if not isinstance(specs, Collection):
        return (permission_of(specs),)
    return tuple(permission_of(spec) for spec in entries_of(specs, "permission_classes"))


async def ask(
    permissions: Iterable[BasePermission], question: Question, websocket: WebSocket, action: str | None = None
) -> None:
    """Ask permissions one after another, until one doesn't say yes.

    Raises:
        ConsumerError: One said no, or failed, which is logged.
    """
    for permission in permissions:
        verdict = await permission.verdict(question, websocket, action)
        if verdict is not None:
            raise verdict.denial() if isinstance(verdict, Failure) else verdict


def _count_positional(function: Callable[..., Any], *, at_most: int) -> int:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return at_most
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return at_most
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(at_most, len(positional))
