"""`LayerContract`: the tests that every channel layer passes, ours and those of others."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from fastapi_channels.layers import (
    ChannelFull,
    ChannelLayer,
    InvalidGroupName,
    InvalidMessage,
    LayerUnavailable,
    Receipt,
)

__all__ = ["LayerContract"]

#: Names that are easily taken for one another, or that mean something to a broker, a URL or a shell.
AWKWARD_NAMES = [
    "room",
    "Room",
    "ROOM",
    "room ",
    " room",
    "room.1",
    "room:1",
    "room*",
    "roo?",
    "[r]oom",
    "room/../1",
    "room%20",
    "'room'",
    '"room"',
    "room\\",
    "$room",
    "room!x",
    "café",
    "cafe\u0301",
    "日本語",
    "🎉",
    "x" * 200,
    "x" * 199,
    "🎉" * 200,
]

NOT_NAMES = {
    "empty": "",
    "201 characters": "x" * 201,
    "10,000 characters": "x" * 10_000,
    "a newline": "a\nb",
    "a newline at its end": "room\n",
    "NUL": "a\x00b",
    "DEL": "a\x7fb",
    "C1": "a\x85b",
    "an opening brace": "a{b",
    "a closing brace": "a}b",
    "a lone surrogate": "a\ud800b",
    "None": None,
    "bytes": b"room",
    "a number": 7,
}

NOT_MESSAGES = {
    "no type": {"text": "x"},
    "type None": {"type": None},
    "an empty type": {"type": ""},
    "a type that is no string": {"type": 1},
    "a list": ["type"],
    "a string": "chat.message",
    "None": None,
    "an object in it": {"type": "x", "value": object()},
    "a function in it": {"type": "x", "value": {"deep": [print]}},
    "bytes that are no text": {"type": "x", "value": b"\xff"},
    "a lone surrogate in it": {"type": "x", "value": "\ud800"},
}


class Announcement(BaseModel):
    """A message as a model."""

    type: Literal["chat.announcement"] = "chat.announcement"
    id: uuid.UUID
    at: datetime.datetime
    tags: list[str] = []


@pytest.mark.anyio
class LayerContract:
    """What a channel layer has to do; subclass it, and give it yours with a fixture `layer`.

    ```python
    class TestMyLayer(LayerContract):
        @pytest.fixture
        async def layer(self) -> AsyncIterator[ChannelLayer]:
            async with MyLayer("my://localhost", capacity=20) as layer:
                yield layer
    ```

    Each test gets a layer of its own: open, with nothing in it, closed after the test. Its capacity is at least 20; a
    small one makes the tests of it quick. Its expiry is long; the tests of it set the attribute. Nothing is expected to
    have arrived when a send returns, only within `timeout`.

    Spec:
        The Channels layer specification.
    """

    #: Within how many seconds a message arrives.
    timeout: float = 5.0

    @pytest.fixture(scope="session")
    @classmethod
    def anyio_backend(cls) -> str:
        """Layers run on asyncio."""
        return "asyncio"

    @pytest.fixture
    def layer(self) -> ChannelLayer:
        """The layer under test, open and empty; a subclass has to give it."""
        pytest.fail(f"{type(self).__name__} needs a fixture `layer`: the layer that LayerContract is to test")

    # What the tests have in common

    async def receive(self, layer: ChannelLayer, channel: str) -> dict[str, Any]:
        """The next message of a channel; fails if none comes in time."""
        async with asyncio.timeout(self.timeout):
            return await layer.receive(channel)

    async def member(self, layer: ChannelLayer, *groups: str) -> str:
        """A new channel that is in these groups."""
        channel = await layer.new_channel()
        for group in groups:
            await layer.group_add(group, channel)
        return channel

    async def nothing_came(self, layer: ChannelLayer, channel: str) -> None:
        """Fail if a message waits in a channel; whatever might have come has to be known to be there."""
        await layer.send(channel, {"type": "marker"})
        assert await self.receive(layer, channel) == {"type": "marker"}

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Call a function in another thread, as a plain `def` view is."""
        async with asyncio.timeout(self.timeout):
            return await asyncio.to_thread(function)

    # Channels

    async def test_new_channels_have_names_of_their_own(self, layer: ChannelLayer) -> None:
        """Each new channel has another name, which begins with the prefix and marks it as this process's."""
        names = [await layer.new_channel("chat") for _ in range(100)]
        assert len(set(names)) == 100
        assert all(name.startswith("chat.") and "!" in name for name in names)
        assert (await layer.new_channel()).startswith("specific.")

    async def test_send_and_receive(self, layer: ChannelLayer) -> None:
        """What is sent to a channel is received from it, whole."""
        channel = await layer.new_channel()
        message = {"type": "chat.message", "text": "日本語 🎉\x00", "nested": {"list": [1, 2.5, None, True, {"": []}]}}
        await layer.send(channel, message)
        assert await self.receive(layer, channel) == message

    async def test_a_message_waits_for_its_reader(self, layer: ChannelLayer) -> None:
        """A reader that came first and one that comes later get the message alike."""
        early, late = await layer.new_channel(), await layer.new_channel()
        reading = asyncio.create_task(self.receive(layer, early))
        await asyncio.sleep(0)
        for channel in (early, late):
            await layer.send(channel, {"type": "x"})
        assert await reading == await self.receive(layer, late) == {"type": "x"}

    async def test_first_in_first_out(self, layer: ChannelLayer) -> None:
        """Messages are received in the order in which they were sent."""
        channel = await layer.new_channel()
        for number in range(20):
            await layer.send(channel, {"type": "x", "number": number})
        assert [(await self.receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    async def test_unawaited_sends_keep_their_order(self, layer: ChannelLayer) -> None:
        """Sends to one channel that were begun one after another arrive in that order, awaited or not."""
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.send(channel, {"type": "x", "number": number}) for number in range(20)))
        assert [(await self.receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    async def test_channels_do_not_hear_each_other(self, layer: ChannelLayer) -> None:
        """A message to one channel reaches no other, also while both are read."""
        channels = [await layer.new_channel() for _ in range(5)]
        reading = [asyncio.create_task(self.receive(layer, channel)) for channel in channels]
        await asyncio.sleep(0)
        for number, channel in reversed(list(enumerate(channels))):
            await layer.send(channel, {"type": "x", "number": number})
        assert [message["number"] for message in await asyncio.gather(*reading)] == [0, 1, 2, 3, 4]
        for channel in channels:
            await self.nothing_came(layer, channel)

    async def test_each_message_to_one_reader(self, layer: ChannelLayer) -> None:
        """Several readers of one channel share its messages, each of which goes to one of them."""
        channel = await layer.new_channel()
        await self.shared_by_readers(layer, channel)

    async def shared_by_readers(self, layer: ChannelLayer, channel: str) -> None:
        """Send to a channel that has several readers, some before and some after."""
        reading = [asyncio.create_task(self.receive(layer, channel)) for _ in range(5)]
        await asyncio.sleep(0)
        for number in range(10):
            await layer.send(channel, {"type": "x", "number": number})
        reading += [asyncio.create_task(self.receive(layer, channel)) for _ in range(5)]
        numbers = [message["number"] for message in await asyncio.gather(*reading)]
        assert sorted(numbers) == list(range(10))
        await layer.send(channel, {"type": "marker"})
        assert await self.receive(layer, channel) == {"type": "marker"}

    async def test_a_cancelled_receive_loses_nothing(self, layer: ChannelLayer) -> None:
        """A receive that is cancelled, while it waits or when its message has just come, takes no message with it."""
        channel = await layer.new_channel()
        await self.survives_cancelled_readers(layer, channel)

    async def survives_cancelled_readers(self, layer: ChannelLayer, channel: str) -> None:
        """Cancel readers of a channel at various moments, and account for every message."""
        received = []
        for number in range(20):
            reading = asyncio.create_task(layer.receive(channel))
            for _ in range(number % 4):
                await asyncio.sleep(0)
            if number % 2:
                reading.cancel()
            await layer.send(channel, {"type": "x", "number": number})
            for _ in range(number % 3):
                await asyncio.sleep(0)
            reading.cancel()
            with suppress(asyncio.CancelledError):
                received.append((await reading)["number"])
        await layer.send(channel, {"type": "x", "number": "last"})
        while (message := await self.receive(layer, channel))["number"] != "last":
            received.append(message["number"])
        assert received == list(range(20))

    async def test_a_cancelled_receive_leaves_the_message_to_another_reader(self, layer: ChannelLayer) -> None:
        """If the reader whose message has come is cancelled at that moment, the next reader gets it."""
        channel = await layer.new_channel()
        first = asyncio.create_task(layer.receive(channel))
        await asyncio.sleep(0)
        second = asyncio.create_task(self.receive(layer, channel))
        await asyncio.sleep(0)
        await layer.send(channel, {"type": "x"})
        first.cancel()
        first_got = (await asyncio.gather(first, return_exceptions=True))[0]
        if isinstance(first_got, dict):
            await layer.send(channel, {"type": "x"})
        assert await second == {"type": "x"}

    async def test_capacity(self, layer: ChannelLayer) -> None:
        """A send to a full channel raises ChannelFull and is not taken; when one was received there is room for one."""
        channel = await layer.new_channel()
        await self.has_capacity(layer, channel)

    async def has_capacity(self, layer: ChannelLayer, channel: str) -> None:
        """Fill a channel, beyond its capacity, and empty it."""
        for number in range(layer.capacity):
            await layer.send(channel, {"type": "x", "number": number})
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"type": "x", "number": "too many"})
        assert (await self.receive(layer, channel))["number"] == 0
        await layer.send(channel, {"type": "x", "number": layer.capacity})
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"type": "x", "number": "too many"})
        received = [(await self.receive(layer, channel))["number"] for _ in range(layer.capacity)]
        assert received == list(range(1, layer.capacity + 1))
        await layer.send(channel, {"type": "marker"})
        assert await self.receive(layer, channel) == {"type": "marker"}

    async def test_messages_expire(self, layer: ChannelLayer) -> None:
        """A message that nobody received within the expiry is not received any more; a newer one is."""
        channel = await layer.new_channel()
        await self.lets_expire(layer, channel)

    async def lets_expire(self, layer: ChannelLayer, channel: str) -> None:
        """Let a message grow too old in a channel."""
        lasting, layer.expiry = layer.expiry, 0.02
        await layer.send(channel, {"type": "x", "text": "old"})
        await asyncio.sleep(2 * layer.expiry)
        layer.expiry = lasting
        await layer.send(channel, {"type": "x", "text": "new"})
        assert await self.receive(layer, channel) == {"type": "x", "text": "new"}

    async def test_expired_messages_make_room(self, layer: ChannelLayer) -> None:
        """What has expired in a full channel does not count against its capacity."""
        channel = await layer.new_channel()
        lasting, layer.expiry = layer.expiry, 0.02
        for _ in range(layer.capacity):
            await layer.send(channel, {"type": "x", "text": "old"})
        await asyncio.sleep(2 * layer.expiry)
        layer.expiry = lasting
        await layer.send(channel, {"type": "x", "text": "new"})
        assert await self.receive(layer, channel) == {"type": "x", "text": "new"}

    async def test_memberships_do_not_expire(self, layer: ChannelLayer) -> None:
        """A member that left messages unread until they expired is still a member."""
        lasting, layer.expiry = layer.expiry, 0.02
        channel = await self.member(layer, "room")
        await layer.group_send("room", {"type": "x", "text": "old"})
        await asyncio.sleep(2 * layer.expiry)
        layer.expiry = lasting
        await layer.group_send("room", {"type": "x", "text": "new"})
        assert await self.receive(layer, channel) == {"type": "x", "text": "new"}

    async def test_sending_to_a_channel_that_is_no_more(self, layer: ChannelLayer) -> None:
        """A send to a channel that was ended is no error, since the sender can't know; there is nothing to receive."""
        channel = await layer.new_channel()
        await layer.detach(channel)
        await layer.detach(channel)
        await layer.send(channel, {"type": "x"})
        with pytest.raises(ValueError, match="is not a channel of this process"):
            await layer.receive(channel)

    # Named queues

    async def test_a_queue_keeps_messages_for_whoever_reads(self, layer: ChannelLayer) -> None:
        """A name without an exclamation mark is a queue: what is sent to it waits there, in order, for any reader."""
        for number in range(5):
            await layer.send("jobs", {"type": "x", "number": number})
        assert [(await self.receive(layer, "jobs"))["number"] for _ in range(5)] == [0, 1, 2, 3, 4]

    async def test_each_message_of_a_queue_to_one_reader(self, layer: ChannelLayer) -> None:
        """Several readers of a queue share its messages, each of which goes to one of them."""
        await self.shared_by_readers(layer, "jobs")

    async def test_a_cancelled_receive_loses_nothing_of_a_queue(self, layer: ChannelLayer) -> None:
        """A receive from a queue that is cancelled takes no message with it."""
        await self.survives_cancelled_readers(layer, "jobs")

    async def test_capacity_of_a_queue(self, layer: ChannelLayer) -> None:
        """A send to a full queue raises ChannelFull and is not taken."""
        await self.has_capacity(layer, "jobs")

    async def test_messages_of_a_queue_expire(self, layer: ChannelLayer) -> None:
        """A message that nobody took out of a queue within the expiry is gone; a newer one is not."""
        await self.lets_expire(layer, "jobs")

    async def test_queues_and_groups_of_one_name(self, layer: ChannelLayer) -> None:
        """A queue and a group may have the same name, and nothing else in common."""
        channel = await self.member(layer, "room")
        await layer.send("room", {"type": "to.queue"})
        await layer.group_send("room", {"type": "to.group"})
        assert await self.receive(layer, channel) == {"type": "to.group"}
        assert await self.receive(layer, "room") == {"type": "to.queue"}
        await self.nothing_came(layer, channel)
        await self.nothing_came(layer, "room")

    # Groups

    async def test_group_send_reaches_the_members(self, layer: ChannelLayer) -> None:
        """A message to a group reaches each of its members once, and nobody else."""
        members = [await self.member(layer, "room") for _ in range(3)]
        outsider = await self.member(layer, "other")
        await layer.group_send("room", {"type": "x", "text": "hi"})
        for channel in members:
            assert await self.receive(layer, channel) == {"type": "x", "text": "hi"}
        for channel in [*members, outsider]:
            await self.nothing_came(layer, channel)

    async def test_group_send_gives_a_receipt(self, layer: ChannelLayer) -> None:
        """A message to a group without history gets a receipt without an offset, whether it has members or not."""
        assert await layer.group_send("nobody", {"type": "x"}) == Receipt(offset=None, epoch=None, duplicate=False)
        await self.member(layer, "room")
        assert await layer.group_send("room", {"type": "x"}) == Receipt(offset=None, epoch=None, duplicate=False)

    async def test_joining_twice_is_joining_once(self, layer: ChannelLayer) -> None:
        """A channel that was added to a group twice gets one copy, and leaves with one discard."""
        channel, witness = await self.member(layer, "room", "room"), await self.member(layer, "room")
        await layer.group_send("room", {"type": "x"})
        assert await self.receive(layer, channel) == await self.receive(layer, witness) == {"type": "x"}
        await self.nothing_came(layer, channel)
        await layer.group_discard("room", channel)
        await layer.group_send("room", {"type": "y"})
        assert await self.receive(layer, witness) == {"type": "y"}
        await self.nothing_came(layer, channel)

    async def test_leaving(self, layer: ChannelLayer) -> None:
        """A channel that has left a group gets nothing more of it, and can come back."""
        channel, witness = await self.member(layer, "room"), await self.member(layer, "room")
        await layer.group_discard("room", channel)
        await layer.group_send("room", {"type": "x"})
        assert await self.receive(layer, witness) == {"type": "x"}
        await self.nothing_came(layer, channel)
        await layer.group_add("room", channel)
        await layer.group_send("room", {"type": "y"})
        assert await self.receive(layer, channel) == {"type": "y"}

    async def test_the_last_member_leaves_and_another_comes(self, layer: ChannelLayer) -> None:
        """A group that was left by all works as before for the next who joins."""
        for _ in range(3):
            channel = await self.member(layer, "room")
            await layer.group_send("room", {"type": "x"})
            assert await self.receive(layer, channel) == {"type": "x"}
            await layer.group_discard("room", channel)
            await layer.group_send("room", {"type": "unheard"})
            await self.nothing_came(layer, channel)

    async def test_leaving_what_one_is_not_in(self, layer: ChannelLayer) -> None:
        """Leaving a group twice, one that was never joined, or with a channel that is no more, is no error."""
        channel = await self.member(layer, "room")
        for _ in range(2):
            await layer.group_discard("room", channel)
        await layer.group_discard("never joined", channel)
        await layer.detach(channel)
        await layer.group_discard("room", channel)

    async def test_two_groups(self, layer: ChannelLayer) -> None:
        """A channel in two groups hears both, and leaving one is not leaving the other."""
        channel = await self.member(layer, "one", "two")
        witness = await self.member(layer, "one")
        for group in ("one", "two"):
            await layer.group_send(group, {"type": "x", "group": group})
        assert {(await self.receive(layer, channel))["group"] for _ in range(2)} == {"one", "two"}
        assert await self.receive(layer, witness) == {"type": "x", "group": "one"}
        await layer.group_discard("one", channel)
        await layer.group_send("one", {"type": "unheard"})
        assert await self.receive(layer, witness) == {"type": "unheard"}
        await layer.group_send("two", {"type": "heard"})
        assert await self.receive(layer, channel) == {"type": "heard"}

    async def test_groups_of_a_channel(self, layer: ChannelLayer) -> None:
        """The groups of a channel are told by a live view."""
        channel = await layer.new_channel()
        groups = layer.groups_of(channel)
        assert list(groups) == []
        await layer.group_add("one", channel)
        await layer.group_add("two", channel)
        assert set(groups) == {"one", "two"}
        await layer.group_discard("one", channel)
        assert set(groups) == {"two"}
        await layer.detach(channel)
        assert list(groups) == []

    async def test_exclude(self, layer: ChannelLayer) -> None:
        """A message to a group passes over the channels in `exclude`, whatever else is in there."""
        channel, witness = await self.member(layer, "room"), await self.member(layer, "room")
        outsider = await layer.new_channel()
        await layer.group_send("room", {"type": "x"}, exclude=[channel, outsider, "not a channel"])
        assert await self.receive(layer, witness) == {"type": "x"}
        await self.nothing_came(layer, channel)
        await layer.group_send("room", {"type": "y"}, exclude={channel, witness})
        await layer.group_send("room", {"type": "z"})
        for member in (channel, witness):
            assert await self.receive(layer, member) == {"type": "z"}

    async def test_a_full_member_holds_up_nobody(self, layer: ChannelLayer) -> None:
        """A member without room misses the message, the others get it, and the sender hears of no error."""
        full, witness = await self.member(layer, "room"), await self.member(layer, "room")
        for _ in range(layer.capacity):
            await layer.send(full, {"type": "x"})
        await layer.group_send("room", {"type": "missed"})
        assert await self.receive(layer, witness) == {"type": "missed"}
        for _ in range(layer.capacity):
            assert await self.receive(layer, full) == {"type": "x"}
        await self.nothing_came(layer, full)
        await layer.group_send("room", {"type": "heard"})
        assert await self.receive(layer, full) == {"type": "heard"}

    async def test_ended_channels_are_no_members(self, layer: ChannelLayer) -> None:
        """A channel that was ended is in no group, and can't join one."""
        channel, witness = await self.member(layer, "room"), await self.member(layer, "room")
        await layer.detach(channel)
        await layer.group_send("room", {"type": "x"})
        assert await self.receive(layer, witness) == {"type": "x"}
        with pytest.raises(ValueError, match="is not a channel of this process"):
            await layer.group_add("room", channel)

    async def test_only_channels_of_this_process_join(self, layer: ChannelLayer) -> None:
        """Another process's channel, a queue, or what never was a channel can't join a group."""
        for channel in ("specific.0123456789ab!1", "jobs", "nobody"):
            with pytest.raises(ValueError, match="is not a channel of this process"):
                await layer.group_add("room", channel)

    async def test_many_join_at_once(self, layer: ChannelLayer) -> None:
        """Channels that join a new group at the same moment are all in it when their calls return."""
        channels = [await layer.new_channel() for _ in range(10)]
        await asyncio.gather(*(layer.group_add("room", channel) for channel in channels))
        await layer.group_send("room", {"type": "x"})
        for channel in channels:
            assert await self.receive(layer, channel) == {"type": "x"}

    async def test_joining_while_others_leave(self, layer: ChannelLayer) -> None:
        """Who joins a group at the moment in which its last member leaves is in it, and the other is not."""
        leaving = await self.member(layer, "room")
        for number in range(10):
            joining = await layer.new_channel()
            calls: list[Coroutine[Any, Any, None]] = [
                layer.group_discard("room", leaving),
                layer.group_add("room", joining),
            ]
            await asyncio.gather(*(calls if number % 2 else reversed(calls)))
            await layer.group_send("room", {"type": "x", "number": number})
            assert (await self.receive(layer, joining))["number"] == number
            await self.nothing_came(layer, leaving)
            leaving = joining

    async def test_order_in_a_group(self, layer: ChannelLayer) -> None:
        """All members get the messages of one sender in the order in which they were sent."""
        members = [await self.member(layer, "room") for _ in range(3)]
        for number in range(20):
            await layer.group_send("room", {"type": "x", "number": number})
        for channel in members:
            assert [(await self.receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    @pytest.mark.parametrize("way", ["gather", "tasks"])
    async def test_unawaited_group_sends_keep_their_order(self, layer: ChannelLayer, way: str) -> None:
        """Sends to one group that were begun one after another arrive in that order, awaited or not."""
        members = [await self.member(layer, "room") for _ in range(3)]
        sends = (layer.group_send("room", {"type": "x", "number": number}) for number in range(20))
        if way == "gather":
            await asyncio.gather(*sends)
        else:
            for task in [asyncio.create_task(send) for send in sends]:
                await task
        for channel in members:
            assert [(await self.receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    async def test_all_members_see_one_order(self, layer: ChannelLayer) -> None:
        """Of several senders at once, every member sees the same sequence, and each sender's own order in it."""
        members = [await self.member(layer, "room") for _ in range(3)]

        async def sender(name: str) -> None:
            for number in range(5):
                await layer.group_send("room", {"type": "x", "sender": name, "number": number})
                await asyncio.sleep(0)

        await asyncio.gather(*(sender(name) for name in "abc"))
        sequences = [[await self.receive(layer, channel) for _ in range(15)] for channel in members]
        assert sequences[0] == sequences[1] == sequences[2]
        for name in "abc":
            assert [m["number"] for m in sequences[0] if m["sender"] == name] == [0, 1, 2, 3, 4]

    async def test_idempotency_key(self, layer: ChannelLayer) -> None:
        """The same key again in the same group sends nothing, as the receipt says; other keys and groups are free."""
        channel = await self.member(layer, "room", "other")
        first = await layer.group_send("room", {"type": "x", "number": 1}, idempotency_key="k")
        again = await layer.group_send("room", {"type": "x", "number": 2}, idempotency_key="k")
        assert (first.duplicate, again.duplicate) == (False, True)
        for number, (group, key) in enumerate([("room", "K"), ("other", "k"), ("room", "")], 3):
            receipt = await layer.group_send(group, {"type": "x", "number": number}, idempotency_key=key)
            assert not receipt.duplicate
        assert {(await self.receive(layer, channel))["number"] for _ in range(4)} == {1, 3, 4, 5}
        await self.nothing_came(layer, channel)

    # Names

    async def test_awkward_names_of_groups(self, layer: ChannelLayer) -> None:
        """Groups whose names look alike, are patterns or are as long as can be are different groups."""
        members = {name: await self.member(layer, name) for name in AWKWARD_NAMES}
        for name in AWKWARD_NAMES:
            await layer.group_send(name, {"type": "x", "group": name})
        for name, channel in members.items():
            assert await self.receive(layer, channel) == {"type": "x", "group": name}
        for channel in members.values():
            await self.nothing_came(layer, channel)

    async def test_awkward_names_of_queues(self, layer: ChannelLayer) -> None:
        """Queues whose names look alike, are patterns or are as long as can be are different queues."""
        names = [name for name in AWKWARD_NAMES if "!" not in name]
        for name in names:
            await layer.send(name, {"type": "x", "queue": name})
        for name in names:
            assert await self.receive(layer, name) == {"type": "x", "queue": name}

    @pytest.mark.parametrize("name", NOT_NAMES.values(), ids=NOT_NAMES)
    async def test_what_is_no_name(self, layer: ChannelLayer, name: Any) -> None:
        """What can't be a name is refused with InvalidGroupName by whatever takes a name."""
        channel = await layer.new_channel()
        message = {"type": "x"}
        calls: list[Coroutine[Any, Any, Any]] = [
            layer.group_send(name, message),
            layer.group_add(name, channel),
            layer.send(name, message),
            layer.receive(name),
        ]
        for call in calls:
            with pytest.raises(InvalidGroupName):
                await call

    @pytest.mark.parametrize("prefix", ["", "x" * 200, "a\nb", "a{b", "a!b"])
    async def test_what_is_no_prefix(self, layer: ChannelLayer, prefix: str) -> None:
        """A prefix that makes no channel name is refused; an empty one makes a name too."""
        if prefix == "":
            assert await layer.new_channel(prefix)
        else:
            with pytest.raises(InvalidGroupName):
                await layer.new_channel(prefix)

    # Messages

    @pytest.mark.parametrize("message", NOT_MESSAGES.values(), ids=NOT_MESSAGES)
    async def test_what_is_no_message(self, layer: ChannelLayer, message: Any) -> None:
        """What has no type or is not for JSON raises InvalidMessage at the sender, and nothing is sent."""
        channel = await self.member(layer, "room")
        with pytest.raises(InvalidMessage):
            await layer.group_send("room", message)
        with pytest.raises(InvalidMessage):
            await layer.send(channel, message)
        with pytest.raises(InvalidMessage):
            await layer.send("jobs", message)
        await layer.group_send("room", {"type": "marker"})
        assert await self.receive(layer, channel) == {"type": "marker"}
        await self.nothing_came(layer, "jobs")

    async def test_models(self, layer: ChannelLayer) -> None:
        """A pydantic model with a type is a message, and arrives as what it is in JSON."""
        channel = await self.member(layer, "room")
        at = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
        model = Announcement(id=uuid.UUID(int=7), at=at, tags=["a"])
        sent = model.model_dump(mode="json")
        for send in (layer.group_send("room", model), layer.send(channel, model), layer.send("jobs", model)):
            await send
        assert await self.receive(layer, channel) == await self.receive(layer, channel) == sent
        assert await self.receive(layer, "jobs") == sent

    async def test_what_json_makes_of_it(self, layer: ChannelLayer) -> None:
        """Values arrive as what pydantic's JSON makes of them, on every way alike."""
        channel = await self.member(layer, "room")
        message = {
            "type": "x",
            "when": datetime.date(2030, 1, 2),
            "model": {"inner": Announcement(id=uuid.UUID(int=7), at=datetime.datetime(2030, 1, 2))},
            "tuple": (1, 2),
            "bytes": "é".encode(),
            "nan": float("nan"),
            "keys": {1: "one"},
            "large": 2**80,
        }
        expected = {
            "type": "x",
            "when": "2030-01-02",
            "model": {
                "inner": {
                    "type": "chat.announcement",
                    "id": "00000000-0000-0000-0000-000000000007",
                    "at": "2030-01-02T00:00:00",
                    "tags": [],
                }
            },
            "tuple": [1, 2],
            "bytes": "é",
            "nan": None,
            "keys": {"1": "one"},
            "large": 2**80,
        }
        await layer.group_send("room", message)
        assert await self.receive(layer, channel) == expected
        await layer.send(channel, message)
        assert await self.receive(layer, channel) == expected
        await layer.send("jobs", message)
        assert await self.receive(layer, "jobs") == expected

    async def test_bytes_for_a_frame(self, layer: ChannelLayer) -> None:
        """The bytes of a `websocket.send` arrive as the bytes that they were, on every way alike."""
        channel = await self.member(layer, "room")
        for data in (bytes(range(256)), b""):
            message = {"type": "websocket.send", "bytes": data}
            await layer.group_send("room", message)
            assert await self.receive(layer, channel) == message
            await layer.send(channel, message)
            assert await self.receive(layer, channel) == message
            await layer.send("jobs", message)
            assert await self.receive(layer, "jobs") == message
        await layer.group_send("room", {"type": "websocket.send", "text": "é", "bytes": None})
        assert await self.receive(layer, channel) == {"type": "websocket.send", "text": "é", "bytes": None}

    async def test_everybody_gets_an_object_of_their_own(self, layer: ChannelLayer) -> None:
        """What a receiver or the sender does to a message afterwards is seen by nobody else."""
        members = [await self.member(layer, "room") for _ in range(2)]
        message = {"type": "x", "list": [1]}
        await layer.group_send("room", message)
        message["list"] = []
        first = await self.receive(layer, members[0])
        first["list"].append(2)
        first["more"] = True
        assert await self.receive(layer, members[1]) == {"type": "x", "list": [1]}

    async def test_large_messages(self, layer: ChannelLayer) -> None:
        """A megabyte arrives whole."""
        channel = await self.member(layer, "room")
        message = {"type": "x", "text": "0123456789abcdef" * 65536}
        await layer.group_send("room", message)
        assert await self.receive(layer, channel) == message

    # Threads

    async def test_a_thread_wakes_the_receiver(self, layer: ChannelLayer) -> None:
        """What another thread sends to a channel or a group wakes who waits for it."""
        channel = await self.member(layer, "room")
        reading = asyncio.create_task(self.receive(layer, channel))
        await asyncio.sleep(0)
        receipt = await self.in_thread(lambda: layer.sync.group_send("room", {"type": "x"}))
        assert receipt == Receipt()
        assert await reading == {"type": "x"}
        reading = asyncio.create_task(self.receive(layer, channel))
        await asyncio.sleep(0)
        await self.in_thread(lambda: layer.sync.send(channel, {"type": "y"}))
        assert await reading == {"type": "y"}

    async def test_threads_can_do_everything(self, layer: ChannelLayer) -> None:
        """A thread can make a channel, join, leave, send, receive and flush."""

        def work() -> tuple[str, list[dict[str, Any]]]:
            sync = layer.sync
            channel = sync.new_channel("thread")
            sync.group_add("room", channel)
            sync.group_send("room", {"type": "x"}, exclude=[channel])
            sync.group_send("room", {"type": "y"}, idempotency_key="k")
            received = [sync.receive(channel)]
            sync.group_discard("room", channel)
            sync.group_send("room", {"type": "unheard"})
            sync.send(channel, {"type": "z"})
            received.append(sync.receive(channel))
            sync.send("jobs", {"type": "flushed"})
            sync.flush()
            return channel, received

        channel, received = await self.in_thread(work)
        assert channel.startswith("thread.")
        assert received == [{"type": "y"}, {"type": "z"}]
        await self.nothing_came(layer, "jobs")

    async def test_order_in_a_thread(self, layer: ChannelLayer) -> None:
        """What one thread sends keeps its order."""
        channel = await self.member(layer, "room")

        def work() -> None:
            for number in range(20):
                layer.sync.group_send("room", {"type": "x", "number": number})

        await self.in_thread(work)
        assert [(await self.receive(layer, channel))["number"] for _ in range(20)] == list(range(20))

    async def test_errors_reach_the_thread(self, layer: ChannelLayer) -> None:
        """A call in another thread raises what its twin raises."""
        for error, call in (
            (InvalidGroupName, lambda: layer.sync.group_send("", {"type": "x"})),
            (InvalidMessage, lambda: layer.sync.send("jobs", {})),
            (ValueError, lambda: layer.sync.group_add("room", "nobody")),
        ):
            with pytest.raises(error):
                await self.in_thread(call)

    async def test_blocking_on_the_event_loop(self, layer: ChannelLayer) -> None:
        """A blocking call on the event loop's own thread raises RuntimeError, instead of waiting for ever."""
        channel = await self.member(layer, "room")
        for call in (
            lambda: layer.sync.group_send("room", {"type": "x"}),
            lambda: layer.sync.receive(channel),
            layer.sync.flush,
        ):
            with pytest.raises(RuntimeError, match="await"):
                call()
        await layer.group_send("room", {"type": "y"})
        assert await self.receive(layer, channel) == {"type": "y"}

    # Opening and closing

    async def test_flush(self, layer: ChannelLayer) -> None:
        """After a flush there is no message and no membership, and the layer works as before."""
        channel = await self.member(layer, "room")
        await layer.group_send("room", {"type": "x"}, idempotency_key="k")
        await layer.send("jobs", {"type": "x"})
        await layer.flush()
        await self.nothing_came(layer, "jobs")
        witness = await self.member(layer, "room")
        assert not (await layer.group_send("room", {"type": "y"}, idempotency_key="k")).duplicate
        assert await self.receive(layer, witness) == {"type": "y"}
        with pytest.raises(ValueError, match="is not a channel of this process"):
            await layer.receive(channel)

    async def test_a_closed_layer_takes_nothing(self, layer: ChannelLayer) -> None:
        """A closed layer raises LayerUnavailable, and never pretends to have sent."""
        channel = await self.member(layer, "room")
        await layer.close()
        calls: list[Coroutine[Any, Any, Any]] = [
            layer.group_send("room", {"type": "x"}),
            layer.send(channel, {"type": "x"}),
            layer.send("jobs", {"type": "x"}),
            layer.receive(channel),
            layer.receive("jobs"),
            layer.new_channel(),
            layer.group_add("room", channel),
        ]
        for call in calls:
            with pytest.raises(LayerUnavailable):
                await call
        with pytest.raises(LayerUnavailable):
            await self.in_thread(lambda: layer.sync.group_send("room", {"type": "x"}))
        await layer.close()

    async def test_context_manager(self, layer: ChannelLayer) -> None:
        """Entering a layer opens it, again if need be, and leaving closes it; what was in it is gone."""
        assert layer.is_open
        channel = await self.member(layer, "room")
        await layer.close()
        assert not layer.is_open
        async with layer as entered:
            assert entered is layer
            assert layer.is_open
            with pytest.raises(ValueError, match="is not a channel of this process"):
                await layer.receive(channel)
            channel = await self.member(layer, "room")
            await layer.group_send("room", {"type": "x"})
            assert await self.receive(layer, channel) == {"type": "x"}
        assert not layer.is_open
