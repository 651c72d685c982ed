"""A server for tests that want the real thing: uvicorn in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Self

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

#: In the place of an application: what `scripts/demo` runs.
DEMO = "examples.chat.serve"

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0

RUNNING = re.compile(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")
READY = "Application startup complete."


class Server:
    """A running uvicorn; `start` makes it.

    Attributes:
        port: The port that it listens on.
        pid: The process that was started; with several workers, the one that watches over them.
        log: The lines that it has logged.
    """

    def __init__(self, process: Process) -> None:
        assert process.stderr is not None
        self.port = 0
        self.pid = process.pid
        self.log: list[str] = []
        self._process = process
        self._stderr = BufferedByteReceiveStream(process.stderr)

    @classmethod
    async def start(cls, app: str, port: int = 0, *options: str, workers: int = 1) -> Self:
        """Serve an application on a port, a free one by default; returns when all workers are ready."""
        what = [DEMO] if app == DEMO else ["uvicorn", app]
        command = [sys.executable, "-m", *what, "--host", "127.0.0.1", "--port", str(port), *options]
        if workers > 1:
            command += ["--workers", str(workers)]
        server = cls(await anyio.open_process(command, stdout=subprocess.DEVNULL, start_new_session=True))
        try:
            with anyio.fail_after(START_TIMEOUT):
                await server._started(workers)
        except BaseException:
            await server.stop()
            await server.aclose()
            print(*server.log, sep="\n")
            raise
        return server

    @property
    def url(self) -> str:
        """Where it is found."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def returncode(self) -> int | None:
        """The exit code of the process that was started; None while it runs."""
        return self._process.returncode

    async def read_log(self) -> None:
        """Read the log to its end; somebody has to, since a full pipe would stop the server."""
        try:
            while True:
                await self._read_line()
        except (anyio.EndOfStream, anyio.IncompleteRead):
            pass

    async def _started(self, workers: int) -> None:
        ready = 0
        while not self.port or ready < workers:
            line = await self._read_line()
            ready += READY in line
            if found := RUNNING.search(line):
                self.port = int(found[1])
        while True:  # workers say that they are ready just before they listen
            try:
                await (await anyio.connect_tcp("127.0.0.1", self.port)).aclose()
                return
            except OSError:
                await anyio.sleep(0.01)

    async def _read_line(self) -> str:
        line = (await self._stderr.receive_until(b"\n", 65536)).decode().rstrip()
        self.log.append(line)
        return line

    async def stop(self, by: signal.Signals = signal.SIGTERM, *, group: bool = False) -> None:
        """End it by a signal, if it is still there, and wait until it is gone.

        Args:
            by: The signal.
            group: Whether all processes get it, as from a terminal, or only the one that was started.
        """
        with anyio.CancelScope(shield=True):
            if self.returncode is None:
                (os.killpg if group else os.kill)(self.pid, by)
            with anyio.move_on_after(STOP_TIMEOUT):
                await self._process.wait()
            if self.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)
                await self._process.wait()

    async def aclose(self) -> None:
        """Close the pipe; once it is stopped and its log is read."""
        await self._process.aclose()


#: `await start_server(app, port)`: like `Server.start`, and ended with the test.
StartServer = Callable[..., Awaitable[Server]]
