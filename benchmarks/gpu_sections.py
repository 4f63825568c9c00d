"""The sections of `benchmarks.gpu`, which starts this in processes of their own: each prints figures as it has them.

    python -m benchmarks.gpu_sections limits,decode [--form full|quick|smoke] [--limits JSON]

A section is a function of a `Bench`. What it raises ends that section only. Limits in figures are physical: bytes over
the read bandwidth and operations over the rate of bf16 products that the first section measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import BLOCK, Bench
from benchmarks.gpu_engine import CONTEXT, block_table, decode, make_runner, prefill, row_of, run_prompt

ROOT = Path(__file__).resolve().parents[1]

# ---- the machine -------------------------------------------------------------------------------------------------


def limits(bench: Bench) -> None:
    if bench.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        bench.say(f"{about.name}, {about.multi_processor_count} SMs, {free >> 30} of {total >> 30} GiB free")
    size = 1 << 20 if bench.smoke else 8 << 30
    memory = torch.empty(size // 4, device=bench.device).normal_()
    reads: dict[str, Callable[[], object]] = {
        "sum of fp32": memory.sum,
        "maximum of fp32": memory.amax,
        "product with a vector": lambda: torch.mv(matrix, vector),
    }
    width = 64 if bench.smoke else 8192
    matrix = memory.view(torch.bfloat16).view(-1, width).nan_to_num_(0, 0, 0)
    vector = torch.ones(width, dtype=torch.bfloat16, device=bench.device)
    found: dict[str, float] = {}
    for name, step in reads.items():
        try:
            found[name] = size / bench.timed(step) / 1e9
        except RuntimeError as error:  # a library that does not take so many: the others will do
            bench.say(f"{name}: {error}".splitlines()[0])
    best = max(found, key=lambda name: found[name])
    others = ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
    bench.figure("read", "reading memory", found[best], "GB/s", note=others, section_limit=True)
    here, there = memory.view(torch.uint8).chunk(2)
    copied = (size // 2) / bench.timed(lambda: there.copy_(here)) / 1e9
    bench.figure("copy", "copying, payload", copied, "GB/s", note="bytes counted once", section_limit=True)
    side = 64 if bench.smoke else 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    rate = 2 * side**3 / bench.timed(lambda: a @ b, 20, 3) / 1e12
    bench.figure("gemm", f"bf16 product of {side}²", rate, "TFLOP/s", section_limit=True)
    if bench.device == "cuda":
        host = torch.empty(256 << 20, dtype=torch.uint8)
        pinned, source = host.pin_memory(), torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        for name, where in (("pageable", host), ("pinned", pinned)):
            bench.figure(
                f"to_host_{name}",
                f"device to {name} host memory",
                source.nbytes / bench.timed(lambda w=where: w.copy_(source)) / 1e9,  # type: ignore[misc]
                "GB/s",
            )


# ---- is it right -------------------------------------------------------------------------------------------------


def agreement(bench: Bench) -> None:
    """Greedy tokens of a small llama, prompts of several lengths at once, against transformers on the same device."""
    import transformers

    from engine.runner import load_runner
    from tests.support import families

    prompts = families.prompts([5, 17] if bench.smoke else [5, 40, 129, 300])
    for dtype in ("float32",) if bench.smoke else ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            families.make_model(Path(folder), "llama, llama3 rope", head_dim=32)
            runner = load_runner(folder, dtype, num_blocks=200, block_size=BLOCK, device=bench.device)
            reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(
                bench.device
            )
            count, same, total = 8 if bench.smoke else 32, 0, 0
            answers = _greedy(runner, prompts, count)
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = torch.tensor([prompt], device=bench.device)
                mask = torch.ones_like(ids)
                with torch.inference_mode():
                    given = reference.generate(
                        ids,
                        attention_mask=mask,
                        do_sample=False,
                        max_new_tokens=count,
                        eos_token_id=None,
                        pad_token_id=0,
                    )
                expected = given[0, len(prompt) :].tolist()
                alike = next(
                    (i for i, pair in enumerate(zip(answer, expected, strict=True)) if len({*pair}) > 1),
                    count,
                )
                same, total = same + alike, total + count
        bench.figure(
            f"agreement_{dtype}",
            f"tokens before the first that differs, {dtype}",
            100 * same / total,
            "%",
            bar=100 if dtype == "float32" else None,
            note="" if dtype == "float32" else "roundings differ: not all need agree",
        )


def _greedy(runner: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    from engine.plan import StepPlan

    tables, first = [], 0
    for prompt in prompts:
        blocks = -(-(len(prompt) + count) // BLOCK)
        tables.append(block_table(range(first, first + blocks)))
        first += blocks
    rows = [row_of(0, prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    for step in range(count):
        drawn = runner.run(StepPlan(step, rows)).sampled
        for answer, token in zip(answers, drawn, strict=True):
            answer.append(token)
        ends = [len(prompt) + step for prompt in prompts]
        rows = [row_of(*each) for each in zip(ends, [[token] for token in drawn], tables, strict=True)]
    return answers


def kernels(bench: Bench) -> None:
    """The tests themselves, on the device: without it they are the interpreter's, which `./scripts/test` runs."""
    if bench.smoke:
        return bench.figure(
            "kernels", "kernels against their references", None, "", note="not in the smoke form"
        )
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [
        "--rootdir",
        str(ROOT),
        "--import-mode=importlib",
        "tests/engine/kernels",
        "tests/kvtransfer/kernels",
    ]
    began, failed, dots = time.monotonic(), [], 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        dots += line.count(".") if line.startswith((".", "F", "E", "s")) else 0
        last = line.strip() or last
        if "Error" in line or line.startswith(("FAILED", "ERROR")):
            failed.append(line.strip()[:160])
        bench.say(line.rstrip()[:160])
    bench.figure(
        "kernels",
        "tests of the kernels that pass",
        dots,
        f"of {dots + len([f for f in failed if f.startswith(('FAILED', 'ERROR'))])}",
        note=last,
    )
    if process.wait():
        raise RuntimeError(f"{last}; {'; '.join(failed[:3])} ({time.monotonic() - began:.0f} s)")


