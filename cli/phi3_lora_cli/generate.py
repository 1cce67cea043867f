"""phi3-lora generate."""

from __future__ import annotations

import sys

import click

from phi3_lora_cli.options import backend_options, model_options, note, output_options, print_json


@click.command()
@model_options
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message; - for stdin.")
@click.option("--system", metavar="TEXT", help="A system message before it.")
@backend_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.0,
    help="0 (default) is greedy.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@output_options
def command(
    model: str,
    revision: str | None,
    adapter: str | None,
    prompt: str,
    system: str | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Answer one prompt; the text is streamed to stdout.

    \b
    Example:
      phi3-lora generate --model demo --prompt "Hello"
    """
    from phi3_lora.data.rows.conversation import Message
    from phi3_lora.engine.request import Sampling
    from phi3_lora.inference.base_model import find_base_model
    from phi3_lora.inference.loading import open_engine, with_adapter

    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise click.UsageError("--prompt is not UTF-8 text")
    base = find_base_model(model, revision, quantize=quantize)
    base, weights = with_adapter(base, adapter)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    ids = base.tokenizer.encode_prompt(messages)
    opened = open_engine(
        base, backend=backend, device=device, dtype=dtype, adapter=weights, note=note
    )
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=base.stop_ids
    )
    new_ids: list[int] = []
    shown = ""
    for _, token in opened.engine.generate([ids], sampling):
        new_ids.append(token)
        text = base.tokenizer.decode([i for i in new_ids if i not in sampling.stop_ids])
        # A character may span tokens; half of one decodes to the replacement character.
        if not as_json and not text.endswith("\ufffd"):
            click.echo(text[len(shown) :], nl=False)
            shown = text
    opened.engine.close()
    text = base.tokenizer.decode([i for i in new_ids if i not in sampling.stop_ids])
    stopped = bool(new_ids) and new_ids[-1] in sampling.stop_ids
    if as_json:
        reason = "stop" if stopped else "length"
        print_json({"text": text, "token_ids": new_ids, "finish_reason": reason})
    else:
        click.echo(text[len(shown) :])
