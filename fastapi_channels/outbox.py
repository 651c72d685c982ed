"""The outbox: the frames that wait for one client's socket, bounded in frames and in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any

from fastapi_channels.settings import OverflowPolicy

__all__ = ["Frame", "Outbox"]

#: The ASGI event of a frame; it may be shared, nobody changes it.
Frame = dict[str, Any]


class Outbox:
    """The frames that wait for one client's socket, oldest first.

    Args:
        max_frames: How many may wait.
        max_bytes: How many bytes may wait; a single frame may be larger.
        overflow: What a frame does that finds it full.
    """

    __slots__ = ("_bytes", "_frames", "_max_bytes", "_max_frames", "_overflow")

    def __init__(self, max_frames: int, max_bytes: int, overflow: OverflowPolicy) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._overflow = overflow
        self._frames: deque[tuple[Frame, int, Hashable]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def is_full(self) -> bool:
        """Whether the next frame would be one too many."""
        return len(self._frames) >= self._max_frames or self._bytes >= self._max_bytes

    def put(self, frame: Frame, size: int, key: Hashable = None) -> int | None:
        """Add a frame as the overflow policy lets it, and return how many frames were dropped for it, itself included.

        Args:
            frame: The frame.
            size: Of its payload, in bytes.
            key: Under the policy `latest`, a frame that waits is replaced by a newer one of the same key.

        Returns:
            None if the policy is to close: the frame is not added.
        """
        if self._overflow == "latest" and key is not None and self._replace(frame, size, key):
            return 1
        if self.is_full and self._overflow == "close":
            return None
        if self.is_full and self._overflow == "drop_newest":
            return 1
        dropped = 0
        while self.is_full:
            self.pop()
            dropped += 1
        self._frames.append((frame, size, key))
        self._bytes += size
        return dropped

    def put_last(self, frame: Frame) -> None:
        """Add the close frame, for which there is always room."""
        self._frames.append((frame, 0, None))

    def pop(self) -> Frame:
        """Take out the oldest frame."""
        frame, size, _ = self._frames.popleft()
        self._bytes -= size
        return frame

    def clear(self) -> None:
        """Drop all frames."""
        self._frames.clear()
        self._bytes = 0

    def _replace(self, frame: Frame, size: int, key: Hashable) -> bool:
        for index, (_, replaced, waiting_key) in enumerate(self._frames):
            if waiting_key == key:
                self._frames[index] = frame, size, key
                self._bytes += size - replaced
                return True
        return False
