"""Authentication: where a token may stand, who wins, what JSON Web Tokens have to be, and what is never told."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jwt
import pytest
from asgi_lifespan import LifespanManager
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.authentication import AuthCredentials, SimpleUser
from starlette.websockets import WebSocket
from uvicorn.logging import AccessFormatter

from fastapi_channels._server_logs import SERVER_LOGS, hide_tokens
from fastapi_channels.authentication import (
    USER_ID,
    AnonymousUser,
    Auth,
    BaseAuthentication,
    JWTAuthentication,
    TokenAuthentication,
    User,
    refresh,
    user_id_of,
)
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.exceptions import AuthenticationFailed, DefinitionError, SettingsError
from fastapi_channels.permissions import AllowAny, HasScope, IsAuthenticated
from fastapi_channels.testing import WebSocketSession, connect
from tests.conftest import app_with

SECRET = "an HMAC key of more than 64 bytes, as RFC 7518 wants it for the longest of the hashes"
OTHER = "another HMAC key of more than 64 bytes, which is not the one that the server checks with"


class Tokens(TokenAuthentication):
    """Knows the tokens that begin with `ok`, whose users they name."""

    async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
        if not token.startswith("ok"):
            raise AuthenticationFailed("the token is not valid")
        return User(token), Auth(frozenset({"read"}))


class Who(ActionConsumer):
    """Tells who the client is."""

    authentication_classes: Sequence[Any] | None = [Tokens]

    @action
    async def who(self) -> Any:
        return {
            "id": user_id_of(self.websocket),
            "is_authenticated": self.user.is_authenticated,
            "scopes": sorted(getattr(self.auth, "scopes", ())),
        }


def who_with(*authentications: Any, **attributes: Any) -> type[Who]:
    return type("Made", (Who,), {"authentication_classes": list(authentications), **attributes})


async def ask(ws: WebSocketSession) -> Any:
    await ws.send_json({"action": "who", "request_id": 1})
    return (await ws.receive_json())["data"]


async def who(app: Any, path: str = "/ws", **options: Any) -> Any:
    """The id of the client's user, None of a stranger, or the status that it is refused with."""
    async with connect(app, path, **options) as ws:
        if ws.response is not None:
            return ws.response.status_code
        return (await ask(ws))["id"]


async def never(*_: Any) -> Any:
    raise AssertionError("who a client is, is asked without receiving or sending")


def websocket(scope: Mapping[str, Any]) -> WebSocket:
    return WebSocket({"type": "websocket", "headers": [], **scope}, never, never)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# Where a token may stand


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"authorization": "Bearer ok1"}, "ok1"),
        ({"authorization": "bearer ok1"}, "ok1"),
        ({"authorization": "BEARER ok1"}, "ok1"),
        ({"authorization": "Bearer   ok1  "}, "ok1"),
        ({"authorization": "Bearer bad"}, 401),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": ""}, None),
        ({"authorization": "Basic ok1"}, None),
        ({"authorization": "ok1"}, None),
        ({"authorization": "Bearerok1"}, None),
        ({"authorization": "Token ok1"}, None),
        ({"authorization": "Bearer \xe9"}, 401),
    ],
)
async def test_the_header(headers: dict[str, str], expected: Any) -> None:
    """The header `Authorization: Bearer ...` carries a token, in any case; other schemes are not ours."""
    assert await who(app_with(Who), headers=headers) == expected


@pytest.mark.parametrize(
    ("offered", "expected", "answered"),
    [
        (["bearer", "ok1"], "ok1", "bearer"),
        (["Bearer", "ok1"], "ok1", "Bearer"),
        (["bearer", "ok1", "chat"], "ok1", "bearer"),
        (["bearer", "bad"], 401, None),
        (["bearer"], None, "bearer"),
        (["chat"], None, None),
        (["chat", "bearer", "ok1"], None, None),
        (["ok1", "bearer"], None, None),
    ],
)
async def test_the_sub_protocol(offered: list[str], expected: Any, answered: str | None) -> None:
    """The sub-protocols `bearer, <token>` carry a token, and are answered with `bearer`, never with the token."""
    async with connect(app_with(Who), "/ws", subprotocols=offered) as ws:
        assert ws.subprotocol == answered
        if ws.response is not None:
            assert ws.response.status_code == expected
        else:
            assert (await ask(ws))["id"] == expected


async def test_the_sub_protocol_of_an_own_accept() -> None:
    """A consumer that accepts by itself answers `bearer` too, unless it names another."""

    class Accepting(Who):
        async def connect(self, chosen: str | None = None) -> None:
            await self.accept(subprotocol=chosen)

    app = app_with(Accepting)
    async with connect(app, "/ws", subprotocols=["bearer", "ok1", "chat"]) as ws:
        assert ws.subprotocol == "bearer"
    async with connect(app, "/ws?chosen=chat", subprotocols=["bearer", "ok1", "chat"]) as ws:
        assert ws.subprotocol == "chat"


