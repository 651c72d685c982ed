"""One application in several processes: what reaches whom, and what a client sees when Redis goes and comes back."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import anyio
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fastapi_channels.layers import AsyncPublisher, Publisher
from fastapi_channels.testing import RedisServer
from fastapi_channels.testing.server import Watched
from tests.brokers import ask

DEADLINE = 30.0

ROOT = Path(__file__).parents[2]

APP = "tests.servers.rooms:app"

UVICORN = ["uvicorn", "--app-dir", str(ROOT), "--port", "0", "--timeout-graceful-shutdown", "10"]

GUNICORN = [
    "gunicorn",
    "--chdir",
    str(ROOT),
    "--bind",
    "127.0.0.1:0",
    "--worker-class",
    "uvicorn.workers.UvicornWorker",
]

LISTENING = re.compile(r"(?:Uvicorn running on|Listening at:) http://127\.0\.0\.1:(\d+)")

READY = "Application startup complete."

#: What must not be in the log of a server that had no reason for it.
COMPLAINTS = re.compile(r"Traceback|ERROR|was destroyed|never retrieved|never awaited|ResourceWarning")

PASSWORD = "hunter2%3A%2F%40"


class Server:
    """A server in processes of its own, with the application.

    Attributes:
        port: Where it listens; 0 if it didn't get so far.
    """

    def __init__(self, process: Watched) -> None:
        self.process = process
        self.port = 0
        self.complains = False

    @property
    def log(self) -> str:
        """What it has said so far."""
        with contextlib.suppress(FileNotFoundError):  # it has not even begun
            return self.process.output()
        return ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ready(self, workers: int = 1) -> None:
        """Wait until it takes connections, or has ended; if there are several workers, until so many have started."""
        with anyio.fail_after(DEADLINE):
            for _ in count():
                found = LISTENING.search(log := self.log)
                has_started = workers == 1 or log.count(READY) >= workers
                if found and has_started and await _takes_connections(int(found[1])):
                    self.port = int(found[1])
                    return
                if not self.process.is_running:
                    return
                await anyio.sleep(0.02)

    async def stop(self) -> None:
        """End it as a supervisor would."""
        await asyncio.to_thread(self.process.stop, signal.SIGTERM, DEADLINE)


async def _takes_connections(port: int) -> bool:
    try:
        async with await anyio.connect_tcp("127.0.0.1", port):
            return True
    except OSError:
        return False


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed."""
    with RedisServer(binary=redis_server.binary) as server:
        yield server


