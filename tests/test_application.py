"""An application's channels: opened and closed with it, and found from everywhere in it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from asgi_lifespan import LifespanManager
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute

from fastapi_channels import Channels, Layer, add_channel, channel_layer, get_channel_layer
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event
from fastapi_channels.exceptions import InvalidGroupName, LayerUnavailable, SettingsError
from fastapi_channels.layers import ChannelLayer, MemoryLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import WebSocketSession, connect
from fastapi_channels.testing.plugin import CaptureGroupSends

TWO_LAYERS = {"default": "memory://", "jobs": "memory://"}


class Room(JsonConsumer):
    """Is in the room, and passes on what it hears."""

    groups = ["room"]
    forward_events = True


class Whose(ActionConsumer):
    """Tells on which layer each of its hooks and handlers finds itself."""

    async def connect(self) -> None:
        self.found = [get_channel_layer()]
        self.heard = asyncio.Event()
        self.task = asyncio.create_task(self.look())

    async def look(self) -> ChannelLayer:
        return get_channel_layer()

    @action
    async def look_around(self) -> list[bool]:
        await self.layer.send(self.channel_name, {"type": "look"})
        async with asyncio.timeout(5):
            await self.heard.wait()
        self.found += [get_channel_layer(), await self.task, await asyncio.to_thread(get_channel_layer)]
        return [layer is self.layer for layer in self.found]

    @action
    def look_in_a_thread(self) -> bool:
        return get_channel_layer() is self.layer

    @event("look")
    async def on_look(self) -> None:
        self.found.append(get_channel_layer())
        self.heard.set()


class SubApplication(FastAPI):
    """An application for mounting, with a consumer and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.include_router(ConsumerRouter([route("/ws", Room), route("/whose", Whose)]))

        @self.get("/say")
        async def say(layer: Layer) -> None:
            await layer.group_send("room", {"type": "said"})

        @self.get("/same")
        async def same(layer: Layer) -> bool:
            return layer is get_channel_layer()