async def test_the_sub_protocol_without_authentication() -> None:
    """A consumer that authenticates nobody answers no sub-protocol that it doesn't know."""
    async with connect(app_with(who_with()), "/ws", subprotocols=["bearer", "ok1"]) as ws:
        assert ws.subprotocol is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"cookie_token_key": "session"}, "ok-cookie"),
        ({"query_token_key": "token"}, "ok-query"),
        ({"cookie_token_key": "session", "query_token_key": "token"}, "ok-cookie"),
        ({"cookie_token_key": "token", "query_token_key": "session"}, None),
        ({"cookie_token_key": "Session", "query_token_key": "Token"}, None),
    ],
)
async def test_cookie_and_query(settings: dict[str, str], expected: Any) -> None:
    """Cookie and query carry a token only if the settings name them, and under that name alone."""
    headers = {"cookie": "a=b; session=ok-cookie; c=d"}
    assert await who(app_with(Who, **settings), "/ws?x=y&token=ok-query", headers=headers) == expected


async def test_the_order_of_the_places() -> None:
    """Header, sub-protocol, cookie, query: the first that has a token counts, also if that is wrong."""
    app = app_with(Who, cookie_token_key="session", query_token_key="token")
    header, cookie, protocols = bearer("ok-header"), {"cookie": "session=ok-cookie"}, ["bearer", "ok-protocol"]
    path = "/ws?token=ok-query"
    assert await who(app, path, headers={**header, **cookie}, subprotocols=protocols) == "ok-header"
    assert await who(app, path, headers=cookie, subprotocols=protocols) == "ok-protocol"
    assert await who(app, path, headers=cookie) == "ok-cookie"
    assert await who(app, path) == "ok-query"
    assert await who(app, path, headers={**bearer("bad"), **cookie}, subprotocols=protocols) == 401
    assert await who(app, path, headers=cookie, subprotocols=["bearer", "bad"]) == 401
    assert await who(app, path, headers={"cookie": "session=bad"}) == 401
    assert await who(app, path, headers={"cookie": "session="}) == "ok-query"
    assert await who(app, "/ws?token=") is None
    assert await who(app, "/ws?token=ok1&token=ok2") in {"ok1", "ok2"}


# Who wins


class Named(BaseAuthentication):
    """Says what the query parameter of its name says: a user, that it is wrong, or that it isn't its own."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
        self.asked.append(self.name)
        said = websocket.query_params.get(self.name)
        if said == "wrong":
            raise AuthenticationFailed("wrong ✗")
        return None if said is None else (User(said), None)


@pytest.mark.parametrize(
    ("query", "expected", "asked"),
    [
        ("", None, ["a", "b", "c"]),
        ("a=1&b=2", "1", ["a"]),
        ("b=2&c=3", "2", ["a", "b"]),
        ("c=3", "3", ["a", "b", "c"]),
        ("a=wrong&b=2", 401, ["a"]),
        ("a=1&b=wrong", "1", ["a"]),
        ("b=wrong&c=3", 401, ["a", "b"]),
    ],
)
async def test_several_classes(query: str, expected: Any, asked: list[str]) -> None:
    """Several are asked in their order until one knows, or finds something wrong; nobody is asked after that."""
    seen: list[str] = []
    made = who_with(*(Named(name, seen) for name in "abc"))
    assert await who(app_with(made), f"/ws?{query}") == expected
    assert seen == asked


@pytest.mark.parametrize("permissions", [[], [AllowAny], [True]], ids=str)
async def test_wrong_credentials_are_refused_everywhere(permissions: list[Any]) -> None:
    """Wrong credentials are refused with 401 also where strangers are allowed, and `connect` isn't called."""
    calls: list[str] = []

    class Open(Who):
        permission_classes = permissions

        async def connect(self) -> None:
            calls.append("connect")

        async def disconnect(self, code: int) -> None:
            calls.append("disconnect")

    async with connect(app_with(Open), "/ws", headers=bearer("bad")) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 401
        assert ws.response.headers["www-authenticate"].startswith("Bearer")
        assert ws.response.json() == {"detail": "the token is not valid", "code": "not_authenticated"}
    assert not calls
    assert await who(app_with(Open)) is None
    assert calls == ["connect", "disconnect"]


async def test_wrong_credentials_with_a_close_code() -> None:
    """With `reject_mode="close"` wrong credentials are closed with 4501, which says the detail."""
    async with connect(app_with(Who, reject_mode="close"), "/ws", headers=bearer("bad")) as ws:
        assert ws.accepted
        assert (ws.close_code, ws.close_reason) == (4501, "the token is not valid")


async def test_a_browser_reads_the_close_code() -> None:
    """A refusal by close code answers the sub-protocol that carried the token; a browser would hang up otherwise."""
    async with connect(app_with(Who, reject_mode="close"), "/ws", subprotocols=["bearer", "bad"]) as ws:
        assert (ws.accepted, ws.subprotocol, ws.close_code) == (True, "bearer", 4501)


