"""Ollama's Modelfile, with a template derived from the tokenizer's chat template.

Source: Ollama, docs/modelfile.md and docs/template.md; template/template.go (Execute), which
fills System, Prompt and Response turn by turn, and cuts the last turn at Response.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Message
from phi3_lora.errors import DataError
from phi3_lora.export.gguf_model import context_for, write_gguf
from phi3_lora.export.gguf_tokenizer import read_vocabulary
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import replace_file, write_bytes
from phi3_lora.storage.safetensors import NewTensor

_MODEL = "model.gguf"
_MODELFILE = "Modelfile"
_SYSTEM, _USER, _ANSWER = "Q", "W", "Z"
"""Contents to render; the text between them comes from the template."""


class Turns(NamedTuple):
    """The texts of a chat template before and after each content."""

    system_open: str | None
    """None if the template ignores system messages."""
    system_close: str
    user_open: str
    user_close: str
    answer_open: str
    answer_close: str

    def render(self, messages: Sequence[Message]) -> str:
        """Build a conversation with Ollama's rules, up to the next answer."""
        text, answered = "", True
        for role, content in ((m["role"], m["content"]) for m in messages):
            if role == "system" and self.system_open is not None:
                text += self.system_open + content + self.system_close
            elif role == "user":
                text += self.user_open + content + self.user_close
            elif role == "assistant":
                text += self.answer_open + content + self.answer_close
            answered = role == "assistant"
        return text if answered else text + self.answer_open


def modelfile(
    from_line: str,
    *,
    adapter_line: str | None = None,
    stops: Sequence[str],
    turns: Turns | None,
    num_ctx: int,
) -> str:
    """Build the text of a Modelfile.

    Args:
        from_line: value of FROM: a file, relative to the Modelfile, or an Ollama model.
        adapter_line: value of ADAPTER; None means no adapter.
        stops: texts of the tokens that end an answer.
        turns: texts of the chat template; None lets Ollama use the GGUF file's template.
        num_ctx: number of context tokens.
    """
    lines = [f"FROM {from_line}"]
    if adapter_line is not None:
        lines.append(f"ADAPTER {adapter_line}")
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    lines.append(f"PARAMETER num_ctx {num_ctx}")
    if turns is not None:
        lines.append(f'TEMPLATE """{_go_template(turns)}"""')
    return "\n".join(lines) + "\n"


def fill_gguf_folder(
    folder: Path,
    model_dir: Path,
    config: ModelConfig,
    tensors: Mapping[str, NewTensor],
    *,
    out_type: str,
) -> list[str]:
    """Write model.gguf and its Modelfile for Ollama.

    Args:
        folder: the folder to fill.
        model_dir: model folder with the tokenizer and chat template.
        config: configuration of the model.
        tensors: tensors for write_gguf.
        out_type: a name in gguf_tensors.OUT_TYPES.

    Returns:
        Differences between llama.cpp or Ollama and this model, one sentence each.

    Raises:
        ModelError: when llama.cpp cannot hold the model, as in write_gguf.
        StorageError: when a file cannot be written.
    """
    notes = write_gguf(folder / _MODEL, model_dir, config, tensors, out_type=out_type)
    content = modelfile_for(model_dir, config, f"./{_MODEL}")
    write_bytes(folder / _MODELFILE, content.encode())
    if "\nTEMPLATE " not in content:
        notes.append(
            "the Modelfile has no TEMPLATE: Ollama's syntax cannot express this chat template: "
            "write one, or serve with llama.cpp's --jinja"
        )
    return notes


def modelfile_for(
    model_dir: Path, config: ModelConfig, from_line: str, *, adapter_line: str | None = None
) -> str:
    """Build the Modelfile of a model folder's GGUF file, or of a base model with an adapter.

    Args:
        model_dir: model folder with the tokenizer and chat template.
        config: configuration of the model.
        from_line: value of FROM.
        adapter_line: value of ADAPTER; None means no adapter.

    Raises:
        ModelError: when the tokenizer cannot be read, or llama.cpp does not support it.
    """
    vocabulary = read_vocabulary(model_dir, config)
    chat = ChatTokenizer(model_dir, vocab_size=config.vocab_size)
    bos = vocabulary.tokens[vocabulary.special_ids["bos"]] if vocabulary.adds_bos else ""
    return modelfile(
        from_line,
        adapter_line=adapter_line,
        stops=_stop_texts(chat, config),
        turns=template_turns(chat, eating=vocabulary.eating, bos=bos),
        num_ctx=context_for(config),
    )


