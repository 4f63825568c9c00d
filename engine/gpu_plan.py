"""What the kernels of one step need to know: made on the host by a few array operations, copied to the GPU at once.

    one int32 buffer   | tokens | positions | slots | wanted | lengths | table starts | spans | parts | tiles | tables |

The tables come last, since their length changes with every step: everything before them lies where it lay in the last
step of as many rows and tokens. Two host buffers take turns, so that a step may be planned while the copy of the one
before is under way. Called by `engine.gpu_model`; no loop in it runs once for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.attention import Rows
from engine.kernels.decode_attention import Partials, Parts, parts_of
from engine.kernels.launch import Tables, power_of_two
from engine.kernels.prefill_attention import Spans, tile_queries, tiles_of
from engine.kv_cache import KVCache

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.integer]

_ALIGNED = 4  # int32s: 16 bytes, what a vector load wants


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """One step on the device; the first `decodes` rows have one token each, the others are spans.

    tokens, positions, slots int32 [tokens]; wanted int32 [wanted], or None; lengths int32 [decodes], contexts of the
    decode rows with the new token. parts: for each window of the model.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    wanted: torch.Tensor | None
    decodes: int
    lengths: torch.Tensor
    decode_tables: Tables
    parts: dict[int, Parts]
    partials: Partials
    spans: Spans
    span_tables: Tables


class Upload:
    """Copies arrays to a device in one piece. What it gave before is overwritten by the next call.

    The target stays where it is unless more is asked of it than ever before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._hosts = [torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._target = torch.empty(0, dtype=torch.int32)
        self._turn = 0

    def __call__(self, arrays: Sequence[IntArray]) -> list[torch.Tensor]:
        """The arrays as int32 on the device, at places that follow from the lengths of those before them."""
        firsts = np.cumsum([0, *(-(-array.size // _ALIGNED) * _ALIGNED for array in arrays)]).tolist()
        host = self._host(firsts[-1])
        view = host.numpy()
        for array, first in zip(arrays, firsts, strict=False):
            view[first : first + array.size] = array.reshape(-1)
        if len(self._target) < firsts[-1]:
            self._target = torch.empty(len(host), dtype=torch.int32, device=self._device)
        self._target[: firsts[-1]].copy_(host[: firsts[-1]], non_blocking=True)
        if self._pinned:
            event = self._copied[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event
        return [
            self._target[first : first + array.size].view(array.shape)
            for array, first in zip(arrays, firsts, strict=False)
        ]

    def _host(self, size: int) -> torch.Tensor:
        """The host buffer whose turn it is, once its last copy is done, for at least `size` numbers."""
        self._turn = 1 - self._turn
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        if len(self._hosts[self._turn]) < size:
            self._hosts[self._turn] = torch.empty(
                power_of_two(max(size, 1 << 16)), dtype=torch.int32, pin_memory=self._pinned
            )
        return self._hosts[self._turn]


class GpuPlanner:
    """Plans the steps of one model over one cache."""

    def __init__(self, cache: KVCache, q_heads: int, windows: Sequence[int]) -> None:
        self._block_size = cache.block_size
        self._q_heads, self._dim = q_heads, cache.head_dim
        self._windows = sorted(set(windows))
        self._queries = tile_queries(q_heads // cache.kv_heads, cache.head_dim, cache.dtype)
        self._device = cache.device
        self._upload = Upload(cache.device)
        self._partials = Partials.empty(0, q_heads, cache.head_dim, cache.device)

    def plan(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        rows: Rows,
        wanted: npt.NDArray[np.int64],
    ) -> GpuPlan:
        """IndexError where a block table is too short for its row."""
        decodes = rows.decodes
        starts, counts = np.array(rows.starts, np.int32), np.array(rows.counts, np.int32)
        widths = np.fromiter(map(len, rows.tables), np.int64, len(rows.tables))
        short = np.flatnonzero(starts + counts > widths * rows.block_size)
        if len(short):
            row = int(short[0])
            raise IndexError(
                f"row {row} ends at {starts[row] + counts[row]}, its table has {widths[row]} blocks of "
                f"{rows.block_size}"
            )
        blocks = np.concatenate([*rows.tables, np.empty(0, np.int32)])
        table_starts = np.cumsum(widths) - widths
        places = np.repeat(table_starts, counts) + positions // rows.block_size
        slots = blocks[places].astype(np.int64) * rows.block_size + positions % rows.block_size
        lengths = starts[:decodes] + 1
        parts = [parts_of(lengths, window) for window in self._windows]
        most = power_of_two(max((len(part_rows) for part_rows, _ in parts), default=0) or 1)
        spans = (starts[decodes:], np.cumsum([decodes, *counts[decodes:]], dtype=np.int32))
        tiles = tiles_of(starts[decodes:], counts[decodes:], self._queries)
        arrays: list[IntArray] = [tokens, positions, slots, wanted, lengths, table_starts, *spans]
        for part_rows, firsts in parts:
            arrays += [firsts, np.pad(part_rows, (0, most - len(part_rows)))]
        sent = self._upload([*arrays, tiles, blocks])
        begins, (*parted, tiles_sent, tables) = sent[5], sent[8:]
        return GpuPlan(
            tokens=sent[0],
            positions=sent[1],
            slots=sent[2],
            wanted=sent[3] if len(wanted) else None,
            decodes=decodes,
            lengths=sent[4],
            decode_tables=Tables(tables, begins[:decodes]),
            parts={
                window: Parts(parted[2 * index + 1], parted[2 * index])
                for index, window in enumerate(self._windows)
            },
            partials=self._room(most),
            spans=Spans(sent[6], sent[7], tiles_sent),
            span_tables=Tables(tables, begins[decodes:]),
        )

    def _room(self, parts: int) -> Partials:
        if len(self._partials.values) < parts:
            self._partials = Partials.empty(max(parts, 1024), self._q_heads, self._dim, self._device)
        return self._partials