async def test_a_stranger() -> None:
    """Who gives no credentials is an `AnonymousUser`: not authenticated, without id, name or rights."""
    seen: list[Any] = []

    class Noting(Who):
        async def connect(self) -> None:
            seen.append((self.user, self.auth, self.scope["user"]))

    assert await who(app_with(Noting)) is None
    ((user, auth, in_scope),) = seen
    assert isinstance(user, AnonymousUser)
    assert in_scope is user
    assert user.is_authenticated is False
    assert (user.id, user.display_name) == (None, "")
    assert auth is None


async def test_a_user_in_the_scope() -> None:
    """What `authenticate` gives is `self.user` and `self.auth`, and stands in the scope as a middleware's would."""
    user, auth = SimpleUser("ann"), AuthCredentials(["read"])
    seen: list[Any] = []

    class Fixed(BaseAuthentication):
        async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
            return user, auth

    class Noting(Who):
        authentication_classes = [Fixed]

        async def connect(self, websocket: WebSocket) -> None:
            seen.append((self.user, self.auth, websocket.user, websocket.auth))

    assert await who(app_with(Noting)) == "ann"
    assert seen == [(user, auth, user, auth)]


@pytest.mark.parametrize("has_middleware_user", [True, False])
async def test_a_middleware(has_middleware_user: bool) -> None:
    """Without classes the user is what a middleware has put into the scope; with classes they alone say it."""

    async def run(made: Any, **options: Any) -> Any:
        app = app_with(made)

        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket" and has_middleware_user:
                scope["user"], scope["auth"] = SimpleUser("middleware"), AuthCredentials(["write"])
            await app(scope, receive, send)

        async with LifespanManager(app), connect(middleware, "/ws", **options) as ws:
            return await ask(ws)

    expected = {"id": "middleware", "is_authenticated": True, "scopes": ["write"]}
    stranger: dict[str, Any] = {"id": None, "is_authenticated": False, "scopes": []}
    assert await run(who_with()) == (expected if has_middleware_user else stranger)
    assert await run(Who) == stranger
    assert await run(Who, headers=bearer("ok1")) == {"id": "ok1", "is_authenticated": True, "scopes": ["read"]}


async def test_plain_authenticate() -> None:
    """A plain `def authenticate`, or `user_of`, runs in the thread pool and may block."""
    threads: list[int] = []

    class Plain(BaseAuthentication):
        def authenticate(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, websocket: WebSocket
        ) -> tuple[Any, Any] | None:
            threads.append(threading.get_ident())
            return None

    class PlainToken(TokenAuthentication):
        def user_of(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, token: str, websocket: WebSocket
        ) -> tuple[Any, Any] | None:
            threads.append(threading.get_ident())
            if token == "bad":
                raise AuthenticationFailed("no")
            return User(token), None

    app = app_with(who_with(Plain, PlainToken))
    assert await who(app, headers=bearer("ok1")) == "ok1"
    assert await who(app, headers=bearer("bad")) == 401
    assert len(threads) == 4
    assert threading.get_ident() not in threads


async def test_an_expired_identity() -> None:
    """Credentials that say they have expired are wrong ones, whoever has made them."""

    class Expired(BaseAuthentication):
        async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
            return User("ann"), Auth(expires_at=time.time() + float(websocket.query_params["in"]))

    app = app_with(who_with(Expired))
    assert await who(app, "/ws?in=3600") == "ann"
    assert await who(app, "/ws?in=-1") == 401
    assert await who(app, "/ws?in=0") == 401
    assert await who(app, "/ws?in=1e300") == "ann"


@pytest.mark.parametrize("given", [True, False, User("ann"), (), ("a",), ("a", "b", "c"), 5], ids=repr)
async def test_what_is_no_identity(given: Any) -> None:
    """An authentication that gives neither a pair nor None lets nobody in."""

    class Odd(BaseAuthentication):
        async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
            return given  # type: ignore[no-any-return]

    async with connect(app_with(who_with(Odd)), "/ws") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 500
        with pytest.raises((TypeError, ValueError)):
            await ws.receive_text()


async def test_an_authentication_that_fails() -> None:
    """An exception that isn't meant to be told refuses with 500 and no detail; the server logs it."""

    class Failing(BaseAuthentication):
        async def authenticate(self, websocket: WebSocket) -> tuple[Any, Any] | None:
            raise RuntimeError("postgres://admin:hunter2@db")

    async with connect(app_with(who_with(Failing)), "/ws") as ws:
        assert ws.response is not None
        assert ws.response.status_code == 500
        assert b"hunter2" not in ws.response.content
        with pytest.raises(RuntimeError, match="hunter2"):
            await ws.receive_text()


@pytest.mark.parametrize("value", [None, 5, "app.Tokens", dict, object(), IsAuthenticated, lambda ws: None])
def test_what_is_no_authentication(value: Any) -> None:
    """What is no authentication is an error when the class is made, and names it."""
    with pytest.raises(DefinitionError, match=r"^Wrong\.authentication_classes: .*authentication"):
        type("Wrong", (Who,), {"__qualname__": "Wrong", "authentication_classes": [value]})


