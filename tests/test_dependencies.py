"""Dependencies of handlers: resolved for each frame and each event, as FastAPI resolves them for a request."""

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from fastapi import Cookie, Depends, Header, HTTPException, Path, Query, Security, WebSocket
from fastapi.security import SecurityScopes
from starlette.requests import HTTPConnection

from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, action, event
from fastapi_channels.exceptions import ConsumerError
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import WebSocketSession, connect
from tests.conftest import app_with


async def ask(ws: WebSocketSession, name: str, data: Any = None, request_id: Any = 1) -> Any:
    await ws.send_json({"action": name, "request_id": request_id, **({} if data is None else {"data": data})})
    reply = await ws.receive_json()
    assert (reply["action"], reply["request_id"]) == (name, request_id), reply
    return reply


@dataclass
class Calls:
    """What was called, in order."""

    names: list[Any] = field(default_factory=list)


calls = Calls()


@pytest.fixture(autouse=True)
def _forget_calls() -> None:
    calls.names.clear()


# Every kind of dependency


async def get_text() -> str:
    return "coroutine"


def get_in_thread() -> str:
    assert threading.current_thread() is not threading.main_thread()
    return "function"


class Pager:
    def __init__(self, of: Annotated[str, Depends(get_text)]) -> None:
        self.of = of


class Callable:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, of: Annotated[str, Depends(get_text)]) -> str:
        assert threading.current_thread() is not threading.main_thread()
        return f"{self.name} of {of}"

    def method(self) -> str:
        return f"method of {self.name}"


class AsyncCallable(Callable):
    async def __call__(self, of: Annotated[str, Depends(get_text)]) -> str:  # type: ignore[override]
        return f"async {self.name} of {of}"


class YieldingCallable:
    async def __call__(self) -> AsyncIterator[str]:
        yield "yielding callable"
        calls.names.append("yielding callable closed")


async def with_prefix(prefix: str, of: Annotated[str, Depends(get_text)]) -> str:
    return f"{prefix} {of}"


def plain_with_prefix(prefix: str) -> str:
    return f"{prefix} plain"


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return f"wrapped {await function(*args, **kwargs)}"

    return wrapper


@wrapped
async def get_wrapped(of: Annotated[str, Depends(get_in_thread)]) -> str:
    return f"decorated of {of}"


class Kinds(ActionConsumer):
    @action
    async def coroutine(self, value: Annotated[str, Depends(get_text)]) -> str:
        return value

    @action
    async def function(self, value: Annotated[str, Depends(get_in_thread)]) -> str:
        return value

    @action
    async def default(self, value: str = Depends(get_text)) -> str:
        return value

    @action
    async def a_class(self, value: Annotated[Pager, Depends()]) -> str:
        assert type(value) is Pager
        return value.of

    @action
    async def callable(self, value: Annotated[str, Depends(Callable("☃"))]) -> str:
        return value

    @action
    async def method(self, value: Annotated[str, Depends(Callable("☃").method)]) -> str:
        return value

    @action
    async def async_callable(self, value: Annotated[str, Depends(AsyncCallable("☃"))]) -> str:
        return value

    @action
    async def yielding_callable(self, value: Annotated[str, Depends(YieldingCallable())]) -> str:
        return value

    @action
    async def partial(self, value: Annotated[str, Depends(functools.partial(with_prefix, "part of"))]) -> str:
        return value

    @action
    async def plain_partial(self, value: Annotated[str, Depends(functools.partial(plain_with_prefix, "a"))]) -> str:
        return value

    @action
    async def decorated(self, value: Annotated[str, Depends(get_wrapped)]) -> str:
        return value

    @action
    async def anonymous(self, value: Annotated[str, Depends(lambda: "lambda")]) -> str:
        return value

    @action
    async def with_data(self, data: int, value: Annotated[str, Depends(get_text)]) -> list[Any]:
        return [data, value]

    @action
    async def data_last(self, value: Annotated[str, Depends(get_text)], data: int = 7) -> list[Any]:
        return [data, value]

    @action
    def in_a_thread(self, data: int, value: Annotated[str, Depends(get_text)]) -> list[Any]:
        assert threading.current_thread() is not threading.main_thread()
        return [data, value]

    @action
    async def layer_of_the_application(self, layer: Layer) -> bool:
        return layer is self.layer


