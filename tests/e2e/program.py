"""Ways to run the program: in a fresh process, in a process that is forked warm, or in this one."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group

PROGRAM = [sys.executable, "-m", "phi3_lora_cli"]
_WARM = multiprocessing.get_context("forkserver")
# The server imports the frameworks once and computes nothing, so that each child starts as a fresh
# process does, but without seconds of imports. PyTorch comes first: after MLX's BLAS its own sums
# differ in the last bits from those of a fresh process.
_WARM.set_forkserver_preload(["phi3_lora_cuda", "phi3_lora_mlx", "tests.e2e.program"])


def _nothing() -> None:
    pass


def start_warm(*arguments: str, output: Path | str = os.devnull) -> BaseProcess:
    """Start a command in a process of its own that has the frameworks imported.

    Args:
        arguments: of the command.
        output: a file for both stdout and stderr.
    """
    process = _WARM.Process(target=_run, args=(arguments, str(output), str(output), _nothing))
    process.start()
    return process


def phi3_lora_warm(
    *arguments: str, before: Callable[[], None] = _nothing
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process of its own that has the frameworks imported.

    Args:
        arguments: of the command.
        before: a function of a module, which is called first in that process.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _WARM.Process(target=_run, args=(arguments, str(out), str(err), before))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, out.read_text(), err.read_text()
        )


def phi3_lora_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported the frameworks."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_reporting_faults(group, list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def train_arguments(inputs: tuple[str, str], run: Path, backend: str) -> list[str]:
    """Return arguments for sixty steps with a checkpoint every five steps."""
    model, data = inputs
    return [
        *("train", "--model", model, "--data", data, "--output", str(run)),
        *("--backend", backend, "--device", "cpu", "--max-steps", "60", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=3"),
    ]


def stop_after(
    start: Callable[[Path], BaseProcess | subprocess.Popen[bytes]],
    run: Path,
    step: int,
    number: signal.Signals,
) -> tuple[Path, int]:
    """Start training, and send a signal once a step is saved.

    On a busy machine a run may end before the signal comes. Then another one is started.

    Args:
        start: starts training into a folder.
        run: the folder, to which the number of the attempt is added.
        step: whose checkpoint is waited for.
        number: the signal.

    Returns:
        Folder of the run that was stopped, and its exit code.
    """
    for attempt in range(20):
        folder = run.with_name(f"{run.name}-{attempt}")
        process = start(folder)
        assert process.pid is not None
        while not (folder / "checkpoints" / f"step-{step:06d}").exists():
            assert _exit_code(process) is None, f"ended before step {step} was saved"
            time.sleep(0.002)
        os.kill(process.pid, number)
        while (code := _exit_code(process)) is None:
            time.sleep(0.002)
        if not (folder / "adapter").exists():
            return folder, code
    raise AssertionError(f"each of 20 runs ended before the signal at step {step}")


def _exit_code(process: BaseProcess | subprocess.Popen[bytes]) -> int | None:
    """The exit code, negative where a signal ended the process; None while it runs."""
    return process.exitcode if isinstance(process, BaseProcess) else process.poll()


def _run(arguments: tuple[str, ...], out: str, err: str, before: Callable[[], None]) -> None:
    """Be the command, in a process that multiprocessing forked."""
    before()
    sys.stdout = open(out, "a", buffering=1)  # noqa: SIM115 - open as long as the process is
    sys.stderr = sys.stdout if err == out else open(err, "a", buffering=1)  # noqa: SIM115
    code = run_reporting_faults(group, list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
