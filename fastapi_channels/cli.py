"""The commands of `python -m fastapi_channels`. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from pydantic_core import from_json

from fastapi_channels.exceptions import ChannelsError, InvalidGroupName, InvalidMessage, SettingsError
from fastapi_channels.layers.publisher import Publisher

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line, without the program's name; None for this process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m fastapi_channels", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    send = commands.add_parser(
        "send",
        help="send a message to a group",
        description="Send a message to every member of a group, in every process of the application.",
    )
    send.add_argument("group", help="the group's name")
    send.add_argument("message", help='a JSON object with a "type"; - reads it from standard input')
    which = send.add_mutually_exclusive_group()
    which.add_argument("--url", help="the layer's URL, such as redis://localhost:6379/0")
    which.add_argument("--settings", help="the application's settings module, such as app.settings")
    send.add_argument("--alias", default="default", help="which layer of the settings (default: %(default)s)")
    send.set_defaults(run=_send)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (SettingsError, InvalidGroupName, InvalidMessage) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except ChannelsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _send(given: argparse.Namespace) -> None:
    text = sys.stdin.buffer.read() if given.message == "-" else given.message
    try:
        message = from_json(text)
    except ValueError as error:
        raise InvalidMessage(f"the message is not JSON: {error}") from error
    if given.settings is not None:
        sys.path.insert(0, os.getcwd())  # as `uvicorn app:app` does
    # Not entered, which would connect before it has looked at the message.
    with contextlib.closing(Publisher(given.url, settings=given.settings, alias=given.alias)) as publisher:
        publisher.group_send(given.group, message)
