"""What may be configured about accounts, and what is refused."""

from pathlib import Path

import pytest

from headrace.serving.config import Config
from headrace.serving.config_accounts import OperatorIssuer, OperatorRole, TokenAlgorithm
from headrace.serving.domain.permission import Role
from headrace.serving.errors import ConfigRefused


def load(home: Path, text: str) -> Config:
    (home / "config.yaml").write_text(text)
    return Config.load(home)


def test_by_default_accounts_are_at_home_and_no_operator_and_no_proxy_is_believed(tmp_path):
    config = Config.load(tmp_path)

    assert config.accounts_path == tmp_path / "accounts.db"
    assert (config.accounts.postgres, config.accounts.stale_s) == (None, 60)
    assert (config.operators, config.frontend.trusted_proxies) == ((), ())


def test_an_issuer_and_its_roles_are_read(tmp_path):
    config = load(
        tmp_path,
        """
        accounts: {postgres: host=db dbname=headrace passfile=/run/secrets/pgpass}
        frontend: {trusted_proxies: [10.0.0.0/8, "fd00::/8"]}
        operators:
          - name: corp
            issuer: https://login.example.com
            audience: headrace
            jwks: /etc/headrace/jwks.json
            algorithms: [EdDSA]
            roles:
              - {name: headrace-admins, role: operator, tenant: "*"}
              - {name: developers, role: developer}
        """,
    )

    assert config.frontend.trusted_proxies == ("10.0.0.0/8", "fd00::/8")
    assert config.operators == (
        OperatorIssuer(
            name="corp",
            issuer="https://login.example.com",
            audience="headrace",
            jwks=Path("/etc/headrace/jwks.json"),
            algorithms=(TokenAlgorithm.EDDSA,),
            roles=(
                OperatorRole(name="headrace-admins", role=Role.OPERATOR, tenant="*"),
                OperatorRole(name="developers", role=Role.DEVELOPER),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("frontend: {trusted_proxies: 10.0.0.0/8}", "frontend.trusted_proxies"),
        ("frontend: {trusted_proxies: [7]}", "frontend.trusted_proxies[0]"),
        ("frontend: {trusted_proxies: [10.0.0.1/8]}", "frontend.trusted_proxies"),
        ("accounts: {stale_s: 0}", "accounts.stale_s"),
        ("operators: [{name: corp}]", "operators[0].issuer"),
        (
            "operators: [{name: c, issuer: i, audience: a, jwks: f, algorithms: [HS256]}]",
            "operators[0].algorithms[0]",
        ),
        (
            "operators: [{name: c, issuer: i, audience: a, jwks: f, algorithms: [none]}]",
            "operators[0].algorithms[0]",
        ),
        (
            "operators: [{name: c, issuer: i, audience: a, jwks: f, roles: [{name: x, role: q}]}]",
            "operators[0].roles[0].role",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(tmp_path, text, field):
    with pytest.raises(ConfigRefused) as refusal:
        load(tmp_path, text)

    assert refusal.value.field == field
