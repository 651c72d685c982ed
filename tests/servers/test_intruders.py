"""Each kind of intruder on real servers: what it gets, and that nothing of its is handled; the table in the docs.

With the environment variable UPDATE_DOCS set, what is found is written into the docs; otherwise they are compared.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.servers.client import Client, Server, ask, come
from tests.servers.conftest import UVICORNS

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
SECTION = re.compile(r"(?<=<!-- intruders -->\n).*?(?=<!-- /intruders -->)", re.DOTALL)
HEAD = ["intruder", "HTTP status", 'close code (`reject_mode = "close"`)', "frames handled"]

#: What intruders send with their handshakes, and again when they can.
FRAMES = [ask("one"), ask("two"), ask("three")]

#: Many more than are refused before a connection is closed.
FLOOD = [ask(f"{number}") for number in range(200)]


@dataclass(frozen=True)
class Outcome:
    """What became of an intruder.

    Attributes:
        status: What its handshake was answered with.
        code: What its connection was closed with, if it was accepted.
        handled: How many of its frames were handled that should not have been.
    """

    status: int
    code: int | None
    handled: int


Intruder = Callable[[Server, str], Awaitable[Outcome]]

INTRUDERS: dict[str, Intruder] = {}


def intruder(name: str) -> Callable[[Intruder], Intruder]:
    """Give an intruder its name in the table."""

    def add(intrude: Intruder) -> Intruder:
        INTRUDERS[name] = intrude
        return intrude

    return add


async def refused(server: Server, path: str, frames: Sequence[str] = FRAMES, **options: Any) -> Outcome:
    """One that is to be refused, and that sends frames with its handshake, behind it, and once it is answered."""
    async with come(server.port, path, frames=frames, **options) as client:
        await client.send(*frames)
        status = (await client.answer()).status_code
        await client.send(*frames)
        code = (await client.ending()).code if status == 101 else None
    seen = await server.handled(client.visit)
    assert "connect" not in seen
    return Outcome(status, code, seen.get("frame", 0))


async def closed(server: Server, client: Client, due: int) -> Outcome:
    """One that was let in, of which so many frames were due to be handled, and that speaks to the end and beyond."""
    code = (await client.ending()).code
    await client.send(*FRAMES)
    await client.leave()
    status = (await client.answer()).status_code
    return Outcome(status, code, (await server.handled(client.visit)).get("frame", 0) - due)


async def talk(client: Client) -> int:
    """Say a few things and hear them back; returns how many."""
    assert (await client.answer()).status_code == 101
    await client.send(*FRAMES)
    heard = [(await client.frame())["data"] for _ in FRAMES]
    assert heard == ["one", "two", "three"]
    return len(heard)


def token_of_somebody(fate: str = "good") -> str:
    return f"{fate}.{uuid4().hex}"


@intruder("without a token")
async def _(server: Server, mode: str) -> Outcome:
    return await refused(server, f"/{mode}/guarded")


@intruder("with a wrong token")
async def _(server: Server, mode: str) -> Outcome:
    return await refused(server, f"/{mode}/guarded", token="wrong")


@intruder("with an expired token")
async def _(server: Server, mode: str) -> Outcome:
    return await refused(server, f"/{mode}/guarded", token=token_of_somebody("expired"))


@intruder("with a token that permits something else")
async def _(server: Server, mode: str) -> Outcome:
    return await refused(server, f"/{mode}/writers", token=token_of_somebody())


@intruder("a page of a foreign origin, with a good token")
async def _(server: Server, mode: str) -> Outcome:
    return await refused(server, f"/{mode}/guarded", token=token_of_somebody(), origin="https://evil.example")


@intruder("above the limit of connections")
async def _(server: Server, mode: str) -> Outcome:
    token = token_of_somebody()
    async with come(server.port, f"/{mode}/one-for-user", token=token) as first:
        await talk(first)
        return await refused(server, f"/{mode}/one-for-user", token=token)


@intruder("above the rate of new connections")
async def _(server: Server, mode: str) -> Outcome:
    door = {"door": uuid4().hex}
    async with come(server.port, f"/{mode}/few", query=door) as first:
        await talk(first)
    return await refused(server, f"/{mode}/few", query=door)


@intruder("above the rate of new connections, with a forged `X-Forwarded-For`")
async def _(server: Server, mode: str) -> Outcome:
    door = {"door": uuid4().hex}
    async with come(server.port, f"/{mode}/few", query=door) as first:
        await talk(first)
    return await refused(server, f"/{mode}/few", query=door, headers={"X-Forwarded-For": "203.0.113.9"})


@intruder("that sends frames before its handshake is answered")
async def _(server: Server, mode: str) -> Outcome:
    async with come(server.port, f"/{mode}/guarded", token=token_of_somebody("slow-wrong")) as client:
        _ = (await server.http.get(f"/visits/{client.visit}/at-gate")).raise_for_status()
        await client.send(*FRAMES)
        await server.tell(f"/visits/{client.visit}/go-on")
        status = (await client.answer()).status_code
        code = (await client.ending()).code if status == 101 else None
    return Outcome(status, code, len(await server.handled(client.visit)))


@intruder("banned in mid-connection")
async def _(server: Server, mode: str) -> Outcome:
    token = token_of_somebody()
    async with come(server.port, f"/{mode}/guarded", token=token) as client:
        due = await talk(client)
        await server.tell(f"/users/{token.partition('.')[2]}/disconnect")
        await client.send(*FRAMES)
        return await closed(server, client, due)


@intruder("whose token expires in mid-connection")
async def _(server: Server, mode: str) -> Outcome:
    async with come(server.port, f"/{mode}/guarded", token=token_of_somebody("soon")) as client:
        await client.answer()
        assert (await client.frame())["type"] == "auth.expiring"
        return await closed(server, client, await talk(client))


@intruder("above the rate of frames")
async def _(server: Server, mode: str) -> Outcome:
    async with come(server.port, f"/{mode}/rated", token=token_of_somebody()) as client:
        due = await talk(client)
        await client.send(*FLOOD)
        return await closed(server, client, due)


@intruder("with a flood of frames, above `MAX_FRAMES_PER_SECOND`")
async def _(server: Server, mode: str) -> Outcome:
    return await _flood(server, f"/{mode}/paced")


@intruder("with a flood of bytes, above `MAX_BYTES_PER_SECOND`")
async def _(server: Server, mode: str) -> Outcome:
    return await _flood(server, f"/{mode}/paced-bytes")


async def _flood(server: Server, path: str) -> Outcome:
    async with come(server.port, path, token=token_of_somebody()) as client:
        await client.answer()
        await client.send(FLOOD[0])
        assert (await client.frame())["data"] == "0"
        await client.send(*FLOOD[1:])
        return await closed(server, client, due=1)


@intruder("that says nothing for `FIRST_FRAME_TIMEOUT`")
async def _(server: Server, mode: str) -> Outcome:
    async with come(server.port, f"/{mode}/talkative", token=token_of_somebody()) as client:
        await client.answer()
        return await closed(server, client, due=0)


def table(found: dict[str, tuple[Outcome, Outcome]]) -> str:
    """What became of each, in Markdown."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for name, (by_status, by_code) in found.items():
        was_let_in = by_status.code is not None
        status = "let in" if was_let_in else f"{by_status.status}"
        assert by_code.status == 101
        assert not was_let_in or by_status == by_code
        rows.append([name, status, f"{by_code.code}", f"{by_status.handled + by_code.handled}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@pytest.mark.parametrize("server", UVICORNS, indirect=True)
async def test_intruders(server: Server) -> None:
    """Every intruder gets what the docs say, and no frame of any is handled."""

    async def both(intrude: Intruder) -> tuple[Outcome, Outcome]:
        by_status, by_code = await asyncio.gather(intrude(server, "http"), intrude(server, "close"))
        return by_status, by_code

    outcomes = await asyncio.gather(*map(both, INTRUDERS.values()))
    found = dict(zip(INTRUDERS, outcomes, strict=True))
    for name, (by_status, by_code) in found.items():
        assert (name, by_status.handled, by_code.handled) == (name, 0, 0)
    page = PAGE.read_text()
    (section,) = SECTION.findall(page)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(SECTION.sub(lambda _: table(found), page))
    else:
        assert section == table(found), "run this with UPDATE_DOCS=1"
