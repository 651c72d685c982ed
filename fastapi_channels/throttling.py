"""Throttles: how often a client may do something, over all processes that share a Redis, or in this one.

```python
class ChatConsumer(ActionConsumer):
    throttle_classes = [UserRateThrottle("20/second")]

    @action(throttle_classes=["5/10s"])
    async def say(self, message: Say) -> None: ...


@app.post("/rooms", dependencies=[Depends(HTTPThrottle("2/5s"))])
async def make_room() -> None: ...
```

Spec:
    decisions.md, 26.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from typing_extensions import override

from fastapi_channels import _fastapi, _fastapi_limiter
from fastapi_channels._specs import entries_of, instance_of, name_of
from fastapi_channels._tasks import call
from fastapi_channels.answers import answer_to
from fastapi_channels.application import CHANNEL_KEY, Callback, Channels, Identifier
from fastapi_channels.authentication import user_id_of
from fastapi_channels.exceptions import DefinitionError, LayerUnavailable, SettingsError, Throttled
from fastapi_channels.layers.limiter import Limiter, MemoryLimiter, Rate
from fastapi_channels.origins import network_of

__all__ = [
    "AnonRateThrottle",
    "BaseThrottle",
    "ConnectionRateThrottle",
    "FrameRateThrottle",
    "HTTPThrottle",
    "RateThrottle",
    "ScopedRateThrottle",
    "UserRateThrottle",
    "limiter",
    "limits_of",
    "throttles_of",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_LIMITS = "__fastapi_channels_limits__"


#: Where the scope has the key of the client's address, once somebody has asked for it.
_ADDRESS = "fastapi_channels_address"

#: Where the scope has what counts the frames of the connection by itself, likewise.
_LIMITER = "fastapi_channels_limiter"


class BaseThrottle(ABC):
    """Says how long a client has to wait; subclass it for one of your own."""

    #: Whether it is asked for new connections, and not for frames.
    is_for_connections: ClassVar[bool] = False

    @abstractmethod
    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        """How long the client has to wait; may be plain `def`.

        Args:
            connection: The WebSocket, or the request where it is a dependency of an HTTP route.
            action: The action that the frame asks for, if it asks for one.

        Returns:
            0 if it may go on, which is counted; else for how many seconds.
        """

    def check_settings(self, channels: Channels) -> None:
        """Look, when the application starts, whether the settings have what it needs.

        Raises:
            SettingsError: They don't.
        """


class RateThrottle(BaseThrottle):
    """So many in so much time, for each key.

    Args:
        rate: `"10/second"`, `"5/10s"`, `"100/minute"`; None for what `THROTTLE_RATES` says for its `scope`.

    Raises:
        DefinitionError: It is no rate, or there is neither a rate nor a scope.
    """

    #: Under which name `THROTTLE_RATES` has its rate. All throttles of one name and one rate count together.
    scope: str = ""

    def __init__(self, rate: str | Rate | None = None) -> None:
        self._rate = None if rate is None else Rate.parse(rate)
        #: The rate that was asked for last, and what keys of it begin with.
        self._counted: tuple[Rate, str] | None = None
        if self._rate is None and not self.scope:
            raise DefinitionError(f"{type(self).__name__} needs a rate, or a scope that THROTTLE_RATES has a rate for")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self._rate is None else repr(str(self._rate))})"

    @abstractmethod
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        """Whom to count, such as `user:7`; None if nobody is to be."""

    def bucket(self) -> str:
        """With which throttles of the same rate it counts together: those of its scope, or of its class."""
        return f"scope:{self.scope}" if self.scope else f"class:{name_of(type(self))}"

    def rate(self, channels: Channels) -> Rate:
        """Its rate under these settings.

        Raises:
            SettingsError: `THROTTLE_RATES` has none for its scope.
        """
        if self._rate is not None:
            return self._rate
        try:
            return channels.rates[self.scope]
        except KeyError:
            raise SettingsError(f"THROTTLE_RATES has no rate for {self.scope!r}, as {self!r} needs") from None

    @override
    def check_settings(self, channels: Channels) -> None:
        self.rate(channels)

    @override
    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        key = self.key(connection, action)
        if key is None:
            return 0.0
        channels = Channels.of(connection.scope)
        rate = self.rate(channels)
        if self._counted is None or self._counted[0] is not rate:
            self._counted = rate, f"{self.bucket()}:{rate}:"
        return await self._limiter(channels, connection).hit(self._counted[1] + key, rate)

    def _limiter(self, channels: Channels, connection: HTTPConnection) -> Limiter:
        """What counts."""
        return channels.limiter


class ConnectionRateThrottle(RateThrottle):
    """New connections, by address."""

    scope = "connection"
    is_for_connections = True

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return address_of(connection)


class UserRateThrottle(RateThrottle):
    """Frames, by user; those of strangers by address."""

    scope = "user"

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return user_or_address(connection)


class FrameRateThrottle(RateThrottle):
    """Frames, of each connection by itself, whoever shares its user or address.

    They are counted with the connection, in memory: it is in one process, and leaves nothing behind.
    """

    scope = "frame"

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return "connection"

    @override
    def _limiter(self, channels: Channels, connection: HTTPConnection) -> Limiter:
        limiter: Limiter | None = connection.scope.get(_LIMITER)
        if limiter is None:
            limiter = connection.scope[_LIMITER] = MemoryLimiter()
        return limiter


class AnonRateThrottle(RateThrottle):
    """Frames of strangers, by address; a user's are not counted."""

    scope = "anon"

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return address_of(connection) if user_id_of(connection) is None else None


