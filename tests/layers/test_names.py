"""Names of groups and channels."""

import unicodedata

import pytest

from fastapi_channels.exceptions import InvalidGroupName
from fastapi_channels.layers import safe_name
from fastapi_channels.layers.names import checked_name

AWKWARD = ["a\nb", "a\x00b", "a{b}", "\ud800", "x" * 201, "🎉" * 5000, "\n", "{}", "a\x85", "", "\x7f" * 300]


@pytest.mark.parametrize(
    "name", ["x", "x" * 200, "🎉" * 200, "Room", "a b", "日本語", "chat.lobby:1/2*?[x]!", "\u200b"]
)
def test_names(name: str) -> None:
    """Any text of 1 to 200 characters is a name, without control characters and braces."""
    assert checked_name(name) == name
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "a group or channel name can't be empty"),
        ("x" * 201, "a group or channel name has at most 200 characters, not 201"),
        ("a\nb", "a group or channel name can't hold control characters, { or }"),
        ("a{b", "a group or channel name can't hold control characters, { or }"),
        (None, "a group or channel name is a str, not NoneType"),
        (b"x", "a group or channel name is a str, not bytes"),
    ],
)
def test_what_is_told_of_a_bad_name(name: str, told: str) -> None:
    """The error says what is wrong with the name, and is a ValueError too."""
    with pytest.raises(InvalidGroupName) as caught:
        checked_name(name)
    assert str(caught.value) == told
    assert isinstance(caught.value, ValueError)


def test_every_control_character_is_refused() -> None:
    """A name holds no control character, no lone surrogate and no brace; any other character is allowed in it."""
    for code in [*range(0x100), 0xD800, 0xDBFF, 0xDC00, 0xDFFF]:
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cs") or character in "{}":
            with pytest.raises(InvalidGroupName):
                checked_name(f"a{character}")
        else:
            assert checked_name(f"a{character}")


@pytest.mark.parametrize("text", AWKWARD)
def test_safe_name_makes_a_name_of_anything(text: str) -> None:
    """Whatever the text, `safe_name` gives a name, the same each time."""
    assert checked_name(safe_name(text)) == safe_name(text)


def test_safe_name_keeps_texts_apart() -> None:
    """Texts that differ only in what a name can't hold, or behind the 200th character, get different names."""
    texts = [*AWKWARD, "ab", "a{b", "a}b", "a\tb", "x" * 202, "x" * 201 + "y", safe_name("a\nb") + "\n"]
    assert len({safe_name(text) for text in texts}) == len(texts)


def test_safe_name_stays_readable() -> None:
    """What a name can hold of a text stays in its safe name."""
    assert safe_name("room\n{7}").startswith("room7-")