KINDS: list[Any] = [
    ("coroutine", None, "coroutine"),
    ("function", None, "function"),
    ("default", None, "coroutine"),
    ("a_class", None, "coroutine"),
    ("callable", None, "☃ of coroutine"),
    ("method", None, "method of ☃"),
    ("async_callable", None, "async ☃ of coroutine"),
    ("yielding_callable", None, "yielding callable"),
    ("partial", None, "part of coroutine"),
    ("plain_partial", None, "a plain"),
    ("decorated", None, "wrapped decorated of function"),
    ("anonymous", None, "lambda"),
    ("with_data", 3, [3, "coroutine"]),
    ("data_last", None, [7, "coroutine"]),
    ("data_last", 8, [8, "coroutine"]),
    ("in_a_thread", 3, [3, "coroutine"]),
    ("layer_of_the_application", None, True),
]


@pytest.mark.parametrize(("name", "data", "expected"), KINDS)
async def test_whatever_can_be_called_can_be_depended_upon(name: str, data: Any, expected: Any) -> None:
    """Functions, classes, objects, methods, partials: what FastAPI takes as a dependency, a handler gets too."""
    async with connect(app_with(Kinds), "/ws") as ws:
        reply = await ask(ws, name, data)
        assert (reply["status"], reply["data"]) == ("ok", expected)
    assert calls.names == (["yielding callable closed"] if name == "yielding_callable" else [])


async def test_other_handlers_have_dependencies_too() -> None:
    """`receive`, event handlers and streams get their dependencies like actions do, each time anew."""

    async def counted() -> int:
        calls.names.append("counted")
        return len(calls.names)

    class Echo(JsonConsumer):
        groups = ["echo"]

        async def receive(self, data: Any, n: Annotated[int, Depends(counted)]) -> None:
            await self.send_json([data, n])

        @event
        async def handled(self, message: dict[str, Any], n: Annotated[int, Depends(counted)]) -> None:
            await self.send_json([message["type"], n])

        @event
        def handled_in_a_thread(self, n: Annotated[int, Depends(counted)]) -> None:
            self.sync.send_json(["thread", n])

    app = app_with(Echo)
    async with connect(app, "/ws") as ws:
        for number in (1, 2):
            await ws.send_json("data")
            assert await ws.receive_json() == ["data", number]
        for kind, expected in (("handled", ["handled", 3]), ("handled.in.a.thread", ["thread", 4])):
            await app.state.channels.layer().group_send("echo", {"type": kind})
            assert await ws.receive_json() == expected


# Caching


async def base() -> int:
    calls.names.append("base")
    return len(calls.names)


async def left(value: Annotated[int, Depends(base)]) -> int:
    return value


def right(value: Annotated[int, Depends(base)]) -> int:
    return value


async def fresh(value: Annotated[int, Depends(base, use_cache=False)]) -> int:
    return value


class Caching(ActionConsumer):
    @action
    async def cached(
        self, a: Annotated[int, Depends(left)], b: Annotated[int, Depends(right)], c: Annotated[int, Depends(base)]
    ) -> list[int]:
        return [a, b, c]

    @action
    async def uncached(
        self, a: Annotated[int, Depends(left)], b: Annotated[int, Depends(fresh)], c: Annotated[int, Depends(base)]
    ) -> list[int]:
        return [a, b, c]


async def test_a_dependency_is_called_once_for_each_call() -> None:
    """One that several ask for is called once in a call, again in the next; with `use_cache=False` each time."""
    async with connect(app_with(Caching), "/ws") as ws:
        assert (await ask(ws, "cached"))["data"] == [1, 1, 1]
        assert (await ask(ws, "cached"))["data"] == [2, 2, 2]
        reply = (await ask(ws, "uncached"))["data"]
        assert reply[0] == 3
        assert reply[1] == 4


# Security scopes


async def user(scopes: SecurityScopes) -> list[str]:
    return list(scopes.scopes)


async def admin(names: Annotated[list[str], Security(user, scopes=["admin"])]) -> list[str]:
    return names