# ---- hand-off ----------------------------------------------------------------------------------------------------


def push(bench: Bench) -> None:
    from benchmarks import gpu_handoff

    page = BLOCK * bench.shape.kv_heads * bench.shape.dim * 2
    size = 64 * page if bench.smoke else 1 << 30
    cap = bench.limits.get("copy")
    for name, way in (("NIXL", gpu_handoff.push_nixl), ("torch", gpu_handoff.push_torch)):
        try:
            speeds = way(size, page, bench.device, lambda step: bench.timed(step, 8))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            bench.figure(f"push_{name}", f"{name}: not measured", None, "GB/s", note=reason)
            continue
        for kind, bar, stretch in (("whole", 0.60, 0.85), ("pages", 0.45, 0.75)):
            found = {key: rate for key, rate in speeds.items() if ("page" in key) == (kind == "pages")}
            official = name == "NIXL" and cap
            bench.figure(
                f"push_{name}_{kind}",
                f"{name}, {size / 2**20:.0f} MiB, "
                + ("contiguous" if kind == "whole" else f"pages of {page >> 10} KiB"),
                max(found.values()),
                "GB/s",
                bar=bar * cap if official and cap else None,
                stretch=stretch * cap if official and cap else None,
                limit=cap,
                note=", ".join(f"{key} {rate:.1f}" for key, rate in found.items()),
            )


