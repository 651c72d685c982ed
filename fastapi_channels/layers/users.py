"""Users: which connections of this process are whose, so that a user can be disconnected from anywhere."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import override

from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.sink import Sink

__all__ = ["DISCONNECT", "USERS_GROUP", "Users"]

#: The group that a layer is in itself in every process which serves a user that is known.
#: No application and no client can name it.
USERS_GROUP = "\x1fusers"

#: The type of the message that disconnects a user.
DISCONNECT = "user.disconnect"

#: Closes a connection, with a code and a reason.
Close = Callable[[int, str], None]


class Users(Sink):
    """Closes the connections of a user when a message says so."""

    def __init__(self) -> None:
        self._closes: dict[str, dict[str, Close]] = {}

    def add(self, user_id: str, channel: str, close: Close) -> None:
        """Note whose connection it is."""
        self._closes.setdefault(user_id, {})[channel] = close

    def discard(self, user_id: str, channel: str) -> None:
        """Forget a connection; does nothing if it isn't known."""
        closes = self._closes.get(user_id)
        if closes is not None:
            closes.pop(channel, None)
            if not closes:
                del self._closes[user_id]

    def clear(self) -> None:
        """Forget all."""
        self._closes.clear()

    @override
    def deliver(self, envelope: Envelope) -> bool:
        message = envelope.decode()
        user_id, code, reason = message.get("user"), message.get("code"), message.get("reason")
        if envelope.type == DISCONNECT and isinstance(code, int) and isinstance(reason, str):
            for close in list(self._closes.get(str(user_id), {}).values()):
                close(code, reason)
        return True
