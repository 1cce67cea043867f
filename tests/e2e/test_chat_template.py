"""A custom chat template in training, in the adapter folder and in generate."""

from __future__ import annotations

from pathlib import Path

from phi3_lora.inference.base_model import find_base_model
from phi3_lora.inference.loading import with_adapter
from tests.e2e.program import phi3_lora_here
from tests.tiny import chat, write_rows

OWN = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def train(folder: Path, output: str, *more: str) -> int:
    data = write_rows(folder / "rows.jsonl", [chat("a", "b")] * 4)
    return phi3_lora_here(
        *("train", "--model", "demo", "--data", str(data), "--output", str(folder / output)),
        *("--backend", "mlx", "--device", "cpu", "--max-steps", "1", *more),
    ).returncode


def test_the_adapter_brings_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    setting = f"data.chat_template={tmp_path / 'own.jinja'}"
    assert train(tmp_path, "own", "--set", setting) == 0
    adapter = tmp_path / "own" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == OWN
    base, _ = with_adapter(find_base_model("demo"), str(adapter))
    prompt = base.tokenizer.encode_prompt([{"role": "user", "content": "a"}])
    assert base.tokenizer.decode(prompt, skip_special_tokens=False) == "Q: a<|endoftext|>A: "
    assert base.tokenizer.end_of_turn_id in base.stop_ids
    # Training from the adapter keeps the template unless the settings name another one.
    assert train(tmp_path, "more", "--adapter", str(adapter)) == 0
    assert (tmp_path / "more" / "adapter" / "chat_template.jinja").read_text() == OWN
    (tmp_path / "other.jinja").write_text(OWN.replace("Q: ", "Ask: "))
    other = f"data.chat_template={tmp_path / 'other.jinja'}"
    assert train(tmp_path, "other", "--adapter", str(adapter), "--set", other) == 0
    assert "Ask: " in (tmp_path / "other" / "adapter" / "chat_template.jinja").read_text()


def test_an_adapter_trained_with_the_models_template_holds_no_template(tmp_path: Path) -> None:
    assert train(tmp_path, "plain") == 0
    assert not (tmp_path / "plain" / "adapter" / "chat_template.jinja").exists()


def test_a_template_that_cannot_be_used_ends_with_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text(OWN.replace("m.content", "m.content | upper"))
    setting = f"data.chat_template={tmp_path / 'bad.jinja'}"
    assert train(tmp_path, "bad", "--set", setting) == 2
