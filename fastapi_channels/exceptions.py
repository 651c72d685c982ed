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
│   ├── NotAuthenticated               who the client is has to be known
│   │   └── AuthenticationFailed       the credentials are wrong
│   ├── PermissionDenied               a permission said no
│   ├── Throttled                      too many, too soon
│   ├── TooManyConnections             a limit on connections is reached
│   ├── ActionTimeout                  the action's own timeout passed
│   └── ActionCancelled                the client said `$cancel`
├── LayerError
│   ├── ChannelFull                    a channel's inbox is at its capacity
│   ├── LayerUnavailable               the broker can't be reached, or the layer is closed
│   ├── InvalidGroupName (ValueError)  not a name for a group or a channel
│   ├── InvalidMessage (ValueError)    not a message: no `type`, or it can't be encoded
│   └── UnreadableMessage              what came from the broker is not ours; it is skipped
└── WebSocketException (WebSocketException)  of `channels`, and Starlette's: an error with a text, which may close
    ├── RateLimitExceeded              too many, too soon
    ├── ActionNotExist                 no action of that name
    ├── ActionIsDeprecated             the action is deprecated
    ├── NotFound                       there is no such thing
    ├── MethodNotAllowed               not this way
    └── ParseError                     the frame can't be read
```
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic_core import to_json
from starlette.exceptions import WebSocketException as StarletteWebSocketException
from starlette.websockets import WebSocket, WebSocketState

__all__ = [
    "ActionCancelled",
    "ActionIsDeprecated",
    "ActionNotExist",
    "ActionTimeout",
    "AuthenticationFailed",
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
    "MethodNotAllowed",
    "NotAuthenticated",
    "NotFound",
    "ParseError",
    "PermissionDenied",
    "RateLimitExceeded",
    "SettingsError",
    "Throttled",
    "TooManyConnections",
    "UnknownAction",
    "UnreadableMessage",
    "WebSocketException",
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


class NotAuthenticated(ConsumerError):
    """Who the client is has to be known, and isn't."""

    code = "not_authenticated"
    status_code = 401
    close_code = 4501


class AuthenticationFailed(NotAuthenticated):
    """The client has given credentials that are wrong; raised by `BaseAuthentication.authenticate`."""


class PermissionDenied(ConsumerError):
    """A permission has said no."""

    code = "permission_denied"
    status_code = 403
    close_code = 4503


class Throttled(ConsumerError):
    """The client does something too often.

    Args:
        retry_after: In how many seconds it may try again; infinite for never, which clients are told as null.
    """

    code = "throttled"
    status_code = 429
    close_code = 4029

    def __init__(self, detail: str = "", *, retry_after: float, **extra: Any) -> None:
        self.retry_after = retry_after
        told = retry_after if math.isfinite(retry_after) else None
        when = "too often" if told is None else f"too often; try again in {told:g} s"
        super().__init__(detail or when, retry_after=told, **extra)


class TooManyConnections(ConsumerError):
    """A limit on connections is reached."""

    code = "too_many_connections"
    status_code = 429
    close_code = 4009


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


class WebSocketException(ChannelsError, StarletteWebSocketException):
    """An error that a client of a `BaseChannel` is told, in the words of the original package.

    Args:
        code: The close code; the class's by default.
        reason: The reason of the close frame; the class's by default.
        close: Whether the connection is closed with that, once the client has been told.
        status: The `status` of the error frame.
        error_msg: Its `errors`; the reason by default.
        data: Its `data`.
        request_id: Its `request_id`; by default that of the frame which is being answered.
        kwargs: More keys of the frame.
    """

    code: int = 1000
    reason: str = "disconnect error"
    status: str | int = "bad"

    def __init__(
        self,
        code: int | None = None,
        reason: str | None = None,
        *,
        close: bool = True,
        status: str | int | None = None,
        error_msg: Any = None,
        data: Any = None,
        request_id: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(type(self).code if code is None else code, type(self).reason if reason is None else reason)
        self.close = close
        self.status = type(self).status if status is None else status
        self.error_msg = self.reason if error_msg is None else error_msg
        self.data = data
        self.request_id = request_id
        self.kwargs = kwargs

    @property
    def frame(self) -> dict[str, Any]:
        """The error frame that tells of it."""
        frame = {"type": "response", "status": self.status, "request_id": self.request_id}
        return {**frame, "data": self.data, "errors": self.error_msg, **self.kwargs}


class RateLimitExceeded(WebSocketException):
    """The client does something too often."""

    code = 4029
    reason = "Too Many Request"


class ActionNotExist(WebSocketException):
    """The channel has no action of that name."""

    code = 4504
    reason = "Action Not Exist"


class ActionIsDeprecated(WebSocketException):
    """The action is there no more."""

    code = 4504
    reason = "Action is deprecated"


class NotFound(WebSocketException):
    """There is no such thing."""

    code = 4504
    reason = "Not Found"


class MethodNotAllowed(WebSocketException):
    """It can't be done this way."""

    code = 4500
    reason = "Method Not Allowed"


class ParseError(WebSocketException):
    """The frame can't be read."""

    code = 4500
    reason = "Parse Error"


async def WebSocketExceptionHandler(websocket: WebSocket, exc: WebSocketException) -> None:  # noqa: N802
    """Tell a client of an error, and close the connection if the error says so; a handshake is refused.

    `add_channel(app, add_exception_handlers=True)` gives it to the application, for its own WebSocket routes too.
    """
    if websocket.application_state is WebSocketState.CONNECTED:
        await websocket.send_text(to_json(exc.frame, inf_nan_mode="null").decode())
        if exc.close:
            await websocket.close(exc.code, exc.reason)
    elif websocket.application_state is WebSocketState.CONNECTING:
        await websocket.close(exc.code, exc.reason)
