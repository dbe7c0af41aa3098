from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseRequest(_message.Message):
    __slots__ = ("holder", "epoch", "seq", "claims")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    holder: str
    epoch: str
    seq: int
    claims: _containers.RepeatedCompositeFieldContainer[QuotaClaim]
    def __init__(self, holder: _Optional[str] = ..., epoch: _Optional[str] = ..., seq: _Optional[int] = ..., claims: _Optional[_Iterable[_Union[QuotaClaim, _Mapping]]] = ...) -> None: ...

class QuotaClaim(_message.Message):
    __slots__ = ("limit_name", "lease_id", "returned", "spent", "need", "desired", "closes")
    LIMIT_NAME_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    limit_name: str
    lease_id: str
    returned: str
    spent: str
    need: str
    desired: str
    closes: bool
    def __init__(self, limit_name: _Optional[str] = ..., lease_id: _Optional[str] = ..., returned: _Optional[str] = ..., spent: _Optional[str] = ..., need: _Optional[str] = ..., desired: _Optional[str] = ..., closes: _Optional[bool] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("grants",)
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.RepeatedCompositeFieldContainer[QuotaGrant]
    def __init__(self, grants: _Optional[_Iterable[_Union[QuotaGrant, _Mapping]]] = ...) -> None: ...

class QuotaGrant(_message.Message):
    __slots__ = ("limit_name", "lease_id", "granted", "expires_in_ms", "left", "wait_ms", "is_closed")
    LIMIT_NAME_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    IS_CLOSED_FIELD_NUMBER: _ClassVar[int]
    limit_name: str
    lease_id: str
    granted: str
    expires_in_ms: int
    left: str
    wait_ms: int
    is_closed: bool
    def __init__(self, limit_name: _Optional[str] = ..., lease_id: _Optional[str] = ..., granted: _Optional[str] = ..., expires_in_ms: _Optional[int] = ..., left: _Optional[str] = ..., wait_ms: _Optional[int] = ..., is_closed: _Optional[bool] = ...) -> None: ...

class QuotaLimit(_message.Message):
    __slots__ = ("subject", "metric", "limit", "model", "burst", "hard", "currency")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BURST_FIELD_NUMBER: _ClassVar[int]
    HARD_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    subject: str
    metric: str
    limit: int
    model: str
    burst: int
    hard: bool
    currency: str
    def __init__(self, subject: _Optional[str] = ..., metric: _Optional[str] = ..., limit: _Optional[int] = ..., model: _Optional[str] = ..., burst: _Optional[int] = ..., hard: _Optional[bool] = ..., currency: _Optional[str] = ...) -> None: ...

class ListLimitsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLimitsReply(_message.Message):
    __slots__ = ("limits",)
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: _containers.RepeatedCompositeFieldContainer[QuotaLimit]
    def __init__(self, limits: _Optional[_Iterable[_Union[QuotaLimit, _Mapping]]] = ...) -> None: ...

class ListStandingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStandingsReply(_message.Message):
    __slots__ = ("standings",)
    STANDINGS_FIELD_NUMBER: _ClassVar[int]
    standings: _containers.RepeatedCompositeFieldContainer[QuotaStanding]
    def __init__(self, standings: _Optional[_Iterable[_Union[QuotaStanding, _Mapping]]] = ...) -> None: ...

class QuotaStanding(_message.Message):
    __slots__ = ("limit", "period", "total", "spent", "held", "left")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    limit: QuotaLimit
    period: str
    total: str
    spent: str
    held: str
    left: str
    def __init__(self, limit: _Optional[_Union[QuotaLimit, _Mapping]] = ..., period: _Optional[str] = ..., total: _Optional[str] = ..., spent: _Optional[str] = ..., held: _Optional[str] = ..., left: _Optional[str] = ...) -> None: ...

class ListOpenLeasesRequest(_message.Message):
    __slots__ = ("holder", "epoch")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    holder: str
    epoch: str
    def __init__(self, holder: _Optional[str] = ..., epoch: _Optional[str] = ...) -> None: ...

class ListOpenLeasesReply(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[OpenLease]
    def __init__(self, leases: _Optional[_Iterable[_Union[OpenLease, _Mapping]]] = ...) -> None: ...

class OpenLease(_message.Message):
    __slots__ = ("lease_id", "limit_name", "period", "epoch", "granted", "spent")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_NAME_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    limit_name: str
    period: str
    epoch: str
    granted: str
    spent: str
    def __init__(self, lease_id: _Optional[str] = ..., limit_name: _Optional[str] = ..., period: _Optional[str] = ..., epoch: _Optional[str] = ..., granted: _Optional[str] = ..., spent: _Optional[str] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("lease_id", "spent")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    spent: str
    def __init__(self, lease_id: _Optional[str] = ..., spent: _Optional[str] = ...) -> None: ...

class ResolveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
