"""Checks that a wheel holds the package, all of it, and nothing else."""

import sys
import zipfile
from pathlib import Path

PACKAGE = "fastapi_channels"


def problems(wheel: Path) -> list[str]:
    names = set(zipfile.ZipFile(wheel).namelist())
    content = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    source = Path(__file__).parent.parent / PACKAGE
    wanted = {
        f"{PACKAGE}/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = [f"not in the wheel: {name}" for name in sorted(wanted - content)]
    found += [f"doesn't belong in the wheel: {name}" for name in sorted(content - wanted)]
    if f"{PACKAGE}/py.typed" not in content:
        found.append(f"there is no {PACKAGE}/py.typed")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("there is no LICENSE")
    return found


if __name__ == "__main__":
    wheel = Path(sys.argv[1])
    found = problems(wheel)
    print(*found or [f"{wheel.name} holds {PACKAGE} and nothing else"], sep="\n")
    sys.exit(bool(found))
