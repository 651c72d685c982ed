"""Permissions: what lets in and what denies, alone and combined, and what a client is told."""

import functools
import itertools
import logging
import operator
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import HTTPException
from starlette.authentication import SimpleUser, UnauthenticatedUser
from starlette.websockets import WebSocket

from fastapi_channels.authentication import AnonymousUser, Auth, User
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.exceptions import ConsumerError, DefinitionError, NotAuthenticated, PermissionDenied, Throttled
from fastapi_channels.permissions import (
    AllowAny,
    BasePermission,
    DenyAll,
    HasScope,
    IsAuthenticated,
    ask,
    permission_of,
    permissions_of,
)
from fastapi_channels.testing import connect
from tests.conftest import app_with

SECRET = "postgres://admin:hunter2@db"

#: What a permission may answer, and what it stands for: a yes, a no, or a failure, which is None.
ANSWERS: dict[str, bool | None] = {"yes": True, "no": False, "raises": None, "none": None, "one": None, "text": None}
VALUES: dict[str, Any] = {"yes": True, "no": False, "none": None, "one": 1, "text": "yes"}


def produce(answer: str) -> Any:
    if answer == "raises":
        raise RuntimeError(SECRET)
    return VALUES[answer]


async def never(*_: Any) -> Any:
    raise AssertionError("a permission that is asked has nothing to receive or to send")


def websocket(**scope: Any) -> WebSocket:
    return WebSocket({"type": "websocket", "path": "/", "headers": [], "query_string": b"", **scope}, never, never)


async def allows(permission: Any, question: Any = "frame", **scope: Any) -> bool:
    """Whether it lets in."""
    try:
        await ask(permissions_of([permission]), question, websocket(**scope), "say" if question == "frame" else None)
    except ConsumerError:
        return False
    return True


async def denial(permission: Any, question: Any = "frame", **scope: Any) -> ConsumerError:
    """What it denies with."""
    with pytest.raises(ConsumerError) as caught:
        await ask(permissions_of([permission]), question, websocket(**scope))
    return caught.value


class Leaf(BasePermission):
    """Answers a frame, and the handshake likewise; notes that it was asked."""

    def __init__(self, answer: str, asked: list[Any], name: Any = None) -> None:
        self.answer, self.asked, self.name = answer, asked, name

    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        self.asked.append(self.name)
        return produce(self.answer)  # type: ignore[no-any-return]


