"""The chat's consumer: what one browser window can do, and what it is told."""

import os
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from fastapi_channels.consumers import ActionConsumer, action, event
from fastapi_channels.layers import safe_name
from fastapi_channels.throttling import FrameRateThrottle

#: What rooms and people are called; FastAPI checks it before anybody is let in.
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]


class Text(BaseModel):
    """What somebody says or announces."""

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


class Person(BaseModel):
    """Who comes, is here, or goes. The id is the channel of that window: somebody with two windows has two."""

    type: str
    id: str
    name: str


def group_of(room: str) -> str:
    """The group of those who are in a room. A room may be called anything, a group may not."""
    return safe_name(f"chat.{room}")


def now() -> datetime:
    """The time on the messages: the server's, so that it is one for all."""
    return datetime.now(UTC)


class ChatConsumer(ActionConsumer):
    """One person in one room.

    Who is here is known to nobody: the others of the room may be connected to other processes of the server. Who joins
    tells the group, each of the others answers to the channel of the newcomer, and the page keeps the list. That is
    good for rooms of some dozens, and has gaps: a process that is killed says no `chat.left`, and what is sent while
    the broker is away is lost. The lists of the others are wrong then until those reload. To mend that takes presence,
    which the package doesn't have yet.
    """

    #: These go from the group to the client as they are; a type that needs more gets a method with `@event`.
    forward_events = ["chat.here", "chat.left", "chat.message", "chat.announcement"]

    async def connect(self, room: Name, name: Name) -> None:
        """Let somebody in, and tell the others. The room is in the path, the name in the query."""
        self.name = name
        self.group = group_of(room)
        await self.group_add(self.group)
        await self.accept()  # returning would do that too, but nothing can be sent before
        welcome = {"type": "chat.welcome", "room": room, "name": name, "id": self.channel_name, "process": os.getpid()}
        await self.send_json(welcome)
        await self.group_send(self.group, self.person("chat.joined"), exclude_self=True)

    @event("chat.joined")
    async def on_chat_joined(self, newcomer: Person) -> None:
        """Tell the client, and tell the newcomer that we are here."""
        await self.send_json(newcomer)
        await self.layer.send(newcomer.id, self.person("chat.here"))  # wherever that is: in this process or in another

    @action(throttle_classes=[FrameRateThrottle("10/second")])
    async def say(self, message: Text) -> dict[str, datetime]:
        """Say something to everybody in the room, oneself included; the reply has the time that they see."""
        at = now()
        await self.group_send(self.group, {"type": "chat.message", "author": self.name, "text": message.text, "at": at})
        return {"at": at}

    async def disconnect(self, code: int, reason: str) -> None:
        """Tell the others who has gone. Runs exactly once, whatever ended the connection."""
        if self.groups:  # it is in none if `connect` raised before it joined
            await self.group_send(self.group, self.person("chat.left"))

    def person(self, kind: str) -> Person:
        """The message that this person comes, is here, or goes."""
        return Person(type=kind, id=self.channel_name, name=self.name)
