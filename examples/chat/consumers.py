"""The chat's consumer: what one browser window can do, and what it is told."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from examples.chat.people import People
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.layers import safe_name

#: What rooms and people are called; FastAPI checks it before anybody is let in.
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]

people = People()


class Text(BaseModel):
    """What somebody says or announces."""

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


def group_of(room: str) -> str:
    """The group of those who are in a room. A room may be called anything, a group may not."""
    return safe_name(f"chat.{room}")


def now() -> datetime:
    """The time on the messages: the server's, so that it is one for all."""
    return datetime.now(UTC)


class ChatConsumer(ActionConsumer):
    """One person in one room."""

    #: These go from the group to the client as they are; a type that needs a look first gets a method with `@event`.
    forward_events = ["chat.joined", "chat.left", "chat.message", "chat.announcement"]

    async def connect(self, room: Name, name: Name) -> None:
        """Tell the person who is here, and the others who has come. The room is in the path, the name in the query."""
        self.name = name
        self.group = group_of(room)
        is_new = people.enter(self.group, name)
        await self.group_add(self.group)
        await self.accept()  # returning would do that too, but nothing can be sent before
        here = people.of(self.group)
        await self.send_json({"type": "chat.welcome", "room": room, "name": name, "people": here})
        if is_new:
            joined = {"type": "chat.joined", "name": name, "people": here}
            await self.group_send(self.group, joined, exclude_self=True)

    @action
    async def say(self, message: Text) -> dict[str, datetime]:
        """Say something to everybody in the room, oneself included; the reply has the time that they see."""
        at = now()
        await self.group_send(self.group, {"type": "chat.message", "author": self.name, "text": message.text, "at": at})
        return {"at": at}

    async def disconnect(self, code: int, reason: str) -> None:
        """Tell the others who has gone. Runs exactly once, whatever ended the connection."""
        if people.leave(self.group, self.name):
            left = {"type": "chat.left", "name": self.name, "people": people.of(self.group)}
            await self.group_send(self.group, left)
