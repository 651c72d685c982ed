"""Who may be here no longer, or not yet: disconnected users, lost permissions, credentials that expire or come late."""

import asyncio
import json
import logging
import time
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect as connect_for_real
from websockets.exceptions import ConnectionClosed as ReallyClosed

from fastapi_channels.authentication import Auth, TokenAuthentication, User
from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, watch
from fastapi_channels.exceptions import AuthenticationFailed, ConsumerError, InvalidGroupName, SettingsError
from fastapi_channels.layers import AsyncPublisher, ChannelLayer, Publisher
from fastapi_channels.layers.users import USERS_GROUP
from fastapi_channels.permissions import BasePermission, IsAuthenticated
from fastapi_channels.testing import ConnectionClosed, RedisServer, WebSocketSession, connect
from tests.brokers import Postgres, needed
from tests.conftest import Forward, Serve, app_with, until
from tests.layers.redis.conftest import healthy


class Tokens(TokenAuthentication):
    """The token is the user's name, and behind a colon for how many seconds it is good."""

    async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
        name, _, seconds = token.partition(":")
        if name == "wrong":
            raise AuthenticationFailed("wrong")
        return User(name), Auth(expires_at=time.time() + float(seconds) if seconds else None)


class Chat(ActionConsumer):
    authentication_classes = [Tokens]
    forward_events = ["news"]

    async def connect(self) -> None:
        await self.group_add("hall")

    @action
    async def ping(self) -> str:
        return "pong"

    @action
    async def who(self) -> Any:
        return self.user.id


def made(base: type[WebSocketConsumer] = Chat, **attributes: Any) -> Any:
    return type("Made", (base,), attributes)


def layer_of(app: FastAPI) -> ChannelLayer:
    layer: ChannelLayer = app.state.channels.layer()
    return layer


def by(name: str) -> str:
    """The path of a connection with a token."""
    return f"/ws?token={name}"


def app_of(*consumers: type[WebSocketConsumer], **options: Any) -> FastAPI:
    return app_with(*(consumers or (Chat,)), query_token_key="token", **options)


async def ask(ws: WebSocketSession, name: str = "ping", data: Any = None) -> Any:
    """The data of the reply, or the code of its error."""
    await ws.send_json({"action": name, "request_id": name, "data": data})
    reply = await ws.receive_json()
    assert reply.get("request_id") == name, reply
    return reply["data"] if reply["status"] == "ok" else reply["errors"]["code"]


async def ended(ws: WebSocketSession) -> tuple[int, str]:
    return await ws.closed(timeout=5)


async def due() -> None:
    """Wait until whatever timer is due has run: it is due before this one."""
    await asyncio.sleep(0.001)


# Disconnecting a user


@pytest.fixture(scope="module")
def postgres_server() -> Any:
    needed("postgres")
    with Postgres() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "broadcaster", "postgres"])
def layers(request: pytest.FixtureRequest) -> Any:
    """The setting of two processes, which in memory are one."""
    if request.param == "memory":
        return "memory://"
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").url
    url = request.getfixturevalue("redis_url")
    return url if request.param == "redis" else f"broadcaster+{url}"


async def test_every_connection_of_a_user(layers: str) -> None:
    """All connections of the user in all processes are closed, with the code and the reason; nobody else's."""
    one, other = app_of(channel_layers={"default": layers}), app_of(channel_layers={"default": layers})
    async with AsyncExitStack() as stack:
        apps = (one, one) if layers == "memory://" else (one, other)
        anns, others = [], []
        for app in apps:
            for _ in range(2):
                anns.append(await stack.enter_async_context(connect(app, by("ann"))))
            for name in ("bob", "Ann", "an", "ann "):
                others.append(await stack.enter_async_context(connect(app, by(name))))
            others.append(await stack.enter_async_context(connect(app, "/ws")))
        await layer_of(one).disconnect_user("ann", 4600, "banned: é")
        for ws in anns:
            assert await ended(ws) == (4600, "banned: é")
        for ws in others:
            assert await ask(ws) == "pong"
        await layer_of(apps[1]).disconnect_user("ann")
        await layer_of(apps[1]).disconnect_user("nobody")
        for ws in others:
            assert await ask(ws) == "pong"
        async with connect(apps[1], by("ann")) as again:
            assert await ask(again) == "pong"
            await layer_of(one).disconnect_user("ann")
            assert (await ended(again))[0] == 4503


