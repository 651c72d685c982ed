"""A chat as the README has it, for several processes; run by the tests of processes."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, action, event
from fastapi_channels.layers import Receipt
from fastapi_channels.routing import ConsumerRouter, route


class Say(BaseModel):
    """What a client says."""

    text: str


class ChatMessage(BaseModel):
    """What everybody in the room hears."""

    type: Literal["chat.message"] = "chat.message"
    author: str
    text: str


class ChatConsumer(ActionConsumer):
    """In a room, and under a name."""

    forward_events = ["chat.notice"]

    async def connect(self, room: str, name: str = "somebody") -> None:
        """Join both."""
        self.room, self.name = f"chat.{room}", name
        await self.group_add(self.room)
        await self.group_add(f"users.{name}")

    @action
    async def say(self, message: Say) -> dict[str, bool]:
        """Tell everybody in the room."""
        await self.group_send(self.room, ChatMessage(author=self.name, text=message.text))
        return {"stored": True}

    @action
    async def notice(self, text: str) -> None:
        """Tell the others in the room."""
        await self.group_send(self.room, {"type": "chat.notice", "text": text}, exclude_self=True)

    @action
    async def join(self, room: str) -> None:
        """Hear another room too."""
        await self.group_add(f"chat.{room}")

    @action
    async def where(self) -> dict[str, Any]:
        """In which process this is."""
        return {"pid": os.getpid(), "channel": self.channel_name}

    @event("chat.message")
    async def on_chat_message(self, message: ChatMessage) -> None:
        """Tell the client."""
        await self.send_json(message)


router = ConsumerRouter([route("/ws/chat/{room}", ChatConsumer, name="chat")])

app = FastAPI()
add_channel(app)
app.include_router(router)


@app.post("/rooms/{room}/announce")
async def announce(room: str, text: str, layer: Layer) -> Receipt:
    """Speak to a room."""
    return await layer.group_send(f"chat.{room}", {"type": "chat.message", "author": "staff", "text": text})


@app.post("/rooms/{room}/announce-plainly")
def announce_plainly(room: str, text: str, layer: Layer) -> Receipt:
    """The same, in a thread."""
    return layer.sync.group_send(f"chat.{room}", {"type": "chat.message", "author": "staff", "text": text})


@app.post("/channels/{channel}")
async def whisper(channel: str, text: str, layer: Layer) -> None:
    """Speak to one client."""
    await layer.send(channel, {"type": "chat.message", "author": "staff", "text": text})


@app.post("/users/{name}/kick")
async def kick(name: str, layer: Layer) -> None:
    """Close all connections of a name."""
    await layer.group_send(f"users.{name}", {"type": "websocket.close", "code": 4503, "reason": "é"})


@app.get("/health")
async def health(layer: Layer) -> dict[str, Any]:
    """How the layer is."""
    return asdict(await layer.health())


#: An application that knows nothing of channels but its routes.
bare = FastAPI()
bare.include_router(router)

#: No application at all.
consumer = ChatConsumer.as_asgi()
