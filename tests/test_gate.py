"""The gate: in which order it asks, how it refuses, and what it asks of every frame."""

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed as ReallyClosed
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from fastapi_channels import add_channel
from fastapi_channels.authentication import BaseAuthentication, TokenAuthentication, User
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import (
    AuthenticationFailed,
    ConsumerError,
    DefinitionError,
    LayerUnavailable,
    NotAuthenticated,
    PermissionDenied,
    SettingsError,
    Throttled,
    TooManyConnections,
)
from fastapi_channels.permissions import AllowAny, BasePermission, DenyAll, IsAuthenticated
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import ConnectionClosed, WebSocketSession, connect
from fastapi_channels.throttling import BaseThrottle, UserRateThrottle
from tests.conftest import Serve, app_with, until

Asked = list[Any]


class Door(BaseThrottle):
    """A throttle of connections that notes it was asked, and refuses if the query says so."""

    is_for_connections = True

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        self.asked.append("throttle")
        return 2.5 if connection.query_params.get("refuse") == "throttle" else 0


class Frames(BaseThrottle):
    """A throttle of frames that notes it was asked, and refuses the actions that it is told to."""

    def __init__(self, asked: Asked, name: str = "throttle", refuses: Sequence[str] = ()) -> None:
        self.asked, self.name, self.refuses = asked, name, refuses

    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        self.asked.append((self.name, action))
        return 2.5 if action in self.refuses else 0


class Names(BaseAuthentication):
    """Believes the query, and notes that it was asked."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
        self.asked.append("authentication")
        if websocket.query_params.get("refuse") == "authentication":
            raise AuthenticationFailed("wrong")
        name = websocket.query_params.get("user")
        return None if name is None else (User(name), None)


class Permits(BasePermission):
    """Notes that it was asked, and refuses the handshake if the query says so, or the actions that it is told to."""

    def __init__(self, asked: Asked, name: str = "permission", refuses: Sequence[str | None] = ()) -> None:
        self.asked, self.name, self.refuses = asked, name, refuses

    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        self.asked.append((self.name, action))
        return action not in self.refuses

    async def can_connect(self, websocket: WebSocket) -> bool:
        self.asked.append(self.name)
        return websocket.query_params.get("refuse") != "permission"


async def ask(ws: WebSocketSession, name: str, data: Any = None) -> Any:
    """The data of the reply, or the code of its error."""
    await ws.send_json({"action": name, "request_id": 1, "data": data})
    reply = await ws.receive_json()
    return reply["data"] if reply["status"] == "ok" else reply["errors"]["code"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


# The order


def ordered(asked: Asked, **attributes: Any) -> FastAPI:
    """An application whose consumer notes who is asked, and in what order."""

    def outer() -> None:
        asked.append("router dependency")

    def inner(refuse: str = "") -> None:
        asked.append("dependency")
        if refuse == "dependency":
            raise HTTPException(404, "none")

    class Gated(ActionConsumer):
        authentication_classes = [Names(asked)]
        permission_classes = [Permits(asked)]
        throttle_classes = [Frames(asked), Door(asked)]

        async def connect(self, number: int, found: Annotated[None, Depends(inner)], refuse: str = "") -> None:
            asked.append("connect")
            if refuse == "connect":
                await self.close(4501, "not now")

        async def disconnect(self, code: int) -> None:
            asked.append("disconnect")

    for name, value in attributes.items():
        setattr(Gated, name, value)
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/ws/{number}", Gated)], dependencies=[Depends(outer)]))
    return app


ORDER = ["throttle", "authentication", "permission", "router dependency", "dependency", "connect", "disconnect"]


@pytest.mark.parametrize(
    ("refuse", "status_code", "asked"),
    [
        ("", None, ORDER),
        ("throttle", 429, ORDER[:1]),
        ("authentication", 401, ORDER[:2]),
        ("permission", 403, ORDER[:3]),
        ("dependency", 404, ORDER[:5]),
        ("connect", 401, ORDER),
    ],
)
async def test_the_order(refuse: str, status_code: int | None, asked: list[str]) -> None:
    """Throttles of connections, authentication, permissions, dependencies, `connect`; after a no nobody is asked."""
    seen: Asked = []
    async with connect(ordered(seen), f"/ws/1?refuse={refuse}") as ws:
        assert (ws.response.status_code if ws.response else None) == status_code
    assert seen == asked


async def test_the_origin_comes_first() -> None:
    """A page of another origin is refused before anybody else is asked."""
    seen: Asked = []
    async with connect(ordered(seen), "/ws/x?refuse=throttle", headers={"origin": "https://evil.example"}) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 403
    assert seen == []


async def test_parameters_come_after_the_gate() -> None:
    """A parameter that doesn't fit is told to those only who have passed the gate."""
    seen: Asked = []
    async with connect(ordered(seen), "/ws/x") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 422
    assert seen[:3] == ORDER[:3]
    assert "connect" not in seen
    for refuse, status_code in (("throttle", 429), ("authentication", 401), ("permission", 403)):
        async with connect(ordered([]), f"/ws/x?refuse={refuse}") as ws:
            assert ws.response is not None
            assert ws.response.status_code == status_code


