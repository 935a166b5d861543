from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToSender(_message.Message):
    __slots__ = ("hello", "open", "grants", "cancel", "ping", "warmed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    WARMED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    grants: Grants
    cancel: Cancel
    ping: Ping
    warmed: Warmed
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., grants: _Optional[_Union[Grants, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., warmed: _Optional[_Union[Warmed, _Mapping]] = ...) -> None: ...

class ToReceiver(_message.Message):
    __slots__ = ("welcome", "opened", "progress", "quiesced", "ping")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    QUIESCED_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    opened: Opened
    progress: Progress
    quiesced: Quiesced
    ping: Ping
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., quiesced: _Optional[_Union[Quiesced, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("transport", "metadata")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    transport: str
    metadata: bytes
    def __init__(self, transport: _Optional[str] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("receiver", "sender", "layout_digest", "model_fingerprint", "endpoints", "slab_bytes", "lease_s")
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    receiver: str
    sender: str
    layout_digest: str
    model_fingerprint: str
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    slab_bytes: int
    lease_s: float
    def __init__(self, receiver: _Optional[str] = ..., sender: _Optional[str] = ..., layout_digest: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., slab_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("sender", "transport", "max_span_bytes")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    MAX_SPAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    sender: str
    transport: str
    max_span_bytes: int
    def __init__(self, sender: _Optional[str] = ..., transport: _Optional[str] = ..., max_span_bytes: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("ticket_id", "request_id", "attempt", "tokens", "start", "salt", "adapter", "priority", "queue_deadline_s", "tenant", "cached_only", "traceparent", "tracestate")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHED_ONLY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    request_id: str
    attempt: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    start: int
    salt: str
    adapter: str
    priority: int
    queue_deadline_s: float
    tenant: str
    cached_only: bool
    traceparent: str
    tracestate: str
    def __init__(self, ticket_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., salt: _Optional[str] = ..., adapter: _Optional[str] = ..., priority: _Optional[int] = ..., queue_deadline_s: _Optional[float] = ..., tenant: _Optional[str] = ..., cached_only: _Optional[bool] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("ticket_id", "cached_tokens")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    cached_tokens: int
    def __init__(self, ticket_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("ticket_id", "computed")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    computed: int
    def __init__(self, ticket_id: _Optional[str] = ..., computed: _Optional[int] = ...) -> None: ...

class Grants(_message.Message):
    __slots__ = ("grants",)
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    def __init__(self, grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("ticket_id", "sequence", "start", "count", "offset", "length")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    sequence: int
    start: int
    count: int
    offset: int
    length: int
    def __init__(self, ticket_id: _Optional[str] = ..., sequence: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("ticket_id",)
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    def __init__(self, ticket_id: _Optional[str] = ...) -> None: ...

class Quiesced(_message.Message):
    __slots__ = ("ticket_id", "spans_sent", "error", "link_failed")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    SPANS_SENT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LINK_FAILED_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    spans_sent: int
    error: str
    link_failed: bool
    def __init__(self, ticket_id: _Optional[str] = ..., spans_sent: _Optional[int] = ..., error: _Optional[str] = ..., link_failed: _Optional[bool] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("incarnation", "source", "source_address", "tokens", "salt", "adapter")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    source: str
    source_address: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    salt: str
    adapter: str
    def __init__(self, incarnation: _Optional[str] = ..., source: _Optional[str] = ..., source_address: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., salt: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class ReplicateReply(_message.Message):
    __slots__ = ("cached_tokens", "moved_tokens", "bytes", "seconds")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    moved_tokens: int
    bytes: int
    seconds: float
    def __init__(self, cached_tokens: _Optional[int] = ..., moved_tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Warmed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
