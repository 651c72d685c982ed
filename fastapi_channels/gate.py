"""The gate: what a client has to pass before its handshake is answered, and before each of its frames is handled.

Before the handshake, in this order: the page's origin; throttles of connections; how many there are of the address and
of the consumer; authentication; how many there are of the user; permissions. Then come FastAPI's parameters and
dependencies, and `connect`. Before a frame: throttles, then permissions; its data is looked at after that.

Spec:
    decisions.md, 21 and 26; protocol.md, 2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import ImportString, TypeAdapter, ValidationError
from starlette.websockets import WebSocket

from fastapi_channels import permissions, throttling
from fastapi_channels._specs import name_of
from fastapi_channels.application import Channels
from fastapi_channels.authentication import (
    BaseAuthentication,
    TokenAuthentication,
    authenticate,
    authentications_of,
    refresh,
    user_id_of,
)
from fastapi_channels.exceptions import DefinitionError, InvalidData, PermissionDenied, SettingsError
from fastapi_channels.origins import OriginRules
from fastapi_channels.pace import Tally
from fastapi_channels.permissions import BasePermission, permissions_of
from fastapi_channels.throttling import BaseThrottle, throttles_of

__all__ = ["Gate", "Rules", "Visitor"]

logger = logging.getLogger("fastapi_channels")

Made = TypeVar("Made")

#: How many refused origins a minute are logged.
COMPLAINTS = 100

_dotted_path: TypeAdapter[Any] = TypeAdapter(ImportString)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a consumer class, or an action, says of its gate; None where the settings say it.

    Attributes:
        owner: The class.
        allowed_origins: As in the settings.
        authentication_classes: As in the settings.
        permission_classes: As in the settings.
        throttle_classes: As in the settings.
        max_connections: As in the settings.
        max_connections_per_user: As in the settings, counted for this class alone.
        max_connections_per_address: Likewise.
        token_in_first_frame: Whether a client that is not known may send its token as the first frame.
        action: Which action's they are; None for the class's own.
    """

    owner: type
    allowed_origins: Sequence[str] | None = None
    authentication_classes: Sequence[Any] | None = None
    permission_classes: Sequence[Any] | None = None
    throttle_classes: Sequence[Any] | None = None
    max_connections: int | None = None
    max_connections_per_user: int | None = None
    max_connections_per_address: int | None = None
    token_in_first_frame: bool = False
    action: str | None = None

    @property
    def name(self) -> str:
        """Whose they are, for people."""
        return self.owner.__qualname__ if self.action is None else f"{self.owner.__qualname__}.{self.action}"

    @property
    def key(self) -> str:
        """Whose they are, and nobody else's, in every process."""
        name = name_of(self.owner)
        return name if self.action is None else f"{name}#{self.action}"


class Visitor(Protocol):
    """The connection that stands at the gate."""

    @property
    def websocket(self) -> WebSocket:
        """Starlette's."""
        ...

    async def occupy(self, key: str, limit: int) -> None:
        """Take a place of which there are so many, until the connection ends.

        Raises:
            TooManyConnections: There is none left.
        """

    async def vacate(self, key: str) -> None:
        """Give such a place back; does nothing if it has none."""

    async def identified(self) -> None:
        """The user is known from now on."""

    def unidentified(self) -> None:
        """The user is not known after all."""

    async def first_token(self) -> str:
        """The token that the client sends as its first frame.

        Raises:
            NotAuthenticated: It sent none.
        """
        ...


