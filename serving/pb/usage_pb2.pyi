from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_RESERVED: _ClassVar[Tier]
    TIER_PRIORITY: _ClassVar[Tier]
    TIER_STANDARD: _ClassVar[Tier]
    TIER_FLEX: _ClassVar[Tier]
    TIER_BATCH: _ClassVar[Tier]
TIER_UNSPECIFIED: Tier
TIER_RESERVED: Tier
TIER_PRIORITY: Tier
TIER_STANDARD: Tier
TIER_FLEX: Tier
TIER_BATCH: Tier

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "cache_write_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_WRITE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cache_write_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., reasoning_tokens: _Optional[int] = ..., cache_write_tokens: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("tier_asked", "tier_served", "ttft_us", "itl_p50_us", "itl_p99_us", "verdict", "missed")
    TIER_ASKED_FIELD_NUMBER: _ClassVar[int]
    TIER_SERVED_FIELD_NUMBER: _ClassVar[int]
    TTFT_US_FIELD_NUMBER: _ClassVar[int]
    ITL_P50_US_FIELD_NUMBER: _ClassVar[int]
    ITL_P99_US_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    tier_asked: Tier
    tier_served: Tier
    ttft_us: int
    itl_p50_us: int
    itl_p99_us: int
    verdict: str
    missed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tier_asked: _Optional[_Union[Tier, str]] = ..., tier_served: _Optional[_Union[Tier, str]] = ..., ttft_us: _Optional[int] = ..., itl_p50_us: _Optional[int] = ..., itl_p99_us: _Optional[int] = ..., verdict: _Optional[str] = ..., missed: _Optional[_Iterable[str]] = ...) -> None: ...

class Charge(_message.Message):
    __slots__ = ("nano", "currency", "price_version")
    NANO_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PRICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    nano: int
    currency: str
    price_version: str
    def __init__(self, nano: _Optional[int] = ..., currency: _Optional[str] = ..., price_version: _Optional[str] = ...) -> None: ...
