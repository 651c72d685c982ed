"""The demo's server side, in-process."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from httpx import ASGITransport

from examples.chat.main import app
from fastapi_channels.testing import WebSocketSession, connect

AWKWARD = ["lobby", "Größe 中文 🎉", "a\nb", "{}", "a.b?c#d%2F", "x" * 40]


def join(name: str, room: str = "lobby") -> AbstractAsyncContextManager[WebSocketSession]:
    return connect(app, f"/ws/chat/{quote(room, safe='')}?name={quote(name)}")


def http() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=ASGITransport(app=app), base_url="http://testserver")


async def say(session: WebSocketSession, text: Any) -> None:
    await session.send_json({"action": "say", "request_id": 1, "data": {"text": text}})


async def receive(session: WebSocketSession, *types: str) -> list[dict[str, Any]]:
    """The next frames, which have these types."""
    frames = [await session.receive_json() for _ in types]
    assert [frame["type"] for frame in frames] == list(types)
    return frames


async def hear_oneself(session: WebSocketSession, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Say something; returns the message and the reply, which come in either order."""
    await say(session, text)
    frames = [await session.receive_json(), await session.receive_json()]
    message, reply = sorted(frames, key=lambda frame: str(frame["type"]))
    assert (message["type"], reply["type"], reply["status"]) == ("chat.message", "response", "ok")
    return message, reply


async def meet(ada: WebSocketSession, bob: WebSocketSession) -> None:
    """Both have joined, Ada first, and know of each other."""
    await receive(ada, "chat.welcome", "chat.joined")
    await receive(bob, "chat.welcome", "chat.here")


async def test_welcome() -> None:
    """Who comes is told what he is called, and which process serves him, before anything else."""
    async with join(" Ada ") as ada:
        [welcome] = await receive(ada, "chat.welcome")
        assert welcome.pop("id")
        assert welcome == {"type": "chat.welcome", "room": "lobby", "name": "Ada", "process": os.getpid()}


async def test_coming_and_going() -> None:
    """The others of the room are told who comes and who goes, and the newcomer is told of each of them."""
    async with join("Ada") as ada:
        [me] = await receive(ada, "chat.welcome")
        async with join("Bob") as bob:
            [welcome] = await receive(bob, "chat.welcome")
            assert await ada.receive_json() == {"type": "chat.joined", "name": "Bob", "id": welcome["id"]}
            assert await bob.receive_json() == {"type": "chat.here", "name": "Ada", "id": me["id"]}
        assert await ada.receive_json() == {"type": "chat.left", "name": "Bob", "id": welcome["id"]}
        await hear_oneself(ada, "alone")  # and nothing of her own coming


async def test_vanishing() -> None:
    """Somebody whose network is lost has left like anybody else."""
    async with join("Ada") as ada, join("Bob") as bob:
        await meet(ada, bob)
        await bob.vanish()
        await receive(ada, "chat.left")


async def test_second_window() -> None:
    """Each window of a person comes and goes with an id of its own."""
    async with join("Ada") as ada, join("Bob") as bob:
        await receive(ada, "chat.welcome")
        [first] = await receive(ada, "chat.joined")
        async with join("Bob") as window:
            [second] = await receive(ada, "chat.joined")
            assert (first["name"], second["name"]) == ("Bob", "Bob")
            here = await receive(window, "chat.welcome", "chat.here", "chat.here")
            assert {frame["id"] for frame in here} >= {first["id"], second["id"]}
        [left] = await receive(ada, "chat.left")
        assert left["id"] == second["id"] != first["id"]
        await say(bob, "still here")
        await receive(ada, "chat.message")


async def test_saying() -> None:
    """What is said reaches everybody in the room, with its author and one time for all, which the reply has too."""
    async with join("Ada") as ada, join("Bob") as bob:
        await meet(ada, bob)
        message, reply = await hear_oneself(ada, " Hello,\n<b>world</b> ")
        assert (message["author"], message["text"]) == ("Ada", "Hello,\n<b>world</b>")
        assert reply["data"] == {"at": message["at"]}
        assert await receive(bob, "chat.message") == [message]


@pytest.mark.parametrize("text", ["", " \n\t", "x" * 2001, 7, None])
async def test_unsayable(text: Any) -> None:
    """What is blank, too long or no text is refused, and nobody hears it."""
    async with join("Ada") as ada:
        await receive(ada, "chat.welcome")
        await say(ada, text)
        [reply] = await receive(ada, "response")
        assert (reply["status"], reply["errors"]["code"]) == ("bad", "invalid_data")
        await hear_oneself(ada, "x" * 2000)


@pytest.mark.parametrize("name", ["", " ", "x" * 41])
async def test_unfit_name(name: str) -> None:
    """A name that is blank or too long is refused with a code that a browser can read, and nobody hears of it."""
    async with join("Ada") as ada:
        await receive(ada, "chat.welcome")
        async with join(name) as refused:
            code, _ = await refused.closed()
            assert (refused.accepted, code) == (True, 4500)
        await hear_oneself(ada, "alone")


async def test_no_name_and_unfit_room() -> None:
    """No name, and a room's name that is too long, are refused in the same way."""
    for path in ("/ws/chat/lobby", f"/ws/chat/{'x' * 41}?name=Ada"):
        async with connect(app, path) as refused:
            code, _ = await refused.closed()
            assert code == 4500


@pytest.mark.parametrize("room", AWKWARD)
async def test_rooms(room: str) -> None:
    """A room may be called anything; what is said or announced stays in it."""
    async with join("Ada", room) as ada, join("Bob", "elsewhere") as bob, http() as client:
        await receive(ada, "chat.welcome")
        await receive(bob, "chat.welcome")
        await hear_oneself(ada, "here")
        response = await client.post(f"/rooms/{quote(room, safe='')}/announce", json={"text": "here"})
        assert response.status_code == 202
        await receive(ada, "chat.announcement")
        message, _ = await hear_oneself(bob, "there")
        assert message["text"] == "there"


async def test_announcement() -> None:
    """An announcement over HTTP reaches everybody in the room, with the time that the response has."""
    async with join("Ada") as ada, join("Bob") as bob, http() as client:
        await meet(ada, bob)
        response = await client.post("/rooms/lobby/announce", json={"text": "closing time"})
        assert response.status_code == 202
        expected = {"type": "chat.announcement", "text": "closing time", "at": response.json()["at"]}
        assert await ada.receive_json() == await bob.receive_json() == expected


@pytest.mark.parametrize("body", [{}, {"text": " "}, {"text": "x" * 2001}, ["text"]])
async def test_unfit_announcement(body: Any) -> None:
    """An announcement that is blank, too long or none at all is refused with 422."""
    async with join("Ada"), http() as client:
        response = await client.post("/rooms/lobby/announce", json=body)
        assert response.status_code == 422


async def test_announcing_to_nobody() -> None:
    """An announcement for a room with nobody in it is accepted as well."""
    async with http() as client:
        response = await client.post("/rooms/empty/announce", json={"text": "is anybody there?"})
        assert response.status_code == 202


async def test_page() -> None:
    """The root of the site is the page."""
    async with http() as client:
        response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "<title>Chat" in response.text


def test_url() -> None:
    """The route of the chat is found by its name."""
    assert app.url_path_for("chat", room="lobby") == "/ws/chat/lobby"
