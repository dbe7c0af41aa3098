"""What an organisation, a project or a key may be called and given, as refusals that name it."""

import re

from headrace.serving.admission.key_store import DEMO_PREFIX
from headrace.serving.domain.permission import GROUPS
from headrace.serving.domain.scope import Scope, network
from headrace.serving.errors import InvalidRequest

LABEL_CHARS_MAX = 100
PATTERNS_MAX = 64
"""Of models or methods in one scope: each costs a check 0.3 us."""
PATTERN_CHARS_MAX = 128
"""As long as a model's name may be."""
NETWORKS_MAX = 64
"""Each costs a check 0.5 us."""
OVERLAP_MS_MAX = 30 * 86_400_000
"""A month is enough to roll a key out anywhere; longer, and the old one is simply a second key."""
DAY_MS = 86_400_000
EXPIRY_MS_DEFAULT = 90 * DAY_MS
"""A leaked key that nobody knows of ends within a quarter."""

_SLUG = re.compile(r"[a-z0-9-]{1,40}")
_KEY_ID = re.compile(r"[0-9a-z]{4,16}")
_METHOD = re.compile(r"[A-Za-z]+/[A-Za-z]*\*?|\*")


def check_slug(name: str, field: str) -> None:
    """Of an organisation or a project that is to be made."""
    if not _SLUG.fullmatch(name):
        raise InvalidRequest(
            f"{field} is {_shown(name)}.",
            why="It has 1 to 40 lower-case letters, digits or hyphens.",
            fix="Choose such a name, for example acme-prod.",
            field=field,
        )


def check_key_id(key_id: str) -> None:
    """Of a key whose id the caller chooses."""
    if not _KEY_ID.fullmatch(key_id) or key_id.startswith(DEMO_PREFIX):
        raise InvalidRequest(
            f"key_id is {_shown(key_id)}.",
            why="It has 4 to 16 lower-case letters or digits and does not begin with `demo`.",
            fix="Choose such an id, or leave it out and one is made.",
            field="key_id",
        )


def check_label(text: str, field: str) -> None:
    if len(text) > LABEL_CHARS_MAX or not text.isprintable():
        raise InvalidRequest(
            f"{field} has {len(text)} characters, or one that cannot be printed.",
            why=f"It has at most {LABEL_CHARS_MAX} characters on one line.",
            fix="Shorten it.",
            field=field,
        )


def check_expiry(expires_unix_ms: int | None, now_unix_ms: int) -> None:
    if expires_unix_ms is not None and not now_unix_ms < expires_unix_ms < 1 << 53:
        raise InvalidRequest(
            f"expires_unix_ms is {expires_unix_ms}, and it is {now_unix_ms} now.",
            why="A key that is made or changed expires later than now, in milliseconds since 1970.",
            fix="Give a later time, or revoke the key.",
            field="expires_unix_ms",
        )


def check_overlap(overlap_ms: int) -> None:
    if not 0 <= overlap_ms <= OVERLAP_MS_MAX:
        raise InvalidRequest(
            f"overlap_ms is {overlap_ms}.",
            why=f"Old and new key are both good for at most {OVERLAP_MS_MAX // DAY_MS} days.",
            fix="Give a shorter overlap.",
            field="overlap_ms",
        )


def check_scope(scope: Scope) -> None:
    """Everything in it means something, and its default tier is one that it allows."""
    for field, patterns in (("models", scope.models), ("methods", scope.methods)):
        if not 1 <= len(patterns) <= PATTERNS_MAX:
            raise _refused(field, f"{len(patterns)} entries", f"It has 1 to {PATTERNS_MAX}.")
        for pattern in patterns:
            if not (1 <= len(pattern) <= PATTERN_CHARS_MAX and pattern.isprintable()):
                why = f"An entry has 1 to {PATTERN_CHARS_MAX} printable characters."
                raise _refused(field, _shown(pattern), why)
    for entry in scope.methods:
        if entry not in GROUPS and not _METHOD.fullmatch(entry):
            why = f"It is one of {', '.join(GROUPS)}, or like Inference/Generate or Inference/*."
            raise _refused("methods", _shown(entry), why)
    _check_networks(scope.addresses)
    if not scope.allows_tier(scope.default_tier):
        raise InvalidRequest(
            f"scope.default_tier is {scope.default_tier}, which the scope does not allow.",
            why="A request that asks for no tier gets this one.",
            fix="Make it one of `tiers` that is not above `max_tier`.",
            field="scope.default_tier",
        )


def _check_networks(texts: tuple[str, ...]) -> None:
    if len(texts) > NETWORKS_MAX:
        raise _refused("addresses", f"{len(texts)} entries", f"It has at most {NETWORKS_MAX}.")
    for text in texts:
        try:
            network(text)
        except ValueError as error:
            why = f"Each is a network in CIDR form: {error}."
            raise _refused("addresses", _shown(text), why) from error


def _refused(field: str, found: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"scope.{field} has {found}.",
        why=why,
        fix="Correct that entry.",
        field=f"scope.{field}",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
