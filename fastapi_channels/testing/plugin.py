"""The pytest plugin: fixtures for tests of applications. Installing the package is enough, pytest finds it.

Every test run with the package installed imports this module, so it imports nothing of weight before a fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastapi_channels.layers import ChannelLayer, Envelope, MemoryLayer
    from fastapi_channels.testing.server import RedisServer

__all__ = ["CaptureGroupSends", "GroupSend", "capture_group_sends", "memory_layer", "redis_server", "redis_url"]

pytest.register_assert_rewrite("fastapi_channels.testing.contract")


@dataclass(frozen=True, slots=True)
class GroupSend:
    """A `group_send` that was captured.

    Attributes:
        group: To which group.
        message: What was sent, as a receiver would get it.
        exclude: Which channels were left out.
    """

    group: str
    message: dict[str, Any]
    exclude: frozenset[str]


#: What the fixture `capture_group_sends` is.
CaptureGroupSends = Callable[[Any], list[GroupSend]]


@pytest.fixture
async def memory_layer(anyio_backend: Any) -> AsyncIterator[MemoryLayer]:
    """A `MemoryLayer` of the test's own, open on its event loop: `add_channel(app, channel_layers={"default": it})`.

    For tests that AnyIO's pytest plugin runs.
    """
    from fastapi_channels.layers import MemoryLayer

    async with MemoryLayer() as layer:
        yield layer


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A `RedisServer` for all tests of the run; the fixture `redis_url` empties it.

    If no server is installed, the tests that want it are skipped, or fail if the environment variable CI is set.
    """
    from fastapi_channels.testing.server import RedisServer

    try:
        server = RedisServer()
    except RuntimeError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the fixture `redis_server`, which is empty, and runs whatever the test before has done to it."""
    if redis_server.is_running:
        redis_server.resume()
        redis_server.flush()
    else:
        redis_server.restart()
    return redis_server.url


@pytest.fixture
def capture_group_sends() -> Iterator[CaptureGroupSends]:
    """A function that takes an application or a layer, and returns a list to which every `group_send` is added.

    It holds what was sent from then on in this process, with `group`, `message` and `exclude`, in the order of the
    calls; of an application, on all its layers. The messages are sent all the same. Capturing ends with the test.
    """
    with ExitStack() as stack:

        def capture(source: Any) -> list[GroupSend]:
            captured: list[GroupSend] = []

            def observe(group: str, envelope: Envelope, exclude: Collection[str]) -> None:
                captured.append(GroupSend(group, envelope.decode(), frozenset(exclude)))

            for layer in _layers_of(source):
                layer.observers.append(observe)
                stack.callback(layer.observers.remove, observe)
            return captured

        yield capture


def _layers_of(source: Any) -> Collection[ChannelLayer]:
    from fastapi_channels.application import Channels
    from fastapi_channels.layers import ChannelLayer

    if isinstance(source, ChannelLayer):
        return [source]
    channels = getattr(source.state, "channels", None) or Channels.of({"app": source})
    return channels.layers.values()
