"""The routing table of the chat: which consumer serves which path."""

from examples.chat.consumers import ChatConsumer
from fastapi_channels.routing import ConsumerRouter, route

router = ConsumerRouter([route("/ws/chat/{room}", ChatConsumer, name="chat")])