async def test_from_without(redis_url: str) -> None:
    """A `Publisher`, an `AsyncPublisher` and `layer.sync` disconnect too."""
    app = app_of(channel_layers={"default": redis_url})
    async with connect(app, by("bob")) as bob:
        async with connect(app, by("ann")) as ann, AsyncPublisher(redis_url) as publisher:
            await publisher.disconnect_user("ann", code=4601, reason="so")
            assert await ended(ann) == (4601, "so")
        async with connect(app, by("ann")) as ann:

            def disconnect() -> None:
                with Publisher(redis_url) as publisher:
                    publisher.disconnect_user("ann", 4602)

            await asyncio.to_thread(disconnect)
            assert (await ended(ann))[0] == 4602
        async with connect(app, by("ann")) as ann:
            await asyncio.to_thread(layer_of(app).sync.disconnect_user, "ann", 4603, "so")
            assert await ended(ann) == (4603, "so")
        with pytest.raises(ValueError, match="code"):
            async with AsyncPublisher(redis_url) as publisher:
                await publisher.disconnect_user("ann", 1006)
        assert await ask(bob) == "pong"


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, -1])
async def test_wrong_codes(code: int) -> None:
    """A code that nobody may close with is an error, and closes nothing."""
    app = app_of()
    async with connect(app, by("ann")) as ws:
        with pytest.raises(ValueError, match=str(code)):
            await layer_of(app).disconnect_user("ann", code)
        assert await ask(ws) == "pong"


async def test_a_long_reason() -> None:
    """A reason is cut to what a close frame holds."""
    app = app_of()
    async with connect(app, by("ann")) as ws:
        await layer_of(app).disconnect_user("ann", 4600, "é" * 500)
        assert await ended(ws) == (4600, "é" * 61)


async def test_ids_that_are_numbers() -> None:
    """A user's id is what `str` makes of it, here as there."""

    class Numbers(Tokens):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
            user: Any = User(int(token))  # type: ignore[arg-type]
            return user, None

    app = app_of(made(authentication_classes=[Numbers]))
    async with connect(app, by("7")) as ws, connect(app, by("77")) as other:
        await layer_of(app).disconnect_user(7)  # type: ignore[arg-type]
        assert (await ended(ws))[0] == 4503
        assert await ask(other) == "pong"


@pytest.mark.parametrize("name", ["日本", "a\x00b", "x" * 10_000, "{}", "a:b", "é"])
async def test_odd_ids(name: str, redis_url: str) -> None:
    """A user's id may be any text."""

    class Odd(Tokens):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
            return User(name), None

    app = app_of(made(authentication_classes=[Odd], max_connections_per_user=3), channel_layers={"default": redis_url})
    async with connect(app, by("x")) as ws:
        await layer_of(app).disconnect_user(name)
        assert (await ended(ws))[0] == 4503


@pytest.mark.parametrize("reject_mode", ["http", "close"])
@pytest.mark.parametrize("where", ["permission", "dependency", "connect", "accepted"])
async def test_on_the_way_in(where: str, reject_mode: Any) -> None:
    """Who is disconnected before its handshake is answered is refused with that code; later calls are cancelled."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    done: list[str] = []
    is_there: list[str] = []

    async def stop(here: str) -> None:
        if here == where and is_there:
            reached.set()
            await go_on.wait()
            done.append(here)

    async def permission(ws: WebSocket) -> bool:
        await stop("permission")
        return True

    async def dependency() -> None:
        await stop("dependency")

    class Slow(Chat):
        permission_classes = [permission]

        async def connect(self, _: Annotated[None, Depends(dependency)] = None) -> None:
            if where == "accepted":
                await self.accept()
            await stop(where)
            done.append("connect")

        @action
        async def ping(self) -> str:
            done.append("ping")
            return "pong"

    app = app_of(Slow, reject_mode=reject_mode)
    async with connect(app, "/ws"):
        is_there.append("ann")
        session = connect(app, by("ann"))
        entering = asyncio.create_task(session.__aenter__())
        await asyncio.wait_for(reached.wait(), 5)
        done.clear()
        await layer_of(app).disconnect_user("ann", 4501, "gone")
        await until(lambda: entering.done())
        go_on.set()
        ws = entering.result()
        with suppress(ConnectionClosed):
            await ws.send_text(json.dumps({"action": "ping"}))
        if where == "accepted" or reject_mode == "close":
            assert (ws.accepted, *await ended(ws)) == (True, 4501, "gone")
        else:
            await ended(ws)
            assert ws.response is not None
            assert ws.response.status_code == 401
        await session.__aexit__(None, None, None)
        assert "ping" not in done
        assert "connect" not in done
        await layer_of(app).disconnect_user("ann")
        assert await layer_of(app).health()


async def test_while_it_is_being_accepted() -> None:
    """Who is disconnected at the very moment in which its handshake is answered with yes is closed."""
    app = app_of()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        async def send_slowly(message: Any) -> None:
            if message["type"] == "websocket.accept" and b"ann" in scope["query_string"]:
                await layer_of(app).disconnect_user("ann", 4600, "late")
                for _ in range(5):
                    await asyncio.sleep(0)
            await send(message)

        await app(scope, receive, send_slowly if scope["type"] == "websocket" else send)

    async with connect(slow, "/ws?token=bob") as bob:
        async with connect(slow, "/ws?token=ann") as ws:
            assert (await ended(ws)) == (4600, "late")
        assert await ask(bob) == "pong"


async def test_just_before_it_is_accepted() -> None:
    """Who is disconnected in the last step of `connect` doesn't slip through."""

    class Late(Chat):
        async def connect(self) -> None:
            if self.user.is_authenticated:
                await self.layer.disconnect_user(self.user.id, 4600, "last step")

    for mode in ("http", "close"):
        async with connect(app_of(Late, reject_mode=mode), by("ann")) as ws:
            await ended(ws)
            if ws.accepted:
                assert (ws.close_code, ws.close_reason) == (4600, "last step")
            else:
                assert ws.response is not None
                assert ws.response.status_code == 403


