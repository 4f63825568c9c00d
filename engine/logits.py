"""Changes the logits of rows that ask for it, before a token is drawn from them; called by the runner.

In this order, which is that of transformers' processors (and of vLLM): logit_bias is added; the repetition penalty
divides positive and multiplies negative logits of every token of prompt and answer; frequency and presence penalties
are subtracted for tokens of the answer (OpenAI); until `min_tokens` were drawn, the ids that end an answer are
forbidden. Then `engine.sampler` applies temperature, top-k, top-p and min-p. A row that asks for none of this costs
nothing; one with penalties costs time in proportion to its length, for all such rows together in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.api import SamplingParams
from engine.plan import Row

Asking = Sequence[tuple[int, Row]]  # place in the logits, row


def shaped(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Logits [rows, vocab] as the rows' parameters want them. May change `logits` itself; in fp32 when anything is."""
    asking = [(at, row) for at, row in enumerate(rows) if row.sampling is not None and row.sampling.shapes]
    if not asking:
        return logits
    logits = logits.float()
    flat = logits.view(-1)
    _add_bias(flat, logits.shape[1], asking)
    _penalize_repetition(flat, logits.shape[1], asking)
    _penalize_presence(flat, logits.shape[1], asking)
    _forbid_ends(flat, logits.shape[1], asking)
    return logits


def _add_bias(flat: torch.Tensor, vocab: int, asking: Asking) -> None:
    ids, amounts = [], []
    for at, row in asking:
        for token, bias in _params(row).logit_bias:
            ids.append(at * vocab + token)
            amounts.append(bias)
    if ids:
        index = torch.tensor(ids, device=flat.device)
        flat[index] += torch.tensor(amounts, dtype=flat.dtype, device=flat.device)


def _penalize_repetition(flat: torch.Tensor, vocab: int, asking: Asking) -> None:
    places, penalties = [], []
    for at, row in asking:
        if _params(row).repetition_penalty != 1:
            places.append(np.array(row.history, np.int64) + at * vocab)
            penalties.append(np.full(len(row.history), _params(row).repetition_penalty, np.float32))
    if places:
        index = torch.from_numpy(np.concatenate(places)).to(flat.device)
        penalty = torch.from_numpy(np.concatenate(penalties)).to(flat.device)
        scores = flat[index]
        # A token that occurs twice is written twice with the same value.
        flat[index] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _penalize_presence(flat: torch.Tensor, vocab: int, asking: Asking) -> None:
    ids, amounts = [], []
    for at, row in asking:
        params = _params(row)
        if not (params.frequency_penalty or params.presence_penalty) or len(row.history) <= row.prompt_length:
            continue
        tokens, counts = np.unique(np.array(row.history[row.prompt_length :], np.int64), return_counts=True)
        ids.append(tokens + at * vocab)
        amounts.append(counts * params.frequency_penalty + params.presence_penalty)
    if ids:
        index = torch.from_numpy(np.concatenate(ids)).to(flat.device)
        flat[index] -= torch.from_numpy(np.concatenate(amounts)).to(flat.device, flat.dtype)


def _forbid_ends(flat: torch.Tensor, vocab: int, asking: Asking) -> None:
    ids = [
        at * vocab + token
        for at, row in asking
        if len(row.history) - row.prompt_length < _params(row).min_tokens
        for token in _params(row).stop_token_ids
    ]
    if ids:
        flat[torch.tensor(ids, device=flat.device)] = -torch.inf


def _params(row: Row) -> SamplingParams:
    assert row.sampling is not None
    return row.sampling
