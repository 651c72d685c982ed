from fastapi import FastAPI

from fastapi_channels import Layer, add_channel
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.routing import ConsumerRouter, route


class ChatConsumer(ActionConsumer):
    forward_events = ["chat.message"]  # what goes from the group to the client as it is

    async def connect(self, room: str) -> None:
        self.group = f"chat.{room}"
        await self.group_add(self.group)

    @action
    async def say(self, text: str) -> None:
        await self.group_send(self.group, {"type": "chat.message", "text": text})


app = FastAPI()
add_channel(app)
app.include_router(ConsumerRouter([route("/ws/{room}", ChatConsumer)]))


@app.post("/rooms/{room}/announce")
async def announce(room: str, text: str, layer: Layer) -> None:
    await layer.group_send(f"chat.{room}", {"type": "chat.message", "text": text})
