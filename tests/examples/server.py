"""A server for tests that want the real thing: uvicorn in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Self

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0

RUNNING = re.compile(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")


class Server:
    """A running uvicorn; `start` makes it.

    Attributes:
        port: The port that it listens on.
        log: The lines that it has logged.
    """

    def __init__(self, process: Process) -> None:
        assert process.stderr is not None
        self.port = 0
        self.log: list[str] = []
        self._process = process
        self._stderr = BufferedByteReceiveStream(process.stderr)

    @classmethod
    async def start(cls, app: str, port: int = 0) -> Self:
        """Serve an application on a port, a free one by default; returns when it listens."""
        command = [sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port)]
        server = cls(await anyio.open_process(command, stdout=subprocess.DEVNULL))
        try:
            with anyio.fail_after(START_TIMEOUT):
                while not (found := RUNNING.search(await server._read_line())):
                    pass
        except BaseException:
            await server.stop()
            await server.aclose()
            print(*server.log, sep="\n")
            raise
        server.port = int(found[1])
        return server

    @property
    def url(self) -> str:
        """Where it is found."""
        return f"http://127.0.0.1:{self.port}"

    async def read_log(self) -> None:
        """Read the log to its end; somebody has to, since a full pipe would stop the server."""
        try:
            while True:
                await self._read_line()
        except (anyio.EndOfStream, anyio.IncompleteRead):
            pass

    async def _read_line(self) -> str:
        line = (await self._stderr.receive_until(b"\n", 65536)).decode().rstrip()
        self.log.append(line)
        return line

    async def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal, if it is still there, and wait until it is gone."""
        with anyio.CancelScope(shield=True):
            if self._process.returncode is None:
                self._process.send_signal(by)
            with anyio.move_on_after(STOP_TIMEOUT):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def aclose(self) -> None:
        """Close the pipe; once it is stopped and its log is read."""
        await self._process.aclose()


#: `await start_server(app, port)`: like `Server.start`, and ended with the test.
StartServer = Callable[..., Awaitable[Server]]
