"""An application with a guard at every door, which counts what gets past it; run by the tests of the gate."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override

from fastapi_channels import Layer, add_channel
from fastapi_channels.authentication import Auth, TokenAuthentication, User
from fastapi_channels.consumers import ActionConsumer, WebSocketConsumer, action
from fastapi_channels.exceptions import AuthenticationFailed
from fastapi_channels.permissions import HasScope, IsAuthenticated
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.throttling import ConnectionRateThrottle, UserRateThrottle

#: Nobody listens there.
NOWHERE = "redis://127.0.0.1:1/0"


@dataclass
class Visit:
    """What the application has seen of one connection, which is named by its query parameter `visit`."""

    handled: Counter[str] = field(default_factory=Counter)
    at_gate: asyncio.Event = field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


visits: defaultdict[str, Visit] = defaultdict(Visit)


def visit_of(scope: Scope) -> Visit:
    """The visit that a connection is."""
    return visits[HTTPConnection(scope).query_params.get("visit", "")]


class Visits:
    """Middleware that notes when the application is done with a connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection or request."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "websocket":
                visit_of(scope).over.set()


class Tokens(TokenAuthentication):
    """A token is what becomes of it, and a user: `good.ann`."""

    @override
    async def user_of(self, token: str, websocket: WebSocket) -> tuple[User, Auth]:
        """Whose it is."""
        fate, _, name = token.partition(".")
        if fate.startswith("slow-"):
            visit = visit_of(websocket.scope)
            visit.at_gate.set()
            await visit.may_go_on.wait()
        match fate.removeprefix("slow-"):
            case "good":
                return User(name), Auth()
            case "soon":
                return User(name), Auth(expires_at=time.time() + 1.0)
            case "expired":
                return User(name), Auth(expires_at=1.0)
        raise AuthenticationFailed("the token is not valid")


class Handshakes(ConnectionRateThrottle):
    """New connections by address, at each door alone."""

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        """The address, and the door."""
        return f"{super().key(connection, action)} at {connection.query_params.get('door')}"


class Counting(WebSocketConsumer):
    """Counts what of it is called."""

    async def connect(self) -> None:
        """Count it."""
        self.count("connect")

    async def disconnect(self, code: int) -> None:
        """Count it."""
        self.count("disconnect")

    def count(self, what: str) -> None:
        """Note that something was handled."""
        visit_of(self.scope).handled[what] += 1


class Open(Counting, ActionConsumer):
    """For everybody."""

    @action
    async def say(self, text: str) -> str:
        """Count it, and give it back."""
        self.count("frame")
        return text


class Guarded(Open):
    """For who is known."""

    authentication_classes = [Tokens]
    permission_classes = [IsAuthenticated]


class Frames(Counting):
    """For who is known, without actions."""

    authentication_classes = [Tokens]
    permission_classes = [IsAuthenticated]

    async def receive(self, data: str) -> None:
        """Count it, and give it back."""
        self.count("frame")
        await self.send(data)


class Writers(Guarded):
    """For who may write, which nobody may."""

    permission_classes = [HasScope("write")]


class Few(Open):
    """For one connection an hour from each address."""

    throttle_classes = [Handshakes("1/hour")]


class One(Open):
    """For one connection."""

    max_connections = 1


class OneForUser(Guarded):
    """For one connection of each user."""

    max_connections_per_user = 1


class OneForAddress(Open):
    """For one connection from each address."""

    max_connections_per_address = 1


def find(number: int) -> None:
    """Look for a number, of which there is only 1."""
    if number != 1:
        raise HTTPException(404, "there is no such number")


class Found(Open):
    """At a number that a dependency finds."""

    async def connect(  # type: ignore[override]
        self, number: int, found: Annotated[None, Depends(find)]
    ) -> None:
        """Count it."""
        await super().connect()


class Rated(Guarded):
    """For three frames an hour of each user."""

    throttle_classes = [UserRateThrottle("3/hour")]
    max_violations = 10


class Paced(Guarded):
    """For one frame in a long time."""

    max_frames_per_second = 0.001
    max_violations = 10


class PacedBytes(Guarded):
    """For one byte in a long time, of which the first frame may have more."""

    max_bytes_per_second = 0.001
    max_violations = 10


class Talkative(Guarded):
    """For who says something soon."""

    first_frame_timeout = 0.3


DOORS: Mapping[str, type[WebSocketConsumer]] = {
    "open": Open,
    "guarded": Guarded,
    "frames": Frames,
    "writers": Writers,
    "few": Few,
    "one": One,
    "one-for-user": OneForUser,
    "one-for-address": OneForAddress,
    "found/{number}": Found,
    "rated": Rated,
    "paced": Paced,
    "paced-bytes": PacedBytes,
    "talkative": Talkative,
}


def guarded(lifespan: Any = None, **settings: Any) -> FastAPI:
    """An application with all doors, each in both modes of refusal."""
    app = FastAPI(lifespan=lifespan)
    add_channel(app, query_token_key="token", cookie_token_key="token", **settings)
    app.add_middleware(Visits)
    doors = [(f"/{mode}/{door}", consumer, mode) for mode in ("http", "close") for door, consumer in DOORS.items()]
    app.include_router(
        ConsumerRouter([route(path, consumer, path, reject_mode=mode) for path, consumer, mode in doors])
    )
    return app


#: Behind a proxy that it knows of.
behind = guarded(trusted_proxies=["127.0.0.1"])

#: Without its broker.
away = guarded(
    channel_layers={
        "default": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": NOWHERE, "timeout": 0.2}}
    }
)

#: Without the server that counts, and strict about it.
uncounted = guarded(limiter_url=NOWHERE, throttle_on_error="deny")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """That of the applications that can start."""
    async with behind.router.lifespan_context(behind), uncounted.router.lifespan_context(uncounted):
        yield


app = guarded(lifespan)
app.mount("/behind", behind)
app.mount("/away", away)
app.mount("/uncounted", uncounted)


@app.get("/visits/{visit}")
async def handled(visit: str) -> dict[str, int]:
    """What was handled of a connection, once the application is done with it."""
    await visits[visit].over.wait()
    return visits[visit].handled


@app.get("/visits/{visit}/at-gate")
async def at_gate(visit: str) -> None:
    """Wait until the gate looks at its token."""
    await visits[visit].at_gate.wait()


@app.post("/visits/{visit}/go-on")
async def go_on(visit: str) -> None:
    """Have the gate go on."""
    visits[visit].may_go_on.set()


@app.post("/users/{user}/disconnect")
async def ban(user: str, layer: Layer) -> None:
    """Put a user out."""
    await layer.disconnect_user(user, code=4503)
