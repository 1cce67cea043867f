"""Time optimizer steps of several contenders in turns, each in its own process; print a table.

Command: python tests/benchmarks/steps.py --model DIR [--data FILE] ours-cuda plain-torch
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WARM_STEPS = 2
ROUNDS = int(os.environ.get("ROUNDS", "2"))
HERE = Path(__file__).parent


def main() -> None:
    """Run the contenders among the arguments in turns; pass other arguments to contenders.py."""
    words = sys.argv[1:]
    first = next((i for i, w in enumerate(words) if w.startswith("--")), len(words))
    contenders, options = words[:first], words[first:]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, dict] = {}
    for _ in range(ROUNDS):
        for name in contenders:
            found = run(name, options)
            if found is None:
                continue
            last[name] = found
            timed = list(zip(found["seconds"], found["tokens"], strict=True))[WARM_STEPS:]
            rates[name] += [tokens / seconds for seconds, tokens in timed]
    print(
        f"{'contender':<24} {'tokens/s':>9} {'spread':>13} {'supervised/s':>12} {'GiB':>6}  losses"
    )
    for name, values in rates.items():
        if not values:
            print(f"{name:<24} failed")
            continue
        found, middle = last[name], statistics.median(values)
        share = sum(found["supervised"]) / sum(found["tokens"])
        spread = f"{min(values):.0f}-{max(values):.0f}"
        losses = f"{found['losses'][0]:.5f} .. {found['losses'][-1]:.5f}"
        memory = found["peak_bytes"] / 2**30
        speed = f"{middle:>9.1f} {spread:>13} {middle * share:>12.1f}"
        print(f"{name:<24} {speed} {memory:>6.1f}  {losses}")


def run(name: str, options: list[str]) -> dict | None:
    """Return the last line that a contender printed, or None if it failed."""
    command = [sys.executable, str(HERE / "contenders.py"), name, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
