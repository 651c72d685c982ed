r"""How a message looks between processes, and how it is read again.

```
1 m {"expiry":60.0,"exclude":["specific.3f…!1"]} \n {"type":"chat.message",…}
│ │ └ what the receiving process has to know      └ the message, by the serializer
│ └ m: a message; e: the same, encrypted (all behind it is a Fernet token)
└ the version; a reader that doesn't know it skips the message
```

(Without the blanks.) With JSON inside it is UTF-8 text, for brokers that carry only that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, FiniteFloat, ImportString, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from fastapi_channels.exceptions import UnreadableMessage
from fastapi_channels.layers.envelope import Envelope, encode

__all__ = ["Letter", "Serializer", "Wire"]

VERSION = b"1"
PLAIN = b"m"
ENCRYPTED = b"e"

_dotted_path: TypeAdapter[Any] = TypeAdapter(ImportString)


class Serializer(Protocol):
    """How messages are written for the broker; a module such as `pickle`, `marshal` or your own, or an object."""

    def dumps(self, message: dict[str, Any], /) -> bytes:
        """The message, which holds only what JSON can, as bytes."""
        ...

    def loads(self, data: bytes, /) -> dict[str, Any]:
        """The message that these bytes hold."""
        ...


@dataclass(frozen=True, slots=True)
class Letter:
    """A message as it came from another process.

    Attributes:
        envelope: The message.
        exclude: The channels of its group that don't get it.
        channel: The one channel it is for; None if it is for a group or a queue.
    """

    envelope: Envelope
    exclude: Collection[str] = ()
    channel: str | None = None


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)

    expiry: FiniteFloat
    exclude: frozenset[str] = frozenset()
    channel: str | None = None


class Wire:
    """Writes messages for other processes and reads theirs.

    Args:
        keys: Fernet keys (32 bytes, URL-safe base64). The first encrypts, all are tried to decrypt. Without any,
            messages are sent as they are, and encrypted ones are unreadable.
        serializer: None for JSON; else an object or module with `dumps` and `loads`, or its dotted path.

    Raises:
        ValueError: A key is none, `cryptography` is missing, or the serializer can't be found.
    """

    def __init__(self, keys: Sequence[str | bytes] = (), serializer: str | Serializer | None = None) -> None:
        self._encrypt: Callable[[bytes], bytes] | None = None
        self._decrypt: Callable[[bytes], bytes] = _no_keys
        if isinstance(keys, (str, bytes)):
            raise ValueError("encryption_keys is a list of keys, not one key")
        if keys:
            self._encrypt, self._decrypt = _fernet(keys)
        if isinstance(serializer, str):
            try:
                serializer = _dotted_path.validate_python(serializer)
            except ValidationError as error:
                raise ValueError(f"serializer: {error.errors()[0]['msg']}") from error
        if serializer is not None and not all(callable(getattr(serializer, name, None)) for name in ("dumps", "loads")):
            raise ValueError("a serializer has dumps and loads")
        self._serializer: Any = serializer
        # What nearly every header is, made once.
        self._usual_expiry = 0.0
        self._usual_header = b""

    def pack(
        self,
        envelope: Envelope,
        address: str,
        *,
        expiry: float,
        exclude: Collection[str] = (),
        channel: str | None = None,
    ) -> bytes:
        """The message as it goes to other processes.

        Args:
            address: Where it is sent. An encrypted message is good for that place only.
            expiry: In how many seconds it is too old to be handled.

        Raises:
            ValueError: The serializer can't write it.
        """
        if exclude or channel is not None:
            header = to_json({"expiry": expiry, "exclude": list(exclude), "channel": channel})
        else:
            if expiry != self._usual_expiry:
                self._usual_expiry, self._usual_header = expiry, to_json({"expiry": expiry})
            header = self._usual_header
        payload = envelope.payload
        if self._serializer is not None:
            payload = self._serializer.dumps(from_json(payload))
        content = header + b"\n" + payload
        if self._encrypt is None:
            return VERSION + PLAIN + content
        return VERSION + ENCRYPTED + self._encrypt(address.encode() + b"\n" + content)

    def unpack(self, data: bytes, address: str, now: float) -> Letter:
        """Read a message that came from `address`.

        Args:
            now: The event loop's time, from which its expiry counts.

        Raises:
            UnreadableMessage: It isn't one; whatever it is, nothing else is raised.
        """
        if data[:1] != VERSION:
            raise UnreadableMessage("it is not an envelope of this version")
        kind, content = data[1:2], data[2:]
        if kind == ENCRYPTED:
            sent_to, _, content = self._decrypt(content).partition(b"\n")
            if sent_to != address.encode():
                raise UnreadableMessage("it was encrypted for another place")
        elif kind != PLAIN:
            raise UnreadableMessage("it is of an unknown kind")
        elif self._encrypt is not None:
            raise UnreadableMessage("it is not encrypted")
        header, _, payload = content.partition(b"\n")
        try:
            about = _Header.model_validate_json(header)
            if self._serializer is not None:
                message = self._serializer.loads(payload)
                payload = encode(message)
            else:
                message = from_json(payload, allow_inf_nan=False)
            envelope = Envelope.received(message, payload, now + about.expiry)
            return Letter(envelope, about.exclude, about.channel)
        except Exception as error:  # a serializer raises what it likes
            raise UnreadableMessage(f"its content can't be read ({type(error).__name__})") from error


def _no_keys(token: bytes) -> bytes:
    raise UnreadableMessage("it is encrypted, and there are no encryption_keys")


def _fernet(keys: Sequence[str | bytes]) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    try:
        from cryptography.fernet import Fernet, InvalidToken, MultiFernet
    except ImportError as error:
        raise ValueError("encryption needs cryptography: pip install 'fastapi-channels[encryption]'") from error
    fernets = []
    for number, key in enumerate(keys):
        try:
            fernets.append(Fernet(key))
        except (TypeError, ValueError) as error:
            # Never the key itself in an error.
            raise ValueError(
                f"encryption_keys[{number}] is not a Fernet key, as Fernet.generate_key() makes"
            ) from error
    multi = MultiFernet(fernets)

    def decrypt(token: bytes) -> bytes:
        try:
            return multi.decrypt(token)
        except InvalidToken as error:
            raise UnreadableMessage("none of the encryption_keys decrypts it") from error

    return multi.encrypt, decrypt