class Gate:
    """The gate of one consumer class in one application.

    Args:
        channels: The application's.
        rules: The class's.
        actions: What its actions add, by name.

    Raises:
        SettingsError: Something of it is wrong, or a throttle has no rate.
    """

    def __init__(self, channels: Channels, rules: Rules, actions: Mapping[str, Rules]) -> None:
        settings = channels.settings
        self._channels = channels
        origins = settings.allowed_origins if rules.allowed_origins is None else rules.allowed_origins
        self._origins = _made("ALLOWED_ORIGINS", lambda: OriginRules(origins))
        self._authentications: Sequence[BaseAuthentication] = _chosen(
            "AUTHENTICATION_CLASSES", rules.authentication_classes, settings.authentication_classes, authentications_of
        )
        self._permissions: tuple[BasePermission, ...] = _chosen(
            "PERMISSION_CLASSES", rules.permission_classes, settings.permission_classes, permissions_of
        )
        throttles: tuple[BaseThrottle, ...] = _chosen(
            "THROTTLE_CLASSES",
            rules.throttle_classes,
            settings.throttle_classes,
            lambda specs: throttles_of(specs, rules.key),
        )
        self._at_connect = tuple(throttle for throttle in throttles if throttle.is_for_connections)
        self._throttles = tuple(throttle for throttle in throttles if not throttle.is_for_connections)
        self._actions = {
            name: (
                self._throttles + _throttles_of(added),
                self._permissions + permissions_of(added.permission_classes or ()),
            )
            for name, added in actions.items()
            if added.throttle_classes or added.permission_classes
        }
        self._places = {
            "consumer": _place(rules.key, rules.max_connections, settings.max_connections, is_own=True),
            "user": _place(rules.key, rules.max_connections_per_user, settings.max_connections_per_user),
            "address": _place(rules.key, rules.max_connections_per_address, settings.max_connections_per_address),
        }
        self._token_in_first_frame = rules.token_in_first_frame
        if rules.token_in_first_frame and not any(
            isinstance(each, TokenAuthentication) for each in self._authentications
        ):
            raise SettingsError(f"{rules.name}.token_in_first_frame needs a TokenAuthentication that takes the token")
        for throttle in (*throttles, *(throttle for asked, _ in self._actions.values() for throttle in asked)):
            throttle.check_settings(channels)
        self._refused_origins = Tally()
        #: Whether it finds out who clients are.
        self.authenticates = bool(self._authentications)
        #: Whether frames have to pass anything.
        self.asks_of_frames = bool(self._throttles or self._permissions or self._actions)

    @staticmethod
    def check(rules: Rules, actions: Mapping[str, Rules]) -> None:
        """Look, when a class is made, whether what it says makes sense.

        Raises:
            DefinitionError: It doesn't.
        """
        checks: list[tuple[str, str, Callable[[], object]]] = [
            (rules.name, "allowed_origins", lambda: OriginRules(rules.allowed_origins)),
            (rules.name, "authentication_classes", lambda: authentications_of(rules.authentication_classes or ())),
        ]
        for each in (rules, *actions.values()):
            checks += [
                (each.name, "permission_classes", partial(permissions_of, each.permission_classes or ())),
                (each.name, "throttle_classes", partial(_throttles_of, each)),
            ]
        for name, attribute, check in checks:
            try:
                check()
            except (TypeError, ValueError) as error:
                raise DefinitionError(f"{name}.{attribute}: {error}") from error

    async def admit(self, visitor: Visitor) -> None:
        """Let a client's handshake through.

        Raises:
            ConsumerError: It is refused.
            LayerUnavailable: Its connections can't be counted, and have to be.
        """
        websocket = visitor.websocket
        host = self._channels.proxies.host_of(websocket)
        origin = websocket.headers.get("origin")
        if not self._origins.allow(origin, host):
            self._complain(origin, host)
            raise PermissionDenied("this page may not connect here")
        await throttling.ask(self._at_connect, websocket)
        if self._places["address"] is not None:
            await self._occupy("address", throttling.address_of(websocket), visitor)
        await self._occupy("consumer", "", visitor)
        await authenticate(self._authentications, websocket)
        if self._token_in_first_frame and user_id_of(websocket) is None:
            await refresh(self._authentications, websocket, await visitor.first_token())
        await self._identified(visitor)
        await self.ask_again(websocket)

    async def renew(self, visitor: Visitor, token: Any) -> None:
        """Take a new token from a client whose connection is open; if that is refused, the old one is still good.

        Raises:
            ConsumerError: It is none, or the client may not be here with it.
            LayerUnavailable: Its connections can't be counted, and have to be.
        """
        if not isinstance(token, str) or not token:
            raise InvalidData("the data of $auth is an object with a token")
        scope = visitor.websocket.scope
        before = {key: scope[key] for key in ("user", "auth") if key in scope}
        was_known = user_id_of(visitor.websocket) is not None
        try:
            await refresh(self._authentications, visitor.websocket, token)
            if not was_known:
                await self._identified(visitor)  # before it is asked, so that who is disconnected meanwhile is
            await self.ask_again(visitor.websocket)
        except BaseException:
            if not was_known:
                await self._unidentified(visitor)
            for key in ("user", "auth"):
                scope.pop(key, None)
            scope.update(before)
            raise

    async def ask_again(self, websocket: WebSocket) -> None:
        """Ask whether the client may be here.

        Raises:
            ConsumerError: It may not.
        """
        await permissions.ask(self._permissions, "connect", websocket)

    async def pass_frame(self, websocket: WebSocket, action: str | None, *, is_control: bool = False) -> None:
        """Let a frame through.

        Args:
            websocket: Whose it is.
            action: The action of the class that it asks for; None if it asks for none of them.
            is_control: Whether it is `$auth` or `$cancel`, which need no permission.

        Raises:
            ConsumerError: It is refused.
        """
        throttles, needed = self._throttles, self._permissions
        if action is not None and action in self._actions:
            throttles, needed = self._actions[action]
        if throttles:
            await throttling.ask(throttles, websocket, action)
        if needed and not is_control:
            await permissions.ask(needed, "frame", websocket, action)

    async def _identified(self, visitor: Visitor) -> None:
        user_id = user_id_of(visitor.websocket)
        if user_id is not None:
            await self._occupy("user", user_id, visitor)
            await visitor.identified()

    async def _unidentified(self, visitor: Visitor) -> None:
        visitor.unidentified()
        user_id = user_id_of(visitor.websocket)
        place = self._places["user"]
        if user_id is not None and place is not None:
            await visitor.vacate(_key("user", place[0], user_id))

    async def _occupy(self, kind: str, whose: str, visitor: Visitor) -> None:
        place = self._places[kind]
        if place is not None:
            owner, limit = place
            await visitor.occupy(_key(kind, owner, whose), limit)

    def _complain(self, origin: str | None, host: str) -> None:
        """Log that an origin is refused, but for no more than some lines a minute: strangers could fill the log."""
        count = self._refused_origins.add(time.monotonic())
        if count <= COMPLAINTS:
            more = "" if count < COMPLAINTS else "; more of these are not logged within this minute"
            text = "a handshake from the origin %.200r to %.200r is refused: see ALLOWED_ORIGINS%s"
            logger.warning(text, origin, host, more)