@pytest.mark.parametrize("value", [JWTAuthentication, Named, TokenAuthentication], ids=repr)
async def test_an_authentication_that_can_not_be_made(value: Any) -> None:
    """A class that needs arguments, or is abstract, is an error of the definition; in the settings one of these."""
    with pytest.raises(DefinitionError, match=r"^Wrong\.authentication_classes"):
        type("Wrong", (Who,), {"__qualname__": "Wrong", "authentication_classes": [value]})
    made = type("Open", (Who,), {"authentication_classes": None})
    with pytest.raises(SettingsError, match="AUTHENTICATION_CLASSES"):
        async with connect(app_with(made, authentication_classes=[value]), "/ws"):
            pass


# JSON Web Tokens


def key_pair() -> tuple[str, str]:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode(), public.decode()


PRIVATE, PUBLIC = key_pair()
OTHER_PRIVATE, _ = key_pair()


def token(claims: Mapping[str, Any] | None = None, key: str = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode({"sub": "ann", **(claims or {})}, key, algorithm)


def encoded(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: Any, claims: Any, key: bytes = SECRET.encode()) -> str:
    """A token that is signed with HMAC, whatever its header says and however strange its parts are."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    return f"{signed}.{encoded(hmac.new(key, signed.encode(), hashlib.sha256).digest())}"


HS256 = JWTAuthentication(SECRET, algorithms=["HS256"])
RS256 = JWTAuthentication(PUBLIC, algorithms=["RS256"])
FULL = {"sub": "ann", "aud": "chat", "iss": "https://id.example"}


async def test_a_token_of_an_hmac_key() -> None:
    """A token that is signed with the secret is its subject's, with all its claims."""
    seen: list[Any] = []

    class Noting(Who):
        authentication_classes = [HS256]

        async def connect(self) -> None:
            seen.append((self.user, self.auth))

    expires_at = int(time.time()) + 600
    assert await who(app_with(Noting), headers=bearer(token({"exp": expires_at, "scope": "a b", "x": [1]}))) == "ann"
    ((user, auth),) = seen
    assert isinstance(user, User)
    assert (user.id, user.display_name, user.is_authenticated) == ("ann", "ann", True)
    assert user.claims == {"sub": "ann", "exp": expires_at, "scope": "a b", "x": [1]}
    assert auth == Auth(frozenset({"a", "b"}), expires_at)


async def test_a_token_of_an_rsa_key() -> None:
    """A token that is signed with the private key is checked with the public one."""
    app = app_with(who_with(RS256))
    assert await who(app, headers=bearer(token(key=PRIVATE, algorithm="RS256"))) == "ann"
    assert await who(app, headers=bearer(token(key=OTHER_PRIVATE, algorithm="RS256"))) == 401
    assert await who(app, headers=bearer(token(key=PRIVATE, algorithm="RS384"))) == 401


NOW = int(time.time())

WRONG: dict[str, str] = {
    "another key": token(key=OTHER),
    "expired": token({"exp": NOW - 10}),
    "not yet valid": token({"nbf": NOW + 600}),
    "issued in the future": token({"iat": NOW + 600}),
    "an audience that isn't expected": token({"aud": "chat"}),
    "another algorithm": token(algorithm="HS512"),
    "no algorithm": by_hand({"typ": "JWT"}, {"sub": "ann"}),
    "alg none": jwt.encode({"sub": "ann"}, "", algorithm="none"),
    "alg None, signed": by_hand({"alg": "None"}, {"sub": "ann"}),
    "alg NONE with nothing": by_hand({"alg": "NONE"}, {"sub": "ann"}).rpartition(".")[0] + ".",
    "alg of a list": by_hand({"alg": ["HS256"]}, {"sub": "ann"}),
    "alg of null": by_hand({"alg": None}, {"sub": "ann"}),
    "alg in other letters": by_hand({"alg": "hs256"}, {"sub": "ann"}),
    "no subject": jwt.encode({"name": "ann"}, SECRET),
    "a subject of null": by_hand({"alg": "HS256"}, {"sub": None}),
    "a number for a subject": by_hand({"alg": "HS256"}, {"sub": 7}),
    "an empty subject": by_hand({"alg": "HS256"}, {"sub": ""}),
    "claims of a list": by_hand({"alg": "HS256"}, ["ann"]),
    "claims of text": by_hand({"alg": "HS256"}, "ann"),
    "claims that are no JSON": by_hand({"alg": "HS256"}, b"\xff\xfe"),
    "a header that is no JSON": by_hand(b"\xff\xfe", {"sub": "ann"}),
    "a header of a list": by_hand(["HS256"], {"sub": "ann"}),
    "a deep header": by_hand(b"[" * 20_000, {"sub": "ann"}),
    "deep claims": by_hand({"alg": "HS256"}, b'{"sub":' + b"[" * 20_000),
    "an odd key id": by_hand({"alg": "HS256", "kid": {}}, {"sub": "ann"}),
    "a key of its own": by_hand(
        {"alg": "HS256", "jwk": {"kty": "oct", "k": encoded(OTHER.encode())}}, {"sub": "ann"}, OTHER.encode()
    ),
    "unknown critical header": by_hand({"alg": "HS256", "crit": ["x"], "x": 1}, {"sub": "ann"}),
    "an expiry of text": by_hand({"alg": "HS256"}, {"sub": "ann", "exp": "soon"}),
    "an expiry of a list": by_hand({"alg": "HS256"}, {"sub": "ann", "exp": []}),
    "an expiry of null": by_hand({"alg": "HS256"}, {"sub": "ann", "exp": None}),
    "an endless expiry": by_hand({"alg": "HS256"}, b'{"sub": "ann", "exp": Infinity}'),
    "an expiry that is none": by_hand({"alg": "HS256"}, b'{"sub": "ann", "exp": NaN}'),
    "scopes of a number": by_hand({"alg": "HS256"}, {"sub": "ann", "scopes": 5}),
    "an expiry beyond all numbers": by_hand({"alg": "HS256"}, {"sub": "ann", "exp": 10**400}),
    "scopes of a dict": by_hand({"alg": "HS256"}, {"sub": "ann", "scopes": {"admin": True}}),
    "scopes of lists": by_hand({"alg": "HS256"}, {"sub": "ann", "scopes": [["admin"]]}),
    "the signature of another": token().rpartition(".")[0] + "." + token({"sub": "bob"}).rpartition(".")[2],
    "the claims of another": ".".join(
        [token().split(".")[0], token({"sub": "bob"}).split(".")[1], token().split(".")[2]]
    ),
    "no signature": token().rpartition(".")[0] + ".",
    "two parts": token().rpartition(".")[0],
    "four parts": token() + ".x",
    "nothing": "...",
    "not base64": "a.b.c",
    "text": "ok1",
    "not ASCII": "é" * 10,
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_tokens(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    """A token that is wrong in any way is refused with 401, as every other, and is no error in the log."""
    caplog.set_level(logging.DEBUG)
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(WRONG[wrong])) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 401
        body = ws.response.json()
        assert body["code"] == "not_authenticated"
        assert body["detail"] in {"the token is not valid", "the token says no user"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record for record in caplog.records if WRONG[wrong][-20:] in record.getMessage() and wrong != "nothing"]


@pytest.mark.parametrize("exp", [str(NOW + 600), NOW + 600.5], ids=["text", "float"])
async def test_an_expiry_in_another_form(exp: Any) -> None:
    """An expiry that PyJWT takes is a number of seconds afterwards, or refused; never an internal error."""
    result = await who(app_with(who_with(HS256)), headers=bearer(by_hand({"alg": "HS256"}, {"sub": "ann", "exp": exp})))
    assert result in {"ann", 401}


async def test_key_confusion() -> None:
    """A public key is never taken for an HMAC secret, whatever the token says and also where both are allowed."""
    confused = by_hand({"alg": "HS256", "typ": "JWT"}, {"sub": "admin"}, PUBLIC.encode())
    both = JWTAuthentication(PUBLIC, algorithms=["RS256", "HS256"])
    for authentication in (RS256, both):
        app = app_with(who_with(authentication))
        assert await who(app, headers=bearer(confused)) == 401
        assert await who(app, headers=bearer(token(key=PRIVATE, algorithm="RS256"))) == "ann"


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        (FULL, "ann"),
        ({**FULL, "aud": ["other", "chat"]}, "ann"),
        ({**FULL, "aud": "other"}, 401),
        ({**FULL, "aud": ["other"]}, 401),
        ({**FULL, "aud": []}, 401),
        ({**FULL, "iss": "https://evil.example"}, 401),
        ({"sub": "ann", "iss": FULL["iss"]}, 401),
        ({"sub": "ann", "aud": "chat"}, 401),
    ],
)
async def test_audience_and_issuer(claims: dict[str, Any], expected: Any) -> None:
    """A token has to be for the audience and from the issuer that are expected, and has to say both."""
    made = who_with(JWTAuthentication(SECRET, algorithms=["HS256"], audience="chat", issuer="https://id.example"))
    assert await who(app_with(made), headers=bearer(token(claims))) == expected