class Guarded(ActionConsumer):
    @action
    async def plain(self, names: Annotated[list[str], Depends(user)]) -> list[str]:
        return names

    @action
    async def scoped(self, names: Annotated[list[str], Security(user, scopes=["read", "write"])]) -> list[str]:
        return names

    @action
    async def nested(self, names: Annotated[list[str], Security(admin, scopes=["all"])]) -> list[str]:
        return names

    @action
    async def both(
        self,
        one: Annotated[list[str], Security(user, scopes=["one"])],
        two: Annotated[list[str], Security(user, scopes=["two"])],
    ) -> list[list[str]]:
        return [one, two]


async def test_security_scopes_are_collected_on_the_way() -> None:
    """`SecurityScopes` holds the scopes of every `Security` above it, and another set of scopes is another call."""
    async with connect(app_with(Guarded), "/ws") as ws:
        assert (await ask(ws, "plain"))["data"] == []
        assert (await ask(ws, "scoped"))["data"] == ["read", "write"]
        assert (await ask(ws, "nested"))["data"] == ["all", "admin"]
        assert (await ask(ws, "both"))["data"] == [["one"], ["two"]]


# yield


async def session() -> AsyncIterator[str]:
    calls.names.append("session opened")
    try:
        yield "session"
    except BaseException as error:
        calls.names.append(f"session saw {type(error).__name__}")
        raise
    finally:
        calls.names.append("session closed")


def transaction(of: Annotated[str, Depends(session)]) -> Iterator[str]:
    assert threading.current_thread() is not threading.main_thread()
    calls.names.append("transaction opened")
    try:
        yield f"transaction of {of}"
    except Exception as error:
        calls.names.append(f"transaction saw {type(error).__name__}")
        raise
    finally:
        assert threading.current_thread() is not threading.main_thread()
        calls.names.append("transaction closed")


async def failing_at_the_end() -> AsyncIterator[None]:
    yield
    raise ZeroDivisionError("the secret")


async def forgiving() -> AsyncIterator[None]:
    try:
        yield
    except LookupError:
        raise ConsumerError("it was not found", code="not_found") from None


class Yielding(ActionConsumer):
    @action
    async def work(self, fails: bool, value: Annotated[str, Depends(transaction)]) -> str:
        calls.names.append("handled")
        if fails:
            raise ConsumerError("no", code="no")
        return value

    @action
    def work_in_a_thread(self, fails: bool, value: Annotated[str, Depends(transaction)]) -> str:
        calls.names.append("handled")
        if fails:
            raise LookupError
        return value

    @action
    async def stream(self, value: Annotated[str, Depends(session)]) -> AsyncIterator[str]:
        for _ in range(2):
            calls.names.append("item")
            yield value

    @action
    async def wait(self, value: Annotated[str, Depends(session)]) -> None:
        calls.names.append("waiting")
        await asyncio.Event().wait()

    @action(timeout=0.03)
    async def wait_a_moment(self, value: Annotated[str, Depends(session)]) -> None:
        await asyncio.Event().wait()

    @action
    async def end_fails(self, value: Annotated[None, Depends(failing_at_the_end)]) -> str:
        return "nobody hears this"

    @action
    async def translated(self, value: Annotated[None, Depends(forgiving)]) -> None:
        raise LookupError

    @action
    async def ping(self) -> str:
        return "pong"


OPENED = ["session opened", "transaction opened", "handled"]


@pytest.mark.parametrize("name", ["work", "work_in_a_thread"])
async def test_a_dependency_with_yield_is_closed_after_each_call(name: str) -> None:
    """It is open while the handler runs, closed before the reply, and opened anew for the next call."""
    async with connect(app_with(Yielding), "/ws") as ws:
        for _ in range(2):
            assert (await ask(ws, name, False))["data"] == "transaction of session"
            assert calls.names == [*OPENED, "transaction closed", "session closed"]
            calls.names.clear()


@pytest.mark.parametrize(("name", "error"), [("work", "ConsumerError"), ("work_in_a_thread", "LookupError")])
async def test_a_dependency_with_yield_sees_the_exception(name: str, error: str) -> None:
    """What the handler raises is raised at the `yield`, innermost first, and the client is told of it."""
    async with connect(app_with(Yielding), "/ws") as ws:
        assert (await ask(ws, name, True))["status"] == "bad"
        assert calls.names == [
            *OPENED,
            f"transaction saw {error}",
            "transaction closed",
            f"session saw {error}",
            "session closed",
        ]


