"""The command line: `python -m fastapi_channels send`, in a process of its own."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from fastapi import FastAPI

from fastapi_channels import add_channel
from fastapi_channels.consumers import JsonConsumer
from fastapi_channels.layers import RedisLayer
from fastapi_channels.routing import ConsumerRouter, route
from fastapi_channels.testing import RedisServer, connect

DEADLINE = 60.0

#: Nobody is there.
AWAY = "redis://127.0.0.1:1/0"

SAID: dict[str, Any] = {"type": "said", "text": "é 🎉\n\0"}

PASSWORD = "hunter2:/?#@%é"

VARIABLES = ("CHANNELS_", "FASTAPI_CHANNELS_", "PYTHONPATH")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


async def command(
    *arguments: str | bytes,
    stdin: bytes = b"",
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run it, with nothing of the surrounding environment that it would look at."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    with anyio.fail_after(DEADLINE):
        ended = await anyio.run_process(
            [sys.executable, "-m", "fastapi_channels", *map(os.fsdecode, arguments)],
            input=stdin,
            check=False,
            cwd=directory,
            env={**kept, **(environment or {})},
        )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def settings_file(directory: Path, name: str, **settings: Any) -> None:
    """A settings module, to be imported from that directory."""
    lines = [f"{setting} = {value!r}\n" for setting, value in settings.items()]
    (directory / f"{name}.py").write_text("".join(lines), "utf-8")


class Listener:
    """Is in the group `news`."""

    def __init__(self, layer: RedisLayer, channel: str) -> None:
        self._layer = layer
        self._channel = channel

    async def heard(self) -> list[dict[str, Any]]:
        """What has come, up to now."""
        messages = []
        await self._layer.group_send("news", {"type": "marker"})
        with anyio.fail_after(DEADLINE):
            while (message := await self._layer.receive(self._channel)) != {"type": "marker"}:
                messages.append(message)
        return messages


@pytest.fixture
async def listener(redis_url: str) -> AsyncIterator[Listener]:
    async with RedisLayer(redis_url) as layer:
        channel = await layer.new_channel()
        await layer.group_add("news", channel)
        yield Listener(layer, channel)


# What it does


async def test_it_reaches_the_members(listener: Listener, redis_url: str) -> None:
    """With a URL, a message reaches the members of the group, and the command says nothing."""
    assert await command("send", "news", json.dumps(SAID), "--url", redis_url) == Ended(0, "", "")
    assert await command("send", "--url", redis_url, "others", json.dumps(SAID)) == Ended(0, "", "")
    in_utf8 = json.dumps(SAID, ensure_ascii=False).encode()
    assert await command("send", f"--url={redis_url}", "news", in_utf8) == Ended(0, "", "")
    assert await listener.heard() == [SAID, SAID]


async def test_it_closes_consumers(redis_url: str) -> None:
    """`websocket.close`, sent to a group, closes the connections of its members."""

    class Room(JsonConsumer):
        groups = ["users.é"]

    app = FastAPI()
    add_channel(app, channel_layers={"default": redis_url})
    app.include_router(ConsumerRouter([route("/ws", Room)]))
    async with connect(app, "/ws") as ws:
        close = {"type": "websocket.close", "code": 4600, "reason": "bye"}
        assert await command("send", "users.é", json.dumps(close), "--url", redis_url) == Ended(0, "", "")
        assert await ws.closed(DEADLINE) == (4600, "bye")


async def test_a_message_from_standard_input(listener: Listener, redis_url: str) -> None:
    """With - for the message it is read from standard input, as UTF-8 whatever the locale."""
    text = json.dumps(SAID, ensure_ascii=False, indent=4).encode() + b"\n\n"
    for locale in ("C", "C.UTF-8"):
        assert await command(
            "send", "news", "-", "--url", redis_url, stdin=text, environment={"LC_ALL": locale}
        ) == Ended(0, "", "")
    assert await listener.heard() == [SAID, SAID]


async def test_a_large_message(listener: Listener, redis_url: str) -> None:
    """What standard input gives may be larger than an argument can be."""
    text = "é" * 2_000_000
    message = json.dumps({"type": "said", "text": text}).encode()
    assert await command("send", "news", "-", "--url", redis_url, stdin=message) == Ended(0, "", "")
    assert await listener.heard() == [{"type": "said", "text": text}]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--settings", "news_settings"], {}),
        (["--settings", "package.news_settings"], {}),
        (["--settings", "more_settings", "--alias", "jobs"], {}),
        ([], {"FASTAPI_CHANNELS_SETTINGS": "news_settings"}),
        (["--alias", "jobs"], {"FASTAPI_CHANNELS_SETTINGS": "more_settings"}),
        ([], {"CHANNELS_CHANNEL_LAYERS": '{"default": "URL"}'}),
        (["--alias", "jobs"], {"CHANNELS_CHANNEL_LAYERS": '{"default": "memory://", "jobs": "URL"}'}),
        (["--settings", "away_settings"], {"CHANNELS_CHANNEL_LAYERS": '{"default": "URL"}'}),
        (["--settings", "news_settings"], {"FASTAPI_CHANNELS_SETTINGS": "away_settings"}),
        (["--url", "URL"], {"FASTAPI_CHANNELS_SETTINGS": "away_settings"}),
    ],
    ids=str,
)
async def test_settings(
    listener: Listener, redis_url: str, tmp_path: Path, arguments: list[str], environment: dict[str, str]
) -> None:
    """The layer is named as for the application: by a settings module in the working directory, or the environment."""
    config = {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": {"url": redis_url}}
    (tmp_path / "package").mkdir()
    settings_file(tmp_path, "news_settings", CHANNEL_LAYERS={"default": redis_url})
    settings_file(tmp_path / "package", "news_settings", CHANNEL_LAYERS={"default": config})
    settings_file(tmp_path, "more_settings", CHANNEL_LAYERS={"default": "memory://", "jobs": redis_url}, EXPIRY=7)
    settings_file(tmp_path, "away_settings", CHANNEL_LAYERS={"default": AWAY})
    arguments = [argument.replace("URL", redis_url) for argument in arguments]
    environment = {name: value.replace("URL", redis_url) for name, value in environment.items()}
    ended = await command("send", "news", json.dumps(SAID), *arguments, directory=tmp_path, environment=environment)
    assert ended == Ended(0, "", "")
    assert await listener.heard() == [SAID]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["send", "--help"]], ids=" ".join)
async def test_help(arguments: list[str]) -> None:
    """It tells how it is used."""
    ended = await command(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("usage: python -m fastapi_channels ")
    told = ["group", "message", "--url", "--settings", "--alias"] if "send" in arguments else ["send"]
    assert all(word in ended.out for word in told)


# What it can't do


def failed(ended: Ended, code: int) -> str:
    """What a command that failed has said: one line that shows neither the inside nor a password."""
    assert (ended.code, ended.out) == (code, ""), ended.err
    line, rest = ended.err.split("\n", 1)
    assert rest == ""
    assert line.startswith("python -m fastapi_channels: ")
    assert "hunter2" not in line
    return line.removeprefix("python -m fastapi_channels: ")


async def test_no_server() -> None:
    """When the server, or its host, can't be reached, the command says so in one line, without the password."""
    places = {
        "redis://127.0.0.1:1/0": "127.0.0.1:1",
        "redis://:hunter2@127.0.0.1:1/0": "127.0.0.1:1",
        f"redis://user:{quote(PASSWORD, safe='')}@127.0.0.1:1/0": "127.0.0.1:1",
        "redis://:hunter2@nowhere.invalid/0": "nowhere.invalid",
    }
    urls = iter(places)
    # Each takes the five seconds that a server has.
    commands = [command("send", "news", '{"type": "said"}', "--url", url) for url in places]
    for ended in await asyncio.gather(*commands):
        assert places[next(urls)] in failed(ended, 1)


