"""The engine's own figures, for `benchmarks.gpu`: a random model made on the device, its decode steps and its prefill.

Steps are run as the worker's loop runs them, through `Runner.run`. Limits are physical: see `gpu_bench`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import BLOCK, Bench, Shape

CONTEXT = 1024


def block_table(blocks: Any) -> Any:
    from engine.plan import BlockTable

    made = BlockTable()
    made.extend([int(block) for block in blocks])
    return made


def row_of(start: int, tokens: list[int], table: Any, draws: bool = True) -> Any:
    from engine.api import SamplingParams
    from engine.plan import Row

    return Row(start, tokens, table, SamplingParams(temperature=0) if draws else None)


def make_runner(bench: Bench, tokens: int) -> Any:
    """A runner of random weights with KV memory for `tokens`, all made on the device; the KV is random too."""
    from engine.kv_cache import KVCache
    from engine.linear import Linear
    from engine.model_config import ModelConfig
    from engine.runner import Runner
    from engine.weights import LayerWeights, Weights

    began = time.perf_counter()
    shape, dtype = bench.shape, torch.bfloat16

    def linear(rows: int, columns: int) -> Linear:
        made = Linear(torch.empty(rows, columns, dtype=dtype, device=bench.device).normal_(0, columns**-0.5))
        made.pack()
        return made

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=dtype, device=bench.device)

    layers = [
        LayerWeights(
            input_norm=ones(),
            qkv=linear((shape.q_heads + 2 * shape.kv_heads) * shape.dim, shape.hidden),
            q_norm=None,
            k_norm=None,
            output=linear(shape.hidden, shape.q_heads * shape.dim),
            post_norm=ones(),
            gate_up=linear(2 * shape.inner, shape.hidden),
            down=linear(shape.hidden, shape.inner),
        )
        for _ in range(shape.layers)
    ]
    embedding = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=bench.device).normal_()
    head = linear(shape.vocab, shape.hidden)
    weights = Weights(shape.q_heads, shape.kv_heads, range(shape.vocab), embedding, layers, ones(), head)
    config = ModelConfig.from_dict(shape.raw())
    cache = KVCache(config, -(-tokens // BLOCK), BLOCK, dtype, bench.device)
    for layer in cache.layers:
        layer.normal_()
    runner = Runner(config, weights, cache)
    bench.sync()
    bench.say(
        f"model and {cache.size_bytes / 2**30:.1f} GiB of KV made in {time.perf_counter() - began:.1f} s"
    )
    return runner


class Watched:
    """A runner of which it is known when the last launch of a step was made: when its sampler returned."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._sample = runner, runner._sample
        self.launched = 0.0
        runner._sample = self._draw

    def _draw(self, *arguments: Any) -> Any:
        drawn = self._sample(*arguments)
        self.launched = time.perf_counter()
        return drawn

    def step(self, plan: Any) -> tuple[list[int], float, float]:
        """The drawn tokens, seconds of the step, and those of them in which the host did not wait for the device."""
        self.launched = 0.0
        began = time.perf_counter()
        drawn = self._runner.run(plan).sampled
        ended = time.perf_counter()
        return drawn, ended - began, self.launched - began if self.launched else float("nan")


