"""The routing table: which consumer serves which path, and with what."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, WebSocket
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount, NoMatchFound, WebSocketRoute

from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import DefinitionError
from fastapi_channels.routing import ConsumerRoute, ConsumerRouter, route
from fastapi_channels.testing import connect


class Shown(JsonConsumer):
    """Shows its client who serves it, and with which path parameters."""

    color = "blue"
    limits: list[int] = []

    async def connect(self) -> None:
        await self.accept()
        await self.show()

    async def show(self) -> None:
        await self.send_json([type(self).__name__, self.color, dict(self.path_params)])


class Typed(JsonConsumer):
    """Asks for parameters of each kind."""

    async def connect(
        self,
        room: str,
        number: Annotated[int, Path(ge=1)],
        limit: int = 10,
        tags: Annotated[list[str], Query()] = [],  # noqa: B006
        token: Annotated[str | None, Header()] = None,
    ) -> None:
        await self.accept()
        await self.send_json({"room": room, "number": number, "limit": limit, "tags": tags, "token": token})


def app_of(*routers: APIRouter, **options: Any) -> FastAPI:
    app = FastAPI()
    add_channel(app, **options)
    for router in routers:
        app.include_router(router)
    return app


async def shown(app: Any, path: str, **options: Any) -> Any:
    """What the consumer at that path shows."""
    async with connect(app, path, **options) as ws:
        assert ws.accepted, ws.response
        return await ws.receive_json()


# The table


async def test_a_table() -> None:
    """Each entry of the table serves its path, with FastAPI's path parameters."""
    app = app_of(ConsumerRouter([route("/ws/{room}", Shown), route("/ws/{room}/{number}", Typed, name="typed")]))
    assert await shown(app, "/ws/lobby") == ["Shown", "blue", {"room": "lobby"}]
    assert await shown(app, "/ws/caf%C3%A9/7?limit=3&tags=a&tags=b", headers={"token": "t"}) == {
        "room": "café",
        "number": 7,
        "limit": 3,
        "tags": ["a", "b"],
        "token": "t",
    }


async def test_the_first_entry_that_fits_serves() -> None:
    """Of two entries for a path the first one counts, as in FastAPI."""
    app = app_of(ConsumerRouter([route("/ws/lobby", Shown, color="red"), route("/ws/{room}", Shown)]))
    assert await shown(app, "/ws/lobby") == ["Shown", "red", {}]
    assert await shown(app, "/ws/other") == ["Shown", "blue", {"room": "other"}]


def test_an_entry_is_a_value() -> None:
    """`route` makes a value that tells what it was made of."""
    entry = route("/ws", Shown, color="red")
    assert entry == ConsumerRoute("/ws", Shown, None, {"color": "red"})
    assert route("/ws", Shown, "name").name == "name"


async def test_the_decorator() -> None:
    """`router.consumer` adds a class to the table and gives it back as it was."""
    router = ConsumerRouter(prefix="/api")

    @router.consumer("/ws/{room}", "decorated")
    @router.consumer("/red/{room}", color="red")
    class Decorated(Shown):
        pass

    assert Decorated.color == "blue"
    app = app_of(router)
    assert await shown(app, "/api/ws/lobby") == ["Decorated", "blue", {"room": "lobby"}]
    assert await shown(app, "/api/red/lobby") == ["Decorated", "red", {"room": "lobby"}]
    assert app.url_path_for("decorated", room="x") == "/api/ws/x"
    assert app.url_path_for("Decorated", room="x") == "/api/red/x"


async def test_one_class_on_two_routes() -> None:
    """The routes of one class are told apart by their names, and share nothing."""
    app = app_of(ConsumerRouter([route("/a", Shown, name="a", color="red"), route("/b", Shown, name="b")]))
    assert await shown(app, "/a") == ["Shown", "red", {}]
    assert await shown(app, "/b") == ["Shown", "blue", {}]


async def test_two_classes_of_one_name() -> None:
    """Two consumer classes of the same name are two consumers."""

    def make(color_: str) -> type[Shown]:
        class Same(Shown):
            color = color_

        return Same

    app = app_of(ConsumerRouter([route("/a", make("red")), route("/b", make("green"))]))
    assert await shown(app, "/a") == ["Same", "red", {}]
    assert await shown(app, "/b") == ["Same", "green", {}]


