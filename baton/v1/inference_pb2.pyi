from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "sampling", "priority", "cache_salt", "ttft_ms", "itl_ms", "deadline_ms", "user")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    ITL_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: str
    token_ids: TokenIds
    sampling: SamplingParams
    priority: int
    cache_salt: str
    ttft_ms: int
    itl_ms: int
    deadline_ms: int
    user: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., ttft_ms: _Optional[int] = ..., itl_ms: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., user: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "max_tokens", "stop_token_ids", "stop", "ignore_eos", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "logprobs", "prompt_logprobs", "n", "echo")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    n: int
    echo: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., n: _Optional[int] = ..., echo: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("tokens", "finished", "prompt")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    tokens: Tokens
    finished: Finished
    prompt: Prompt
    def __init__(self, tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("chosen", "top_ids", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top: _Optional[_Iterable[float]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("first_index", "ids", "text", "logprobs")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: Logprobs
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("first_index", "ids", "text", "choice", "logprobs")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    choice: int
    logprobs: Logprobs
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "request_id", "prompt_tokens", "completion_tokens", "trace", "text", "choices")
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    reason: str
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    trace: Trace
    text: str
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    def __init__(self, reason: _Optional[str] = ..., request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ..., text: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "reason", "text", "completion_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    reason: str
    text: str
    completion_tokens: int
    def __init__(self, index: _Optional[int] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Trace(_message.Message):
    __slots__ = ("prefilled", "decode_worker", "prefill_worker", "cached_tokens", "remote_tokens", "handoff_bytes", "queue_s", "handoff_s", "prefill_s", "ttft_s", "decode_s", "decision", "fallback")
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    prefilled: str
    decode_worker: str
    prefill_worker: str
    cached_tokens: int
    remote_tokens: int
    handoff_bytes: int
    queue_s: float
    handoff_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    decision: str
    fallback: str
    def __init__(self, prefilled: _Optional[str] = ..., decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., remote_tokens: _Optional[int] = ..., handoff_bytes: _Optional[int] = ..., queue_s: _Optional[float] = ..., handoff_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., decision: _Optional[str] = ..., fallback: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "policy", "unix_s", "view_version", "view_digest", "prompt_tokens", "ttft_target_s", "itl_target_s", "decode_worker", "prefill_worker", "alternative", "local_below_tokens", "reason", "predicted_ttft_s", "candidates", "outcome")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    VIEW_VERSION_FIELD_NUMBER: _ClassVar[int]
    VIEW_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BELOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    policy: str
    unix_s: float
    view_version: int
    view_digest: str
    prompt_tokens: int
    ttft_target_s: float
    itl_target_s: float
    decode_worker: str
    prefill_worker: str
    alternative: str
    local_below_tokens: int
    reason: str
    predicted_ttft_s: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    outcome: DecisionOutcome
    def __init__(self, request_id: _Optional[str] = ..., policy: _Optional[str] = ..., unix_s: _Optional[float] = ..., view_version: _Optional[int] = ..., view_digest: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., ttft_target_s: _Optional[float] = ..., itl_target_s: _Optional[float] = ..., decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., alternative: _Optional[str] = ..., local_below_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., predicted_ttft_s: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., outcome: _Optional[_Union[DecisionOutcome, _Mapping]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("decode_worker", "prefill_worker", "ttft_s", "wait_s", "compute_s", "handoff_s", "tail_s", "late", "harm", "cost_s", "score", "chosen")
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    TAIL_S_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    HARM_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    decode_worker: str
    prefill_worker: str
    ttft_s: float
    wait_s: float
    compute_s: float
    handoff_s: float
    tail_s: float
    late: float
    harm: float
    cost_s: float
    score: float
    chosen: bool
    def __init__(self, decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., ttft_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., handoff_s: _Optional[float] = ..., tail_s: _Optional[float] = ..., late: _Optional[float] = ..., harm: _Optional[float] = ..., cost_s: _Optional[float] = ..., score: _Optional[float] = ..., chosen: _Optional[bool] = ...) -> None: ...

class DecisionOutcome(_message.Message):
    __slots__ = ("outcome", "ttft_s", "e2e_s", "generated_tokens", "prefilled", "cached_tokens", "remote_tokens", "queue_s", "handoff_s", "prefill_s", "fallback")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    E2E_S_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    ttft_s: float
    e2e_s: float
    generated_tokens: int
    prefilled: str
    cached_tokens: int
    remote_tokens: int
    queue_s: float
    handoff_s: float
    prefill_s: float
    fallback: str
    def __init__(self, outcome: _Optional[str] = ..., ttft_s: _Optional[float] = ..., e2e_s: _Optional[float] = ..., generated_tokens: _Optional[int] = ..., prefilled: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., remote_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., handoff_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., fallback: _Optional[str] = ...) -> None: ...

class ModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "max_model_len", "vocab_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    vocab_size: int
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("router", "release", "ready", "active_requests", "workers", "policy", "prefix_index")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREFIX_INDEX_FIELD_NUMBER: _ClassVar[int]
    router: str
    release: str
    ready: bool
    active_requests: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    policy: str
    prefix_index: PrefixIndex
    def __init__(self, router: _Optional[str] = ..., release: _Optional[str] = ..., ready: _Optional[bool] = ..., active_requests: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., policy: _Optional[str] = ..., prefix_index: _Optional[_Union[PrefixIndex, _Mapping]] = ...) -> None: ...

class PrefixIndex(_message.Message):
    __slots__ = ("entries", "lookups", "hits", "resyncs", "gaps")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    RESYNCS_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    entries: int
    lookups: int
    hits: int
    resyncs: int
    gaps: int
    def __init__(self, entries: _Optional[int] = ..., lookups: _Optional[int] = ..., hits: _Optional[int] = ..., resyncs: _Optional[int] = ..., gaps: _Optional[int] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("blocks_free", "blocks_cached", "blocks_held", "blocks_landing", "blocks_total", "slots_free", "slots_leased", "slots_quarantined", "slots_total")
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LANDING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_LEASED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_landing: int
    blocks_total: int
    slots_free: int
    slots_leased: int
    slots_quarantined: int
    slots_total: int
    def __init__(self, blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_held: _Optional[int] = ..., blocks_landing: _Optional[int] = ..., blocks_total: _Optional[int] = ..., slots_free: _Optional[int] = ..., slots_leased: _Optional[int] = ..., slots_quarantined: _Optional[int] = ..., slots_total: _Optional[int] = ...) -> None: ...

class LedgerRequest(_message.Message):
    __slots__ = ("oldest",)
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    oldest: int
    def __init__(self, oldest: _Optional[int] = ...) -> None: ...

class LedgerResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerLedger]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerLedger, _Mapping]]] = ...) -> None: ...

class WorkerLedger(_message.Message):
    __slots__ = ("worker_id", "role", "incarnation", "unreachable", "counts", "at_rest", "checked", "broken", "owners", "oldest", "lease_count", "leases", "quarantined_bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    AT_REST_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    incarnation: str
    unreachable: str
    counts: Ledger
    at_rest: bool
    checked: bool
    broken: str
    owners: int
    oldest: _containers.RepeatedCompositeFieldContainer[BlockOwner]
    lease_count: int
    leases: _containers.RepeatedCompositeFieldContainer[HeldLease]
    quarantined_bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[str] = ..., unreachable: _Optional[str] = ..., counts: _Optional[_Union[Ledger, _Mapping]] = ..., at_rest: _Optional[bool] = ..., checked: _Optional[bool] = ..., broken: _Optional[str] = ..., owners: _Optional[int] = ..., oldest: _Optional[_Iterable[_Union[BlockOwner, _Mapping]]] = ..., lease_count: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[HeldLease, _Mapping]]] = ..., quarantined_bytes: _Optional[int] = ...) -> None: ...