async def test_while_an_action_hangs() -> None:
    """An action that hangs is ended with the connection, and the frames behind it are not handled."""
    started, ends = asyncio.Event(), list[str]()

    class Slow(Chat):
        @action
        async def hang(self) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ends.append("hang")

        @action
        async def ping(self) -> str:
            ends.append("ping")
            return "pong"

        async def disconnect(self, code: int, reason: str) -> None:
            ends.append(f"{code} {reason}")

    app = app_of(Slow)
    async with connect(app, by("ann")) as ws:
        await ws.send_json({"action": "hang"})
        await asyncio.wait_for(started.wait(), 5)
        for _ in range(5):
            await ws.send_json({"action": "ping"})
        await layer_of(app).disconnect_user("ann", 4600, "so")
        assert await ended(ws) == (4600, "so")
    assert ends == ["hang", "4600 so"]


async def test_frames_behind_it() -> None:
    """A user who is disconnected by one of its own frames has none handled after it."""
    handled: list[int] = []

    class Once(Chat):
        @action
        async def number(self, number: int) -> None:
            handled.append(number)
            if number == 5:
                await self.layer.disconnect_user(self.user.id)

    async with connect(app_of(Once), by("ann")) as ws:
        for number in range(20):
            await ws.send_json({"action": "number", "data": number})
        assert (await ended(ws))[0] == 4503
    assert handled == list(range(6))


async def test_frames_under_a_server(serve: Serve) -> None:
    """Under a real server frames on their way are not handled after the close, and the client reads the code."""
    handled: list[int] = []

    class Many(Chat):
        @action
        async def number(self, number: int) -> None:
            handled.append(number)
            if number == 50:
                await self.layer.disconnect_user("ann", 4600, "so")

    served = await serve(app_of(Many))
    async with connect_for_real(f"{served.url}{by('ann')}", proxy=None) as client:
        with suppress(ReallyClosed):
            for number in range(200):
                await client.send(json.dumps({"action": "number", "data": number}))
        with pytest.raises(ReallyClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4600, "so")
    assert handled == list(range(51))


async def test_the_group_of_users_is_out_of_reach() -> None:
    """Nobody can join the group that carries this, or send to it, by its name."""
    app = app_of()
    layer = layer_of(app)
    async with connect(app, by("ann")) as ws:
        channel = await layer.new_channel()
        with pytest.raises(InvalidGroupName):
            await layer.group_add(USERS_GROUP, channel)
        with pytest.raises(InvalidGroupName):
            await layer.group_send(USERS_GROUP, {"type": "user.disconnect", "user": "ann", "code": 4600, "reason": ""})
        await layer.group_discard(USERS_GROUP, channel)
        assert await ask(ws) == "pong"
        await layer.disconnect_user("ann")
        assert (await ended(ws))[0] == 4503


async def test_a_message_of_that_type_to_a_group() -> None:
    """A message to a group of the application that looks like it disconnects nobody."""
    app = app_of()
    async with connect(app, by("ann")) as ws:
        order = {"type": "user.disconnect", "user": "ann", "code": 4600, "reason": ""}
        await layer_of(app).group_send("hall", order)
        await layer_of(app).group_send("hall", {"type": "news"})
        assert await ws.receive_json() == {"type": "news"}
        assert await ask(ws) == "pong"


async def test_flush_leaves_it(layers: str) -> None:
    """After `flush` users can still be disconnected, from every process."""
    one, other = app_of(channel_layers={"default": layers}), app_of(channel_layers={"default": layers})
    async with connect(one, by("ann")) as ann, connect(one if layers == "memory://" else other, by("bob")) as bob:
        await layer_of(one).flush()
        await layer_of(one if layers == "memory://" else other).disconnect_user("ann")
        assert (await ended(ann))[0] == 4503
        assert await ask(bob) == "pong"


async def test_nothing_is_kept_of_who_has_left() -> None:
    """A layer forgets a user with the last of its connections."""
    app = app_of()
    async with connect(app, by("bob")):
        for _ in range(3):
            async with connect(app, by("ann")) as ws:
                assert await ask(ws) == "pong"
        async with connect(app_of(made(permission_classes=[False])), by("ann")):
            pass
        assert list(layer_of(app)._users._closes) == ["bob"]
    assert layer_of(app)._users._closes == {}


