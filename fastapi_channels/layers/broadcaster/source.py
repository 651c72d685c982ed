"""Where a `Broadcast` comes from: a URL, a backend, or the user, and what is to be known of the broker behind it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from urllib.parse import unquote

from broadcaster import Broadcast, BroadcastBackend
from typing_extensions import override

from fastapi_channels.layers.broadcaster.redis import RedisBackend

__all__ = ["Broker", "Source", "is_connected", "source_of"]


@dataclass(frozen=True, slots=True)
class Broker:
    """What a broker is capable of.

    Attributes:
        largest: How many bytes a text may have; None for as many as memory has room for.
        has_one_channel: Whether everything goes through one channel, from which each process picks what is for it.
        extra: Which extra of `broadcaster` brings its package.
    """

    largest: int | None = None
    has_one_channel: bool = False
    extra: str = ""


#: Postgres takes less than 8000 bytes; so does, for all we know, a broker that we don't know.
POSTGRES = Broker(7900, extra="postgres")

#: By the scheme of the URL.
BROKERS = {
    # broadcaster drops every topic when it leaves one, and says that it follows another before it does.
    "kafka": Broker(500_000, has_one_channel=True, extra="kafka"),
    "memory": Broker(),
    "postgres": POSTGRES,
    "postgresql": POSTGRES,
    "redis": Broker(extra="redis"),
    "rediss": Broker(extra="redis"),
    "redis-stream": Broker(extra="redis"),
}

BACKEND_METHODS = ("connect", "disconnect", "subscribe", "unsubscribe", "publish", "next_published")

#: Makes a Broadcast; what it is called with is to be told when the connection is lost.
Make = Callable[[Callable[[Exception], None]], Broadcast]


@dataclass(frozen=True, slots=True)
class Source:
    """How to get a Broadcast.

    Attributes:
        make: Gives one.
        broker: What is behind it.
        shown: Where that is, for people to read; without the password.
        is_given: Whether it is always the same one, of the user.
        secrets: What must not be shown.
    """

    make: Make
    broker: Broker
    shown: str
    is_given: bool = False
    secrets: Collection[str] = field(default=(), repr=False)

    def without_secrets(self, text: str) -> str:
        """The text of an error, for people to read."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def source_of(given: str | Broadcast | BroadcastBackend) -> Source:
    """Where the Broadcast comes from.

    Raises:
        ValueError: From nowhere; the text holds no password.
    """
    if isinstance(given, str):
        return _source_of_url(given)
    if isinstance(given, Broadcast):
        return Source(lambda _: given, POSTGRES, "the Broadcast", is_given=True)
    if all(callable(getattr(given, name, None)) for name in BACKEND_METHODS):
        return Source(lambda _: BackendBroadcast(given), POSTGRES, type(given).__name__)
    # Never the value itself: it may hold a password.
    raise ValueError(f"broadcast is a URL, a Broadcast, or a backend of one, not a {type(given).__name__}")


def _source_of_url(url: str) -> Source:
    scheme, _, rest = url.partition("://")
    if scheme not in BROKERS:
        raise ValueError(f"not a URL of broadcaster; it has {', '.join(f'{known}://' for known in BROKERS)}")
    credentials, at, place = rest.rpartition("@")  # the last one, whatever signs are in the password
    user, colon, password = credentials.partition(":")
    place, _, options = place.partition("?")
    shown = f"{scheme}://{f'{user}:' if colon else ''}{'***@' if at else ''}{place}"
    if "#" in rest or re.search("[/?]", credentials):
        raise ValueError(
            f"{scheme}://***: what is not a sign of the URL itself, such as @, / or # in a password, is percent-encoded"
        )
    written = {password, *re.findall("password=([^&]*)", options)} - {""}
    secrets = sorted(written | {unquote(secret) for secret in written}, key=len, reverse=True)

    def make(lost: Callable[[Exception], None]) -> Broadcast:
        if scheme in ("redis", "rediss"):
            return BackendBroadcast(RedisBackend(url, lost))
        return StreamBroadcast(url) if scheme == "redis-stream" else Broadcast(url)

    try:
        make(lambda _: None)
    except ModuleNotFoundError as error:
        extra = BROKERS[scheme].extra
        raise ValueError(f"{shown} needs {error.name}: pip install 'broadcaster[{extra}]'") from error
    except TypeError as error:  # redis-py's, with the name of an option
        raise ValueError(f"{shown}: {error}") from None
    except Exception:  # urllib's, which repeats parts of what it was given
        raise ValueError(f"{shown}: not a URL") from None
    return Source(make, BROKERS[scheme], shown, secrets=secrets)


class BackendBroadcast(Broadcast):
    """A Broadcast that disconnects its backend though its listener has died, of an error or with the event loop."""

    def __init__(self, backend: BroadcastBackend) -> None:
        super().__init__(backend=backend)
        self.backend = backend

    @override
    async def disconnect(self) -> None:
        try:
            await super().disconnect()
        except BaseException:
            await self.backend.disconnect()
            raise


class StreamBroadcast(Broadcast):
    """The same for Redis Streams, whose backend can't be got at."""

    @override
    async def disconnect(self) -> None:
        try:
            await super().disconnect()
        except BaseException:
            await self.connect()  # nothing but a new listener, with which it disconnects
            await super().disconnect()
            raise


def is_connected(broadcast: Broadcast) -> bool:
    """Whether its listener runs on this event loop; it doesn't tell by itself."""
    frames = [getattr(task.get_coro(), "cr_frame", None) for task in asyncio.all_tasks()]
    return any(frame is not None and frame.f_locals.get("self") is broadcast for frame in frames)
