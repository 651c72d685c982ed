"""`connect` under FastAPI: parameters, dependencies, overrides, and a consumer without FastAPI."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, ClassVar

import pytest
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Path, Query, WebSocket
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute

from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import ConsumerError
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import connect
from tests.conftest import app_with


def app_at(path: str, consumer: type[WebSocketConsumer], **options: Any) -> FastAPI:
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route(path, consumer)]), **options)
    return app


class Filters(BaseModel):
    limit: int = 10
    tags: list[str] = []


class Telling(JsonConsumer):
    """Sends what it is told to after the accept."""

    async def tell(self, content: Any) -> None:
        await self.accept()
        await self.send_json(content)


# Parameters


async def test_connect_has_fastapis_parameters() -> None:
    """Path, query, header, cookie, a query model, the WebSocket and the layer come as FastAPI gives them."""

    class Chat(Telling):
        async def connect(
            self,
            room: str,
            number: Annotated[int, Path(ge=1)],
            filters: Annotated[Filters, Query()],
            websocket: WebSocket,
            layer: Layer,
            x_token: Annotated[str, Header()],
            flavour: Annotated[str, Cookie(alias="fl")] = "none",
        ) -> None:
            assert websocket is self.websocket
            assert layer is self.layer
            assert self.path_params == {"room": room, "number": str(number)}
            await self.tell([room, number, filters, x_token, flavour])

    app = app_at("/rooms/{room}/{number}", Chat)
    headers = {"X-Token": "t", "Cookie": "fl=mint"}
    async with connect(app, "/rooms/caf%C3%A9%20x/7?limit=3&tags=a&tags=b", headers=headers) as ws:
        assert await ws.receive_json() == ["café x", 7, {"limit": 3, "tags": ["a", "b"]}, "t", "mint"]


@pytest.mark.parametrize(
    ("path", "loc", "kind", "given"),
    [
        ("/rooms/x?page=1", ["path", "number"], "int_parsing", "x"),
        ("/rooms/0?page=1", ["path", "number"], "greater_than_equal", "0"),
        ("/rooms/1", ["query", "page"], "missing", None),
        ("/rooms/1?page=☃", ["query", "page"], "int_parsing", "☃"),
    ],
)
async def test_a_parameter_that_does_not_validate_is_422(path: str, loc: list[str], kind: str, given: Any) -> None:
    """A parameter that doesn't validate refuses with 422 and FastAPI's body."""

    class Chat(WebSocketConsumer):
        async def connect(self, number: Annotated[int, Path(ge=1)], page: int) -> None: ...

    async with connect(app_at("/rooms/{number}", Chat), path) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422
        (finding,) = ws.response.json()["detail"]
        assert (finding["loc"], finding["type"], finding["input"]) == (loc, kind, given)
        assert finding["msg"]


async def test_reject_mode_close_tells_422_as_4500() -> None:
    """With `reject_mode="close"` a parameter that doesn't validate is 4500."""

    class Chat(WebSocketConsumer):
        reject_mode = "close"

        async def connect(self, page: int) -> None: ...

    async with connect(app_with(Chat), "/ws?page=x") as ws:
        assert ws.accepted
        assert (await ws.closed())[0] == 4500


async def test_several_findings_are_told_at_once() -> None:
    """Findings of parameters and of dependencies come together, and nothing of `connect` has run."""

    async def dependency(size: int) -> int:
        return size

    class Chat(WebSocketConsumer):
        async def connect(self, page: int, size: Annotated[int, Depends(dependency)]) -> None:
            raise AssertionError

    async with connect(app_with(Chat), "/ws?page=x&size=y") as ws:
        assert ws.response is not None
        found = sorted(finding["loc"][1] for finding in ws.response.json()["detail"])
        assert (ws.response.status_code, found) == (422, ["page", "size"])


# Dependencies


class Noting(ActionConsumer):
    notes: ClassVar[list[str]] = []

    @action
    async def ping(self) -> str:
        self.notes.append("action")
        return "pong"

    async def disconnect(self, code: int, reason: str) -> None:
        self.notes.append("disconnect")


@pytest.fixture
def notes() -> list[str]:
    Noting.notes.clear()
    return Noting.notes


def plain_yield() -> Iterator[str]:
    Noting.notes.append("plain opened")
    yield "plain"
    Noting.notes.append("plain closed")


async def async_yield(of: Annotated[str, Depends(plain_yield)]) -> AsyncIterator[str]:
    Noting.notes.append("async opened")
    try:
        yield f"async of {of}"
    except Exception as error:
        Noting.notes.append(f"async saw {type(error).__name__}")
        raise
    finally:
        Noting.notes.append("async closed")


async def test_dependencies_with_yield_live_as_long_as_the_connection(notes: list[str]) -> None:
    """They are open during frames and `disconnect`, and closed after it, the last one first."""

    class Chat(Noting):
        async def connect(self, value: Annotated[str, Depends(async_yield)]) -> None:
            self.notes.append(value)

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "ping", "request_id": 1})
        await ws.receive_json()
        await ws.close()
    begun = ["plain opened", "async opened", "async of plain"]
    assert notes == [*begun, "action", "disconnect", "async closed", "plain closed"]


async def test_dependencies_with_yield_see_what_connect_raises(notes: list[str]) -> None:
    """What refuses the handshake is raised at the `yield` of its dependencies, after `disconnect`."""

    class Chat(Noting):
        async def connect(self, value: Annotated[str, Depends(async_yield)]) -> None:
            raise HTTPException(404)

    async with connect(app_with(Chat), "/ws") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 404
    assert notes[2:] == ["disconnect", "async saw HTTPException", "async closed"]


