"""Who is in which room, as far as this process knows."""

from collections import Counter, defaultdict


class People:
    """The names of those who are connected to this process, by group.

    Only good for a server of one process: another one has its own people, and a channel layer doesn't carry them over.
    Somebody with two windows counts once.
    """

    def __init__(self) -> None:
        self._connections: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def enter(self, group: str, name: str) -> bool:
        """Count one more connection of that name; returns whether it is the first."""
        self._connections[group][name] += 1
        return self._connections[group][name] == 1

    def leave(self, group: str, name: str) -> bool:
        """Count one connection less of that name; returns whether it was the last."""
        names = self._connections[group]
        names[name] -= 1
        is_gone = names[name] <= 0
        if is_gone:
            del names[name]
        if not names:
            del self._connections[group]
        return is_gone

    def of(self, group: str) -> list[str]:
        """The names in a group, sorted."""
        return sorted(self._connections.get(group, ()))
