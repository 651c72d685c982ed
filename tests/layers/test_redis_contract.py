"""The contract on real servers: Redis 7, Valkey, behind Sentinels, and as a Cluster."""

from collections.abc import AsyncIterator

import pytest

from fastapi_channels.layers import ChannelLayer
from fastapi_channels.layers.redis import RedisLayer
from fastapi_channels.testing import LayerContract


class TestRedisLayer(LayerContract):
    @pytest.fixture
    async def layer(self) -> AsyncIterator[ChannelLayer]:
        async with RedisLayer("redis://localhost:6399/0", capacity=20) as layer:
            await layer.flush()
            yield layer