def handoff(bench: Bench) -> None:
    """Baton's movers, as they are: through the host's memory where the pool is on a GPU."""
    from benchmarks.gpu_handoff import Handoff, kv_spec

    shape, size, chunk = bench.shape, *((96, 48) if bench.smoke else (8192, 2048))
    runner = make_runner(bench, size)
    kv = kv_spec(shape.layers, shape.q_heads, shape.kv_heads, shape.dim, torch.bfloat16, BLOCK)
    made = Handoff(kv, runner.kv_cache.layers, size)
    numbers = iter(range(1, 1000))
    done = [0]

    def together() -> None:
        done[0] = 0
        failed: list[BaseException] = []

        def send() -> None:
            try:
                made.send(lambda: done[0], next(numbers))
            except BaseException as error:
                failed.append(error)

        sender = threading.Thread(target=send)
        sender.start()
        run_prompt(bench, runner, size, chunk, lambda end: done.__setitem__(0, end))
        sender.join()
        if failed:
            raise failed[0]

    try:
        alone = bench.timed(lambda: run_prompt(bench, runner, size, chunk), 5)
        serial = bench.timed(lambda: made.send(lambda: size, next(numbers)), 5)
        both = bench.timed(together, 5)
    finally:
        made.close()
    moved = size * shape.token_bytes
    note = f"{made.transport} through the host's memory, digests and verification; {1e3 * serial:.0f} ms"
    bench.figure(
        "handoff",
        f"hand-off of {size} tokens",
        moved / serial / 1e9,
        "GB/s",
        limit=bench.limits.get("copy"),
        note=note,
    )
    exposed = max(0.0, both - alone) / serial
    bench.figure(
        "hidden",
        f"of it behind the prefill, steps of {chunk}",
        100 * (1 - exposed),
        "%",
        bar=80,
        stretch=95,
        note=f"prefill {1e3 * alone:.0f} ms alone, {1e3 * both:.0f} with the hand-off",
    )


def deterministic(bench: Bench) -> None:
    bench.figure(
        "deterministic", "deterministic mode, slowdown", None, "%", more_is_better=False, note="not built yet"
    )


# ---- beside it ---------------------------------------------------------------------------------------------------


def transformers(bench: Bench) -> None:
    """Decode rate of its continuous batching: from runs of few and of more tokens, so that prefill drops out."""
    import transformers as library

    if bench.device != "cuda":
        return bench.figure("transformers", "continuous batching", None, "tok/s", note="needs a GPU")
    raw = {
        key: value for key, value in bench.shape.raw().items() if key not in ("architectures", "torch_dtype")
    }
    config = library.LlamaConfig(**raw)
    config._attn_implementation = "sdpa"
    with torch.device(bench.device):
        model = library.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    bench.say(f"transformers {library.__version__}: model made")
    prompt, few, more = (8, 2, 4) if bench.smoke else (CONTEXT, 8, 40)
    for batch in (2,) if bench.smoke else (1, 64):
        prompts = [[(11 * at + row) % bench.shape.vocab for at in range(prompt)] for row in range(batch)]

        def spend(tokens: int, prompts: list[list[int]] = prompts) -> float:
            how = library.GenerationConfig(
                max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
            )
            began = time.perf_counter()
            answers = model.generate_batch(inputs=prompts, generation_config=how)
            bench.sync()
            made = [len(answer.generated_tokens) for answer in answers.values()]
            if made != [tokens] * len(prompts):
                raise RuntimeError(f"asked {len(prompts)} x {tokens} tokens, got {made[:8]}")
            return time.perf_counter() - began

        spend(few)
        seconds = (spend(more) - spend(few)) / (more - few)
        note = f"TPOT {1e3 * seconds:.1f} ms" if seconds > 0 else "too quick to tell"
        rate = batch / seconds if seconds > 0 else None
        bench.figure(
            f"transformers_{batch}", f"decode, batch {batch}, context {prompt}", rate, "tok/s", note=note
        )


ALL = (limits, agreement, kernels, decode, prefill, push, handoff, deterministic, transformers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections")
    parser.add_argument("--form", choices=["full", "quick", "smoke"], default="full")
    parser.add_argument("--limits", type=json.loads, default={})
    arguments = parser.parse_args()
    by_name = {section.__name__: section for section in ALL}
    if arguments.form == "smoke":
        torch.set_num_threads(1)
    bench = Bench(arguments.form, arguments.limits)
    for name in arguments.sections.split(","):
        try:
            by_name[name](bench)
        except Exception as error:
            traceback.print_exc()
            print(f"failed {type(error).__name__}: {error}".replace("\n", " ")[:400], flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    main()