class BlockOwner(_message.Message):
    __slots__ = ("name", "kind", "state", "blocks", "age_s", "left_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    state: str
    blocks: int
    age_s: float
    left_s: float
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[str] = ..., blocks: _Optional[int] = ..., age_s: _Optional[float] = ..., left_s: _Optional[float] = ...) -> None: ...

class HeldLease(_message.Message):
    __slots__ = ("peer", "handoff_id", "chunk", "slot", "state", "age_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    handoff_id: int
    chunk: int
    slot: int
    state: str
    age_s: float
    def __init__(self, peer: _Optional[str] = ..., handoff_id: _Optional[int] = ..., chunk: _Optional[int] = ..., slot: _Optional[int] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class WorkerQueue(_message.Message):
    __slots__ = ("kv_tokens", "prompt_tokens", "attention", "room", "max_running", "step_tokens", "capacity_tokens", "available_tokens", "token_bytes", "busy", "age_s")
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    kv_tokens: int
    prompt_tokens: int
    attention: float
    room: int
    max_running: int
    step_tokens: int
    capacity_tokens: int
    available_tokens: int
    token_bytes: int
    busy: float
    age_s: float
    def __init__(self, kv_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., attention: _Optional[float] = ..., room: _Optional[int] = ..., max_running: _Optional[int] = ..., step_tokens: _Optional[int] = ..., capacity_tokens: _Optional[int] = ..., available_tokens: _Optional[int] = ..., token_bytes: _Optional[int] = ..., busy: _Optional[float] = ..., age_s: _Optional[float] = ...) -> None: ...

class WorkerCosts(_message.Message):
    __slots__ = ("base_s", "sequence_s", "kv_token_s", "token_s", "attention_s", "decode_spread", "prefill_spread", "handoffs", "seen")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_SPREAD_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SPREAD_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    sequence_s: float
    kv_token_s: float
    token_s: float
    attention_s: float
    decode_spread: _containers.RepeatedScalarFieldContainer[float]
    prefill_spread: _containers.RepeatedScalarFieldContainer[float]
    handoffs: _containers.RepeatedCompositeFieldContainer[HandoffCosts]
    seen: int
    def __init__(self, base_s: _Optional[float] = ..., sequence_s: _Optional[float] = ..., kv_token_s: _Optional[float] = ..., token_s: _Optional[float] = ..., attention_s: _Optional[float] = ..., decode_spread: _Optional[_Iterable[float]] = ..., prefill_spread: _Optional[_Iterable[float]] = ..., handoffs: _Optional[_Iterable[_Union[HandoffCosts, _Mapping]]] = ..., seen: _Optional[int] = ...) -> None: ...

class HandoffCosts(_message.Message):
    __slots__ = ("peer", "latency_s", "byte_s", "spread", "seen")
    PEER_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTE_S_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    peer: str
    latency_s: float
    byte_s: float
    spread: _containers.RepeatedScalarFieldContainer[float]
    seen: int
    def __init__(self, peer: _Optional[str] = ..., latency_s: _Optional[float] = ..., byte_s: _Optional[float] = ..., spread: _Optional[_Iterable[float]] = ..., seen: _Optional[int] = ...) -> None: ...

class PeerLink(_message.Message):
    __slots__ = ("worker_id", "bytes_per_s", "latency_s", "devices", "error", "warning")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    bytes_per_s: float
    latency_s: float
    devices: str
    error: str
    warning: str
    def __init__(self, worker_id: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., latency_s: _Optional[float] = ..., devices: _Optional[str] = ..., error: _Optional[str] = ..., warning: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "role", "incarnation", "address", "alive", "step", "waiting", "running", "waiting_tokens", "handoffs", "ledger", "transport", "peers", "counters", "pid", "engine_pid", "engine_pids", "engine_silent_s", "queue", "links", "costs")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_PID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_PIDS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SILENT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    incarnation: str
    address: str
    alive: bool
    step: int
    waiting: int
    running: int
    waiting_tokens: int
    handoffs: int
    ledger: Ledger
    transport: str
    peers: _containers.RepeatedScalarFieldContainer[str]
    counters: _containers.ScalarMap[str, int]
    pid: int
    engine_pid: int
    engine_pids: _containers.RepeatedScalarFieldContainer[int]
    engine_silent_s: float
    queue: WorkerQueue
    links: _containers.RepeatedCompositeFieldContainer[PeerLink]
    costs: WorkerCosts
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., alive: _Optional[bool] = ..., step: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., handoffs: _Optional[int] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., transport: _Optional[str] = ..., peers: _Optional[_Iterable[str]] = ..., counters: _Optional[_Mapping[str, int]] = ..., pid: _Optional[int] = ..., engine_pid: _Optional[int] = ..., engine_pids: _Optional[_Iterable[int]] = ..., engine_silent_s: _Optional[float] = ..., queue: _Optional[_Union[WorkerQueue, _Mapping]] = ..., links: _Optional[_Iterable[_Union[PeerLink, _Mapping]]] = ..., costs: _Optional[_Union[WorkerCosts, _Mapping]] = ...) -> None: ...
