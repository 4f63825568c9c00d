"""A step plan as the other ranks of a worker need it, and only what they do not know yet.

Rank 0 draws all tokens, so sampling parameters and histories stay there. Block tables grow by a block now and then, so
only what was added crosses: the cost of a step depends on its rows and tokens, not on the length of their contexts,
nor on who is idle. Tables are named by small numbers, which are told when they are given up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import msgspec

from engine.api import SamplingParams
from engine.plan import BlockTable, Row, StepPlan

_DRAWS = SamplingParams()  # which token is drawn is rank 0's business


class RowDelta(msgspec.Struct, frozen=True, array_like=True):
    """A row; its block table has `known` blocks already, of which the reader keeps as many, and gets `blocks`."""

    table: int
    known: int
    blocks: list[int]
    start: int
    tokens: list[int]
    draws: bool = False
    targets: int = 0
    scored_from: int = 0


class StepDelta(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A step. `dropped` names tables that will not be used any more."""

    step: int
    rows: list[RowDelta]
    copies: list[tuple[int, int]] = []
    dropped: list[int] = []


class _Told:
    """What the reader knows of one table."""

    __slots__ = ("blocks", "lives", "name", "table")

    def __init__(self, name: int, lives: int, table: weakref.ref[BlockTable]) -> None:
        self.name = name
        self.lives = lives
        self.blocks = 0
        self.table = table


class StepEncoder:
    """The writing side, in rank 0. All readers get the same deltas, from the first on."""

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}  # by id() of a table that lives
        self._next = 0
        self._dropped: list[int] = []

    def encode(self, plan: StepPlan) -> StepDelta:
        """The delta of the next step."""
        dropped, self._dropped = self._dropped, []
        rows = [self._row(row) for row in plan.rows]
        return StepDelta(plan.step, rows, plan.copies, dropped)

    def _row(self, row: Row) -> RowDelta:
        table = row.block_table
        told = self._told.get(id(table))
        if told is None:
            told = self._enter(table)
        if told.lives != table.lives:
            told.lives, told.blocks = table.lives, 0
        known, told.blocks = told.blocks, len(table)
        blocks: list[int] = table.ids[known:].tolist() if told.blocks > known else []
        return RowDelta(
            told.name,
            known,
            blocks,
            row.start,
            row.tokens,
            row.sampling is not None,
            len(row.targets),
            row.scored_from,
        )

    def _enter(self, table: BlockTable) -> _Told:
        key = id(table)
        told = _Told(self._next, table.lives, weakref.ref(table, self._forgetter(key)))
        self._next += 1
        self._told[key] = told
        return told

    def _forgetter(self, key: int) -> Callable[[weakref.ref[BlockTable]], None]:
        def forget(_: weakref.ref[BlockTable]) -> None:
            self._dropped.append(self._told.pop(key).name)

        return forget


class StepDecoder:
    """The reading side, in each other rank."""

    def __init__(self) -> None:
        self._tables: dict[int, BlockTable] = {}

    @property
    def tables(self) -> int:
        """Tables that are kept: as many as sequences live in rank 0."""
        return len(self._tables)

    def decode(self, delta: StepDelta) -> StepPlan:
        """The plan of the step. ValueError when a delta was lost, which the ranks' links exclude."""
        for name in delta.dropped:
            del self._tables[name]
        return StepPlan(delta.step, [self._row(row) for row in delta.rows], delta.copies)

    def _row(self, row: RowDelta) -> Row:
        table = self._tables.get(row.table)
        if table is None:
            table = self._tables[row.table] = BlockTable()
        if not row.known and len(table):
            table.clear()
        if len(table) != row.known:
            raise ValueError(f"table {row.table} has {len(table)} blocks here, {row.known} at rank 0")
        table.extend(row.blocks)
        return Row(
            row.start,
            row.tokens,
            table,
            _DRAWS if row.draws else None,
            targets=[0] * row.targets,
            scored_from=row.scored_from,
        )