class ScopedRateThrottle(RateThrottle):
    """Frames, by user or address, counted under a name for which `THROTTLE_RATES` has a rate.

    Args:
        scope: The name.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        super().__init__()

    def __repr__(self) -> str:
        return f"ScopedRateThrottle({self.scope!r})"

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return user_or_address(connection)


class _OwnRate(RateThrottle):
    """A rate by user or address, counted for one consumer, and one action of it, alone."""

    def __init__(self, rate: str | Rate, owner: str) -> None:
        super().__init__(rate)
        self._owner = owner

    @override
    def bucket(self) -> str:
        return f"own:{self._owner}"

    @override
    def key(self, connection: HTTPConnection, action: str | None) -> str | None:
        return user_or_address(connection)


class HTTPThrottle:
    """A throttle as a dependency of HTTP routes: `Depends(HTTPThrottle("2/5s"))`.

    What it refuses is answered with 429 and Retry-After, by applications without `add_channel` too.

    Args:
        throttle: A rate, counted for each route and method alone, by user or address; or a throttle.

    Raises:
        DefinitionError: It is neither.
    """

    def __init__(self, throttle: str | Rate | type[BaseThrottle] | BaseThrottle) -> None:
        self._rate = Rate.parse(throttle) if isinstance(throttle, str | Rate) else None
        self._throttle = None if isinstance(throttle, str | Rate) else throttles_of([throttle], "")[0]
        if isinstance(self._throttle, FrameRateThrottle):
            raise DefinitionError(f"{self._throttle!r} counts the frames of a connection, and a request has none")

    def check_settings(self, channels: Channels) -> None:
        """Look, when the application starts, whether the settings have what it needs.

        Raises:
            SettingsError: They don't.
        """
        if self._throttle is not None:
            self._throttle.check_settings(channels)

    async def __call__(self, connection: HTTPConnection) -> None:
        """Let a request through.

        Raises:
            Throttled: It has to wait. The error is an `HTTPException` too.
        """
        throttle = self._throttle
        if throttle is None:
            assert self._rate is not None
            owner = f"{connection.scope.get('method', 'WS')} {_fastapi.route_path(connection.scope)}"
            throttle = _OwnRate(self._rate, owner)
        channels = Channels.of(connection.scope)
        if not channels.is_open:  # nobody runs the lifespan of a mounted application
            with suppress(LayerUnavailable):  # in which case THROTTLE_ON_ERROR says what is done
                await channels.open()
        try:
            await ask([throttle], connection)
        except Throttled as error:
            raise _ThrottledRequest(error) from error


# The oldest FastAPI reads an annotation that is text in a function alone, and not in the `__call__` of an object.
HTTPThrottle.__call__.__annotations__["connection"] = HTTPConnection


class _ThrottledRequest(Throttled, HTTPException):
    """Throttled, as every application can answer it."""

    def __init__(self, error: Throttled) -> None:
        HTTPException.__init__(self, error.status_code, error.detail, answer_to(error).headers)
        self.retry_after, self.code, self.extra = error.retry_after, error.code, error.extra


def throttles_of(specs: Sequence[Any], owner: str) -> tuple[BaseThrottle, ...]:
    """The throttles of a `throttle_classes`.

    Args:
        specs: Classes, instances, and rates.
        owner: For whom rates are counted alone: the consumer, and the action if it is one's.

    Raises:
        DefinitionError: An entry is none of these.
    """
    return tuple(_throttle_of(spec, owner) for spec in entries_of(specs, "throttle_classes"))


def _throttle_of(spec: Any, owner: str) -> BaseThrottle:
    if isinstance(spec, BaseThrottle):
        return spec
    if isinstance(spec, str | Rate):
        return _OwnRate(spec, owner)
    if isinstance(spec, type) and issubclass(spec, BaseThrottle):
        return instance_of(spec)
    if _fastapi_limiter.is_limiter(spec):
        return _ForeignThrottle(spec, owner)
    raise DefinitionError(f"{spec!r} is no throttle: a class, an instance or a rate is one")


async def ask(throttles: Iterable[BaseThrottle], connection: HTTPConnection, action: str | None = None) -> None:
    """Ask all throttles.

    Raises:
        Throttled: One or more say wait; the longest wait is told.
    """
    longest = 0.0
    for throttle in throttles:
        wait = await call(throttle.wait, connection, action)
        if not isinstance(wait, float | int) or isinstance(wait, bool) or not wait >= 0:
            raise TypeError(f"{throttle!r} answers for how many seconds to wait, not {wait!r}")
        longest = max(longest, wait)
    if longest > 0:
        # To the millisecond, and not down: who comes when it was told gets through.
        raise Throttled(retry_after=math.ceil(longest * 1000) / 1000 if math.isfinite(longest) else longest)


def address_of(connection: HTTPConnection) -> str:
    """The key of the client's address."""
    scope = connection.scope
    key: str | None = scope.get(_ADDRESS)
    if key is None:
        address = network_of(Channels.of(scope).proxies.address_of(connection))
        key = scope[_ADDRESS] = f"address:{address}"
    return key


