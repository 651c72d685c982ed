"""What the package offers: names, docstrings, types."""

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastapi_channels
from fastapi_channels import exceptions
from fastapi_channels.exceptions import ChannelsError
from fastapi_channels.testing import connect
from tests.typing_examples import app

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(fastapi_channels.__path__, "fastapi_channels.")
    if not any(part.startswith("_") for part in found.name.split("."))
)

#: What the documentation tells users to import, by module; a name may come to it and never go.
PROMISED = {
    "fastapi_channels": ["Channels", "Layer", "add_channel", "channel_layer", "get_channel_layer"],
    "fastapi_channels.consumers": [
        "ActionConsumer",
        "JsonConsumer",
        "WebSocketConsumer",
        "action",
        "event",
    ],
    "fastapi_channels.exceptions": [
        "ActionCancelled",
        "ActionTimeout",
        "ChannelFull",
        "ChannelsError",
        "ConsumerError",
        "DefinitionError",
        "FrameTooLarge",
        "InvalidData",
        "InvalidFrame",
        "InvalidGroupName",
        "InvalidMessage",
        "LayerError",
        "LayerUnavailable",
        "SettingsError",
        "UnknownAction",
    ],
    "fastapi_channels.layers": [
        "ChannelFull",
        "ChannelLayer",
        "InvalidGroupName",
        "InvalidMessage",
        "LayerUnavailable",
        "MemoryLayer",
        "Message",
        "Receipt",
        "safe_name",
    ],
    "fastapi_channels.routing": ["ConsumerRouter", "route"],
    "fastapi_channels.settings": ["ChannelsSettings"],
    "fastapi_channels.testing": [
        "ConnectionClosed",
        "LayerContract",
        "RefusedResponse",
        "WebSocketSession",
        "connect",
    ],
}


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """The names of a module's `__all__`, with what they stand for."""
    return [(name, getattr(module, name)) for name in module.__all__]


@pytest.mark.parametrize("name", ["fastapi_channels", *MODULES])
def test_names(name: str) -> None:
    """Each public module has a sorted `__all__`, without repeats, and every name in it is there."""
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    for public_name in module.__all__:
        assert not public_name.startswith("_")
        assert hasattr(module, public_name)


@pytest.mark.parametrize("name", PROMISED)
def test_names_that_are_promised(name: str) -> None:
    """What the documentation tells users to import is in the module's `__all__`."""
    assert set(PROMISED[name]) <= set(importlib.import_module(name).__all__)


@pytest.mark.parametrize("name", ["fastapi_channels", *MODULES])
def test_docstrings(name: str) -> None:
    """Each module, and each public class, function and method in it, has a docstring, or overrides what has one."""
    module = importlib.import_module(name)
    assert module.__doc__
    missing = []
    for public_name, value in public(module):
        if inspect.isclass(value) and value.__module__ == name:
            if not vars(value).get("__doc__"):
                missing.append(public_name)
            for attribute, member in vars(value).items():
                is_ours = getattr(inspect.unwrap(_function(member)), "__module__", None) == name
                if not attribute.startswith("_") and is_ours and not inspect.getdoc(getattr(value, attribute)):
                    missing.append(f"{public_name}.{attribute}")
        elif inspect.isroutine(value) and not inspect.getdoc(value):
            missing.append(public_name)
    assert missing == []


def _function(member: Any) -> Any:
    """The function behind a method or a property."""
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, (staticmethod, classmethod)) else member


@pytest.mark.parametrize("name", MODULES)
def test_comments_of_other_names(name: str) -> None:
    """A public name that is no class and no function (an alias of a type, say) has a `#:` comment above it."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    source = Path(module.__file__).read_text("utf-8")
    lines = source.splitlines()
    undocumented = []
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            is_public = isinstance(target, ast.Name) and target.id in module.__all__
            if is_public and not lines[node.lineno - 2].startswith("#:"):
                undocumented.append(ast.unparse(target))
    assert undocumented == []


def test_every_exception_is_in_exceptions() -> None:
    """Every exception of ours can be imported from `fastapi_channels.exceptions`; the testing kit's are its own."""
    found = {
        value
        for name in MODULES
        for _, value in public(importlib.import_module(name))
        if inspect.isclass(value) and issubclass(value, BaseException) and ".testing" not in value.__module__
    }
    assert {getattr(exceptions, error.__name__, None) for error in found} == found
    assert all(issubclass(error, ChannelsError) for error in found)


def test_the_tree_of_exceptions() -> None:
    """The tree at the head of `exceptions.py` is the tree that there is."""
    assert exceptions.__doc__ is not None
    (drawn,) = re.findall(r"```\n(.*?)```", exceptions.__doc__, re.DOTALL)
    parents: list[str] = []
    names = set()
    for line in drawn.splitlines():
        match = re.match(r"([ │├└─]*)(\w+)( \((\w+)\))?", line)
        assert match is not None, line
        depth, name, builtin = len(match[1]) // 4, match[2], match[4]
        bases = [*([parents[depth - 1]] if depth else ["Exception"]), *([builtin] if builtin else [])]
        assert [base.__name__ for base in getattr(exceptions, name).__bases__] == bases
        parents[depth:] = [name]
        names.add(name)
    assert names == set(exceptions.__all__)


def test_the_package_is_typed() -> None:
    """Type checkers are told that the package has types."""
    assert files(fastapi_channels).joinpath("py.typed").is_file()


async def test_user_code_runs() -> None:
    """The user code that type checkers are given works as it stands."""
    for path in ("/v1/ws/chat/lobby", "/v1/ws/decorated?room=lobby"):
        async with connect(app, path) as ws:
            assert ws.accepted
            await ws.send_json({"action": "count", "request_id": 1, "data": 2})
            assert [(await ws.receive_json())["data"] for _ in range(3)] == [0, 1, None]


def test_the_distribution() -> None:
    """The distribution is fastapi-channels for Python 3.11 and newer, and needs nothing that only tests need."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert (project["name"], project["requires-python"]) == ("fastapi-channels", ">=3.11")
    assert sorted(re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]) == [
        "anyio",
        "fastapi",
        "pydantic",
        "pydantic-settings",
        "typing-extensions",
    ]
