"""Which heads, columns and rows each rank holds: everything is covered, and nobody holds what it does not need."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shards import Shard, shards


@st.composite
def models(draw: st.DrawFn) -> tuple[int, int, int]:
    """(query heads, kv heads, tp) with tp up to the query heads."""
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 12))
    return kv_heads * group, kv_heads, draw(st.integers(1, min(16, kv_heads * group)))


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_parts_cover_everything_once_and_evenly(count: int, tp: int) -> None:
    if tp > count:
        with pytest.raises(
            ValueError, match=f"tensor_parallel={tp} is more than the model's {count} columns"
        ):
            Shard(0, tp).part(count)
        return
    parts = [shard.part(count) for shard in shards(tp)]
    assert parts[0].start == 0 and parts[-1].stop == count
    assert all(left.stop == right.start for left, right in itertools.pairwise(parts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(models())
def test_every_query_head_has_one_rank_and_its_kv_head_beside_it(model: tuple[int, int, int]) -> None:
    q_heads, kv_heads, tp = model
    group = q_heads // kv_heads
    computed = [head for shard in shards(tp) for head in shard.q_heads(q_heads)]
    assert computed == list(range(q_heads))
    for shard in shards(tp):
        own, stored = shard.q_heads(q_heads), shard.kv_heads(q_heads, kv_heads)
        assert own.start * tp <= shard.rank * q_heads < (own.start + 1) * tp  # floor(r H / tp)
        assert set(stored) == {head // group for head in own}
        groups = shard.groups(q_heads, kv_heads)
        assert [head for each in groups for head in each] == list(own)
        assert [{head // group for head in each} for each in groups] == [{head} for head in stored]
    assert {head for shard in shards(tp) for head in shard.kv_heads(q_heads, kv_heads)} == set(
        range(kv_heads)
    )


@given(models())
def test_more_ranks_than_kv_heads_replicate_them(model: tuple[int, int, int]) -> None:
    q_heads, kv_heads, tp = model
    counts = [len(shard.kv_heads(q_heads, kv_heads)) for shard in shards(tp)]
    if tp >= kv_heads:
        assert max(counts) <= 2 and (tp % kv_heads or max(counts) == 1)
    elif not kv_heads % tp:
        assert set(counts) == {kv_heads // tp}  # nothing is stored twice where it divides


def test_examples() -> None:
    assert [shard.q_heads(9) for shard in shards(2)] == [range(4), range(4, 9)]
    assert [shard.kv_heads(9, 3) for shard in shards(2)] == [range(2), range(1, 3)]
    assert Shard(1, 2).groups(9, 3) == (range(4, 6), range(6, 9))
    assert [shard.kv_heads(8, 2) for shard in shards(4)] == [range(1), range(1), range(1, 2), range(1, 2)]


def test_mistakes_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="tensor_parallel=5 is more than the model's 4 query heads"):
        Shard(0, 5).kv_heads(4, 2)
    for rank, tp in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank} of tensor_parallel={tp}"):
            Shard(rank, tp)