async def test_an_entry_that_is_added_later() -> None:
    """`add_consumer` adds an entry to a router that is there already."""
    router = ConsumerRouter()
    router.add_consumer(route("/ws", Shown))
    assert await shown(app_of(router), "/ws") == ["Shown", "blue", {}]


# Routers, prefixes, mounts


async def test_prefixes_and_nested_routers() -> None:
    """Prefixes of routers and of `include_router` add up, through ours and FastAPI's routers in any order."""
    consumers = ConsumerRouter([route("/ws/{room}", Shown, name="deep")], prefix="/v1")
    middle = APIRouter(prefix="/middle/{tenant}")
    middle.include_router(consumers, prefix="/chat")
    outer = ConsumerRouter(prefix="/outer")
    outer.include_router(middle)
    app = FastAPI()
    add_channel(app)
    app.include_router(outer, prefix="/api")
    path = app.url_path_for("deep", tenant="acme", room="lobby")
    assert path == "/api/outer/middle/acme/chat/v1/ws/lobby"
    assert await shown(app, path) == ["Shown", "blue", {"tenant": "acme", "room": "lobby"}]


async def test_one_router_in_two_places() -> None:
    """A router that is included twice serves both places."""
    router = ConsumerRouter([route("/ws", Shown)])
    app = FastAPI()
    add_channel(app)
    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")
    for path in ("/a/ws", "/b/ws"):
        assert await shown(app, path) == ["Shown", "blue", {}]


async def test_a_mounted_router() -> None:
    """A ConsumerRouter can be mounted as an application of its own."""
    app = FastAPI()
    add_channel(app)
    app.mount("/mounted/{tenant}", ConsumerRouter([route("/ws/{room}", Shown)]), name="sub")
    assert app.url_path_for("sub", tenant="t", path="/ws/x") == "/mounted/t/ws/x"
    assert await shown(app, "/mounted/acme/ws/lobby") == ["Shown", "blue", {"tenant": "acme", "room": "lobby"}]


async def test_a_sub_application() -> None:
    """The consumers of a mounted application are reached under its path, with its own dependency overrides."""

    def who() -> str:
        return "nobody"

    class Asking(JsonConsumer):
        async def connect(self, name: Annotated[str, Depends(who)]) -> None:
            await self.accept()
            await self.send_json(name)

    app, sub = FastAPI(), FastAPI()
    add_channel(app)
    for each in (app, sub):
        each.include_router(ConsumerRouter([route("/ws", Asking)]))
    app.mount("/sub", sub)
    sub.dependency_overrides[who] = lambda: "sub"
    assert await shown(app, "/sub/ws") == "sub"
    assert await shown(app, "/ws") == "nobody"


async def test_url_path_for() -> None:
    """A consumer's route is found by its name, which is the class's by default, also by what serves it."""
    found: list[str] = []

    class Finding(WebSocketConsumer):
        async def connect(self, room: str) -> None:
            found.append(str(self.websocket.url_for("chat", room="x")))
            found.append(str(self.websocket.app.url_path_for("Finding", room=room)))

    app = app_of(ConsumerRouter([route("/ws/{room}", Finding), route("/chat/{room}", Shown, name="chat")]))
    assert app.url_path_for("chat", room="x") == "/chat/x"
    async with connect(app, "/ws/lobby") as ws:
        assert ws.accepted
    assert found == ["ws://testserver/chat/x", "/ws/lobby"]
    with pytest.raises(NoMatchFound):
        app.url_path_for("Shown", room="x")


async def test_http_routes_on_the_router() -> None:
    """HTTP routes and FastAPI's own websocket routes stand on the same router as consumers."""
    router = ConsumerRouter([route("/ws", Shown)], prefix="/api", tags=["chat"])

    @router.get("/ws")
    async def page(layer: Layer) -> str:
        return "page"

    @router.websocket("/plain")
    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json("plain")
        await websocket.close()

    app = app_of(router)
    assert await shown(app, "/api/ws") == ["Shown", "blue", {}]
    assert await shown(app, "/api/plain") == "plain"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/api/ws")).json() == "page"
        assert (await client.get("/openapi.json")).json()["paths"].keys() == {"/api/ws"}


# What stands before connect


