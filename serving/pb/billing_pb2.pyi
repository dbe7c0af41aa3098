from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AdjustRequest(_message.Message):
    __slots__ = ("tenant_id", "project_id", "adjustment_id", "amount_nano", "currency", "reason", "request_id")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENT_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    project_id: str
    adjustment_id: str
    amount_nano: int
    currency: str
    reason: str
    request_id: str
    def __init__(self, tenant_id: _Optional[str] = ..., project_id: _Optional[str] = ..., adjustment_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., currency: _Optional[str] = ..., reason: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("tenant_id", "project_id", "grant_id", "amount_nano", "currency", "reason", "expires_unix_ms")
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_ID_FIELD_NUMBER: _ClassVar[int]
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    project_id: str
    grant_id: str
    amount_nano: int
    currency: str
    reason: str
    expires_unix_ms: int
    def __init__(self, tenant_id: _Optional[str] = ..., project_id: _Optional[str] = ..., grant_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., currency: _Optional[str] = ..., reason: _Optional[str] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class CorrectionRecorded(_message.Message):
    __slots__ = ("log_id", "seq")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    log_id: str
    seq: int
    def __init__(self, log_id: _Optional[str] = ..., seq: _Optional[int] = ...) -> None: ...
