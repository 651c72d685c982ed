"""The inbox behind `receive(channel)`."""

import asyncio

import pytest

from fastapi_channels.layers import Counters, Envelope
from fastapi_channels.layers.inbox import Inbox
from tests.conftest import Forward


def envelope(number: int, expires: float = float("inf")) -> Envelope:
    return Envelope.of({"type": "x", "number": number}, expires)


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def inbox(counters: Counters) -> Inbox:
    return Inbox(3, counters)


async def test_first_in_first_out(inbox: Inbox) -> None:
    """Messages come out in the order in which they went in."""
    sent = [envelope(number) for number in range(3)]
    assert all(inbox.deliver(one) for one in sent)
    assert [await inbox.receive() for _ in range(3)] == sent


async def test_capacity(inbox: Inbox) -> None:
    """A full inbox takes nothing, and keeps what it has."""
    sent = [envelope(number) for number in range(3)]
    assert all(inbox.deliver(one) for one in sent)
    assert not inbox.deliver(envelope(3))
    assert await inbox.receive() is sent[0]
    assert inbox.deliver(envelope(4))
    assert not inbox.deliver(envelope(5))


async def test_expired_messages_are_counted_and_make_room(inbox: Inbox, counters: Counters, forward: Forward) -> None:
    """What is too old is dropped, counted, and does not stand in the way of what is new."""
    soon = asyncio.get_running_loop().time() + 60
    assert all(inbox.deliver(envelope(number, soon)) for number in range(3))
    assert not inbox.is_idle
    forward(59)
    assert not inbox.deliver(envelope(3))
    forward(1)
    assert inbox.is_idle
    assert inbox.deliver(last := envelope(4))
    assert await inbox.receive() is last
    assert counters == Counters(expired=3)


async def test_an_inbox_that_is_read_is_not_idle(inbox: Inbox) -> None:
    """An inbox is idle while it is empty and nobody waits for it."""
    assert inbox.is_idle
    reading = asyncio.create_task(inbox.receive())
    await asyncio.sleep(0)
    assert not inbox.is_idle
    reading.cancel()
    await asyncio.wait({reading})
    assert inbox.is_idle
    inbox.deliver(envelope(1))
    assert not inbox.is_idle


async def test_readers_get_their_turn(inbox: Inbox) -> None:
    """Of several readers the one that has waited longest is served first."""
    readers = [asyncio.create_task(inbox.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    sent = [envelope(number) for number in range(3)]
    for one in sent:
        inbox.deliver(one)
    assert await asyncio.gather(*readers) == sent


async def test_a_reader_that_is_woken_and_cancelled_passes_it_on(inbox: Inbox) -> None:
    """A reader that is cancelled after a message has woken it leaves the message to the next one."""
    first, second = asyncio.create_task(inbox.receive()), asyncio.create_task(inbox.receive())
    await asyncio.sleep(0)
    inbox.deliver(one := envelope(1))
    first.cancel()
    assert await second is one
    assert first.cancelled()


async def test_a_reader_whose_message_was_taken_goes_on_waiting(inbox: Inbox) -> None:
    """A reader that was woken, but finds its message taken by a quicker one, waits for the next."""
    waiting = asyncio.create_task(inbox.receive())
    await asyncio.sleep(0)
    inbox.deliver(one := envelope(1))
    assert await inbox.receive() is one
    inbox.deliver(two := envelope(2))
    assert await waiting is two


async def test_many_cancelled_readers_leave_nothing_behind(inbox: Inbox) -> None:
    """Readers that gave up are forgotten, also where a message has come for one of them."""
    readers = [asyncio.create_task(inbox.receive()) for _ in range(100)]
    await asyncio.sleep(0)
    inbox.deliver(one := envelope(1))
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    assert await inbox.receive() is one
    assert inbox.is_idle
