"""Origins and proxies: which pages may connect, and whom proxies are believed to speak for."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from fastapi_channels.consumers import WebSocketConsumer
from fastapi_channels.exceptions import DefinitionError, SettingsError
from fastapi_channels.origins import OriginRules, Proxies, network_of
from fastapi_channels.testing import connect
from tests.conftest import app_with


class Quiet(WebSocketConsumer): ...


# The same origin

SAME: list[tuple[str, str, bool]] = [
    ("http://example.org", "example.org", True),
    ("https://example.org", "example.org", True),
    ("http://example.org:80", "example.org", True),
    ("http://example.org", "example.org:80", True),
    ("https://example.org:443", "example.org", True),
    ("https://example.org", "example.org:443", True),
    ("http://example.org:8000", "example.org:8000", True),
    ("HTTP://EXAMPLE.org", "example.ORG", True),
    ("http://example.org.", "example.org", True),
    ("http://example.org", "example.org.", True),
    ("http://example.org.:8000", "example.org:8000", True),
    ("http://localhost:3000", "localhost:3000", True),
    ("http://127.0.0.1:3000", "127.0.0.1:3000", True),
    ("http://[::1]", "[::1]", True),
    ("http://[::1]:8000", "[::1]:8000", True),
    ("http://[2001:DB8::1]", "[2001:db8::1]", True),
    ("http://xn--bcher-kva.example", "xn--bcher-kva.example", True),
    # Another host, port, or scheme's port.
    ("http://example.org", "example.com", False),
    ("http://example.org:8000", "example.org", False),
    ("http://example.org", "example.org:8000", False),
    ("http://example.org:8001", "example.org:8000", False),
    ("https://example.org", "example.org:80", False),
    ("http://example.org", "example.org:443", False),
    ("http://www.example.org", "example.org", False),
    ("http://example.org", "www.example.org", False),
    ("http://evil-example.org", "example.org", False),
    ("http://example.org.evil.com", "example.org", False),
    ("http://localhost:3000", "127.0.0.1:3000", False),
    ("http://[::1]:8000", "[::2]:8000", False),
    ("http://[::1]", "127.0.0.1", False),
    # No hosts.
    ("http://example.org", "", False),
    ("http://example.org", ":80", False),
    ("http://example.org", "example.org:port", False),
    ("http://example.org", "example.org:99999", False),
    ("http://example.org", "[::1", False),
    ("http://example.org", "example.org, evil.com", False),
]


@pytest.mark.parametrize(("origin", "host", "is_allowed"), SAME)
def test_same_origin(origin: str, host: str, is_allowed: bool) -> None:
    """Without a setting the page's host and port have to be those of the handshake, whatever their case and form."""
    assert OriginRules(None).allow(origin, host) is is_allowed


GARBAGE = [
    "null",
    "NULL",
    "",
    " ",
    "example.org",
    "//example.org",
    "http:",
    "http:/example.org",
    "http://",
    "http:///",
    "http://:80",
    "http://example.org/",
    "http://example.org/path",
    "http://example.org?query",
    "http://example.org#fragment",
    "http://user@example.org",
    "http://example.org@evil.com",
    "http://evil.com@example.org",
    "http://user:password@example.org",
    "http://example.org http://evil.com",
    "http://evil.com http://example.org",
    "http://example.org, http://evil.com",
    "http://example.org\thttp://evil.com",
    " http://example.org",
    "http://example.org ",
    "http://example.org\n",
    "http://example.org:port",
    "http://example.org:99999",
    "http://example.org:-80",
    "http://[example.org",
    "http://[::1",
    "1http://example.org",
    "://example.org",
    "file://",
    "file:///etc/passwd",
    "about:blank",
    "data:text/html,x",
    "javascript:alert(1)",
    "*",
    "http://*",
    "http://*.example.org",
    "x" * 100_000,
]


@pytest.mark.parametrize("origin", GARBAGE, ids=lambda value: repr(value[:40]))
def test_what_is_no_origin(origin: str) -> None:
    """What is no origin, `null` too, is that of no page which may connect, unless all may."""
    assert not OriginRules(None).allow(origin, "example.org")
    assert not OriginRules(None).allow(origin, origin)
    assert not OriginRules(["http://example.org", "https://example.org"]).allow(origin, "example.org")
    assert not OriginRules(["http://*.example.org", "https://*.example.org"]).allow(origin, "example.org")
    assert not OriginRules([]).allow(origin, "example.org")
    assert OriginRules(["*"]).allow(origin, "example.org")


