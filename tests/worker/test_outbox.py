"""A session's outbox: what a slow router has not taken yet is merged, and nothing loses its neighbour."""

from __future__ import annotations

from baton.v1 import inference_pb2 as api
from baton.v1 import worker_pb2 as pb
from engine.api import Logprobs, PromptEntry, RequestEnd, RequestKey, TokenEntry, Trace
from worker.sessions import SessionOutbox

ONE, TWO = RequestKey(1, 1), RequestKey(1, 2)


def _logprobs(*ids: int) -> Logprobs:
    return Logprobs([-float(i) for i in ids], list(ids), [-float(i) for i in ids])


def _check(entry: pb.TokenEntry, ids: list[int]) -> None:
    assert list(entry.ids) == list(entry.logprobs.top_ids) == ids
    assert list(entry.logprobs.chosen) == list(entry.logprobs.top) == [-float(i) for i in ids]


async def test_tokens_merge_by_choice_with_their_logprobs() -> None:
    outbox = SessionOutbox(1)
    for step in range(3):
        for choice in range(2):
            token = 10 * choice + step
            outbox.add_tokens(step, TokenEntry(ONE, step, [token], _logprobs(token), choice))
        outbox.add_tokens(step, TokenEntry(TWO, step, [50 + step]))
    outbox.add_end(RequestEnd(ONE, "stop", choice=1, more=1))
    outbox.add_end(RequestEnd(ONE, "length", trace=Trace()))
    message = await outbox.next()
    assert [(entry.key, entry.choice, entry.first_index) for entry in message.tokens] == [
        (1, 0, 0),
        (1, 1, 0),
        (2, 0, 0),
    ]
    _check(message.tokens[0], [0, 1, 2])
    _check(message.tokens[1], [10, 11, 12])
    assert list(message.tokens[2].ids) == [50, 51, 52] and not message.tokens[2].HasField("logprobs")
    assert [(end.choice, end.more, end.reason) for end in message.ends] == [(1, 1, "stop"), (0, 0, "length")]
    assert [end.HasField("trace") for end in message.ends] == [False, True]
    outbox.add_tokens(3, TokenEntry(ONE, 3, [3], _logprobs(3)))
    (entry,) = (await outbox.next()).tokens
    assert entry.first_index == 3
    _check(entry, [3])


async def test_prompt_logprobs_keep_their_places() -> None:
    outbox = SessionOutbox(1)
    outbox.add_prompt(PromptEntry(ONE, 1, _logprobs(5, 6)))
    outbox.add_prompt(PromptEntry(ONE, 3, _logprobs(7)))
    prompts = (await outbox.next()).prompts
    assert [(entry.first_index, list(entry.logprobs.chosen)) for entry in prompts] == [
        (1, [-5.0, -6.0]),
        (3, [-7.0]),
    ]
    outbox.add_tokens(1, TokenEntry(ONE, 0, [1]))
    assert not (await outbox.next()).prompts


async def test_costs_wait_for_the_next_message_whatever_comes_meanwhile() -> None:
    outbox = SessionOutbox(1)
    outbox.set_status(api.WorkerStatus(step=1, costs=api.WorkerCosts(seen=7)))
    outbox.set_status(api.WorkerStatus(step=2))
    status = (await outbox.next()).status
    assert (status.step, status.costs.seen) == (2, 7)
    outbox.set_status(api.WorkerStatus(step=3))
    assert not (await outbox.next()).status.HasField("costs")
