"""What strangers get at the gate of real servers, in both modes of refusal, and that no frame of theirs is handled."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from uuid import uuid4

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from websockets.http11 import Response

from tests.conftest import until
from tests.servers.client import DEADLINE, Server, ask, come
from tests.servers.conftest import COMMANDS

pytestmark = pytest.mark.parametrize("server", COMMANDS, indirect=True)

#: What a server answers by itself to who speaks before he is answered (RFC 6455 4.1 forbids it).
SERVERS_OWN = {"hypercorn": [400]}

#: Servers that keep such frames for who is let in; the others lose them.
KEEPING = {"uvicorn websockets-sansio", "uvicorn websockets"}

#: What is sent too early, and by who is refused.
FRAMES = [ask("one"), ask("two"), '{"action": "$auth", "data": {"token": "good.late"}}', "three"]


@dataclass(frozen=True)
class Case:
    """A handshake that is refused.

    Attributes:
        door: Where it comes.
        status: What it gets as an HTTP response.
        close_code: What it gets with `reject_mode="close"`.
        code: The `code` in the body of the response; None if it has none.
        header: A header that the response has.
        before: Where the door is, if not in the main application.
        options: What it comes with.
    """

    door: str
    status: int
    close_code: int
    code: str | None
    header: str | None = None
    before: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "foreign origin": Case("open", 403, 4503, "permission_denied", options={"origin": "https://evil.example"}),
    "origin of a sandbox": Case("open", 403, 4503, "permission_denied", options={"origin": "null"}),
    "no token": Case("guarded", 401, 4501, "not_authenticated", "WWW-Authenticate"),
    "wrong token": Case("guarded", 401, 4501, "not_authenticated", "WWW-Authenticate", options={"token": "bad"}),
    "wrong token in the sub-protocol": Case(
        "guarded", 401, 4501, "not_authenticated", "WWW-Authenticate", options={"subprotocols": ["bearer", "bad.ann"]}
    ),
    "wrong token in the cookie": Case(
        "guarded", 401, 4501, "not_authenticated", "WWW-Authenticate", options={"headers": {"Cookie": "token=bad"}}
    ),
    "expired token": Case(
        "guarded", 401, 4501, "not_authenticated", "WWW-Authenticate", options={"token": "expired.ann"}
    ),
    "no token, without actions": Case("frames", 401, 4501, "not_authenticated", "WWW-Authenticate"),
    "no permission": Case("writers", 403, 4503, "permission_denied", options={"token": "good.ann"}),
    "path that isn't valid": Case("found/x", 422, 4500, None),
    "path that isn't found": Case("found/2", 404, 4504, None),
    "layer away": Case("open", 503, 1013, None, "Retry-After", before="/away"),
    "limits away": Case("one-for-user", 503, 1013, None, "Retry-After", "/uncounted", {"token": "good.ann"}),
    "throttles away": Case("few", 429, 4029, "throttled", "Retry-After", before="/uncounted"),
}


async def check_refusal(server: Server, mode: str, case: Case) -> None:
    """Check what one that is refused is told, and that none of its frames is handled."""
    async with come(server.port, f"{case.before}/{mode}/{case.door}", **case.options) as client:
        response = await client.answer()
        await client.send(*FRAMES)
        if mode == "http":
            check_response(response, case)
        else:
            assert response.status_code == 101
            # A browser hangs up on an answer that has none of those that it offers.
            assert client.subprotocol == next(iter(case.options.get("subprotocols", ())), None)
            assert (await client.ending()).code == case.close_code
    assert await server.handled(client.visit) == {}


def check_response(response: Response, case: Case) -> None:
    assert response.status_code == case.status
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.body)
    assert body.keys() >= ({"detail"} if case.code is None else {"detail", "code"})
    assert body.get("code") == case.code
    if case.header == "Retry-After":
        assert int(response.headers["Retry-After"]) > 0
    elif case.header is not None:
        assert response.headers[case.header] == "Bearer"


@pytest.mark.parametrize("mode", ["http", "close"])
async def test_refusals(server: Server, mode: str) -> None:
    """Each refusal is told by its status, body and headers, or by its close code, and no frame is handled."""
    for case in CASES.values():
        await check_refusal(server, mode, case)


@pytest.mark.parametrize("mode", ["http", "close"])
async def test_frames_with_the_handshake(server: Server, mode: str) -> None:
    """Who is refused has no frame handled that he sends with his handshake, or behind it."""
    for case in CASES.values():
        path = f"{case.before}/{mode}/{case.door}"
        async with come(server.port, path, frames=FRAMES, **case.options) as client:
            await client.send(*FRAMES)
            status = (await client.answer()).status_code
            assert status in ([case.status] if mode == "http" else [101]) + SERVERS_OWN.get(server.name, [])
        assert await server.handled(client.visit) == {}


@pytest.mark.parametrize("mode", ["http", "close"])
async def test_what_is_offered_is_answered(server: Server, mode: str) -> None:
    """Who is let in with a token in the sub-protocol is answered with `bearer`, and his frames are handled."""
    async with come(server.port, f"/{mode}/guarded", subprotocols=["bearer", "good.ann"]) as client:
        assert ((await client.answer()).status_code, client.subprotocol) == (101, "bearer")
        await client.send(ask("hello"))
        assert (await client.frame())["data"] == "hello"
    assert await server.handled(client.visit) == {"connect": 1, "frame": 1, "disconnect": 1}


LIMITS = ["one", "one-for-user", "one-for-address"]


@pytest.mark.parametrize("door", LIMITS)
async def test_limits_of_connections(server: Server, door: str) -> None:
    """Above a limit it is 429 and 4009, until a connection has ended."""
    token = f"good.{uuid4().hex}"
    async with come(server.port, f"/http/{door}", token=token) as first:
        assert (await first.answer()).status_code == 101
        case = Case(door, 429, 4009, "too_many_connections", "Retry-After", options={"token": token})
        await check_refusal(server, "http", case)
        await check_refusal(server, "close", case)
    assert (await server.handled(first.visit))["disconnect"] == 1
    async with come(server.port, f"/close/{door}", token=token) as next_one:
        await next_one.answer()
        await next_one.send(ask("hello"))
        assert (await next_one.frame())["data"] == "hello"
    await server.handled(next_one.visit)


async def test_throttles_of_connections(server: Server) -> None:
    """Above the rate of connections it is 429 and 4029; a forged address changes nothing."""
    door = {"door": uuid4().hex}
    async with come(server.port, "/http/few", query=door) as first:
        assert (await first.answer()).status_code == 101
    for headers in ({}, {"X-Forwarded-For": "203.0.113.9"}, {"Forwarded": "for=203.0.113.9"}):
        case = Case("few", 429, 4029, "throttled", "Retry-After", options={"headers": headers, "query": door})
        await check_refusal(server, "http", case)
        await check_refusal(server, "close", case)


@pytest.mark.parametrize("mode", ["http", "close"])
@pytest.mark.parametrize("door", ["guarded", "frames"])
async def test_frames_before_the_answer(server: Server, mode: str, door: str) -> None:
    """What comes while the gate is thinking is handled if it says yes, where the server keeps it; if no, never."""
    # hypercorn forgets to tell the application that the connection is over which it has ended by itself.
    for fate in ("bad",) if server.name in SERVERS_OWN else ("bad", "good"):
        async with come(server.port, f"/{mode}/{door}", token=f"slow-{fate}.ann") as client:
            _ = (await server.http.get(f"/visits/{client.visit}/at-gate")).raise_for_status()
            await client.send(*map(ask, "abc"))
            await server.tell(f"/visits/{client.visit}/go-on")
            status = (await client.answer()).status_code
            if server.name in SERVERS_OWN:
                assert status in SERVERS_OWN[server.name]
            elif fate == "good":
                assert status == 101
                await client.send(ask("d"))
                heard = [(await client.frame())["data"]]
                while heard[-1] != "d":
                    heard.append((await client.frame())["data"])
                assert heard == (list("abcd") if server.name in KEEPING else ["d"])
            elif mode == "close":
                assert (await client.ending()).code == 4501
            else:
                assert status == 401
        handled = await server.handled(client.visit)
        assert fate == "good" or handled == {}


# The log


async def logged(server: Server) -> str:
    """What the server has written up to now."""
    marker = uuid4().hex
    await server.tell(f"/visits/{marker}/go-on")
    await until(lambda: marker in server.process.output(), DEADLINE)
    return server.process.output()


async def test_the_log_of_a_foreign_origin(server: Server) -> None:
    """The log says which origin was refused, and names the setting that lets it in."""
    origin = f"https://{uuid4().hex}.example"
    await check_refusal(server, "http", Case("open", 403, 4503, "permission_denied", options={"origin": origin}))
    (line,) = [line for line in (await logged(server)).splitlines() if origin in line]
    assert "ALLOWED_ORIGINS" in line
    assert f"'127.0.0.1:{server.port}'" in line


async def test_no_token_in_the_log(server: Server) -> None:
    """A token is not in what the server writes, wherever it comes from and whatever becomes of it."""
    secret = uuid4().hex
    visits = []
    for fate, mode in product(("good", "bad", "expired", "soon"), ("http", "close")):
        token = f"{fate}.{secret}"
        ways: list[dict[str, Any]] = [
            {"token": token},
            {"headers": {"Cookie": f"a=b; token={token}"}},
            {"subprotocols": ["bearer", token]},
            {"query": {"token": token}},
            {"query": {"a": "b", "token": token, "c": "d"}},
        ]
        for way in ways:
            async with come(server.port, f"/{mode}/guarded", **way) as client:
                assert ((await client.answer()).status_code == 101) is (fate in ("good", "soon") or mode == "close")
            visits.append(client.visit)
    for visit in visits:
        await server.handled(visit)
    log = await logged(server)
    assert secret not in log
    if server.name != "hypercorn":  # whose log has no query
        assert all(visit in log for visit in visits)


# Behind a proxy


@dataclass(frozen=True)
class Proxy:
    """A reverse proxy: it asks for its server by that's own name, and tells who asked and for what.

    Attributes:
        port: Where it listens.
        upstream: Where its server does.
        client: The address of its clients, as it tells it: all of this machine would have the same.
    """

    port: int
    upstream: int
    client: str

    async def forward(self, near: SocketStream) -> None:
        """Serve one connection."""
        async with near, await anyio.connect_tcp("127.0.0.1", self.upstream) as far:
            head = b""
            while b"\r\n\r\n" not in head:
                head += await near.receive()
            await far.send(self._rewritten(head))
            async with anyio.create_task_group() as both:
                both.start_soon(_pump, near, far)
                both.start_soon(_pump, far, near)

    def _rewritten(self, head: bytes) -> bytes:
        request, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        hops = [hop for hop in (headers.get("x-forwarded-for"), self.client) if hop]
        headers["x-forwarded-for"] = ", ".join(hops)
        headers["x-forwarded-host"] = headers["host"]
        headers["host"] = f"127.0.0.1:{self.upstream}"
        told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{request}\r\n{told}\r\n".encode()


async def _pump(source: SocketStream, target: SocketStream) -> None:
    try:
        async for data in source:
            await target.send(data)
        await target.send_eof()
    except (OSError, anyio.BrokenResourceError):
        await target.aclose()


@asynccontextmanager
async def proxied(server: Server, *clients: str) -> AsyncIterator[Sequence[Proxy]]:
    """A proxy for clients of each of these addresses."""
    async with AsyncExitStack() as stack:
        listeners = [await anyio.create_tcp_listener(local_host="127.0.0.1") for _ in clients]
        for listener in listeners:
            stack.push_async_callback(listener.aclose)
        tasks = await stack.enter_async_context(anyio.create_task_group())
        proxies = []
        for client, listener in zip(clients, listeners, strict=True):
            port = listener.extra(SocketAttribute.local_port)
            proxies.append(Proxy(port, server.port, client))
            tasks.start_soon(listener.serve, proxies[-1].forward)
        yield proxies
        tasks.cancel_scope.cancel()


async def status_of(proxy: Proxy, path: str, **options: Any) -> int:
    async with come(proxy.port, path, **options) as client:
        return (await client.answer()).status_code


async def test_pages_behind_a_proxy(server: Server) -> None:
    """Behind a proxy that is in TRUSTED_PROXIES its own pages may connect and others may not; else none of them may."""
    async with proxied(server, "203.0.113.7") as (proxy,):
        page: dict[str, Any] = {"host": "chat.example.org", "origin": "https://chat.example.org"}
        assert await status_of(proxy, "/behind/http/open", **page) == 101
        assert await status_of(proxy, "/http/open", **page) == 403
        other = {**page, "origin": "https://evil.example"}
        assert await status_of(proxy, "/behind/http/open", **other) == 403
        assert await status_of(proxy, "/http/open", **other) == 403
        # Who comes past the proxy is not believed either.
        inner = {**other, "headers": {"X-Forwarded-Host": "evil.example"}}
        assert await status_of(proxy, "/behind/http/open", **inner) == 403
        assert await status_of(Proxy(server.port, 0, ""), "/http/open", **inner) == 403
        async with come(proxy.port, "/behind/close/open", **other) as client:
            assert (await client.ending()).code == 4503


async def test_addresses_behind_a_proxy(server: Server) -> None:
    """Behind a proxy that is in TRUSTED_PROXIES each client is counted, whatever it forges; else all are one."""
    async with proxied(server, "203.0.113.7", "203.0.113.8") as (one, two):
        forged = {"X-Forwarded-For": "203.0.113.9, 203.0.113.8"}
        door = {"door": uuid4().hex}
        assert await status_of(one, "/behind/http/few", query=door) == 101
        assert await status_of(one, "/behind/http/few", query=door, headers=forged) == 429
        assert await status_of(two, "/behind/http/few", query=door, headers=forged) == 101
        assert await status_of(two, "/behind/http/few", query=door) == 429
        assert await status_of(one, "/http/few", query=door) == 101
        assert await status_of(two, "/http/few", query=door) == 429