@pytest.mark.parametrize(
    ("error", "status_code"),
    [(HTTPException(401, "who?"), 401), (ConsumerError("no"), 403), (ZeroDivisionError("the secret"), 500)],
)
async def test_a_dependency_of_connect_may_refuse(error: Exception, status_code: int, notes: list[str]) -> None:
    """What a dependency of `connect` raises refuses the handshake; neither hook has been called."""

    def refusing() -> None:
        raise error

    class Chat(Noting):
        async def connect(self, value: Annotated[None, Depends(refusing)]) -> None:
            self.notes.append("connect")

    responses = []
    try:
        async with connect(app_with(Chat), "/ws") as ws:
            responses.append(ws.response)
    except ZeroDivisionError:
        assert status_code == 500
    (response,) = responses
    assert response is not None
    assert response.status_code == status_code
    assert b"secret" not in response.content
    assert notes == []


async def test_overrides_hold_for_connect() -> None:
    """`app.dependency_overrides` hold for the dependencies of `connect` and for theirs."""

    async def real() -> str:
        raise AssertionError

    async def above(value: Annotated[str, Depends(real)]) -> str:
        return f"above {value}"

    class Chat(Telling):
        async def connect(self, value: Annotated[str, Depends(above)]) -> None:
            await self.tell(value)

    app = app_with(Chat)
    for name in ("one", "two"):
        app.dependency_overrides[real] = lambda name=name: name
        async with connect(app, "/ws") as ws:
            assert await ws.receive_json() == f"above {name}"


# Dependencies of routers


async def test_router_dependencies_run_before_those_of_connect(notes: list[str]) -> None:
    """Those of the application, of routers and of the route run from outside in, before `connect`'s."""

    def noting(name: str) -> Any:
        async def note() -> None:
            Noting.notes.append(name)

        return Depends(note)

    class Chat(Noting):
        async def connect(self, value: Annotated[None, noting("connect's")]) -> None:
            self.notes.append("connect")

    router = ConsumerRouter(dependencies=[noting("router")])
    router.add_consumer(route("/ws", Chat), dependencies=[noting("route")])
    outer = APIRouter(prefix="/outer", dependencies=[noting("outer")])
    outer.include_router(router, prefix="/inner", dependencies=[noting("include")])
    app = FastAPI(dependencies=[noting("app")])
    add_channel(app)
    app.include_router(outer)
    async with connect(app, "/outer/inner/ws") as ws:
        assert ws.accepted
    assert notes == ["app", "outer", "include", "router", "route", "connect's", "connect", "disconnect"]


@pytest.mark.parametrize("reject_mode", ["http", "close"])
@pytest.mark.parametrize("error", [HTTPException(401, "who?"), ConsumerError("no")])
async def test_a_dependency_of_a_router_may_refuse(reject_mode: Any, error: Exception, notes: list[str]) -> None:
    """What a router's dependency raises refuses the handshake as the consumer has it."""

    async def refusing() -> None:
        raise error

    class Chat(Noting):
        async def connect(self) -> None:
            self.notes.append("connect")

    Chat.reject_mode = reject_mode
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/ws", Chat)], dependencies=[Depends(refusing)]))
    async with connect(app, "/ws") as ws:
        if reject_mode == "http":
            assert ws.response is not None
            assert ws.response.status_code == (401 if isinstance(error, HTTPException) else 403)
        else:
            assert ws.accepted
            assert (await ws.closed())[0] == (4501 if isinstance(error, HTTPException) else 4503)
    assert notes == []


# Without FastAPI


class Room(Telling):
    groups = ["all"]

    async def connect(self, room: str, page: int = 1) -> None:
        await self.tell([room, page, list(self.path_params.items())])

    async def receive(self, data: Any) -> None:
        await self.send_json({"echo": data})


async def test_a_consumer_is_an_asgi_application() -> None:
    """`as_asgi()` serves on a plain Starlette route, with path and query, hooks, frames and groups."""
    app = Starlette(routes=[WebSocketRoute("/rooms/{room}", Room.as_asgi())])
    async with connect(app, "/rooms/hall?page=2") as ws:
        assert await ws.receive_json() == ["hall", 2, [["room", "hall"]]]
        await ws.send_json("☃")
        assert await ws.receive_json() == {"echo": "☃"}
    async with connect(app, "/rooms/hall?page=x") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422


async def test_as_asgi_sets_attributes() -> None:
    """`as_asgi(**init)` sets attributes of the class for that application alone."""
    app = Starlette(
        routes=[Mount("/a/{room}", Room.as_asgi(groups=["a"])), Mount("/b/{room}", Room.as_asgi(max_frame_size=3))]
    )
    async with connect(app, "/a/x/") as a, connect(app, "/b/y/") as b:
        assert (await a.receive_json())[0] == "x"
        assert (await b.receive_json())[0] == "y"
        for ws in (a, b):
            await ws.send_json("long")
        assert await a.receive_json() == {"echo": "long"}
        assert (await b.receive_json())["errors"]["code"] == "too_large"


async def test_a_consumer_alone_is_an_application() -> None:
    """`as_asgi()` needs no application around it at all."""
    app = WebSocketConsumer.as_asgi()

    async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await app(scope, receive, send)
        else:
            for answer in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{answer}.complete"})

    async with connect(with_lifespan, "/anything") as ws:
        await ws.send_text("hello")
        assert (await ws.receive_json())["errors"]["code"] == "invalid_frame"