async def test_several_audiences() -> None:
    """One of several audiences is enough."""
    app = app_with(who_with(JWTAuthentication(SECRET, algorithms=["HS256"], audience=["a", "b"])))
    assert await who(app, headers=bearer(token({"aud": "b"}))) == "ann"
    assert await who(app, headers=bearer(token({"aud": "c"}))) == 401


@pytest.mark.parametrize(("ago", "expected"), [(5, "ann"), (100, 401)])
async def test_leeway(ago: int, expected: Any) -> None:
    """Clocks may differ by the leeway, and by no more."""
    app = app_with(who_with(JWTAuthentication(SECRET, algorithms=["HS256"], leeway=90)))
    assert await who(app, headers=bearer(token({"exp": int(time.time()) - ago}))) == expected


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({}, []),
        ({"scope": "read write"}, ["read", "write"]),
        ({"scope": ""}, []),
        ({"scope": "  read  "}, ["read"]),
        ({"scopes": ["read", "write"]}, ["read", "write"]),
        ({"scopes": []}, []),
        ({"scopes": "read write"}, ["read", "write"]),
        ({"scope": ["read"]}, ["read"]),
        ({"scopes": ["read write"]}, ["read write"]),
        ({"scope": None}, []),
        ({"scopes": None, "scope": "read"}, ["read"]),
    ],
    ids=str,
)
async def test_scopes(claims: dict[str, Any], scopes: list[str]) -> None:
    """`scope` as text, or `scopes` as a list, are what the client may do; null is none."""
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(token(claims))) as ws:
        assert (await ask(ws))["scopes"] == scopes


