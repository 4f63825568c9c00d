"""`python -m simulation --seeds 100 --seed 0`: runs seeds and prints a line to replay each one that fails."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from simulation.run import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many runs")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--stop", action="store_true", help="stop at the first run that fails")
    arguments = parser.parse_args()
    began = time.perf_counter()
    facts: Counter[str] = Counter()
    events = failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        report = run_seed(seed)
        facts.update(report.facts)
        events += report.events
        if report.violations:
            failed += 1
            print(f"seed {seed}: {report.violations[0]}")
            print(f"  replay: python -m simulation --seeds 1 --seed {seed}")
            for more in report.violations[1:]:
                print(f"  {more}")
            if arguments.stop:
                break
    seconds = time.perf_counter() - began
    print(
        f"{arguments.seeds} seeds, {failed} failed, {events} events in {seconds:.1f} s, "
        f"{arguments.seeds / seconds:.1f} seeds/s"
    )
    print(" ".join(f"{name}={count}" for name, count in sorted(facts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
