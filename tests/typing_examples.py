"""Code as users write it, for mypy and pyright in their strict modes.

An `ignore` here is a test as well: the mistake that it stands on has to be found. `test_package.py` runs this code.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Annotated, Any, Literal, assert_type

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Query
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.types import ASGIApp

from fastapi_channels import Channels, Layer, add_channel, channel_layer, get_channel_layer
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event
from fastapi_channels.exceptions import ChannelFull, ConsumerError, LayerUnavailable
from fastapi_channels.layers import ChannelLayer, Envelope, MemoryLayer, Receipt, Sink, safe_name
from fastapi_channels.routing import ConsumerRoute, ConsumerRouter, route
from fastapi_channels.settings import ChannelsSettings
from fastapi_channels.testing import ConnectionClosed, LayerContract, RefusedResponse, WebSocketSession, connect
from fastapi_channels.testing.plugin import CaptureGroupSends, GroupSend


class Say(BaseModel):
    text: str


class Move(BaseModel):
    kind: Literal["move"] = "move"
    x: int


class Stop(BaseModel):
    kind: Literal["stop"] = "stop"


class ChatMessage(BaseModel):
    type: Literal["chat.message"] = "chat.message"
    author: str
    text: str


class Database:
    def names(self) -> list[str]:
        return []


async def get_db() -> AsyncIterator[Database]:
    yield Database()


class RoomFull(ConsumerError):
    code = "room_full"


# Consumers


class Echo(WebSocketConsumer):
    async def receive(self, data: str | bytes) -> None:
        if isinstance(data, str):
            assert_type(await self.send(data), bool)
        else:
            assert_type(await self.send(bytes=data), bool)


class Upper(WebSocketConsumer):
    """A consumer of plain functions, which run in threads."""

    def connect(self, room: str) -> None:
        self.room = room
        self.sync.accept(subprotocol="v1", headers={"x-room": room})
        self.sync.group_add(room)

    def receive(self, data: str) -> None:
        assert_type(self.sync.send(data.upper()), bool)
        assert_type(self.sync.group_send(self.room, {"type": "said"}), Receipt)

    def disconnect(self, code: int) -> None: ...


class Game(JsonConsumer):
    groups = ["game"]
    forward_events = ["game.moved"]
    channel_layer_alias = "games"
    overflow = "latest"
    max_frame_size = 1024

    async def connect(
        self,
        db: Annotated[Database, Depends(get_db)],
        limit: Annotated[int, Query(ge=1)] = 10,
        token: Annotated[str | None, Header()] = None,
    ) -> None:
        self.names = db.names()
        self.limit = limit

    async def receive(self, data: Move | Stop, db: Annotated[Database, Depends(get_db)]) -> None:
        match data:
            case Move(x=x):
                await self.send_json({"x": x, "names": db.names()})
            case Stop():
                await self.close(4100, "stopped")


class Chat(ActionConsumer):
    async def connect(self, room: str, layer: Layer) -> None:
        self.room = safe_name(f"chat.{room}")
        await self.group_add(self.room)
        assert_type(self.layer, ChannelLayer)
        assert_type(self.channel_name, str)
        assert_type(layer, ChannelLayer)

    @action
    async def say(self, message: Say) -> dict[str, bool]:
        receipt = await self.group_send(self.room, ChatMessage(author="ann", text=message.text), exclude_self=True)
        assert_type(receipt, Receipt)
        assert_type(receipt.offset, int | None)
        return {"stored": not receipt.duplicate}

    @action("count", concurrency=3, timeout=5.0, deprecated=True, summary="Count.", tags=["numbers"])
    async def count_to(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @action()
    def count_in_a_thread(self, to: int) -> Iterator[int]:
        yield from range(to)

    @action
    def shout(self, message: Say, db: Annotated[Database, Depends(get_db)]) -> str:
        if not db.names():
            raise RoomFull("nobody is here", limit=0)
        return message.text.upper()

    @event("chat.message")
    async def on_chat_message(self, message: ChatMessage) -> None:
        assert_type(await self.send_json(message), bool)

    @event
    async def chat_left(self, message: dict[str, Any]) -> None:
        await self.send_json(message)

    async def disconnect(self, code: int, reason: str) -> None:
        await self.group_discard(self.room)


async def decorators_keep_types(chat: Chat) -> None:
    """A marked method is called like any other, with the types that it was written with."""
    assert_type(await chat.say(Say(text="x")), dict[str, bool])
    assert_type(chat.count_to(3), AsyncIterator[int])
    assert_type(chat.count_in_a_thread(3), Iterator[int])
    assert_type(chat.shout(Say(text="x"), Database()), str)
    assert_type(await chat.on_chat_message(ChatMessage(author="a", text="b")), None)

    said: Coroutine[Any, Any, dict[str, bool]] = chat.say(Say(text="x"))
    said.close()
    await chat.say("x")  # type: ignore[arg-type]
    await chat.on_chat_message({})  # type: ignore[arg-type]


class Mixin:
    """A part of consumers."""

    @action
    async def ping(self) -> str:
        return "pong"


class Quiet(Mixin, Chat):
    """Overrides an action, with the types that it has."""

    async def say(self, message: Say) -> dict[str, bool]:
        return {**await super().say(message), "quiet": True}


# Routing

router = ConsumerRouter(
    [
        route("/ws/chat/{room}", Chat, name="chat"),
        route("/ws/quiet/{room}", Quiet, groups=["quiet"], max_frame_size=10),
    ],
    prefix="/v1",
    dependencies=[Depends(get_db)],
)
assert_type(route("/ws", Chat), ConsumerRoute)
route("/ws", Database)  # type: ignore[arg-type]


@router.consumer("/ws/decorated", "decorated", dependencies=[Depends(get_db)], groups=["news"])
class Decorated(Chat):
    extra = "kept"


assert_type(Decorated.extra, str)
decorated: type[Decorated] = Decorated


@router.get("/names")
async def names(db: Annotated[Database, Depends(get_db)]) -> list[str]:
    return db.names()


outer = APIRouter()
outer.include_router(router)
asgi: ASGIApp = Echo.as_asgi(max_frame_size=10)
starlette = Starlette(routes=[WebSocketRoute("/echo", asgi), Mount("/mounted", Chat.as_asgi())])


# An application

app = FastAPI()
channels = add_channel(
    app,
    channel_layers={"default": "memory://", "games": {"BACKEND": "fastapi_channels.layers.MemoryLayer"}},
    capacity=2000,
)
app.include_router(outer)
assert_type(channels, Channels)
assert_type(channels.settings, ChannelsSettings)
assert_type(channels.settings.capacity, int)
assert_type(channels.layer("games"), ChannelLayer)


async def announce_later(layer: ChannelLayer, text: str) -> None:
    await layer.group_send("chat.lobby", {"type": "chat.message", "author": "staff", "text": text})


@app.post("/announce")
async def announce(text: str, layer: Layer, tasks: BackgroundTasks) -> dict[str, int | None]:
    tasks.add_task(announce_later, layer, text)
    try:
        receipt = await layer.group_send("chat.lobby", ChatMessage(author="staff", text=text), idempotency_key=text)
    except LayerUnavailable as error:
        assert_type(error.maybe_sent, bool)
        return {"offset": None}
    return {"offset": receipt.offset}


@app.post("/announce-plainly")
def announce_plainly(text: str, jobs: Annotated[ChannelLayer, Depends(channel_layer("games"))]) -> bool:
    assert_type(jobs.sync.receive("jobs"), dict[str, Any])
    return jobs.sync.group_send("workers", {"type": "job", "text": text}, exclude=["x"]).duplicate


# Layers


async def channels_and_groups() -> None:
    """Every method of a layer has types, and a message is a dict or a model."""
    assert_type(get_channel_layer("games"), ChannelLayer)
    async with MemoryLayer(capacity=10, expiry=5) as layer:
        assert_type(layer, MemoryLayer)
        channel = await layer.new_channel("worker")
        assert_type(channel, str)
        await layer.group_add("workers", channel)
        try:
            await layer.send(channel, {"type": "job", "id": 1})
        except ChannelFull:
            return
        await layer.send(channel, ChatMessage(author="a", text="b"))
        assert_type(await layer.receive(channel), dict[str, Any])
        assert_type(layer.counters.inbox_dropped, int)
        await layer.group_discard("workers", channel)
        await layer.send(channel, "job")  # type: ignore[arg-type]


class Printer(Sink):
    """A sink of one's own."""

    def deliver(self, envelope: Envelope) -> bool:
        print(envelope.type, envelope.decode())
        return True


