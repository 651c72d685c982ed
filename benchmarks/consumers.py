"""The same work as in `servers`, done by consumers: the routes differ, the publishing and the measuring don't."""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.websockets import WebSocket

from benchmarks.servers import measuring, message
from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, action, event
from fastapi_channels.permissions import BasePermission
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.throttling import UserRateThrottle

GROUP = "bench"


class ForwardConsumer(JsonConsumer):
    """Hand every event to the client as it is."""

    forward_events = True

    async def connect(self) -> None:
        """Join the group."""
        await self.group_add(GROUP)


class HandlerConsumer(JsonConsumer):
    """Pass every event through a handler that sends it on."""

    async def connect(self) -> None:
        """Join the group."""
        await self.group_add(GROUP)

    @event("bench.message")
    async def on_message(self, message: dict[str, Any]) -> None:
        """Send the event to the client."""
        await self.send_json(message)


class ForwardOneConsumer(ForwardConsumer):
    """The same in a group that the client chooses."""

    async def connect(self, group: str) -> None:  # type: ignore[override]
        """Join the group."""
        await self.group_add(group)


class HandlerOneConsumer(HandlerConsumer):
    """The same in a group that the client chooses."""

    async def connect(self, group: str) -> None:  # type: ignore[override]
        """Join the group."""
        await self.group_add(group)


class Echo(BaseModel):
    """What the action takes, and gives back."""

    text: str
    n: int


class EchoConsumer(ActionConsumer):
    """Answer with what was asked."""

    @action
    async def echo(self, data: Echo) -> Echo:
        """Reply with the data."""
        return data


class Member(BasePermission):
    """Let everybody in, as one does who has to look."""

    async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
        """Look at the scope."""
        return websocket.scope.get("user") is None


class GatedEchoConsumer(EchoConsumer):
    """The same behind a permission, and a throttle that nobody reaches."""

    permission_classes = [Member]
    throttle_classes = [UserRateThrottle("1000000/second")]


router = ConsumerRouter(
    [
        route("/ws/forward", ForwardConsumer),
        route("/ws/handler", HandlerConsumer),
        route("/ws/forward/{group}", ForwardOneConsumer),
        route("/ws/handler/{group}", HandlerOneConsumer),
        route("/ws/echo", EchoConsumer),
        route("/ws/gated", GatedEchoConsumer),
    ]
)
app = FastAPI()
add_channel(app)
app.include_router(router)
app.include_router(measuring)


@app.post("/publish")
async def publish(first: int, count: int, size: int, pause: float, layer: Layer) -> None:
    """Send `count` messages to the group, sleeping `pause` seconds after each."""
    for number in range(first, first + count):
        await layer.group_send(GROUP, message(number, size))
        await asyncio.sleep(pause)


@app.post("/join")
async def join(groups: int, layer: Layer) -> None:
    """Put a channel of its own into each of that many other groups."""
    channels = [await layer.new_channel() for _ in range(groups)]
    await asyncio.gather(*(layer.group_add(f"{GROUP}.{number}", name) for number, name in enumerate(channels)))


class LayerHealth(BaseModel):
    """Whether the layer of this process can do its work, and how often it has missed messages."""

    ok: bool
    detail: str
    gaps: int


@app.get("/health")
async def health(layer: Layer) -> LayerHealth:
    """Tell how the layer of this process is."""
    now = await layer.health()
    return LayerHealth(ok=now.ok, detail=now.detail, gaps=layer.counters.gaps)
