"""Compiles every kernel of engine/kernels for GPUs that need not be there, and prints what the compiler made of them.

    .venv/bin/python scripts/compile_kernels.py [--arch 90] [--case Llama-3.1-8B] [--json FILE]

Registers and spilled bytes are of a thread, shared memory (bytes) of a program. A kernel that two cases compile to the
same code is listed with the first. Exits with 1 when one needs more shared memory than the architecture has. Needs
triton, but no GPU and no driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHES = (80, 90, 100)
CELLS = f"{'registers':>10} {'spilled':>8} {'shared':>7}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, action="append", help="compute capability, 90 for 9.0 (80, 90, 100)"
    )
    parser.add_argument("--case", action="append", help="a name of engine/kernels/shapes.py (all)")
    parser.add_argument("--json", type=Path, help="also write all that is known there")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")

    from engine.kernels.ahead import SHARED_LIMIT, compile_launch, identity
    from engine.kernels.shapes import CASES, launches

    names = [case.name for case in CASES]
    for name in options.case or ():
        if name not in names:
            parser.error(f"--case {name!r}: known are {', '.join(names)}")
    arches = options.arch or ARCHES
    for arch in arches:
        if arch not in SHARED_LIMIT:
            parser.error(f"--arch {arch}: known are {', '.join(map(str, SHARED_LIMIT))}")
    print(f"{'':<18} {'':<18} {'':>5}" + "".join(f" |{f'sm_{arch}':^{len(CELLS)}}" for arch in arches))
    print(f"{'case':<18} {'kernel':<18} {'warps':>5}" + f" |{CELLS}" * len(arches))
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    too_large = 0
    for case in CASES:
        for launch in launches(case) if not options.case or case.name in options.case else ():
            if identity(launch) in seen:
                continue
            seen.add(identity(launch))
            cells = ""
            for arch in arches:
                made = compile_launch(launch, arch)
                rows.append({"case": case.name, **dataclasses.asdict(made)})
                too_large += made.shared_bytes > SHARED_LIMIT[arch]
                cells += f" |{made.registers:>10} {made.spill_bytes:>8} {made.shared_bytes:>7}"
            print(f"{case.name:<18} {made.kernel:<18} {made.warps:>5}{cells}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if too_large:
        print(f"{too_large} of these need more shared memory than the architecture has", file=sys.stderr)
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main())
