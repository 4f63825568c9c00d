"""What an engine is told and what it answers: the plain messages of one replica.

They are msgspec structs, so the very same objects are the pure core's events and the MessagePack that crosses the
shared-memory ring between a worker's shell and its rank processes. No torch, no I/O here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# "invalid" and "no_room" answer a request that was not accepted; the others end one that was.
EndReason = Literal["stop", "length", "cancelled", "error", "invalid", "no_room"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw tokens; resolved by the router, nothing optional is left.

    Noise is a pure function of (seed, choice, position, vocabulary id), so a resumed, migrated or re-batched request
    draws the same tokens. What is done to the logits and in which order: `engine.logits`, then `engine.sampler`.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0  # drops tokens less likely than this part of the likeliest one's probability; 0 = off
    repetition_penalty: float = 1.0  # over prompt and answer; 1 = off
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer, for each occurrence
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0  # before so many, none of `stop_token_ids` is drawn
    logprobs: int | None = None  # so many of the likeliest beside each drawn token; None = off
    prompt_logprobs: int | None = None  # likewise for each token of the prompt but the first

    @property
    def shapes(self) -> bool:
        """The logits of this request are changed before a token is drawn."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


class RequestKey(msgspec.Struct, frozen=True, array_like=True):
    """Names a request inside one worker: the router session it came by, the session's own key, and the attempt."""

    session: int
    key: int
    attempt: int = 0


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Run this prompt. `prefill_worker` empty means: prefill locally."""

    request: RequestKey
    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    prefill_worker: str = ""
    local_below_tokens: int = 0
    salt: str = ""
    priority: int = 0  # less is more urgent
    n: int = 1  # choices: each draws with its own noise, all share the prompt's KV
    local: bool = (
        False  # wanted so; but `local_below_tokens` or more of uncached suffix are handed off all the same
    )
    handoff_s: float = 0.0  # what the hand-off should take; 0 = unknown


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request: RequestKey


class Trace(msgspec.Struct, kw_only=True):
    """Where the prompt was prefilled and how long each phase took (seconds); see `Trace` in inference.proto."""

    prefilled: Literal["local", "remote", "mixed", "cached"] = "local"
    prefill_worker: str = ""
    cached_tokens: int = 0
    remote_tokens: int = 0
    handoff_bytes: int = 0
    queue_s: float = 0.0
    handoff_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    fallback: str = ""


class Logprobs(msgspec.Struct, array_like=True):
    """Natural logarithms of the probabilities of consecutive tokens, as arrays: each token's own, and those of the
    likeliest at its place, as many for each token. Of the model's own distribution, before temperature and penalties.
    """

    chosen: list[float] = []  # [tokens]
    top_ids: list[int] = []  # [tokens * top], the likeliest first
    top: list[float] = []  # [tokens * top]

    @property
    def width(self) -> int:
        """Alternatives for each token."""
        return len(self.top_ids) // len(self.chosen) if self.chosen else 0

    def extend(self, more: Logprobs) -> None:
        self.chosen.extend(more.chosen)
        self.top_ids.extend(more.top_ids)
        self.top.extend(more.top)

    def part(self, start: int, end: int) -> Logprobs:
        """Of tokens start .. end-1."""
        cut = slice(start * self.width, end * self.width)
        return Logprobs(self.chosen[start:end], self.top_ids[cut], self.top[cut])


class TokenEntry(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice of a request; `first_index` is the position of the first within the answer."""

    request: RequestKey
    first_index: int
    ids: list[int]
    logprobs: Logprobs | None = None
    choice: int = 0


