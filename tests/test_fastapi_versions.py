"""The oldest versions that we say we support: the tests that lean on FastAPI pass on them too.

The newest are those that the rest of the run has. The oldest need an environment of their own, made in pytest's cache
with pip: where `CI` or `TEST_OLDEST` is set, and wherever it has been made before.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

#: What is run there: whatever calls FastAPI, Starlette, pydantic or anyio.
TESTS = [
    "tests/consumers/test_actions.py",
    "tests/consumers/test_endpoint.py",
    "tests/consumers/test_events.py",
    "tests/consumers/test_json.py",
    *(f"tests/layers/test_{name}.py" for name in ("base", "carrier", "envelope", "inbox", "memory", "names")),
    "tests/test_application.py",
    "tests/test_channels.py",
    "tests/test_dependencies.py",
    "tests/test_gate.py",
    "tests/test_origins.py",
    "tests/test_permissions.py",
    "tests/test_routing.py",
    "tests/test_settings.py",
    "tests/test_tasks.py",
    "tests/test_testing.py",
]

#: What the tests import beside; any version will do.
BESIDE = ["httpx", "uvicorn", "websockets", "wsproto"]

# AnyIO's plugin had no automatic mode then.
PLUGIN = """
import inspect
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    if inspect.iscoroutinefunction(obj):
        pytest.mark.anyio(obj)
    return (yield)
"""

INI = """
[pytest]
addopts = --import-mode=importlib -p no:cacheprovider -p oldest
"""


def oldest() -> list[str]:
    """The requirements of the package and of its testing kit, each at its minimum."""
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["testing"]]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements]
    assert all(found), requirements
    return [f"{match[1]}=={match[2]}" for match in found if match]


def run(*command: str | Path, timeout: float = 600) -> str:
    """Run a command in the repository, and return what it prints; fails with that if the command does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture
def python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment with the oldest versions."""
    if sys.version_info >= (3, 14):
        pytest.skip("the oldest pydantic is older than this Python")
    cache = request.config.cache
    assert cache is not None
    home = cache.mkdir("oldest")
    made = home / "made"
    python = home / "venv" / "bin" / "python"
    if not (os.environ.get("CI") or os.environ.get("TEST_OLDEST") or made.exists()):
        pytest.skip("TEST_OLDEST=1 makes an environment with the oldest versions, and runs tests there")
    wanted = [*oldest(), *BESIDE]
    state = f"{ROOT} {sys.version} {wanted}"
    if not made.exists() or made.read_text() != state:
        run(sys.executable, "-m", "venv", "--clear", home / "venv")
        run(
            python,
            "-m",
            "pip",
            "install",
            "--no-input",
            "--disable-pip-version-check",
            "--quiet",
            "--editable",
            ROOT,
            *wanted,
        )
        made.write_text(state)
    (home / "venv" / "pytest.ini").write_text(INI)
    (home / "venv" / "oldest.py").write_text(PLUGIN)
    return python


def test_the_oldest_versions(python: Path) -> None:
    """On the oldest FastAPI, pydantic and anyio that the package allows, whatever leans on them works."""
    versions = run(python, "-m", "pip", "list", "--disable-pip-version-check", "--format=freeze").lower()
    for requirement in oldest():
        assert re.search(rf"^{requirement.replace('-', '[-_]')}(\.0)*$", versions, re.MULTILINE), versions
    venv = python.parent.parent
    tests = [test for test in TESTS if (ROOT / test).exists()]
    config: list[str | Path] = ["-c", venv / "pytest.ini", f"--rootdir={ROOT}", "-o", f"pythonpath={ROOT} {venv}"]
    output = run("env", f"PYTHONPATH={venv}", python, "-m", "pytest", "-q", "--tb=short", *config, *tests)
    assert re.search(r"^\d+ passed", output, re.MULTILINE), output
