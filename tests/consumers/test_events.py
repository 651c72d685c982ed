"""Events: what a message on the layer reaches, in which order, and what it can't reach."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from fastapi_channels.consumers import ActionConsumer, WebSocketConsumer, action, event
from fastapi_channels.layers import ChannelLayer
from fastapi_channels.testing import WebSocketSession, connect
from tests.conftest import app_with

GROUP = "hall ✓"


class Member(ActionConsumer):
    async def connect(self) -> None:
        await self.group_add(GROUP)

    @action
    async def ping(self) -> str:
        return "pong"


def layer_of(app: FastAPI) -> ChannelLayer:
    layer: ChannelLayer = app.state.channels.layer()
    return layer


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


async def answered(ws: WebSocketSession) -> list[Any]:
    """What comes before the answer to a question that is asked now."""
    await ws.send_json({"action": "ping", "request_id": "marker"})
    frames: list[Any] = []
    while True:
        frame = await ws.receive_json()
        if isinstance(frame, dict) and frame.get("request_id") == "marker":
            return frames
        frames.append(frame)


# Which handler


async def test_the_type_of_an_event_chooses_its_handler() -> None:
    """A bare mark takes the type from the method's name, a spelled-out one is taken as it is; one may have several."""

    class Chat(Member):
        @event
        async def chat_message_new(self, message: dict[str, Any]) -> None:
            await self.send_json("bare")

        @event()
        async def chat_left(self, message: dict[str, Any]) -> None:
            await self.send_json("called")

        @event("chat.Message_new")
        @event("two")
        async def other(self, message: dict[str, Any]) -> None:
            await self.send_json(["spelled out", message["type"]])

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        for kind in ("chat.message.new", "chat.left", "chat.Message_new", "two"):
            await layer_of(app).group_send(GROUP, {"type": kind})
        frames = [await ws.receive_json() for _ in range(4)]
        assert frames == ["bare", "called", ["spelled out", "chat.Message_new"], ["spelled out", "two"]]


@pytest.mark.parametrize(
    "kind",
    [
        "a b",
        "a-b",
        "日本.語",
        "x" * 5000,
        "chat\nmessage",
        "__class__",
        "websocket.Send",
        "a:b/c?d#e",
        "{}",
        "\U0001f600",
    ],
)
async def test_a_type_may_have_any_characters(kind: str) -> None:
    """The type of an event is any text, handled or forwarded."""

    class Chat(Member):
        forward_events = [kind + "!"]

        @event(kind)
        async def unusual(self, message: dict[str, Any]) -> None:
            await self.send_json(message)

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": kind})
        assert await ws.receive_json() == {"type": kind}
        await layer_of(app).group_send(GROUP, {"type": kind + "!"})
        assert await ws.receive_json() == {"type": kind + "!"}


async def test_a_handler_gets_what_it_declares() -> None:
    """A handler gets a dict, a model, a dataclass, one of a union, or nothing, as its parameter says."""

    class Joined(BaseModel):
        type: Literal["joined"] = "joined"
        who: Annotated[str, Field(min_length=1)]
        age: int = 7

    class Left(BaseModel):
        type: Literal["left"] = "left"

    @dataclass
    class Plain:
        type: str
        n: float

    class Chat(Member):
        @event
        async def as_dict(self, message: dict[str, Any]) -> None:
            await self.send_json(message)

        @event
        async def as_anything(self, message) -> None:  # type: ignore[no-untyped-def]
            await self.send_json(message)

        @event("joined")
        async def as_model(self, message: Joined) -> None:
            assert type(message) is Joined
            await self.send_json(message)

        @event
        async def as_dataclass(self, message: Plain) -> None:
            assert type(message) is Plain
            await self.send_json(message)

        @event("left")
        async def as_union(self, message: Annotated[Joined | Left, Field(discriminator="type")]) -> None:
            assert type(message) is Left
            await self.send_json(message)

        @event
        async def as_nothing(self) -> None:
            await self.send_json("nothing")

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        layer = layer_of(app)
        await layer.group_send(GROUP, {"type": "as.dict", "x": [None]})
        await layer.group_send(GROUP, {"type": "as.anything", "x": 1})
        await layer.group_send(GROUP, Joined(who="☃"))
        await layer.group_send(GROUP, {"type": "as.dataclass", "n": "1.5"})
        await layer.group_send(GROUP, Left())
        await layer.group_send(GROUP, {"type": "as.nothing", "x": 1})
        assert [await ws.receive_json() for _ in range(6)] == [
            {"type": "as.dict", "x": [None]},
            {"type": "as.anything", "x": 1},
            {"type": "joined", "who": "☃", "age": 7},
            {"type": "as.dataclass", "n": 1.5},
            {"type": "left"},
            "nothing",
        ]


