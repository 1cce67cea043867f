from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.export.ollama import (
    fill_gguf_folder,
    modelfile,
    modelfile_for,
    write_adapter_modelfile,
)
from phi3_lora.models.config_json import read_model_config
from phi3_lora.storage.safetensors import NewTensor
from tests.tiny import MARKERS, TEMPLATE, random_weights, write_model, write_tokenizer
from tests.unit.data.chat.test_family_templates import PHI4_MARKERS, TEMPLATES

Messages = list[dict[str, str]]
TOLD = [name for name in TEMPLATES if name != "Phi-4-reasoning"]
SYSTEM = {"role": "system", "content": "Be kind."}
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CONVERSATIONS = {
    "a question": [QUESTION],
    "turns": [QUESTION, ANSWER, QUESTION],
    "a system message": [SYSTEM, QUESTION, ANSWER, QUESTION],
}
EATEN = {
    "system": "{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}",
    "user": "{{ if .Prompt }}<|user|>{{ .Prompt }}<|end|>{{ end }}",
    "answer": "<|assistant|>{{ .Response }}<|end|>",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def published(folder: Path, name: str, *, eats_space: bool = True) -> ChatTokenizer:
    is_phi4 = name.startswith("Phi-4") and "mini" not in name
    markers = PHI4_MARKERS if is_phi4 else MARKERS
    write_tokenizer(folder, markers, TEMPLATES[name].template, eats_space=eats_space)
    return ChatTokenizer(folder, vocab_size=264)


def text(folder: Path, **lines: Any) -> str:
    return modelfile_for(folder, read_model_config(folder), "./model.gguf", **lines)


def template(content: str) -> str:
    found = re.search(r'TEMPLATE """(.*)"""\n', content, re.DOTALL)
    assert found
    return found[1]


def filled(go: str, values: dict[str, str]) -> str:
    """Evaluate {{ if .X }} ... {{ end }} and {{ .X }} like Go's text/template."""

    def chosen(match: re.Match[str]) -> str:
        return match[2] if values.get(match[1]) else ""

    go = re.sub(r"\{\{ if \.(\w+) \}\}(.*?)\{\{ end \}\}", chosen, go, flags=re.DOTALL)
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda m: values.get(m[1], ""), go)


def as_ollama(go: str, messages: Messages) -> str:
    """Build a prompt turn by turn like Ollama's template.Execute."""
    done, turn = "", dict[str, str]()
    for message in messages:
        role, content = message["role"], message["content"]
        if (role == "system" and {"Prompt", "Response"} & turn.keys()) or (
            role == "user" and "Response" in turn
        ):
            done, turn = done + filled(go, turn), {}
        turn[{"system": "System", "user": "Prompt", "assistant": "Response"}[role]] = content
    # The last turn ends before its answer.
    return done + filled(go.partition("{{ .Response }}")[0], turn)


@pytest.mark.parametrize("eats_space", [True, False], ids=["eats space", "keeps space"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TOLD)
def test_the_template_gives_the_tokens_of_the_chat_template(
    model: Path, name: str, conversation: str, eats_space: bool
) -> None:
    chat = published(model, name, eats_space=eats_space)
    messages = CONVERSATIONS[conversation]
    prompt = as_ollama(template(text(model)), messages)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(prompt).ids
    # llama.cpp adds the bos token itself if the chat template has it.
    bos = [256] if "{{ bos_token }}" in TEMPLATES[name].template else []
    assert bos + ids == chat.encode_prompt(messages)


def test_white_space_that_markers_eat_is_left_out_of_the_template(model: Path) -> None:
    published(model, "Phi-3.5-mini")
    assert template(text(model)) == "".join(EATEN.values())
    published(model, "Phi-3.5-mini", eats_space=False)
    assert "<|user|>\n{{ .Prompt }}<|end|>\n" in template(text(model))


def test_a_template_without_system_messages_has_no_system(model: Path) -> None:
    published(model, "Phi-3-mini-4k, first release")
    assert ".System" not in template(text(model))


@pytest.mark.parametrize(
    "source",
    [
        TEMPLATES["Phi-4-reasoning"].template,
        TEMPLATE.replace("{{'<|user|>", "{{ loop.index ~ '<|user|>"),
        TEMPLATE.replace("<|user|>", "{{<|user|>"),
        "{{ raise_exception('no') if messages|length > 2 }}" + TEMPLATE,
        TEMPLATE.replace("message['role'] == 'user'", "message['role'] == 'user' and loop.first"),
    ],
    ids=["own system message", "numbered turns", "braces", "one question only", "first turn only"],
)
def test_a_template_that_ollama_cannot_follow_is_left_out(model: Path, source: str) -> None:
    change_template(model, source)
    content = text(model)
    assert "TEMPLATE" not in content
    assert content.startswith("FROM ./model.gguf\n")


@pytest.mark.parametrize("name", ["Phi-3.5-mini", "Phi-4-reasoning"])
def test_a_gguf_folder_holds_the_model_and_its_modelfile(
    model: Path, tmp_path: Path, name: str
) -> None:
    published(model, name)
    config = read_model_config(model)
    tensors = {
        path: NewTensor("F32", weight.shape, lambda weight=weight: weight)
        for path, weight in random_weights(config, 0).items()
    }
    notes = fill_gguf_folder(tmp_path, model, config, tensors, out_type="f16")
    assert (tmp_path / "Modelfile").read_text() == text(model)
    assert len(GGUFReader(tmp_path / "model.gguf").tensors) == len(tensors)
    assert any("has no TEMPLATE" in note for note in notes) is (name not in TOLD)


def change_template(folder: Path, source: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))


def test_the_file_names_model_adapter_and_the_tokens_that_end_an_answer(model: Path) -> None:
    assert text(model, adapter_line="./adapter.gguf").splitlines()[:5] == [
        "FROM ./model.gguf",
        "ADAPTER ./adapter.gguf",
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 512",
    ]
    assert "ADAPTER" not in text(model)


@pytest.mark.parametrize(("boundary", "context"), [(256, 256), (300, 256), (100, 100)])
def test_the_context_keeps_longropes_short_factors(
    tmp_path: Path, boundary: int, context: int
) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = write_model(
        tmp_path / "long",
        max_position_embeddings=1024,
        original_max_position_embeddings=boundary,
        rope_scaling={"type": "longrope", **factors},
    )
    assert f"PARAMETER num_ctx {context}\n" in text(folder)


def test_a_model_of_ollamas_own_with_an_adapter_needs_no_template() -> None:
    content = modelfile("phi3.5", adapter_line="a.gguf", stops=["<|end|>"], turns=None, num_ctx=8)
    assert content == 'FROM phi3.5\nADAPTER a.gguf\nPARAMETER stop "<|end|>"\nPARAMETER num_ctx 8\n'


def test_the_modelfile_of_an_adapter_takes_the_base_beside_it(model: Path, tmp_path: Path) -> None:
    note = write_adapter_modelfile(tmp_path, model, read_model_config(model))
    written = (tmp_path / "Modelfile").read_text()
    assert written.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    assert f"{tmp_path}/Modelfile takes the base model from base.gguf" in note
