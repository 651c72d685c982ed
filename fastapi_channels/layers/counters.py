"""What did not arrive, counted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass(slots=True)
class Counters:
    """How many messages and frames did not reach somebody, and why; they only ever grow.

    Attributes:
        inbox_dropped: Messages to a channel whose inbox was full.
        outbox_dropped: Frames to a client that read too slowly.
        expired: Messages that nobody handled in time.
        unhandled: Messages of a type for which the consumer has no handler.
        failed: Messages whose handler raised, or that did not fit its schema.
        unreachable: Messages to a channel that is no more.
        too_slow: Connections closed with 4008.
        gaps: How often this process was deaf for a while, since its connection to the broker was lost; what was sent
            to plain groups meanwhile may be lost.
        uncounted: Frames, connections and requests that throttles couldn't count, since their Redis was away.
        unreadable: Messages from the broker that aren't ours, or are encrypted with other keys.
    """

    inbox_dropped: int = 0
    outbox_dropped: int = 0
    expired: int = 0
    unhandled: int = 0
    failed: int = 0
    unreachable: int = 0
    too_slow: int = 0
    gaps: int = 0
    uncounted: int = 0
    unreadable: int = 0