@pytest.mark.parametrize("allowed", [None, [], ["https://example.org"], ["https://*.example.org"], ["*"]], ids=str)
def test_no_origin(allowed: Sequence[str] | None) -> None:
    """Who sends no Origin header is no browser and may connect."""
    rules = OriginRules(allowed)
    assert rules.allow(None, "example.org")
    assert rules.allow(None, "")


# Origins that are allowed

LISTED: list[tuple[str, str, bool]] = [
    ("https://example.org", "https://example.org", True),
    ("https://example.org", "https://example.org:443", True),
    ("https://example.org:443", "https://example.org", True),
    ("https://example.org", "HTTPS://Example.ORG", True),
    ("HTTPS://EXAMPLE.ORG", "https://example.org", True),
    ("https://example.org", "https://example.org.", True),
    ("https://example.org.", "https://example.org", True),
    ("https://example.org:8443", "https://example.org:8443", True),
    ("http://localhost:3000", "http://localhost:3000", True),
    ("http://[::1]:3000", "http://[::1]:3000", True),
    ("http://[::1]", "http://[::1]:80", True),
    ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh", True),
    ("capacitor://localhost", "capacitor://localhost", True),
    ("https://example.org", "http://example.org", False),
    ("http://example.org", "https://example.org", False),
    ("https://example.org", "https://example.org:8443", False),
    ("https://example.org:8443", "https://example.org", False),
    ("https://example.org", "http://example.org:443", False),
    ("http://example.org", "https://example.org:80", False),
    ("https://example.org", "https://www.example.org", False),
    ("https://www.example.org", "https://example.org", False),
    ("https://example.org", "https://evil-example.org", False),
    ("https://example.org", "https://example.org.evil.com", False),
    ("https://example.org", "https://example.orgx", False),
    ("https://example.org", "https://example.org:0", False),
    ("https://example.org", "https://exаmple.org", False),  # the a is Cyrillic
    ("chrome-extension://abcdefgh", "chrome-extension://abcdefghi", False),
    # Sub-domains.
    ("https://*.example.org", "https://www.example.org", True),
    ("https://*.example.org", "https://a.b.example.org", True),
    ("https://*.example.org", "https://WWW.Example.org:443", True),
    ("https://*.Example.ORG", "https://www.example.org", True),
    ("https://*.example.org", "https://www.example.org.", True),
    ("https://*.example.org:8443", "https://www.example.org:8443", True),
    ("https://*.example.org", "https://example.org", False),
    ("https://*.example.org", "https://evil-example.org", False),
    ("https://*.example.org", "https://evilexample.org", False),
    ("https://*.example.org", "https://example.org.evil.com", False),
    ("https://*.example.org", "https://www.example.org.evil.com", False),
    ("https://*.example.org", "https://www.example.com", False),
    ("https://*.example.org", "http://www.example.org", False),
    ("https://*.example.org", "https://www.example.org:8443", False),
    ("https://*.example.org:8443", "https://www.example.org", False),
    ("https://*.example.org", "https://.example.org", False),
    ("https://*.example.org", "https://evil.com\\.example.org", False),
    ("https://*.example.org", "https://evil.com\x00.example.org", False),
]


@pytest.mark.parametrize(("allowed", "origin", "is_allowed"), LISTED)
def test_allowed_origins(allowed: str, origin: str, is_allowed: bool) -> None:
    """An origin of the list is compared by scheme, host and port; `*.` stands for sub-domains, at any depth, alone."""
    assert OriginRules([allowed]).allow(origin, "api.example.net") is is_allowed
    assert OriginRules(["https://other.example.net", allowed]).allow(origin, "") is is_allowed


def test_a_list_replaces_the_same_origin() -> None:
    """With a list the handshake's own host is no longer allowed; an empty one allows no page at all."""
    assert not OriginRules(["https://example.org"]).allow("https://api.example.org", "api.example.org")
    assert not OriginRules([]).allow("https://api.example.org", "api.example.org")


