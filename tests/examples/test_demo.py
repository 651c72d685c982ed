"""The demo on several processes, as `scripts/demo` runs it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import psutil
import pytest
from anyio import to_thread
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from fastapi_channels.testing import RedisServer
from tests.examples.server import DEMO, Server, StartServer

ROOT = Path(__file__).parents[2]

#: How many seconds things have to happen.
TIMEOUT = 20.0


class Window:
    """A window in the lobby, without the browser.

    Attributes:
        id: Its channel.
        people: Who is in the room, by the id of each one's window; kept as the page does.
        process: The server process that it is connected to.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.id = ""
        self.people: dict[str, str] = {}
        self.process = 0
        self._connection = connection

    async def receive(self) -> dict[str, Any]:
        """The next frame."""
        frame: dict[str, Any] = json.loads(await self._connection.recv())
        if frame["type"] == "chat.left":
            self.people.pop(frame["id"], None)
        elif "id" in frame:
            self.people[frame["id"]] = frame["name"]
        return frame

    async def hears(self, kind: str) -> dict[str, Any]:
        """The next frame of this type."""
        with anyio.fail_after(TIMEOUT):
            while (frame := await self.receive())["type"] != kind:
                pass
        return frame

    async def sees(self, *windows: Window) -> None:
        """These and no others are in the room, now or as soon as it is told."""
        with anyio.fail_after(TIMEOUT):
            while self.people.keys() != {window.id for window in windows}:
                await self.receive()

    async def say(self, text: str) -> None:
        await self._connection.send(json.dumps({"action": "say", "data": {"text": text}}))

    async def is_cut_off(self) -> None:
        """The connection ends."""
        with pytest.raises(ConnectionClosed):
            await self.hears("nothing else")


@asynccontextmanager
async def join(server: Server, name: str, *, other_than: int = 0) -> AsyncIterator[Window]:
    """Join the lobby, on another process than that one; by trying, since which one it will be is a matter of chance."""
    url = f"{server.url.replace('http', 'ws')}/ws/chat/lobby?name={quote(name)}"
    deadline = anyio.current_time() + TIMEOUT
    while anyio.current_time() < deadline:
        async with connect(url, max_queue=None) as connection:  # it closes with frames unread, too
            window = Window(connection)
            welcome = await window.hears("chat.welcome")
            window.id, window.process = welcome["id"], welcome["process"]
            if window.process != other_than:
                yield window
                return
    pytest.fail("all connections go to one process")


async def run(*command: str | Path) -> tuple[int, str, str]:
    """Run a command; returns its exit code, its output, and what it has to complain of."""
    with anyio.fail_after(TIMEOUT):
        done = await anyio.run_process([str(part) for part in command], check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def broker(needs_broker: None) -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


async def test_two_processes(demo: Server) -> None:
    """People on different processes see each other, hear what either says and what is announced, and who leaves."""
    async with join(demo, "Ada") as ada, httpx.AsyncClient(base_url=demo.url, headers={"Connection": "close"}) as http:
        async with join(demo, "Bob", other_than=ada.process) as bob:
            await ada.sees(ada, bob)
            await bob.sees(ada, bob)
            assert list(ada.people.values()) == ["Ada", "Bob"]
            for speaker, author, text in [(ada, "Ada", "Hello Bob"), (bob, "Bob", "Hello Ada")]:
                await speaker.say(text)
                for window in (ada, bob):
                    message = await window.hears("chat.message")
                    assert (message["author"], message["text"]) == (author, text)
            for text in ("Dinner", "is", "ready"):  # whichever process takes each request
                response = await http.post("/rooms/lobby/announce", json={"text": text})
                expected = {"type": "chat.announcement", "text": text, "at": response.json()["at"]}
                assert await ada.hears("chat.announcement") == await bob.hears("chat.announcement") == expected
        await ada.sees(ada)


async def test_all_come_at_once(demo: Server) -> None:
    """Everybody sees everybody, also if all come at the same time."""
    windows: list[Window] = []
    have_come, have_seen = anyio.Event(), anyio.Event()
    seeing = set()

    async def come(name: str, other_than: int) -> None:
        async with join(demo, name, other_than=other_than) as window:
            windows.append(window)
            if len(windows) == 20:
                have_come.set()
            await have_come.wait()
            await window.sees(*windows)
            seeing.add(name)
            if len(seeing) == 19:
                have_seen.set()
            await have_seen.wait()  # who leaves is seen no more

    async with join(demo, "Ada") as ada:
        windows.append(ada)
        async with anyio.create_task_group() as guests:
            for number in range(19):  # one process may take all who come at the same time: every other one insists
                guests.start_soon(come, f"Guest {number}", ada.process if number % 2 else 0)
        assert len({window.process for window in windows}) == 2


async def test_killed_process(demo: Server) -> None:
    """The people of a process that was killed are cut off and can come back; who comes then sees who is really here."""
    async with join(demo, "Ada") as ada:
        async with join(demo, "Bob", other_than=ada.process) as bob:
            await ada.sees(ada, bob)
            os.kill(bob.process, signal.SIGKILL)
            await bob.is_cut_off()
        async with join(demo, "Cleo") as cleo:
            await cleo.sees(ada, cleo)
            await ada.sees(ada, bob, cleo)  # nobody tells her of Bob: the gap that presence is for
            async with join(demo, "Bob", other_than=ada.process) as bob:
                await bob.sees(ada, cleo, bob)
                await bob.say("I am back")
                assert (await ada.hears("chat.message"))["text"] == "I am back"


@pytest.mark.parametrize(
    ("by", "group"),
    [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)],
    ids=["SIGTERM", "Ctrl-C", "closed terminal"],
)
async def test_end(demo: Server, by: signal.Signals, group: bool) -> None:
    """The demo ends in peace, and leaves no process behind."""
    processes = psutil.Process(demo.pid).children(recursive=True)
    assert {process.name() for process in processes} & {"redis-server", "valkey-server"}
    async with join(demo, "Ada") as ada:
        assert ada.process in [process.pid for process in processes]
        await demo.stop(by, group=group)
        await ada.is_cut_off()
    assert demo.returncode == 0
    _, remaining = await to_thread.run_sync(psutil.wait_procs, processes, TIMEOUT)
    assert remaining == []
    assert "Traceback" not in "\n".join(demo.log)