async def test_dependencies_of_a_stream_live_as_long_as_it() -> None:
    """A stream's dependencies are open until its last item."""
    async with connect(app_with(Yielding), "/ws") as ws:
        await ws.send_json({"action": "stream", "request_id": 1})
        assert [(await ws.receive_json())["type"] for _ in range(3)] == ["stream", "stream", "response"]
        assert calls.names == ["session opened", "item", "item", "session closed"]


async def test_a_cancelled_call_closes_its_dependencies() -> None:
    """`$cancel` and a timeout close what the call had opened."""
    expected = ["session opened", "waiting", "session saw CancelledError", "session closed"]
    async with connect(app_with(Yielding), "/ws") as ws:
        await ws.send_json({"action": "wait", "request_id": 1})
        await ws.send_json({"action": "ping", "request_id": 2})
        assert await ws.receive_nothing(0.01)
        await ws.send_json({"action": "$cancel", "request_id": 1})
        assert (await ws.receive_json())["errors"]["code"] == "cancelled"
        assert calls.names == expected
        assert (await ws.receive_json())["data"] == "pong"
        calls.names.clear()
        assert (await ask(ws, "wait_a_moment"))["errors"]["code"] == "timeout"
        assert calls.names == [expected[0], *expected[2:]]


async def test_an_exception_at_the_end_of_a_dependency_is_the_calls() -> None:
    """What a dependency raises when it is closed is told in place of the result, or of what the handler raised."""
    async with connect(app_with(Yielding), "/ws") as ws:
        assert (await ask(ws, "end_fails"))["errors"]["code"] == "internal_error"
        assert (await ask(ws, "translated"))["errors"] == {"code": "not_found", "detail": "it was not found"}
        assert (await ask(ws, "ping"))["data"] == "pong"


async def test_calls_at_once_have_dependencies_of_their_own() -> None:
    """Two calls that run at once share nothing of what they depend upon."""
    go_on = asyncio.Event()

    async def box() -> AsyncIterator[list[str]]:
        contents: list[str] = []
        yield contents
        contents.append("closed")

    class Chat(ActionConsumer):
        @action(concurrency=2)
        async def put(self, name: str, contents: Annotated[list[str], Depends(box)]) -> list[str]:
            contents.append(name)
            calls.names.append(name)
            if len(calls.names) == 2:
                go_on.set()
            await go_on.wait()
            return contents

    async with connect(app_with(Chat), "/ws") as ws:
        for name in ("a", "b"):
            await ws.send_json({"action": "put", "data": name, "request_id": name})
        replies = [await ws.receive_json() for _ in range(2)]
        for reply in replies:
            assert reply["data"][0] == reply["request_id"]
            assert reply["data"][1:] in ([], ["closed"])


# Errors in dependencies


async def test_what_a_dependency_raises_is_told_like_what_the_handler_raises(caplog: pytest.LogCaptureFixture) -> None:
    """`HTTPException`, `ConsumerError` and others out of a dependency are answered, and the handler isn't called."""
    errors: dict[str, Exception] = {
        "http": HTTPException(403, "not you"),
        "told": ConsumerError("no room", code="room_full", seats=0),
        "other": ZeroDivisionError("the secret"),
    }

    def fail(kind: str) -> Any:
        def failing() -> None:
            raise errors[kind]

        return failing

    class Chat(ActionConsumer):
        @action
        async def http(self, value: Annotated[None, Depends(fail("http"))]) -> None:
            calls.names.append("called")

        @action
        async def told(self, value: Annotated[None, Depends(fail("told"))]) -> None:
            calls.names.append("called")

        @action
        async def other(self, value: Annotated[None, Depends(fail("other"))]) -> None:
            calls.names.append("called")

    async with connect(app_with(Chat), "/ws") as ws:
        assert (await ask(ws, "http"))["errors"] == {"code": "permission_denied", "detail": "not you"}
        assert (await ask(ws, "told"))["errors"] == {"code": "room_full", "detail": "no room", "seats": 0}
        assert (await ask(ws, "other"))["errors"]["code"] == "internal_error"
    assert calls.names == []
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


