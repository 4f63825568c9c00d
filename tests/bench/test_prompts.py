"""Prompts have the wanted length, and share exactly the tokens that the trace says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prompts import WORDS, TokenPrompts, WordPrompts, fit_words, sample_words
from bench.traces import Trace, TraceRequest

# Chained ids, as in the traces: the same leading ids mean the same prefix.
chains = st.lists(
    st.sampled_from([(), (0,), (0, 1), (0, 1, 2), (0, 5), (7,), (7, 8)]), min_size=2, max_size=6
)


def make(blocks: list[tuple[int, ...]], tails: list[int], block_tokens: int = 16) -> Trace:
    requests = tuple(
        TraceRequest(n, n, block_tokens * len(ids) + tail, 4, ids)
        for n, (ids, tail) in enumerate(zip(blocks, tails, strict=False))
    )
    return Trace("t", requests, len(requests), block_tokens)


def common(left: list[int], right: list[int]) -> int:
    """How many leading items are equal."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


@given(chains, st.lists(st.integers(1, 40), min_size=6, max_size=6), st.floats(0.05, 3))
def test_prefixes_repeat_token_for_token_and_nothing_else_does(
    blocks: list[tuple[int, ...]], tails: list[int], scale: float
) -> None:
    trace = make(blocks, tails, 64).scaled(scale, 1.0)
    prompts = TokenPrompts(trace, end_id=1 << 30)  # so many ids that none is equal by chance
    built = [prompts.build(request) for request in trace.requests]
    for request, ids in zip(trace.requests, built, strict=True):
        assert len(ids) == request.input_tokens
        assert min(ids) >= 100 and max(ids) < 1 << 30
    for a, left in enumerate(trace.requests):
        for b, right in enumerate(trace.requests):
            if a == b:
                continue
            shared = common(list(left.blocks), list(right.blocks))
            edge = round(shared * trace.block_tokens)
            assert common(built[a], built[b]) == min(edge, len(built[a]), len(built[b]))


def test_content_follows_from_salt_id_and_place() -> None:
    trace = make([(0, 1), (0, 1)], [5, 5])
    one = TokenPrompts(trace, end_id=1000)
    assert one.build(trace.requests[0]) == TokenPrompts(trace, end_id=1000).build(trace.requests[0])
    assert one.build(trace.requests[0]) != one.build(trace.requests[1])
    salted = TokenPrompts(trace, end_id=1000, salt="again").build(trace.requests[0])
    assert common(salted, one.build(trace.requests[0])) < 3
    # Pinned: a later release must rebuild the same prompts.
    assert one.build(trace.requests[0])[:6] == [184, 728, 994, 759, 424, 664]


def test_all_ids_of_the_range_are_used() -> None:
    trace = make([()], [4000])
    assert set(TokenPrompts(trace, end_id=110).build(trace.requests[0])) == set(range(100, 110))
    with pytest.raises(ValueError, match="from 100 up to 100"):
        TokenPrompts(trace, end_id=100)


@given(st.floats(0.4, 4), st.floats(0, 20), st.integers(64, 600))
def test_texts_have_about_the_wanted_tokens(tokens_per_word: float, extra: float, tokens: int) -> None:
    trace = make([()], [tokens])
    text = WordPrompts(trace, tokens_per_word, extra).build(trace.requests[0])
    counted = len(text.split()) * tokens_per_word + extra
    assert abs(counted - tokens) <= max(tokens_per_word, 1)


@given(chains, st.floats(0.5, 2.5))
def test_texts_share_their_prefix_word_for_word(
    blocks: list[tuple[int, ...]], tokens_per_word: float
) -> None:
    trace = make(blocks, [30] * 6, 64)
    prompts = WordPrompts(trace, tokens_per_word)
    built = [prompts.build(request).split() for request in trace.requests]
    for a, left in enumerate(trace.requests):
        for b, right in enumerate(trace.requests[:a]):
            edge = round(common(list(left.blocks), list(right.blocks)) * 64 / tokens_per_word)
            assert built[a][:edge] == built[b][:edge] and len(built[a]) > edge


def test_a_text_is_never_empty() -> None:
    trace = make([()], [3])
    assert WordPrompts(trace, 1.0, extra_tokens=9).build(trace.requests[0]) in WORDS
    with pytest.raises(ValueError, match="more than 0 tokens"):
        WordPrompts(trace, 0.0)


def test_words_are_fitted_to_two_counts() -> None:
    assert fit_words((64, 74), (320, 394)) == (1.25, -6.0)
    with pytest.raises(ValueError, match="cannot be made to a length"):
        fit_words((64, 20), (320, 20))
    assert len(sample_words(64, "s").split()) == 64
    assert sample_words(64, "s") != sample_words(64, "t")
    assert len(set(WORDS)) == len(WORDS)
