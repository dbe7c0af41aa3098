"""What a key's scope covers: patterns, tiers, methods and networks."""

import fnmatch
import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.serving.domain.permission import GROUPS, METHODS, ROLES, Permission, Role
from headrace.serving.domain.principal import Grant, Principal
from headrace.serving.domain.record import Caller
from headrace.serving.domain.scope import UNLIMITED, Scope, matches, network
from headrace.serving.domain.tier import Tier

FEW = st.text("ab*", max_size=12)


@given(pattern=FEW, text=st.text("ab", max_size=12))
def test_a_star_stands_for_any_run_of_characters(pattern, text):
    assert matches(pattern, text) == fnmatch.fnmatchcase(text, pattern)


@given(text=st.text(max_size=20))
def test_a_text_without_a_star_matches_itself_and_what_it_begins_and_ends_with(text):
    plain = text.replace("*", "")

    assert matches(plain, plain)
    assert matches("*", plain)
    assert all(matches(plain[:i] + "*" + plain[i:], plain) for i in range(len(plain) + 1))
    assert not matches(plain, plain + "x")


def test_no_pattern_is_slow():
    """As a regular expression this one would take longer than the universe has existed."""
    began = time.process_time()

    assert not matches("*a" * 60 + "*b", "a" * 128)

    assert time.process_time() - began < 0.1


@given(tiers=st.sets(st.sampled_from(Tier)), most=st.sampled_from(Tier))
def test_a_tier_is_allowed_when_it_is_listed_and_not_above_the_highest(tiers, most):
    scope = Scope(tiers=tuple(tiers), max_tier=most)

    order = [Tier.RESERVED, Tier.PRIORITY, Tier.STANDARD, Tier.FLEX, Tier.BATCH]
    allowed = {tier for tier in Tier if scope.allows_tier(tier)}
    assert allowed == tiers & set(order[order.index(most) :])


def test_a_key_that_says_nothing_of_methods_has_the_data_plane_and_no_more():
    assert UNLIMITED.allows_method("Inference/Generate")
    assert not [method for method in METHODS if UNLIMITED.allows_method(method)]
    assert not UNLIMITED.administers


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("inference", "Inference/CountTokens", "Admin/ListKeys"),
        ("admin-read", "Admin/ListKeys", "Admin/CreateKey"),
        ("admin", "Admin/CreateKey", "Inference/Generate"),
        ("Admin/List*", "Admin/ListKeys", "Admin/GetKey"),
        ("Inference/Generate", "Inference/Generate", "Inference/GenerateUnary"),
    ],
)
def test_a_method_is_allowed_by_its_group_or_its_pattern(entry, allowed, refused):
    scope = Scope(methods=(entry,))

    assert (scope.allows_method(allowed), scope.allows_method(refused)) == (True, False)


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (("10.0.0.0/8",), "10.255.0.1", "11.0.0.1"),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", "::ffff:11.1.2.3"),
        (("::ffff:10.0.0.0/104",), "10.1.2.3", "::a01:203"),
        (("2001:db8::/32",), "2001:db8::1", "2001:db9::1"),
        (("192.0.2.7/32", "2001:db8::/32"), "192.0.2.7", "192.0.2.8"),
        (("::/0",), "2001:db8::1", "10.0.0.1"),
    ],
)
def test_an_address_is_allowed_by_its_network_in_whatever_family_it_is_written(
    networks, inside, outside
):
    scope = Scope(addresses=networks)

    assert scope.allows_address(ipaddress.ip_address(inside))
    assert not scope.allows_address(ipaddress.ip_address(outside))
    assert not scope.allows_address(None)


@given(bits=st.integers(0, 32), net=st.integers(0, 2**32 - 1), host=st.integers(0, 2**32 - 1))
def test_a_network_holds_what_shares_its_prefix(bits, net, host):
    mask = ~((1 << (32 - bits)) - 1) & 0xFFFFFFFF
    text = f"{ipaddress.IPv4Address(net & mask)}/{bits}"

    scope = Scope(addresses=(text,))

    assert scope.allows_address(ipaddress.IPv4Address(host)) == (host & mask == net & mask)
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | host)
    assert scope.allows_address(mapped) == (host & mask == net & mask)


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "localhost", "::1%eth0/128x"])
def test_what_is_no_network_is_refused(text):
    with pytest.raises(ValueError, match=r"does not appear|has host bits|Address cannot be empty"):
        network(text)


def test_only_an_operator_of_all_may_ask_about_the_platform_as_a_whole():
    local = Principal(actor="oidc:c:eve", grants=(Grant(role=Role.OPERATOR, tenant_id="acme"),))
    everywhere = Principal(actor="oidc:c:ada", grants=(Grant(role=Role.VIEWER, tenant_id=None),))

    assert local.may(Permission.KEYS_WRITE, "acme")
    assert not local.may(Permission.KEYS_READ, "apex")
    assert not local.may(Permission.KEYS_READ, None)
    assert everywhere.may(Permission.KEYS_READ, None)
    assert not everywhere.may(Permission.KEYS_WRITE, "acme")
    assert (local.only_tenant_id, everywhere.only_tenant_id) == ("acme", None)


def test_no_organisation_makes_or_resumes_organisations_and_a_viewer_only_reads():
    holders = {role for role in Role if Permission.ORGANISATIONS_WRITE in ROLES[role]}

    assert holders == {Role.OPERATOR}
    assert all(permission.only_reads for permission in ROLES[Role.VIEWER])
    assert ROLES[Role.OWNER] > ROLES[Role.ADMIN] > ROLES[Role.DEVELOPER]


def test_a_key_grants_administration_only_when_it_has_all_of_it():
    """Else a key that may only make keys could make one that may do everything."""
    few = Principal.of_key(Caller("acme", "k", scope=Scope(methods=("Admin/CreateKey",))))
    every = Principal.of_key(Caller("acme", "k", scope=Scope(methods=("admin",))))

    assert not few.may(Permission.KEYS_GRANT_ADMIN, "acme")
    assert every.may(Permission.KEYS_GRANT_ADMIN, "acme")
    assert not every.may(Permission.KEYS_GRANT_ADMIN, "apex")


def test_reading_methods_are_those_that_need_no_permission_to_write():
    assert "Admin/ListAudit" in GROUPS["admin-read"]
    assert not {"Admin/CreateKey", "Admin/RevokeKey"} & set(GROUPS["admin-read"])