# Overrides


async def real() -> str:
    return "real"


async def above(value: Annotated[str, Depends(real)]) -> str:
    return f"above {value}"


async def fake() -> AsyncIterator[str]:
    yield "fake"
    calls.names.append("fake closed")


class Overridden(ActionConsumer):
    groups = ["all"]

    @action
    async def direct(self, value: Annotated[str, Depends(real)]) -> str:
        return value

    @action
    async def deep(self, value: Annotated[str, Depends(above)]) -> str:
        return value

    @event
    async def tell(self, value: Annotated[str, Depends(above)]) -> None:
        await self.send_json(value)


async def test_dependency_overrides_hold_from_one_call_to_the_next() -> None:
    """`app.dependency_overrides` are asked at each call, at any depth, and may change while a connection is open."""
    app = app_with(Overridden)
    async with connect(app, "/ws") as ws:

        async def all_three() -> list[Any]:
            await app.state.channels.layer().group_send("all", {"type": "tell"})
            told = await ws.receive_json()
            return [(await ask(ws, "direct"))["data"], (await ask(ws, "deep"))["data"], told]

        assert await all_three() == ["real", "above real", "above real"]
        app.dependency_overrides[real] = fake
        assert await all_three() == ["fake", "above fake", "above fake"]
        assert calls.names == ["fake closed"] * 3
        app.dependency_overrides[above] = lambda: "nothing above"
        assert await all_three() == ["fake", "nothing above", "nothing above"]
        app.dependency_overrides[real] = lambda: "changed"
        assert await all_three() == ["changed", "nothing above", "nothing above"]
        app.dependency_overrides.clear()
        assert await all_three() == ["real", "above real", "above real"]


async def test_two_applications_override_for_themselves() -> None:
    """One consumer class on two applications has each one's overrides."""
    one, two = app_with(Overridden), app_with(Overridden)
    one.dependency_overrides[real] = lambda: "one"
    two.dependency_overrides[real] = lambda: "two"
    async with connect(one, "/ws") as in_one, connect(two, "/ws") as in_two:
        for _ in range(2):
            assert (await ask(in_one, "deep"))["data"] == "above one"
            assert (await ask(in_two, "deep"))["data"] == "above two"


# What is asked of the handshake


async def who(
    room: Annotated[str, Path()],
    page: int = 1,
    tag: Annotated[list[str], Query()] = [],  # noqa: B006
    x_token: Annotated[str | None, Header()] = None,
    flavour: Annotated[str | None, Cookie(alias="fl")] = None,
) -> dict[str, Any]:
    calls.names.append("who")
    return {"room": room, "page": page, "tag": tag, "token": x_token, "flavour": flavour}


class Limits:
    def __init__(self, limit: Annotated[int, Query(ge=1)] = 10) -> None:
        self.limit = limit


async def strict(x_key: Annotated[str, Header(min_length=3)]) -> str:
    return x_key


class Asking(ActionConsumer):
    @action
    async def ask(
        self, limits: Annotated[Limits, Depends()], known: Annotated[dict[str, Any], Depends(who)]
    ) -> list[Any]:
        return [limits.limit, known]


class Strict(ActionConsumer):
    @action
    async def key(self, key: Annotated[str, Depends(strict)]) -> str:
        return key


def app_in_rooms(consumer: type[ActionConsumer]) -> Any:
    from fastapi import FastAPI

    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/rooms/{room}", consumer)]))
    return app


async def test_what_a_dependency_asks_of_the_handshake_is_the_same_for_each_call() -> None:
    """Path, query, header and cookie of a handler's dependency are the handshake's; it is called anew each time."""
    headers = {"x-token": "☃".encode().decode("latin-1"), "cookie": "fl=vanilla; other=1"}
    async with connect(app_in_rooms(Asking), "/rooms/a%20b?page=3&tag=x&tag=y&limit=5", headers=headers) as ws:
        for _ in range(2):
            assert (await ask(ws, "ask"))["data"] == [
                5,
                {
                    "room": "a b",
                    "page": 3,
                    "tag": ["x", "y"],
                    "token": headers["x-token"],
                    "flavour": "vanilla",
                },
            ]
    assert calls.names == ["who", "who"]


