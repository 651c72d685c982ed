"""The house has floors and seams, and the code keeps to them."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fastapi_channels

ROOT = Path(fastapi_channels.__file__).parent

#: From the ground up; a module imports from its own floor and those below. Nothing is above `testing`.
FLOORS = [
    {"exceptions", "_tasks", "_specs"},
    {"settings"},
    {"layers"},
    {"_fastapi", "answers", "handshake", "dependencies", "origins", "pace", "_server_logs"},
    {"_fastapi_limiter"},
    {"application"},
    {"authentication", "permissions", "throttling"},
    {"gate", "outbox", "connection"},
    {"consumers"},
    {"routing"},
    {"api", "decorators", "permission"},
    {"channels"},
    {"used"},
    {"cli"},
    {"testing"},
]

#: Where each package that only a part of us needs comes in.
DOORS = {
    "asgi_lifespan": {"testing.lifespan"},
    "broadcaster": {
        "layers.broadcaster.layer",
        "layers.broadcaster.link",
        "layers.broadcaster.redis",
        "layers.broadcaster.source",
    },
    "cryptography": {"layers.wire"},
    "hiredis": {"layers.redis.link"},
    "jwt": {"authentication"},
    "pydantic_settings": {"settings"},
    "pytest": {"testing.contract", "testing.plugin"},
    "redis": {
        "_fastapi_limiter",
        "layers.broadcaster.redis",
        "layers.redis.layer",
        "layers.redis.link",
        "layers.redis.links",
        "layers.redis.servers",
    },
}

TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(module: str) -> int:
    """On which floor a module is."""
    (number,) = [number for number, names in enumerate(FLOORS) if module.partition(".")[0] in names]
    return number


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, and every name that is imported from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    """The modules of ours that are imported, without the package's name."""
    found = set()
    for name in imported(tree):
        if name.startswith("fastapi_channels."):
            inner = name.removeprefix("fastapi_channels.")
            found.add(inner if inner in TREES else inner.rpartition(".")[0])
    return found


def test_every_module_has_a_floor() -> None:
    """Each module is on one floor, and each floor is inhabited."""
    modules = {module.partition(".")[0] for module in TREES} - {"__init__", "__main__"}
    assert modules == {name for names in FLOORS for name in names}
    assert sum(len(names) for names in FLOORS) == len(modules)


def test_imports_go_down() -> None:
    """No module imports from a floor above its own, not even for types or late."""
    wrong = [
        f"{module} imports {other}"
        for module, tree in TREES.items()
        if module not in {"__init__", "__main__"}
        for other in ours(tree)
        if floor(other) > floor(module)
    ]
    assert wrong == []


def test_imports_make_no_circle() -> None:
    """What a module imports while it is imported does not import that module."""
    graph = {}
    for module, tree in TREES.items():
        top = ast.Module(
            [node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.Import | ast.ImportFrom)], []
        )
        graph[module] = ours(top) - {module}
    list(TopologicalSorter(graph).static_order())


def test_optional_packages_have_one_door() -> None:
    """A package that only a part of us needs is imported there and nowhere else."""
    doors = {
        package: {
            module
            for module, tree in TREES.items()
            if any(name.partition(".")[0] == package for name in imported(tree))
        }
        for package in DOORS
    }
    assert doors == DOORS


def test_tasks_are_started_in_one_place() -> None:
    """Only `_tasks` starts tasks, so that each has an owner and dies loudly; the testing kit is no part of it."""
    starters = {
        "create_task",
        "ensure_future",
        "create_task_group",
        "TaskGroup",
        "start_soon",
        "run_coroutine_threadsafe",
    }
    wrong = []
    for module, tree in TREES.items():
        if module == "_tasks" or module.partition(".")[0] == "testing":
            continue
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            if name in starters:
                wrong.append(f"{module} has {name}")
        wrong += [f"{module} imports {name}" for name in imported(tree) if name.rpartition(".")[2] in starters]
    assert wrong == []


def test_the_socket_is_written_in_one_place() -> None:
    """Only `connection` calls what writes to a WebSocket."""
    writers = {"accept", "close", "send", "send_bytes", "send_denial_response", "send_json", "send_text"}
    writing = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers
        if ast.unparse(node.func.value).rpartition(".")[2] == "websocket"
    }
    assert writing == {"connection", "exceptions"}  # the handler of the latter is for WebSockets of others


def test_private_things_of_others_are_in_one_place() -> None:
    """What FastAPI and Starlette don't document is used in `_fastapi` only."""
    modules = ("fastapi.dependencies", "fastapi._", "starlette._")
    keys = ("fastapi_inner_", "fastapi_function_", "starlette.")
    defined = {name for tree in TREES.values() for name in _defined(tree)}
    wrong = []
    for module, tree in TREES.items():
        if module == "_fastapi":
            continue
        for name in imported(tree):
            is_private = name.startswith(modules) or _is_private(name.rpartition(".")[2])
            if is_private and not name.startswith("fastapi_channels."):
                wrong.append(f"{module} imports {name}")
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(attr=name) if _is_private(name) and name not in defined:
                    wrong.append(f"{module} uses {ast.unparse(node)}")
                case ast.Constant(value=str(name)) if name.startswith(keys) or (
                    _is_private(name) and name not in defined
                ):
                    wrong.append(f"{module} names {name!r}")
    assert wrong == []


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def _defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines: of variables, attributes, functions, classes and slots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
