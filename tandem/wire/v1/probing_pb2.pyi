from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeRequest(_message.Message):
    __slots__ = ("incarnation", "sender", "sender_address")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SENDER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    sender: str
    sender_address: str
    def __init__(self, incarnation: _Optional[str] = ..., sender: _Optional[str] = ..., sender_address: _Optional[str] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("hash_root", "transport", "write_bytes", "write_s", "connect_s")
    HASH_ROOT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_S_FIELD_NUMBER: _ClassVar[int]
    CONNECT_S_FIELD_NUMBER: _ClassVar[int]
    hash_root: str
    transport: str
    write_bytes: int
    write_s: _containers.RepeatedScalarFieldContainer[float]
    connect_s: float
    def __init__(self, hash_root: _Optional[str] = ..., transport: _Optional[str] = ..., write_bytes: _Optional[int] = ..., write_s: _Optional[_Iterable[float]] = ..., connect_s: _Optional[float] = ...) -> None: ...
