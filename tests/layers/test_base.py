"""The base of every layer: what it checks, counts, and gives up."""

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from fastapi_channels.layers import ChannelFull, Counters, Envelope, MemoryLayer, Sink
from fastapi_channels.layers.base import SWEEP
from tests.conftest import Forward

MESSAGE = {"type": "x"}


class Collector(Sink):
    """A sink that keeps what it gets, up to a limit."""

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.messages: list[dict[str, object]] = []

    def deliver(self, envelope: Envelope) -> bool:
        if len(self.messages) >= self.limit:
            return False
        self.messages.append(envelope.decode())
        return True


@pytest.fixture
async def layer() -> AsyncIterator[MemoryLayer]:
    async with MemoryLayer(capacity=3) as layer:
        yield layer


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"capacity": 0}, "capacity is at least 1, not 0"),
        ({"expiry": 0}, "expiry is more than 0 seconds, not 0"),
        ({"expiry": -1.5}, "expiry is more than 0 seconds, not -1.5"),
    ],
)
def test_bad_configuration(config: dict[str, int], told: str) -> None:
    """A layer can't be made without room or time for messages."""
    with pytest.raises(ValueError, match=f"^{told}$"):
        MemoryLayer(**config)


def test_a_layer_that_nobody_has_opened() -> None:
    """A new layer is not open, whether an event loop runs or not."""
    assert not MemoryLayer().is_open


async def test_names_of_channels(layer: MemoryLayer) -> None:
    """A channel's name is `<prefix>.<node>!<id>`, and the node is the same for all of a layer."""
    first, second = await layer.new_channel(), await layer.new_channel("chat.room")
    prefix, _, rest = first.partition(".")
    node, _, number = rest.partition("!")
    assert prefix == "specific"
    assert int(number, 16) == 1
    assert second == f"chat.room.{node}!2"
    async with MemoryLayer() as other:
        assert node not in await other.new_channel()


async def test_exclude_is_not_one_name(layer: MemoryLayer) -> None:
    """A string as `exclude` is an error: it would leave out whoever is called like a part of it."""
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    with pytest.raises(TypeError, match="exclude is a collection of channel names, not one name"):
        await layer.group_send("room", MESSAGE, exclude=channel)


async def test_the_messages_of_a_consumer_are_its_own(layer: MemoryLayer) -> None:
    """What goes to the channel of a sink goes to the sink, and can't be received by others."""
    collector = Collector()
    channel = layer.attach(collector)
    await layer.send(channel, MESSAGE)
    assert collector.messages == [MESSAGE]
    with pytest.raises(ValueError, match="are a consumer's"):
        await layer.receive(channel)


async def test_flush_leaves_consumers_attached(layer: MemoryLayer) -> None:
    """A flush takes sinks out of their groups, and leaves them their channels."""
    collector = Collector()
    channel = layer.attach(collector)
    await layer.group_add("room", channel)
    await layer.flush()
    await layer.group_send("room", {"type": "unheard"})
    await layer.send(channel, MESSAGE)
    assert collector.messages == [MESSAGE]
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "y"})
    assert collector.messages == [MESSAGE, {"type": "y"}]


async def test_members_get_messages_in_the_order_of_joining(layer: MemoryLayer) -> None:
    """A message goes to all members, whoever joins or leaves while it is handed out."""

    class Leaver(Collector):
        """Leaves the group, and lets another in, when it gets something."""

        def deliver(self, envelope: Envelope) -> bool:
            for change in (layer.group_discard("room", leaving), layer.group_add("room", joining)):
                with pytest.raises(StopIteration):
                    change.send(None)
            return super().deliver(envelope)

    leaver, last, late = Leaver(), Collector(), Collector()
    leaving, staying, joining = layer.attach(leaver), layer.attach(last), layer.attach(late)
    for channel in (leaving, staying):
        await layer.group_add("room", channel)
    await layer.group_send("room", MESSAGE)
    assert (leaver.messages, last.messages, late.messages) == ([MESSAGE], [MESSAGE], [])
    await layer.group_send("room", {"type": "y"})
    assert (leaver.messages, last.messages[1:], late.messages) == ([MESSAGE], [{"type": "y"}], [{"type": "y"}])


# What did not arrive is counted


async def test_a_full_member_is_counted(layer: MemoryLayer) -> None:
    """Each message of a group that a member has no room for is counted once."""
    full, other = Collector(limit=1), Collector()
    for sink in (full, other):
        await layer.group_add("room", layer.attach(sink))
    for _ in range(3):
        await layer.group_send("room", MESSAGE)
    assert (len(full.messages), len(other.messages)) == (1, 3)
    assert layer.counters == Counters(inbox_dropped=2)


async def test_a_full_channel_is_told_to_the_sender(layer: MemoryLayer) -> None:
    """A send to a full channel raises an error with its name, and is not counted too: the sender knows."""
    channel = layer.attach(Collector(limit=0))
    with pytest.raises(ChannelFull) as caught:
        await layer.send(channel, MESSAGE)
    assert str(caught.value) == channel
    assert layer.counters == Counters()


