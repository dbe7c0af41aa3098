"""Where a call comes from, as grpc writes it and as trusted proxies do."""

import ipaddress

import pytest

from headrace.serving.frontend.peer import HOPS_MAX, Peers, peer_address


class Call:
    """What a handler knows of the other end."""

    def __init__(self, peer: str, *headers: str) -> None:
        self._peer = peer
        self._metadata = tuple(("x-forwarded-for", header) for header in headers)

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self):
        return self._metadata


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:4711", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "fe80::1"),
        ("ipv6:[::ffff:10.0.0.1]:4711", "10.0.0.1"),
        ("unix:/run/headrace.sock", None),
        ("unix-abstract:%00headrace", None),
        ("ipv4:nonsense:1", None),
        ("", None),
    ],
)
def test_an_address_is_read_as_grpc_writes_it(peer, address):
    assert peer_address(peer) == (address and ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("peer", "headers", "address"),
    [
        pytest.param("ipv4:8.8.8.8:1", ["9.9.9.9"], "8.8.8.8", id="no proxy, so its header lies"),
        pytest.param("ipv4:10.0.0.1:1", [], "10.0.0.1", id="a proxy that says nothing"),
        pytest.param("ipv4:10.0.0.1:1", ["9.9.9.9"], "9.9.9.9", id="a proxy and its client"),
        pytest.param(
            "ipv4:10.0.0.1:1", ["1.1.1.1, 9.9.9.9, 10.0.0.2"], "9.9.9.9", id="the nearest stranger"
        ),
        pytest.param(
            "ipv4:10.0.0.1:1", ["1.1.1.1", "9.9.9.9"], "9.9.9.9", id="a header that stands twice"
        ),
        pytest.param("ipv4:10.0.0.1:1", ["9.9.9.9, x"], None, id="a proxy that writes nonsense"),
        pytest.param("ipv4:10.0.0.1:1", ["[2001:db8::1]"], "2001:db8::1", id="IPv6"),
        pytest.param(
            "ipv4:10.0.0.1:1",
            ["9.9.9.9" + ",10.0.0.3" * HOPS_MAX],
            "10.0.0.3",
            id="no further than is looked",
        ),
        pytest.param("unix:/x", ["10.0.0.9"], None, id="a socket has no address"),
    ],
)
def test_a_proxy_is_believed_about_the_nearest_address_that_is_no_proxy(peer, headers, address):
    peers = Peers(["10.0.0.0/8"], header="X-Forwarded-For")

    found = peers.address(Call(peer, *headers))

    assert found == (address and ipaddress.ip_address(address))


def test_without_trusted_proxies_no_header_is_read():
    peers = Peers([], header="x-forwarded-for")

    assert str(peers.address(Call("ipv4:10.0.0.1:1", "9.9.9.9"))) == "10.0.0.1"