async def test_dependencies_of_routers() -> None:
    """The dependencies of the application, of routers, of includes and of an entry run once each, outermost first."""
    order: list[str] = []

    def noting(name: str) -> Any:
        async def dependency() -> AsyncIterator[None]:
            order.append(f"{name} opens")
            yield
            order.append(f"{name} closes")

        return Depends(dependency)

    class Noting(WebSocketConsumer):
        async def connect(self, own: Annotated[None, noting("parameter")]) -> None:
            order.append("connect")

        async def disconnect(self, code: int) -> None:
            order.append("disconnect")

    router = ConsumerRouter(dependencies=[noting("router")])
    router.consumer("/ws", dependencies=[noting("entry")])(Noting)
    app = FastAPI(dependencies=[noting("app")])
    add_channel(app)
    app.include_router(router, dependencies=[noting("include")])
    async with connect(app, "/ws") as ws:
        assert ws.accepted
        opened = ["app opens", "include opens", "router opens", "entry opens", "parameter opens", "connect"]
        assert order == opened
    closed = ["disconnect", "parameter closes", "entry closes", "router closes", "include closes", "app closes"]
    assert order == opened + closed


async def test_a_dependency_of_a_router_refuses() -> None:
    """What the dependency of a router raises refuses the handshake, before anything of the consumer has run."""
    begun: list[str] = []

    class Begun(WebSocketConsumer):
        async def connect(self) -> None:
            begun.append("connect")

        async def disconnect(self, code: int) -> None:
            begun.append("disconnect")

    async def guard(token: Annotated[str, Header()] = "") -> None:
        if token != "secret":
            raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})

    app = app_of(ConsumerRouter([route("/ws", Begun)], dependencies=[Depends(guard)]))
    async with connect(app, "/ws") as ws:
        assert ws.response is not None
        assert (ws.response.status_code, ws.response.json()) == (401, {"detail": "who are you?"})
        assert ws.response.headers["www-authenticate"] == "Bearer"
    assert begun == []
    async with connect(app, "/ws", headers={"token": "secret"}) as ws:
        assert ws.accepted
    assert begun == ["connect", "disconnect"]


async def test_a_parameter_that_does_not_validate() -> None:
    """On a consumer's route a parameter that doesn't validate is refused with 422 and the body of FastAPI's views."""
    app = app_of(ConsumerRouter([route("/ws/{room}/{number}", Typed)]))

    @app.get("/http/{room}/{number}")
    async def view(room: str, number: Annotated[int, Path(ge=1)], limit: int = 10) -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        for rest in ("lobby/seven", "lobby/0", "lobby/7?limit=x", "lobby/x?limit=x"):
            expected = await client.get(f"/http/{rest}")
            assert expected.status_code == 422
            async with connect(app, f"/ws/{rest}") as ws:
                assert ws.response is not None
                assert ws.response.status_code == 422
                assert ws.response.json() == expected.json()


async def test_websocket_routes_of_the_user_keep_theirs() -> None:
    """A parameter that doesn't validate on FastAPI's own websocket routes is refused as FastAPI does it."""
    plain, app = FastAPI(), app_of(ConsumerRouter([route("/ws/{room}/{number}", Typed)]))
    for each in (plain, app):

        @each.websocket("/own/{number}")
        async def own(websocket: WebSocket, number: int) -> None: ...

    async with connect(plain, "/own/x") as expected, connect(app, "/own/x") as ws:
        assert ws.response == expected.response
        assert (ws.close_code, ws.close_reason) == (expected.close_code, expected.close_reason)


@pytest.mark.parametrize("path", ["/nowhere", "/ws", "/ws/lobby/", "/ws/lobby/more", "/WS/lobby", "/"])
async def test_a_path_without_a_route(path: str) -> None:
    """A path that has no route keeps Starlette's answer, a plain 403."""
    plain, app = FastAPI(redirect_slashes=False), app_of(ConsumerRouter([route("/ws/{room}", Shown)]))
    app.router.redirect_slashes = False
    async with connect(plain, path) as expected, connect(app, path) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 403
        assert ws.response == expected.response