def test_all_among_others() -> None:
    """`*` allows all, also beside other entries."""
    assert OriginRules(["https://example.org", "*"]).allow("https://evil.com", "example.org")
    assert OriginRules(["*", "https://*.example.org"]).allow("null", "example.org")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "example.org",
        "null",
        "https://",
        "https://example.org/",
        "https://example.org/path",
        "https://user@example.org",
        "https://example.org:port",
        "https://example.*",
        "https://www.*.org",
        "https://*.*.org",
        "https://*.",
        "https://bücher.example",
        "https://example..org",
        "https://a*.example.org",
        "https://*example.org",
        "https://*",
        "https://example.org https://example.com",
        " https://example.org",
        "**",
    ],
)
def test_what_can_not_be_allowed(entry: str) -> None:
    """An entry that is no origin, or a pattern of another kind, is an error that names it, wherever it is given."""
    with pytest.raises(ValueError, match=r"no origin|all sub-domains"):
        OriginRules(["https://example.org", entry])
    with pytest.raises(DefinitionError, match=r"^Wrong\.allowed_origins: "):
        type("Wrong", (WebSocketConsumer,), {"__qualname__": "Wrong", "allowed_origins": [entry]})


async def test_what_can_not_be_allowed_in_the_settings() -> None:
    """In the settings it stops the start."""
    app = app_with(Quiet, allowed_origins=["example.org"])
    with pytest.raises(SettingsError, match=r"ALLOWED_ORIGINS.*'example.org'"):
        async with connect(app, "/ws"):
            pass


def test_a_text_is_no_list_of_origins() -> None:
    """One origin without a list is an error, and not a list of its characters."""
    with pytest.raises(DefinitionError, match="allowed_origins"):
        type("Wrong", (WebSocketConsumer,), {"allowed_origins": "*"})
    with pytest.raises(DefinitionError, match="allowed_origins"):
        type("Wrong", (WebSocketConsumer,), {"allowed_origins": iter(["https://example.org"])})


# Handshakes


async def is_let_in(app: Any, origin: str | None, host: str = "testserver", **more: str) -> bool:
    headers = {"host": host, **{name.replace("_", "-"): value for name, value in more.items()}}
    if origin is not None:
        headers["origin"] = origin
    async with connect(app, "/ws", headers=headers, client=("10.0.0.1", 1)) as ws:
        if ws.response is not None:
            assert ws.response.status_code == 403
            assert ws.response.json() == {"detail": "this page may not connect here", "code": "permission_denied"}
        return ws.accepted


async def test_a_handshake_of_another_page() -> None:
    """A page of another origin is refused with 403 before it is connected, by default and without any setting."""
    app = app_with(Quiet)
    assert await is_let_in(app, "http://testserver")
    assert await is_let_in(app, None)
    assert not await is_let_in(app, "http://evil.com")
    assert not await is_let_in(app, "null")
    assert not await is_let_in(app, "")


async def test_a_refused_page_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which origin was refused, in one line and not more of it than is good, and which setting it is."""
    app = app_with(Quiet)
    origin = "http://evil.com/\x1b[31m" + "x" * 10_000
    assert not await is_let_in(app, origin, host="h" * 10_000)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    message = record.getMessage()
    assert "evil.com" in message
    assert "ALLOWED_ORIGINS" in message
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 1000


async def test_a_consumers_own_origins() -> None:
    """The consumer's list stands in place of that of the settings."""

    class Own(Quiet):
        allowed_origins = ["https://own.example"]

    class Any_(Quiet):  # noqa: N801 (a name for a route)
        allowed_origins = ["*"]

    class Nobody(Quiet):
        allowed_origins: Sequence[str] | None = []

    settings = {"allowed_origins": ["https://example.org"]}
    assert await is_let_in(app_with(Quiet, **settings), "https://example.org")
    assert not await is_let_in(app_with(Quiet, **settings), "http://testserver")
    assert await is_let_in(app_with(Own, **settings), "https://own.example")
    assert not await is_let_in(app_with(Own, **settings), "https://example.org")
    assert await is_let_in(app_with(Any_, **settings), "null")
    assert not await is_let_in(app_with(Nobody, **settings), "https://example.org")
    assert await is_let_in(app_with(Nobody, **settings), None)


