"""How a message looks between processes, and how it is read again."""

import base64
import pickle
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from cryptography.fernet import Fernet
from pydantic import BaseModel

from fastapi_channels.exceptions import UnreadableMessage
from fastapi_channels.layers.envelope import Envelope
from fastapi_channels.layers.names import MAX_LENGTH
from fastapi_channels.layers.wire import Letter, Wire

HERE = __name__

#: When messages are read, on the event loop's clock.
NOW = 1000.0

ADDRESS = "fc:0:{chat.lobby}"

KEY = Fernet.generate_key()
OLD_KEY = Fernet.generate_key().decode()


class Backwards:
    """Writes messages in a way of its own, and knows what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def dumps(self, message: dict[str, Any], /) -> bytes:
        self.given.append(message)
        return pickle.dumps(message)[::-1]

    def loads(self, data: bytes, /) -> dict[str, Any]:
        message: dict[str, Any] = pickle.loads(data[::-1])
        return message


backwards = Backwards()


class Said(BaseModel):
    type: Literal["chat.said"] = "chat.said"
    text: str
    at: datetime


WIRES: dict[str, Callable[[], Wire]] = {
    "JSON": lambda: Wire(),
    "a module": lambda: Wire(serializer=pickle),
    "the path of a module": lambda: Wire(serializer="marshal"),
    "an object": lambda: Wire(serializer=Backwards()),
    "the path of an object": lambda: Wire(serializer=f"{HERE}.backwards"),
    "encrypted": lambda: Wire([KEY]),
    "encrypted by a key as text": lambda: Wire([OLD_KEY]),
    "an encrypted object": lambda: Wire([KEY, OLD_KEY], Backwards()),
}

MESSAGES: dict[str, dict[str, Any]] = {
    "nothing but a type": {"type": "x"},
    "text": {"type": "chat.message", "text": "é 日本 🎉 \0 \n \r\n \u2028 \" \\ {} '"},
    "lines in the type": {"type": "chat\nmessage\n"},
    "structure": {"type": "x", "list": [1, [2.5, None, True], {}], "dict": {"": {"é\n": "1e"}}, "big": 2**70},
    "a frame": {"type": "websocket.send", "text": "hello"},
    "a frame of bytes": {"type": "websocket.send", "bytes": bytes(range(256))},
    "an empty frame of bytes": {"type": "websocket.send", "bytes": b""},
    "much": {"type": "x", "text": "ä\n" * 100_000},
}


def packed(wire: Wire, message: Any, address: str = ADDRESS, *, expiry: float = 60.0, **about: Any) -> bytes:
    return wire.pack(Envelope.of(message, NOW + expiry), address, expiry=expiry, **about)


def there_and_back(wire: Wire, message: Any, **about: Any) -> Letter:
    return wire.unpack(packed(wire, message, **about), ADDRESS, NOW)


def read(wire: Wire, data: bytes) -> Letter | None:
    """What it reads; None if it says that this is unreadable, anything else that it raises is an error of the test."""
    try:
        return wire.unpack(data, ADDRESS, NOW)
    except UnreadableMessage:
        return None


def flipped(data: bytes) -> Iterator[bytes]:
    """The same with one bit changed, for every bit."""
    for number in range(8 * len(data)):
        changed = bytearray(data)
        changed[number // 8] ^= 1 << number % 8
        yield bytes(changed)


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> Wire:
    return WIRES[request.param]()


# There and back


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_messages(wire: Wire, message: dict[str, Any]) -> None:
    """Whatever the wire, a message comes out as it went in, as often as it is decoded, and its JSON too."""
    letter = there_and_back(wire, message)
    assert (letter.exclude, letter.channel) == (frozenset(), None)
    assert letter.envelope.type == message["type"]
    assert letter.envelope.payload == Envelope.of(message, 0).payload
    assert letter.envelope.decode() == message
    assert letter.envelope.decode() == message


def test_a_model(wire: Wire) -> None:
    """A pydantic model is read as the JSON that it is."""
    letter = there_and_back(wire, Said(text="é", at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)))
    expected = {"type": "chat.said", "text": "é", "at": "2026-01-02T03:04:05Z"}
    assert letter.envelope.decode() == letter.envelope.decode() == expected


def test_who_does_not_get_it(wire: Wire) -> None:
    """The channels that are left out come along, whatever is in their names."""
    exclude = ["specific.0123456789ab!1", 'é "\\, 日本.0123456789ab!2', "x" * MAX_LENGTH]
    assert there_and_back(wire, {"type": "x"}, exclude=exclude).exclude == set(exclude)
    assert there_and_back(wire, {"type": "x"}, exclude=frozenset(exclude[:1])).exclude == {exclude[0]}
    assert there_and_back(wire, {"type": "x"}, exclude=[]).exclude == set()


def test_whom_it_is_for(wire: Wire) -> None:
    """The one channel that a message is for comes along, and is told from a message for a group."""
    channel = 'é "\\.0123456789ab!2'
    letter = there_and_back(wire, {"type": "x"}, channel=channel)
    assert (letter.channel, letter.exclude) == (channel, frozenset())


def test_when_it_expires(wire: Wire) -> None:
    """A message expires as many seconds after it was read as the sender has given it, by the clock of the reader."""
    assert there_and_back(wire, {"type": "x"}, expiry=60.0).envelope.expires == NOW + 60.0
    data = packed(wire, {"type": "x"}, expiry=0.25)
    assert wire.unpack(data, ADDRESS, 7.0).envelope.expires == 7.25


def test_a_reader_may_change_what_it_got(wire: Wire) -> None:
    """What one handler does to its message is not seen by the next."""
    envelope = there_and_back(wire, {"type": "x", "list": [1]}).envelope
    envelope.decode()["list"].append(2)
    assert envelope.decode() == {"type": "x", "list": [1]}


def test_it_is_text_with_json() -> None:
    """With JSON a message is UTF-8 text, and with encryption ASCII, for brokers that carry only text."""
    for message in MESSAGES.values():
        assert packed(Wire(), message, exclude=["é.0123456789ab!1"]).decode().startswith("1m{")
        assert packed(Wire([KEY]), message, exclude=["é.0123456789ab!1"]).decode("ascii").startswith("1e")


def test_what_a_serializer_is_given() -> None:
    """A serializer gets a dict of what JSON can hold, whatever the message was made of."""
    serializer = Backwards()
    there_and_back(Wire(serializer=serializer), Said(text="é", at=datetime(2026, 1, 2, tzinfo=UTC)))
    there_and_back(Wire(serializer=serializer), {"type": "websocket.send", "bytes": b"\xff"})
    assert serializer.given == [
        {"type": "chat.said", "text": "é", "at": "2026-01-02T00:00:00Z"},
        {"type": "websocket.send", "bytes": base64.b64encode(b"\xff").decode()},
    ]


# Encryption


def test_nothing_of_an_encrypted_message_can_be_read() -> None:
    """An encrypted message shows neither its content nor for whom it is, and is another one each time."""
    exclude = ["excluded.0123456789ab!1"]
    data = packed(Wire([KEY]), {"type": "chat.message", "text": "secret"}, exclude=exclude, channel="channel")
    visible = data + base64.urlsafe_b64decode(data[2:])
    assert not any(word in visible for word in (b"secret", b"chat", b"excluded", b"channel", b"expiry", b"lobby"))
    assert data != packed(Wire([KEY]), {"type": "chat.message", "text": "secret"}, exclude=exclude, channel="channel")


@pytest.mark.parametrize("address", ["fc:0:{chat.lobb}", "fc:0:{chat.lobby}:q", "fc:1:{chat.lobby}", "", "é"])
def test_an_encrypted_message_is_good_for_its_place_only(address: str) -> None:
    """Who records an encrypted message can't have it read in another group, queue or database."""
    wire = Wire([KEY])
    data = packed(wire, {"type": "x"})
    with pytest.raises(UnreadableMessage, match="another place"):
        wire.unpack(data, address, NOW)
    assert wire.unpack(data, ADDRESS, NOW).envelope.type == "x"