@asynccontextmanager
async def http(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of an application that does not run the lifespan."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def said(ws: WebSocketSession) -> Any:
    return await ws.receive_json(timeout=5)


# add_channel


def test_add_channel_gives_the_channels() -> None:
    """What add_channel returns is `app.state.channels`, with the settings and the layers by alias."""
    app = FastAPI()
    channels = add_channel(app, channel_layers=TWO_LAYERS, capacity=2000)
    assert app.state.channels is channels
    assert isinstance(channels, Channels)
    assert channels.settings.capacity == 2000
    assert list(channels.layers) == ["default", "jobs"]
    assert channels.layer() is channels.layers["default"]
    assert channels.layer("jobs") is channels.layers["jobs"]


def test_a_layer_that_is_not_there() -> None:
    """Asking for an alias that is not in CHANNEL_LAYERS tells those that are."""
    channels = add_channel(FastAPI(), channel_layers=TWO_LAYERS)
    with pytest.raises(SettingsError) as caught:
        channels.layer("mail")
    assert str(caught.value) == "there is no channel layer 'mail' in CHANNEL_LAYERS, only: default, jobs"


def test_add_channel_twice() -> None:
    """A second add_channel on one application is an error, and changes nothing."""
    app = FastAPI()
    channels = add_channel(app)
    with pytest.raises(RuntimeError, match=r"^add_channel was called twice on one application$"):
        add_channel(app, capacity=2000)
    assert app.state.channels is channels
    assert channels.settings.capacity == 1000


def test_add_channel_that_failed_can_be_called_again() -> None:
    """A mistake in the settings leaves the application as it was."""
    app = FastAPI()
    with pytest.raises(SettingsError):
        add_channel(app, capacity=1)
    add_channel(app, capacity=2000)
    assert app.state.channels.settings.capacity == 2000


async def test_add_channel_too_late() -> None:
    """An application that has started takes no channels, and is left as it was."""
    app = FastAPI()
    async with http(app) as client:
        assert (await client.get("/nowhere")).status_code == 404
    with pytest.raises(RuntimeError):
        add_channel(app)
    assert not hasattr(app.state, "channels")


@pytest.mark.parametrize("first", ["add_channel", "include_router"])
async def test_before_or_after_include_router(first: str) -> None:
    """It makes no difference whether add_channel or include_router comes first."""
    app = FastAPI()
    router = ConsumerRouter([route("/ws", Room)])
    if first == "add_channel":
        add_channel(app, channel_layers=TWO_LAYERS)
        app.include_router(router, prefix="/api")
    else:
        app.include_router(router, prefix="/api")
        add_channel(app, channel_layers=TWO_LAYERS)
    async with connect(app, "/api/ws") as ws:
        await app.state.channels.layer().group_send("room", {"type": "said"})
        assert await said(ws) == {"type": "said"}


# The lifespan


async def test_layers_live_as_long_as_the_application() -> None:
    """All layers are opened before the application's own lifespan begins and closed after it has ended, each time."""
    seen: list[tuple[str, bool, bool]] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        seen.append(("start", channels.layer().is_open, channels.layer("jobs").is_open))
        await get_channel_layer("jobs").send("queue", {"type": "x"})
        yield {"pool": "open"}
        seen.append(("stop", channels.layer().is_open, channels.layer("jobs").is_open))

    app = FastAPI(lifespan=lifespan)
    channels = add_channel(app, channel_layers=TWO_LAYERS)
    for _ in range(2):
        assert not channels.is_open
        async with LifespanManager(app) as manager:
            assert channels.is_open
            assert await channels.layer("jobs").receive("queue") == {"type": "x"}
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=manager.app)) as client:
                assert (await client.get("http://test/docs")).status_code == 200
        assert not any(layer.is_open for layer in channels.layers.values())
    assert seen == [("start", True, True), ("stop", True, True)] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_on_event_handlers() -> None:
    """Handlers of the kind before lifespans run too, while the layers are open."""
    if not hasattr(FastAPI, "on_event"):
        pytest.skip("this FastAPI has no on_event")
    app = FastAPI()
    seen: list[tuple[str, bool]] = []

    @app.on_event("startup")
    async def start() -> None:
        seen.append(("start", channels.is_open))

    channels = add_channel(app)

    @app.on_event("shutdown")
    async def stop() -> None:
        seen.append(("stop", channels.is_open))

    async with LifespanManager(app):
        pass
    assert seen == [("start", True), ("stop", True)]


@pytest.mark.parametrize("first", ["add_channel", "include_router"])
async def test_the_lifespan_of_a_router(first: str) -> None:
    """The lifespan of an included router runs, while the layers are open."""
    seen: list[tuple[str, bool]] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        seen.append(("start", channels.is_open))
        yield
        seen.append(("stop", channels.is_open))

    app = FastAPI()
    router = ConsumerRouter(lifespan=lifespan)
    if first == "include_router":
        app.include_router(router)
    channels = add_channel(app)
    if first == "add_channel":
        app.include_router(router)
    async with LifespanManager(app):
        pass
    assert seen == [("start", True), ("stop", True)]


