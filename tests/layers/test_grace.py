"""LAYER_GRACE: consumers of a process that is cut off from the others."""

from fastapi import FastAPI

from fastapi_channels import add_channel
from fastapi_channels.consumers import JsonConsumer
from fastapi_channels.layers import RedisLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import RedisServer, connect


class Listener(JsonConsumer):
    groups = ["news"]
    forward_events = ["news"]


def application(url: str, grace: float | None) -> FastAPI:
    app = FastAPI()
    add_channel(app, channel_layers={"default": RedisLayer(url, timeout=0.4)}, layer_grace=grace)
    app.include_router(ConsumerRouter([route("/ws", Listener)]))
    return app


async def test_consumers_are_closed_when_the_layer_is_lost_for_longer() -> None:
    """With LAYER_GRACE a connection is closed with 4010 once the broker has been away for so long."""
    with RedisServer() as server:
        app = application(server.url, 0.3)
        async with connect(app, "/ws") as ws:
            await app.state.channels.layer().group_send("news", {"type": "news"})
            assert await ws.receive_json(5) == {"type": "news"}
            server.kill()
            assert await ws.closed(10) == (4010, "cut off from the other processes")


async def test_a_short_loss_closes_nothing() -> None:
    """A loss that is over within LAYER_GRACE closes no connection."""
    with RedisServer() as server:
        app = application(server.url, 60.0)
        async with connect(app, "/ws") as ws:
            layer = app.state.channels.layer()
            server.kill()
            while await layer.health():
                assert await ws.receive_nothing(0.02)
            server.restart()
            while not await layer.health():
                assert await ws.receive_nothing(0.02)
            await layer.group_send("news", {"type": "news"})
            assert await ws.receive_json(5) == {"type": "news"}
