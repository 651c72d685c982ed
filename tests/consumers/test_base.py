"""`WebSocketConsumer`: text and bytes, and the methods that every consumer has."""

from typing import Any

import pytest
from starlette.authentication import AuthCredentials, SimpleUser
from starlette.types import Receive, Scope, Send

from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.testing import connect
from tests.conftest import app_with


class TextConsumer(WebSocketConsumer):
    async def receive(self, data: str) -> None:
        assert type(data) is str
        await self.send(data)


class BytesConsumer(WebSocketConsumer):
    async def receive(self, data: bytes) -> None:
        assert type(data) is bytes
        await self.send(bytes=data)


class BothConsumer(WebSocketConsumer):
    async def receive(self, data: str | bytes) -> None:
        await (self.send(data) if isinstance(data, str) else self.send(bytes=data))


class BareConsumer(WebSocketConsumer):
    async def receive(self, data):  # type: ignore[no-untyped-def]
        await (self.send(data) if isinstance(data, str) else self.send(bytes=data))


FRAMES: list[Any] = ["", "text", "☃\x00\U0001f600", "x" * 100_000, b"", b"\x00\xff", bytes(range(256)) * 100]


@pytest.mark.parametrize("frame", FRAMES, ids=range(len(FRAMES)))
@pytest.mark.parametrize("consumer", [TextConsumer, BytesConsumer, BothConsumer, BareConsumer])
async def test_receive_gets_the_frames_that_it_declares(consumer: type[WebSocketConsumer], frame: str | bytes) -> None:
    """Text and bytes arrive and leave intact; a frame of the other kind is answered with `invalid_frame`."""
    takes = {TextConsumer: str, BytesConsumer: bytes}.get(consumer, str | bytes)
    async with connect(app_with(consumer), "/ws") as ws:
        await (ws.send_text(frame) if isinstance(frame, str) else ws.send_bytes(frame))
        if not isinstance(frame, takes):
            errors = (await ws.receive_json())["errors"]
            assert errors["code"] == "invalid_frame"
            assert ("text" if takes is str else "binary") in errors["detail"]
        elif isinstance(frame, str):
            assert await ws.receive_text() == frame
        else:
            assert await ws.receive_bytes() == frame


async def test_send_takes_either_text_or_bytes() -> None:
    """`send()` with both or neither is a TypeError, and an empty text or no bytes at all is a frame."""

    class Chat(WebSocketConsumer):
        async def receive(self, data: str) -> None:
            for arguments in ({}, {"text": "a", "bytes": b"b"}, {"text": None, "bytes": None}):
                with pytest.raises(TypeError, match="either"):
                    await self.send(**arguments)
            assert await self.send("")
            assert await self.send(bytes=b"")

    async with connect(app_with(Chat), "/ws") as ws:
        await ws.send_text("go")
        assert await ws.receive_text() == ""
        assert await ws.receive_bytes() == b""


async def test_a_consumer_that_takes_no_frames_says_so() -> None:
    """Without a `receive` of its own a consumer answers each frame, and lives."""

    class Chat(WebSocketConsumer): ...

    async with connect(app_with(Chat), "/ws") as ws:
        for _ in range(2):
            await ws.send_text("hello")
            assert (await ws.receive_json())["errors"]["code"] == "invalid_frame"
        await ws.send_bytes(b"hello")
        assert (await ws.receive_json())["errors"]["code"] == "invalid_frame"


async def test_the_user_is_whom_a_middleware_has_found() -> None:
    """`user` and `auth` are what a middleware put into the scope."""

    class Chat(WebSocketConsumer):
        async def connect(self) -> None:
            await self.accept()
            await self.send(f"{self.user.display_name} may {self.auth.scopes}")

    app = app_with(Chat)

    async def with_user(scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "user": SimpleUser("anna ☃"), "auth": AuthCredentials(["read"])}
        await app(scope, receive, send)

    async with connect(with_user, "/ws") as ws:
        assert await ws.receive_text() == "anna ☃ may ['read']"


async def test_each_connection_has_an_instance_and_a_channel_of_its_own() -> None:
    """What a consumer keeps on itself belongs to one connection."""
    consumers = []

    class Chat(WebSocketConsumer):
        async def connect(self) -> None:
            consumers.append(self)

    app = app_with(Chat)
    async with connect(app, "/ws"), connect(app, "/ws"):
        one, two = consumers
        assert one is not two
        assert one.channel_name != two.channel_name
        assert one.layer is two.layer is app.state.channels.layer()


async def test_a_consumer_may_live_on_another_layer() -> None:
    """`channel_layer_alias` picks the layer on which the consumer has its channel and its groups."""

    class Jobs(WebSocketConsumer):
        channel_layer_alias = "jobs"
        groups = ["all"]
        forward_events = True

    app = app_with(Jobs, channel_layers={"default": "memory://", "jobs": "memory://"})
    async with connect(app, "/ws") as ws:
        await app.state.channels.layer().group_send("all", {"type": "from.default"})
        await app.state.channels.layer("jobs").group_send("all", {"type": "from.jobs"})
        assert await ws.receive_json() == {"type": "from.jobs"}


async def test_handlers_are_inherited_and_overridden() -> None:
    """Event handlers of bases and mixins are a subclass's too; an override replaces one, None takes it away."""
    from fastapi_channels.consumers import event

    class Mixin:
        @event
        async def mixed(self, message: dict[str, Any]) -> None:
            await self.send("mixed")  # type: ignore[attr-defined]

    class Base(WebSocketConsumer):
        groups = ["all"]

        @event("spelled.out")
        async def handler(self, message: dict[str, Any]) -> None:
            await self.send("base")

        @event
        async def gone(self, message: dict[str, Any]) -> None:
            await self.send("never")

    class Chat(Mixin, Base):
        async def handler(self, message: dict[str, Any]) -> None:
            await super().handler(message)
            await self.send("override")

        gone = None  # type: ignore[assignment]

    app = app_with(Chat)
    async with connect(app, "/ws") as ws:
        for kind in ("gone", "mixed", "spelled.out"):
            await app.state.channels.layer().group_send("all", {"type": kind})
        assert [await ws.receive_text() for _ in range(3)] == ["mixed", "base", "override"]
        assert app.state.channels.layer().counters.unhandled == 1
