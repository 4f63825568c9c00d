"""What the other ranks get to know of a step: all that they need, whatever became of the block tables, and no more."""

from __future__ import annotations

import gc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import SamplingParams
from engine.plan import BlockTable, Row, StepPlan
from worker.step_codec import StepDecoder, StepDelta, StepEncoder

CHANGES = st.lists(
    st.tuples(
        st.integers(0, 4),  # which sequence
        st.sampled_from(["grow", "clear", "regrow", "end", "idle"]),
        st.integers(0, 5),  # blocks
    ),
    max_size=5,
)


def _crossed(delta: StepDelta) -> StepDelta:
    """As it comes out of a ring."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=StepDelta)


def _change(tables: dict[int, BlockTable], name: int, change: str, blocks: range) -> None:
    table = tables.setdefault(name, BlockTable())
    if change in ("clear", "regrow"):
        table.clear()
    if change in ("grow", "regrow"):
        table.extend(list(blocks))
    if change == "end":
        del tables[name]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CHANGES, st.sets(st.integers(0, 4))), max_size=8))
def test_the_reader_has_the_tables_of_every_row(
    steps: list[tuple[list[tuple[int, str, int]], set[int]]],
) -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    tables: dict[int, BlockTable] = {}
    block = 0
    for number, (changes, rows) in enumerate(steps):
        for name, change, blocks in changes:
            _change(tables, name, change, range(block, block + blocks))
            block += blocks
        planned = [
            Row(
                start=name,
                tokens=[name, number],
                block_table=tables.setdefault(name, BlockTable()),
                sampling=SamplingParams(temperature=0) if name % 2 else None,
                history=[1, 2, 3],
                targets=[7] * (name % 3),
                scored_from=name,
            )
            for name in sorted(rows)
        ]
        plan = StepPlan(number, planned, [(1, 2)] if number % 2 else [])
        read = decoder.decode(_crossed(encoder.encode(plan)))
        assert read.step == number and read.copies == plan.copies
        assert [row.block_table.ids.tolist() for row in read.rows] == [
            row.block_table.ids.tolist() for row in planned
        ]
        assert [
            (row.start, row.tokens, row.sampling is None, len(row.targets), row.scored_from)
            for row in read.rows
        ] == [
            (row.start, row.tokens, row.sampling is None, len(row.targets), row.scored_from)
            for row in planned
        ]
        del planned, plan
    tables.clear()
    gc.collect()
    decoder.decode(_crossed(encoder.encode(StepPlan(len(steps)))))
    assert decoder.tables == 0


def test_a_step_costs_what_is_new_whatever_the_context() -> None:
    encoder = StepEncoder()
    table = BlockTable()
    table.extend(list(range(10_000)))
    row = Row(160_000, [5], table, SamplingParams(), history=list(range(160_000)))
    first = msgspec.msgpack.encode(encoder.encode(StepPlan(1, [row])))
    second = msgspec.msgpack.encode(encoder.encode(StepPlan(2, [row])))
    table.extend([10_000])
    third = msgspec.msgpack.encode(encoder.encode(StepPlan(3, [row])))
    assert len(first) > 20_000
    assert len(second) < 60 and len(third) < 60


def test_a_lost_delta_is_noticed() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    table = BlockTable()
    table.extend([1])
    row = Row(0, [5], table, None)
    decoder.decode(encoder.encode(StepPlan(1, [row])))
    table.extend([2])
    encoder.encode(StepPlan(2, [row]))
    table.extend([3])
    with pytest.raises(ValueError, match="1 blocks here, 2 at rank 0"):
        decoder.decode(encoder.encode(StepPlan(3, [row])))
