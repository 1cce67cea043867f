"""--help is fast, since nothing is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

COST = """
import sys, time
start = time.perf_counter()
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group
run_reporting_faults(group, ["--help"])
print(time.perf_counter() - start)
print([m for m in ("numpy", "yaml", "rich", "tokenizers", "torch", "mlx") if m in sys.modules])
"""
LARGEST_SECONDS = 0.3
TRIES = 3
"""The fastest of several counts: a busy machine delays some."""


def test_help_is_fast_and_imports_only_click() -> None:
    times = []
    for _ in range(TRIES):
        found = subprocess.run(
            [sys.executable, "-c", COST], capture_output=True, text=True, check=True
        )
        *_, seconds, imported = found.stdout.splitlines()
        assert imported == "[]"
        times.append(float(seconds))
    assert min(times) < LARGEST_SECONDS
