"""Ollama's Modelfile, with a template taken from the tokenizer's own.

Source: Ollama, docs/modelfile.md and docs/template.md; template/template.go (Execute) for how
System, Prompt and Response are filled, turn by turn, and cut at Response for the last.
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
from phi3_lora.storage.atomic import write_bytes
from phi3_lora.storage.safetensors import NewTensor

_MODEL = "model.gguf"
_SYSTEM, _USER, _ANSWER = "Q", "W", "Z"
"""Contents to render; the text between them is the template's own."""


class Turns(NamedTuple):
    """The text that a chat template puts around contents."""

    system_open: str | None
    """None: the template leaves system messages out."""
    system_close: str
    user_open: str
    user_close: str
    answer_open: str
    answer_close: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as Ollama builds it from these, up to the next answer."""
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
    """The text of a Modelfile.

    Args:
        from_line: what FROM names: a file, relative to the Modelfile, or a model of Ollama's.
        adapter_line: what ADAPTER names; None is no adapter.
        stops: texts of the tokens that end an answer.
        turns: of the chat template; None lets Ollama take a template from the GGUF file.
        num_ctx: tokens of context.
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
    """Write model.gguf and the Modelfile that makes it a model of Ollama's.

    Args:
        folder: to fill.
        model_dir: whose tokenizer and chat template are told.
        config: of the model.
        tensors: as write_gguf takes them.
        out_type: one of gguf_model's OUT_TYPES.

    Returns:
        What llama.cpp and Ollama do otherwise than this model, one sentence each.

    Raises:
        ModelError, StorageError: as write_gguf.
    """
    notes = write_gguf(folder / _MODEL, model_dir, config, tensors, out_type=out_type)
    content = modelfile_for(model_dir, config, f"./{_MODEL}")
    write_bytes(folder / "Modelfile", content.encode())
    if "\nTEMPLATE " not in content:
        notes.append(
            "the Modelfile has no TEMPLATE, for Ollama's cannot say what this chat template does: "
            "write one, or serve with llama.cpp's --jinja"
        )
    return notes


def modelfile_for(
    model_dir: Path, config: ModelConfig, from_line: str, *, adapter_line: str | None = None
) -> str:
    """The Modelfile of a model folder's GGUF file, or of its base with an adapter.

    Args:
        model_dir: whose tokenizer and chat template are told.
        config: of the model.
        from_line: what FROM names.
        adapter_line: what ADAPTER names; None is no adapter.

    Raises:
        ModelError: when the tokenizer cannot be read, or llama.cpp has none like it.
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


def _stop_texts(chat: ChatTokenizer, config: ModelConfig) -> list[str]:
    """The texts of the tokens that end an answer, the end of turn first."""
    ids = config.answer_stop_ids(chat.end_of_turn_id)
    texts = [chat.decode([i], skip_special_tokens=False) for i in ids]
    return [text for text in texts if text and '"' not in text and "\n" not in text]


def template_turns(
    chat: ChatTokenizer, *, eating: Collection[str] = (), bos: str = ""
) -> Turns | None:
    """The turns of a tokenizer's chat template.

    Args:
        chat: the tokenizer.
        eating: markers that eat the white space after them, which is left out here: some readers
            of the file keep it.
        bos: the token that the reader puts before the text by itself, if it does.

    Returns:
        None where Ollama's three variables cannot say what the template says, for example where
        it writes a system message of its own.
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
    """The template's own text before, between and after contents; of s, u, a as messages."""
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
    """Whether Ollama's way to put turns together gives the template's own text."""
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
