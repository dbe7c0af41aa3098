"""Whether a caller's scope covers what they ask for, as refusals that say what it lacks."""

from headrace.serving.domain.record import Caller
from headrace.serving.domain.scope import Address
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import PermissionDenied


def check_method(caller: Caller, method: str) -> None:
    """`method` is like `Inference/Generate`.

    Raises:
        PermissionDenied: it is outside the scope.
    """
    if not caller.scope.allows_method(method):
        allowed = ", ".join(caller.scope.methods)
        raise _denied(caller, f"may not call {method}", f"Its methods are {allowed}.", "methods")


def check_address(caller: Caller, address: Address | None) -> None:
    """`address` is where the call comes from; None where that is no network.

    Raises:
        PermissionDenied: it is outside the scope.
    """
    if not caller.scope.allows_address(address):
        shown = "a local socket" if address is None else str(address)
        raise _denied(
            caller,
            f"may not be used from {shown}",
            "It is bound to other networks.",
            "addresses",
        )


def check_model(caller: Caller, model: str) -> None:
    """Raises PermissionDenied: the model is outside the scope."""
    if not caller.scope.allows_model(model):
        allowed = ", ".join(caller.scope.models)
        raise _denied(caller, f"may not use the model {model!r}", f"It may: {allowed}.", "models")


def check_tier(caller: Caller, tier: Tier) -> None:
    """Raises PermissionDenied: the tier is outside the scope."""
    if not caller.scope.allows_tier(tier):
        allowed = ", ".join(each for each in Tier if caller.scope.allows_tier(each))
        raise _denied(caller, f"may not ask for the tier {tier}", f"It may: {allowed}.", "tiers")


def _denied(caller: Caller, what: str, why: str, part: str) -> PermissionDenied:
    return PermissionDenied(
        f"The key {caller.key_id} {what}.",
        why=why,
        fix=f"Use another key, or have its scope widened: `headrace keys update {caller.key_id} "
        f"--{part} …`.",
    )