async def test_an_event_that_does_not_fit_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """An event that its handler's model refuses is logged and counted; the client hears nothing of it."""

    class Said(BaseModel):
        text: str

    class Chat(Member):
        @event
        async def said(self, message: Said) -> None:
            await self.send_json(message)

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": "said", "text": None})
        await layer_of(app).group_send(GROUP, {"type": "said", "text": ""})
        assert await answered(ws) == [{"text": ""}]
        assert layer_of(app).counters.failed == 1
    (record,) = warnings(caplog)
    assert "said" in record.getMessage()


async def test_every_handler_gets_an_object_of_its_own() -> None:
    """What a handler does to its event is seen neither by the other members nor by the sender."""

    class Chat(Member):
        @event
        async def list(self, message: dict[str, Any]) -> None:
            message["items"].append("mine")
            message["type"] = "changed"
            await self.send_json(message["items"])

    app = app_with(Chat)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        sent = {"type": "list", "items": ["yours"]}
        await layer_of(app).group_send(GROUP, sent)
        sent["items"] = ["changed too late"]
        assert await one.receive_json() == await two.receive_json() == ["yours", "mine"]
        assert sent["type"] == "list"


# Order


async def test_events_are_handled_one_at_a_time_in_order() -> None:
    """A handler that waits holds up the next event of its consumer, and no frame and no other connection."""
    go_on = asyncio.Event()

    class Chat(Member):
        @event
        async def slow(self, message: dict[str, Any]) -> None:
            await self.send_json("begun")
            await go_on.wait()
            await self.send_json("ended")

        @event
        async def quick(self, message: dict[str, Any]) -> None:
            await self.send_json(message["n"])

    class Other(Member):
        forward_events = True

    app = app_with(Chat, Other)
    async with connect(app, "/ws") as ws, connect(app, "/Other") as other:
        await layer_of(app).group_send(GROUP, {"type": "slow"})
        for number in range(3):
            await layer_of(app).group_send(GROUP, {"type": "quick", "n": number})
        assert await ws.receive_json() == "begun"
        assert [(await other.receive_json())["type"] for _ in range(4)] == ["slow", "quick", "quick", "quick"]
        assert await answered(ws) == []
        go_on.set()
        assert [await ws.receive_json() for _ in range(4)] == ["ended", 0, 1, 2]


async def test_forwarded_and_handled_events_keep_their_order() -> None:
    """A forwarded event waits behind one that is being handled, however long that takes."""
    go_on = asyncio.Event()

    class Chat(Member):
        forward_events = ["forwarded"]

        @event
        async def handled(self, message: dict[str, Any]) -> None:
            if message["n"] == 0:
                await go_on.wait()
            await self.send_json(message)

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        for number in range(100):
            kind = "handled" if number % 3 == 0 else "forwarded"
            await layer_of(app).group_send(GROUP, {"type": kind, "n": number})
        assert await answered(ws) == []
        go_on.set()
        assert [(await ws.receive_json())["n"] for _ in range(100)] == list(range(100))
        for number in range(4):
            kind = "forwarded" if number % 2 == 0 else "handled"
            await layer_of(app).group_send(GROUP, {"type": kind, "n": 10 + number})
        assert [(await ws.receive_json())["n"] for _ in range(4)] == [10, 11, 12, 13]


async def test_events_of_a_handler_itself_follow_it() -> None:
    """What a handler sends to its own group is handled after what waits already."""

    class Chat(Member):
        @event
        async def count(self, message: dict[str, Any]) -> None:
            await self.send_json(message["n"])
            if message["n"] < 3:
                await self.group_send(GROUP, {"type": "count", "n": message["n"] + 1})
                await self.send_json("sent")

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": "count", "n": 1})
        assert [await ws.receive_json() for _ in range(5)] == [1, "sent", 2, "sent", 3]