async def test_a_server_that_hangs(redis_server: RedisServer, tmp_path: Path) -> None:
    """A server that doesn't answer can't be reached."""
    with RedisServer(binary=redis_server.binary) as server:
        config = {"url": server.url, "timeout": 0.2}
        layers = {"default": {"BACKEND": "fastapi_channels.layers.RedisLayer", "CONFIG": config}}
        settings_file(tmp_path, "news_settings", CHANNEL_LAYERS=layers)
        server.pause()
        ended = await command("send", "news", '{"type": "said"}', "--settings", "news_settings", directory=tmp_path)
        server.resume()
    assert f"127.0.0.1:{server.port}" in failed(ended, 1)


async def test_a_server_that_wants_a_password(redis_server: RedisServer) -> None:
    """A password is taken from the URL; without the right one the settings are wrong."""
    with RedisServer(binary=redis_server.binary, options=["--requirepass", PASSWORD]) as server:
        assert await command("send", "news", '{"type": "said"}', "--url", server.url) == Ended(0, "", "")
        for wrong in (f"redis://127.0.0.1:{server.port}/0", f"redis://:hunter2@127.0.0.1:{server.port}/0"):
            ended = await command("send", "news", '{"type": "said"}', "--url", wrong)
            assert f"127.0.0.1:{server.port}" in failed(ended, 2)


MESSAGES = {
    "no JSON": ("said", "the message is not JSON"),
    "half a message": ('{"type": "said"', "the message is not JSON"),
    "nothing": ("", "the message is not JSON"),
    "Python": ("{'type': 'said'}", "the message is not JSON"),
    "very deep": ("[" * 100_000, "the message is not JSON"),
    "no type": ('{"text": "hello"}', "a `type`"),
    "an empty type": ('{"type": ""}', "a `type`"),
    "a type that is no text": ('{"type": 5}', "a `type`"),
    "a list": ('[{"type": "said"}]', "a `type`"),
    "a text": ('"said"', "a `type`"),
    "null": ("null", "a `type`"),
    "half a surrogate pair": (r'{"type": "said", "text": "\ud800"}', "message"),
}


