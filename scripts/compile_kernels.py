"""Compiles every kernel of engine/kernels for GPUs that need not be there, and prints what the compiler made of them.

    .venv/bin/python scripts/compile_kernels.py [--arch 90] [--case Llama-3.1-8B] [--json FILE]

Exits with 1 when a kernel asks for more shared memory than the architecture has. Needs triton, no GPU and no driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HEAD = f"{'case':<20} {'kernel':<18} {'sm':>4} {'warps':>5} {'regs':>5} {'spill B':>7} {'shared B':>8} {'code B':>7}  matrix unit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, 90 for 9.0 (80, 90, 100)")
    parser.add_argument("--case", action="append", help="a name of engine/kernels/shapes.py (all)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")

    from engine.kernels.ahead import SHARED_LIMIT, compile_launch
    from engine.kernels.shapes import CASES, launches

    names = [case.name for case in CASES]
    unknown = sorted(set(options.case or ()) - set(names))
    if unknown:
        parser.error(f"--case {unknown[0]!r}: known are {', '.join(names)}")
    print(HEAD)
    rows, too_large = [], 0
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        for launch in launches(case):
            for arch in options.arch or (80, 90, 100):
                made = compile_launch(launch, arch)
                rows.append({"case": case.name, **dataclasses.asdict(made)})
                over = made.shared_bytes > SHARED_LIMIT[arch]
                too_large += over
                print(
                    f"{case.name:<20} {made.kernel:<18} {arch:>4} {made.warps:>5} {made.registers:>5} "
                    f"{made.spill_bytes:>7} {made.shared_bytes:>8} {made.code_bytes:>7}  {made.matrix_unit}"
                    f"{'  TOO MUCH SHARED MEMORY' if over else ''}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main())
