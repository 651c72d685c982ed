"""What `permission_classes`, `throttle_classes` and the like list: classes, instances, and what stands for one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from fastapi_channels.exceptions import DefinitionError

__all__ = ["entries_of", "instance_of", "name_of"]

Made = TypeVar("Made")


def entries_of(specs: Any, attribute: str) -> Collection[Any]:
    """The entries of such a list, which is looked at more than once: what could be read only once would then be empty.

    Raises:
        DefinitionError: It is no list.
    """
    if not isinstance(specs, Collection) or isinstance(specs, str | bytes | Mapping):
        raise DefinitionError(f"{attribute} is a list, not {specs!r}")
    return specs


def instance_of(cls: type[Made]) -> Made:
    """The instance that a class in such a list stands for.

    Raises:
        DefinitionError: It can't be made without arguments, or is abstract.
    """
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise DefinitionError(f"{cls.__name__} defines no {' and no '.join(missing)}")
    try:
        return cls()
    except TypeError as error:
        raise DefinitionError(f"{cls.__name__} needs arguments: give an instance of it ({error})") from error


def name_of(cls: type) -> str:
    """What a class is called, and no other is, in every process."""
    return f"{cls.__module__}:{cls.__qualname__}"
