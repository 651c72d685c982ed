"""Names of groups and channels: what is one, and how to make one of any text."""

from __future__ import annotations

import hashlib
import re

from fastapi_channels.exceptions import InvalidGroupName

__all__ = ["checked_name", "safe_name"]

MAX_LENGTH = 200

# Control characters (Unicode category Cc), lone surrogates (no UTF-8 for them), and Redis' hash tag braces.
_FORBIDDEN = "\x00-\x1f\x7f-\x9f\ud800-\udfff{}"
_NAME = re.compile(f"[^{_FORBIDDEN}]{{1,{MAX_LENGTH}}}")
_NOT_IN_A_NAME = re.compile(f"[{_FORBIDDEN}]")


def checked_name(name: str) -> str:
    """Return `name` if it can name a group or a channel.

    Raises:
        InvalidGroupName: It is not a str, empty, longer than 200 characters, or has a control character, `{` or `}`.
    """
    if not isinstance(name, str):
        raise InvalidGroupName(f"a group or channel name is a str, not {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        if not name:
            raise InvalidGroupName("a group or channel name can't be empty")
        if len(name) > MAX_LENGTH:
            raise InvalidGroupName(f"a group or channel name has at most {MAX_LENGTH} characters, not {len(name)}")
        raise InvalidGroupName("a group or channel name can't hold control characters, { or }")
    return name


def safe_name(text: str) -> str:
    """Make a name for a group or a channel out of any text.

    A text that is a name already comes back as it is. Any other loses what a name can't hold and gets a digest of the
    whole text behind it, so that different texts have different names.
    """
    if _NAME.fullmatch(text) is not None:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    kept = _NOT_IN_A_NAME.sub("", text)[: MAX_LENGTH - len(digest) - 1]
    return f"{kept}-{digest}"