async def test_many_senders_each_keep_their_order() -> None:
    """Events of several senders at once arrive in each sender's order, at every member alike."""

    class Chat(Member):
        forward_events = ["forwarded"]

        @event
        async def handled(self, message: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            await self.send_json(message)

    app = app_with(Chat)

    async def send(sender: int) -> None:
        for number in range(40):
            await layer_of(app).group_send(
                GROUP, {"type": "handled" if number % 2 else "forwarded", "of": sender, "n": number}
            )
            await asyncio.sleep(0)

    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        await asyncio.gather(*(send(sender) for sender in range(3)))
        got = [[await ws.receive_json() for _ in range(120)] for ws in (one, two)]
    for frames in got:
        for sender in range(3):
            assert [frame["n"] for frame in frames if frame["of"] == sender] == list(range(40))


# Forwarding


async def test_forwarded_events_arrive_as_they_are() -> None:
    """Types in `forward_events` go to the client as the JSON that was sent, and no others do."""

    class Chat(Member):
        forward_events = ["news", "empty"]

    app = app_with(Chat)
    message = {"type": "news", "text": "☃\n", "none": None, "deep": [{"a": [1.5, True]}], "websocket": "close"}
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, message)
        await layer_of(app).group_send(GROUP, {"type": "empty"})
        await layer_of(app).group_send(GROUP, {"type": "News"})
        assert await answered(ws) == [message, {"type": "empty"}]


async def test_forward_events_true_forwards_what_has_no_handler() -> None:
    """`forward_events = True` forwards every type without a handler, but for the built-in ones."""

    class Chat(Member):
        forward_events = True

        @event
        async def handled(self, message: dict[str, Any]) -> None:
            await self.send_json("handled")

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        for kind in ("a", "handled", "close", "connect"):
            await layer_of(app).group_send(GROUP, {"type": kind})
        await layer_of(app).group_send(GROUP, {"type": "websocket.send", "text": '"text"'})
        await layer_of(app).group_send(GROUP, {"type": "websocket.unknown"})
        assert await answered(ws) == [{"type": "a"}, "handled", {"type": "close"}, {"type": "connect"}, "text"]
        assert layer_of(app).counters.unhandled == 1


# What nobody handles


async def test_an_unhandled_event_is_one_line_that_names_the_unmarked_method(caplog: pytest.LogCaptureFixture) -> None:
    """An event that nobody handles is logged once with its hint, counted each time, and closes nothing."""

    class Chat(Member):
        async def chat_message(self, message: dict[str, Any]) -> None:
            await self.send_json("never")

    app = app_with(Chat)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        for _ in range(50):
            await layer_of(app).group_send(GROUP, {"type": "chat.message"})
        assert await answered(one) == await answered(two) == []
        assert layer_of(app).counters.unhandled == 100
    (record,) = warnings(caplog)
    assert record.levelno == logging.ERROR
    for part in ("Chat", "'chat.message'", "chat_message", "@event"):
        assert part in record.getMessage()