async def test_permissions_see_who_it_is() -> None:
    """Authentication has happened when permissions are asked, and in dependencies; throttles of frames know it too."""
    seen: Asked = []

    class Seeing(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            seen.append((action, websocket.user.id, websocket.path_params))
            return True

    async def name_of(websocket: WebSocket) -> str:
        return str(websocket.user.id)

    class Gated(ActionConsumer):
        authentication_classes = [Names([])]
        permission_classes = [Seeing]

        async def connect(self, name: Annotated[str, Depends(name_of)]) -> None:
            seen.append(name)

        @action
        async def ping(self) -> str:
            return str(self.user.id)

    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/ws/{number}", Gated)]))
    async with connect(app, "/ws/7?user=ann") as ws:
        assert await ask(ws, "ping") == "ann"
    assert seen == [(None, "ann", {"number": "7"}), "ann", ("ping", "ann", {"number": "7"})]


# Refusals


class OwnDenial(BasePermission):
    """Says no with the error that it is given."""

    def __init__(self, error: ConsumerError) -> None:
        self.error = error

    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return False

    def denial(self, websocket: WebSocket) -> ConsumerError:
        return self.error


class Refusing(ActionConsumer):
    handled: Asked = []

    @action
    async def ping(self) -> str:
        self.handled.append("ping")
        return "pong"


def refusing(raised: Exception) -> type[Refusing]:
    async def connect(self: Any) -> None:
        raise raised

    return type("Refusing", (Refusing,), {"connect": connect})


def gated(**attributes: Any) -> type[Refusing]:
    return type("Gated", (Refusing,), attributes)


class Wrong(BaseAuthentication):
    async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
        raise AuthenticationFailed("wrong")


class Late(Door):
    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        return 2.5


TABLE: list[Any] = [
    ("origin", gated(allowed_origins=[]), 403, 4503, "this page may not connect here"),
    ("throttle", gated(throttle_classes=[Late([])]), 429, 4029, "too often; try again in 2.5 s"),
    ("authentication", gated(authentication_classes=[Wrong]), 401, 4501, "wrong"),
    ("stranger", gated(permission_classes=[IsAuthenticated]), 401, 4501, "authentication is required"),
    ("permission", gated(permission_classes=[DenyAll]), 403, 4503, "you do not have permission to do this"),
    ("false", gated(permission_classes=[False]), 403, 4503, "you do not have permission to do this"),
    ("limit", gated(permission_classes=[OwnDenial(TooManyConnections("full"))]), 429, 4009, "full"),
    ("throttled", gated(permission_classes=[OwnDenial(Throttled(retry_after=1))]), 429, 4029, None),
    ("own", gated(permission_classes=[OwnDenial(ConsumerError("full", code="room_full"))]), 403, 4503, "full"),
    ("HTTP 401", refusing(HTTPException(401, "no")), 401, 4501, "no"),
    ("HTTP 403", refusing(HTTPException(403, "no")), 403, 4503, "no"),
    ("HTTP 404", refusing(HTTPException(404, "no")), 404, 4504, "no"),
    ("HTTP 422", refusing(HTTPException(422, "no")), 422, 4500, "no"),
    ("HTTP 429", refusing(HTTPException(429, "no")), 429, 4029, "no"),
    ("HTTP 503", refusing(HTTPException(503, "no")), 503, 1013, "no"),
    ("layer", refusing(LayerUnavailable()), 503, 1013, "the service is not available now"),
    ("denied in connect", refusing(PermissionDenied("no")), 403, 4503, "no"),
    ("unknown in connect", refusing(NotAuthenticated("no")), 401, 4501, "no"),
]


@pytest.mark.parametrize(
    ("made", "status_code", "close_code", "detail"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
async def test_refusals(made: Any, status_code: int, close_code: int, detail: str | None) -> None:
    """Each refusal is an HTTP response, or with `reject_mode="close"` a close code after the accept."""
    headers = {"origin": "https://evil.example"} if made.allowed_origins == [] else {}
    async with connect(app_with(made), "/ws", headers=headers) as ws:
        assert not ws.accepted
        assert ws.response is not None
        assert ws.response.status_code == status_code
        body = ws.response.json()
        assert detail is None or body["detail"] == detail
        is_told_when = (
            "retry_after" in body
            or detail == "the service is not available now"
            or body.get("code") == "too_many_connections"
        )
        assert ("retry-after" in ws.response.headers) is is_told_when
        assert ("www-authenticate" in ws.response.headers) is (status_code == 401 and "code" in body)
        with pytest.raises(ConnectionClosed):
            await ws.receive_text()
    async with connect(app_with(made, reject_mode="close"), "/ws", headers=headers) as ws:
        assert ws.accepted
        assert ws.response is None
        assert ws.close_code == close_code
        assert detail is None or ws.close_reason == detail
        with pytest.raises(ConnectionClosed):
            await ws.receive_text()


@pytest.mark.parametrize("reject_mode", ["http", "close"])
async def test_an_error_in_a_dependency_is_500(reject_mode: Any) -> None:
    """What isn't raised to be told is 500, or 1011, with no detail; the server logs it."""
    app = app_with(refusing(RuntimeError("secret")), reject_mode=reject_mode)
    async with connect(app, "/ws") as ws:
        if reject_mode == "http":
            assert ws.response is not None
            assert ws.response.status_code == 500
            assert b"secret" not in ws.response.content
        else:
            assert (ws.accepted, ws.close_code) == (True, 1011)
            assert "secret" not in str(ws.close_reason)
        with pytest.raises(RuntimeError, match="secret"):
            await ws.receive_text()


@pytest.mark.parametrize(("refuse", "code"), [("throttle", 4029), ("authentication", 4501), ("permission", 4503)])
async def test_no_frame_of_a_refused_client_is_handled(refuse: str, code: int) -> None:
    """Frames that a client sends before it is refused, or after, reach nobody."""
    app = FastAPI()
    add_channel(app, reject_mode="close")
    Refusing.handled = []
    made = gated(authentication_classes=[Names([])], permission_classes=[Permits([])], throttle_classes=[Door([])])
    app.include_router(ConsumerRouter([route("/ws", made)]))
    frame = {"type": "websocket.receive", "text": '{"action": "ping", "request_id": 1}'}

    async def with_frames(scope: Any, receive: Any, send: Any) -> None:
        """Has the client send frames together with its handshake, before anything is answered."""
        if scope["type"] != "websocket":
            await app(scope, receive, send)
            return
        waiting = [await receive(), frame, frame]

        async def receive_early() -> Any:
            return waiting.pop(0) if waiting else await receive()

        await app(scope, receive_early, send)

    async with connect(app, "/ws"):  # so that the lifespan runs
        async with connect(with_frames, f"/ws?refuse={refuse}") as ws:
            assert ws.close_code == code
            with pytest.raises(ConnectionClosed):
                await ws.receive_text()
        assert Refusing.handled == []
        async with connect(with_frames, "/ws") as ws:
            assert [(await ws.receive_json())["data"] for _ in range(2)] == ["pong", "pong"]


async def test_refusals_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    """What is refused as it should be is neither a warning nor a traceback."""
    for _, made, *_ in TABLE[1:9]:
        for mode in ("http", "close"):
            async with connect(app_with(made, reject_mode=mode), "/ws") as ws:
                assert ws.close_code is not None
    assert not warnings(caplog)


async def test_a_consumers_own_reject_mode() -> None:
    """`reject_mode` of the consumer stands in place of that of the settings, for the gate too."""
    made = gated(permission_classes=[DenyAll], reject_mode="http")
    async with connect(app_with(made, reject_mode="close"), "/ws") as ws:
        assert ws.response is not None
    made = gated(permission_classes=[DenyAll], reject_mode="close")
    async with connect(app_with(made), "/ws") as ws:
        assert (ws.accepted, ws.close_code) == (True, 4503)


# The settings, the consumer, and the action


class Three(ActionConsumer):
    @action
    async def ping(self) -> str:
        return "pong"


async def test_the_settings_hold_for_all() -> None:
    """What the settings say holds for every consumer that says nothing itself."""
    seen: Asked = []
    settings = {
        "authentication_classes": [Names(seen)],
        "permission_classes": [Permits(seen)],
        "throttle_classes": [Door(seen), Frames(seen, "frames")],
    }
    async with connect(app_with(Three, **settings), "/ws") as ws:
        assert await ask(ws, "ping") == "pong"
    assert seen == ["throttle", "authentication", "permission", ("frames", "ping"), ("permission", "ping")]


async def test_a_consumer_replaces_the_settings() -> None:
    """What the consumer says stands in place of the settings, each attribute for itself, an empty list too."""
    general: Asked = []
    own: Asked = []
    settings = {
        "authentication_classes": [Names(general)],
        "permission_classes": [Permits(general), DenyAll],
        "throttle_classes": [Door(general), Frames(general)],
    }

    class Own(Three):
        authentication_classes = [Names(own)]
        permission_classes = [Permits(own)]
        throttle_classes = [Frames(own)]

    class Empty(Three):
        authentication_classes: Sequence[Any] | None = []
        permission_classes: Sequence[Any] | None = []
        throttle_classes: Sequence[Any] | None = []

    class Partly(Three):
        permission_classes: Sequence[Any] | None = []

    app = app_with(Own, Empty, Partly, **settings)
    async with connect(app, "/Own") as ws:
        assert await ask(ws, "ping") == "pong"
    assert (general, own) == ([], ["authentication", "permission", ("throttle", "ping"), ("permission", "ping")])
    async with connect(app, "/Empty") as ws:
        assert await ask(ws, "ping") == "pong"
    assert general == []
    async with connect(app, "/Partly") as ws:
        assert await ask(ws, "ping") == "pong"
    assert general == ["throttle", "authentication", ("throttle", "ping")]


async def test_a_subclass_inherits_and_replaces() -> None:
    """The attributes are a class's, inherited as any other, and None gives the settings their place back."""

    class Closed(Three):
        permission_classes: Sequence[Any] | None = [DenyAll]

    class StillClosed(Closed): ...

    class Open(Closed):
        permission_classes = None

    app = app_with(Closed, StillClosed, Open, permission_classes=[AllowAny])
    for path, accepted in (("/Closed", False), ("/StillClosed", False), ("/Open", True)):
        async with connect(app, path) as ws:
            assert ws.accepted is accepted


async def test_a_route_may_say_it() -> None:
    """`route(path, Consumer, permission_classes=[...])` and `as_asgi` set them for one route."""
    app = FastAPI()
    add_channel(app)
    app.include_router(ConsumerRouter([route("/open", Three), route("/closed", Three, permission_classes=[DenyAll])]))
    app.mount("/mounted", Three.as_asgi(permission_classes=[IsAuthenticated]))
    for path, status_code in (("/open", None), ("/closed", 403), ("/mounted/", 401)):
        async with connect(app, path) as ws:
            assert (ws.response.status_code if ws.response else None) == status_code


async def test_an_action_adds_to_the_consumer() -> None:
    """What an action says is asked besides what the consumer, or the settings, say, and after it."""
    seen: Asked = []

    class Adding(Three):
        @action(permission_classes=[Permits(seen, "own permission")], throttle_classes=[Frames(seen, "own throttle")])
        async def more(self) -> str:
            return "more"

    class Replacing(Adding):
        permission_classes = [Permits(seen, "consumer")]
        throttle_classes = [Frames(seen, "frames")]

    settings = {"permission_classes": [Permits(seen)], "throttle_classes": [Frames(seen)]}
    app = app_with(Adding, Replacing, **settings)
    async with connect(app, "/Adding") as ws:
        assert await ask(ws, "more") == "more"
        assert seen == [
            "permission",
            ("throttle", "more"),
            ("own throttle", "more"),
            ("permission", "more"),
            ("own permission", "more"),
        ]
        seen.clear()
        assert await ask(ws, "ping") == "pong"
        assert seen == [("throttle", "ping"), ("permission", "ping")]
        seen.clear()
    async with connect(app, "/Replacing") as ws:
        assert await ask(ws, "more") == "more"
    assert seen == [
        "consumer",
        ("frames", "more"),
        ("own throttle", "more"),
        ("consumer", "more"),
        ("own permission", "more"),
    ]


async def test_an_override_of_an_action() -> None:
    """An action that is overridden keeps what guards it, unless it is marked anew."""

    class Base(ActionConsumer):
        @action(permission_classes=[DenyAll])
        async def kept(self) -> str:
            return "base"

        @action(permission_classes=[DenyAll])
        async def marked(self) -> str:
            return "base"

    class Sub(Base):
        async def kept(self) -> str:
            return "sub"

        @action(permission_classes=[AllowAny])
        async def marked(self) -> str:
            return "sub"

    async with connect(app_with(Sub), "/ws") as ws:
        assert await ask(ws, "kept") == "permission_denied"
        assert await ask(ws, "marked") == "sub"


class NeedsAnn(BasePermission):
    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        return bool(websocket.user.id == "ann")


class ByQuery(Names):
    def __init__(self) -> None:
        super().__init__([])


def needs_a_name(websocket: WebSocket) -> bool:
    return "user" in websocket.query_params


either = NeedsAnn & needs_a_name


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The dotted path of this module, which is imported by its path and not by its name."""
    monkeypatch.setitem(sys.modules, "gate_of_an_app", sys.modules[__name__])
    return "gate_of_an_app"


@pytest.mark.parametrize("permission", ["NeedsAnn", "either"])
async def test_dotted_paths(permission: str, here: str) -> None:
    """In the settings classes, and anything else that is an entry, may be given by their dotted paths."""
    settings = {
        "authentication_classes": [f"{here}.ByQuery"],
        "permission_classes": [f"{here}.{permission}", f"{here}.needs_a_name"],
        "throttle_classes": ["fastapi_channels.throttling.UserRateThrottle", "100/hour"],
        "throttle_rates": {"user": "2/hour"},
    }
    app = app_with(Three, **settings)
    async with connect(app, "/ws?user=bob") as ws:
        assert ws.response is not None
    async with connect(app, "/ws?user=ann") as ws:
        assert [await ask(ws, "ping") for _ in range(3)] == ["pong", "pong", "throttled"]


async def test_dotted_paths_of_the_environment(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So may they in environment variables."""
    monkeypatch.setenv("CHANNELS_AUTHENTICATION_CLASSES", f'["{here}.ByQuery"]')
    monkeypatch.setenv("CHANNELS_PERMISSION_CLASSES", f'["{here}.NeedsAnn"]')
    monkeypatch.setenv("CHANNELS_THROTTLE_CLASSES", '["1/hour"]')
    app = app_with(Three)
    async with connect(app, "/ws?user=bob") as ws:
        assert not ws.accepted
    async with connect(app, "/ws?user=ann") as ws:
        assert [await ask(ws, "ping") for _ in range(2)] == ["pong", "throttled"]


# Errors at start-up

UNKNOWN: list[Any] = [
    ("permission_classes", "app.nowhere.IsMember"),
    ("permission_classes", "fastapi_channels.permissions.Nothing"),
    ("permission_classes", "IsAuthenticated"),
    ("permission_classes", "fastapi_channels.permissions"),
    ("permission_classes", "fastapi_channels.permissions.HasScope"),
    ("permission_classes", "not a path"),
    ("permission_classes", ""),
    ("permission_classes", 5),
    ("permission_classes", None),
    ("permission_classes", UserRateThrottle),
    ("authentication_classes", "app.nowhere.Token"),
    ("authentication_classes", "fastapi_channels.authentication.JWTAuthentication"),
    ("authentication_classes", "fastapi_channels.permissions.IsAuthenticated"),
    ("authentication_classes", 5),
    ("throttle_classes", "app.nowhere.Slow"),
    ("throttle_classes", "often"),
    ("throttle_classes", "10/fortnight"),
    ("throttle_classes", "fastapi_channels.permissions.IsAuthenticated"),
    ("throttle_classes", "fastapi_channels.throttling.ScopedRateThrottle"),
    ("throttle_classes", 5),
]


@pytest.mark.parametrize(("setting", "entry"), UNKNOWN, ids=str)
async def test_a_wrong_entry_in_the_settings(setting: str, entry: Any) -> None:
    """An entry that can't be imported, or is of another kind, stops the start and is told with the setting's name."""
    app = app_with(Three, **{setting: [entry]})
    with pytest.raises(SettingsError, match=setting.upper()):
        async with connect(app, "/ws"):
            pass


@pytest.mark.parametrize("setting", ["permission_classes", "throttle_classes", "authentication_classes"])
async def test_a_wrong_entry_that_a_consumer_replaces(setting: str) -> None:
    """What no consumer uses can't let anybody in; the application starts or doesn't, but nobody is let in wrongly."""
    app = app_with(
        type("Own", (Three,), {setting: [] if setting != "permission_classes" else [DenyAll]}), **{setting: [5]}
    )
    try:
        async with connect(app, "/ws") as ws:
            assert ws.accepted is (setting != "permission_classes")
    except SettingsError as error:
        assert setting.upper() in str(error)  # noqa: PT017 (it may start as well)


@pytest.mark.parametrize(
    ("attribute", "entry"),
    [
        ("permission_classes", "tests.test_gate.NeedsAnn"),
        ("permission_classes", 5),
        ("permission_classes", JsonConsumer),
        ("authentication_classes", NeedsAnn),
        ("throttle_classes", "often"),
        ("throttle_classes", NeedsAnn),
        ("allowed_origins", "example.org"),
        ("allowed_origins", 5),
    ],
    ids=str,
)
def test_a_wrong_entry_of_a_consumer(attribute: str, entry: Any) -> None:
    """On a class, and on a route, it is an error where it is written, which names the class and the attribute."""
    attributes: dict[str, Any] = {attribute: [entry]}
    with pytest.raises(DefinitionError, match=rf"^Wrong\.{attribute}: "):
        type("Wrong", (ActionConsumer,), {"__qualname__": "Wrong", **attributes})
    with pytest.raises(DefinitionError, match=rf"Three\.{attribute}: "):
        ConsumerRouter([route("/ws", Three, **attributes)])
    with pytest.raises(DefinitionError, match=rf"Three\.{attribute}: "):
        Three.as_asgi(**attributes)


@pytest.mark.parametrize("attribute", ["permission_classes", "throttle_classes"])
def test_a_wrong_entry_of_an_action(attribute: str) -> None:
    """That of an action names the action."""

    async def say(self: Any) -> None: ...

    options: dict[str, Any] = {attribute: [5]}
    with pytest.raises(DefinitionError, match=rf"^Wrong\.say\.{attribute}: "):
        type("Wrong", (ActionConsumer,), {"__qualname__": "Wrong", "say": action(**options)(say)})


# Frames


async def test_frames_are_asked_for_in_order() -> None:
    """Of each frame the throttles are asked first, then permissions, and its data is looked at last."""
    seen: Asked = []

    class Gated(ActionConsumer):
        throttle_classes = [Frames(seen, refuses=["late", "both"])]
        permission_classes = [Permits(seen, refuses=["denied", "both"])]

        @action
        async def fine(self, number: int) -> int:
            return number

        @action
        async def late(self, number: int) -> int:
            return number

        @action
        async def denied(self, number: int) -> int:
            return number

        @action
        async def both(self, number: int) -> int:
            return number

    async with connect(app_with(Gated), "/ws") as ws:
        seen.clear()
        assert await ask(ws, "fine", 7) == 7
        assert await ask(ws, "fine", "x") == "invalid_data"
        assert seen == [("throttle", "fine"), ("permission", "fine")] * 2
        seen.clear()
        assert await ask(ws, "late", "x") == "throttled"
        assert await ask(ws, "both", "x") == "throttled"
        assert seen == [("throttle", "late"), ("throttle", "both")]
        assert await ask(ws, "denied", "x") == "permission_denied"


async def test_what_is_no_action_of_the_consumer() -> None:
    """A frame that asks for no action of the consumer is asked for as one without; its name reaches no permission."""
    seen: Asked = []

    class Gated(Three):
        throttle_classes = [Frames(seen)]
        permission_classes = [Permits(seen)]

    async with connect(app_with(Gated), "/ws") as ws:
        seen.clear()
        assert await ask(ws, "nothing") == "unknown_action"
        assert await ask(ws, "connect") == "unknown_action"
        for frame in ("no json", "[]", '{"action": 5, "request_id": 1}', '{"action": "ping", "request_id": []}'):
            await ws.send_text(frame)
            assert (await ws.receive_json())["errors"]["code"] == "invalid_frame"
    assert len(seen) == 12
    assert set(seen) <= {("throttle", None), ("permission", None), ("throttle", "ping"), ("permission", "ping")}
    assert seen[:4] == [("throttle", None), ("permission", None)] * 2


async def test_who_may_not_ask_learns_nothing() -> None:
    """Whoever is denied frames isn't told which actions there are, or what is wrong with his frame."""

    class Gated(Three):
        permission_classes = [Permits([], refuses=[None, "ping"])]

    async with connect(app_with(Gated), "/ws") as ws:
        assert {await ask(ws, name) for name in ("ping", "nothing", "__init__")} == {"permission_denied"}
        await ws.send_text("no json")
        assert (await ws.receive_json())["errors"]["code"] == "permission_denied"


@pytest.mark.parametrize("base", [WebSocketConsumer, JsonConsumer])
async def test_frames_without_actions(base: Any) -> None:
    """Frames of consumers without actions are asked for too, each of them, with None for the action."""
    seen: Asked = []
    received: Asked = []

    class Gated(base):  # type: ignore[misc]
        permission_classes = [Permits(seen)]
        throttle_classes = [Frames(seen)]

        async def receive(self, data: Any) -> None:
            received.append(data)
            await self.send(text="got it")

    class Closed(Gated):
        permission_classes = [Permits(seen, refuses=[None])]

    async with connect(app_with(Gated), "/ws") as ws:
        for _ in range(2):
            await ws.send_text("1")
            assert await ws.receive_text() == "got it"
    assert seen == ["permission", *[("throttle", None), ("permission", None)] * 2]
    received.clear()
    async with connect(app_with(Closed), "/ws") as ws:
        await ws.send_text("1")
        reply = await ws.receive_json()
        assert (reply["type"], reply["status"], reply["request_id"]) == ("response", "bad", None)
        assert reply["errors"]["code"] == "permission_denied"
    assert received == []


async def test_denied_frames_close_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A frame that is denied is answered, the next one is asked for anew, and the log stays quiet."""
    allowed = [False]

    class Gated(Three):
        permission_classes = [lambda websocket, action: action is None or allowed[0]]

    async with connect(app_with(Gated), "/ws") as ws:
        for _ in range(150):
            assert await ask(ws, "ping") == "permission_denied"
        allowed[0] = True
        assert await ask(ws, "ping") == "pong"
        allowed[0] = False
        assert await ask(ws, "ping") == "permission_denied"
    assert not warnings(caplog)


async def test_a_denied_call_without_an_id_is_answered() -> None:
    """A call that is denied, or throttled, is answered also if it has no `request_id`."""

    class Gated(Three):
        permission_classes = [Permits([], refuses=["ping"])]
        throttle_classes = [Frames([], refuses=["late"])]

        @action
        async def late(self) -> None: ...

    async with connect(app_with(Gated), "/ws") as ws:
        for name, code in (("ping", "permission_denied"), ("late", "throttled")):
            await ws.send_json({"action": name})
            reply = await ws.receive_json()
            assert (reply["action"], reply["request_id"], reply["errors"]["code"]) == (name, None, code)


async def test_actions_that_run_at_once_are_asked_for_too() -> None:
    """Calls of an action with `concurrency` pass the gate as all others do, and so do streams."""
    seen: Asked = []

    class Gated(ActionConsumer):
        permission_classes = [Permits(seen)]

        @action(concurrency=3, permission_classes=[DenyAll], throttle_classes=[Frames(seen)])
        async def beside(self) -> str:
            return "run"

        @action(permission_classes=[DenyAll])
        async def stream(self) -> Any:
            yield "run"

    async with connect(app_with(Gated), "/ws") as ws:
        seen.clear()
        assert [await ask(ws, "beside") for _ in range(5)] == ["permission_denied"] * 5
        assert await ask(ws, "stream") == "permission_denied"
    assert seen == [("throttle", "beside"), ("permission", "beside")] * 5 + [("permission", "stream")]


async def test_handlers_of_events_are_not_asked_for() -> None:
    """Events are the server's own: neither throttles nor permissions are asked for them."""
    seen: Asked = []

    class Gated(Three):
        groups = ["hall"]
        forward_events = True
        permission_classes = [Permits(seen)]
        throttle_classes = [Frames(seen)]

    app = app_with(Gated)
    async with connect(app, "/ws") as ws:
        seen.clear()
        await app.state.channels.layer().group_send("hall", {"type": "news"})
        assert await ws.receive_json() == {"type": "news"}
    assert seen == []


# Violations


async def closed_after(ws: WebSocketSession, frames: Sequence[str], *, at_most: int = 300) -> int:
    """How many frames are answered with `throttled` before the connection is closed with 4029."""
    answered = 0
    for n in range(at_most):
        try:
            await ws.send_text(frames[n % len(frames)])
            reply = await ws.receive_json()
        except ConnectionClosed as closed:
            return answered if closed.code == 4029 else -1
        answered += reply["errors"] is not None and reply["errors"]["code"] == "throttled"
    return answered


PING = '{"action": "ping", "request_id": 1}'


@pytest.mark.parametrize("frames", [[PING], ["no json"], [PING, "[]", '{"action": "nothing"}', "x" * 2000]], ids=str)
async def test_violations(frames: list[str]) -> None:
    """Who sends more than `MAX_VIOLATIONS` frames too many in a minute is closed with 4029, whatever is in them."""

    class Gated(Three):
        throttle_classes = ["2/hour"]

    app = app_with(Gated, max_violations=5, max_frame_size=1000)
    async with connect(app, "/ws") as ws:
        assert await closed_after(ws, frames) in (5, 6)
        assert ws.close_code == 4029
        assert ws.close_reason


async def test_violations_by_default() -> None:
    """By default these are 100."""

    class Gated(Three):
        throttle_classes = ["1/hour"]

    async with connect(app_with(Gated), "/ws") as ws:
        assert await closed_after(ws, [PING]) in (100, 101)


async def test_violations_are_counted_for_each_connection() -> None:
    """Violations are a connection's own: another one of the same user goes on."""

    class Gated(Three):
        throttle_classes = ["1/hour"]

    app = app_with(Gated, max_violations=5)
    async with connect(app, "/ws") as one, connect(app, "/ws") as other:
        assert await closed_after(one, [PING]) in (5, 6)
        assert await ask(other, "ping") == "throttled"
        assert other.close_code is None


async def test_what_was_sent_behind_too_many_violations() -> None:
    """Of frames that are on their way behind the one that was too many none is handled any more."""
    handled: Asked = []

    class Gated(ActionConsumer):
        @action(throttle_classes=["1/hour"])
        async def slow(self) -> None: ...

        @action
        async def fast(self) -> None:
            handled.append("fast")

    async with connect(app_with(Gated, max_violations=2), "/ws") as ws:
        for name in ("slow", "slow", "slow", "fast", "slow", "fast", "fast"):
            await ws.send_json({"action": name})
        assert [(await ws.receive_json())["errors"]["code"] for _ in range(2)] == ["throttled"] * 2
        await until(lambda: ws.close_code is not None)
        assert ws.close_code == 4029
    assert handled == ["fast"]


@pytest.mark.parametrize("source", ["module", "argument"])
async def test_no_limit_of_violations(source: str) -> None:
    """With None a client may send as many as it likes, and is answered each."""

    class Gated(Three):
        throttle_classes = ["1/hour"]

    settings = ModuleType("settings_of_an_app")
    settings.MAX_VIOLATIONS = None  # type: ignore[attr-defined]
    options: dict[str, Any] = {"settings": settings} if source == "module" else {"max_violations": None}
    async with connect(app_with(Gated, **options), "/ws") as ws:
        assert await closed_after(ws, [PING], at_most=250) == 249
        assert ws.close_code is None


async def test_denied_frames_are_no_violations() -> None:
    """Only what is throttled counts: a client that is denied, or makes mistakes, is not closed for it."""

    class Gated(Three):
        permission_classes = [Permits([], refuses=["ping"])]
        throttle_classes = ["1000/hour"]

    async with connect(app_with(Gated, max_violations=2), "/ws") as ws:
        for _ in range(10):
            assert await ask(ws, "ping") == "permission_denied"
            assert await ask(ws, "nothing") == "unknown_action"
        assert ws.close_code is None


async def test_new_tokens_are_frames() -> None:
    """`$auth` frames are throttled like others; too many of them, or of wrong tokens, close with 4029."""

    class Gated(Three):
        authentication_classes = [Names([])]
        throttle_classes = ["1/hour"]

    frame = '{"action": "$auth", "request_id": 1, "data": {"token": "x"}}'
    async with connect(app_with(Gated, max_violations=5), "/ws") as ws:
        assert await closed_after(ws, [frame], at_most=30) in (4, 5, 6)
        assert ws.close_code == 4029


async def test_guessing_tokens() -> None:
    """A client that guesses is closed with 4029, where nothing is throttled too."""

    class Guessed(Three):
        authentication_classes = [Names([])]

    frame = '{"action": "$auth", "request_id": 1, "data": {"token": "x"}}'
    async with connect(app_with(Guessed, max_violations=5), "/ws") as ws:
        for _ in range(5):
            await ws.send_text(frame)
            assert (await ws.receive_json())["errors"]["code"] == "not_authenticated"
        await ws.send_text(frame)
        assert (await ws.closed())[0] == 4029


async def test_cancels_are_frames() -> None:
    """`$cancel` frames count like others: they use up what a client may send."""

    class Gated(Three):
        throttle_classes = ["3/hour"]

    async with connect(app_with(Gated), "/ws") as ws:
        for n in range(3):
            await ws.send_json({"action": "$cancel", "request_id": n})
        assert await ask(ws, "ping") == "throttled"


# Elsewhere


async def test_a_consumer_without_add_channel() -> None:
    """The gate stands before a consumer on an application without `add_channel`, and before `as_asgi` alone."""
    made = gated(permission_classes=[IsAuthenticated])
    app = FastAPI()
    app.include_router(ConsumerRouter([route("/ws", made)]))
    for used in (app, made.as_asgi()):
        async with connect(used, "/ws") as ws:
            assert ws.response is not None
            assert ws.response.status_code == 401
        async with connect(used, "/ws", headers={"origin": "https://evil.example"}) as ws:
            assert ws.response is not None
            assert ws.response.status_code == 403


async def test_mounted_applications_have_their_own_gate() -> None:
    """A mounted application with its own settings is asked by these, one without by those around it."""
    outer, own, plain = FastAPI(), FastAPI(), FastAPI()
    add_channel(outer, permission_classes=[DenyAll])
    add_channel(own, permission_classes=[AllowAny])
    for app in (outer, own, plain):
        app.include_router(ConsumerRouter([route("/ws", Three)]))
    outer.mount("/own", own)
    outer.mount("/plain", plain)
    for path, accepted in (("/ws", False), ("/own/ws", True), ("/plain/ws", False)):
        async with connect(outer, path) as ws:
            assert ws.accepted is accepted, path


async def test_one_class_in_two_applications() -> None:
    """One class in two applications is asked by the settings of each."""
    for denied in (True, False, True):
        app = app_with(Three, permission_classes=[DenyAll if denied else AllowAny])
        async with connect(app, "/ws") as ws:
            assert ws.accepted is not denied


async def test_a_server_without_the_extension() -> None:
    """Where the server can't send a response in place of the handshake, a refusal is a plain 403."""
    app = app_with(gated(permission_classes=[IsAuthenticated]))

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        scope.pop("extensions", None)
        await app(scope, receive, send)

    async with connect(bare, "/ws") as ws:
        assert not ws.accepted
        assert ws.response is not None
        assert ws.response.status_code == 403


async def test_an_application_of_its_own_exception_handler() -> None:
    """The application's exception handler for our errors says how a refusal looks."""
    from starlette.responses import JSONResponse

    app = app_with(gated(permission_classes=[IsAuthenticated]))

    @app.exception_handler(NotAuthenticated)
    async def handle(connection: Any, error: NotAuthenticated) -> JSONResponse:
        return JSONResponse({"login": "/login"}, 418)

    async with connect(app, "/ws") as ws:
        assert ws.response is not None
        assert (ws.response.status_code, ws.response.json()) == (418, {"login": "/login"})


# Under a real server


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
async def test_refusals_under_a_server(ws: Any, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A real client reads the status of a refusal, and its body, and with `reject_mode="close"` the close code."""
    rows = [row[1:4] for row in TABLE if row[0] in {"throttle", "authentication", "stranger", "permission", "HTTP 404"}]
    app, closing = FastAPI(), FastAPI()
    for used, mode in ((app, "http"), (closing, "close")):
        add_channel(used, reject_mode=mode)
        used.include_router(ConsumerRouter([route(f"/ws/{n}", made) for n, (made, *_) in enumerate(rows)]))
    served, served_closing = await serve(app, ws=ws), await serve(closing, ws=ws)
    for n, (_, status_code, close_code) in enumerate(rows):
        with pytest.raises(InvalidStatus) as refused:
            await connect_for_real(f"{served.url}/ws/{n}", proxy=None)
        assert refused.value.response.status_code == status_code
        assert b"detail" in refused.value.response.body
        async with connect_for_real(f"{served_closing.url}/ws/{n}", proxy=None) as client:
            with suppress(ReallyClosed):
                await client.send(PING)
            with pytest.raises(ReallyClosed) as closed:
                await client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == close_code
    with pytest.raises(InvalidStatus) as refused:
        await connect_for_real(f"{served.url}/ws/0", proxy=None, origin=Origin("https://evil.example"))
    assert refused.value.response.status_code == 403
    await served.stop()
    await served_closing.stop()
    assert [record.getMessage() for record in warnings(caplog)] == [
        record.getMessage() for record in caplog.records if "ALLOWED_ORIGINS" in record.getMessage()
    ]


@pytest.mark.parametrize("reject_mode", ["http", "close"])
async def test_a_token_in_the_sub_protocol_under_a_server(reject_mode: Any, serve: Serve) -> None:
    """A client that offers `bearer` and a token, as browsers do, is let in with `bearer`, or reads the close code."""

    class Token(TokenAuthentication):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
            if token != "right":
                raise AuthenticationFailed("wrong")
            return User("ann"), None

    served = await serve(app_with(gated(authentication_classes=[Token]), reject_mode=reject_mode))
    protocols = [Subprotocol("bearer"), Subprotocol("right")]
    async with connect_for_real(f"{served.url}/ws", proxy=None, subprotocols=protocols) as client:
        assert client.subprotocol == "bearer"
        await client.send(PING)
        assert "pong" in str(await client.recv())
    protocols = [Subprotocol("bearer"), Subprotocol("wrong")]
    if reject_mode == "http":
        with pytest.raises(InvalidStatus) as refused:
            await connect_for_real(f"{served.url}/ws", proxy=None, subprotocols=protocols)
        assert refused.value.response.status_code == 401
        assert refused.value.response.headers["www-authenticate"].startswith("Bearer")
    else:
        async with connect_for_real(f"{served.url}/ws", proxy=None, subprotocols=protocols) as client:
            assert client.subprotocol == "bearer"
            with pytest.raises(ReallyClosed) as closed:
                await client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4501
