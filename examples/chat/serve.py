"""Serves the chat with any number of processes; `scripts/demo` runs this.

Several processes hear each other over Redis or Valkey. If nobody says over which one, one is started with them.
"""

import argparse
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

APP = "examples.chat.main:app"


class Parser(argparse.ArgumentParser):
    """What is wrong is said in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def fail(self, message: object) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}\n")


def number_of_processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def main() -> None:
    import click  # not at the top: see the end
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    parser = Parser("scripts/demo", description=__doc__, epilog="Any other option is uvicorn's.", allow_abbrev=False)
    parser.add_argument("--workers", metavar="N", type=number_of_processes, default=1, help="how many processes; 1")
    parser.add_argument("--redis", metavar="URL", help="redis://..., redis+sentinel://... or redis+cluster://...")
    given, options = parser.parse_known_args()
    try:
        command = uvicorn.main.make_context(
            parser.prog, [APP, "--ws-per-message-deflate", "false", *options, "--workers", str(given.workers)]
        )
    except click.ClickException as error:
        parser.error(error.format_message())
    except click.exceptions.Exit:  # --version
        return
    if command.params["reload"] and given.workers > 1:
        parser.error("uvicorn reloads one process only: --reload or --workers, not both")

    with ExitStack() as stack:
        url, layer = layer_for(given, parser, stack)
        os.environ["CHANNELS_CHANNEL_LAYERS"] = json.dumps({"default": url})  # stronger than settings.py
        print(f"\n  Open {address(command.params)} in two windows and talk to yourself. Ctrl-C ends the demo.")
        print(f"  Processes: {given.workers}. Layer: {layer}.\n", flush=True)
        # uvicorn would answer a hang-up with new processes, and go on for ever after its terminal was closed.
        Multiprocess.handle_hup = Multiprocess.handle_term  # type: ignore[method-assign]
        with command:
            command.command.invoke(command)


def layer_for(given: argparse.Namespace, parser: Parser, stack: ExitStack) -> tuple[str, str]:
    """The URL of the layer, and what to tell of it; a broker that has to be started ends with the stack."""
    if given.redis is None and given.workers == 1:
        return "memory://", "in memory"

    import asyncio

    from fastapi_channels.exceptions import LayerUnavailable, SettingsError
    from fastapi_channels.layers import RedisLayer
    from fastapi_channels.testing import RedisServer

    if given.redis is None:
        try:
            server = stack.enter_context(RedisServer())
        except RuntimeError as error:
            parser.fail(error)
        return server.url, f"{Path(server.binary).name} on port {server.port}, started for this demo"

    async def reach(layer: RedisLayer) -> None:
        async with layer:
            pass

    try:
        asyncio.run(reach(RedisLayer(given.redis)))
    except LayerUnavailable as error:
        parser.fail(error)
    except (SettingsError, ValueError) as error:
        parser.error(f"--redis: {error}")
    return given.redis, "the Redis of --redis"


def address(options: dict[str, Any]) -> str:
    """Where a browser finds the server."""
    host, port = options["host"], options["port"]
    if port == 0:
        return "the address that uvicorn tells below"
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    scheme = "https" if options["ssl_keyfile"] else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


# In uvicorn's workers this module is __mp_main__. Until uvicorn has a handler of its own, Ctrl-C ends a process on the
# spot, with no traceback of what it was just importing; so what takes its time is imported after this.
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if __name__ == "__main__":
    main()