@pytest.mark.parametrize(
    "kind",
    [
        *("close", "connect", "disconnect", "receive", "send", "send.json", "group.send", "accept", "sync", "layer"),
        *("__init__", "__class__", "__init_subclass__", "_session", "..init..", "_write", "_reply", "as.asgi", "ping"),
    ],
)
async def test_only_marked_methods_can_be_reached(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """An event named like a hook, an API method, an action or an attribute reaches nothing and closes nothing."""
    called = []

    class Chat(Member):
        async def receive_json(self) -> None:
            called.append("receive_json")

        async def disconnect(self, code: int, reason: str) -> None:
            called.append("disconnect")

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": kind, "code": 4100, "self": 1, "message": 2})
        assert await answered(ws) == []
        assert called == []
        assert layer_of(app).counters.unhandled == 1
    assert called == ["disconnect"]
    assert len(warnings(caplog)) == 1


# Built-in events


@pytest.mark.parametrize("text", ["plain", "", "☃\x00", '{"json": true}'])
async def test_websocket_send_writes_a_text_frame(text: str) -> None:
    """`{"type": "websocket.send", "text": ...}` writes that text on any consumer."""

    class Chat(Member): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": "websocket.send", "text": text})
        assert await ws.receive_text() == text


@pytest.mark.parametrize("data", [b"", b"\x00\xff\xfe", bytes(range(256)) * 100])
async def test_websocket_send_writes_a_binary_frame(data: bytes) -> None:
    """`{"type": "websocket.send", "bytes": ...}` writes those bytes, whatever they are."""

    class Chat(Member): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": "websocket.send", "bytes": data})
        assert await ws.receive_bytes() == data


@pytest.mark.parametrize(
    "message",
    [
        {"type": "websocket.send"},
        {"type": "websocket.send", "text": None, "bytes": None},
        {"type": "websocket.send", "text": "a", "bytes": b"b"},
        {"type": "websocket.send", "text": 1},
        {"type": "websocket.send", "text": ["a"]},
        {"type": "websocket.close", "code": "4100"},
        {"type": "websocket.close", "code": 1006},
        {"type": "websocket.close", "code": 99999},
        {"type": "websocket.close", "code": True},
        {"type": "websocket.close", "code": None},
    ],
)
async def test_a_bad_built_in_event_is_logged_and_does_nothing(
    message: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A built-in event that can't be carried out is logged and counted; the connection lives on and hears nothing."""

    class Chat(Member): ...

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, message)
        assert await answered(ws) == []
        assert layer_of(app).counters.failed == 1
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("message", "end"),
    [
        ({}, (1000, "")),
        ({"code": 4501, "reason": "kicked ✗"}, (4501, "kicked ✗")),
        ({"code": 3000, "reason": None}, (3000, "")),
    ],
)
async def test_websocket_close_closes(message: dict[str, Any], end: tuple[int, str]) -> None:
    """`{"type": "websocket.close"}` closes every member, behind what was sent before, on any consumer."""

    class Plain(WebSocketConsumer):
        groups = [GROUP]
        forward_events = ["news"]

    app = app_with(Plain)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        await layer_of(app).group_send(GROUP, {"type": "news"})
        await layer_of(app).group_send(GROUP, {"type": "websocket.close", **message})
        await layer_of(app).group_send(GROUP, {"type": "news", "n": "too late"})
        for ws in (one, two):
            assert await ws.receive_json() == {"type": "news"}
            assert await ws.closed() == end
            assert await ws.receive_nothing()


# What is dropped


async def test_an_expired_event_is_dropped_and_counted() -> None:
    """An event that has waited longer than `EXPIRY` is not handled any more, which is counted."""
    go_on = asyncio.Event()

    class Chat(Member):
        @event
        async def slow(self, message: dict[str, Any]) -> None:
            await self.send_json(message["n"])
            await go_on.wait()

    app = app_with(Chat, expiry=0.05)
    async with connect(app, "/ws") as ws:
        for number in range(3):
            await layer_of(app).group_send(GROUP, {"type": "slow", "n": number})
        assert await ws.receive_json() == 0
        await asyncio.sleep(0.06)
        go_on.set()
        await layer_of(app).group_send(GROUP, {"type": "slow", "n": 3})
        assert await ws.receive_json() == 3
        assert layer_of(app).counters.expired == 2


async def test_a_full_inbox_drops_and_counts_and_costs_nobody_else() -> None:
    """A consumer whose handler hangs keeps `CAPACITY` events; more are counted as dropped; others get them all."""
    go_on = asyncio.Event()
    capacity = 1000

    class Slow(Member):
        @event
        async def tick(self, message: dict[str, Any]) -> None:
            if message["n"] == 0:
                await self.send_json("begun")
                await go_on.wait()
            await self.send_json(message["n"])

    class Quick(Member):
        forward_events = ["tick"]

    app = app_with(Slow, Quick, capacity=capacity, outbox_frames=5000)
    async with connect(app, "/Slow") as slow, connect(app, "/Quick") as quick:
        layer = layer_of(app)
        await layer.group_send(GROUP, {"type": "tick", "n": 0})
        assert await slow.receive_json() == "begun"
        for number in range(1, capacity + 8):
            await layer.group_send(GROUP, {"type": "tick", "n": number})
        assert [(await quick.receive_json())["n"] for _ in range(capacity + 8)] == list(range(capacity + 8))
        go_on.set()
        assert [await slow.receive_json() for _ in range(capacity + 1)] == list(range(capacity + 1))
        assert layer.counters.inbox_dropped == 7
        await layer.group_send(GROUP, {"type": "tick", "n": "there is room again"})
        assert await slow.receive_json() == "there is room again"


# Sending