async def test_no_http_on_a_consumers_route() -> None:
    """An HTTP request to a consumer's path is not found."""
    app = app_of(ConsumerRouter([route("/ws", Shown)]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/ws")).status_code == 404


# Attributes that a route sets


async def test_attributes_of_a_route() -> None:
    """What an entry names beside the path is set for that route's connections, and for no others."""

    class Grouped(Shown):
        groups = ["news"]

        async def connect(self) -> None:
            await self.accept()
            await self.send_json([sorted(type(self).groups), self.color])

    router = ConsumerRouter(
        [route("/sport", Grouped, groups=["sport"], color="red"), route("/news", Grouped)],
    )
    app = app_of(router)
    assert await shown(app, "/sport") == [["sport"], "red"]
    assert await shown(app, "/news") == [["news"], "blue"]
    assert Grouped.groups == ["news"]


async def test_settings_of_a_route() -> None:
    """A route may set what a consumer may differ in, such as the largest frame or how it refuses."""

    class Limited(JsonConsumer):
        async def connect(self, ok: bool = True) -> None:
            if not ok:
                raise HTTPException(403)

    app = app_of(ConsumerRouter([route("/ws", Limited, max_frame_size=3, reject_mode="close")]), max_frame_size=100)
    async with connect(app, "/ws") as ws:
        await ws.send_json("much too long")
        assert (await ws.receive_json())["errors"]["code"] == "too_large"
    async with connect(app, "/ws?ok=false") as ws:
        assert ws.accepted
        assert await ws.closed() == (4503, "Forbidden")


async def test_layers_of_a_route() -> None:
    """A route may say which layer its connections live on."""
    app = app_of(
        ConsumerRouter([route("/ws", Shown), route("/jobs", Shown, channel_layer_alias="jobs", name="jobs")]),
        channel_layers={"default": "memory://", "jobs": "memory://"},
    )
    channels = app.state.channels
    async with connect(app, "/jobs") as ws:
        await ws.receive_json()
        assert len(channels.layer("jobs")._attached) == 1
        assert len(channels.layer()._attached) == 0


@pytest.mark.parametrize("name", ["colour", "_session", "__init__", "__class__", "no_such"])
def test_an_attribute_that_is_not_there(name: str) -> None:
    """An attribute that the class doesn't have, or that is private, is an error when the table is made."""
    told = f"^Shown has no attribute '{name}' that a route could set$"
    init: dict[str, Any] = {name: 1}
    with pytest.raises(DefinitionError, match=told):
        ConsumerRouter([route("/ws", Shown, **init)])
    with pytest.raises(DefinitionError, match=told):
        ConsumerRouter().consumer("/ws", **init)(Shown)
    with pytest.raises(DefinitionError, match=told):
        Shown.as_asgi(**init)


@pytest.mark.parametrize("name", ["connect", "receive", "disconnect", "send", "close", "user", "websocket"])
def test_an_attribute_that_is_no_setting(name: str) -> None:
    """A hook, a method or a property of every consumer is nothing that a route could set."""
    init: dict[str, Any] = {name: "x"}
    with pytest.raises(DefinitionError, match=f"Shown.*{name}"):
        ConsumerRouter([route("/ws", Shown, **init)])


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ({"groups": "news"}, "Shown.groups is a list of names, not 'news'"),
        ({"forward_events": "chat.message"}, "Shown.forward_events is a list of types or True, not one type"),
    ],
)
def test_an_attribute_with_a_bad_value(init: dict[str, Any], told: str) -> None:
    """What would be an error in the class's body is one in the table too."""
    with pytest.raises(DefinitionError) as caught:
        ConsumerRouter([route("/ws", Shown, **init)])
    assert str(caught.value) == told


@pytest.mark.parametrize("what", [Shown(), "Shown", None, BaseModel, WebSocketRoute, lambda websocket: None])
def test_what_is_no_consumer(what: Any) -> None:
    """A table takes consumer classes and nothing else."""
    with pytest.raises(DefinitionError, match=r"^a route needs a consumer class, not "):
        ConsumerRouter([route("/ws", what)])


def test_what_is_no_entry() -> None:
    """A table takes what `route` makes; a pair or Starlette's own route is an error that says so."""
    for entry in (("/ws", Shown), WebSocketRoute("/ws", Shown.as_asgi())):
        with pytest.raises((TypeError, DefinitionError), match="route"):
            ConsumerRouter([entry])  # type: ignore[list-item]


def test_a_connect_that_asks_for_what_there_is_not() -> None:
    """What is wrong with a hook is told when the table is made, with the class and the parameter."""
    from fastapi import BackgroundTasks, Request

    class WantsRequest(WebSocketConsumer):
        async def connect(self, request: Request) -> None: ...

    class WantsTasks(WebSocketConsumer):
        async def connect(self, tasks: BackgroundTasks) -> None: ...

    class WantsAll(WebSocketConsumer):
        async def connect(self, *rooms: str) -> None: ...

    for consumer, parameter in ((WantsRequest, "request"), (WantsTasks, "tasks"), (WantsAll, "rooms")):
        with pytest.raises(DefinitionError, match=f"{consumer.__name__}.connect, parameter '{parameter}'"):
            ConsumerRouter([route("/ws", consumer)])


