"""The same work as in `servers`, done by consumers: the routes differ, the publishing and the measuring don't."""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.servers import measuring, message
from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, action, event
from fastapi_channels.routing import ConsumerRouter, route

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


router = ConsumerRouter(
    [
        route("/ws/forward", ForwardConsumer),
        route("/ws/handler", HandlerConsumer),
        route("/ws/echo", EchoConsumer),
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