def user_or_address(connection: HTTPConnection) -> str:
    """The key of the client's user, or of its address if it is a stranger."""
    user_id = user_id_of(connection)
    return address_of(connection) if user_id is None else f"user:{user_id}"


async def _identify(connection: HTTPConnection) -> str:
    """Whom fastapi-limiter counts for frames; on whichever path, since clients may choose that."""
    return address_of(connection)


class _ForeignThrottle(BaseThrottle):
    """A limiter of fastapi-limiter, counted for one consumer, and one action of it, alone."""

    def __init__(self, limiter: Any, owner: str) -> None:
        self._limiter = _fastapi_limiter.Foreign(limiter, _identify)
        self._owner = owner

    def __repr__(self) -> str:
        return repr(self._limiter)

    @override
    def check_settings(self, channels: Channels) -> None:
        self._limiter.check()

    @override
    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        key = ":".join(filter(None, (self._owner, connection.scope.get(CHANNEL_KEY))))
        return await Channels.of(connection.scope).guard.wait(lambda: self._limiter.wait(connection, key))


class _Limit(BaseThrottle):
    """What `limiter` says of an action."""

    def __init__(self, owner: str, rate: Rate, identifier: Identifier | None, callback: Callback | None) -> None:
        self.number = 0
        self._owner = owner
        self._rate = rate
        self._identifier = identifier
        self._callback = callback

    def __repr__(self) -> str:
        return f"limiter({self._rate})"

    @override
    async def wait(self, connection: HTTPConnection, action: str | None = None) -> float:
        channels = Channels.of(connection.scope)
        identifier = self._identifier or channels.limiting.identifier
        who = user_or_address(connection) if identifier is None else str(await call(identifier, connection))
        parts = (connection.scope.get(CHANNEL_KEY), action, self._owner, self.number, self._rate)
        place = (quote(str(part), safe="") for part in parts)
        wait = await channels.limiter.hit(":".join((channels.limiting.prefix, *place, who)), self._rate)
        callback = self._callback or channels.limiting.ws_callback
        if wait > 0 and callback is not None:
            await call(callback, connection, math.ceil(wait * 1000))
        return wait


def limiter(
    times: int = 1,
    milliseconds: int = 0,
    seconds: int = 0,
    minutes: int = 0,
    hours: int = 0,
    identifier: Identifier | None = None,
    ws_callback: Callback | None = None,
) -> Callable[[Function], Function]:
    """Limit how often an action of a `Channel` is asked for; above or below `@action`, and more than once.

    It counts for each channel and action alone, where all throttles count: in the Redis that the settings name, or in
    this process.

    Args:
        times: How many calls are let through in that time.
        milliseconds: The time, of which the other units are more.
        seconds: See `milliseconds`.
        minutes: See `milliseconds`.
        hours: See `milliseconds`.
        identifier: Whom to count, by the connection; the user, or the address of a stranger, by default.
        ws_callback: Called with the connection and the milliseconds to wait when a call is refused; what it raises is
            the answer.

    Raises:
        DefinitionError: It would let through none, or is for no time.
    """
    period = milliseconds / 1000 + seconds + 60 * minutes + 3600 * hours
    if times < 1 or period <= 0:
        raise DefinitionError(
            f"limiter() lets through at least one in more than 0 seconds, not {times} in {period:g} s"
        )

    def decorator(function: Function) -> Function:
        if not callable(function):
            raise DefinitionError(f"@limiter is for actions, not for a {type(function).__name__}")
        owner = getattr(function, "__qualname__", type(function).__qualname__)
        limit = _Limit(owner, Rate(times, period), identifier, ws_callback)
        limits = limits_of(function)
        limit.number = len(limits)
        setattr(function, _LIMITS, (*limits, limit))
        return function

    return decorator


def limits_of(function: Any) -> tuple[BaseThrottle, ...]:
    """What `limiter` says of a function."""
    limits: tuple[BaseThrottle, ...] = getattr(function, _LIMITS, ())
    return limits