class AtTheDoor(BasePermission):
    """Answers the handshake so, and frames the other way round."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return self.answer != "yes"

    async def can_connect(self, websocket: WebSocket) -> bool:
        return produce(self.answer)  # type: ignore[no-any-return]


def class_of(answer: str) -> type[BasePermission]:
    class OfClass(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return produce(answer)  # type: ignore[no-any-return]

    return OfClass


def plain_class_of(answer: str) -> type[BasePermission]:
    class OfPlain(BasePermission):
        def has_permission(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, websocket: WebSocket, action: str | None = None, **kwargs: Any
        ) -> bool:
            return produce(answer)  # type: ignore[no-any-return]

    return OfPlain


def async_function_of(answer: str) -> Callable[..., Any]:
    async def asked(websocket: WebSocket, action: str | None) -> Any:
        return produce(answer)

    return asked


def plain_function_of(answer: str) -> Callable[..., Any]:
    def asked(websocket: WebSocket) -> Any:
        return produce(answer)

    return asked


class CallableOf:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def __call__(self, websocket: WebSocket, action: str | None) -> Any:
        return produce(self.answer)


class AsyncCallableOf(CallableOf):
    async def __call__(self, websocket: WebSocket, action: str | None) -> Any:
        return produce(self.answer)


def partial_of(answer: str) -> Callable[..., Any]:
    return functools.partial(lambda answer, websocket: produce(answer), answer)


FORMS: dict[str, Callable[[str], Any]] = {
    "class": class_of,
    "class with a plain method": plain_class_of,
    "instance": lambda answer: Leaf(answer, []),
    "instance for the handshake": lambda answer: AtTheDoor(answer),
    "async function": async_function_of,
    "plain function": plain_function_of,
    "lambda of none": lambda answer: lambda: produce(answer),
    "lambda of one": lambda answer: lambda websocket: produce(answer),
    "lambda of two": lambda answer: lambda websocket, action: produce(answer),
    "lambda of any": lambda answer: lambda *arguments: produce(answer),
    "callable object": CallableOf,
    "async callable object": AsyncCallableOf,
    "partial": partial_of,
}

#: Forms that have operators of their own, and so can stand on either side of any other.
WITH_OPERATORS = ["class", "class with a plain method", "instance"]
QUESTIONS = ["connect", "frame"]


# The truth table


def model_and(left: bool | None, right: bool | None) -> bool | None:
    return right if left is True else left


def model_or(left: bool | None, right: bool | None) -> bool | None:
    if left is True or right is True:
        return True
    return None if None in (left, right) else False


def model_not(inner: bool | None) -> bool | None:
    return None if inner is None else not inner


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_only_true_lets_in(answer: str, form: str, question: str) -> None:
    """Of all that a permission may answer, in whatever form it is given, only True lets in."""
    if form == "instance for the handshake" and question == "frame":
        assert await allows(FORMS[form](answer), question) is (answer != "yes")
    else:
        assert await allows(FORMS[form](answer), question) is (ANSWERS[answer] is True)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("form", WITH_OPERATORS)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_not(answer: str, form: str, question: str) -> None:
    """`~` turns a yes and a no round; the negation of a failure is one, which denies, and so is that of that."""
    permission = FORMS[form](answer)
    assert await allows(~permission, question) is (ANSWERS[answer] is False)
    assert await allows(~~permission, question) is (ANSWERS[answer] is True)
    assert await allows(~~~permission, question) is (ANSWERS[answer] is False)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(ANSWERS, ANSWERS)))
async def test_and_or(left: str, right: str, question: str) -> None:
    """`&` and `|` of each two answers, between every two forms, and their negations, are as the model says."""
    of_both = model_and(ANSWERS[left], ANSWERS[right]), model_or(ANSWERS[left], ANSWERS[right])
    forms = [form for form in FORMS if form != "instance for the handshake"]
    for one, other in itertools.product(forms, forms):
        if one not in WITH_OPERATORS and other not in WITH_OPERATORS:
            continue
        a, b = FORMS[one](left), FORMS[other](right)
        for permission, value in ((a & b, of_both[0]), (a | b, of_both[1])):
            assert isinstance(permission, BasePermission)
            assert await allows(permission, question) is (value is True), (one, other)
            assert await allows(~permission, question) is (value is False), (one, other)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(ANSWERS, ANSWERS)))
async def test_the_handshake_is_asked_of_can_connect(left: str, right: str) -> None:
    """Combinations ask their parts what they themselves are asked: `can_connect` before the handshake."""
    a, b = AtTheDoor(left), AtTheDoor(right)
    of_both = model_and(ANSWERS[left], ANSWERS[right]), model_or(ANSWERS[left], ANSWERS[right])
    for permission, value in ((a & b, of_both[0]), (a | b, of_both[1])):
        assert await allows(permission, "connect") is (value is True)
        assert await allows(~permission, "connect") is (value is False)
    assert await allows(a & b, "frame") is (left != "yes" and right != "yes")
    assert await allows(a | b, "frame") is (left != "yes" or right != "yes")


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("form", WITH_OPERATORS)
@pytest.mark.parametrize("answer", ANSWERS)
async def test_booleans_on_either_side(answer: str, form: str, boolean: bool) -> None:
    """A bool is a permission, on the left and on the right of another."""
    permission, value = FORMS[form](answer), ANSWERS[answer]
    assert await allows(boolean & permission) is (model_and(boolean, value) is True)
    assert await allows(permission & boolean) is (model_and(value, boolean) is True)
    assert await allows(boolean | permission) is (model_or(boolean, value) is True)
    assert await allows(permission | boolean) is (model_or(value, boolean) is True)
    assert await allows(~(boolean & permission)) is (model_and(boolean, value) is False)
    assert await allows(~(permission | boolean)) is (model_or(value, boolean) is False)
    assert await allows(boolean) is boolean


@pytest.mark.parametrize(
    ("left", "both", "either"),
    [("yes", [1, 2], [1]), ("no", [1], [1, 2]), ("raises", [1], [1, 2]), ("none", [1], [1, 2])],
)
async def test_no_more_is_asked_than_is_needed(left: str, both: list[int], either: list[int]) -> None:
    """The right side of `&` is asked after a yes only, that of `|` after anything else; each is asked once."""
    for combine, expected in ((operator.and_, both), (operator.or_, either)):
        asked: list[Any] = []
        await allows(combine(Leaf(left, asked, 1), Leaf("yes", asked, 2)))
        assert asked == expected


async def test_permissions_of_a_list_are_asked_until_one_says_no() -> None:
    """All of a list have to say yes; they are asked in their order, and nobody after the first that doesn't."""
    asked: list[Any] = []
    permissions = permissions_of([Leaf("yes", asked, 1), Leaf("no", asked, 2), Leaf("yes", asked, 3)])
    with pytest.raises(PermissionDenied):
        await ask(permissions, "frame", websocket())
    assert asked == [1, 2]
    await ask(permissions_of([]), "frame", websocket())
    await ask(permissions_of([Leaf("yes", asked, 4), Leaf("yes", asked, 5)]), "frame", websocket())
    assert asked == [1, 2, 4, 5]