async def test_a_start_that_fails_closes_the_layers() -> None:
    """If the application's own lifespan fails to start, the layers are closed again."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise KeyError("own")
        yield

    app = FastAPI(lifespan=lifespan)
    channels = add_channel(app)
    with pytest.raises(KeyError):
        async with LifespanManager(app):
            pass
    assert not channels.is_open


class Unreachable(MemoryLayer):
    """A layer whose broker is away."""

    async def open(self) -> None:
        raise LayerUnavailable("the broker is away")


class Stubborn(MemoryLayer):
    """A layer that fails to close."""

    async def close(self) -> None:
        await super().close()
        raise KeyError("close")


async def test_a_layer_that_does_not_open_closes_the_others() -> None:
    """If one layer can't be opened, the application doesn't start, and those opened before it are closed."""
    first = MemoryLayer()
    app = FastAPI()
    add_channel(app, channel_layers={"default": first, "away": Unreachable()})
    with pytest.raises(LayerUnavailable):
        async with LifespanManager(app):
            pass
    assert not first.is_open
    with pytest.raises(SettingsError, match="no application"):
        get_channel_layer()


async def test_a_layer_that_does_not_close_leaves_none_open() -> None:
    """If one layer fails to close, the others are closed all the same, and the failure is told."""
    first, last = MemoryLayer(), MemoryLayer()
    app = FastAPI()
    add_channel(app, channel_layers={"default": first, "stubborn": Stubborn(), "last": last})
    with pytest.raises(KeyError):
        async with LifespanManager(app):
            pass
    assert not first.is_open
    assert not last.is_open


async def test_a_layer_of_somebody_else_stays_open(memory_layer: MemoryLayer) -> None:
    """A layer that was open before the application is not closed with it; one that was not is."""
    app = FastAPI()
    own = MemoryLayer()
    add_channel(app, channel_layers={"default": memory_layer, "own": own})
    async with LifespanManager(app):
        assert own.is_open
    assert memory_layer.is_open
    assert not own.is_open


def test_one_event_loop_after_another() -> None:
    """An application can be run on one event loop and then on another, as test suites do."""
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/ws", Room)]))

    async def talk() -> None:
        async with connect(app, "/ws") as ws:
            await app.state.channels.layer().group_send("room", {"type": "said"})
            assert await said(ws) == {"type": "said"}

    for _ in range(2):
        asyncio.run(talk())


# Layer, channel_layer


async def test_layer_in_views() -> None:
    """`Layer` gives the default layer to async views, and to plain ones, which use its blocking twin."""
    app = FastAPI()
    channels = add_channel(app, channel_layers=TWO_LAYERS)
    app.include_router(ConsumerRouter([route("/ws", Room)]))

    @app.post("/async")
    async def announce(text: str, layer: Layer) -> dict[str, Any]:
        receipt = await layer.group_send("room", {"type": "said", "text": text})
        return {"offset": receipt.offset, "same": layer is channels.layer()}

    @app.post("/plain")
    def announce_plainly(text: str, layer: Layer) -> dict[str, Any]:
        receipt = layer.sync.group_send("room", {"type": "said", "text": text})
        return {"offset": receipt.offset, "same": layer is channels.layer()}

    async with connect(app, "/ws") as ws, http(app) as client:
        for path in ("/async", "/plain"):
            response = await client.post(path, params={"text": path})
            assert response.json() == {"offset": None, "same": True}
            assert await said(ws) == {"type": "said", "text": path}


async def test_channel_layer_in_views(capture_group_sends: CaptureGroupSends) -> None:
    """`channel_layer("jobs")` gives the layer of that alias, in annotations and defaults, to whatever FastAPI calls."""
    app = FastAPI()
    channels = add_channel(app, channel_layers=TWO_LAYERS)
    sent = capture_group_sends(channels.layer("jobs"))
    jobs = channel_layer("jobs")

    async def dependency(layer: Annotated[ChannelLayer, Depends(jobs)]) -> ChannelLayer:
        return layer

    @app.post("/")
    async def view(
        annotated: Annotated[ChannelLayer, Depends(channel_layer("jobs"))],
        inner: Annotated[ChannelLayer, Depends(dependency)],
        default: ChannelLayer = Depends(jobs),
    ) -> None:
        for layer in (annotated, inner, default):
            await layer.group_send("workers", {"type": "job"})

    async with connect(app, "/"), http(app) as client:
        assert (await client.post("/")).status_code == 200
    assert [one.group for one in sent] == ["workers"] * 3


async def test_channel_layer_that_is_not_there() -> None:
    """A view that asks for an alias that is not in CHANNEL_LAYERS fails with what there is."""
    app = FastAPI()
    add_channel(app)

    @app.get("/")
    async def view(layer: Annotated[ChannelLayer, Depends(channel_layer("mail"))]) -> None: ...

    async with http(app) as client:
        with pytest.raises(SettingsError, match="there is no channel layer 'mail' in CHANNEL_LAYERS, only: default"):
            await client.get("/")


async def test_layers_in_hooks() -> None:
    """`Layer` and `channel_layer` stand in the hooks and actions of consumers too."""

    class Asking(ActionConsumer):
        async def connect(self, layer: Layer, jobs: Annotated[ChannelLayer, Depends(channel_layer("jobs"))]) -> None:
            self.given = [layer is get_channel_layer(), jobs is get_channel_layer("jobs")]

        @action
        async def ask(self, layer: Layer) -> list[bool]:
            return [*self.given, layer is self.layer]

    app = FastAPI()
    add_channel(app, channel_layers=TWO_LAYERS)
    app.include_router(ConsumerRouter([route("/ws", Asking)]))
    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "ask", "request_id": 1})
        assert (await said(ws))["data"] == [True, True, True]


async def test_background_tasks() -> None:
    """Background tasks of a view, async and plain, can send to groups by the layer that they are given or find."""
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/ws", Room)]))

    async def later(layer: ChannelLayer) -> None:
        await layer.group_send("room", {"type": "later"})
        await get_channel_layer().group_send("room", {"type": "found"})

    def plainly(layer: ChannelLayer) -> None:
        layer.sync.group_send("room", {"type": "plainly"})
        get_channel_layer().sync.group_send("room", {"type": "plainly.found"})

    @app.post("/")
    async def view(layer: Layer, tasks: BackgroundTasks) -> None:
        tasks.add_task(later, layer)
        tasks.add_task(plainly, layer)

    async with connect(app, "/ws") as ws, http(app) as client:
        assert (await client.post("/")).status_code == 200
        types = [(await said(ws))["type"] for _ in range(4)]
    assert types == ["later", "found", "plainly", "plainly.found"]


async def test_an_application_whose_lifespan_nobody_runs() -> None:
    """Where nobody runs the lifespan, the layer is opened when a view first asks for it."""
    app = FastAPI()
    channels = add_channel(app)

    @app.post("/")
    async def view(layer: Layer) -> bool:
        await layer.group_send("room", {"type": "x"})
        return layer.is_open

    async with http(app) as client:
        assert (await client.post("/")).json() is True
    await channels.close()
    assert not channels.is_open


# Errors in views


class Away(MemoryLayer):
    """A layer whose broker goes away while it is open."""

    async def _publish(self, *args: Any, **kwargs: Any) -> Any:
        raise LayerUnavailable("connection to 10.0.0.7 lost")


def announcing(**options: Any) -> FastAPI:
    """An application with a view that sends to a group that the client names."""
    app = FastAPI()
    add_channel(app, **options)

    @app.post("/rooms/{room}")
    async def announce(room: str, layer: Layer) -> None:
        await layer.group_send(room, {"type": "said"})

    return app


async def test_a_bad_group_name_in_a_view() -> None:
    """A name that the client made up and that is none is the client's mistake: 422 with what is wrong."""
    async with http(announcing()) as client:
        response = await client.post("/rooms/" + "x" * 201)
        assert response.status_code == 422
        assert "at most 200 characters" in response.text


