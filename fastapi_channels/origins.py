"""Where a handshake comes from: the page's origin, and the client's address behind proxies.

Browsers let any page open a WebSocket to any server, with the cookies of that server. Only the Origin header tells.

Spec:
    RFC 6454 (origins), RFC 6455 10.2; decisions.md, 24.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.requests import HTTPConnection

from fastapi_channels._specs import entries_of

__all__ = ["OriginRules", "Proxies"]

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://({_NAME}|\[[0-9a-f:.]+\])\.?(?::([0-9]{{1,5}}))?")

#: Scheme, host and port.
Origin = tuple[str, str, int | None]


class OriginRules:
    """Which origins may connect.

    Args:
        allowed: Exact origins (`https://example.org`), sub-domains (`https://*.example.org`), or `*` for all, which
            alone is also for `null`; None for the same host and port as the handshake's.

    Raises:
        DefinitionError: It is no list.
        ValueError: One of them is no origin.
    """

    def __init__(self, allowed: Sequence[str] | None) -> None:
        entries = () if allowed is None else entries_of(allowed, "allowed_origins")
        self._same_only = allowed is None
        self._all = "*" in entries
        self._exact: set[Origin] = set()
        self._below: set[Origin] = set()
        for entry in entries:
            if entry == "*":
                continue
            scheme, sign, host = str(entry).partition("://*.")
            parsed = _parsed(f"{scheme}://{host}" if sign else scheme)
            if parsed is None:
                raise ValueError(f"{entry!r} is no origin, such as https://example.org, https://*.example.org or *")
            (self._below if sign else self._exact).add(parsed)

    def allow(self, origin: str | None, host: str) -> bool:
        """Whether a handshake with this Origin header, None if there is none, to this host may go on."""
        if origin is None or self._all:
            return True  # not a browser; or anybody
        parsed = _parsed(origin)
        if parsed is None:
            return False  # also `null`, which any sandboxed page has
        scheme, name, port = parsed
        if self._same_only:
            return parsed == _parsed(f"{scheme}://{host}")  # by the page's scheme: a proxy may have taken off TLS
        return parsed in self._exact or any(
            (scheme, port) == (s, p) and name.endswith(f".{above}") for s, above, p in self._below
        )


class Proxies:
    """Proxies whose headers are believed.

    Args:
        trusted: Their addresses or networks, such as `10.0.0.0/8`; `*` for whoever connects.

    Raises:
        ValueError: One of them is none.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        entries = list(trusted)
        self._all = "*" in entries
        self._networks = [ip_network(entry, strict=False) for entry in entries if entry != "*"]

    def address_of(self, connection: HTTPConnection) -> str:
        """The client's address: the peer's, or what trusted proxies say that stands before them."""
        peer = _peer(connection)
        if not self.trusts(peer):
            return peer
        address = peer
        forwarded = ",".join(connection.headers.getlist("x-forwarded-for"))
        for hop in reversed([hop.strip() for hop in forwarded.split(",") if hop.strip()]):
            address = _without_port(hop)
            if self._all or not self.trusts(address):
                break
        return address

    def host_of(self, connection: HTTPConnection) -> str:
        """The host that the client has asked for."""
        host = connection.headers.get("host", "")
        return connection.headers.get("x-forwarded-host", host) if self.trusts(_peer(connection)) else host

    def trusts(self, address: str) -> bool:
        """Whether a peer is one of them."""
        if self._all:
            return True
        try:
            forms = {ip_address(address), _ip_address(address)}
        except ValueError:
            return False
        return any(form in network for form in forms for network in self._networks)


def network_of(address: str) -> str:
    """What of an address tells one client from another: of IPv6 the /64, which one client has all of."""
    try:
        parsed = _ip_address(address)
    except ValueError:
        return address
    return str(ip_network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else str(parsed)


def _peer(connection: HTTPConnection) -> str:
    """The address of who has connected; none on a Unix socket."""
    return "" if connection.client is None else connection.client.host


def _ip_address(text: str) -> IPv4Address | IPv6Address:
    """An address; one of IPv4 also where a server that listens to both writes it as one of IPv6.

    Raises:
        ValueError: It is none.
    """
    parsed = ip_address(text)
    return (parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None) or parsed


def _parsed(origin: str) -> Origin | None:
    """An origin, with the scheme's port if it says none; None if it is none."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return None
    scheme, host, port = match.groups()
    return scheme, host, _DEFAULT_PORTS.get(scheme) if port is None else int(port)


def _without_port(hop: str) -> str:
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