class Audited(MemoryLayer):
    """A layer of one's own, on a ready one."""

    async def open(self) -> None:
        await super().open()
        self.attach(Printer(), "audit")


# Tests


class TestAudited(LayerContract):
    @pytest.fixture
    async def layer(self) -> AsyncIterator[ChannelLayer]:
        async with Audited(capacity=20) as layer:
            yield layer


async def check_chat(memory_layer: MemoryLayer, capture_group_sends: CaptureGroupSends) -> None:
    """A test of an application, as the testing kit lets one write it."""
    sent = capture_group_sends(app)
    assert_type(sent, list[GroupSend])
    async with connect(app, "/v1/ws/chat/lobby", headers={"token": "x"}, subprotocols=["v1"]) as ws:
        assert_type(ws, WebSocketSession)
        assert_type(ws.response, RefusedResponse | None)
        assert_type(ws.close_code, int | None)
        await ws.send_json({"action": "say", "data": {"text": "hi"}})
        assert (await ws.receive_json(timeout=5))["status"] == "ok"
        assert_type(await ws.receive_text(), str)
        assert_type(await ws.receive_bytes(), bytes)
        assert_type(await ws.receive_nothing(), bool)
        try:
            assert_type(await ws.closed(), tuple[int, str])
        except ConnectionClosed as error:
            assert_type(error.code, int)
    assert_type(sent[0].message, dict[str, Any])


#: What is in here to be checked, and not to be called.
CHECKED: list[Callable[..., Awaitable[None]]] = [decorators_keep_types, channels_and_groups, check_chat]