def write_adapter_modelfile(folder: Path, model_dir: Path, config: ModelConfig) -> str:
    """Write the Modelfile of an adapter in adapter.gguf, over a base model in base.gguf.

    Args:
        folder: the folder with adapter.gguf.
        model_dir: the base model's folder, for its tokenizer and chat template.
        config: configuration of the base model.

    Returns:
        A note on where the base model must be put.

    Raises:
        ModelError: when the tokenizer cannot be read, or llama.cpp does not support it.
        StorageError: when the file cannot be written.
    """
    text = modelfile_for(model_dir, config, "./base.gguf", adapter_line="./adapter.gguf")
    replace_file(folder / _MODELFILE, text.encode())
    return (
        f"{folder}/{_MODELFILE} takes the base model from base.gguf beside it: put it there, or "
        "name an Ollama model of the same base after FROM"
    )


def _stop_texts(chat: ChatTokenizer, config: ModelConfig) -> list[str]:
    """Return the texts of the tokens that end an answer, the end of turn first."""
    ids = config.answer_stop_ids(chat.end_of_turn_id)
    texts = [chat.decode([i], skip_special_tokens=False) for i in ids]
    return [text for text in texts if text and '"' not in text and "\n" not in text]


def template_turns(
    chat: ChatTokenizer, *, eating: Collection[str] = (), bos: str = ""
) -> Turns | None:
    """Derive the turns from a tokenizer's chat template.

    Args:
        chat: the tokenizer.
        eating: markers after which the tokenizer strips white space; the turns leave this space
            out, because some readers of the file keep it.
        bos: text of the token that the reader adds before the text; empty if there is none.

    Returns:
        The turns, or None if Ollama's three variables cannot express the template, for example
        if it adds a default system message.
    """
    try:
        turns = _turns(chat, bos)
        if turns is None or not _is_faithful(chat, turns, bos):
            return None
    except DataError:
        return None
    system_open = turns.system_open and _without_eaten(turns.system_open, eating)
    kept = Turns(system_open, *(_without_eaten(text, eating) for text in turns[1:]))
    literal = "".join(text for text in kept if text)
    return None if "{{" in literal or '"""' in literal else kept


def _between(chat: ChatTokenizer, roles: str) -> list[str]:
    """Return the template's text around contents; roles is a string of s, u and a."""
    content = {"s": ("system", _SYSTEM), "u": ("user", _USER), "a": ("assistant", _ANSWER)}
    messages = [Message(role=content[r][0], content=content[r][1]) for r in roles]
    text, spans = chat.template.content_spans(messages, add_generation_prompt=roles[-1] == "u")
    edges = [0, *(at for span in spans for at in span), len(text)]
    return [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _turns(chat: ChatTokenizer, bos: str) -> Turns | None:
    first, answer, again, _ = _between(chat, "uau")
    user_open = first.removeprefix(bos)
    between_users = _between(chat, "uu")[1]
    if not (again.endswith(user_open) and between_users.endswith(user_open)):
        return None
    user_close = between_users.removesuffix(user_open)
    if not answer.startswith(user_close):
        return None
    before, after, _ = _between(chat, "su")
    has_system = bool(before) or after != first
    return Turns(
        system_open=before.removeprefix(bos) if has_system else None,
        system_close=after.removesuffix(user_open) if has_system else "",
        user_open=user_open,
        user_close=user_close,
        answer_open=answer.removeprefix(user_close),
        answer_close=again.removesuffix(user_open),
    )


def _is_faithful(chat: ChatTokenizer, turns: Turns, bos: str) -> bool:
    """Return whether Ollama's rules give the same text as the template."""
    user, answer = Message(role="user", content="a b"), Message(role="assistant", content="c")
    system = Message(role="system", content="d")
    long = [user, answer, user, answer, user]
    probes = [[user], long, [system, user], [system, *long]]
    return all(
        chat.template.render(probe, add_generation_prompt=True) == bos + turns.render(probe)
        for probe in probes
    )


def _without_eaten(text: str, eating: Collection[str]) -> str:
    for marker in eating:
        text = re.sub(rf"({re.escape(marker)})\s+", r"\1", text)
    return text


def _go_template(turns: Turns) -> str:
    parts = ["{{ if .Prompt }}", turns.user_open, "{{ .Prompt }}", turns.user_close, "{{ end }}"]
    if turns.system_open is not None:
        system = (turns.system_open, "{{ .System }}", turns.system_close)
        parts = ["{{ if .System }}", *system, "{{ end }}", *parts]
    return "".join([*parts, turns.answer_open, "{{ .Response }}", turns.answer_close])
