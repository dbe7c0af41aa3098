"""Where a call comes from: the address that a key's networks are compared with."""

import ipaddress
from collections.abc import Sequence
from urllib.parse import unquote

import grpc.aio

from headrace.serving.domain.scope import Address, network, plain

HOPS_MAX = 16
"""Addresses of a header that are looked at, the nearest first."""


class Peers:
    """Tells callers' addresses; proxies are believed only when they are listed."""

    def __init__(self, trusted_proxies: Sequence[str], *, header: str) -> None:
        """`trusted_proxies` are networks in CIDR form; `header` is where their members write."""
        self._trusted = tuple(network(each) for each in trusted_proxies)
        self._header = header.lower()

    def address(self, context: grpc.aio.ServicerContext) -> Address | None:
        """The nearest address that is no trusted proxy's; None on a socket, or where one lies."""
        address = peer_address(context.peer())
        if address is None or not self._is_trusted(address):
            return address
        hops = [
            hop
            for key, value in context.invocation_metadata() or ()
            if key == self._header and isinstance(value, str)
            for hop in value.split(",")
        ]
        for hop in hops[: -HOPS_MAX - 1 : -1]:
            address = _parsed(hop.strip())
            if address is None or not self._is_trusted(address):
                return address
        return address

    def _is_trusted(self, address: Address) -> bool:
        return any(address in each for each in self._trusted)


def peer_address(peer: str) -> Address | None:
    """Of grpc's `ipv4:10.0.0.1:4711` or `ipv6:%5B::1%5D:4711`; None for `unix:…`."""
    family, _, rest = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return None
    return _parsed(rest.rpartition(":")[0])


def _parsed(text: str) -> Address | None:
    host = text.removeprefix("[").partition("]")[0].partition("%")[0]
    try:
        return plain(ipaddress.ip_address(host))
    except ValueError:
        return None
