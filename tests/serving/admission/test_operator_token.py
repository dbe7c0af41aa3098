"""Operators' tokens: whose are accepted, what they may do, and every way of being refused."""

import base64
import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwk, jwt
from joserfc.errors import SecurityWarning

from headrace.serving.admission.operator_token import LOOK_EVERY_MS, OperatorTokens
from headrace.serving.config_accounts import OperatorIssuer, OperatorRole, TokenAlgorithm
from headrace.serving.domain.permission import Role
from headrace.serving.domain.principal import Grant
from headrace.serving.errors import ConfigRefused, Unauthenticated
from headrace.serving.testing.clock import ManualClock

pytestmark = pytest.mark.filterwarnings(f"ignore::{SecurityWarning.__module__}.SecurityWarning")

ISSUER, AUDIENCE = "https://login.example.com", "headrace"
ED = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
EC = jwk.ECKey.generate_key("P-256", {"kid": "ec"})
RSA = jwk.RSAKey.generate_key(2048, {"kid": "rsa"})
STRANGER = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
SYMMETRIC = jwk.OctKey.generate_key(256, {"kid": "ed"})


class Office:
    """An issuer, and the frontend that knows its public keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "jwks.json"
        self.clock = ManualClock()
        self.publishes(ED, EC, RSA)
        self.config = OperatorIssuer(
            name="corp",
            issuer=ISSUER,
            audience=AUDIENCE,
            jwks=self.path,
            roles=(
                OperatorRole(name="platform", role=Role.OPERATOR, tenant="*"),
                OperatorRole(name="apex-owners", role=Role.OWNER, tenant="apex"),
                OperatorRole(name="developers", role=Role.DEVELOPER),
            ),
        )
        self.door = OperatorTokens([self.config], clock=self.clock)

    def publishes(self, *keys: jwk.Key) -> None:
        public = [key.as_dict(private=False) for key in keys]
        self.path.write_text(json.dumps({"keys": public}))

    def issues(self, key: jwk.Key = ED, alg: str = "EdDSA", header=None, **claims) -> str:
        now = self.clock.unix_ms() // 1000
        content = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 600}
        content |= claims
        content = {name: value for name, value in content.items() if value is not None}
        head = {"alg": alg, "kid": key.kid} | (header or {})
        head = {name: value for name, value in head.items() if value is not None}
        return jwt.encode(head, content, key, algorithms=[alg])

    def refuses(self, token: str) -> str:
        with pytest.raises(Unauthenticated) as refusal:
            self.door.verify(token)
        return refusal.value.why


@pytest.fixture
def office(tmp_path) -> Office:
    return Office(tmp_path)


@pytest.mark.parametrize(("key", "alg"), [(ED, "EdDSA"), (EC, "ES256"), (RSA, "RS256")])
def test_a_token_of_the_issuer_names_its_bearer(office, key, alg):
    found = office.door.verify(office.issues(key, alg, roles="platform"))

    assert found.actor == "oidc:corp:ada"
    assert found.grants == (Grant(role=Role.OPERATOR, tenant_id=None),)


def test_roles_mean_what_the_configuration_says_and_the_rest_means_nothing(office):
    token = office.issues(roles=["apex-owners", "developers", "root", 7], tenant="acme")

    assert office.door.verify(token).grants == (
        Grant(role=Role.OWNER, tenant_id="apex"),
        Grant(role=Role.DEVELOPER, tenant_id="acme"),
    )


@pytest.mark.parametrize("tenant", [None, "", "*", 7, ["acme"]])
def test_no_token_makes_its_role_global(office, tenant):
    assert office.door.verify(office.issues(roles="developers", tenant=tenant)).grants == ()


def unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def headed(office: Office, **header: object) -> str:
    """A good token under another header."""
    _, content, signature = office.issues().split(".")
    return f"{unpadded(json.dumps(header).encode())}.{content}.{signature}"


def unsigned(office: Office) -> str:
    return headed(office, alg="none").rpartition(".")[0] + "."


REFUSED = {
    "no algorithm": unsigned,
    "a symmetric algorithm": lambda o: o.issues(SYMMETRIC, "HS256"),
    "an algorithm that is not allowed": lambda o: o.issues(RSA, "PS256"),
    "another algorithm than its key's": lambda o: o.issues(EC, "ES256", header={"kid": "ed"}),
    "a stranger's key": lambda o: o.issues(STRANGER),
    "a key that is not published": lambda o: o.issues(header={"kid": "gone"}),
    "no key id among several": lambda o: o.issues(header={"kid": None}),
    "a key of its own": lambda o: o.issues(STRANGER, header={"jwk": STRANGER.as_dict(False)}),
    "an unknown critical header": lambda o: headed(o, alg="EdDSA", kid="ed", crit=["x"], x=1),
    "an algorithm that is a list": lambda o: headed(o, alg=["EdDSA"], kid="ed"),
    "a key id that is a list": lambda o: headed(o, alg="EdDSA", kid=["ed"]),
    "another audience": lambda o: o.issues(aud="somebody-else"),
    "no audience": lambda o: o.issues(aud=None),
    "another issuer": lambda o: o.issues(iss="https://evil.example.com"),
    "no issuer": lambda o: o.issues(iss=None),
    "no expiry": lambda o: o.issues(exp=None),
    "an expiry that is a text": lambda o: o.issues(exp="tomorrow"),
    "an expiry beyond all numbers": lambda o: o.issues(exp=float("nan")),
    "an expiry a minute ago": lambda o: o.issues(exp=o.clock.unix_ms() // 1000 - 60),
    "a start in two minutes": lambda o: o.issues(nbf=o.clock.unix_ms() // 1000 + 120),
    "an issue in two minutes": lambda o: o.issues(iat=o.clock.unix_ms() // 1000 + 120),
    "no subject": lambda o: o.issues(sub=None),
    "a subject with a line's end": lambda o: o.issues(sub="ada\nlocal:root"),
    "a subject that is endless": lambda o: o.issues(sub="a" * 129),
    "a flipped bit": lambda o: o.issues()[:-2] + "AA",
    "a part too few": lambda o: o.issues().rsplit(".", 1)[0],
    "nothing": lambda o: "",
    "a book": lambda o: "x." * 100_000,
}


@pytest.mark.parametrize("made", REFUSED.values(), ids=REFUSED.keys())
def test_a_token_is_refused_with(office, made):
    assert office.refuses(made(office))


def test_clocks_may_differ_by_less_than_a_minute(office):
    now = office.clock.unix_ms() // 1000

    assert office.door.verify(office.issues(exp=now - 59))
    assert office.door.verify(office.issues(nbf=now + 60, iat=now + 60))


def test_an_algorithm_that_is_taken_out_of_the_list_opens_nothing(office):
    token = office.issues(RSA, "RS256")
    config = OperatorIssuer(
        name="corp",
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks=office.path,
        algorithms=(TokenAlgorithm.EDDSA,),
    )

    with pytest.raises(Unauthenticated):
        OperatorTokens([config], clock=office.clock).verify(token)


def test_keys_are_read_again_when_the_issuer_rotates_them(office):
    old = office.issues()
    fresh = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed-2"})
    office.publishes(fresh)
    office.clock.advance(ms=LOOK_EVERY_MS)

    assert office.door.verify(office.issues(fresh))
    assert office.refuses(old)


def test_a_file_of_keys_that_breaks_leaves_the_last_good_ones(office):
    office.path.write_text("{")
    office.clock.advance(ms=LOOK_EVERY_MS)

    assert office.door.verify(office.issues())


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(list, id="none"),
        pytest.param(lambda: [SYMMETRIC.as_dict(private=True)], id="a symmetric one"),
        pytest.param(lambda: [jwk.RSAKey.generate_key(1024).as_dict(False)], id="a short one"),
        pytest.param(lambda: [jwk.ECKey.generate_key("P-521").as_dict(False)], id="an odd curve"),
        pytest.param(lambda: [{"kty": "RSA"}], id="half of one"),
        pytest.param(lambda: [7], id="a number"),
    ],
)
def test_a_set_without_a_key_that_we_can_use_is_refused_at_the_start(office, keys):
    office.path.write_text(json.dumps({"keys": keys()}))

    with pytest.raises(ConfigRefused):
        OperatorTokens([office.config], clock=office.clock)


def test_two_issuers_of_one_name_are_refused(office):
    with pytest.raises(ConfigRefused):
        OperatorTokens([office.config, office.config], clock=office.clock)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
HEADER_NAMES = ("alg", "kid", "typ", "crit", "b64", "jwk", "x5c")


@settings(deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(HEADER_NAMES), JSON | st.just("EdDSA")) | JSON,
    claims=st.dictionaries(st.sampled_from(("exp", "aud", "sub", "nbf")), JSON) | JSON,
    signature=st.binary(max_size=70),
)
def test_whatever_is_presented_the_answer_is_a_refusal(tmp_path_factory, header, claims, signature):
    office = Office(tmp_path_factory.mktemp("office"))
    claims = claims | {"iss": ISSUER} if isinstance(claims, dict) else claims

    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    office.refuses(".".join(unpadded(part) for part in parts))
    office.refuses(b"".join(parts).decode("latin-1"))


@settings(deadline=None)
@given(claims=st.dictionaries(st.sampled_from(("exp", "aud", "sub", "nbf", "roles")), JSON))
def test_whatever_the_issuer_signs_the_answer_is_a_bearer_or_a_refusal(tmp_path_factory, claims):
    office = Office(tmp_path_factory.mktemp("office"))
    token = office.issues(**claims)

    with contextlib.suppress(Unauthenticated):
        assert office.door.verify(token).grants == ()