async def test_scopes_are_asked_for() -> None:
    """`HasScope` lets in who has the scope, and tells others 403, strangers 401."""
    app = app_with(who_with(HS256, permission_classes=[HasScope("write")]))
    assert await who(app, headers=bearer(token({"scope": "read write"}))) == "ann"
    assert await who(app, headers=bearer(token({"scope": "read"}))) == 403
    assert await who(app) == 401


async def test_users_of_ones_own() -> None:
    """`user` makes a user of the claims, `async def` or plain `def`; None, or `AuthenticationFailed`, is refused."""

    class Own:
        is_authenticated = True

        def __init__(self, id: int) -> None:
            self.id = id

    async def by_number(claims: Mapping[str, Any]) -> Own | None:
        if claims.get("number") == 13:
            raise AuthenticationFailed("unlucky")
        return Own(claims["number"]) if "number" in claims else None

    def plain(claims: Mapping[str, Any]) -> Own | None:
        return Own(claims["number"]) if "number" in claims else None

    for make in (by_number, plain):
        app = app_with(who_with(JWTAuthentication(SECRET, algorithms=["HS256"], user=make)))
        assert await who(app, headers=bearer(token({"number": 7}))) == "7"
        assert await who(app, headers=bearer(token())) == 401
        assert await who(app, headers=bearer(jwt.encode({"number": 8}, SECRET))) == "8"
    app = app_with(who_with(JWTAuthentication(SECRET, algorithms=["HS256"], user=by_number)))
    assert await who(app, headers=bearer(token({"number": 13}))) == 401


@pytest.mark.parametrize("algorithms", [[], (), "HS256", ["none"], ["HS256", "None"], ["NONE"]], ids=str)
def test_algorithms_that_are_not_allowed(algorithms: Any) -> None:
    """Algorithms are a list, never empty and never with none."""
    with pytest.raises(DefinitionError, match="algorithms"):
        JWTAuthentication(SECRET, algorithms=algorithms)


# What is never told


async def test_tokens_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """No token, right or wrong, in whatever place, is in the log, in an answer or in a representation of its user."""
    caplog.set_level(logging.DEBUG)
    right, wrong = token({"jti": "right"}), token({"jti": "wrong"}, key=OTHER)
    app = app_with(who_with(HS256), cookie_token_key="session", query_token_key="token")
    closing = app_with(who_with(HS256), cookie_token_key="session", query_token_key="token", reject_mode="close")
    said: list[str] = []
    for used in (app, closing):
        for given in (right, wrong):
            places: list[dict[str, Any]] = [
                {"headers": bearer(given)},
                {"subprotocols": ["bearer", given]},
                {"headers": {"cookie": f"session={given}"}},
                {"path": f"/ws?token={given}"},
            ]
            for place in places:
                async with connect(used, **{"path": "/ws", **place}) as ws:
                    assert (ws.close_code is None) is (given is right)
                    said += [str(ws.headers), str(ws.subprotocol), str(ws.close_reason)]
                    if ws.response is not None:
                        said += [str(ws.response.headers), ws.response.content.decode()]
                    elif ws.close_code is None:
                        for frame in (right, wrong):
                            await ws.send_json({"action": "$auth", "request_id": 1, "data": {"token": frame}})
                            said.append(await ws.receive_text())
                        await ws.send_text(f'{{"action": "who", "token": "{wrong}"')
                        said.append(await ws.receive_text())
    said += [repr(User("ann", {"jti": right})), repr(HS256)]
    said += [caplog.text, *(str(record.__dict__) for record in caplog.records)]
    for text in said:
        for part in (right, wrong, SECRET, right.split(".")[1], right.split(".")[2], wrong.split(".")[2]):
            assert part not in text


# New tokens for an open connection


async def renew(ws: WebSocketSession, given: Any) -> Any:
    await ws.send_json({"action": "$auth", "request_id": "renew", "data": {"token": given}})
    reply = await ws.receive_json()
    assert (reply["type"], reply["action"], reply["request_id"]) == ("response", "$auth", "renew")
    return reply


async def test_a_new_token() -> None:
    """A new token of the same user takes the place of the old one, with its scopes and its expiry."""
    expires_at = int(time.time()) + 600
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(token({"scope": "a"}))) as ws:
        assert (await ask(ws))["scopes"] == ["a"]
        reply = await renew(ws, token({"scope": "b c", "exp": expires_at}))
        assert (reply["status"], reply["data"]) == ("ok", {"expires_at": expires_at})
        assert await ask(ws) == {"id": "ann", "is_authenticated": True, "scopes": ["b", "c"]}


