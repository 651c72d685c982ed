"""The base class under a backend that carries: a layer whose broker takes its time passes the same contract."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection

import pytest
from typing_extensions import override

from fastapi_channels.layers import ChannelFull, ChannelLayer, Envelope, Receipt
from fastapi_channels.layers.inbox import Inbox
from fastapi_channels.testing import LayerContract

MESSAGE = {"type": "x"}


class Broker:
    """Carries messages of all layers that are connected to it, some turns of the event loop later."""

    def __init__(self) -> None:
        self.layers: set[CarriedLayer] = set()
        self.queues: dict[str, Inbox] = {}
        self.keys: set[tuple[str, str]] = set()
        self.published: asyncio.Queue[tuple[str, Envelope, Collection[str]]] = asyncio.Queue()

    async def carry(self) -> None:
        """Bring what is published to those who have subscribed to its group."""
        while True:
            group, envelope, exclude = await self.published.get()
            await asyncio.sleep(0)
            for layer in list(self.layers):
                if group in layer.subscribed:
                    layer._fan_out(group, envelope, exclude)


class CarriedLayer(ChannelLayer):
    """A layer over such a broker, as a backend over a network would be."""

    def __init__(self, broker: Broker, *, capacity: int = 20) -> None:
        super().__init__(capacity=capacity)
        self.broker = broker
        self.subscribed: set[str] = set()
        #: What was asked of the broker, in order.
        self.asked: list[str] = []
        self.delays = itertools.cycle([3, 1, 2])

    async def answer(self) -> None:
        """Wait for the broker, which does not take the same time for everything."""
        for _ in range(next(self.delays)):
            await asyncio.sleep(0)

    @override
    async def open(self) -> None:
        await super().open()
        self.broker.layers.add(self)

    @override
    async def close(self) -> None:
        await super().close()
        self.broker.layers.discard(self)
        self.subscribed.clear()

    @override
    async def flush(self) -> None:
        await super().flush()
        for queue in self.broker.queues.values():
            queue.clear()
        self.broker.keys.clear()

    @override
    async def _publish(
        self, group: str, envelope: Envelope, exclude: Collection[str], idempotency_key: str | None
    ) -> Receipt:
        if idempotency_key is not None:
            if (group, idempotency_key) in self.broker.keys:
                return Receipt(duplicate=True)
            self.broker.keys.add((group, idempotency_key))
        self.broker.published.put_nowait((group, envelope, exclude))
        await asyncio.sleep(0)
        return Receipt()

    @override
    async def _enqueue(self, name: str, envelope: Envelope) -> None:
        if not self._queue(name).deliver(envelope):
            raise ChannelFull(name)
        await asyncio.sleep(0)

    @override
    async def _dequeue(self, name: str) -> Envelope:
        return await self._queue(name).receive()

    @override
    async def _subscribe(self, group: str) -> None:
        self.asked.append(f"+{group}")
        await self.answer()
        self.subscribed.add(group)

    @override
    async def _unsubscribe(self, group: str) -> None:
        self.asked.append(f"-{group}")
        await self.answer()
        self.subscribed.discard(group)

    def _queue(self, name: str) -> Inbox:
        return self.broker.queues.setdefault(name, Inbox(self.capacity, self.counters))


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    broker = Broker()
    carrying = asyncio.create_task(broker.carry())
    yield broker
    carrying.cancel()
    await asyncio.wait({carrying})


class TestCarriedLayer(LayerContract):
    @pytest.fixture
    async def layer(self, broker: Broker) -> AsyncIterator[ChannelLayer]:
        async with CarriedLayer(broker) as layer:
            yield layer


@pytest.fixture
async def layer(broker: Broker) -> AsyncIterator[CarriedLayer]:
    async with CarriedLayer(broker) as layer:
        yield layer


async def received(layer: ChannelLayer, channel: str) -> dict[str, object]:
    async with asyncio.timeout(5):
        return await layer.receive(channel)


async def test_one_subscription_for_all_members(layer: CarriedLayer) -> None:
    """The broker is asked once when a group gets its first member here, and once when it has lost its last."""
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in channels:
        await layer.group_add("room", channel)
        await layer.group_add("room", channel)
    assert layer.asked == ["+room"]
    for channel in channels:
        await layer.group_discard("room", channel)
    assert layer.asked == ["+room", "-room"]
    assert layer.subscribed == set()


async def test_two_processes(broker: Broker) -> None:
    """A message to a group reaches its members in every process, except those left out, wherever they are."""
    async with CarriedLayer(broker) as one, CarriedLayer(broker) as two:
        here, there, left_out = await one.new_channel(), await two.new_channel(), await two.new_channel()
        await one.group_add("room", here)
        for channel in (there, left_out):
            await two.group_add("room", channel)
        await one.group_send("room", MESSAGE, exclude=[left_out])
        await one.group_send("room", {"type": "marker"})
        assert await received(one, here) == await received(two, there) == MESSAGE
        assert await received(two, left_out) == {"type": "marker"}


async def test_a_channel_that_ends_while_it_joins(layer: CarriedLayer) -> None:
    """A channel that ends while its joining is under way is no member, and leaves no subscription behind."""
    channel = await layer.new_channel()
    joining = asyncio.create_task(layer.group_add("room", channel))
    await asyncio.sleep(0)
    assert layer.asked == ["+room"]
    await layer.detach(channel)
    await asyncio.wait({joining})
    assert layer.subscribed == set()
    assert layer._groups == {}


async def test_joining_that_is_cancelled(layer: CarriedLayer) -> None:
    """A joining that is cancelled leaves neither a membership nor a subscription, and can be tried again."""
    channel = await layer.new_channel()
    joining = asyncio.create_task(layer.group_add("room", channel))
    await asyncio.sleep(0)
    joining.cancel()
    await asyncio.wait({joining})
    assert list(layer.groups_of(channel)) == []
    assert layer.subscribed == set()
    await layer.group_add("room", channel)
    await layer.group_send("room", MESSAGE)
    assert await received(layer, channel) == MESSAGE


@pytest.mark.parametrize("seed", range(10))
async def test_joining_and_leaving_in_any_mix(layer: CarriedLayer, seed: int) -> None:
    """However joining and leaving overlap, the members in the end hear the group; an empty one has no subscription."""
    channels = [await layer.new_channel() for _ in range(3)]
    layer.delays = itertools.cycle([seed % 4, 3, 0, (seed * 7) % 5, 1])
    calls = []
    for step in range(6 + seed):
        channel = channels[(step * (seed + 1)) % 3]
        join = (step * 5 + seed) % 3 != 0
        call = layer.group_add("room", channel) if join else layer.group_discard("room", channel)
        calls.append(asyncio.create_task(call))
        for _ in range((step + seed) % 3):
            await asyncio.sleep(0)
    await asyncio.gather(*calls)
    members = [channel for channel in channels if "room" in layer.groups_of(channel)]
    assert layer.subscribed == ({"room"} if members else set())
    await layer.group_send("room", MESSAGE)
    for channel in members:
        assert await received(layer, channel) == MESSAGE
