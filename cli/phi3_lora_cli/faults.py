"""Conversion of exceptions into messages and exit codes; --debug adds a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from phi3_lora.errors import Phi3LoraError


def run_reporting_faults(group: click.Group, arguments: Sequence[str]) -> int:
    """Run a command and return the exit code of the contract.

    0 done; 1 a fault of ours; 2 wrong usage, config, data or file; 3 a check found a difference;
    130 and 143 interrupted.
    """
    show_traceback = "--debug" in arguments
    _escape_missing_characters()
    try:
        result = group.main(args=list(arguments), prog_name="phi3-lora", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _say("interrupted", 130)
    except click.ClickException as problem:
        problem.show()
        return 2
    except Phi3LoraError as problem:
        if show_traceback:
            traceback.print_exc()
        is_stop = problem.exit_code in (130, 143)
        return _say(str(problem) if is_stop else f"error: {problem}", problem.exit_code)
    except MemoryError:
        return _say(f"error: out of memory: {_memory_advice(arguments)}", 2)
    except (BrokenPipeError, SystemExit):
        # The reader of our output closed the pipe, which click turns into SystemExit: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as fault:
        if show_traceback:
            traceback.print_exc()
        if isinstance(fault, OSError) and fault.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _say(f"error: {fault.strerror}: {fault.filename!r:.120}", 2)
        return _say(
            f"internal error: {type(fault).__name__}: {fault}\nThis is a fault of phi3-lora. Run "
            "again with --debug and report the traceback.",
            1,
        )


def _escape_missing_characters() -> None:
    """Escape characters that the encoding of the terminal does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _memory_advice(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["data"]:
        return "take the data in parts, or leave out near duplicates (--no-near-duplicates)"
    return "lower --batch-size or --max-length"


def _say(message: str, exit_code: int) -> int:
    click.echo(message, err=True)
    return exit_code
