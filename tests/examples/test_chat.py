"""The demo's server side, in-process."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from httpx import ASGITransport

from examples.chat.consumers import people
from examples.chat.main import app
from examples.chat.people import People
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


async def test_welcome() -> None:
    """Who comes is told the people of the room before anything else."""
    async with join("Ada") as ada:
        assert await ada.receive_json() == {"type": "chat.welcome", "room": "lobby", "name": "Ada", "people": ["Ada"]}
        async with join("Bob") as bob:
            [welcome] = await receive(bob, "chat.welcome")
            assert welcome["people"] == ["Ada", "Bob"]


async def test_coming_and_going() -> None:
    """The others of the room are told who comes and who goes, with the people who are there then."""
    async with join("Ada") as ada:
        await receive(ada, "chat.welcome")
        async with join("Bob"):
            assert await ada.receive_json() == {"type": "chat.joined", "name": "Bob", "people": ["Ada", "Bob"]}
        assert await ada.receive_json() == {"type": "chat.left", "name": "Bob", "people": ["Ada"]}


async def test_vanishing() -> None:
    """Somebody whose network is lost has left like anybody else."""
    async with join("Ada") as ada, join("Bob") as bob:
        await receive(ada, "chat.welcome", "chat.joined")
        await bob.vanish()
        await receive(ada, "chat.left")
    assert people.of("chat.lobby") == []


async def test_second_window() -> None:
    """A second window of the same person is nobody new, and closing it is nobody's leaving."""
    async with join("Ada") as ada, join("Bob") as bob:
        await receive(ada, "chat.welcome", "chat.joined")
        async with join("Bob") as window:
            [welcome] = await receive(window, "chat.welcome")
            assert welcome["people"] == ["Ada", "Bob"]
        await say(bob, "still here")
        await receive(ada, "chat.message")


async def test_saying() -> None:
    """What is said reaches everybody in the room, with its author and one time for all, which the reply has too."""
    async with join("Ada") as ada, join("Bob") as bob:
        await receive(ada, "chat.welcome", "chat.joined")
        await receive(bob, "chat.welcome")
        await say(ada, " Hello,\n<b>world</b> ")
        message, reply = await receive(ada, "chat.message", "response")
        assert (message["author"], message["text"]) == ("Ada", "Hello,\n<b>world</b>")
        assert (reply["status"], reply["data"]) == ("ok", {"at": message["at"]})
        assert await receive(bob, "chat.message") == [message]


@pytest.mark.parametrize("text", ["", " \n\t", "x" * 2001, 7, None])
async def test_unsayable(text: Any) -> None:
    """What is blank, too long or no text is refused, and nobody hears it."""
    async with join("Ada") as ada:
        await receive(ada, "chat.welcome")
        await say(ada, text)
        [reply] = await receive(ada, "response")
        assert (reply["status"], reply["errors"]["code"]) == ("bad", "invalid_data")
        await say(ada, "x" * 2000)
        await receive(ada, "chat.message", "response")


@pytest.mark.parametrize("name", ["", " ", "x" * 41])
async def test_unfit_name(name: str) -> None:
    """A name that is blank or too long is refused with a code that a browser can read, and nobody hears of it."""
    async with join("Ada") as ada:
        await receive(ada, "chat.welcome")
        async with join(name) as refused:
            code, _ = await refused.closed()
            assert (refused.accepted, code) == (True, 4500)
        await say(ada, "alone")
        await receive(ada, "chat.message")
        assert people.of("chat.lobby") == ["Ada"]


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
        await say(ada, "here")
        await receive(ada, "chat.message", "response")
        response = await client.post(f"/rooms/{quote(room, safe='')}/announce", json={"text": "here"})
        assert response.status_code == 202
        await receive(ada, "chat.announcement")
        await say(bob, "there")
        [message, _] = await receive(bob, "chat.message", "response")
        assert message["text"] == "there"


async def test_announcement() -> None:
    """An announcement over HTTP reaches everybody in the room, with the time that the response has."""
    async with join("Ada") as ada, join("Bob") as bob, http() as client:
        response = await client.post("/rooms/lobby/announce", json={"text": "closing time"})
        assert response.status_code == 202
        expected = {"type": "chat.announcement", "text": "closing time", "at": response.json()["at"]}
        await receive(ada, "chat.welcome", "chat.joined")
        await receive(bob, "chat.welcome")
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


def test_people() -> None:
    """Somebody is there from the first connection to the last, and nothing is left of an empty room."""
    people = People()
    assert [people.enter("a", "Bob"), people.enter("a", "Bob"), people.enter("a", "Ada")] == [True, False, True]
    assert (people.of("a"), people.of("b")) == (["Ada", "Bob"], [])
    assert [people.leave("a", "Bob"), people.leave("a", "Bob"), people.leave("a", "Ada")] == [False, True, True]
    assert people.of("a") == []
