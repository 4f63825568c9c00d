"""Log-probabilities of tokens that were drawn, or that stand in a prompt; called by the runner for rows that ask.

Always of the model's own distribution, whatever was done to the logits before a token was drawn from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.api import Logprobs
from engine.sampler import leading

SCORE_BYTES = 64 << 20  # of logits that are held at once while a prompt is scored


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> Logprobs:
    """Of `tokens` [n] and the `top` likeliest under logits [n, vocab], in fp32."""
    every = torch.log_softmax(logits.float(), dim=-1)
    chosen = every.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    if not top or not chosen:
        return Logprobs(chosen)
    values, ids = leading(every, min(top, every.shape[1]))
    return Logprobs(chosen, ids.flatten().tolist(), values.flatten().tolist())


def drawn_logprobs(
    raw: torch.Tensor, drawn: torch.Tensor, places: Sequence[int], tops: Sequence[int]
) -> dict[int, Logprobs]:
    """For each row of raw logits [n, vocab] its drawn token's, by `places`; rows of equal `tops` at once."""
    found = {}
    for top in set(tops):
        rows = [at for at, each in enumerate(tops) if each == top]
        every = logprobs_of(raw[rows], drawn[rows], top)
        width = every.width
        for index, at in enumerate(rows):
            cut = slice(index * width, (index + 1) * width)
            found[places[at]] = Logprobs([every.chosen[index]], every.top_ids[cut], every.top[cut])
    return found


def score(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor | None],
    targets: list[int],
    top: int,
    vocab: int,
) -> Logprobs | None:
    """Of `targets` [n], the tokens that follow the positions of hidden [n, hidden], a few logits at a time.

    None where the head gives no logits, on ranks but the first; how often it is called is the same on all.
    """
    found: Logprobs | None = None
    size = max(1, SCORE_BYTES // (4 * vocab))
    ids = torch.tensor(targets, device=hidden.device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = head(hidden[part])
        if logits is not None:
            found = found or Logprobs([], [], [])
            found.extend(logprobs_of(logits, ids[part], top))
    return found