async def test_exclude_self_leaves_out_the_sender_alone() -> None:
    """`group_send(..., exclude_self=True)` reaches every member but the sender."""

    class Chat(Member):
        forward_events = ["said"]

        @action
        async def say(self, n: int) -> None:
            await self.group_send(GROUP, {"type": "said", "n": n}, exclude_self=n % 2 == 1)

    app = app_with(Chat)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        for number in range(4):
            await one.send_json({"action": "say", "data": number})
        assert [frame["n"] for frame in await answered(one)] == [0, 2]
        assert [frame["n"] for frame in await answered(two)] == [0, 1, 2, 3]


async def test_a_message_to_one_channel_reaches_that_connection_alone() -> None:
    """`layer.send(channel_name, ...)` reaches one connection, handled and forwarded alike."""

    class Chat(Member):
        forward_events = ["forwarded"]

        @action
        async def name(self) -> str:
            return self.channel_name

        @event
        async def handled(self, message: dict[str, Any]) -> None:
            await self.send_json(message)

    app = app_with(Chat)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        await one.send_json({"action": "name", "request_id": 1})
        name = (await one.receive_json())["data"]
        for kind in ("forwarded", "handled", "websocket.send"):
            await layer_of(app).send(name, {"type": kind, "text": '{"type": "websocket.send"}'})
        assert [frame["type"] for frame in await answered(one)] == ["forwarded", "handled", "websocket.send"]
        assert await answered(two) == []
        await one.close()
        await layer_of(app).send(name, {"type": "forwarded"})
        assert layer_of(app).counters.unreachable == 1


async def test_a_member_that_leaves_hears_nothing_from_then_on() -> None:
    """After `group_discard` no event of the group comes, and after `group_add` they come again."""

    class Chat(Member):
        forward_events = ["news"]

        @action
        async def mute(self) -> None:
            await self.group_discard(GROUP)

        @action
        async def unmute(self) -> None:
            await self.group_add(GROUP)

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        got = []
        for number, name in enumerate(["ping", "mute", "unmute"]):
            await ws.send_json({"action": name})
            got += await answered(ws)
            await layer_of(app).group_send(GROUP, {"type": "news", "n": number})
        got += await answered(ws)
        assert [frame["n"] for frame in got if frame["type"] == "news"] == [0, 2]


@pytest.mark.parametrize(
    "message",
    [
        *({}, {"type": None}, {"type": 7}, {"type": ""}, {"type": "x", "object": object()}, {1: 2}),
        *({"type": "websocket.send", "bytes": 7}, {"type": "websocket.send", "bytes": "text"}),
    ],
)
async def test_what_is_no_message_raises_at_the_sender(message: dict[str, Any]) -> None:
    """A message without a type, or with what JSON can't hold, is the sender's ValueError and reaches nobody."""

    class Chat(Member):
        forward_events = True

        @action
        async def say(self) -> str:
            with pytest.raises(ValueError, match=r"message|JSON|bytes"):
                await self.group_send(GROUP, message)
            return "refused"

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_json({"action": "say", "request_id": 1})
        assert (await ws.receive_json())["data"] == "refused"


async def test_connections_that_come_and_go_while_events_are_sent_disturb_nobody() -> None:
    """While members join and leave in the middle of a stream of events, one who stays gets each exactly once."""

    class Chat(Member):
        forward_events = ["tick"]

    app = app_with(Chat)

    async def come_and_go() -> None:
        for _ in range(20):
            async with connect(app, "/ws") as ws:
                await ws.receive_json()

    async with connect(app, "/ws") as staying:
        coming = [asyncio.create_task(come_and_go()) for _ in range(3)]
        sent = 0
        while not all(task.done() for task in coming):
            await layer_of(app).group_send(GROUP, {"type": "tick", "n": sent})
            sent += 1
            await asyncio.sleep(0)
        await asyncio.gather(*coming)
        assert [(await staying.receive_json())["n"] for _ in range(sent)] == list(range(sent))


async def test_a_handler_of_ones_own_for_a_built_in_event() -> None:
    """`@event("websocket.send")` takes the place of the built-in way, and gets the bytes as they were sent."""

    class Chat(Member):
        @event("websocket.send")
        async def shout(self, message: dict[str, Any]) -> None:
            await self.send(bytes=message["bytes"].upper())

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        await layer_of(app).group_send(GROUP, {"type": "websocket.send", "bytes": b"a\xff"})
        assert await ws.receive_bytes() == b"A\xff"
