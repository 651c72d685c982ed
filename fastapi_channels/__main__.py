"""The command line: `python -m fastapi_channels`."""

from __future__ import annotations

import sys

from fastapi_channels.cli import main

if __name__ == "__main__":
    sys.exit(main())