Tree = tuple[Any, ...]


def random_tree(chance: random.Random, depth: int, names: Iterator[int]) -> Tree:
    kind = chance.choice(["leaf", "not", "and", "or"] if depth else ["leaf"])
    if kind == "leaf":
        return kind, chance.choice(list(ANSWERS)), next(names)
    return kind, *(random_tree(chance, depth - 1, names) for _ in range(1 if kind == "not" else 2))


def built(tree: Tree, asked: list[Any]) -> BasePermission:
    match tree:
        case "leaf", answer, name:
            return Leaf(answer, asked, name)
        case "not", inner:
            return ~built(inner, asked)
        case "and", left, right:
            return built(left, asked) & built(right, asked)
        case _:
            combined: BasePermission = built(tree[1], asked) | built(tree[2], asked)
            return combined


def modelled(tree: Tree, asked: list[Any]) -> bool | None:
    match tree:
        case "leaf", answer, name:
            asked.append(name)
            return ANSWERS[answer]
        case "not", inner:
            return model_not(modelled(inner, asked))
        case "and", left, right:
            first = modelled(left, asked)
            return modelled(right, asked) if first is True else first
        case _:
            first = modelled(tree[1], asked)
            return True if first is True else model_or(first, modelled(tree[2], asked))


@pytest.mark.parametrize("seed", range(20))
async def test_nested_combinations(seed: int) -> None:
    """Whatever is nested in whatever answers as the model does, and asks the same parts in the same order."""
    chance = random.Random(seed)
    for _ in range(50):
        tree = random_tree(chance, 5, itertools.count())
        asked: list[Any] = []
        expected: list[Any] = []
        value = modelled(tree, expected)
        assert await allows(built(tree, asked)) is (value is True), tree
        assert asked == expected, tree


async def test_a_combination_can_be_used_again() -> None:
    """Combining changes none of the parts, and a part may stand in several combinations, or twice in one."""
    asked: list[Any] = []
    yes, no = Leaf("yes", asked, "yes"), Leaf("no", asked, "no")
    both = yes & no
    either = both | yes
    assert await allows(either)
    assert not await allows(both)
    assert await allows(yes)
    assert not await allows(no)
    assert await allows(yes & yes)
    assert await allows(either & ~both)
    assert not await allows(yes & ~yes)


# What is asked, and where


