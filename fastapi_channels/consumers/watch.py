"""What ends an open connection by itself: silence, credentials that expire, a permission that is withdrawn."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from fastapi_channels.answers import close_code_of
from fastapi_channels.authentication import expires_in
from fastapi_channels.connection import State
from fastapi_channels.exceptions import ConsumerError, NotAuthenticated, PermissionDenied
from fastapi_channels.layers.envelope import SEND, encode
from fastapi_channels.pace import Silence

if TYPE_CHECKING:
    from fastapi_channels.consumers.session import Session

__all__ = ["Watch"]

logger = logging.getLogger("fastapi_channels")

#: How many seconds before its credentials expire a client is told so.
EXPIRY_NOTICE = 60.0


class Watch:
    """The timers of one open connection.

    Args:
        session: Whose connection it is.
        has_heard: Whether the client has sent a frame already.
    """

    __slots__ = ("_connection", "_expiry", "_recheck", "_session", "_silence")

    def __init__(self, session: Session, *, has_heard: bool) -> None:
        self._session = session
        self._connection = session.connection
        self._expiry: asyncio.TimerHandle | None = None
        self._recheck: asyncio.TimerHandle | None = None
        self._silence: Silence | None = None
        limits = self._connection.limits
        if limits.first_frame_timeout is not None or limits.idle_timeout is not None:
            self._silence = Silence(
                self._connection.crew.loop,
                None if has_heard else limits.first_frame_timeout,
                limits.idle_timeout,
                lambda: session.is_serving,
                lambda what: self._connection.close_soon(1001, what),
            )
        self._ask_again_later()
        self.watch_expiry()

    @staticmethod
    def is_needed(session: Session) -> bool:
        """Whether there is anything to watch."""
        limits = session.connection.limits
        after = (limits.first_frame_timeout, limits.idle_timeout, limits.permission_recheck)
        return any(seconds is not None for seconds in after) or expires_in(session.websocket) is not None

    def heard(self) -> None:
        """A frame has come."""
        if self._silence is not None:
            self._silence.heard()

    def cancel(self) -> None:
        """Watch no longer."""
        for timer in (self._expiry, self._recheck, self._silence):
            if timer is not None:
                timer.cancel()

    # Credentials

    def watch_expiry(self) -> None:
        """Tell the client before its credentials expire, and close the connection with 4501 when they have."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        left = expires_in(self._session.websocket)
        if left is not None and self._connection.state is State.OPEN:
            later = max(left - EXPIRY_NOTICE, 0)
            self._expiry = self._connection.crew.loop.call_later(later, self._tell_of_expiry)

    def _tell_of_expiry(self) -> None:
        left = max(expires_in(self._session.websocket) or 0.0, 0.0)
        self._expiry = self._connection.crew.loop.call_later(left, self._expire)
        payload = encode({"type": "auth.expiring", "in": round(left, 3)})
        self._connection.write({"type": SEND, "text": payload.decode()}, len(payload))

    def _expire(self) -> None:
        self._connection.close_soon(close_code_of(NotAuthenticated.status_code), "the credentials have expired")

    # Permissions

    def _ask_again_later(self) -> None:
        every = self._connection.limits.permission_recheck
        if every is not None and self._connection.state is State.OPEN:
            # Not all at once who have come at once; and never later than it says.
            wait = every * random.uniform(0.8, 1.0)
            self._recheck = self._connection.crew.loop.call_later(wait, self._begin_to_ask_again)

    def _begin_to_ask_again(self) -> None:
        _ = self._session.start(self._ask_again())

    async def _ask_again(self) -> None:
        """Ask for permission once more; who has lost it is closed with 4503."""
        try:
            await self._session.ask_again()
        except Exception as error:
            if not isinstance(error, ConsumerError):
                logger.exception("permissions could not be asked again, which denies")
            self._connection.close_soon(close_code_of(PermissionDenied.status_code), "permission was withdrawn")
        else:
            self._ask_again_later()
