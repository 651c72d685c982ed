"""What the tests of the layers share: a clock that can be put forward."""

import asyncio
from collections.abc import Callable

import pytest

Forward = Callable[[float], None]


@pytest.fixture
async def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Put the event loop's clock forward by some seconds: `forward(60)`."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, 0.0

    def put_forward(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    return put_forward
