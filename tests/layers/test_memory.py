"""The memory layer keeps the contract, and what is its own."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fastapi_channels.layers import ChannelLayer, Counters, MemoryLayer
from fastapi_channels.layers.base import SWEEP
from fastapi_channels.testing import LayerContract
from tests.conftest import Forward

MESSAGE = {"type": "x"}


class TestMemoryLayer(LayerContract):
    @pytest.fixture
    async def layer(self) -> AsyncIterator[ChannelLayer]:
        async with MemoryLayer(capacity=20) as layer:
            yield layer


async def test_it_waits_for_nothing(memory_layer: MemoryLayer) -> None:
    """When group_send returns, every member has the message."""
    channel = await memory_layer.new_channel()
    await memory_layer.group_add("room", channel)
    await memory_layer.group_send("room", MESSAGE)
    receiving = memory_layer.receive(channel)
    with pytest.raises(StopIteration) as returned:
        receiving.send(None)
    assert returned.value.value == MESSAGE


async def test_an_idempotency_key_is_forgotten_in_time(memory_layer: MemoryLayer, forward: Forward) -> None:
    """A key is remembered for five minutes from its first use, and can be used again after that."""
    keys = {"idempotency_key": "k"}
    assert not (await memory_layer.group_send("room", MESSAGE, **keys)).duplicate
    forward(299)
    assert (await memory_layer.group_send("room", MESSAGE, **keys)).duplicate
    forward(1)
    assert not (await memory_layer.group_send("room", MESSAGE, **keys)).duplicate
    assert (await memory_layer.group_send("room", MESSAGE, **keys)).duplicate


async def test_old_keys_take_no_room(memory_layer: MemoryLayer, forward: Forward) -> None:
    """Keys that have been forgotten are let go of when others come."""
    for number in range(100):
        await memory_layer.group_send("room", MESSAGE, idempotency_key=str(number))
    forward(300)
    await memory_layer.group_send("room", MESSAGE, idempotency_key="last")
    assert len(memory_layer._seen) == 1


async def test_a_repeat_counts_for_nothing(memory_layer: MemoryLayer) -> None:
    """A repeat is neither delivered nor dropped."""
    channel = await memory_layer.new_channel()
    await memory_layer.group_add("room", channel)
    for _ in range(memory_layer.capacity + 1):
        await memory_layer.group_send("room", MESSAGE, idempotency_key="k")
    assert memory_layer.counters == Counters()


async def test_queues_that_nobody_uses_are_swept(memory_layer: MemoryLayer) -> None:
    """An empty queue that nobody waits for takes no room; one with messages or readers stays."""
    await memory_layer.send("kept", MESSAGE)
    reading = asyncio.create_task(memory_layer.receive("read"))
    await asyncio.sleep(0)
    for number in range(10 * SWEEP):
        await memory_layer.send(f"used.{number}", MESSAGE)
        await memory_layer.receive(f"used.{number}")
    assert len(memory_layer._queues) <= SWEEP + 1
    await memory_layer.send("read", {"type": "y"})
    assert await reading == {"type": "y"}
    assert await memory_layer.receive("kept") == MESSAGE


async def test_expired_messages_of_a_queue_are_counted(memory_layer: MemoryLayer, forward: Forward) -> None:
    """What nobody took out of a queue in time is counted."""
    await memory_layer.send("jobs", MESSAGE)
    forward(memory_layer.expiry)
    await memory_layer.send("jobs", {"type": "y"})
    assert await memory_layer.receive("jobs") == {"type": "y"}
    assert memory_layer.counters == Counters(expired=1)


async def test_a_hundred_thousand_messages_need_no_task(memory_layer: MemoryLayer) -> None:
    """Sending to channels and groups starts no task."""
    channel = await memory_layer.new_channel()
    await memory_layer.group_add("room", channel)
    before = asyncio.all_tasks()
    for _ in range(memory_layer.capacity // 2):
        await memory_layer.group_send("room", MESSAGE)
        await memory_layer.send(channel, MESSAGE)
    assert asyncio.all_tasks() == before
