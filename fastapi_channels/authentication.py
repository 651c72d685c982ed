"""Authentication: who the client is, found out before the handshake is answered.

```python
class SessionToken(TokenAuthentication):
    async def user_of(self, token, websocket):
        user = await find_user(token)
        if user is None:
            raise AuthenticationFailed("the token is not valid")
        return user, None
```

Browsers can't set headers on a WebSocket. What they can use is a cookie, the sub-protocol, as in
`new WebSocket(url, ["bearer", token])`, which is answered with `bearer`, and, if need be, the query.

Spec:
    decisions.md, 23. RFC 6750 (Bearer), RFC 6455 1.9 (sub-protocols).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.authentication import UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket
from typing_extensions import override

from fastapi_channels._specs import entries_of, instance_of
from fastapi_channels._tasks import call
from fastapi_channels.application import Channels
from fastapi_channels.exceptions import AuthenticationFailed, DefinitionError

__all__ = [
    "AnonymousUser",
    "Auth",
    "BaseAuthentication",
    "JWTAuthentication",
    "TokenAuthentication",
    "User",
    "authentications_of",
    "is_known",
    "user_id_of",
]

#: The sub-protocol that carries a token: the client offers it and the token, and it is what the handshake answers.
BEARER = "bearer"

#: Where the scope has the user's id, or what gives it, if that isn't for the user object to say.
USER_ID = "fastapi_channels_user_id"

#: What `authenticate` gives: the user, and what the credentials are good for.
Identity = tuple[Any, Any]


class AnonymousUser(UnauthenticatedUser):
    """A client that is not known."""

    id = None


@dataclass(frozen=True, slots=True)
class User:
    """A client of whom is known what its token says.

    Attributes:
        id: Who it is.
        claims: What the token says.
    """

    id: str
    claims: Mapping[str, Any] = field(default_factory=dict, repr=False)
    is_authenticated: bool = True

    @property
    def display_name(self) -> str:
        """Its name, as Starlette's users have one."""
        return self.id


@dataclass(frozen=True, slots=True)
class Auth:
    """What the client's credentials are good for.

    Attributes:
        scopes: What they let it do.
        expires_at: Until when, in seconds since the epoch; None for ever.
    """

    scopes: frozenset[str] = frozenset()
    expires_at: float | None = None


class BaseAuthentication(ABC):
    """Finds out who a client is; subclass it and define `authenticate`, `async def` or plain `def`."""

    @abstractmethod
    async def authenticate(self, websocket: WebSocket) -> Identity | None:
        """Who the client is.

        Returns:
            The user and what the credentials are good for (an `Auth`, or an object of yours with `expires_at` and
            `scopes`, or None); None if it has given no credentials of this kind.

        Raises:
            AuthenticationFailed: It has given some that are wrong.
        """


class TokenAuthentication(BaseAuthentication):
    """Finds a token, and asks `user_of` whose it is.

    It looks into the header `Authorization: Bearer ...`, the sub-protocol `bearer, ...`, the cookie named by
    `COOKIE_TOKEN_KEY` and the query parameter named by `QUERY_TOKEN_KEY`, in this order; the last two only if the
    setting is given.
    """

    @abstractmethod
    async def user_of(self, token: str, websocket: WebSocket) -> Identity | None:
        """Whose token it is; returns and raises like `authenticate`."""

    @override
    async def authenticate(self, websocket: WebSocket) -> Identity | None:
        token = token_of(websocket)
        if token is None:
            return None
        return cast(Identity | None, await call(self.user_of, token, websocket))


class JWTAuthentication(TokenAuthentication):
    """Takes a JSON Web Token, checked by PyJWT; needs `pip install 'fastapi-channels[jwt]'`.

    The user is a `User` with the claim `sub` as its id, unless `user` makes another of the claims. `scope` (a string)
    or `scopes` (a list) become `auth.scopes`, `exp` is when the credentials expire.

    Args:
        key: The secret, or the public key, that signatures are checked with.
        algorithms: Those that are allowed, such as `["HS256"]`; never taken from the token.
        audience: What `aud` has to hold; None if there is to be none.
        issuer: What `iss` has to be; None for any.
        leeway: By how many seconds clocks may differ.
        user: Makes a user of the claims; may be `async def`. None of it is `AuthenticationFailed`.

    Raises:
        DefinitionError: PyJWT is missing, or no algorithm is allowed.

    Spec:
        RFC 7519, RFC 8725 (best current practices).
    """

    def __init__(
        self,
        key: Any,
        *,
        algorithms: Sequence[str],
        audience: str | Sequence[str] | None = None,
        issuer: str | None = None,
        leeway: float = 0.0,
        user: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        try:
            import jwt
        except ImportError as error:
            raise DefinitionError("JWTAuthentication needs PyJWT: pip install 'fastapi-channels[jwt]'") from error
        if isinstance(algorithms, str) or not algorithms or "none" in {name.lower() for name in algorithms}:
            raise DefinitionError("algorithms is a list of those that are allowed, and never none")
        self._jwt = jwt
        self._key = key
        self._options: dict[str, Any] = {"audience": audience, "issuer": issuer, "leeway": leeway}
        self._algorithms = list(algorithms)
        self._user = user

    @override
    async def user_of(self, token: str, websocket: WebSocket) -> Identity | None:
        try:
            claims = self._jwt.decode(token, self._key, algorithms=self._algorithms, **self._options)
        except self._jwt.PyJWTError as error:
            raise AuthenticationFailed("the token is not valid") from error
        try:
            auth = Auth(_scopes_of(claims), self._expiry_of(claims))
        except (TypeError, ValueError, OverflowError) as error:
            raise AuthenticationFailed("the token is not valid") from error
        if self._user is not None:
            user = await call(self._user, claims)
            if user is None:
                raise AuthenticationFailed("the token is not valid")
        elif not (isinstance(claims.get("sub"), str) and claims["sub"]):
            raise AuthenticationFailed("the token says no user")
        else:
            user = User(claims["sub"], claims)
        return user, auth

    def _expiry_of(self, claims: Mapping[str, Any]) -> float | None:
        """Until when a token is good by our clock; PyJWT takes a number that is written as text, too."""
        return float(claims["exp"]) + self._options["leeway"] if "exp" in claims else None


def _scopes_of(claims: Mapping[str, Any]) -> frozenset[str]:
    """What a token lets its owner do; null is nothing.

    Raises:
        TypeError: It is neither text nor a list of texts.
    """
    scopes = claims.get("scopes")
    if scopes is None:
        scopes = claims.get("scope")
    if scopes is None:
        return frozenset()
    names = scopes.split() if isinstance(scopes, str) else scopes
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"scopes are text or a list of texts, not {scopes!r}")
    return frozenset(names)


