"""The command group. It imports a command only to run it, which keeps --help fast."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from phi3_lora_cli.faults import run_reporting_faults

COMMANDS = {
    "train": ("train", "Fine-tune a Phi-3 model with LoRA."),
    "data": ("data", "Check, preview, split or clean data before training."),
    "evaluate": ("evaluate", "Measure loss, perplexity and accuracy on data."),
    "generate": ("generate", "Answer one prompt."),
    "quantize": ("quantize", "Write a base model in 4 or 8 bits, equal on both backends."),
    "convert": ("convert", "Move an adapter between PEFT, mlx-lm, loralib and unfused."),
    "verify": ("verify", "Compare an adapter here with where it was trained."),
    "parity": ("parity", "Check on your own model that both backends give the same numbers."),
    "merge": ("merge", "Fold adapters into the base model."),
    "push": ("push", "Send an adapter with its model card to the Hugging Face hub."),
    "inspect": ("inspect", "Show what an adapter holds and which tools load it."),
    "doctor": ("doctor", "Show which backends this machine can run and what is missing."),
}
"""Name -> (module with a `command`, line in --help)."""
ALIASES = {"eval": "evaluate", "fuse": "merge"}


class LazyGroup(click.Group):
    """A command group that imports a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in their usual order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command of a name or alias; return None for an unknown name."""
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"phi3_lora_cli.{COMMANDS[name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command in the arguments; suggest the nearest name for an unknown one."""
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            ctx.fail(f"no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _print_versions(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"phi3-lora {version('phi3-lora')}"]
    for name in ("mlx", "mlx-lm", "torch", "transformers", "peft"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    click.echo("\n".join(lines))
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the versions of phi3-lora and its backends.",
)
def group() -> None:
    """LoRA fine-tuning of the Phi-3 family on MLX and PyTorch, with the same numbers.

    \b
    Example, with the built-in model and data:
      phi3-lora train --model demo --data demo --preset demo --output runs/demo
      phi3-lora evaluate --model demo --adapter runs/demo/adapter --data demo --generate
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the program and exit with its code."""
    argv = sys.argv[1:] if arguments is None else arguments
    sys.exit(run_reporting_faults(group, argv))


if __name__ == "__main__":
    main()
