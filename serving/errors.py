"""Every failure a caller can act on.

* ServingError
  * InvalidRequest          INVALID_ARGUMENT     the request can never succeed
    x InvalidSchema         INVALID_ARGUMENT     the schema, regex or choice cannot be compiled
    x PromptTooLong         INVALID_ARGUMENT     prompt and answer exceed the context
  x ModelNotFound           NOT_FOUND            no such model here
  x Unauthenticated         UNAUTHENTICATED      no key, or an unknown one
  * PermissionDenied        PERMISSION_DENIED    a known key that may not do this
    x AccountSuspended      PERMISSION_DENIED    the key's organisation or project is suspended
  x AlreadyServed           ALREADY_EXISTS       this request_id was used before
  x IdempotencyConflict     ALREADY_EXISTS       this idempotency key came with another request
  x IdempotencyInFlight     ALREADY_EXISTS       its first call runs elsewhere: retry for its answer
  x IdempotencyUnavailable  UNAVAILABLE          whether the key was used cannot be looked up
  x QuotaExceeded           RESOURCE_EXHAUSTED   a rate of the caller's: retry after the time given
  x ConcurrencyExceeded     RESOURCE_EXHAUSTED   too many of the caller's requests at once
  x BudgetExhausted         RESOURCE_EXHAUSTED   the caller's money is spent; waiting may not help
  x TierUnavailable         RESOURCE_EXHAUSTED   the tier's capacity is taken
  x MessageTooLarge         RESOURCE_EXHAUSTED   the message exceeds this server's limit
  x Overloaded              UNAVAILABLE          our limit: retry later or elsewhere
  x Draining                UNAVAILABLE          this frontend is shutting down
  x MeterUnavailable        UNAVAILABLE          usage cannot be recorded
  x QuotaUnavailable        UNAVAILABLE          a shared limit's authority does not answer
  x DeadlineExceeded        DEADLINE_EXCEEDED    the caller's deadline passed
  x EngineFault             INTERNAL             the device failed under the request
  x ConfigRefused           FAILED_PRECONDITION  the configuration or the home folder is not usable
  x KeyNotFound             NOT_FOUND            no API key has this id
  x AccountNotFound         NOT_FOUND            no such organisation, project, budget or batch
  x AccountExists           ALREADY_EXISTS       the name is taken
  x CorrectionExists        ALREADY_EXISTS       the id of a correction or credit is taken
  x AccountsUnavailable     UNAVAILABLE          organisations and keys cannot be read
  x UnknownUnit             INVALID_ARGUMENT     nothing is counted in this unit
  x AmountOutOfRange        INVALID_ARGUMENT     a quantity or sum that cannot be recorded
  x MeterLogDamaged         FAILED_PRECONDITION  the meter log has a gap, a flipped bit or a fork
  x LedgerUnavailable       UNAVAILABLE          the ledger's database does not answer
  x InvoiceBlocked          FAILED_PRECONDITION  log and ledger differ; nothing is invoiced
  * ArtifactError           FAILED_PRECONDITION  a model cannot be loaded or built
    x CheckpointUnreadable  FAILED_PRECONDITION  a truncated, foreign or unsafe checkpoint
    x ArtifactTampered      FAILED_PRECONDITION  a file differs from its manifest or signature
    x ArtifactUntrusted     FAILED_PRECONDITION  signed with a key that is not trusted here
    x ArtifactUnverified    FAILED_PRECONDITION  the engine itself was never run against a reference
    x ArtifactInUse         FAILED_PRECONDITION  it cannot be changed while a process has it loaded
    x RemoteStoreFault      UNAVAILABLE          a bucket or folder of artifacts does not answer
    x DeviceUnsuitable      FAILED_PRECONDITION  the machine's GPU, driver or library is another
    x DoesNotFit            FAILED_PRECONDITION  the memory is too small
    x OutsideTolerance      FAILED_PRECONDITION  the engine differs too much from the reference
    x UnsupportedModel      FAILED_PRECONDITION  a family or feature we do not compile
    x StorageFull           FAILED_PRECONDITION  the disk has no room for what must be written

Anything else that escapes is a bug: it crashes the task, is logged with its traceback, and
reaches the client as INTERNAL without details.
"""

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """The canonical status codes we use; the frontend maps them onto gRPC."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class ServingError(Exception):
    """A failure in three sentences: what happened, why, and what to do.

    `reason` is the machine's name for it: stable, UPPER_SNAKE, safe to alert on. The sentences
    are for people and may be reworded in any release.
    """

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        what: str,
        *,
        why: str,
        fix: str,
        field: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{what} {why} {fix}")
        self.what = what
        self.why = why
        self.fix = fix
        self.field = field
        """The request field or config key to blame, if one is."""
        self.retry_after_ms = retry_after_ms
        self.left_no_record = False
        """Set where it is certain that the meter has no record of the request it refused."""


class InvalidRequest(ServingError):
    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class InvalidSchema(InvalidRequest):
    reason = "INVALID_SCHEMA"


class PromptTooLong(InvalidRequest):
    reason = "PROMPT_TOO_LONG"


class ModelNotFound(ServingError):
    code = Code.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class Unauthenticated(ServingError):
    code = Code.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(ServingError):
    code = Code.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class AccountSuspended(PermissionDenied):
    reason = "ACCOUNT_SUSPENDED"


class AlreadyServed(ServingError):
    code = Code.ALREADY_EXISTS
    reason = "ALREADY_SERVED"


class IdempotencyConflict(ServingError):
    code = Code.ALREADY_EXISTS
    reason = "IDEMPOTENCY_CONFLICT"


class IdempotencyInFlight(ServingError):
    code = Code.ALREADY_EXISTS
    reason = "IDEMPOTENCY_IN_FLIGHT"


class IdempotencyUnavailable(ServingError):
    code = Code.UNAVAILABLE
    reason = "IDEMPOTENCY_UNAVAILABLE"


class LimitExceeded(ServingError):
    """A limit of the caller's own, named so that a client can act on it."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "LIMIT_EXCEEDED"

    def __init__(
        self,
        what: str,
        *,
        why: str,
        fix: str,
        metric: str = "",
        limit: int = 0,
        subject: str = "",
        field: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(what, why=why, fix=fix, field=field, retry_after_ms=retry_after_ms)
        self.metric = metric
        """What is limited, for example `output_tokens_per_min`."""
        self.limit = limit
        self.subject = subject
        """Whose limit it is, for example `project:acme/search`."""


class QuotaExceeded(LimitExceeded):
    reason = "QUOTA_EXCEEDED"


class ConcurrencyExceeded(LimitExceeded):
    reason = "CONCURRENCY_EXCEEDED"


class BudgetExhausted(LimitExceeded):
    reason = "BUDGET_EXHAUSTED"


class TierUnavailable(LimitExceeded):
    reason = "TIER_UNAVAILABLE"


class MessageTooLarge(ServingError):
    code = Code.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class Overloaded(ServingError):
    code = Code.UNAVAILABLE
    reason = "OVERLOADED"


class Draining(ServingError):
    code = Code.UNAVAILABLE
    reason = "DRAINING"


class MeterUnavailable(ServingError):
    code = Code.UNAVAILABLE
    reason = "METER_UNAVAILABLE"


class QuotaUnavailable(ServingError):
    code = Code.UNAVAILABLE
    reason = "QUOTA_UNAVAILABLE"


class DeadlineExceeded(ServingError):
    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class EngineFault(ServingError):
    code = Code.INTERNAL
    reason = "ENGINE_FAULT"


class ConfigRefused(ServingError):
    code = Code.FAILED_PRECONDITION
    reason = "CONFIG_REFUSED"


class KeyNotFound(ServingError):
    code = Code.NOT_FOUND
    reason = "KEY_NOT_FOUND"


class AccountNotFound(ServingError):
    code = Code.NOT_FOUND
    reason = "ACCOUNT_NOT_FOUND"


class AccountExists(ServingError):
    code = Code.ALREADY_EXISTS
    reason = "ACCOUNT_EXISTS"


class CorrectionExists(ServingError):
    code = Code.ALREADY_EXISTS
    reason = "CORRECTION_EXISTS"


class AccountsUnavailable(ServingError):
    code = Code.UNAVAILABLE
    reason = "ACCOUNTS_UNAVAILABLE"


class UnknownUnit(InvalidRequest):
    reason = "UNKNOWN_UNIT"


class AmountOutOfRange(InvalidRequest):
    reason = "AMOUNT_OUT_OF_RANGE"


class MeterLogDamaged(ServingError):
    """Where it is, for programs; `what` says it to people."""

    code = Code.FAILED_PRECONDITION
    reason = "METER_LOG_DAMAGED"

    def __init__(
        self,
        what: str,
        *,
        why: str,
        fix: str,
        path: str = "",
        offset: int | None = None,
        seq: int | None = None,
    ) -> None:
        super().__init__(what, why=why, fix=fix)
        self.path = path
        self.offset = offset
        self.seq = seq


class LedgerUnavailable(ServingError):
    code = Code.UNAVAILABLE
    reason = "LEDGER_UNAVAILABLE"


class InvoiceBlocked(ServingError):
    code = Code.FAILED_PRECONDITION
    reason = "INVOICE_BLOCKED"


class ArtifactError(ServingError):
    code = Code.FAILED_PRECONDITION
    reason = "ARTIFACT"


class CheckpointUnreadable(ArtifactError):
    reason = "CHECKPOINT_UNREADABLE"


class ArtifactTampered(ArtifactError):
    reason = "ARTIFACT_TAMPERED"


class ArtifactUntrusted(ArtifactError):
    reason = "ARTIFACT_UNTRUSTED"


class ArtifactUnverified(ArtifactError):
    reason = "ARTIFACT_UNVERIFIED"


class ArtifactInUse(ArtifactError):
    reason = "ARTIFACT_IN_USE"


class RemoteStoreFault(ArtifactError):
    code = Code.UNAVAILABLE
    reason = "REMOTE_STORE_FAULT"


class DeviceUnsuitable(ArtifactError):
    reason = "DEVICE_UNSUITABLE"


class DoesNotFit(ArtifactError):
    reason = "DOES_NOT_FIT"


class OutsideTolerance(ArtifactError):
    reason = "OUTSIDE_TOLERANCE"


class UnsupportedModel(ArtifactError):
    reason = "UNSUPPORTED_MODEL"


class StorageFull(ArtifactError):
    reason = "STORAGE_FULL"
