"""The demo as people use it: a real server, and windows of a real Chromium."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlencode

import pytest
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, async_playwright, expect

from tests.examples.server import Server, StartServer

CHAT = "examples.chat.main:app"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HTML = "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"

#: The page's longest pause between two attempts is 30 s, and that after seven; a restart takes it two or three.
RECONNECT_MS = 60_000


@dataclass
class Window:
    """A browser window with the chat's page.

    Attributes:
        page: The page.
        network: What the console says of the network.
        problems: What else it complains of; nothing, if the page is right.
    """

    page: Page
    network: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def listen(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            is_network = message.text.startswith(("WebSocket connection to", "Failed to load resource"))
            (self.network if is_network else self.problems).append(message.text)

    @property
    def state(self) -> Locator:
        return self.page.locator("#state")

    def lines(self, kind: str) -> Locator:
        return self.page.locator(f"#messages li[data-kind={kind}]")

    async def join(self, server: Server, **query: str) -> None:
        """Come by a link that says who and where, and be let in."""
        await self.page.goto(f"{server.url}/?{urlencode({**query, 'join': '1'})}")
        await self.is_connected()

    async def join_elsewhere(self, server: Server, other: Window, **query: str) -> None:
        """Join, again and again, until that is on another process of the server."""
        for _ in range(100):
            await self.join(server, **query)
            if await self.process() != await other.process():
                return
        pytest.fail("all windows go to one process")

    async def process(self) -> int:
        """The server process that the page says it is connected to."""
        text = await self.page.locator("#process").inner_text()
        return int(text.removeprefix("server process "))

    async def is_connected(self, timeout: float = 10_000) -> None:
        await expect(self.state).to_have_text("Connected", timeout=timeout)

    async def sees_people(self, *names: str) -> None:
        await expect(self.page.locator("#people li")).to_have_text(list(names))

    async def say(self, text: str) -> None:
        """Say something, and see it confirmed."""
        await self.page.fill("#text", text)
        await self.page.press("#text", "Enter")
        await expect(self.lines("message").last).to_have_attribute("data-status", "sent")

    async def hears(self, author: str, text: str) -> None:
        """The last thing that was said, and who said it."""
        last = self.lines("message").last
        await expect(last.locator(".text")).to_have_text(text)
        await expect(last.locator(".author")).to_have_text(author)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A headless Chromium; without one the test is skipped, and fails where CI is set."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("this test needs Chromium or Chrome on PATH")
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=executable, args=FLAGS) as browser,
    ):
        yield browser


async def open_window(browser: Browser) -> Window:
    """Open a window with a profile of its own, and watch its console."""
    window = Window(await browser.new_page())
    window.page.on("console", window.listen)
    window.page.on("pageerror", lambda error: window.problems.append(str(error)))
    return window


@pytest.fixture
async def ada(browser: Browser) -> Window:
    return await open_window(browser)


@pytest.fixture
async def bob(browser: Browser) -> Window:
    return await open_window(browser)


async def test_two_windows(start_server: StartServer, ada: Window, bob: Window) -> None:
    """Two people in a room see each other, what either says, and an announcement; and that one of them leaves."""
    server = await start_server(CHAT)
    await ada.page.goto(server.url)
    await ada.page.fill("#room", "kitchen")
    await ada.page.fill("#name", "Ada")
    await ada.page.click("#join")
    await ada.is_connected()
    await ada.sees_people("Ada (you)")

    await bob.join(server, room="kitchen", name="Bob")
    await bob.sees_people("Ada", "Bob (you)")
    await ada.sees_people("Ada (you)", "Bob")
    await expect(ada.lines("joined")).to_have_text("Bob joined")

    await ada.say("Hello Bob,\nare you there?")
    await bob.hears("Ada", "Hello Bob,\nare you there?")
    await bob.say("I am.")
    await ada.hears("Bob", "I am.")

    await bob.page.fill("#announce-text", "Dinner is ready")
    await bob.page.click("#announce")
    await expect(bob.page.locator("#announce-result")).to_have_text("Accepted for everybody in kitchen.")
    for window in (ada, bob):
        await expect(window.lines("announcement").locator(".text")).to_have_text("Dinner is ready")

    await bob.page.click("#leave")
    await expect(bob.state).to_have_text("Left the room")
    await expect(ada.lines("left")).to_have_text("Bob left")
    await ada.sees_people("Ada (you)")
    assert ada.problems == bob.problems == ada.network == bob.network == []


async def test_two_processes(demo: Server, ada: Window, bob: Window) -> None:
    """Windows on two server processes are in one room; if one's process is killed it comes back on another."""
    await ada.join(demo, name="Ada")
    await bob.join_elsewhere(demo, ada, name="Bob")
    await ada.sees_people("Ada (you)", "Bob")
    await bob.sees_people("Ada", "Bob (you)")
    await ada.say("Hello Bob")
    await bob.hears("Ada", "Hello Bob")
    await bob.page.fill("#announce-text", "Dinner is ready")
    await bob.page.click("#announce")
    for window in (ada, bob):
        await expect(window.lines("announcement").locator(".text")).to_have_text("Dinner is ready")

    killed = await bob.process()
    os.kill(killed, signal.SIGKILL)
    await expect(bob.state).to_have_attribute("data-state", "reconnecting")
    await expect(bob.page.locator("#process")).to_be_empty()
    await bob.is_connected(RECONNECT_MS)
    assert await bob.process() != killed
    await bob.sees_people("Ada", "Bob (you)")
    await ada.sees_people("Ada (you)", "Bob")
    await bob.say("I am back")
    await ada.hears("Bob", "I am back")
    assert ada.problems == bob.problems == ada.network == []