@pytest.mark.parametrize(
    "given", [token({"sub": "bob"}), token(key=OTHER), token({"exp": NOW - 10}), "x", "", None, 5, ["x"], {}], ids=str
)
async def test_a_new_token_that_is_wrong(given: Any) -> None:
    """A wrong token, or another user's, changes nothing, and the connection lives on."""
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(token({"scope": "a"}))) as ws:
        reply = await renew(ws, given)
        assert reply["status"] == "bad"
        assert reply["errors"]["code"] in {"not_authenticated", "invalid_data"}
        assert await ask(ws) == {"id": "ann", "is_authenticated": True, "scopes": ["a"]}


async def test_a_stranger_becomes_known() -> None:
    """A stranger who is allowed in may say later who he is."""
    async with connect(app_with(who_with(HS256)), "/ws") as ws:
        assert (await ask(ws))["id"] is None
        assert (await renew(ws, token()))["status"] == "ok"
        assert (await ask(ws))["id"] == "ann"
        assert (await renew(ws, token({"sub": "bob"})))["status"] == "bad"
        assert (await ask(ws))["id"] == "ann"


@pytest.mark.parametrize("says", ["tenant:7", lambda: "tenant:7"], ids=["text", "function"])
async def test_an_id_of_ones_own(says: Any) -> None:
    """What the scope says is the user's id wins over the user object, also if it says that there is none."""
    ws = websocket({USER_ID: says, "user": User("ann")})
    assert user_id_of(ws) == "tenant:7"
    assert user_id_of(websocket({USER_ID: lambda: None, "user": User("ann")})) is None
    assert user_id_of(websocket({USER_ID: None, "user": User("ann")})) == "ann"
    assert user_id_of(websocket({USER_ID: None})) is None


async def test_another_id_of_ones_own() -> None:
    """A new token's user is compared by that id as well."""
    ws = websocket({"user": User("ann", {"tenant": 7})})
    ws.scope[USER_ID] = lambda: f"tenant:{ws.scope['user'].claims['tenant']}"
    await refresh([HS256], ws, token({"sub": "bob", "tenant": 7}))
    assert ws.scope["user"].id == "bob"
    with pytest.raises(AuthenticationFailed, match="another user's"):
        await refresh([HS256], ws, token({"sub": "bob", "tenant": 8}))


async def test_a_new_token_without_the_right_to_be_here() -> None:
    """A new token with which the client might not have connected is refused, and the old one stays."""
    made = who_with(HS256, permission_classes=[HasScope("in")])
    async with connect(app_with(made), "/ws", headers=bearer(token({"scope": "in"}))) as ws:
        reply = await renew(ws, token({"scope": "out"}))
        assert reply["errors"]["code"] == "permission_denied"
        assert (await ask(ws))["scopes"] == ["in"]


async def test_a_new_token_where_nobody_is_asked() -> None:
    """A consumer without authentication takes no token."""
    async with connect(app_with(who_with()), "/ws") as ws:
        assert (await renew(ws, token()))["errors"]["code"] == "not_authenticated"


async def test_credentials_expire() -> None:
    """The client is told before its credentials expire, and closed with 4501 when they have."""
    claims = {"exp": int(time.time()) + 2}
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(token(claims))) as ws:
        notice = await ws.receive_json()
        assert notice["type"] == "auth.expiring"
        assert 0 < notice["in"] <= 2
        with pytest.raises(Exception, match="4501"):
            await ws.receive_json(timeout=5)
        assert ws.close_code == 4501


async def test_a_new_token_in_time() -> None:
    """With a new token in time the connection lives on."""
    async with connect(app_with(who_with(HS256)), "/ws", headers=bearer(token({"exp": int(time.time()) + 2}))) as ws:
        assert (await ws.receive_json())["type"] == "auth.expiring"
        assert (await renew(ws, token({"exp": int(time.time()) + 3600})))["status"] == "ok"
        await asyncio.sleep(2.05)  # until the old one has expired
        assert (await ask(ws))["id"] == "ann"


# Users


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, None),
        (AnonymousUser(), None),
        (User("7"), "7"),
        (SimpleUser("ann"), "ann"),
        (type("Numbered", (), {"is_authenticated": True, "id": 0})(), "0"),
        (type("Named", (), {"is_authenticated": True, "id": None, "username": "ann"})(), "ann"),
        (type("Nameless", (), {"is_authenticated": True})(), None),
        (type("Stranger", (), {"is_authenticated": False, "id": 7})(), None),
        (type("Plain", (), {"id": 7})(), None),
        ("ann", None),
    ],
    ids=str,
)
def test_ids_of_users(user: Any, expected: str | None) -> None:
    """A user's id is `str(user.id)`, else its name; a stranger has none, whatever it says."""
    assert user_id_of(websocket({"user": user})) == expected


# Tokens in the logs of servers


