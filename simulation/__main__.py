"""`python -m simulation`, which is what `scripts/soak` runs: seeds on every core, until told otherwise."""

from __future__ import annotations

import argparse
import sys

from simulation.soak import soak


def main() -> int:
    """0: every seed held. 1: some did not; each was printed with the line that replays it."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, help="stop after so long (default: never)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, help="stop after so many (default: never)")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that fails")
    arguments = parser.parse_args()
    result = soak(
        arguments.seed,
        arguments.seeds,
        arguments.seconds,
        processes=arguments.processes,
        stop=arguments.stop,
    )
    print(result.table())
    print("events:", " ".join(f"{name}={times}" for name, times in sorted(result.facts.items())))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
