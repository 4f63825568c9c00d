"""Between the router's words and the messages of its streams to workers; used by `router.dispatch`. Decides nothing."""

from __future__ import annotations

import numpy as np

from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import Logprobs, SamplingParams, Trace
from router.dispatch_api import Prompt
from router.policy import Decision


def hints_of(packed: bytes) -> list[int]:
    """Of `KvEvents` and `KvSnapshot`."""
    found: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return found


def submit_message(key: int, prompt: Prompt, decision: Decision) -> pb.Submit:
    """The request, under the key by which its stream names it."""
    return pb.Submit(
        key=key,
        request_id=prompt.request_id,
        prompt=prompt.tokens,
        sampling=_sampling(prompt.sampling),
        prefill_worker=decision.prefill_worker or decision.alternative or "",
        local_below_tokens=decision.local_below_tokens,
        salt=prompt.salt,
        priority=prompt.priority,
        n=prompt.n,
        local=decision.prefill_worker is None and decision.alternative is not None,
        handoff_s=decision.handoff_s,
    )


def _sampling(sampling: SamplingParams) -> pb.EngineSampling:
    return pb.EngineSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        choice=sampling.choice,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias_ids=[token for token, _ in sampling.logit_bias],
        bias=[bias for _, bias in sampling.logit_bias],
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def logprobs_of(message: api.Logprobs) -> Logprobs:
    """As the doors take them."""
    return Logprobs(list(message.chosen), list(message.top_ids), list(message.top))


def trace_of(trace: api.Trace) -> Trace:
    """What the worker tells of a request that is over."""
    names = {
        "prefilled",
        "prefill_worker",
        "cached_tokens",
        "remote_tokens",
        "handoff_bytes",
        "queue_s",
        "handoff_s",
    }
    names |= {"prefill_s", "ttft_s", "decode_s", "fallback"}
    return Trace(**{name: getattr(trace, name) for name in names})
