from headrace.v1 import usage_pb2 as _usage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MeterEvent(_message.Message):
    __slots__ = ("unix_ms", "epoch", "reserve", "checkpoint", "settle", "void", "expire", "refuse", "adjust", "grant", "carry", "seal")
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    ADJUST_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CARRY_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    unix_ms: int
    epoch: Epoch
    reserve: Reserve
    checkpoint: Checkpoint
    settle: Settle
    void: Void
    expire: Expire
    refuse: Refuse
    adjust: Adjust
    grant: Grant
    carry: Carry
    seal: Seal
    def __init__(self, unix_ms: _Optional[int] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ..., void: _Optional[_Union[Void, _Mapping]] = ..., expire: _Optional[_Union[Expire, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., adjust: _Optional[_Union[Adjust, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., carry: _Optional[_Union[Carry, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("epoch", "version")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    version: str
    def __init__(self, epoch: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("tenant_id", "project_id", "key_id", "request_id", "model", "version", "tier", "price", "accepted_unix_ms", "hold_femto", "idempotency_digest")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FEMTO_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    project_id: str
    key_id: str
    request_id: str
    model: str
    version: str
    tier: str
    price: FrozenPrice
    accepted_unix_ms: int
    hold_femto: int
    idempotency_digest: bytes
    def __init__(self, tenant_id: _Optional[str] = ..., project_id: _Optional[str] = ..., key_id: _Optional[str] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., tier: _Optional[str] = ..., price: _Optional[_Union[FrozenPrice, _Mapping]] = ..., accepted_unix_ms: _Optional[int] = ..., hold_femto: _Optional[int] = ..., idempotency_digest: _Optional[bytes] = ...) -> None: ...

class FrozenPrice(_message.Message):
    __slots__ = ("currency", "version", "rates")
    class RatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    currency: str
    version: str
    rates: _containers.ScalarMap[str, int]
    def __init__(self, currency: _Optional[str] = ..., version: _Optional[str] = ..., rates: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("reserve", "usage")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    reserve: int
    usage: _usage_pb2.Usage
    def __init__(self, reserve: _Optional[int] = ..., usage: _Optional[_Union[_usage_pb2.Usage, _Mapping]] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("reserve", "tenant_id", "request_id", "usage", "outcome", "charge_femto", "version", "first_token_unix_ms", "settled_unix_ms", "replicas_tried", "receipt", "quantities")
    class QuantitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CHARGE_FEMTO_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_TRIED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    QUANTITIES_FIELD_NUMBER: _ClassVar[int]
    reserve: int
    tenant_id: str
    request_id: str
    usage: _usage_pb2.Usage
    outcome: str
    charge_femto: int
    version: str
    first_token_unix_ms: int
    settled_unix_ms: int
    replicas_tried: int
    receipt: _usage_pb2.Receipt
    quantities: _containers.ScalarMap[str, int]
    def __init__(self, reserve: _Optional[int] = ..., tenant_id: _Optional[str] = ..., request_id: _Optional[str] = ..., usage: _Optional[_Union[_usage_pb2.Usage, _Mapping]] = ..., outcome: _Optional[str] = ..., charge_femto: _Optional[int] = ..., version: _Optional[str] = ..., first_token_unix_ms: _Optional[int] = ..., settled_unix_ms: _Optional[int] = ..., replicas_tried: _Optional[int] = ..., receipt: _Optional[_Union[_usage_pb2.Receipt, _Mapping]] = ..., quantities: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Void(_message.Message):
    __slots__ = ("reserve", "tenant_id", "request_id", "outcome", "settled_unix_ms", "replicas_tried", "receipt")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SETTLED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_TRIED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    reserve: int
    tenant_id: str
    request_id: str
    outcome: str
    settled_unix_ms: int
    replicas_tried: int
    receipt: _usage_pb2.Receipt
    def __init__(self, reserve: _Optional[int] = ..., tenant_id: _Optional[str] = ..., request_id: _Optional[str] = ..., outcome: _Optional[str] = ..., settled_unix_ms: _Optional[int] = ..., replicas_tried: _Optional[int] = ..., receipt: _Optional[_Union[_usage_pb2.Receipt, _Mapping]] = ...) -> None: ...

class Expire(_message.Message):
    __slots__ = ("reserve", "tenant_id", "request_id", "settled_unix_ms")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SETTLED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    reserve: int
    tenant_id: str
    request_id: str
    settled_unix_ms: int
    def __init__(self, reserve: _Optional[int] = ..., tenant_id: _Optional[str] = ..., request_id: _Optional[str] = ..., settled_unix_ms: _Optional[int] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("tenant_id", "project_id", "key_id", "request_id", "model", "tier", "outcome", "currency", "price_version", "receipt")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PRICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    project_id: str
    key_id: str
    request_id: str
    model: str
    tier: str
    outcome: str
    currency: str
    price_version: str
    receipt: _usage_pb2.Receipt
    def __init__(self, tenant_id: _Optional[str] = ..., project_id: _Optional[str] = ..., key_id: _Optional[str] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., tier: _Optional[str] = ..., outcome: _Optional[str] = ..., currency: _Optional[str] = ..., price_version: _Optional[str] = ..., receipt: _Optional[_Union[_usage_pb2.Receipt, _Mapping]] = ...) -> None: ...

class Adjust(_message.Message):
    __slots__ = ("adjustment_id", "tenant_id", "project_id", "request_id", "amount_femto", "currency", "reason", "actor")
    ADJUSTMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FEMTO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    adjustment_id: str
    tenant_id: str
    project_id: str
    request_id: str
    amount_femto: int
    currency: str
    reason: str
    actor: str
    def __init__(self, adjustment_id: _Optional[str] = ..., tenant_id: _Optional[str] = ..., project_id: _Optional[str] = ..., request_id: _Optional[str] = ..., amount_femto: _Optional[int] = ..., currency: _Optional[str] = ..., reason: _Optional[str] = ..., actor: _Optional[str] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("grant_id", "tenant_id", "budget_id", "amount_femto", "currency", "expires_unix_ms", "actor", "project_id", "reason")
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    BUDGET_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FEMTO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    grant_id: str
    tenant_id: str
    budget_id: str
    amount_femto: int
    currency: str
    expires_unix_ms: int
    actor: str
    project_id: str
    reason: str
    def __init__(self, grant_id: _Optional[str] = ..., tenant_id: _Optional[str] = ..., budget_id: _Optional[str] = ..., amount_femto: _Optional[int] = ..., currency: _Optional[str] = ..., expires_unix_ms: _Optional[int] = ..., actor: _Optional[str] = ..., project_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Carry(_message.Message):
    __slots__ = ("open", "left")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    open: _containers.RepeatedCompositeFieldContainer[OpenHold]
    left: int
    def __init__(self, open: _Optional[_Iterable[_Union[OpenHold, _Mapping]]] = ..., left: _Optional[int] = ...) -> None: ...

class OpenHold(_message.Message):
    __slots__ = ("reserve", "reserved", "usage")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    reserve: int
    reserved: Reserve
    usage: _usage_pb2.Usage
    def __init__(self, reserve: _Optional[int] = ..., reserved: _Optional[_Union[Reserve, _Mapping]] = ..., usage: _Optional[_Union[_usage_pb2.Usage, _Mapping]] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("merkle_root", "records", "first_seq", "chain")
    MERKLE_ROOT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    merkle_root: bytes
    records: int
    first_seq: int
    chain: bytes
    def __init__(self, merkle_root: _Optional[bytes] = ..., records: _Optional[int] = ..., first_seq: _Optional[int] = ..., chain: _Optional[bytes] = ...) -> None: ...