class Decoding:
    """Sequences of `context` tokens that decode, each step from the tokens that the last one drew."""

    def __init__(self, watched: Watched, batch: int, blocks: int, context: int, steps: int) -> None:
        each = -(-(context + steps) // BLOCK)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self._tables = [block_table(order[at * each : (at + 1) * each]) for at in range(batch)]
        self._watched, self._drawn, self._at = watched, [1] * batch, context

    def step(self) -> tuple[float, float]:
        from engine.plan import StepPlan

        rows = [
            row_of(self._at, [token], table) for token, table in zip(self._drawn, self._tables, strict=True)
        ]
        self._drawn, seconds, host = self._watched.step(StepPlan(self._at, rows))
        self._at += 1
        return seconds, host


BATCHES = {
    1: (4.4, 3.9, "ms"),
    16: (None, None, "ms"),
    64: (8700, 10000, "tok/s"),
    256: (14000, 17000, "tok/s"),
}


def decode(bench: Bench) -> None:
    context = 32 if bench.smoke else CONTEXT
    most = 3 if bench.smoke else 128
    room = _room(bench)
    batches = {batch: bar for batch, bar in BATCHES.items() if batch * (context + most + BLOCK) <= room}
    if dropped := set(BATCHES) - set(batches):
        bench.say(f"no memory for batches of {sorted(dropped)}")
    runner = make_runner(bench, max(batches) * (context + most + BLOCK))
    watched, shape = Watched(runner), bench.shape
    for batch, (bar, stretch, unit) in batches.items():
        made = Decoding(watched, batch, runner.kv_cache.num_blocks, context, most)
        first, _ = made.step()
        bench.say(f"batch {batch}: the first step, which compiles kernels, took {first:.2f} s")
        for _ in range(0 if bench.smoke else 7):
            made.step()
        spent = [made.step() for _ in range(2 if bench.smoke else 30 if bench.form == "quick" else 60)]
        seconds = statistics.median(step for step, _ in spent)
        read = 2 * shape.streamed + batch * context * shape.token_bytes
        weights = bench.seconds_for(read_bytes=2 * shape.streamed, operations=2 * shape.streamed * batch)
        kv = bench.seconds_for(read_bytes=batch * context * shape.token_bytes)
        least = None if weights is None or kv is None else weights + kv
        per = 1e3 if unit == "ms" else batch
        bench.figure(
            f"decode_{batch}",
            f"decode, batch {batch}, context {context}",
            1e3 * seconds if unit == "ms" else batch / seconds,
            unit,
            bar=bar,
            stretch=stretch,
            limit=None if least is None else least * per if unit == "ms" else batch / least,
            more_is_better=unit != "ms",
            note=f"TPOT {1e3 * seconds:.2f} ms; reads {read / seconds / 1e9:.0f} GB/s",
        )
        if batch in (1, max(batches)):
            _host(bench, batch, statistics.median(host for _, host in spent), seconds)
            _gaps(bench, batch, made)


def _room(bench: Bench) -> int:
    """Tokens of KV that there is memory for beside the model, with some to spare."""
    if bench.device == "cpu":
        return 1 << 14 if bench.smoke else 0
    free, _ = torch.cuda.mem_get_info()
    model = 2 * (bench.shape.streamed + bench.shape.head)
    return int((0.92 * free - model - (4 << 30) * (not bench.smoke)) // bench.shape.token_bytes)


def _host(bench: Bench, batch: int, launching: float, step: float) -> None:
    """What the host does in a step: booking (`benchmarks.host_step`), and planning and launching."""
    from benchmarks import host_step

    booking = host_step.measure(batch, idle=False) / 1e6
    bench.figure(
        f"host_{batch}",
        f"host time of a step, batch {batch}",
        1e3 * (booking + launching),
        "ms",
        bar=1.0 if batch == 256 else None,
        stretch=0.4 if batch == 256 else None,
        more_is_better=False,
        note=f"scheduling and booking {1e3 * booking:.2f}, planning and launching {1e3 * launching:.2f}; "
        f"{launching / step:.0%} of the step passes before the last launch",
    )


def _gaps(bench: Bench, batch: int, made: Decoding) -> None:
    """How long the device does nothing between two steps, and within one, by torch's profiler."""
    if bench.device != "cuda":
        return bench.figure(f"gap_{batch}", "idle gap between steps", None, "µs", note="needs a GPU")
    steps = 12
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                made.step()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))
        between, within = idle(trace["traceEvents"], steps)
    except Exception as error:
        reason = f"the profiler: {type(error).__name__}: {error}"
        return bench.figure(f"gap_{batch}", f"idle gap between steps, batch {batch}", None, "µs", note=reason)
    note = f"idle within a step {within / 1e3:.2f} ms; both with the profiler on, which slows launches"
    bench.figure(
        f"gap_{batch}",
        f"idle gap between steps, batch {batch}",
        between,
        "µs",
        bar=100,
        stretch=20,
        more_is_better=False,
        note=note,
    )


def idle(events: list[dict[str, Any]], steps: int) -> tuple[float, float]:
    """Microseconds in which a device was idle: the median after a step's tokens were read back, and the mean of all
    others in a step. `events` are those of a Chrome trace; ValueError when the device did nothing in it."""
    work = ("kernel", "gpu_memcpy", "gpu_memset")
    busy = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), "DtoH" in event["name"])
        for event in events
        if event.get("cat") in work and "dur" in event
    )
    if not busy:
        raise ValueError("no work of a device in the trace")
    between, within, end, read = [], 0.0, busy[0][1], busy[0][2]
    for start, stop, reads in busy[1:]:
        if read:
            between.append(max(0.0, start - end))
        else:
            within += max(0.0, start - end)
        if stop >= end:
            end, read = stop, reads
    if not between:
        raise ValueError("no tokens were read back in the trace")
    return statistics.median(between), within / steps


def prefill(bench: Bench) -> None:
    sizes = {512: (None, None), 2048: (35000, 43000), 8192: (30000, 38000)}
    if bench.smoke:
        sizes = {16: (None, None), 48: (None, None)}
    runner = make_runner(bench, 2 * max(sizes))
    for size, (bar, stretch) in sizes.items():
        for chunk in {size, min(size, 8 if bench.smoke else 512)}:
            seconds = bench.timed(lambda n=size, c=chunk: run_prompt(bench, runner, n, c), 5)  # type: ignore[misc]
            least = bench.seconds_for(operations=_prefill_operations(bench.shape, size))
            whole = chunk == size
            bench.figure(
                f"prefill_{size}" if whole else f"prefill_{size}_chunked",
                f"prefill of {size}" + ("" if whole else f" in steps of {chunk}"),
                size / seconds,
                "tok/s",
                bar=bar if whole else None,
                stretch=stretch if whole else None,
                limit=None if least is None else size / least,
                note=f"{1e3 * seconds:.1f} ms",
            )


def run_prompt(
    bench: Bench, runner: Any, size: int, chunk: int, told: Callable[[int], object] = lambda end: None
) -> None:
    """A prompt in steps of `chunk`; one token is drawn at the end. `told` after each step."""
    from engine.plan import StepPlan

    table = block_table(range(-(-size // BLOCK)))
    for start in range(0, size, chunk):
        end = min(size, start + chunk)
        tokens = [(7 * token) % bench.shape.vocab for token in range(start, end)]
        runner.run(StepPlan(start, [row_of(start, tokens, table, draws=end == size)]))
        told(end)


def _prefill_operations(shape: Shape, size: int) -> float:
    products = 2 * (shape.streamed - shape.head) * size + 2 * shape.head
    return products + shape.layers * 2 * shape.q_heads * shape.dim * size**2
