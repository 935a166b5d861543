from tandem.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitRequest(_message.Message):
    __slots__ = ("router_id", "dispatch", "incarnation", "request", "prefill", "expected_cached", "planned_local")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CACHED_FIELD_NUMBER: _ClassVar[int]
    PLANNED_LOCAL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    dispatch: int
    incarnation: str
    request: _common_pb2.GenerateRequest
    prefill: _containers.RepeatedCompositeFieldContainer[PrefillTarget]
    expected_cached: int
    planned_local: bool
    def __init__(self, router_id: _Optional[str] = ..., dispatch: _Optional[int] = ..., incarnation: _Optional[str] = ..., request: _Optional[_Union[_common_pb2.GenerateRequest, _Mapping]] = ..., prefill: _Optional[_Iterable[_Union[PrefillTarget, _Mapping]]] = ..., expected_cached: _Optional[int] = ..., planned_local: _Optional[bool] = ...) -> None: ...

class PrefillTarget(_message.Message):
    __slots__ = ("incarnation", "address")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    address: str
    def __init__(self, incarnation: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("cached_tokens", "prefill")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    prefill: str
    def __init__(self, cached_tokens: _Optional[int] = ..., prefill: _Optional[str] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("router_id", "resume")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    resume: _containers.RepeatedCompositeFieldContainer[ResumePoint]
    def __init__(self, router_id: _Optional[str] = ..., resume: _Optional[_Iterable[_Union[ResumePoint, _Mapping]]] = ...) -> None: ...

class ResumePoint(_message.Message):
    __slots__ = ("request_id", "attempt", "choice", "next_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    choice: int
    next_index: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., choice: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class StepMessage(_message.Message):
    __slots__ = ("incarnation", "deltas")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    deltas: _containers.RepeatedCompositeFieldContainer[_common_pb2.Delta]
    def __init__(self, incarnation: _Optional[str] = ..., deltas: _Optional[_Iterable[_Union[_common_pb2.Delta, _Mapping]]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: _Optional[bool] = ...) -> None: ...
