"""What a key may do: which models, tiers and methods, and from where."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from headrace.serving.domain.permission import GROUPS, METHODS
from headrace.serving.domain.tier import Tier

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NETWORK_SETS_MAX = 1024
"""Parsed lists of networks that are kept: 20 us each to make again, 1 KB each to keep."""
_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a key may do. The default is all that the data plane offers, from anywhere."""

    models: tuple[str, ...] = ("*",)
    """Patterns; `*` stands for any run of characters, and nothing else is special."""
    tiers: tuple[Tier, ...] = tuple(Tier)
    methods: tuple[str, ...] = ("inference", "batch")
    """Groups (`GROUPS`) or patterns like `Inference/Generate` and `Admin/List*`."""
    addresses: tuple[str, ...] = ()
    """Networks in CIDR form that calls may come from; empty: anywhere."""
    default_tier: Tier = Tier.STANDARD
    """Of a request that asks for none."""
    max_tier: Tier = Tier.RESERVED
    """The strongest promise that the key may ask for."""

    def allows_model(self, model: str) -> bool:
        return any(matches(pattern, model) for pattern in self.models)

    def allows_tier(self, tier: Tier) -> bool:
        return tier in self.tiers and tier.rank >= self.max_tier.rank

    def allows_method(self, method: str) -> bool:
        """`method` is like `Inference/Generate`."""
        return any(
            matches(pattern, method)
            for entry in self.methods
            for pattern in GROUPS.get(entry, (entry,))
        )

    def allows_address(self, address: Address | None) -> bool:
        """Whether a call may come from `address`; None is a caller that has none, on a socket."""
        if not self.addresses:
            return True
        if address is None:
            return False
        address = plain(address)
        return any(address in network for network in networks(self.addresses))

    @property
    def administers(self) -> bool:
        """Whether it reaches any administrative method, even a reading one."""
        return any(self.allows_method(method) for method in METHODS)


UNLIMITED = Scope()


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text has the pattern's form. Linear: no pattern makes it slow."""
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, last = rest
    if not text.startswith(first):
        return False
    at = len(first)
    for part in middle:
        # The leftmost place leaves the most room for what follows.
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(text) - len(last) >= at and text.endswith(last)


def plain(address: Address) -> Address:
    """An IPv4 address that came in IPv6's clothes, as itself: `::ffff:10.0.0.1` is `10.0.0.1`."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def network(text: str) -> Network:
    """The network that `text` names, v4-mapped ones as IPv4.

    Raises:
        ValueError: it names none, or has bits set beyond its prefix.
    """
    parsed = ipaddress.ip_network(text)
    if isinstance(parsed, ipaddress.IPv6Network) and parsed.subnet_of(_V4_MAPPED):
        inside = parsed.network_address.ipv4_mapped
        assert inside is not None
        return ipaddress.IPv4Network((inside, parsed.prefixlen - _V4_MAPPED.prefixlen))
    return parsed


@lru_cache(NETWORK_SETS_MAX)
def networks(texts: tuple[str, ...]) -> Sequence[Network]:
    """`network` of each. Raises as it does."""
    return tuple(network(text) for text in texts)