@pytest.mark.parametrize("case", MESSAGES)
async def test_what_is_no_message(case: str) -> None:
    """A bad message is wrong usage, whether there is a server or not."""
    message, told = MESSAGES[case]
    assert told in failed(await command("send", "news", message, "--url", AWAY), 2)


@pytest.mark.parametrize("text", [b"", b"\xff", b'{"type": "said\xff"}', b'\xef\xbb\xbf{"type": 5}', b"-"], ids=str)
async def test_what_is_no_message_on_standard_input(text: bytes) -> None:
    """What is read from standard input may be anything, UTF-8 or not."""
    for encoding in ("utf-8:strict", "ascii"):
        ended = await command(
            "send", "news", "-", "--url", AWAY, stdin=text, environment={"PYTHONIOENCODING": encoding}
        )
        assert failed(ended, 2)


@pytest.mark.parametrize("group", ["", "x" * 201, "a{b}", "a\nb", b"\xff"], ids=str)
async def test_what_is_no_group(group: str | bytes) -> None:
    """A bad name is wrong usage, whether there is a server or not."""
    assert "group" in failed(await command("send", group, '{"type": "said"}', "--url", AWAY), 2)


LAYERS = {
    "no settings at all": ([], {}, "memory:// reaches no other process"),
    "memory": (["--url", "memory://"], {}, "memory:// reaches no other process"),
    "no URL": (["--url", ""], {}, "there is no layer for a URL without a scheme"),
    "another kind of URL": (["--url", "amqp://user:hunter2@host/0"], {}, "there is no layer for amqp"),
    "a bad database": (["--url", "redis://:hunter2@host/x"], {}, "redis://:***@host/x: the database is a number"),
    "a bad port": (["--url", "redis://:hunter2@host:x/0"], {}, "redis://:***@host:x/0: "),
    "a password with a slash": (["--url", "redis://:hunter2/@host/0"], {}, "RedisLayer: "),
    "an unknown option of redis-py": (["--url", "redis://host/0?password=hunter2&x=hunter2"], {}, "RedisLayer: "),
    "no module": (["--settings", "nowhere"], {}, "settings module 'nowhere' can't be imported"),
    "an empty module name": (["--settings", ""], {}, "settings module '' can't be imported"),
    "a relative module": (["--settings", ".settings"], {}, "settings module '.settings' can't be imported"),
    "a misspelt setting": (["--settings", "misspelt"], {}, "did you mean CHANNEL_LAYERS?"),
    "a bad setting": (["--settings", "bad"], {}, "EXPIRY (settings module bad): "),
    "no such alias": (["--settings", "good", "--alias", "mail"], {}, "'mail' in CHANNEL_LAYERS, only: default, jobs"),
    "no JSON": ([], {"CHANNELS_CHANNEL_LAYERS": "redis://:hunter2@host"}, "CHANNELS_CHANNEL_LAYERS): not JSON"),
    "a misspelt variable": ([], {"CHANNELS_CHANNEL_LAYER": "{}"}, "environment variable CHANNELS_CHANNEL_LAYER"),
    "no module in the environment": ([], {"FASTAPI_CHANNELS_SETTINGS": "nowhere"}, "settings module 'nowhere'"),
}


@pytest.mark.parametrize("case", LAYERS)
async def test_what_is_no_layer(case: str, tmp_path: Path) -> None:
    """A layer that there isn't, or that reaches nobody, is wrong usage."""
    arguments, environment, told = LAYERS[case]
    settings_file(tmp_path, "misspelt", CHANEL_LAYERS={"default": AWAY})
    settings_file(tmp_path, "bad", CHANNEL_LAYERS={"default": AWAY}, EXPIRY=-1)
    settings_file(tmp_path, "good", CHANNEL_LAYERS={"default": AWAY, "jobs": AWAY})
    ended = await command("send", "news", '{"type": "said"}', *arguments, directory=tmp_path, environment=environment)
    assert told in failed(ended, 2)


async def test_without_redis(tmp_path: Path) -> None:
    """Without redis-py the command names the extra to install."""
    (tmp_path / "redis.py").write_text("raise ModuleNotFoundError('there is no redis', name='redis')")
    ended = await command("send", "news", '{"type": "said"}', "--url", AWAY, environment={"PYTHONPATH": str(tmp_path)})
    assert "pip install 'fastapi-channels[redis]'" in failed(ended, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["send"],
        ["send", "news"],
        ["send", "news", '{"type": "said"}', "more"],
        ["send", "news", '{"type": "said"}', "--colour", "red"],
        ["send", "news", '{"type": "said"}', "--url"],
        ["send", "news", '{"type": "said"}', "--url", AWAY, "--settings", "app"],
        ["shout", "news", '{"type": "said"}'],
        ["--version-of-nothing"],
    ],
    ids=" ".join,
)
async def test_wrong_arguments(arguments: list[str]) -> None:
    """Wrong arguments are answered with how it is used."""
    ended = await command(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("usage: python -m fastapi_channels ")
    assert "Traceback" not in ended.err