def token_of(websocket: HTTPConnection) -> str | None:
    """The token that a handshake carries, from the first of the places that has one."""
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == BEARER and token.strip():
        return token.strip()
    offered = websocket.scope.get("subprotocols") or []
    if len(offered) >= 2 and offered[0].lower() == BEARER and offered[1]:
        return str(offered[1])
    settings = Channels.of(websocket.scope).settings
    if settings.cookie_token_key and (token := websocket.cookies.get(settings.cookie_token_key, "")):
        return token
    if settings.query_token_key and (token := websocket.query_params.get(settings.query_token_key, "")):
        return token
    return None


def authentications_of(specs: Sequence[Any]) -> tuple[BaseAuthentication, ...]:
    """The authentications of an `authentication_classes`.

    Raises:
        DefinitionError: An entry is none.
    """
    made = []
    for entry in entries_of(specs, "authentication_classes"):
        is_class = isinstance(entry, type) and issubclass(entry, BaseAuthentication)
        authentication = instance_of(entry) if is_class else entry
        if not isinstance(authentication, BaseAuthentication):
            raise DefinitionError(f"{entry!r} is no authentication: a subclass of BaseAuthentication or an instance is")
        made.append(authentication)
    return tuple(made)


async def authenticate(authentications: Sequence[BaseAuthentication], websocket: WebSocket) -> None:
    """Ask who the client is, until one knows; the answer is in the scope as Starlette's middleware would put it.

    Raises:
        AuthenticationFailed: The client has given wrong credentials, or expired ones.
    """
    for authentication in authentications:
        identity: Identity | None = await call(authentication.authenticate, websocket)
        if identity is not None:
            _take(identity, websocket)
            return
    if authentications:
        websocket.scope["user"], websocket.scope["auth"] = AnonymousUser(), None


async def refresh(authentications: Sequence[BaseAuthentication], websocket: WebSocket, token: str) -> None:
    """Take a new token for a connection that is open, in place of the one it has.

    Raises:
        AuthenticationFailed: It is wrong, expired, or another user's, which is in the scope then: the caller puts back
            what was there.
    """
    for authentication in authentications:
        if isinstance(authentication, TokenAuthentication):
            identity: Identity | None = await call(authentication.user_of, token, websocket)
            if identity is not None:
                before = user_id_of(websocket)
                _take(identity, websocket)
                if before is not None and user_id_of(websocket) != before:
                    raise AuthenticationFailed("the token is another user's")
                return
    raise AuthenticationFailed("the token is not valid")


def expires_in(connection: HTTPConnection) -> float | None:
    """In how many seconds the client's credentials expire; None for never."""
    expires_at = getattr(connection.scope.get("auth"), "expires_at", None)
    return None if expires_at is None else float(expires_at) - time.time()


def _take(identity: Identity, websocket: WebSocket) -> None:
    user, auth = identity
    expires_at = getattr(auth, "expires_at", None)
    if expires_at is not None and expires_at <= time.time():
        raise AuthenticationFailed("the credentials have expired")
    websocket.scope["user"], websocket.scope["auth"] = user, auth


def is_known(user: Any) -> bool:
    """Whether it is a user that is authenticated; a method in place of the attribute, say, is no yes."""
    return getattr(user, "is_authenticated", False) is True


def user_id_of(connection: HTTPConnection) -> str | None:
    """The id of the client's user, as its consumer says, else `str(user.id)`; None of a stranger."""
    found = connection.scope.get(USER_ID)
    if found is None:
        return id_of(connection.scope.get("user"))
    found = found() if callable(found) else found
    return None if found is None else str(found)


def id_of(user: Any) -> str | None:
    """The id of a user, as `str(user.id)`; None of a stranger."""
    if not is_known(user):
        return None
    found = getattr(user, "id", None)
    if found is None:
        found = getattr(user, "username", None) or getattr(user, "display_name", None)
    return None if found is None else str(found)
