"""Request traces: when requests came, how long they were, and which prompts shared a prefix. Pure.

Reads Mooncake's jsonl and Azure's csv; `bench.synthetic` makes traces of its own. A trace is a value: cutting, scaling
and speeding it up give new ones. `bench.prompts` turns requests into prompts; the simulator replays the same traces.
Nothing here knows a clock or draws by chance that is not seeded.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import msgspec

MOONCAKE_BLOCK_TOKENS = 512
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A trace that cannot be read or cannot give what is asked. `line` counts from 1; 0: the whole trace."""

    def __init__(self, name: str, line: int, field: str, message: str) -> None:
        where = name + (f", line {line}" if line else "") + (f", field {field!r}" if field else "")
        super().__init__(f"{where}: {message}")
        self.name = name
        self.line = line
        self.field = field


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Equal `blocks` ids mean equal tokens; what `blocks` do not cover is the request's alone."""

    number: int  # its place in the whole trace, kept by cuts: the seed of what no other prompt shares
    arrival_s: float  # after the beginning of the trace
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # of the leading tokens, `Trace.block_tokens` each; the last may be partial


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, the first at 0 or later. `span_s`: how long they came, the last gap included."""

    name: str
    requests: tuple[TraceRequest, ...]
    span_s: float
    block_tokens: float = MOONCAKE_BLOCK_TOKENS  # fractional once lengths are scaled

    @property
    def rate(self) -> float:
        """Mean requests a second."""
        return len(self.requests) / self.span_s if self.span_s else 0.0

    def edges(self, request: TraceRequest) -> list[int]:
        """Where the request's blocks end, in tokens of its prompt, rising, each within it.

        Edges depend on a block's place alone, so that prompts with the same leading ids have the same leading tokens.
        """
        edges = []
        for place in range(1, len(request.blocks) + 1):
            edge = min(request.input_tokens, round(place * self.block_tokens))
            edges.append(edge)
            if edge == request.input_tokens:
                break
        return edges

    def first(self, count: int) -> Trace:
        """The first `count` requests; the span ends where the next would have come. Raises when there are fewer."""
        if count > len(self.requests):
            raise TraceError(
                self.name, 0, "", f"{count} requests are wanted, but there are {len(self.requests)}"
            )
        if count == len(self.requests):
            return self
        # Where all come at once there is no next arrival to end with.
        span_s = self.requests[count].arrival_s or self.span_s * count / len(self.requests)
        return replace(self, requests=self.requests[:count], span_s=span_s)

    def window(self, start_s: float, duration_s: float) -> Trace:
        """What arrives in [start_s, start_s + duration_s), arrivals counted from `start_s`. Raises beyond the end."""
        end_s = start_s + duration_s
        if end_s > self.span_s * (1 + 1e-9):
            raise TraceError(
                self.name,
                0,
                "",
                f"it lasts {self.span_s:.1f} s at {self.rate:.3g} requests/s, but {duration_s:.1f} s from "
                f"{start_s:.1f} s are wanted; ask for less time, or stretch it with a lower rate",
            )
        kept = tuple(
            replace(request, arrival_s=request.arrival_s - start_s)
            for request in self.requests
            if start_s <= request.arrival_s < end_s
        )
        return replace(self, requests=kept, span_s=duration_s)

    def scaled(self, input_scale: float, output_scale: float) -> Trace:
        """Lengths times a factor, at least 1 token; blocks shrink with the input, so the shared part stays shared."""
        if input_scale <= 0 or output_scale <= 0:
            raise ValueError(f"a scale of lengths must be above 0, not {min(input_scale, output_scale)}")
        requests = tuple(
            replace(
                request,
                input_tokens=max(1, round(request.input_tokens * input_scale)),
                output_tokens=max(1, round(request.output_tokens * output_scale)),
            )
            for request in self.requests
        )
        return replace(self, requests=requests, block_tokens=self.block_tokens * input_scale)

    def sped(self, factor: float) -> Trace:
        """Time divided by `factor`: 2 sends twice as many requests a second."""
        if factor <= 0:
            raise ValueError(f"a speed-up must be above 0, not {factor}")
        requests = tuple(replace(request, arrival_s=request.arrival_s / factor) for request in self.requests)
        return replace(self, requests=requests, span_s=self.span_s / factor)

    def at_rate(self, rate: float) -> Trace:
        """The same arrivals, stretched or pressed to `rate` requests a second on average."""
        if rate <= 0:
            raise ValueError(f"a rate must be above 0 requests/s, not {rate}")
        return self.sped(rate / self.rate) if self.requests else self

    def spread(self, seed: int) -> Trace:
        """Requests with equal arrivals spread evenly by chance up to the next arrival.

        Mooncake's time stamps are 3 s apart: as they stand, ten requests come at the same instant.
        """
        chance = random.Random(seed)
        groups = [list(same) for _, same in groupby(self.requests, key=lambda request: request.arrival_s)]
        spread: list[TraceRequest] = []
        for index, same in enumerate(groups):
            start = same[0].arrival_s
            end = groups[index + 1][0].arrival_s if index + 1 < len(groups) else max(start, self.span_s)
            times = (
                sorted(start + (end - start) * chance.random() for _ in same) if len(same) > 1 else [start]
            )
            spread += [replace(request, arrival_s=at) for request, at in zip(same, times, strict=True)]
        return replace(self, requests=tuple(spread))

    def only(self, keep: Callable[[TraceRequest], bool]) -> Trace:
        """The requests that `keep` wants, at their times."""
        return replace(self, requests=tuple(request for request in self.requests if keep(request)))


def load(path: Path) -> Trace:
    """Reads a file by its ending: .jsonl is Mooncake's form, .csv is Azure's. Raises TraceError, OSError."""
    readers = {".jsonl": read_mooncake, ".csv": read_azure}
    if path.suffix not in readers:
        raise TraceError(
            str(path),
            0,
            "",
            f"the ending {path.suffix!r} is unknown; .jsonl is Mooncake's form, .csv Azure's",
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return readers[path.suffix](file, path.name)
    except UnicodeDecodeError as error:
        raise TraceError(str(path), 0, "", f"it is not text in UTF-8: {error}") from None


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # ms
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    hash_ids: list[int] = []


def read_mooncake(lines: Iterable[str], name: str) -> Trace:
    """One JSON object a line: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks.

    Without `hash_ids` nothing is shared. Source of the form: the traces published with the Mooncake paper, FAST 2025.
    """
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    rows: list[tuple[float, int, int, tuple[int, ...]]] = []
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = decode(text)
        except msgspec.DecodeError as error:  # of a value too: ValidationError is one
            raise TraceError(name, line, _field_of(str(error)), str(error)) from None
        most = -(-row.input_length // MOONCAKE_BLOCK_TOKENS)
        if len(row.hash_ids) > most:
            raise TraceError(
                name,
                line,
                "hash_ids",
                f"{len(row.hash_ids)} blocks of {MOONCAKE_BLOCK_TOKENS} tokens, but {row.input_length} tokens "
                f"have at most {most}",
            )
        rows.append((row.timestamp / 1e3, row.input_length, row.output_length, tuple(row.hash_ids)))
    return _trace(name, rows)


def read_azure(lines: Iterable[str], name: str) -> Trace:
    """A heading, then rows of a time stamp (ISO 8601) and token counts, as in Azure's traces of 2023 and 2024.

    Nothing is known of shared prefixes. Rows without any token asked or given are a fault of the file.
    """
    table = csv.reader(lines)
    heading = tuple(next(table, ()))
    if heading[: len(AZURE_FIELDS)] != AZURE_FIELDS:
        raise TraceError(
            name, 1, "", f"the heading must be {','.join(AZURE_FIELDS)}, not {','.join(heading)!r}"
        )
    rows: list[tuple[float, int, int, tuple[int, ...]]] = []
    begin: datetime | None = None
    for row in table:
        if not row:
            continue
        if len(row) < len(AZURE_FIELDS):
            missing = AZURE_FIELDS[len(row)]
            raise TraceError(name, table.line_num, missing, f"missing: the row has {len(row)} fields")
        try:
            at = datetime.fromisoformat(row[0])
            begin = begin or at
            arrival_s = (at - begin).total_seconds()
        except (ValueError, TypeError) as error:  # TypeError: with and without a time zone in one file
            raise TraceError(name, table.line_num, AZURE_FIELDS[0], str(error)) from None
        counts = [
            _count(name, table.line_num, field, row[1 + index])
            for index, field in enumerate(AZURE_FIELDS[1:])
        ]
        rows.append((arrival_s, counts[0], counts[1], ()))
    return _trace(name, rows)


def _count(name: str, line: int, field: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise TraceError(name, line, field, f"a number of tokens from 1 is wanted, not {text!r}")
    return int(text)


def _field_of(message: str) -> str:
    """The field that msgspec's message names: at `$.input_length`, or missing required field `input_length`."""
    named = message.rpartition("`")[0].rpartition("`")[2]
    return named.removeprefix("$.").partition("[")[0]


def _trace(name: str, rows: Sequence[tuple[float, int, int, tuple[int, ...]]]) -> Trace:
    if not rows:
        raise TraceError(name, 0, "", "there are no requests in it")
    rows = sorted(rows, key=_arrival)
    begin = rows[0][0]
    requests = tuple(
        TraceRequest(number, arrival_s - begin, inputs, outputs, blocks)
        for number, (arrival_s, inputs, outputs, blocks) in enumerate(rows)
    )
    last = requests[-1].arrival_s
    # n arrivals have n - 1 gaps; with one more of the mean the rate is that of the gaps.
    return Trace(name, requests, span_s=last * len(rows) / (len(rows) - 1) if last else 1.0)


def _arrival(row: tuple[Any, ...]) -> float:
    return float(row[0])