async def test_redis_was_away(redis_url: str, redis_server: RedisServer) -> None:
    """When Redis has come back, users are disconnected from every process as before."""
    one, other = (
        app_of(channel_layers={"default": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": config}})
        for config in ({"url": redis_url, "timeout": 0.5}, {"url": redis_url, "timeout": 0.5})
    )
    async with connect(one, by("ann")) as ann, connect(other, by("bob")):
        await asyncio.to_thread(redis_server.kill)
        await asyncio.to_thread(redis_server.restart)
        await healthy(layer_of(one), layer_of(other))
        await layer_of(other).disconnect_user("ann")
        assert (await ended(ann))[0] == 4503


# Permissions that are withdrawn


@pytest.fixture
def recheck() -> dict[str, Any]:
    """What the permission of `rechecked` says, and how often it was asked."""
    return {"asked": 0, "says": True}


def rechecked(said: dict[str, Any], *, base: type[WebSocketConsumer] = Chat, **attributes: Any) -> Any:
    async def permission(ws: WebSocket, action: str | None = None) -> Any:
        said["asked"] += action is None
        if isinstance(said["says"], Exception):
            raise said["says"]
        return said["says"] or action is not None

    return made(base, permission_classes=[permission], permission_recheck=30.0, **attributes)


async def test_a_permission_is_withdrawn(recheck: dict[str, Any], forward: Forward) -> None:
    """It is asked anew within each interval, not on every frame, and who has lost it is closed with 4503."""
    async with connect(app_of(rechecked(recheck)), by("ann")) as ws:
        for number in range(1, 5):
            assert recheck["asked"] == number
            assert await ask(ws) == "pong"
            forward(20)
            await due()
            assert recheck["asked"] == number
            forward(10.1)
            await until(lambda number=number: recheck["asked"] == number + 1)  # type: ignore[misc]
        assert await ask(ws) == "pong"
        recheck["says"] = False
        assert await ask(ws) == "pong"
        forward(30.1)
        code, reason = await ended(ws)
        assert code == 4503
        assert "permission" in reason


@pytest.mark.parametrize("says", [ValueError("wrong"), None, 1, "yes"])
async def test_a_permission_that_fails(says: Any, recheck: dict[str, Any], forward: Forward) -> None:
    """What isn't True closes too, an exception as well."""
    async with connect(app_of(rechecked(recheck)), by("ann")) as ws:
        recheck["says"] = says
        forward(30.1)
        assert (await ended(ws))[0] == 4503


async def test_the_user_is_not_known_any_more(forward: Forward) -> None:
    """Who has become a stranger meanwhile is closed with 4503 as well: the permission is gone."""
    users: list[Any] = []

    class Leaving(Chat):
        permission_classes = [IsAuthenticated]
        permission_recheck = 5

        async def connect(self) -> None:
            users.append(self.scope)

    async with connect(app_of(Leaving), by("ann")) as ws:
        users[0].pop("user")
        forward(5.1)
        assert (await ended(ws))[0] == 4503


async def test_it_is_not_asked_after_the_end(recheck: dict[str, Any], forward: Forward) -> None:
    """With the connection the asking ends, also if it is under way."""
    hangs = asyncio.Event()
    app = app_of(rechecked(recheck))
    async with connect(app, "/Made"):
        async with connect(app, by("ann")) as ws:
            assert await ask(ws) == "pong"
        for _ in range(3):
            asked = recheck["asked"]
            forward(30.1)
            await until(lambda asked=asked: recheck["asked"] == asked + 1)  # type: ignore[misc]
            await due()
            assert recheck["asked"] == asked + 1  # that of the connection that is open

    async def hanging(ws: WebSocket) -> bool:
        if recheck.setdefault("entered", False):
            hangs.set()
            await asyncio.Event().wait()
        recheck["entered"] = True
        return True

    async with connect(app_of(made(permission_classes=[hanging], permission_recheck=1.0)), by("ann")) as ws:
        forward(1.1)
        await asyncio.wait_for(hangs.wait(), 5)
    assert (ws.close_code, ws._task is not None and ws._task.done()) == (1000, True)


async def test_frames_after_it_was_withdrawn(recheck: dict[str, Any], forward: Forward) -> None:
    """No frame is handled once it has been seen that the permission is gone."""
    handled: list[str] = []

    class Noting(Chat):
        @action
        async def ping(self) -> str:
            handled.append("ping")
            return "pong"

    async with connect(app_of(rechecked(recheck, base=Noting)), by("ann")) as ws:
        recheck["says"] = False
        forward(30.1)
        await until(lambda: ws.close_code is not None)
        with pytest.raises(ConnectionClosed):
            await ws.send_json({"action": "ping"})
        assert (await ended(ws))[0] == 4503
    assert handled == []


# Credentials that expire


async def test_credentials_expire(forward: Forward) -> None:
    """A minute before, the client is told; when they have expired it is closed with 4501."""
    async with connect(app_of(), by("ann:100")) as ws:
        assert await ask(ws) == "pong"
        forward(39)
        await due()
        assert await ask(ws) == "pong"
        forward(2)
        told = await ws.receive_json()
        assert told["type"] == "auth.expiring"
        assert 0 < told["in"] <= 100
        assert await ask(ws) == "pong"
        forward(101)
        assert (await ended(ws))[0] == 4501
        assert "expired" in str(ws.close_reason)


async def test_credentials_that_expire_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes with credentials of less than a minute is told at once, and closed when they expire."""
    monkeypatch.setattr(watch, "EXPIRY_NOTICE", 60.0)
    async with connect(app_of(), by("ann:0.3")) as ws:
        told = await ws.receive_json()
        assert told == {"type": "auth.expiring", "in": told["in"]}
        assert 0 < told["in"] <= 0.3
        assert (await ended(ws))[0] == 4501


async def test_a_new_token(forward: Forward) -> None:
    """A new token by `$auth` puts the end off; without an expiry there is none any more."""
    async with connect(app_of(), by("ann:100")) as ws:
        forward(41)
        assert (await ws.receive_json())["type"] == "auth.expiring"
        reply = await ask(ws, "$auth", {"token": "ann:1000"})
        assert reply["expires_at"] > time.time() + 900
        forward(500)
        await due()
        assert await ask(ws) == "pong"
        assert await ask(ws, "$auth", {"token": "ann"}) == {"expires_at": None}
        forward(10_000)
        await due()
        assert await ask(ws) == "pong"
        assert await ask(ws, "$auth", {"token": "ann:10"}) is not None
        assert (await ws.receive_json())["type"] == "auth.expiring"
        forward(11)
        assert (await ended(ws))[0] == 4501


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"token": "wrong"}, "not_authenticated"),
        ({"token": "bob"}, "not_authenticated"),
        ({"token": "ann:-5"}, "not_authenticated"),
        ({"token": ""}, "invalid_data"),
        ({"token": 7}, "invalid_data"),
        ({}, "invalid_data"),
        ([], "invalid_data"),
        ("ann", "invalid_data"),
        (None, "invalid_data"),
    ],
)
async def test_a_token_that_is_refused(data: Any, code: str, forward: Forward) -> None:
    """A token that is refused changes nothing: the client stays who it is, for as long as it was."""
    async with connect(app_of(), by("ann:1000")) as ws:
        assert await ask(ws, "$auth", data) == code
        assert await ask(ws, "who") == "ann"
        forward(941)
        assert (await ws.receive_json())["type"] == "auth.expiring"
        assert await ask(ws, "$auth", data) == code
        forward(1001)
        assert (await ended(ws))[0] == 4501


async def test_a_stranger_becomes_somebody() -> None:
    """A stranger's `$auth` makes it a user, who is counted, and can be disconnected."""
    app = app_of(made(max_connections_per_user=1))
    async with connect(app, "/ws") as ws, connect(app, "/ws") as other:
        assert await ask(ws, "who") is None
        assert await ask(ws, "$auth", {"token": "ann"}) == {"expires_at": None}
        assert await ask(ws, "who") == "ann"
        assert await ask(other, "$auth", {"token": "ann"}) == "too_many_connections"
        assert await ask(other, "who") is None
        async with connect(app, by("ann")) as third:
            assert third.response is not None
            assert third.response.status_code == 429
        await layer_of(app).disconnect_user("ann")
        assert (await ended(ws))[0] == 4503
        assert await ask(other, "$auth", {"token": "ann"}) == {"expires_at": None}
        assert await ask(other, "who") == "ann"


async def test_a_permission_refuses_a_new_token() -> None:
    """Who may not be here with its new token keeps the old one."""

    async def permission(ws: WebSocket, action: str | None = None) -> bool:
        return ws.scope["auth"] is None or ws.scope["auth"].expires_at is None

    async with connect(app_of(made(permission_classes=[permission])), by("ann")) as ws:
        assert await ask(ws, "$auth", {"token": "ann:1000"}) == "permission_denied"
        assert await ask(ws) == "pong"
        assert await ask(ws, "$auth", {"token": "ann"}) == {"expires_at": None}


async def test_two_tokens_at_once() -> None:
    """Of two new tokens that are both refused neither is left in force, whichever is looked at first."""
    gates = {"slow": asyncio.Event(), "slower": asyncio.Event()}

    class Slow(Tokens):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
            if token == "slower":
                await gates["slower"].wait()
                raise AuthenticationFailed("wrong")
            return User(token), None

    async def permission(ws: WebSocket, action: str | None = None) -> bool:
        if action is None and ws.user.id == "slow":
            await gates["slow"].wait()
            return False
        return True

    async with connect(app_of(made(authentication_classes=[Slow], permission_classes=[permission])), "/ws") as ws:
        for number, token in enumerate(("slow", "slower")):
            await ws.send_json({"action": "$auth", "request_id": number, "data": {"token": token}})
        await due()
        gates["slow"].set()
        assert (await ws.receive_json())["request_id"] == 0
        gates["slower"].set()
        assert (await ws.receive_json())["request_id"] == 1
        assert await ask(ws, "who") is None


async def test_many_tokens() -> None:
    """However many `$auth` frames come, at most two are looked at, one after another; the client is held back."""
    go_on, running = asyncio.Event(), [0, 0]

    class Slow(Tokens):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any] | None:
            running[0] += 1
            running[1] = max(running)
            await go_on.wait()
            running[0] -= 1
            return User("ann"), None

    async with connect(app_of(made(authentication_classes=[Slow])), "/ws") as ws:
        for number in range(3000):
            await ws.send_json({"action": "$auth", "request_id": number, "data": {"token": "x"}})
        await due()
        assert ws._to_app.qsize() > 1000
        go_on.set()
        assert {(await ws.receive_json())["status"] for _ in range(3000)} == {"ok"}
        assert running[1] == 1
        assert await ask(ws, "who") == "ann"


async def test_a_new_token_while_an_action_hangs() -> None:
    """`$auth` doesn't wait for actions that run: credentials can be renewed in the midst of a long one."""
    go_on = asyncio.Event()

    class Slow(Chat):
        @action
        async def slow(self) -> str:
            await go_on.wait()
            return "done"

    async with connect(app_of(Slow), by("ann")) as ws:
        await ws.send_json({"action": "slow", "request_id": "slow"})
        assert await ask(ws, "$auth", {"token": "ann"}) == {"expires_at": None}
        go_on.set()
        assert (await ws.receive_json())["data"] == "done"


# The token in the first frame

TAKEN = {"type": "response", "action": "$auth", "status": "ok", "data": {"expires_at": None}, "errors": None}


def first(**attributes: Any) -> Any:
    return made(token_in_first_frame=True, **attributes)


AUTH = json.dumps({"action": "$auth", "request_id": 0, "data": {"token": "ann"}})


@pytest.mark.parametrize("token", [AUTH, '{"action": "$auth", "token": "ann"}', AUTH.encode()])
async def test_the_right_token(token: str | bytes) -> None:
    """A client that sends its token first is who it is from `connect` on; it had been accepted before."""
    seen: list[Any] = []

    class First(Chat):
        token_in_first_frame = True
        permission_classes = [IsAuthenticated]

        async def connect(self) -> None:
            seen.append(self.user.id)

    async with connect(app_of(First), "/ws") as ws:
        assert ws.accepted
        assert seen == []
        await (ws.send_bytes(token) if isinstance(token, bytes) else ws.send_text(token))
        assert await ws.receive_json() == {**TAKEN, "request_id": 0 if "request_id" in str(token) else None}
        assert await ask(ws, "who") == "ann"
    assert seen == ["ann"]


@pytest.mark.parametrize(
    "text",
    [
        AUTH.replace("ann", "wrong"),
        AUTH.replace("ann", "ann:-1"),
        '{"action": "ping"}',
        '{"action": "$auth"}',
        '{"action": "$auth", "data": {"token": 7}}',
        '{"action": "$auth", "data": "ann"}',
        "no json",
        "",
        "[]",
        "null",
        "[" * 900,
        AUTH.replace("ann", "a" * 2000),
        AUTH.replace("ann", "é" * 600),
        b"\xff\xfe",
    ],
)
async def test_no_token(text: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Any other first frame closes with 4501, neither `connect` nor a frame behind it runs, and the log is quiet."""
    seen: list[str] = []

    def dependency() -> None:
        seen.append("dependency")

    class First(ActionConsumer):
        authentication_classes = [Tokens]
        token_in_first_frame = True
        max_frame_size = 1000

        async def connect(self, _: Annotated[None, Depends(dependency)]) -> None:
            seen.append("connect")

        async def disconnect(self, code: int) -> None:
            seen.append("disconnect")

        @action
        async def ping(self) -> None:
            seen.append("ping")

    async with connect(app_of(First), "/ws") as ws:
        await (ws.send_bytes(text) if isinstance(text, bytes) else ws.send_text(text))
        with suppress(ConnectionClosed):
            await ws.send_json({"action": "ping"})
        assert (await ended(ws))[0] == 4501
        with pytest.raises(ConnectionClosed):
            await ws.receive_text()
    assert seen == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("options", "seconds"), [({}, 10), ({"first_frame_timeout": 3}, 3)])
async def test_no_frame_in_time(options: dict[str, Any], seconds: float, forward: Forward) -> None:
    """A client that sends nothing has `FIRST_FRAME_TIMEOUT`, or 10 seconds; then it is closed with 4501."""
    async with connect(app_of(first(**options)), "/ws") as ws:
        forward(seconds - 0.5)
        await due()
        assert ws.close_code is None
        forward(1)
        assert (await ended(ws))[0] == 4501


async def test_the_token_is_the_first_frame(forward: Forward) -> None:
    """Who has sent its token has sent a first frame."""
    async with connect(app_of(first(first_frame_timeout=3)), "/ws") as ws:
        await ws.send_text(AUTH)
        await until(lambda: ws._to_app.empty())
        await due()
        forward(10)
        await due()
        assert (await ws.receive_json())["action"] == "$auth"
        assert await ask(ws, "who") == "ann"


async def test_a_client_that_goes_before_its_token() -> None:
    """Who goes away before is forgotten: its places are free, nothing is called, and nothing is logged as an error."""
    app = app_of(first(max_connections=1))
    for leave in (WebSocketSession.close, WebSocketSession.vanish):
        async with connect(app, "/ws") as ws:
            await leave(ws)
        async with connect(app, by("ann")) as ws:
            assert await ask(ws) == "pong"


async def test_who_is_known_needs_no_token() -> None:
    """Who brings its token with the handshake isn't asked for one, and is refused as ever if it is wrong."""
    async with connect(app_of(first()), by("ann")) as ws:
        assert await ask(ws, "who") == "ann"
    async with connect(app_of(first()), by("wrong")) as ws:
        assert ws.response is not None
        assert ws.response.status_code == 401


async def test_frames_behind_the_token() -> None:
    """Frames that are sent together with the token are handled in order once `connect` is through."""
    go_on, seen = asyncio.Event(), list[Any]()

    class First(Chat):
        token_in_first_frame = True

        async def connect(self) -> None:
            await go_on.wait()
            seen.append("connect")

        @action
        async def number(self, number: int) -> int:
            seen.append(number)
            return number

    async with connect(app_of(First), "/ws") as ws:
        await ws.send_text(AUTH)
        for number in range(5):
            await ws.send_json({"action": "number", "request_id": number, "data": number})
        await due()
        assert (await ws.receive_json())["action"] == "$auth"
        go_on.set()
        assert [(await ws.receive_json())["data"] for _ in range(5)] == list(range(5))
    assert seen == ["connect", *range(5)]


async def test_refused_behind_the_token() -> None:
    """What is refused after the token is a close code: too many of the user, no permission, a dependency, connect."""

    def dependency() -> None:
        raise ValueError("wrong")

    class Failing(ActionConsumer):
        authentication_classes = [Tokens]

        async def connect(self, _: Annotated[None, Depends(dependency)]) -> None: ...

    class Refusing(Chat):
        async def connect(self) -> None:
            await self.close(4504, "none")

    cases: list[tuple[Any, int]] = [
        (first(max_connections_per_user=0), 4009),
        (first(permission_classes=[False]), 4503),
        (made(Refusing, token_in_first_frame=True), 4504),
    ]
    for consumer, code in cases:
        async with connect(app_of(consumer), "/ws") as ws:
            await ws.send_text(AUTH)
            assert (await ended(ws))[0] == code
    async with connect(app_of(made(Failing, token_in_first_frame=True)), "/ws") as ws:
        await ws.send_text(AUTH)
        with pytest.raises(ValueError, match="wrong"):
            await ended(ws)
        assert ws.close_code == 1011


async def test_a_user_who_came_by_a_frame_is_disconnected() -> None:
    """`disconnect_user` reaches it, also while a dependency or `connect` still runs."""
    reached = asyncio.Event()

    class Hangs(Chat):
        token_in_first_frame = True

        async def connect(self) -> None:
            reached.set()
            await asyncio.Event().wait()

    app = app_of(Hangs)
    async with connect(app, "/ws") as ws:
        await ws.send_text(AUTH)
        await asyncio.wait_for(reached.wait(), 5)
        await layer_of(app).disconnect_user("ann", 4600, "so")
        assert await ended(ws) == (4600, "so")


class Json(JsonConsumer):
    authentication_classes = [Tokens]
    token_in_first_frame = True

    async def receive(self, data: Any) -> None:
        await self.send_json([self.user.id, data])


class Plain(WebSocketConsumer):
    authentication_classes = [Tokens]
    token_in_first_frame = True

    async def receive(self, data: str) -> None:
        await self.send(text=json.dumps([self.user.id, json.loads(data)]))


@pytest.mark.parametrize("consumer", [Json, Plain])
async def test_on_other_consumers(consumer: Any) -> None:
    """Every consumer may ask for the token first."""
    async with connect(app_of(consumer), "/ws") as ws:
        await ws.send_text(AUTH)
        await ws.send_text("1")
        assert (await ws.receive_json())["action"] == "$auth"
        assert await ws.receive_json() == ["ann", 1]


async def test_the_first_frame_under_a_server(serve: Serve) -> None:
    """Under a real server too: the right token is let in, the wrong one reads 4501."""
    served = await serve(app_of(first()))
    async with connect_for_real(f"{served.url}/ws", proxy=None) as client:
        await client.send(AUTH)
        await client.send(json.dumps({"action": "who", "request_id": 1}))
        assert json.loads(await client.recv())["action"] == "$auth"
        assert json.loads(await client.recv())["data"] == "ann"
    async with connect_for_real(f"{served.url}/ws", proxy=None) as client:
        await client.send(AUTH.replace("ann", "wrong"))
        with pytest.raises(ReallyClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4501


async def test_a_token_that_nobody_takes() -> None:
    """A consumer that waits for a token, with nothing that takes one, stops the start."""
    app = app_of(first(authentication_classes=[]))
    with pytest.raises(SettingsError, match="token_in_first_frame"):
        async with connect(app, "/ws"):
            pass


# In the midst of things


async def test_a_ban_while_a_frame_is_at_the_gate() -> None:
    """A frame whose permission is being asked when its user is disconnected is not handled, whatever the answer."""
    asked, go_on, handled = asyncio.Event(), asyncio.Event(), list[str]()

    async def slow(websocket: WebSocket, action: str | None) -> bool:
        if action is not None or "frames" in websocket.scope:
            asked.set()
            await go_on.wait()
        return True

    class Paying(Chat):
        permission_classes = [slow]

        @action
        async def pay(self) -> None:
            handled.append("pay")

    class Plain(JsonConsumer):
        authentication_classes = [Tokens]
        permission_classes = [slow]

        async def connect(self) -> None:
            self.scope["frames"] = True

        async def receive(self, data: Any) -> None:
            handled.append("receive")

    for consumer in (Paying, Plain):
        asked.clear()
        go_on.clear()
        app = app_of(consumer)
        async with connect(app, by("ann")) as ws:
            await ws.send_json({"action": "pay"})
            await asyncio.wait_for(asked.wait(), 5)
            await layer_of(app).disconnect_user("ann")
            go_on.set()
            assert (await ended(ws))[0] == 4503
    assert handled == []


async def test_a_ban_while_a_call_waits_for_room() -> None:
    """A call that waits for others of its kind is not begun once its user has been disconnected."""
    begun, go_on = list[int](), asyncio.Event()

    class Busy(Chat):
        @action(concurrency=2)
        async def work(self, number: int) -> None:
            begun.append(number)
            await go_on.wait()

    app = app_of(Busy)
    async with connect(app, by("ann")) as ws:
        for number in range(3):
            await ws.send_json({"action": "work", "data": number})
        await until(lambda: len(begun) == 2)
        await layer_of(app).disconnect_user("ann")
        go_on.set()
        assert (await ended(ws))[0] == 4503
    assert begun == [0, 1]


async def test_a_ban_while_a_stranger_becomes_known() -> None:
    """Who is disconnected while its new token is looked at is closed; who is refused is a stranger as before."""
    asked, go_on, banned = asyncio.Event(), asyncio.Event(), set[str]()

    class NotBanned(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            user = websocket.scope.get("user")
            is_banned = getattr(user, "id", None) in banned
            if getattr(user, "id", None) is not None and action is None:
                asked.set()
                await go_on.wait()
            return not is_banned

    app = app_of(made(permission_classes=[NotBanned], max_connections_per_user=1))
    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "$auth", "data": {"token": "tom"}})
        await asyncio.wait_for(asked.wait(), 5)
        banned.add("tom")
        await layer_of(app).disconnect_user("tom")
        go_on.set()
        assert (await ended(ws))[0] == 4503
    async with connect(app, "/ws") as ws:
        await ws.send_json({"action": "$auth", "request_id": 1, "data": {"token": "tom"}})
        assert (await ws.receive_json())["errors"]["code"] == "permission_denied"
        await layer_of(app).disconnect_user("tom")
        assert await ask(ws, "who") is None
        assert await app.state.channels.leases.count("user::tom") == 0
        banned.clear()
        async with connect(app, by("tom")) as other:  # whose place is free
            assert await ask(other, "who") == "tom"


async def test_a_recheck_that_can_not_be_told(recheck: dict[str, Any], forward: Forward) -> None:
    """A permission that fails in its words, too, denies."""

    class Wordless(BasePermission):
        async def has_permission(self, websocket: WebSocket, action: str | None = None, **kwargs: Any) -> bool:
            return bool(recheck["says"])

        def denial(self, websocket: WebSocket) -> ConsumerError:
            raise KeyError("no words")

    async with connect(app_of(made(permission_classes=[Wordless], permission_recheck=30.0)), by("ann")) as ws:
        recheck["says"] = False
        forward(30.1)
        assert (await ended(ws))[0] == 4503


@pytest.mark.parametrize("token", ["sub-protocol", "first frame"])
async def test_empty_tokens(token: str) -> None:
    """An empty token is none, wherever it stands."""

    class Believing(TokenAuthentication):
        async def user_of(self, token: str, websocket: WebSocket) -> tuple[Any, Any]:
            return User("anybody"), None

    if token == "first frame":
        app = app_of(made(authentication_classes=[Believing], token_in_first_frame=True))
        async with connect(app, "/ws") as ws:
            await ws.send_json({"action": "$auth", "data": {"token": ""}})
            assert (await ended(ws))[0] == 4501
    else:
        app = app_of(made(authentication_classes=[Believing]))
        async with connect(app, "/ws", subprotocols=["bearer", ""]) as ws:
            assert await ask(ws, "who") is None