async def test_the_host_behind_a_proxy() -> None:
    """X-Forwarded-Host is the host that counts if a trusted proxy says it, and nothing if anybody else does."""
    trusting = app_with(Quiet, trusted_proxies=["10.0.0.0/8"])
    wary = app_with(Quiet, trusted_proxies=["192.0.2.1"])
    behind = {"host": "backend:8000", "x_forwarded_host": "example.org"}
    assert await is_let_in(trusting, "https://example.org", **behind)
    assert not await is_let_in(trusting, "http://backend:8000", **behind)
    assert not await is_let_in(wary, "https://example.org", **behind)
    assert await is_let_in(wary, "http://backend:8000", **behind)
    assert not await is_let_in(app_with(Quiet), "http://evil.com", x_forwarded_host="evil.com")


# Proxies


def connection(peer: str | None, *headers: tuple[str, str]) -> HTTPConnection:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    client = None if peer is None else (peer, 1)
    return HTTPConnection({"type": "websocket", "client": client, "headers": raw, "path": "/", "query_string": b""})


def forwarded(peer: str | None, *values: str) -> HTTPConnection:
    return connection(peer, *(("x-forwarded-for", value) for value in values))


TRUSTED = ["10.0.0.0/8", "192.0.2.7", "2001:db8:1::/48"]