async def test_the_arguments() -> None:
    """A permission gets the connection and the action, which is None before the handshake."""
    seen: list[Any] = []

    class Noting(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            seen.append((websocket, action, kwargs))
            return True

    def noting(*arguments: Any) -> bool:
        seen.append((*arguments, {}))
        return True

    ws = websocket()
    for permission in permissions_of([Noting, noting]):
        await ask([permission], "connect", ws)
        await ask([permission], "frame", ws, "say")
        await ask([permission], "frame", ws)
    assert seen == [(ws, None, {}), (ws, "say", {}), (ws, None, {})] * 2


async def test_functions_take_what_they_declare() -> None:
    """A function gets the connection, and the action if it has a second parameter; more with defaults keep these."""
    seen: list[Any] = []

    def none() -> bool:
        seen.append(())
        return True

    def one(ws: WebSocket, /) -> bool:
        seen.append((ws,))
        return True

    async def two(ws: WebSocket, name: str | None) -> bool:
        seen.append((ws, name))
        return True

    async def more(ws: WebSocket, name: str | None, extra: int = 3, *, keyword: int = 4) -> bool:
        seen.append((ws, name, extra, keyword))
        return True

    class Methods:
        def bound(self, ws: WebSocket) -> bool:
            seen.append((ws,))
            return True

        @staticmethod
        async def static(ws: WebSocket, name: str | None) -> bool:
            seen.append((ws, name))
            return True

    ws = websocket()
    await ask(permissions_of([none, one, two, more, Methods().bound, Methods.static]), "frame", ws, "say")
    assert seen == [(), (ws,), (ws, "say"), (ws, "say", 3, 4), (ws,), (ws, "say")]


async def test_plain_methods_run_in_another_thread() -> None:
    """What is plain `def` runs in the thread pool and may block; what is `async def` runs in the event loop."""
    threads: dict[str, int] = {}

    def note(name: str) -> bool:
        threads[name] = threading.get_ident()
        return True

    class Plain(BasePermission):
        def has_permission(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, websocket: WebSocket, action: str | None = None, **kwargs: Any
        ) -> bool:
            return note("method")

        def can_connect(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, websocket: WebSocket
        ) -> bool:
            return note("can_connect")

    class OnlyFrames(BasePermission):
        def has_permission(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, websocket: WebSocket, action: str | None = None, **kwargs: Any
        ) -> bool:
            return note("by default")

    class Async(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return note("async")

    async def function(websocket: WebSocket) -> bool:
        return note("async function")

    permission = Plain() & Async & (lambda: note("lambda")) & function
    await ask([permission], "frame", websocket())
    await ask([permission, OnlyFrames()], "connect", websocket())
    here = threading.get_ident()
    assert {name for name, thread in threads.items() if thread != here} == {
        "method",
        "can_connect",
        "lambda",
        "by default",
    }
    assert {name for name, thread in threads.items() if thread == here} == {"async", "async function"}


async def test_a_plain_method_that_gives_a_coroutine() -> None:
    """An awaitable that a plain function returns is awaited; what it gives is the answer."""

    async def later(answer: str) -> Any:
        return produce(answer)

    for answer, value in ANSWERS.items():
        function = functools.partial(lambda answer: later(answer), answer)
        assert await allows(function) is (value is True)
        assert await allows(AllowAny() & function) is (value is True)


async def test_what_denies_by_accident() -> None:
    """A missing return, a method that isn't overridden, an object in place of an answer: all deny."""

    class Forgetful(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            if action == "nothing":
                return True
            return None  # type: ignore[return-value]

    class WithAPermission(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return AllowAny  # type: ignore[return-value]

    class Overridden(AllowAny):
        has_permission = None  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleMethodOverride]

    for permission in (Forgetful, WithAPermission, Overridden, lambda: [True], lambda: 1.0, lambda: object()):
        for question in QUESTIONS:
            assert not await allows(permission, question)
            assert not await allows(~permission_of(permission), question)


async def test_a_combination_is_a_permission() -> None:
    """Permissions of the user's may ask a combination as they ask any other, and get True or False."""
    ws = websocket()
    for permission, says in ((AllowAny & ~DenyAll, True), (DenyAll | DenyAll, False), (~AllowAny, False)):
        assert await permission.has_permission(ws, "say") is says
        assert await permission.can_connect(ws) is says


def test_a_permission_without_an_answer() -> None:
    """A class that defines no `has_permission`, or misspells it, is an error where it is written."""

    class Empty(BasePermission):
        async def has_permision(self, websocket: WebSocket) -> bool:
            return True

    for write in (lambda: permissions_of([Empty]), lambda: Empty & AllowAny, lambda: ~Empty):
        with pytest.raises(DefinitionError, match="Empty defines no has_permission"):
            write()


# Operators and their operands

NO_PERMISSIONS: list[Any] = [None, 1, 0, "yes", "app.permissions.IsMember", b"", 1.0, [], {}, (), object(), int, dict]


@pytest.mark.parametrize("value", NO_PERMISSIONS)
def test_what_is_no_permission(value: Any) -> None:
    """What is no permission is an error where it is written, alone, in a list and on either side of an operator."""
    with pytest.raises(DefinitionError, match="permission"):
        permission_of(value)
    with pytest.raises(DefinitionError, match="permission"):
        permissions_of([AllowAny, value])
    for other in (AllowAny, AllowAny()):
        for combine, pair in itertools.product((operator.and_, operator.or_), ((other, value), (value, other))):
            with pytest.raises(DefinitionError, match="permission"):
                combine(*pair)


@pytest.mark.parametrize("value", ["app.permissions.IsMember", b"x", {"a": AllowAny}], ids=repr)
def test_what_is_no_list_of_permissions(value: Any) -> None:
    """Text, bytes and dicts are no lists of permissions."""
    with pytest.raises(DefinitionError, match="permission_classes"):
        permissions_of(value)


@pytest.mark.parametrize("value", [DenyAll, DenyAll(), AllowAny & DenyAll, False, lambda: False])
async def test_one_permission_without_a_list(value: Any) -> None:
    """A single permission may stand where a list is expected."""
    permissions = permissions_of(value)
    assert len(permissions) == 1
    assert not await allows(permissions[0])


def test_a_class_with_a_bad_permission() -> None:
    """A consumer class, or an action, with what is no permission can't be made; the error names where."""
    with pytest.raises(DefinitionError, match=r"^Wrong\.permission_classes: 'IsAuthenticated'.*"):
        type("Wrong", (ActionConsumer,), {"__qualname__": "Wrong", "permission_classes": ["IsAuthenticated"]})

    async def say(self: Any) -> None: ...

    guarded = action(permission_classes=[None])(say)
    with pytest.raises(DefinitionError, match=r"Bad\.say\.permission_classes: None"):
        type("Bad", (ActionConsumer,), {"__qualname__": "Bad", "say": guarded})


def test_has_scope_needs_names() -> None:
    """`HasScope` without a name, or with what is none, is an error; the class without arguments too."""
    bad: list[tuple[Any, ...]] = [(), (None,), ("read", 1), (["read"],)]
    for scopes in bad:
        with pytest.raises(DefinitionError):
            HasScope(*scopes)
    with pytest.raises(DefinitionError):
        permission_of(HasScope)


@pytest.mark.parametrize(
    "value",
    [(p for p in [DenyAll]), filter(None, [DenyAll]), map(permission_of, [DenyAll]), iter([DenyAll])],
    ids=["generator", "filter", "map", "iterator"],
)
def test_what_can_be_read_only_once(value: Any) -> None:
    """What would be used up by looking at it once is no list of permissions."""
    with pytest.raises(DefinitionError, match="Once"):
        type("Once", (ActionConsumer,), {"__qualname__": "Once", "permission_classes": value})


def test_a_class_that_needs_arguments() -> None:
    """A permission class that can't be made without arguments is an error of the definition."""
    with pytest.raises(DefinitionError):
        permission_of(AtTheDoor)


# What the client is told

USERS: list[Any] = [{}, {"user": None}, {"user": UnauthenticatedUser()}, {"user": AnonymousUser()}]
KNOWN: list[Any] = [{"user": SimpleUser("ann")}, {"user": User("7")}]


@pytest.mark.parametrize("scope", USERS, ids=str)
async def test_strangers(scope: Any) -> None:
    """`IsAuthenticated` and `HasScope` tell a stranger that he has to be known: 401 and 4501."""
    for permission in (IsAuthenticated, IsAuthenticated(), HasScope("read"), IsAuthenticated & HasScope("read")):
        error = await denial(permission, **scope)
        assert isinstance(error, NotAuthenticated)
        assert (error.status_code, error.close_code, error.code) == (401, 4501, "not_authenticated")
        assert error.detail == "authentication is required"


@pytest.mark.parametrize("scope", KNOWN, ids=str)
async def test_users(scope: Any) -> None:
    """`IsAuthenticated` lets a user in; one who lacks a scope is told 403 and 4503."""
    assert await allows(IsAuthenticated, **scope)
    error = await denial(IsAuthenticated & HasScope("read"), **scope, auth=Auth(frozenset({"write"})))
    assert isinstance(error, PermissionDenied)
    assert (error.status_code, error.close_code, error.code) == (403, 4503, "permission_denied")


@pytest.mark.parametrize("value", [lambda: False, lambda: True, None], ids=["says no", "says yes", "None"])
async def test_only_true_is_authenticated(value: Any) -> None:
    """A user whose `is_authenticated` is anything else than True, such as a method, is a stranger."""
    error = await denial(IsAuthenticated, user=type("Odd", (), {"is_authenticated": value})())
    assert error.status_code == 401


@pytest.mark.parametrize(
    ("scopes", "needed", "is_let_in"),
    [
        ({"read"}, ["read"], True),
        ({"read", "write"}, ["write", "read"], True),
        ({"read"}, ["read", "write"], False),
        ({"Read"}, ["read"], False),
        ({"read write"}, ["read"], False),
        (set(), ["read"], False),
    ],
)
async def test_scopes(scopes: set[str], needed: list[str], is_let_in: bool) -> None:
    """`HasScope` wants all of its scopes; starlette's AuthCredentials, which has a list, serves as well."""
    for auth in (Auth(frozenset(scopes)), type("Credentials", (), {"scopes": list(scopes)})()):
        assert await allows(HasScope(*needed), user=User("7"), auth=auth) is is_let_in
    assert not await allows(HasScope(*needed), user=User("7"), auth=None)
    assert not await allows(HasScope(*needed), user=User("7"))


@pytest.mark.parametrize(
    ("permission", "scope", "status_code"),
    [
        (IsAuthenticated | DenyAll, {}, 401),
        (DenyAll | IsAuthenticated, {}, 401),
        (DenyAll | DenyAll, {}, 403),
        (DenyAll & IsAuthenticated, {}, 403),
        (IsAuthenticated & DenyAll, {}, 401),
        (IsAuthenticated & DenyAll, {"user": User("7")}, 403),
        (~IsAuthenticated, {"user": User("7")}, 403),
        (~~IsAuthenticated, {}, 403),
        (IsAuthenticated | HasScope("x"), {}, 401),
        (HasScope("x") | DenyAll, {"user": User("7")}, 403),
        (AllowAny & (IsAuthenticated | DenyAll), {}, 401),
        (DenyAll, {}, 403),
        (False, {}, 403),
        (lambda: False, {}, 403),
    ],
)
async def test_codes_of_combinations(permission: Any, scope: Any, status_code: int) -> None:
    """A stranger whom being known might let in is told 401, everybody else 403."""
    assert (await denial(permission, **scope)).status_code == status_code


async def test_messages() -> None:
    """The client is told the message of the permission that said no; of `|` and `~` a general one may be told."""

    class Owners(BasePermission):
        message = "for owners only ✗"

        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return False

    assert (await denial(Owners)).detail == "for owners only ✗"
    assert (await denial(AllowAny & Owners & DenyAll)).detail == "for owners only ✗"
    assert (await denial(DenyAll | Owners)).detail == "for owners only ✗"
    assert (await denial(DenyAll)).detail == BasePermission.message
    assert (await denial(~AllowAny())).detail == BasePermission.message


async def test_a_permission_can_say_why() -> None:
    """A permission may raise what the client is to be told in place of a no, or make it in `denial`."""

    class Raising(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            raise ConsumerError("the room is full", code="room_full", seats=3)

    class Telling(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return False

        def denial(self, websocket: WebSocket) -> ConsumerError:
            return Throttled(retry_after=3)

    error = await denial(Raising)
    assert (error.code, error.detail, error.extra) == ("room_full", "the room is full", {"seats": 3})
    assert (await denial(Telling)).status_code == 429
    assert not await allows(Raising() & AllowAny)
    assert await allows(Raising() | AllowAny)


@pytest.mark.parametrize(
    "error", [ConsumerError("x"), PermissionDenied("x"), NotAuthenticated("x"), Throttled(retry_after=1)], ids=repr
)
@pytest.mark.parametrize("question", QUESTIONS)
async def test_the_negation_of_what_raised_denies(error: ConsumerError, question: str) -> None:
    """An exception is a failure, also one that is raised to be told: its negation doesn't let in."""

    def raising() -> bool:
        raise error

    assert not await allows(raising, question)
    assert not await allows(~permission_of(raising), question)
    assert not await allows(~(AllowAny & permission_of(raising)), question)
    assert not await allows(~(DenyAll | permission_of(raising)), question)


# Failures


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", [answer for answer, value in ANSWERS.items() if value is None])
async def test_a_failure_is_logged(answer: str, question: str, caplog: pytest.LogCaptureFixture) -> None:
    """A failure that denies is one line in the log, with the permission and what happened; the client hears nothing."""
    error = await denial(AllowAny & ~Leaf(answer, []), question)
    assert isinstance(error, PermissionDenied)
    assert error.detail == BasePermission.message
    assert not error.extra
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fastapi_channels", logging.ERROR)
    assert "Leaf" in record.getMessage()
    assert record.exc_info is not None
    told = str(record.exc_info[1])
    assert told == SECRET if answer == "raises" else repr(VALUES[answer]) in told
    if answer == "raises":
        assert record.exc_info[2] is not None


async def test_a_failure_that_changes_nothing_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """`failure | True` lets in, and a no that comes first leaves what would have failed unasked."""
    assert await allows(Leaf("raises", []) | AllowAny)
    assert not await allows(DenyAll & Leaf("raises", []))
    assert not caplog.records


async def test_two_failures_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Of several failures in one combination one is logged."""
    assert not await allows(Leaf("raises", []) | Leaf("none", []))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [HTTPException(403, SECRET), TimeoutError(), KeyError(SECRET)], ids=repr)
async def test_nothing_of_a_failure_is_told(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """What leaves a permission reaches no client, neither in the refusal of a handshake nor in an error frame."""

    class Failing(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            if "fail" in websocket.query_params or action == "say":
                raise error
            return True

    class Chat(ActionConsumer):
        permission_classes = [Failing]

        @action
        async def say(self) -> str:
            return "said"

        @action
        async def ping(self) -> str:
            return "pong"

    app = app_with(Chat)
    async with connect(app, "/ws?fail") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 403
        assert ws.response.json() == {"detail": BasePermission.message, "code": "permission_denied"}
    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "say", "request_id": 1})
        reply = await ws.receive_json()
        assert reply["errors"] == {"code": "permission_denied", "detail": BasePermission.message}
        await ws.send_json({"action": "ping", "request_id": 2})
        assert (await ws.receive_json())["data"] == "pong"
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == 2
    assert all(record.exc_info is not None and record.exc_info[1] is error for record in errors)
