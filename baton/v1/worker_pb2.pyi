from baton.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Members(_message.Message):
    __slots__ = ("version", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("worker_id", "role", "incarnation", "address", "restarts", "draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    incarnation: str
    address: str
    restarts: int
    draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., restarts: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class MembersAck(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ToWorker(_message.Message):
    __slots__ = ("submit", "cancel", "kv_subscribe")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    KV_SUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    kv_subscribe: KvSubscribe
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., kv_subscribe: _Optional[_Union[KvSubscribe, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "request_id", "attempt", "prompt", "sampling", "prefill_worker", "local_below_tokens", "salt", "priority", "n", "local", "handoff_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BELOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    key: int
    request_id: str
    attempt: int
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: EngineSampling
    prefill_worker: str
    local_below_tokens: int
    salt: str
    priority: int
    n: int
    local: bool
    handoff_s: float
    def __init__(self, key: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[EngineSampling, _Mapping]] = ..., prefill_worker: _Optional[str] = ..., local_below_tokens: _Optional[int] = ..., salt: _Optional[str] = ..., priority: _Optional[int] = ..., n: _Optional[int] = ..., local: _Optional[bool] = ..., handoff_s: _Optional[float] = ...) -> None: ...

class EngineSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "max_tokens", "stop_token_ids", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias_ids", "bias", "min_tokens", "choice", "logprobs", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias: _containers.RepeatedScalarFieldContainer[float]
    min_tokens: int
    choice: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias: _Optional[_Iterable[float]] = ..., min_tokens: _Optional[int] = ..., choice: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key", "attempt")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    key: int
    attempt: int
    def __init__(self, key: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("step", "tokens", "ends", "status", "prompts", "kv_events", "kv_snapshot")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    KV_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens: _containers.RepeatedCompositeFieldContainer[TokenEntry]
    ends: _containers.RepeatedCompositeFieldContainer[RequestEnd]
    status: _inference_pb2.WorkerStatus
    prompts: _containers.RepeatedCompositeFieldContainer[PromptEntry]
    kv_events: _containers.RepeatedCompositeFieldContainer[KvEvents]
    kv_snapshot: KvSnapshot
    def __init__(self, step: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[TokenEntry, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[RequestEnd, _Mapping]]] = ..., status: _Optional[_Union[_inference_pb2.WorkerStatus, _Mapping]] = ..., prompts: _Optional[_Iterable[_Union[PromptEntry, _Mapping]]] = ..., kv_events: _Optional[_Iterable[_Union[KvEvents, _Mapping]]] = ..., kv_snapshot: _Optional[_Union[KvSnapshot, _Mapping]] = ...) -> None: ...

class KvSubscribe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvEvents(_message.Message):
    __slots__ = ("incarnation", "seq", "added", "evicted", "cleared")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    seq: int
    added: bytes
    evicted: bytes
    cleared: bool
    def __init__(self, incarnation: _Optional[str] = ..., seq: _Optional[int] = ..., added: _Optional[bytes] = ..., evicted: _Optional[bytes] = ..., cleared: _Optional[bool] = ...) -> None: ...

class KvSnapshot(_message.Message):
    __slots__ = ("incarnation", "seq", "block_size", "piece", "pieces", "hashes", "wire_dtype")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    seq: int
    block_size: int
    piece: int
    pieces: int
    hashes: bytes
    wire_dtype: str
    def __init__(self, incarnation: _Optional[str] = ..., seq: _Optional[int] = ..., block_size: _Optional[int] = ..., piece: _Optional[int] = ..., pieces: _Optional[int] = ..., hashes: _Optional[bytes] = ..., wire_dtype: _Optional[str] = ...) -> None: ...

class PromptEntry(_message.Message):
    __slots__ = ("key", "attempt", "first_index", "logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    attempt: int
    first_index: int
    logprobs: _inference_pb2.Logprobs
    def __init__(self, key: _Optional[int] = ..., attempt: _Optional[int] = ..., first_index: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.Logprobs, _Mapping]] = ...) -> None: ...

class TokenEntry(_message.Message):
    __slots__ = ("key", "attempt", "first_index", "ids", "choice", "logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    attempt: int
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    choice: int
    logprobs: _inference_pb2.Logprobs
    def __init__(self, key: _Optional[int] = ..., attempt: _Optional[int] = ..., first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.Logprobs, _Mapping]] = ...) -> None: ...

class RequestEnd(_message.Message):
    __slots__ = ("key", "attempt", "reason", "detail", "trace", "choice", "more")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    key: int
    attempt: int
    reason: str
    detail: str
    trace: _inference_pb2.Trace
    choice: int
    more: int
    def __init__(self, key: _Optional[int] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., trace: _Optional[_Union[_inference_pb2.Trace, _Mapping]] = ..., choice: _Optional[int] = ..., more: _Optional[int] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("hello", "begin", "credit", "abort", "chunk_done", "done", "failed", "quiet", "linked")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DONE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    QUIET_FIELD_NUMBER: _ClassVar[int]
    LINKED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    begin: Begin
    credit: Credit
    abort: Abort
    chunk_done: ChunkDone
    done: Done
    failed: Failed
    quiet: Quiet
    linked: Linked
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., chunk_done: _Optional[_Union[ChunkDone, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., quiet: _Optional[_Union[Quiet, _Mapping]] = ..., linked: _Optional[_Union[Linked, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "release", "worker_id", "incarnation", "epoch", "kv", "transport", "endpoints", "capabilities", "slot_count", "slot_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    release: str
    worker_id: str
    incarnation: str
    epoch: int
    kv: KvSpec
    transport: str
    endpoints: _containers.RepeatedScalarFieldContainer[bytes]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    slot_count: int
    slot_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol: _Optional[int] = ..., release: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., epoch: _Optional[int] = ..., kv: _Optional[_Union[KvSpec, _Mapping]] = ..., transport: _Optional[str] = ..., endpoints: _Optional[_Iterable[bytes]] = ..., capabilities: _Optional[_Iterable[str]] = ..., slot_count: _Optional[int] = ..., slot_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class KvSpec(_message.Message):
    __slots__ = ("model", "layers", "kv_heads", "head_dim", "dtype", "block_size", "chunk_tokens", "groups", "q_heads", "tensor_parallel", "wire_dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    chunk_tokens: int
    groups: _containers.RepeatedCompositeFieldContainer[KvGroup]
    q_heads: int
    tensor_parallel: int
    wire_dtype: str
    def __init__(self, model: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[KvGroup, _Mapping]]] = ..., q_heads: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., wire_dtype: _Optional[str] = ...) -> None: ...

class KvGroup(_message.Message):
    __slots__ = ("kind", "layers", "window")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    window: int
    def __init__(self, kind: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., window: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "epoch", "chunk", "slot", "deadline_s")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    epoch: int
    chunk: int
    slot: int
    deadline_s: float
    def __init__(self, lease_id: _Optional[int] = ..., epoch: _Optional[int] = ..., chunk: _Optional[int] = ..., slot: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class Linked(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Begin(_message.Message):
    __slots__ = ("handoff_id", "request_id", "tokens", "start", "deadline_s", "salt", "priority")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    request_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    start: int
    deadline_s: float
    salt: str
    priority: int
    def __init__(self, handoff_id: _Optional[int] = ..., request_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., deadline_s: _Optional[float] = ..., salt: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("handoff_id", "leases")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, handoff_id: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("handoff_id", "reason")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    reason: str
    def __init__(self, handoff_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ChunkDone(_message.Message):
    __slots__ = ("handoff_id", "lease_id", "epoch", "chunk", "size_bytes", "digests")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    lease_id: int
    epoch: int
    chunk: int
    size_bytes: int
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, handoff_id: _Optional[int] = ..., lease_id: _Optional[int] = ..., epoch: _Optional[int] = ..., chunk: _Optional[int] = ..., size_bytes: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("handoff_id", "cached_tokens", "queue_s", "compute_s")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    cached_tokens: int
    queue_s: float
    compute_s: float
    def __init__(self, handoff_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("handoff_id", "reason")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    reason: str
    def __init__(self, handoff_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Quiet(_message.Message):
    __slots__ = ("handoff_id", "epoch")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    handoff_id: int
    epoch: int
    def __init__(self, handoff_id: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...