def test_keys_are_changed_one_after_another() -> None:
    """The first key encrypts and every key decrypts, so that a new one can be brought in with all processes running."""
    old, both, new = Wire([OLD_KEY]), Wire([KEY, OLD_KEY]), Wire([KEY])
    assert both.unpack(packed(old, {"type": "x"}), ADDRESS, NOW).envelope.type == "x"
    assert new.unpack(packed(both, {"type": "x"}), ADDRESS, NOW).envelope.type == "x"
    for reader, writer in ((old, both), (new, old)):
        with pytest.raises(UnreadableMessage, match="none of the encryption_keys decrypts it"):
            reader.unpack(packed(writer, {"type": "x"}), ADDRESS, NOW)


def test_with_and_without_keys() -> None:
    """Who has keys takes nothing that isn't encrypted, and who has none is told that it lacks them."""
    with pytest.raises(UnreadableMessage, match="it is not encrypted"):
        Wire([KEY]).unpack(packed(Wire(), {"type": "x"}), ADDRESS, NOW)
    with pytest.raises(UnreadableMessage, match="it is encrypted, and there are no encryption_keys"):
        Wire().unpack(packed(Wire([KEY]), {"type": "x"}), ADDRESS, NOW)


# What can't be read


GOOD = b'1m{"expiry":60.0}\n{"type":"x"}'