class PromptEntry(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of some of a request's prompt; `first_index` is the position of the first of them."""

    request: RequestKey
    first_index: int
    logprobs: Logprobs


class RequestEnd(msgspec.Struct, frozen=True, tag=True):
    """A choice has ended, and with `more` 0 the request: its one terminal event, with the trace of all choices."""

    request: RequestKey
    reason: EndReason
    detail: str = ""
    trace: Trace | None = None
    choice: int = 0
    more: int = 0  # choices that still run


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """All that one engine step has to say, for all requests together."""

    step: int
    tokens: list[TokenEntry] = []
    ends: list[RequestEnd] = []
    prompts: list[PromptEntry] = []


class LedgerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Where every block and landing slot is now; free + cached + held + landing = total, likewise for slots."""

    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_landing: int
    blocks_total: int
    slots_free: int = 0
    slots_leased: int = 0
    slots_quarantined: int = 0
    slots_total: int = 0


class StepCosts(msgspec.Struct, frozen=True):
    """What a step costs, in seconds: base + sequence * N + kv_token * K + token * u + attention * u * (u/2 + cached).

    N decoding sequences with K tokens of KV, and u prompt tokens after `cached` ones; see `engine.costs`.
    """

    base_s: float = 5e-3
    sequence_s: float = 2e-4
    kv_token_s: float = 1e-7
    token_s: float = 2e-4
    attention_s: float = 1e-8


class Spread(msgspec.Struct, frozen=True, array_like=True):
    """Quantiles of measured over predicted time."""

    p50: float = 1.0
    p90: float = 1.5
    p99: float = 2.5


class HandoffCost(msgspec.Struct, frozen=True):
    """What a hand-off from prefill worker `peer` adds to its queue and compute: latency + seconds for each byte of KV,
    as much of it as computing does not hide."""

    peer: str  # worker_id
    latency_s: float = 5e-3
    byte_s: float = 2e-10
    spread: Spread = Spread()
    seen: int = 0


class Costs(msgspec.Struct, frozen=True):
    """What a worker has measured of itself. `seen`: steps and synthetic steps; 0 means that these are guesses."""

    step: StepCosts = StepCosts()
    decode: Spread = Spread()  # of steps without prompt tokens
    prefill: Spread = Spread()  # of steps with some
    handoffs: list[HandoffCost] = []
    seen: int = 0


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """What is before a worker, in the terms of `StepCosts`, as of `age_s` before it was said."""

    kv_tokens: int = 0  # of running sequences
    prompt_tokens: int = 0  # of prompts in progress, not computed yet; those that wait are `waiting_tokens`
    attention: float = 0.0  # sum of u * (u/2 + cached) over prompts in progress and those that wait
    room: int = 0  # requests (hand-offs) that it would still take
    max_running: int = 0
    step_tokens: int = 0  # at most in one step
    capacity_tokens: int = 0  # of its KV memory
    available_tokens: int = 0  # free, or cached and not in use
    token_bytes: int = 0  # of KV, for one token
    busy: float = 0.0  # share of the last seconds in which prompt tokens were computed
    age_s: float = 0.0


class PeerLink(msgspec.Struct, frozen=True):
    """How fast a prefill worker can write to a decode worker, measured when they were linked; by the slowest pair of
    ranks. `error`: why it was not measured, or why this peer was refused."""

    worker_id: str
    bytes_per_s: float = 0.0
    latency_s: float = 0.0  # of 4 KiB
    devices: str = ""  # what moves the bytes, as far as the transport tells: "cma/memory, tcp/lo"
    error: str = ""
    warning: str = ""  # it works, but a faster way is there: which, and what helps


class Load(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A worker's state for the router's view and for `baton status`; sent when it changed, at most every 50 ms.

    `costs` None: as told before.
    """

    step: int
    waiting: int
    running: int
    waiting_tokens: int
    handoffs: int
    ledger: LedgerCounts
    peers: list[str] = []
    links: list[PeerLink] = []
    counters: dict[str, int] = {}
    queue: Queue = Queue()
    costs: Costs | None = None


class KvEvents(msgspec.Struct, frozen=True, tag=True):
    """What the prefix cache gained and lost since the batch `seq` - 1 (the first is 1); nothing is in both.

    Hints of block names (`engine.prefix.HINT_BYTES` each), packed. `cleared`: all that was told before is gone.
    """

    seq: int
    added: bytes = b""
    evicted: bytes = b""
    cleared: bool = False
