"""The documentation is true: its code runs, its links lead somewhere, and what there is stands in it.

How the code of README.md and docs/*.md is run, by one test for each page:

- The `python` blocks of a page run in order, in one namespace and on one event loop; `await` may stand at their top
  level. They hold real asserts. What must not run is of another language: `text`, `console`, `json`, `toml`, `js`.
- A block whose first line is a path, such as `# app/main.py`, is a file. It is written into a folder of the page's own,
  which is on `sys.path`, and imported. A later block of the same path replaces it, and all files are imported anew.
- Files called `test_*.py`, and `conftest.py`, are not imported. At the end of the page pytest runs them, in a process
  of its own whose working directory is the folder.
"""

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

import fastapi_channels
import fastapi_channels.consumers
import fastapi_channels.exceptions
import fastapi_channels.layers
import fastapi_channels.routing
import fastapi_channels.settings
import fastapi_channels.testing
from fastapi_channels.exceptions import ConsumerError
from fastapi_channels.settings import ChannelsSettings

ROOT = Path(__file__).parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
WITH_CODE = [ROOT / "README.md", *DOCS]
WITH_LINKS = [*WITH_CODE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
#: For users; how the package is made is told in design.md, and counts for nothing here.
FOR_USERS = [page for page in DOCS if page.name != "design.md"]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>[\w-]*)[^`\n]*$")
FILE = re.compile(r"# (?P<path>(?:[a-z_][a-z0-9_]*/)*[a-z_][a-z0-9_]*\.py)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# The code


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the number of the text's first line."""

    language: str
    text: str
    line: int

    @property
    def path(self) -> str | None:
        """The path of the file that the block is, if it is one."""
        match = FILE.fullmatch(self.text.partition("\n")[0])
        return None if match is None else match["path"]

    @property
    def padded(self) -> str:
        """The text on its line of the page, so that a traceback shows where that is."""
        return "\n" * (self.line - 1) + self.text


def blocks_of(page: Path) -> list[Block]:
    return list(_blocks_in(page.read_text()))


def _blocks_in(page: str) -> Iterator[Block]:
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        indent, fence = opening["indent"], opening["fence"]
        text = []
        for _, inner in lines:
            if inner.strip() == fence:
                break
            text.append(inner.removeprefix(indent))
        else:
            raise ValueError(f"the block of line {number} has no end")
        yield Block(opening["language"], "\n".join(text) + "\n", number + 1)


class Runner:
    """Runs the blocks of one page."""

    def __init__(self, page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page = page
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.has_tests = False
        # What is made in it, dataclasses and models above all, looks for its module.
        self.module = types.ModuleType("page_" + re.sub(r"\W", "_", page.stem.lower()))
        monkeypatch.setitem(sys.modules, self.module.__name__, self.module)
        monkeypatch.syspath_prepend(folder)
        # A file may be replaced within a second by one of the same size, which a .pyc would hide.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    async def run(self, block: Block) -> None:
        path = block.path
        if path is not None:
            self.write(path, block)
            return
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(block.padded, str(self.page), "exec", flags=flags, dont_inherit=True)
        result = eval(code, self.module.__dict__)
        if inspect.iscoroutine(result):
            await result

    def write(self, path: str, block: Block) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.padded)
        self.forget()
        if file.name.startswith("test_"):
            self.has_tests = True
        elif file.name != "conftest.py":
            names = path.removesuffix(".py").split("/")
            self.make_way(names[0])
            importlib.invalidate_caches()
            importlib.import_module(".".join(names))

    async def test(self) -> None:
        """Run the tests that the page has."""
        if self.has_tests:
            command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
            done = await anyio.run_process(command, cwd=self.folder, check=False)
            assert done.returncode == 0, f"{name_of(self.page)}\n{done.stdout.decode()}{done.stderr.decode()}"

    def make_way(self, package: str) -> None:
        """Put modules of others aside that have the name of a package of the page."""
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                self.monkeypatch.delitem(sys.modules, name)

    def forget(self) -> None:
        """Have the page's modules imported anew."""
        for name, module in list(sys.modules.items()):
            places = [getattr(module, "__file__", None)]
            with contextlib.suppress(KeyError):  # a namespace package whose parent was made way for has no path now
                places += getattr(module, "__path__", ())
            if any(isinstance(place, str) and Path(place).is_relative_to(self.folder) for place in places):
                del sys.modules[name]


@pytest.fixture
def environment() -> Iterator[None]:
    """Variables that a page sets are gone after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
async def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python of a page does what the page says."""
    runner = Runner(page, tmp_path, monkeypatch)
    try:
        for block in blocks_of(page):
            if block.language == "python":
                await runner.run(block)
        await runner.test()
    finally:
        runner.forget()


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_has_a_language(page: Path) -> None:
    """A block without one would neither be run nor be seen not to be."""
    unnamed = [block.line for block in blocks_of(page) if not block.language]
    assert unnamed == []


# The links


def without_code(page: str) -> str:
    """The text of a page without its blocks and its code in line, on the same lines."""
    kept, fence = [], ""
    for line in page.splitlines():
        match = FENCE.match(line)
        if fence:
            kept.append("")
            if line.strip() == fence:
                fence = ""
        elif match is not None:
            fence = match["fence"]
            kept.append("")
        else:
            kept.append(line)
    return re.sub(r"(`+)[^`\n]+?\1", "", "\n".join(kept))


def links_of(page: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(without_code(page.read_text()).splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if not re.match(r"[a-z]+:", target):
                yield number, target


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    fences = {number for block in blocks_of(page) for number in _lines_of(block)}
    found: dict[str, int] = {}
    anchors = set()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        heading = re.match(r"#{1,6} +(.*?)#* *$", line)
        if heading is None or number in fences:
            continue
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        seen = found.get(anchor, 0)
        found[anchor] = seen + 1
        anchors.add(f"{anchor}-{seen}" if seen else anchor)
    return anchors


def _lines_of(block: Block) -> range:
    return range(block.line, block.line + block.text.count("\n"))


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """A relative link names a file that is there, and a heading that is in it."""
    broken = []
    for number, target in links_of(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            broken.append(f"line {number}: {target}")
    assert broken == []


# What stands in it


def text_for_users() -> str:
    return "\n".join(page.read_text() for page in FOR_USERS)


@pytest.mark.parametrize(
    "module",
    [
        fastapi_channels,
        fastapi_channels.consumers,
        fastapi_channels.exceptions,
        fastapi_channels.layers,
        fastapi_channels.routing,
        fastapi_channels.settings,
        fastapi_channels.testing,
    ],
    ids=lambda module: module.__name__,
)
def test_public_names_are_mentioned(module: types.ModuleType) -> None:
    """What can be imported by name is spoken of."""
    text = text_for_users()
    assert [name for name in module.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_methods_are_mentioned() -> None:
    """What a consumer, a layer and a test's connection can do is spoken of, each on its page."""
    pages: dict[str, list[Any]] = {
        "consumers.md": [fastapi_channels.consumers.ActionConsumer, fastapi_channels.consumers.SyncConsumer],
        "layers.md": [fastapi_channels.layers.ChannelLayer, fastapi_channels.layers.SyncChannelLayer],
        "testing.md": [fastapi_channels.testing.WebSocketSession],
    }
    missing = []
    for page, classes in pages.items():
        text = (ROOT / "docs" / page).read_text()
        for cls in classes:
            names = {name for base in cls.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
            missing += [f"{page}: {cls.__name__}.{name}" for name in names if not re.search(rf"\b{name}\b", text)]
    assert sorted(missing) == []


def test_settings_are_described() -> None:
    """Every setting has a row in settings.md, with its default."""
    rows = (ROOT / "docs" / "settings.md").read_text().splitlines()
    missing = []
    for name, field in ChannelsSettings.model_fields.items():
        default = json.dumps(field.default)
        if not any(row.startswith(f"| `{name.upper()}` |") and f"| `{default}` |" in row for row in rows):
            missing.append(f"{name.upper()} with the default {default}")
    assert missing == []


def test_reserved_settings_are_listed() -> None:
    """A name that stops the start because it is not there yet can be found."""
    text = (ROOT / "docs" / "settings.md").read_text()
    assert sorted(name for name in fastapi_channels.settings._NOT_YET if f"`{name}`" not in text) == []


def test_error_codes_are_listed() -> None:
    """Every code of an error frame that is ours can be looked up."""
    text = (ROOT / "docs" / "consumers.md").read_text()
    exceptions = [getattr(fastapi_channels.exceptions, name) for name in fastapi_channels.exceptions.__all__]
    codes = {error.code for error in exceptions if issubclass(error, ConsumerError)}
    assert sorted(code for code in codes if f"`{code}`" not in text) == []
