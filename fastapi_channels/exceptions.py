"""Every exception of the package.

```
ChannelsError
├── SettingsError (ValueError)         a setting is wrong: the application does not start
├── DefinitionError (TypeError)        a consumer class is wrong: raised where the class is made
├── ConsumerError                      what a client is told: an error frame, a refusal, a close
│   ├── InvalidFrame                   not a frame of the protocol
│   ├── InvalidData                    the frame's data does not fit its schema
│   ├── UnknownAction                  no action of that name
│   ├── FrameTooLarge                  above MAX_FRAME_SIZE
│   ├── ActionTimeout                  the action's own timeout passed
│   └── ActionCancelled                the client said `$cancel`
└── LayerError
    ├── ChannelFull                    a channel's inbox is at its capacity
    ├── LayerUnavailable               the broker can't be reached, or the layer is closed
    ├── InvalidGroupName (ValueError)  not a name for a group or a channel
    ├── InvalidMessage (ValueError)    not a message: no `type`, or it can't be encoded
    └── UnreadableMessage              what came from the broker is not ours; it is skipped
```
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "ActionCancelled",
    "ActionTimeout",
    "ChannelFull",
    "ChannelsError",
    "ConsumerError",
    "DefinitionError",
    "FrameTooLarge",
    "InvalidData",
    "InvalidFrame",
    "InvalidGroupName",
    "InvalidMessage",
    "LayerError",
    "LayerUnavailable",
    "SettingsError",
    "UnknownAction",
    "UnreadableMessage",
]


class ChannelsError(Exception):
    """The root of this package's exceptions."""


class SettingsError(ChannelsError, ValueError):
    """A setting is missing, misspelled or wrong; the text names it and where it came from."""


class DefinitionError(ChannelsError, TypeError):
    """A consumer class contradicts itself; raised where the class is made, never at a connection."""


class ConsumerError(ChannelsError):
    """Something that the client is to be told.

    Raised in `receive` or an action it is answered with an error frame and the connection lives on; in `connect`
    it refuses the handshake, or closes the connection if that was accepted already.

    Args:
        detail: For people to read; the client sees it.
        code: For programs to read, such as `"room_full"`.
        extra: More keys of the error object; anything that JSON can hold.

    Spec:
        protocol.md, 1 (errors) and 3 (close codes).
    """

    code: str = "error"
    #: The HTTP status of a refused handshake.
    status_code: ClassVar[int] = 403
    #: The close code where there is no HTTP response; None for the one that says what the status says.
    close_code: ClassVar[int | None] = None

    def __init__(self, detail: str = "", *, code: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        if code is not None:
            self.code = code
        self.extra = extra


class InvalidFrame(ConsumerError):
    """The frame is not one of the protocol: not JSON, not an object, no action."""

    code = "invalid_frame"
    status_code = 422


class InvalidData(ConsumerError):
    """The data of a frame does not fit what its receiver declares; `extra["errors"]` lists pydantic's findings."""

    code = "invalid_data"
    status_code = 422


class UnknownAction(ConsumerError):
    """The consumer has no action of that name."""

    code = "unknown_action"
    status_code = 404


class FrameTooLarge(ConsumerError):
    """The frame is above `MAX_FRAME_SIZE`."""

    code = "too_large"
    status_code = 413


class ActionTimeout(ConsumerError):
    """The action took longer than its `timeout` and was cancelled."""

    code = "timeout"
    status_code = 504


class ActionCancelled(ConsumerError):
    """The client cancelled the call with `$cancel`."""

    code = "cancelled"


class LayerError(ChannelsError):
    """The root of what a channel layer raises."""


class ChannelFull(LayerError):
    """The channel's inbox is at its capacity; the message was not taken.

    Spec:
        The Channels layer specification, "Capacity".
    """


class LayerUnavailable(LayerError):
    """The layer can't carry messages now: its broker is away, or the layer is closed.

    Attributes:
        maybe_sent: Whether the message may have reached the broker all the same.
    """

    def __init__(self, detail: str = "the channel layer is not available", *, maybe_sent: bool = False) -> None:
        super().__init__(detail)
        self.maybe_sent = maybe_sent


class InvalidGroupName(LayerError, ValueError):
    """Not a name for a group or a channel; `safe_name` makes one of any text."""


class InvalidMessage(LayerError, ValueError):
    """Not a message: it has no `type`, or JSON can't hold it. Raised at the sender, nothing was sent."""


class UnreadableMessage(LayerError):
    """What has come from the broker is no message of ours, or not for our keys; layers log, count and skip it."""
