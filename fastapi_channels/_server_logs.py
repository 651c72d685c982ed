"""The logs of servers, which hold the URLs that clients ask for, with the tokens that are in them."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["SERVER_LOGS", "hide_tokens"]

#: Where servers log the paths that clients ask for, with the query.
SERVER_LOGS = ("gunicorn.access", "hypercorn.access", "hypercorn.error", "uvicorn.access", "uvicorn.error")


def hide_tokens(key: str) -> None:
    """Have the logs of servers show `[token]` in place of this query parameter's value; once or more is the same."""
    # As clients may write it: any letter may be percent-encoded.
    letters = (f"(?:{re.escape(letter)}|(?i:{_percent_encoded(letter)}))" for letter in key)
    parameter = re.compile(rf"(?<![^?&\s\"'])({''.join(letters)})=[^&\s]*")
    for name in SERVER_LOGS:
        logging.getLogger(name).addFilter(_TokenFilter(parameter))


def _percent_encoded(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


@dataclass(frozen=True, slots=True)
class _TokenFilter:
    """Hides the values of a query parameter in records, which stay what formatters know: so many arguments, as typed.

    A text that has arguments is left as it is, since its placeholders have to be.
    """

    parameter: re.Pattern[str]

    def filter(self, record: logging.LogRecord) -> bool:
        args: Any = record.args
        if isinstance(args, dict):
            record.args = copy.copy(args)  # which keeps a server's own type of dict
            record.args.update({name: self._hidden(value) for name, value in args.items()})
        elif isinstance(args, tuple):
            record.args = tuple(map(self._hidden, args))
        if not args:
            record.msg = self._hidden(record.msg)
        return True

    def _hidden(self, value: Any) -> Any:
        return self.parameter.sub(r"\1=[token]", value) if isinstance(value, str) else value