async def test_defaults_stand_in_for_what_the_handshake_lacks() -> None:
    """Query, header and cookie may have defaults."""
    async with connect(app_in_rooms(Asking), "/rooms/1") as ws:
        nothing = {"room": "1", "page": 1, "tag": [], "token": None, "flavour": None}
        assert (await ask(ws, "ask"))["data"] == [10, nothing]


@pytest.mark.parametrize("query", ["page=x", "limit=0", "limit=", "page=1.5"])
async def test_a_handshake_that_does_not_fit_a_handlers_dependency(query: str) -> None:
    """A call whose dependency asks of the handshake what it doesn't have is answered so; the connection is open."""
    async with connect(app_in_rooms(Asking), f"/rooms/1?{query}") as ws:
        for _ in range(2):
            errors = (await ask(ws, "ask"))["errors"]
            assert errors["code"] == "invalid_data"
            (finding,) = errors["errors"]
            assert finding["loc"] == ["query", query.partition("=")[0]]
            assert set(finding) == {"type", "loc", "msg"}


@pytest.mark.parametrize(("headers", "data"), [({}, None), ({"X-Key": "ab"}, None), ({"X-Key": "abc"}, "abc")])
async def test_a_required_header_of_a_handlers_dependency(headers: dict[str, str], data: str | None) -> None:
    """A required header is asked for at the first call that needs it."""
    async with connect(app_with(Strict), "/ws", headers=headers) as ws:
        reply = await ask(ws, "key")
        assert reply["data"] == data
        if data is None:
            assert reply["errors"]["errors"][0]["loc"] == ["header", "x-key"]


async def test_an_overridden_dependency_asks_nothing_of_the_handshake() -> None:
    """A dependency that is overridden when the connection opens need not have what it would ask for."""
    app = app_with(Strict)
    app.dependency_overrides[strict] = lambda: "from the test"
    async with connect(app, "/ws") as ws:
        assert ws.accepted
        assert (await ask(ws, "key"))["data"] == "from the test"


# The connection itself


async def path_of(websocket: WebSocket, connection: HTTPConnection) -> str:
    assert websocket is connection
    return websocket.url.path


class Connected(ActionConsumer):
    groups = ["all"]

    @action
    async def mine(self, websocket: WebSocket, path: Annotated[str, Depends(path_of)]) -> list[Any]:
        return [websocket is self.websocket, path]

    @action
    async def with_data(self, websocket: WebSocket, n: int) -> list[Any]:
        return [websocket is self.websocket, n]

    @event
    async def tell(self, connection: HTTPConnection, message: dict[str, Any]) -> None:
        await self.send_json([connection is self.websocket, message["type"]])


async def test_a_handler_and_a_dependency_may_ask_for_the_websocket() -> None:
    """A `WebSocket` or `HTTPConnection` parameter is the connection, and not the data."""
    app = app_with(Connected)
    async with connect(app, "/ws") as ws:
        assert (await ask(ws, "mine"))["data"] == [True, "/ws"]
        assert (await ask(ws, "with_data", 3))["data"] == [True, 3]
        await app.state.channels.layer().group_send("all", {"type": "tell"})
        assert await ws.receive_json() == [True, "tell"]


current: ContextVar[str] = ContextVar("current", default="nothing")


async def test_what_a_dependency_puts_into_the_context_its_handler_sees() -> None:
    """An async dependency runs in the handler's context; the next call begins with that of the connection."""

    async def entered() -> AsyncIterator[None]:
        token = current.set("entered")
        yield
        current.reset(token)

    class Chat(ActionConsumer):
        @action
        async def inside(self, value: Annotated[None, Depends(entered)]) -> str:
            return current.get()

        @action
        async def outside(self) -> str:
            return current.get()

    async with connect(app_with(Chat), "/ws") as ws:
        for name, expected in (("inside", "entered"), ("outside", "nothing"), ("inside", "entered")):
            assert (await ask(ws, name))["data"] == expected