async def test_second_window(start_server: StartServer, browser: Browser, ada: Window, bob: Window) -> None:
    """Somebody with two windows counts once, comes with the first and leaves with the last."""
    server = await start_server(CHAT)
    again = await open_window(browser)
    await ada.join(server, name="Ada")
    await bob.join(server, name="Bob")
    await again.join(server, name="Bob")
    await again.sees_people("Ada", "Bob (you)")
    await bob.page.click("#leave")
    await again.say("still here")
    await ada.hears("Bob", "still here")
    await ada.sees_people("Ada (you)", "Bob")
    await expect(ada.lines("joined")).to_have_text("Bob joined")
    await expect(ada.lines("left")).to_have_count(0)
    await again.page.click("#leave")
    await expect(ada.lines("left")).to_have_text("Bob left")
    await ada.sees_people("Ada (you)")
    assert ada.problems == bob.problems == again.problems == []


async def test_html_stays_text(start_server: StartServer, ada: Window, bob: Window) -> None:
    """What a user writes is shown as it was written, wherever it stands, and never becomes part of the page."""
    server = await start_server(CHAT)
    await ada.join(server, name="Ada")
    await bob.join(server, name=HTML[:40])
    await expect(ada.lines("joined")).to_have_text(f"{HTML[:40]} joined")
    await ada.sees_people(HTML[:40], "Ada (you)")
    await bob.say(HTML)
    await ada.hears(HTML[:40], HTML)
    await ada.page.fill("#announce-text", HTML)
    await ada.page.click("#announce")
    for window in (ada, bob):
        await expect(window.lines("announcement").locator(".text")).to_have_text(HTML)
        await expect(window.page.locator("main :is(img, b)")).to_have_count(0)
        await expect(window.page).to_have_title("lobby · chat")
    assert ada.problems == bob.problems == []


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
async def test_server_restarts(start_server: StartServer, ada: Window, bob: Window, by: signal.Signals) -> None:
    """When the server is stopped or killed the pages say so, come back to the next one by themselves, and go on."""
    server = await start_server(CHAT)
    await ada.join(server, name="Ada")
    await bob.join(server, name="Bob")
    await ada.say("before")
    await bob.hears("Ada", "before")
    await server.stop(by)
    for window in (ada, bob):
        await expect(window.state).to_have_attribute("data-state", "reconnecting")
        await expect(window.page.locator("#send")).to_be_disabled()
    await start_server(CHAT, server.port)
    for window in (ada, bob):
        await window.is_connected(RECONNECT_MS)
    await ada.sees_people("Ada (you)", "Bob")
    await bob.sees_people("Ada", "Bob (you)")
    await bob.say("after")
    await ada.hears("Bob", "after")
    await ada.say("again")
    await bob.hears("Ada", "again")
    await expect(ada.lines("message")).to_have_count(3)
    assert ada.problems == bob.problems == []


async def test_refused_name(start_server: StartServer, ada: Window) -> None:
    """A name that the server refuses is shown as refused, and another one is let in."""
    server = await start_server(CHAT)
    await ada.page.goto(f"{server.url}/?{urlencode({'name': 'x' * 41, 'join': '1'})}")
    await expect(ada.state).to_have_attribute("data-state", "refused")
    await expect(ada.state).to_contain_text("4500")
    await expect(ada.page.locator("#notices")).to_contain_text("The page won't try again by itself.")
    await ada.sees_people()
    await ada.page.fill("#name", "Ada")
    await ada.page.click("#join")
    await ada.is_connected()
    await ada.sees_people("Ada (you)")
    assert ada.problems == ada.network == []
