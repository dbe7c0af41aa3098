"""Organisations for tests, made in a home as the command line would make them."""

from contextlib import closing
from pathlib import Path

from headrace.serving.admission.accounts import open_accounts
from headrace.serving.config import Config


def key_of(home: Path, tenant_id: str) -> str:
    """A key of a new organisation in this home."""
    with closing(open_accounts(Config(home=home))) as accounts:
        accounts.create_organisation(tenant_id=tenant_id)
        return accounts.create_key(tenant_id=tenant_id).key