async def test_messages_to_nobody_are_counted(layer: MemoryLayer) -> None:
    """What is sent to a channel that is no more, or to another process that can't be reached, is counted."""
    channel = await layer.new_channel()
    await layer.detach(channel)
    await layer.send(channel, MESSAGE)
    assert layer.counters == Counters(unreachable=1)
    await layer.send("specific.0123456789ab!1", MESSAGE)
    assert layer.counters == Counters(unreachable=2)


async def test_a_look_alike_of_this_process_is_another(layer: MemoryLayer) -> None:
    """Only a name with this process's node before the exclamation mark is a channel of this process."""
    channel = await layer.new_channel()
    node = channel.partition(".")[2].partition("!")[0]
    for name in (f"x{node}!1", f"other!{node}", f"a!.{node}!1"):
        await layer.send(name, MESSAGE)
    assert layer.counters == Counters(unreachable=3)
    await layer.send(channel, {"type": "y"})
    assert await layer.receive(channel) == {"type": "y"}


async def test_expired_messages_are_counted(layer: MemoryLayer, forward: Forward) -> None:
    """A message that was not received in time is dropped and counted."""
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    forward(layer.expiry)
    await layer.send(channel, {"type": "y"})
    assert await layer.receive(channel) == {"type": "y"}
    assert layer.counters == Counters(expired=1)


# Channels that nobody uses


async def test_abandoned_channels_are_swept(layer: MemoryLayer, forward: Forward) -> None:
    """A channel that was empty, unread and in no group for as long as the expiry is given up; no other is."""
    member, read, filled = await layer.new_channel(), await layer.new_channel(), await layer.new_channel()
    await layer.group_add("room", member)
    reading = asyncio.create_task(layer.receive(read))
    await asyncio.sleep(0)
    abandoned = [await layer.new_channel() for _ in range(SWEEP)]
    consumer = layer.attach(Collector())
    forward(layer.expiry)
    await layer.send(filled, MESSAGE)
    for _ in range(SWEEP):
        await layer.new_channel()

    await layer.send(abandoned[0], {"type": "unreachable"})
    assert layer.counters == Counters(unreachable=1)
    for channel in (member, read, filled, consumer):
        await layer.send(channel, {"type": "y"})
    assert layer.counters == Counters(unreachable=1)
    assert await reading == {"type": "y"}
    assert await layer.receive(member) == {"type": "y"}
    assert await layer.receive(filled) == MESSAGE


async def test_a_channel_that_is_used_is_not_swept(layer: MemoryLayer, forward: Forward) -> None:
    """Receiving from a channel keeps it for another expiry."""
    channel = await layer.new_channel()
    forward(layer.expiry - 1)
    await layer.send(channel, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    forward(layer.expiry - 1)
    for _ in range(2 * SWEEP):
        await layer.new_channel()
    await layer.send(channel, {"type": "y"})
    assert await layer.receive(channel) == {"type": "y"}


# Who still waits


async def test_closing_ends_those_who_wait(layer: MemoryLayer) -> None:
    """A receive that waits when the layer closes ends with LayerUnavailable, instead of waiting for ever."""
    channel = await layer.new_channel()
    reading = [asyncio.create_task(layer.receive(name)) for name in (channel, "jobs")]
    await asyncio.sleep(0)
    await layer.close()
    _, waiting = await asyncio.wait(reading, timeout=1)
    for task in waiting:
        task.cancel()
    assert not waiting
    assert [type(task.exception()).__name__ for task in reading] == ["LayerUnavailable", "LayerUnavailable"]


async def test_ending_a_channel_ends_its_readers(layer: MemoryLayer) -> None:
    """A receive that waits when its channel is ended raises what a later one would."""
    channel = await layer.new_channel()
    reading = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    await layer.detach(channel)
    await asyncio.wait({reading}, timeout=1)
    was_done = reading.done()
    reading.cancel()
    assert was_done
    with pytest.raises(ValueError, match="is not a channel of this process"):
        await reading


async def test_flushing_keeps_the_readers_of_a_queue(layer: MemoryLayer) -> None:
    """Who waits for a queue while the layer is flushed gets the next message of it."""
    reading = asyncio.create_task(layer.receive("jobs"))
    await asyncio.sleep(0)
    await layer.flush()
    await layer.send("jobs", MESSAGE)
    await asyncio.wait({reading}, timeout=1)
    was_done = reading.done()
    reading.cancel()
    assert was_done
    assert await reading == MESSAGE


# Observers


async def test_observers(layer: MemoryLayer) -> None:
    """An observer is told of every group_send that is fit to be sent, and of nothing else."""
    seen: list[tuple[str, str, Collection[str]]] = []
    layer.observers.append(lambda group, envelope, exclude: seen.append((group, envelope.type, exclude)))
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    await layer.group_send("nobody", MESSAGE)
    await layer.group_send("room", {"type": "y"}, exclude=[channel])
    for group, message in (("", MESSAGE), ("room", {})):
        with pytest.raises(ValueError, match="a "):
            await layer.group_send(group, message)
    assert seen == [("nobody", "x", ()), ("room", "y", [channel])]