@pytest.fixture
def hiding() -> Iterator[None]:
    """The parameter `token`, and no other, is hidden in the logs of servers."""
    before = {name: list(logging.getLogger(name).filters) for name in SERVER_LOGS}
    for name in SERVER_LOGS:
        logging.getLogger(name).filters.clear()  # those of applications that other tests have run
    hide_tokens("token")
    added = {name: list(logging.getLogger(name).filters) for name in SERVER_LOGS}
    hide_tokens("token")
    assert {name: logging.getLogger(name).filters for name in SERVER_LOGS} == added
    yield
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


def logged(name: str, message: Any, *args: Any) -> logging.LogRecord:
    """What handlers get of a message to a logger."""
    logger = logging.getLogger(name)
    record = logger.makeRecord(name, logging.INFO, "", 0, message, args, None)
    found = logger.filter(record)
    assert found
    return record


@pytest.mark.usefixtures("hiding")
def test_tokens_in_records_as_uvicorn_makes_them() -> None:
    """Only the token's text is another; there are as many arguments, of the types that uvicorn's formatter expects."""
    client = ("10.0.0.1", 80)
    access = logged(
        "uvicorn.access", '%s - "%s %s HTTP/%s" %d', "10.0.0.1:80", "GET", "/a?x=1&token=secret&y=%20", "1.1", 200
    )
    accepted = logged("uvicorn.error", '%s - "WebSocket %s" [accepted]', client, "/ws?token=secret")
    refused = logged("uvicorn.error", '%s - "WebSocket %s" 403', client, "/ws?token=a=b/c+d~%3D'\"secret&x")
    assert access.args == ("10.0.0.1:80", "GET", "/a?x=1&token=[token]&y=%20", "1.1", 200)
    assert accepted.args == (client, "/ws?token=[token]")
    assert refused.args == (client, "/ws?token=[token]&x")
    line = AccessFormatter("%(request_line)s", use_colors=False).format(access)
    assert line == "GET /a?x=1&token=[token]&y=%20 HTTP/1.1"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/ws", "/ws"),
        ("/token=secret", "/token=secret"),
        ("/ws?token", "/ws?token"),
        ("/ws?token=", "/ws?token=[token]"),
        ("/ws?tokens=1&my_token=2&Token=3", "/ws?tokens=1&my_token=2&Token=3"),
        ("/ws?token=a&token=b", "/ws?token=[token]&token=[token]"),
        ("/ws?%74%6Fken=a", "/ws?%74%6Fken=[token]"),
        ("/ws?%54oken=a", "/ws?%54oken=a"),
        ("/ws/x=1?token=a", "/ws/x=1?token=[token]"),
        ("/ws?token=a?b=c", "/ws?token=[token]"),
        ("/ws?next=/a?token=b", "/ws?next=/a?token=[token]"),
        ("token=a&x=1", "token=[token]&x=1"),
        ("GET /ws?token=a HTTP/1.1", "GET /ws?token=[token] HTTP/1.1"),
        ("?" * 50_000 + "&" * 50_000 + "t" * 50_000, "?" * 50_000 + "&" * 50_000 + "t" * 50_000),
    ],
    ids=lambda value: value[:40],
)
@pytest.mark.usefixtures("hiding")
def test_tokens_in_texts(path: str, shown: str) -> None:
    """What is hidden is the value of that parameter and of no other, however the name is encoded."""
    assert logged("uvicorn.error", "%s", path).getMessage() == shown
    assert logged("uvicorn.error", path).getMessage() == shown


@pytest.mark.usefixtures("hiding")
def test_tokens_under_an_odd_name() -> None:
    """A parameter may have any name, and clients may write it in every way."""
    hide_tokens("tökén[+.*]")
    for name in ("tökén[+.*]", "t%C3%B6k%c3%a9n%5b%2B.*%5D", "%74%c3%b6kén[%2b.%2A]"):
        assert logged("uvicorn.access", "%s", f"/ws?{name}=secret").args == (f"/ws?{name}=[token]",)
    assert logged("uvicorn.access", "%s", "/ws?token=secret").args == ("/ws?token=[token]",)


@pytest.mark.usefixtures("hiding")
def test_records_of_all_kinds() -> None:
    """A record with whatever arguments, or a message that is no text, is passed on as it is, also one that is wrong."""
    assert isinstance(logged("hypercorn.access", KeyError("token=a")).msg, KeyError)
    assert logged("hypercorn.access", "%d %r %s", 1, None, b"/?token=a").args == (1, None, b"/?token=a")
    assert logged("hypercorn.access", "token=%s", "a").getMessage() == "token=a"
    assert logged("hypercorn.access", "too few %s %s", "x").args == ("x",)
    assert logged("hypercorn.access", "nothing %s", {}).getMessage() == "nothing {}"
    mapping = MappingProxyType({"x": "/?token=a"})
    assert logged("hypercorn.access", "%(x)s", mapping).args is mapping
    given = {"U": "/ws", "q": "token=a", "n": 1}
    assert logged("hypercorn.access", "%(q)s", given).args == {"U": "/ws", "q": "token=[token]", "n": 1}
    assert given["q"] == "token=a"