CHAINS: list[tuple[str, list[str], str]] = [
    # Nobody's word counts but a trusted proxy's.
    ("203.0.113.1", [], "203.0.113.1"),
    ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
    ("203.0.113.1", ["10.0.0.1"], "203.0.113.1"),
    ("192.0.2.8", ["198.51.100.1"], "192.0.2.8"),
    ("testclient", ["198.51.100.1"], "testclient"),
    ("", ["198.51.100.1"], ""),
    # What a trusted proxy says.
    ("10.0.0.1", [], "10.0.0.1"),
    ("10.0.0.1", [""], "10.0.0.1"),
    ("10.0.0.1", [" , ,"], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
    ("192.0.2.7", ["198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["  198.51.100.1  "], "198.51.100.1"),
    ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
    ("2001:db8:1::5", ["198.51.100.1"], "198.51.100.1"),
    ("2001:db8:2::5", ["198.51.100.1"], "2001:db8:2::5"),
    # Through several of them.
    ("10.0.0.1", ["198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1, 10.0.0.3, 10.0.0.2"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1", "10.0.0.3", "10.0.0.2"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1,10.0.0.3", "192.0.2.7"], "198.51.100.1"),
    ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
    # What the client made up stands to the left of its address.
    ("10.0.0.1", ["1.2.3.4, 198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["10.0.0.9, 198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["1.2.3.4", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    ("10.0.0.1", ["127.0.0.1, 10.0.0.9, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    ("10.0.0.1", ["unknown, 198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["'; DROP TABLE, 198.51.100.1"], "198.51.100.1"),
    # With ports, as some write it.
    ("10.0.0.1", ["198.51.100.1:5000"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1:5000, 10.0.0.2:80"], "198.51.100.1"),
    ("10.0.0.1", ["[2001:db8::1]:5000"], "2001:db8::1"),
    ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
    # IPv4 by way of IPv6, as a server that listens to both sees it.
    ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
    ("::ffff:203.0.113.1", ["198.51.100.1"], "::ffff:203.0.113.1"),
]


@pytest.mark.parametrize(("peer", "values", "address"), CHAINS)
def test_forwarded_addresses(peer: str, values: list[str], address: str) -> None:
    """The client is the last one in X-Forwarded-For that is no trusted proxy; what stands before it is not believed."""
    assert Proxies(TRUSTED).address_of(forwarded(peer, *values)) == address


@pytest.mark.parametrize("peer", ["203.0.113.1", "10.0.0.1", "127.0.0.1", "::1"])
def test_nobody_is_trusted_by_default(peer: str) -> None:
    """Without trusted proxies no header is believed, not even from this machine."""
    proxies = Proxies()
    assert proxies.address_of(forwarded(peer, "198.51.100.1")) == peer
    assert not proxies.trusts(peer)
    assert proxies.host_of(connection(peer, ("host", "a"), ("x-forwarded-host", "b"))) == "a"


def test_everybody_is_trusted() -> None:
    """With `*` whoever connects is a proxy, and the client is whom it names: the last one, before which is hearsay."""
    proxies = Proxies(["*"])
    assert proxies.address_of(forwarded("203.0.113.1", "198.51.100.1")) == "198.51.100.1"
    assert proxies.address_of(forwarded("203.0.113.1", "1.2.3.4, 198.51.100.1")) == "198.51.100.1"
    assert proxies.address_of(forwarded("203.0.113.1", "1.2.3.4", "198.51.100.1")) == "198.51.100.1"
    assert proxies.address_of(forwarded("203.0.113.1")) == "203.0.113.1"
    assert proxies.host_of(connection("203.0.113.1", ("host", "a"), ("x-forwarded-host", "b"))) == "b"


def test_a_proxy_on_a_unix_socket() -> None:
    """A peer without an address, as on a Unix socket, is trusted with `*` alone, in all its headers."""
    headers = ("host", "a"), ("x-forwarded-host", "b"), ("x-forwarded-for", "198.51.100.1")
    proxies = Proxies(["*"])
    assert proxies.address_of(connection(None, *headers)) == "198.51.100.1"
    assert proxies.host_of(connection(None, *headers)) == "b"
    proxies = Proxies(TRUSTED)
    assert proxies.address_of(connection(None, *headers)) == ""
    assert proxies.host_of(connection(None, *headers)) == "a"


@pytest.mark.parametrize(
    ("peer", "headers", "host"),
    [
        ("10.0.0.1", [("host", "a"), ("x-forwarded-host", "b")], "b"),
        ("10.0.0.1", [("host", "a")], "a"),
        ("10.0.0.1", [("x-forwarded-host", "b")], "b"),
        ("10.0.0.1", [], ""),
        ("203.0.113.1", [("host", "a"), ("x-forwarded-host", "b")], "a"),
        ("203.0.113.1", [("x-forwarded-host", "b")], ""),
    ],
)
def test_forwarded_hosts(peer: str, headers: list[tuple[str, str]], host: str) -> None:
    """X-Forwarded-Host is the host if a trusted proxy sends it; else it is the Host header."""
    assert Proxies(TRUSTED).host_of(connection(peer, *headers)) == host


@pytest.mark.parametrize("entry", ["", "proxy", "10.0.0", "10.0.0.0/33", "10.0.0.1:80", "http://10.0.0.1", "10.*"])
def test_what_is_no_proxy(entry: str) -> None:
    """What is no address or network is an error, in the settings too."""
    with pytest.raises(ValueError, match=r"\S"):
        Proxies([entry])
    with pytest.raises(SettingsError, match=r"^TRUSTED_PROXIES"):
        app_with(Quiet, trusted_proxies=["10.0.0.1", entry])


def test_ipv4_by_way_of_ipv6() -> None:
    """A proxy may be listed as a server that listens to both sees it, too."""
    assert Proxies(["::ffff:10.0.0.1"]).trusts("::ffff:10.0.0.1")
    assert Proxies(["::ffff:10.0.0.0/104"]).trusts("::ffff:10.9.9.9")
    assert not Proxies(["::ffff:10.0.0.1"]).trusts("::ffff:10.0.0.2")
    assert not Proxies(["10.0.0.1"]).trusts("::10.0.0.1")


def test_networks_may_be_written_with_an_address() -> None:
    """A network may be given by any of its addresses."""
    assert Proxies(["10.1.2.3/8"]).trusts("10.9.9.9")
    assert not Proxies(["10.1.2.3"]).trusts("10.1.2.4")


# Networks


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.1", "203.0.113.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:DB8:0:0:ffff::", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("::1", "::/64"),
        ("::ffff:203.0.113.1", "203.0.113.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
        ("unknown", "unknown"),
    ],
)
def test_what_is_one_client(address: str, network: str) -> None:
    """An IPv4 address is one client, of an IPv6 address its /64; what is no address stays as it is."""
    assert network_of(address) == network