async def test_a_layer_that_is_away_in_a_view() -> None:
    """A layer that is away makes a view answer 503 with Retry-After, and nothing of the inside."""
    async with http(announcing(channel_layers={"default": Away()})) as client:
        response = await client.post("/rooms/lobby")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert "10.0.0.7" not in response.text


@pytest.mark.parametrize("when", ["before", "after"])
async def test_own_handlers_for_the_layers_errors(when: str) -> None:
    """An application's own exception handlers are asked, whether they were there before add_channel or came after."""
    app = FastAPI()
    if when == "after":
        add_channel(app)

    @app.exception_handler(InvalidGroupName)
    async def own(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse("own", 400)

    if when == "before":
        add_channel(app)

    @app.post("/")
    async def view(layer: Layer) -> None:
        await layer.group_send("", {"type": "x"})

    async with http(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.json()) == (400, "own")


async def test_no_handlers_for_the_layers_errors() -> None:
    """With `add_exception_handlers=False` the layer's errors are the application's own business."""
    async with http(announcing(add_exception_handlers=False)) as client:
        with pytest.raises(InvalidGroupName):
            await client.post("/rooms/" + "x" * 201)


# get_channel_layer


async def test_get_channel_layer_in_views() -> None:
    """Views, what they call, their tasks and their threads find the layer of their application."""
    app = FastAPI()
    channels = add_channel(app, channel_layers=TWO_LAYERS)

    async def find() -> ChannelLayer:
        return get_channel_layer()

    @app.get("/async")
    async def view() -> list[bool]:
        found = [
            get_channel_layer(),
            await find(),
            await asyncio.create_task(find()),
            await asyncio.to_thread(get_channel_layer),
        ]
        return [*(layer is channels.layer() for layer in found), get_channel_layer("jobs") is channels.layer("jobs")]

    @app.get("/plain")
    def plain_view() -> list[bool]:
        return [get_channel_layer() is channels.layer(), get_channel_layer("jobs") is channels.layer("jobs")]

    other = FastAPI()
    add_channel(other)
    async with LifespanManager(other), LifespanManager(app), http(app) as client:
        assert (await client.get("/async")).json() == [True] * 5
        assert (await client.get("/plain")).json() == [True] * 2


async def test_get_channel_layer_in_consumers() -> None:
    """Hooks, actions and handlers of consumers, their tasks and their threads find the layer of their application."""
    apps = [FastAPI(), FastAPI()]
    for app in apps:
        add_channel(app)
        app.include_router(ConsumerRouter([route("/ws", Whose)]))
    async with LifespanManager(apps[1]), connect(apps[0], "/ws") as ws:
        await ws.send_json({"action": "look_around", "request_id": 1})
        assert (await said(ws))["data"] == [True] * 5
        await ws.send_json({"action": "look_in_a_thread", "request_id": 2})
        assert (await said(ws))["data"] is True


async def test_get_channel_layer_elsewhere() -> None:
    """Code outside of an application finds the one that is running, from any thread."""
    app = FastAPI()
    channels = add_channel(app)
    found: list[ChannelLayer] = []
    async with LifespanManager(app):
        assert get_channel_layer() is channels.layer()
        thread = threading.Thread(target=lambda: found.append(get_channel_layer()))
        thread.start()
        thread.join()
        with pytest.raises(SettingsError, match="there is no channel layer 'mail'"):
            get_channel_layer("mail")
    assert found == [channels.layer()]


async def test_get_channel_layer_without_an_application() -> None:
    """Where no application runs, before it starts and after it stops, get_channel_layer says so."""
    expected = "^no application with channels is running here; get_channel_layer needs one$"
    app = FastAPI()
    add_channel(app)
    with pytest.raises(SettingsError, match=expected):
        get_channel_layer()
    async with LifespanManager(app):
        get_channel_layer()
    with pytest.raises(SettingsError, match=expected):
        get_channel_layer()


async def test_get_channel_layer_beside_two_applications() -> None:
    """Code outside of two running applications is told that it has to say which."""
    apps = [FastAPI(), FastAPI()]
    for app in apps:
        add_channel(app)
    async with LifespanManager(apps[0]), LifespanManager(apps[1]):
        with pytest.raises(SettingsError) as caught:
            get_channel_layer("jobs")
    expected = "2 applications with channels are running here; use app.state.channels.layer('jobs')"
    assert str(caught.value) == expected


def test_what_ran_on_an_event_loop_that_has_ended_is_not_running() -> None:
    """Consumers without add_channel, which nothing closes, count as running no longer than their event loop."""
    app = FastAPI()
    app.include_router(ConsumerRouter([route("/ws", Room)]))

    async def talk(app: Any) -> None:
        async with connect(app, "/ws") as ws:
            assert ws.accepted
            get_channel_layer()

    for each in (Room.as_asgi(), app):
        asyncio.run(talk(each))
        with pytest.raises(SettingsError, match="no application"):
            get_channel_layer()


# Applications in applications


async def test_a_mounted_application_uses_the_enclosing_ones() -> None:
    """The consumers and views of a mounted application without add_channel are on the enclosing one's layers."""
    app, sub = FastAPI(), SubApplication()
    channels = add_channel(app)
    app.include_router(ConsumerRouter([route("/ws", Room)]))
    app.mount("/sub", sub)
    async with connect(app, "/ws") as outer, connect(app, "/sub/ws") as inner, http(app) as client:
        assert (await client.get("/sub/same")).json() is True
        await client.get("/sub/say")
        assert await said(outer) == await said(inner) == {"type": "said"}
        await channels.layer().group_send("room", {"type": "more"})
        assert await said(outer) == await said(inner) == {"type": "more"}
        async with connect(app, "/sub/whose") as ws:
            await ws.send_json({"action": "look_around", "request_id": 1})
            assert (await said(ws))["data"] == [True] * 5


async def test_a_mounted_application_with_its_own() -> None:
    """A mounted application with its own add_channel is on its own layers, and the enclosing one is not."""
    app, sub = FastAPI(), SubApplication()
    channels, own = add_channel(app), add_channel(sub, capacity=2000)
    app.include_router(ConsumerRouter([route("/ws", Room)]))
    app.mount("/sub", sub)
    async with connect(app, "/ws") as outer, connect(app, "/sub/ws") as inner, http(app) as client:
        assert (await client.get("/sub/same")).json() is True
        await client.get("/sub/say")
        assert await said(inner) == {"type": "said"}
        await channels.layer().group_send("room", {"type": "outer"})
        assert await said(outer) == {"type": "outer"}
        await own.layer().group_send("room", {"type": "inner"})
        assert await said(inner) == {"type": "inner"}
        async with connect(app, "/sub/whose") as ws:
            await ws.send_json({"action": "look_around", "request_id": 1})
            assert (await said(ws))["data"] == [True] * 5


async def test_a_view_after_a_mounted_applications_view() -> None:
    """A mounted application's view that ran does not change what the next view of the enclosing one finds."""
    app, sub = FastAPI(), SubApplication()
    channels = add_channel(app)
    add_channel(sub)
    app.mount("/sub", sub)

    @app.get("/")
    async def view() -> bool:
        return get_channel_layer() is channels.layer()

    async with connect(app, "/"), http(app) as client:
        assert (await client.get("/sub/same")).json() is True
        assert (await client.get("/")).json() is True


async def test_without_add_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application without add_channel works on the environment and defaults, and has a layer of its own."""
    monkeypatch.setenv("CHANNELS_CAPACITY", "2000")
    capacities: list[int] = []

    class Counting(Room):
        async def connect(self) -> None:
            capacities.append(self.layer.capacity)

    apps = [SubApplication(), SubApplication()]
    for app in apps:
        app.include_router(ConsumerRouter([route("/counting", Counting)]))
    async with connect(apps[0], "/counting") as one, connect(apps[1], "/ws") as two, http(apps[0]) as client:
        await client.get("/say")
        assert await said(one) == {"type": "said"}
        assert await two.receive_nothing(timeout=0.01)
    assert capacities == [2000]


# What is checked at the start


class OnMail(WebSocketConsumer):
    """Lives on a layer that is not there."""

    channel_layer_alias = "mail"


def included(app: FastAPI) -> None:
    app.include_router(ConsumerRouter([route("/ws/{room}", OnMail)]))


def nested(app: FastAPI) -> None:
    outer = APIRouter(prefix="/outer")
    outer.include_router(ConsumerRouter([route("/ws", OnMail)], prefix="/inner"))
    app.include_router(outer, prefix="/api")


def mounted(app: FastAPI) -> None:
    sub, inner = FastAPI(), FastAPI()
    inner.include_router(ConsumerRouter([route("/ws", OnMail)], prefix="/v1"))
    sub.mount("/inner", inner)
    app.mount("/sub", sub)


def mounted_router(app: FastAPI) -> None:
    app.mount("/router", ConsumerRouter([route("/ws", OnMail)]))


def mounted_starlette(app: FastAPI) -> None:
    app.mount("/star", Starlette(routes=[Mount("/deep", ConsumerRouter([route("/ws", OnMail)]))]))


def by_route_init(app: FastAPI) -> None:
    app.include_router(ConsumerRouter([route("/ws", Room, channel_layer_alias="mail")]))


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (included, "/ws/{room}"),
        (nested, "/api/outer/inner/ws"),
        (mounted, "/sub/inner/v1/ws"),
        (mounted_router, "/router/ws"),
        (mounted_starlette, "/star/deep/ws"),
        (by_route_init, "/ws"),
    ],
)
async def test_an_alias_that_is_not_there_stops_the_start(place: Any, path: str) -> None:
    """A consumer on an alias that is not in CHANNEL_LAYERS stops the start, wherever its route is, with its path."""
    app = FastAPI()
    channels = add_channel(app, channel_layers=TWO_LAYERS)
    place(app)
    with pytest.raises(SettingsError) as caught:
        async with LifespanManager(app):
            pass
    assert str(caught.value) == f"{path}: there is no channel layer 'mail' in CHANNEL_LAYERS, only: default, jobs"
    assert not channels.is_open


async def test_a_mounted_application_is_checked_by_its_own_settings() -> None:
    """A mounted application with its own add_channel has its routes checked by its own layers."""
    app, sub = FastAPI(), FastAPI()
    add_channel(app)
    add_channel(sub, channel_layers={"mail": "memory://"})
    sub.include_router(ConsumerRouter([route("/ws", OnMail)]))
    app.mount("/sub", sub)
    async with connect(app, "/sub/ws") as ws:
        assert ws.accepted
    included(app)
    with pytest.raises(SettingsError, match=r"^/ws/{room}: "):
        async with LifespanManager(app):
            pass


async def test_other_peoples_routes_are_no_matter() -> None:
    """HTTP routes, websocket routes, mounts and sub-applications of others do not disturb the check."""

    async def page(request: Any) -> JSONResponse:
        return JSONResponse("page")

    async def asgi(scope: Any, receive: Any, send: Any) -> None: ...

    app = FastAPI()
    add_channel(app)
    app.mount("/asgi", asgi)
    app.mount("/star", Starlette(routes=[Route("/page", page), WebSocketRoute("/ws", page)]))

    @app.websocket("/ws")
    async def endpoint() -> None: ...

    app.router.routes.append(Route("/page", page))
    async with LifespanManager(app), http(app) as client:
        assert (await client.get("/page")).json() == "page"
        assert (await client.get("/star/page")).json() == "page"


async def test_without_add_channel_an_alias_that_is_not_there() -> None:
    """Without add_channel there is no start to stop: the connection fails with what there is."""
    app = FastAPI()
    included(app)
    with pytest.raises(SettingsError, match="there is no channel layer 'mail' in CHANNEL_LAYERS, only: default"):
        async with connect(app, "/ws/lobby") as ws:
            assert not ws.accepted