async def test_killed_demo(demo: Server) -> None:
    """Even if the demo is killed its broker ends."""
    children = psutil.Process(demo.pid).children(recursive=True)
    brokers = [process for process in children if process.name() in ("redis-server", "valkey-server")]
    await demo.stop(signal.SIGKILL, group=True)
    _, remaining = await to_thread.run_sync(psutil.wait_procs, brokers, TIMEOUT)
    assert (len(brokers), remaining) == (1, [])


async def test_redis(broker: RedisServer, start_server: StartServer) -> None:
    """Demos with the same --redis hear each other, and start no broker of their own."""
    one, other = [await start_server(DEMO, 0, "--redis", broker.url) for _ in range(2)]
    assert psutil.Process(one.pid).children() == psutil.Process(other.pid).children() == []
    async with join(one, "Ada") as ada, join(other, "Bob") as bob:
        await ada.sees(ada, bob)
        await bob.sees(ada, bob)
        await bob.say("Hello Ada")
        assert (await ada.hears("chat.message"))["text"] == "Hello Ada"


async def test_one_process(start_server: StartServer) -> None:
    """One process needs no broker, and starts none."""
    server = await start_server(DEMO)
    assert psutil.Process(server.pid).children() == []
    async with join(server, "Ada") as ada, join(server, "Bob") as bob:
        assert ada.process == bob.process == server.pid
        await ada.sees(ada, bob)
        await bob.sees(ada, bob)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--workers 0", "--workers"),
        ("--workers many", "--workers"),
        ("--redis nonsense", "not a Redis URL"),
        ("--redis memory://", "not a Redis URL"),
        ("--reload --workers 2", "--reload"),
        ("--port x", "--port"),
        ("--unknown", "--unknown"),
        ("8080", "8080"),
    ],
)
async def test_wrong_usage(options: str, complaint: str) -> None:
    """What is wrong with the options is said in one line, and nothing is started."""
    code, output, complaints = await run(sys.executable, "-m", DEMO, *options.split())
    assert (code, output, complaints.count("\n")) == (2, "", 1)
    assert complaint in complaints


async def test_no_redis() -> None:
    """If nobody is at the URL that is said in one line, without the password."""
    code, output, complaints = await run(sys.executable, "-m", DEMO, "--redis", "redis://:secret@127.0.0.1:1/0")
    assert (code, output, complaints.count("\n")) == (1, "", 1)
    assert "127.0.0.1:1/0" in complaints
    assert "secret" not in complaints


async def test_help() -> None:
    """The script tells its options at once, without making an environment first."""
    code, output, complaints = await run(ROOT / "scripts" / "demo", "--port", "8080", "--help")
    assert (code, complaints) == (0, "")
    assert output.startswith("scripts/demo [--workers N] [--redis URL]")