Start = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start(tmp_path: Path, redis: RedisServer) -> AsyncIterator[Start]:
    """Start a server, by default on the test's Redis; it ends before that, and must have had nothing to complain of."""
    servers: list[Server] = []

    async def start(
        *options: str,
        url: str = redis.url,
        target: str = APP,
        command: list[str] = UVICORN,
        workers: int = 1,
        **config: Any,
    ) -> Server:
        layers = {"default": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": url, **config}}}
        directory = tmp_path / f"{len(servers)}"
        directory.mkdir()
        variables = [f"CHANNELS_CHANNEL_LAYERS={json.dumps(layers)}"]
        if workers > 1:
            options = ("--workers", f"{workers}", *options)
        else:
            variables.append("PYTHONWARNINGS=always::ResourceWarning")  # uvicorn leaves one of its own with workers
        # Its workers end with it when it is told to.
        process = Watched(
            ["env", *variables, sys.executable, "-m", *command, *options, target],
            directory=directory,
            orphan_signal="TERM",
        )
        server = Server(process)
        servers.append(server)
        await server.ready(workers)
        return server

    yield start
    async with anyio.create_task_group() as stopping:
        for server in servers:
            stopping.start_soon(server.stop)
    for server in servers:
        assert server.complains or not COMPLAINTS.search(server.log), server.log


class Client:
    """A client of the chat."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self._events: deque[dict[str, Any]] = deque()
        self._ids = count()

    async def ask(self, action: str, data: Any = None) -> dict[str, Any]:
        """The reply to an action; events that come before it are kept."""
        request_id = next(self._ids)
        await self.socket.send(json.dumps({"action": action, "request_id": request_id, "data": data}))
        while True:
            frame = await self._frame()
            if frame["type"] == "response":
                assert frame["request_id"] == request_id
                return frame
            self._events.append(frame)

    async def say(self, text: str) -> None:
        assert (await self.ask("say", {"text": text}))["status"] == "ok"

    async def where(self) -> tuple[int, str]:
        """The process that serves it, and its channel."""
        data = (await self.ask("where"))["data"]
        return data["pid"], data["channel"]

    async def heard(self) -> str:
        """The text of the next event."""
        text: str = (self._events.popleft() if self._events else await self._frame())["text"]
        return text

    async def heard_until(self, last: str) -> list[str]:
        """The texts of all events up to this one."""
        texts = [await self.heard()]
        while texts[-1] != last:
            texts.append(await self.heard())
        return texts

    async def closed(self) -> tuple[int, str]:
        """With what code and reason its connection is closed."""
        with pytest.raises(ConnectionClosed) as closed:
            await self.heard_until("nothing")
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason

    async def _frame(self) -> dict[str, Any]:
        with anyio.fail_after(DEADLINE):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
            return frame


Join = Callable[..., Coroutine[Any, Any, Client]]


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """Connect a client to a room: `join(server, "lobby", name="one")`."""
    async with AsyncExitStack() as clients:

        async def join(server: Server, room: str = "lobby", path: str = "/ws/chat/{room}", **query: str) -> Client:
            url = f"ws://127.0.0.1:{server.port}{path.format(room=quote(room))}"
            if query:
                url += f"?{urlencode(query)}"
            return Client(await clients.enter_async_context(connect(url, open_timeout=DEADLINE)))

        yield join


async def post(server: Server, path: str, **query: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=DEADLINE) as client:
        return await client.post(server.url + path, params=query)


async def health(server: Server) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=DEADLINE) as client:
        told: dict[str, Any] = (await client.get(f"{server.url}/health")).json()
        return told


async def healthy(*servers: Server) -> None:
    """Wait until the layers of all are well."""
    with anyio.fail_after(DEADLINE):
        for server in servers:
            for _ in count():
                if (await health(server))["ok"]:
                    break
                await anyio.sleep(0.02)


async def spread(server: Server, join: Join, workers: int, among: int) -> list[tuple[int, str, Client]]:
    """As many clients, or as many more as it takes until every worker has one: the kernel deals them out."""
    clients = []
    for number in range(500):
        client = await join(server)
        clients.append((*await client.where(), client))
        if number >= among and len({pid for pid, *_ in clients}) == workers:
            break
    assert len({pid for pid, *_ in clients}) == workers
    return clients


def node(channel: str) -> str:
    """The part of a channel's name that tells the process."""
    return channel.partition("!")[0].rpartition(".")[2]


def nodes_by_pid(clients: list[tuple[int, str, Client]]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for pid, channel, _ in clients:
        found.setdefault(pid, set()).add(node(channel))
    return found


def layer_connections(server: RedisServer) -> int:
    """How many connections Redis has, without the one that asks."""
    lines: list[str] = ask(server, "CLIENT", "LIST").splitlines()
    return len(lines) - 1


# Several processes


async def test_two_servers(start: Start, join: Join, redis: RedisServer) -> None:
    """Actions, views and publishers reach the clients of every server, and only those in the room."""
    one, two = await start(), await start()
    clients = [await join(server, room) for server in (one, two) for room in ("lobby", "lobby", "garden")]
    await clients[0].say("by an action")
    await clients[3].say("é 🎉")
    assert (await post(one, "/rooms/lobby/announce", text="by a view")).json()["duplicate"] is False
    assert (await post(two, "/rooms/lobby/announce-plainly", text="by a plain view")).status_code == 200
    await clients[1].ask("notice", "by an event that is forwarded")
    with Publisher(redis.url) as publisher:
        publisher.group_send("chat.lobby", {"type": "chat.message", "author": "cron", "text": "by a script"})
    async with AsyncPublisher(redis.url) as publisher_too:
        await publisher_too.group_send("chat.lobby", {"type": "chat.notice", "text": "by a worker"})
        await publisher_too.group_send("chat.garden", {"type": "chat.notice", "text": "in the garden"})
    heard = [
        "by an action",
        "é 🎉",
        "by a view",
        "by a plain view",
        "by an event that is forwarded",
        "by a script",
        "by a worker",
    ]
    for number in (0, 3, 4):
        assert await clients[number].heard_until("by a worker") == heard
    heard.remove("by an event that is forwarded")
    assert await clients[1].heard_until("by a worker") == heard
    assert [await clients[2].heard(), await clients[5].heard()] == ["in the garden"] * 2


async def test_one_client_of_another_server(start: Start, join: Join) -> None:
    """A message to a channel's name reaches that client, whichever server it is on."""
    one, two = await start(), await start()
    there, beside = await join(two), await join(two)
    _, channel = await there.where()
    assert (await post(one, f"/channels/{channel}", text="you")).status_code == 200
    assert (await post(one, f"/channels/{channel[:-1]}ffff", text="nobody")).status_code == 200
    await post(one, "/rooms/lobby/announce", text="all")
    assert await there.heard_until("all") in (["you", "all"], ["all", "you"])
    assert await beside.heard_until("all") == ["all"]


async def test_order(start: Start, join: Join) -> None:
    """What one client says arrives in that order everywhere, and with two that speak, everywhere in the same."""
    one, two = await start(), await start()
    speakers = [await join(one), await join(two)]
    listeners = [await join(one), await join(two)]

    async def speak(number: int) -> None:
        for n in range(100):
            await speakers[number].say(f"{number} {n}")

    await asyncio.gather(speak(0), speak(1))
    await speakers[0].say("over")
    heard = [await client.heard_until("over") for client in (*listeners, *speakers)]
    assert len(heard[0]) == 201
    assert all(each == heard[0] for each in heard)
    for number in range(2):
        assert [text for text in heard[0] if text.startswith(f"{number} ")] == [f"{number} {n}" for n in range(100)]


async def test_kicks(start: Start, join: Join) -> None:
    """`websocket.close` closes every connection of a user, on whichever server, with code and reason, and no other."""
    one, two = await start(), await start()
    kicked = [await join(server, name="mallory") for server in (one, two, two)]
    stays = await join(two, name="alice")
    assert (await post(one, "/users/mallory/kick")).status_code == 200
    for client in kicked:
        assert await client.closed() == (4503, "é")
    await stays.say("still here")
    assert await stays.heard() == "still here"


async def test_a_server_that_ends(start: Start, join: Join) -> None:
    """A server that is stopped, or killed, takes its own clients with it and disturbs nobody else's."""
    one, two, three = await start(), await start(), await start()
    stays, goes, dies = [await join(server) for server in (one, two, three)]
    await two.stop()
    assert await goes.closed() == (1012, "")
    three.process.kill()
    with pytest.raises(ConnectionClosed):
        await dies.heard()
    await stays.say("still here")
    assert await stays.heard() == "still here"


# Workers of one server


async def test_workers_of_uvicorn(start: Start, join: Join, redis: RedisServer) -> None:
    """Two workers of uvicorn are two processes with names of their own, and messages reach the clients of both."""
    server = await start(workers=2)
    clients = await spread(server, join, 2, among=6)
    nodes = nodes_by_pid(clients)
    assert all(len(names) == 1 for names in nodes.values())
    assert len(set.union(*nodes.values())) == 2
    await clients[0][2].say("by an action")
    await post(server, "/rooms/lobby/announce", text="by a view")
    with Publisher(redis.url) as publisher:
        publisher.group_send("chat.lobby", {"type": "chat.notice", "text": "by a script"})
    for _, _, client in clients:
        assert await client.heard_until("by a script") == ["by an action", "by a view", "by a script"]
    assert layer_connections(redis) == 4


async def test_a_worker_that_is_killed(start: Start, join: Join) -> None:
    """When a worker is killed the other's clients hear on, and the one in its place has a name of its own."""
    server = await start(workers=2)
    clients = await spread(server, join, 2, among=4)
    killed = clients[0][0]
    before = set.union(*nodes_by_pid(clients).values())
    os.kill(killed, signal.SIGKILL)
    staying = [entry for entry in clients if entry[0] != killed]
    await staying[0][2].say("still here")
    for _, _, client in staying:
        assert await client.heard() == "still here"
    await server.ready(3)
    new = await _new_worker(server, join, {pid for pid, *_ in clients})
    assert node(new[1]) not in before
    await new[2].say("hello")
    for _, _, client in (*staying, new):
        assert (await client.heard_until("hello"))[-1] == "hello"


async def _new_worker(server: Server, join: Join, known: set[int]) -> tuple[int, str, Client]:
    for _ in range(500):
        client = await join(server)
        pid, channel = await client.where()
        if pid not in known:
            return pid, channel, client
    raise AssertionError("the new worker gets no connection")


@pytest.mark.parametrize("preload", [["--preload"], []], ids=["preload", "no preload"])
async def test_workers_of_gunicorn(start: Start, join: Join, redis: RedisServer, preload: list[str]) -> None:
    """Workers that gunicorn forks, also from a process that has loaded the application, have names of their own."""
    if importlib.util.find_spec("gunicorn") is None:
        if os.environ.get("CI"):
            pytest.fail("gunicorn is not installed")
        pytest.skip("gunicorn is not installed")
    server = await start(*preload, command=GUNICORN, workers=2)
    clients = await spread(server, join, 2, among=6)
    nodes = nodes_by_pid(clients)
    assert all(len(names) == 1 for names in nodes.values())
    assert len(set.union(*nodes.values())) == 2
    await clients[0][2].say("by an action")
    await post(server, "/rooms/lobby/announce", text="by a view")
    for _, channel, _ in clients:
        await post(server, f"/channels/{channel}", text="you")
    await post(server, "/rooms/lobby/announce", text="all")
    for _, _, client in clients:
        heard = await client.heard_until("all")
        if len(heard) < 4:  # a channel is reached another way than a group
            heard.append(await client.heard())
        assert sorted(heard) == ["all", "by a view", "by an action", "you"]
    assert layer_connections(redis) == 4


# Redis goes and comes back


async def _unavailable(server: Server, path: str = "/rooms/lobby/announce") -> None:
    """Wait until a view that sends says so."""
    with anyio.fail_after(DEADLINE):
        while (answer := await post(server, path, text="who knows")).status_code != 503:
            assert answer.status_code == 200
            await anyio.sleep(0.02)
    _is_told_to_come_back(answer.headers, answer.text)


def _is_told_to_come_back(headers: Mapping[str, str], body: str) -> None:
    assert int(headers["Retry-After"]) > 0
    assert json.loads(body) == {"detail": "the service is not available now"}


async def _refused(server: Server, join: Join, **where: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await join(server, **where)
    response = refused.value.response
    assert response.status_code == 503
    assert response.body is not None
    _is_told_to_come_back(response.headers, response.body.decode())


async def _told_by_server(server: Server, join: Join) -> None:
    """What a server without Redis says to who comes."""
    await _unavailable(server)
    await _unavailable(server, "/rooms/lobby/announce-plainly")
    await _refused(server, join, room="new")
    assert (await health(server))["ok"] is False


async def _told_by_client(client: Client, room: str) -> None:
    """What a client that is there hears without Redis: of what needs it, that it is away; all else goes on."""
    await client.where()
    for action, data in (("say", {"text": "who knows"}), ("join", room)):
        reply = await client.ask(action, data)
        assert (reply["status"], reply["errors"]["code"]) == ("bad", "unavailable")
        assert reply["errors"]["retry_after"] > 0
    await client.where()


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_redis_goes_and_comes_back(start: Start, join: Join, redis: RedisServer, how: str) -> None:
    """An outage closes no connection; meanwhile who sends or joins is told to come back, and then all is as before."""
    servers = [await start(timeout=1.0) for _ in range(2)]
    clients = [await join(server) for server in servers for _ in range(2)]
    for round in range(2):
        if how == "killed":
            redis.kill()
        else:
            redis.pause()
        await asyncio.gather(*(_told_by_server(server, join) for server in servers))
        await asyncio.gather(*(_told_by_client(client, f"new {round}") for client in clients))
        if how == "killed":
            redis.restart()
        else:
            redis.resume()
        await healthy(*servers)
        new = await join(servers[0], f"new {round}")
        assert (await clients[-1].ask("join", f"new {round}"))["status"] == "ok"
        await new.say("to whom joined")
        for number, client in enumerate(clients):
            await client.say(f"{round} from {number}")
        await post(servers[0], "/rooms/lobby/announce", text=f"{round} over")
        for client in clients:
            heard = await client.heard_until(f"{round} over")
            told = [text for text in heard if text.startswith(f"{round} ")]
            assert told == [*(f"{round} from {number}" for number in range(4)), f"{round} over"]
            assert set(heard) - set(told) <= {"who knows", "to whom joined"}
            assert ("to whom joined" in heard) is (client is clients[-1])
        assert await new.heard() == "to whom joined"
    for server in servers:
        assert server.log.count("connection lost") == server.log.count("connected again after") >= 2
    assert layer_connections(redis) == 4


async def test_a_short_outage(start: Start, join: Join, redis: RedisServer) -> None:
    """A request that comes while Redis restarts waits for it, within the timeout."""
    server = await start(timeout=DEADLINE)
    client = await join(server)
    redis.kill()
    asking = asyncio.create_task(post(server, "/rooms/lobby/announce", text="waits"))
    joining = asyncio.create_task(join(server, "new"))
    await asyncio.wait({asking, joining}, timeout=0.3)
    assert not joining.done()
    redis.restart()
    new = await joining
    # Written or not when the connection was lost: that is told.
    assert (await asking).status_code in (200, 503)
    await healthy(server)
    await client.say("again")
    assert (await client.heard_until("again"))[-1] == "again"
    await new.say("new")
    assert await new.heard() == "new"


@pytest.mark.parametrize("credentials", ["", f":{PASSWORD}@", f"user:{PASSWORD}@"])
async def test_redis_is_not_there_at_the_start(start: Start, credentials: str) -> None:
    """Without Redis a server doesn't start, and says why with the URL and without the password."""
    server = await start(url=f"redis://{credentials}127.0.0.1:1/0", timeout=0.3)
    assert not server.process.is_running
    shown = f"redis://{credentials.replace(PASSWORD, '***')}127.0.0.1:1/0"
    assert f"LayerUnavailable: Redis can't be reached: {shown}: " in server.log
    assert "hunter2" not in server.log
    assert "Application startup failed" in server.log
    server.complains = True


async def test_wrong_credentials_at_the_start(start: Start, redis_server: RedisServer) -> None:
    """With the wrong password a server doesn't start, and says so without it."""
    with RedisServer(binary=redis_server.binary, options=["--requirepass", "right"]) as redis:
        server = await start(url=f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0")
    assert not server.process.is_running
    assert f"SettingsError: redis://:***@127.0.0.1:{redis.port}/0: " in server.log
    assert "hunter2" not in server.log
    server.complains = True


async def test_a_degraded_start(start: Start, join: Join, redis: RedisServer) -> None:
    """With start="degraded" a server starts without Redis, refuses what needs it, and heals when it comes."""
    redis.kill()
    servers = [await start(timeout=0.3, start="degraded") for _ in range(2)]
    for server in servers:
        assert f"{redis.url}" in server.log
        assert "starting without it" in server.log
        await _unavailable(server)
        await _refused(server, join)
    redis.restart()
    await healthy(*servers)
    clients = [await join(server) for server in servers]
    for client in clients:
        await client.say("hello")
    for client in clients:
        assert [await client.heard() for _ in clients] == ["hello"] * 2


# Without a lifespan

UNPREPARED = {
    "no lifespan": ("tests.servers.rooms:app", ["--lifespan", "off"], "/ws/chat/{room}"),
    "no add_channel": ("tests.servers.rooms:bare", [], "/ws/chat/{room}"),
    "as_asgi": ("tests.servers.rooms:consumer", [], "/?room={room}"),
}


@pytest.mark.parametrize("case", UNPREPARED)
async def test_many_first_connections(start: Start, join: Join, redis: RedisServer, case: str) -> None:
    """The first connections, however many at once, share one layer that the environment names."""
    target, options, path = UNPREPARED[case]
    servers = [await start(*options, target=target) for _ in range(2)]
    clients = await asyncio.gather(*(join(server, path=path) for server in servers for _ in range(50)))
    found = await asyncio.gather(*(client.where() for client in clients))
    assert len({node(channel) for _, channel in found}) == len({pid for pid, _ in found}) == 2
    await clients[0].say("one")
    await clients[-1].say("two")
    with Publisher(redis.url) as publisher:
        publisher.group_send("chat.lobby", {"type": "chat.notice", "text": "over"})
    for client in clients:
        assert await client.heard_until("over") == ["one", "two", "over"]
    assert layer_connections(redis) <= 5  # the last may still be going


@pytest.mark.parametrize("case", UNPREPARED)
async def test_many_first_connections_without_redis(start: Start, join: Join, redis: RedisServer, case: str) -> None:
    """The first connections don't wait for each other's timeouts, and when Redis comes, those after them get in."""
    target, options, path = UNPREPARED[case]
    redis.kill()
    server = await start(*options, target=target, timeout=0.5)
    with anyio.fail_after(15):  # one after another they would take 20 s and more
        await asyncio.gather(*(_refused(server, join, path=path) for _ in range(40)))
    redis.restart()
    clients = await asyncio.gather(*(join(server, path=path) for _ in range(10)))
    await clients[0].say("hello")
    for client in clients:
        assert await client.heard() == "hello"
