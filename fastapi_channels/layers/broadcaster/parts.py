"""Messages that are too large for a broker, in parts.

```
p<sender>:<number of the message>:<number of the part>:<how many there are> <piece of the message>
```
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field

__all__ = ["LARGEST", "Parts", "parts_of"]

#: How many bytes a message that is sent in parts has at most.
LARGEST = 16 * 1024 * 1024

#: How many characters of unfinished messages are kept, of all senders.
UNFINISHED = 4 * LARGEST

#: How many bytes the head of a part has at most.
HEAD = 64

_HEAD = re.compile(r"p(\w{1,20}):(\d{1,15}):(\d{1,9}):(\d{1,9}) ")


def parts_of(data: bytes, size: int, sender: str, number: int) -> list[str]:
    """A message of UTF-8 as texts of at most `size` bytes."""
    pieces = []
    start = 0
    while start < len(data):
        end = start + size - HEAD
        while end < len(data) and data[end] & 0xC0 == 0x80:  # not within a character
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return [f"p{sender}:{number}:{index}:{len(pieces)} {piece}" for index, piece in enumerate(pieces)]


@dataclass(slots=True)
class _Unfinished:
    number: str
    pieces: list[str] = field(default_factory=list)
    size: int = 0


class Parts:
    """Puts messages together.

    The parts of a message come in order, and those of the sender's next message after them. A message that lacks a part
    is lost, and so is the oldest when more is unfinished than can be kept.
    """

    def __init__(self) -> None:
        self._unfinished: OrderedDict[tuple[str, str], _Unfinished] = OrderedDict()
        self._size = 0

    def add(self, address: str, text: str) -> str | None:
        """What has come to an address: returns it if it is no part, the message if this was its last part, or None."""
        head = _HEAD.match(text)
        if head is None:
            return text
        sender, number, index, count = head[1], head[2], int(head[3]), int(head[4])
        key = (address, sender)
        if index == 0:
            self._forget(key)
            self._unfinished[key] = _Unfinished(number)
        message = self._unfinished.get(key)
        if message is None or message.number != number or len(message.pieces) != index:
            self._forget(key)
            return None
        message.pieces.append(text[head.end() :])
        message.size += len(text)
        self._size += len(text)
        if index + 1 == count:
            self._forget(key)
            return "".join(message.pieces)
        while self._size > UNFINISHED:
            self._forget(next(iter(self._unfinished)))
        return None

    def _forget(self, key: tuple[str, str]) -> None:
        message = self._unfinished.pop(key, None)
        if message is not None:
            self._size -= message.size