UNREADABLE = {
    "nothing": b"",
    "a version and no more": b"1",
    "a version and a kind": b"1m",
    "a later version": b"2" + GOOD[1:],
    "version 10": b"10" + GOOD[1:],
    "a blank before": b" " + GOOD,
    "an unknown kind": b"1x" + GOOD[2:],
    "no kind": b"1" + GOOD[2:],
    "JSON of another program": b'{"type": "secret"}',
    "a pickle": pickle.dumps({"type": "secret"}),
    "msgpack": b"\x81\xa4type\xa6secret",
    "an empty token": b"1e",
    "no token": b"1esecret",
    "no header": b'1m{"type":"secret"}',
    "an empty header": b'1m\n{"type":"secret"}',
    "a header of no dict": b'1m[60.0]\n{"type":"secret"}',
    "a header of null": b'1mnull\n{"type":"secret"}',
    "no expiry": b'1m{}\n{"type":"secret"}',
    "no number of seconds": b'1m{"expiry":"secret"}\n{"type":"x"}',
    "a list of seconds": b'1m{"expiry":[60]}\n{"type":"x"}',
    "seconds as text": b'1m{"expiry":"60"}\n{"type":"x"}',
    "no seconds": b'1m{"expiry":null}\n{"type":"x"}',
    "NaN seconds": b'1m{"expiry":NaN}\n{"type":"x"}',
    "all seconds": b'1m{"expiry":Infinity}\n{"type":"x"}',
    "one name left out": b'1m{"expiry":60,"exclude":"secret"}\n{"type":"x"}',
    "a number left out": b'1m{"expiry":60,"exclude":5}\n{"type":"x"}',
    "numbers left out": b'1m{"expiry":60,"exclude":[5]}\n{"type":"x"}',
    "a dict left out": b'1m{"expiry":60,"exclude":{"secret":1}}\n{"type":"x"}',
    "null left out": b'1m{"expiry":60,"exclude":null}\n{"type":"x"}',
    "a number for a channel": b'1m{"expiry":60,"channel":5}\n{"type":"x"}',
    "a dict for a channel": b'1m{"expiry":60,"channel":{"secret":1}}\n{"type":"x"}',
    "a list for a channel": b'1m{"expiry":60,"channel":["secret"]}\n{"type":"x"}',
    "no message": b'1m{"expiry":60}\n',
    "a message of no dict": b'1m{"expiry":60}\n["secret"]',
    "a message without a type": b'1m{"expiry":60}\n{"text":"secret"}',
    "an empty type": b'1m{"expiry":60}\n{"type":""}',
    "a type that is no text": b'1m{"expiry":60}\n{"type":5}',
    "more behind the message": GOOD + b"secret",
    "no JSON": b'1m{"expiry":60}\n{"type":secret}',
    "no UTF-8": b'1m{"expiry":60}\n{"type":"secret\xff"}',
    "half a surrogate pair": b'1m{"expiry":60}\n{"type":"secret\\ud800"}',
    "NaN": b'1m{"expiry":60}\n{"type":"secret","n":NaN}',
    "very deep": b'1m{"expiry":60}\n{"type":"x","n":' + b"[" * 100_000,
    "a very deep header": b"1m" + b"[" * 100_000,
    "no base64 in a frame of bytes": b'1m{"expiry":60}\n{"type":"websocket.send","bytes":"secret\xc3\xa9"}',
    "a number in a frame of bytes": b'1m{"expiry":60}\n{"type":"websocket.send","bytes":5}',
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_what_can_not_be_read(data: bytes) -> None:
    """What isn't a message of ours is unreadable, and the text of the error holds nothing of it."""
    assert Wire().unpack(GOOD, ADDRESS, NOW).envelope.type == "x"
    with pytest.raises(UnreadableMessage) as caught:
        Wire().unpack(data, ADDRESS, NOW)
    assert str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_later_header_may_hold_more() -> None:
    """A header may have what this version doesn't know; it is the version's first byte that says what must be known."""
    data = b'1m{"expiry":60,"trace":{"id":[1]}}\n{"type":"x"}'
    assert Wire().unpack(data, ADDRESS, NOW).envelope.type == "x"


def test_whole_seconds() -> None:
    """The seconds to the expiry may be whole ones, as other programs write them."""
    assert Wire().unpack(b'1m{"expiry":60}\n{"type":"x"}', ADDRESS, NOW).envelope.expires == NOW + 60


@pytest.mark.parametrize("kind", ["JSON", "a module", "encrypted", "an encrypted object"])
def test_what_was_cut_off(kind: str) -> None:
    """A message that was cut off, wherever, is unreadable."""
    wire = WIRES[kind]()
    data = packed(wire, {"type": "chat.message", "text": "é\n" * 5}, exclude=["é.0123456789ab!1"], channel="é")
    for length in range(len(data)):
        with pytest.raises(UnreadableMessage):
            wire.unpack(data[:length], ADDRESS, NOW)


@pytest.mark.parametrize("kind", ["JSON", "encrypted"])
def test_noise(kind: str) -> None:
    """Noise is unreadable, also behind the beginning of a message."""
    wire, chance = WIRES[kind](), random.Random(46)
    beginnings = [b"", b"1", b"1m", b"1e", b"1m{", b'1m{"expiry":60}\n', b'1m{"expiry":60}\n{"type":"x",']
    for number in range(20_000):
        noise = chance.randbytes(chance.randrange(60))
        if number % 2:
            noise = base64.urlsafe_b64encode(noise)
        with pytest.raises(UnreadableMessage):
            wire.unpack(chance.choice(beginnings) + noise, ADDRESS, NOW)


def test_bits_that_fell_over() -> None:
    """A plain message with a wrong bit is another message, or unreadable, and nothing else."""
    wire = Wire()
    data = packed(wire, {"type": "x", "text": "é", "n": [1.5, None]}, exclude=["é.0123456789ab!1"], channel="é")
    letters = [read(wire, changed) for changed in flipped(data)]
    assert None in letters
    assert any(letter is not None and letter.envelope.decode()["type"] == "y" for letter in letters)


@pytest.mark.parametrize("length", range(18))
def test_forged_bits(length: int) -> None:
    """No bit of an encrypted message can be changed so that anything else is read, whatever its length."""
    wire = Wire([KEY])
    data = packed(wire, {"type": "x", "text": "y" * length})
    for changed in flipped(data):
        letter = read(wire, changed)
        # Base64 has bits that mean nothing.
        assert letter is None or letter.envelope.decode() == {"type": "x", "text": "y" * length}


def test_forged_by_another_key() -> None:
    """A message that somebody encrypted with a key of their own is unreadable."""
    token = Fernet(Fernet.generate_key()).encrypt(ADDRESS.encode() + b"\n" + GOOD[2:])
    assert read(Wire([KEY]), b"1e" + token) is None
    assert read(Wire([KEY]), b"1e" + Fernet(KEY).encrypt(ADDRESS.encode() + b"\n" + GOOD[2:])) is not None
    for nonsense in (b"", b"\n", ADDRESS.encode(), ADDRESS.encode() + b"\n", b"\xff\n" + GOOD[2:]):
        assert read(Wire([KEY]), b"1e" + Fernet(KEY).encrypt(nonsense)) is None


@pytest.mark.parametrize(
    "loaded",
    [None, 5, "x", b"x", [], {}, {"type": 5}, {"type": "x", "o": object()}, {"type": "x", "text": "\ud800"}],
    ids=repr,
)
def test_what_a_serializer_must_not_return(loaded: Any) -> None:
    """A serializer that returns what is no message makes it unreadable."""
    serializer: Any = SimpleNamespace(dumps=lambda message: b"x", loads=lambda data: loaded)
    wire = Wire(serializer=serializer)
    assert read(wire, packed(wire, {"type": "x"})) is None


@pytest.mark.parametrize("error", [ValueError, KeyError, EOFError, RecursionError, MemoryError, AssertionError])
def test_a_serializer_that_fails_to_read(error: type[Exception]) -> None:
    """Whatever a serializer raises, the message is unreadable, and the error says nothing of it but its kind."""

    def loads(data: bytes) -> dict[str, Any]:
        raise error("secret")

    serializer: Any = SimpleNamespace(dumps=pickle.dumps, loads=loads)
    wire = Wire(serializer=serializer)
    with pytest.raises(UnreadableMessage, match=error.__name__) as caught:
        there_and_back(wire, {"type": "x"})
    assert "secret" not in str(caught.value)


# What is wrong at the start


@pytest.mark.parametrize(
    "key",
    [
        "",
        b"",
        "hunter2",
        b"hunter2",
        "hunter2" * 6 + "==",
        "é" * 44,
        b"\xff" * 32,
        base64.urlsafe_b64encode(b"hunter2" * 9),
        KEY[:-1],
        None,
        5,
        [KEY],
    ],
    ids=repr,
)
def test_what_is_no_key(key: Any) -> None:
    """A key that is none is told by its number, and nothing of it is in the error."""
    with pytest.raises(ValueError, match=r"^encryption_keys\[1\] is not a Fernet key, ") as caught:
        Wire([KEY, key])
    told = "".join(traceback.format_exception(caught.value))
    assert KEY.decode() not in told
    assert len(str(key)) < 5 or str(key) not in told


@pytest.mark.parametrize("key", [KEY, KEY.decode()])
def test_one_key_is_no_list_of_keys(key: Any) -> None:
    """A key where a list of keys should be is told, and is not in the error."""
    with pytest.raises(ValueError, match=r"^encryption_keys is a list of keys, not one key$"):
        Wire(key)


def test_without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, keys are an error that names the extra to install; without keys it isn't needed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert there_and_back(Wire(), {"type": "x"}).envelope.type == "x"
    with pytest.raises(ValueError, match=r"pip install 'fastapi-channels\[encryption\]'") as caught:
        Wire([KEY])
    assert KEY.decode() not in str(caught.value)


@pytest.mark.parametrize(
    ("serializer", "told"),
    [
        ("nowhere.serializer", "serializer: Invalid python path: No module named 'nowhere'"),
        ("pickle.nothing", "serializer: Invalid python path: "),
        ("", "serializer: Invalid python path: "),
        ("not a path", "serializer: Invalid python path: "),
        ("math", "a serializer has dumps and loads"),
        (f"{HERE}.NOW", "a serializer has dumps and loads"),
        (sys, "a serializer has dumps and loads"),
        (7, "a serializer has dumps and loads"),
        (b"pickle", "a serializer has dumps and loads"),
        (SimpleNamespace(dumps=pickle.dumps), "a serializer has dumps and loads"),
        (SimpleNamespace(dumps=pickle.dumps, loads=None), "a serializer has dumps and loads"),
    ],
    ids=str,
)
def test_what_is_no_serializer(serializer: Any, told: str) -> None:
    """A serializer that can't be found, or is none, is an error that says so."""
    with pytest.raises(ValueError, match="serializer") as caught:
        Wire(serializer=serializer)
    assert str(caught.value).startswith(told)