def test_a_path_that_fastapi_would_not_take() -> None:
    """A path that doesn't begin with a slash is FastAPI's error, when the table is made."""
    with pytest.raises(AssertionError, match="must start with '/'"):
        ConsumerRouter([route("ws", Shown)], prefix="api")


# as_asgi


async def test_as_asgi_alone() -> None:
    """A consumer is an ASGI application of its own, whatever the path."""
    app = Shown.as_asgi()
    assert await shown(app, "/") == ["Shown", "blue", {}]
    assert await shown(app, "/any/where") == ["Shown", "blue", {}]


async def test_as_asgi_with_attributes() -> None:
    """`as_asgi` takes attributes as a route does."""
    assert await shown(Shown.as_asgi(color="red"), "/") == ["Shown", "red", {}]
    assert Shown.color == "blue"


async def test_as_asgi_takes_parameters() -> None:
    """Query and header parameters, dependencies and validation work without FastAPI's routes."""

    async def double(number: int) -> int:
        return 2 * number

    class Doubling(JsonConsumer):
        async def connect(self, doubled: Annotated[int, Depends(double)], token: Annotated[str, Header()]) -> None:
            await self.accept()
            await self.send_json([doubled, token])

    app = Doubling.as_asgi()
    assert await shown(app, "/?number=4", headers={"token": "t"}) == [8, "t"]
    async with connect(app, "/?number=x", headers={"token": "t"}) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422
        assert ws.response.json()["detail"][0]["loc"] == ["query", "number"]


async def test_as_asgi_on_starlettes_routes() -> None:
    """Under Starlette's routes and mounts the path parameters are theirs, converted and validated."""

    class Numbered(JsonConsumer):
        async def connect(self, room: str, number: int) -> None:
            await self.accept()
            await self.send_json([room, number, dict(self.path_params)])

    app = Starlette(
        routes=[
            WebSocketRoute("/ws/{room}/{number:int}", Numbered.as_asgi(), name="numbered"),
            Mount("/m/{room}/{number}", Numbered.as_asgi()),
        ]
    )
    assert app.url_path_for("numbered", room="x", number=7) == "/ws/x/7"
    assert await shown(app, "/ws/lobby/7") == ["lobby", 7, {"room": "lobby", "number": 7}]
    room, number, _ = await shown(app, "/m/lobby/7/")
    assert (room, number) == ("lobby", 7)
    async with connect(app, "/m/lobby/seven/") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422


async def test_as_asgi_in_a_fastapi_application() -> None:
    """Mounted in a FastAPI application, a consumer has its layers and its dependency overrides."""

    def who() -> str:
        return "nobody"

    class Asking(ActionConsumer):
        async def connect(self, name: Annotated[str, Depends(who)], layer: Layer) -> None:
            await self.accept()
            await self.send_json([name, layer is self.layer, layer is app.state.channels.layer()])

        @action
        async def ask(self, name: Annotated[str, Depends(who)]) -> str:
            return name

    app = FastAPI()
    add_channel(app)
    app.mount("/mounted", Asking.as_asgi())
    app.router.routes.append(WebSocketRoute("/route", Asking.as_asgi()))
    for path in ("/mounted/", "/route"):
        assert await shown(app, path) == ["nobody", True, True]
    app.dependency_overrides[who] = lambda: "overridden"
    for path in ("/mounted/", "/route"):
        async with connect(app, path) as ws:
            assert await ws.receive_json() == ["overridden", True, True]
            await ws.send_json({"action": "ask", "request_id": 1})
            assert (await ws.receive_json())["data"] == "overridden"


async def test_as_asgi_serves_websockets_only() -> None:
    """An HTTP request to a consumer's ASGI application is an error."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=Shown.as_asgi()), base_url="http://test") as client:
        with pytest.raises(RuntimeError, match=r"^Shown serves WebSockets, not 'http'$"):
            await client.get("/")


def test_as_asgi_tells_at_once_what_is_wrong() -> None:
    """What is wrong with the class is told by `as_asgi`, and not at a connection."""

    class WantsBody(WebSocketConsumer):
        async def connect(self, **rooms: str) -> None: ...

    with pytest.raises(DefinitionError, match=r"WantsBody\.connect, parameter 'rooms'"):
        WantsBody.as_asgi()