def _key(kind: str, owner: str, whose: str) -> str:
    """Under which key connections are counted."""
    return f"{kind}:{owner}:{whose}"


def _throttles_of(rules: Rules) -> tuple[BaseThrottle, ...]:
    throttles = throttles_of(rules.throttle_classes or (), rules.key)
    for throttle in throttles if rules.action is not None else ():
        if throttle.is_for_connections:
            raise DefinitionError(f"{throttle!r} is asked for new connections, so it is the consumer's and no action's")
    return throttles


def _place(owner: str, own: int | None, general: int | None, *, is_own: bool = False) -> tuple[str, int] | None:
    """For whom connections are counted, and how many there may be: for the class if it says so, else for all."""
    limit = general if own is None else own
    if limit is None:
        return None
    return owner if is_own or own is not None else "", limit


def _chosen(setting: str, own: Any, general: Sequence[Any], make: Callable[[Any], Made]) -> Made:
    """What the class says, if it says something, else what the settings say, where classes may be dotted paths."""
    if own is not None:
        return make(own)
    return _made(setting, lambda: make([_imported(entry) for entry in general]))


def _imported(entry: Any) -> Any:
    """The class that a dotted path names; anything else, a rate too, is what it is."""
    if not (isinstance(entry, str) and all(map(str.isidentifier, entry.split(".")))):
        return entry
    try:
        return _dotted_path.validate_python(entry)
    except ValidationError as error:
        raise DefinitionError(f"{entry!r}: {error.errors()[0]['msg']}") from error


def _made(setting: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except (DefinitionError, ValueError) as error:
        raise SettingsError(f"{setting}: {error}") from error
