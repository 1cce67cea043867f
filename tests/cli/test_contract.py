from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.models.config_json import read_model_config
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import COMMANDS, group
from tests.tiny import chat, random_adapter, write_model, write_rows

OUTPUT = ["--json", "--debug"]
BACKEND = ["--backend", "--device", "--dtype", "--quantize"]
MODEL = ["--model", "--revision", "--adapter"]
OPTIONS = {
    "train": [
        *("--model", "--revision", "--data", "--valid", "--valid-fraction", "--on-bad-row"),
        "--output",
        *("--adapter", "--config", "-c", "--preset", "--set", "--resume", "--dry-run"),
        *BACKEND,
        *("--max-steps", "--epochs", "--batch-size", "--grad-accum", "--lr", "--rank", "--alpha"),
        *("--dropout", "--targets", "--max-length", "--packing", "--no-packing", "--seed"),
        *("--verbose", "-v", "--quiet", "-q"),
        *OUTPUT,
    ],
    "data": [],
    "evaluate": [
        *(*MODEL, "--data", "--on-bad-row", "--loss-on", *BACKEND, "--generate", "--limit"),
        *("--samples", "--max-new-tokens", "--max-length", *OUTPUT),
    ],
    "generate": [
        *(*MODEL, "--prompt", "--system", *BACKEND),
        *("--max-new-tokens", "--temperature", "--seed", *OUTPUT),
    ],
    "quantize": ["--model", "--revision", "--output", "--bits", *OUTPUT],
    "convert": [
        *("--to", "--for", "--model", "--verify", "--rank", "--alpha", "--prefix", "--enable"),
        *("--parts", *OUTPUT),
    ],
    "verify": ["--model", "--revision", *BACKEND, *OUTPUT],
    "parity": [
        *("--model", "--revision", "--adapter", "--data", "--steps", "--device", "--quantize"),
        *OUTPUT,
    ],
    "merge": [
        *("--model", "--revision", "--adapter", "--weight", "--output", "--to", "--dtype"),
        *("--outtype", "--dequantize", *OUTPUT),
    ],
    "push": ["--private", "--revision", "--message", *OUTPUT],
    "inspect": [
        *("--plot", "--model", "--alpha", "--prefix", "--enable", "--parts", *OUTPUT),
    ],
    "doctor": OUTPUT,
}
DATA_OPTIONS = {
    "check": [
        *("-c", "--config", "--set", "--valid", "--model", "--revision", "--near-duplicates"),
        *("--no-near-duplicates", "--min-chars", "--max-chars", "--pattern", "--language"),
        *OUTPUT,
    ],
    "preview": ["-c", "--config", "--set", "--model", "--revision", "--limit", "--html", *OUTPUT],
    "split": [
        *("-c", "--config", "--set", "--output", "--valid-fraction", "--group-by"),
        *("--stratify-by", "--near-duplicates", "--no-near-duplicates", "--seed", *OUTPUT),
    ],
    "clean": [
        *("-c", "--config", "--set", "--output", "--unicode", "--white-space", "--empty"),
        *("--duplicates", "--near-duplicates", "--min-chars", "--max-chars", "--min-tokens"),
        *("--max-tokens", "--pattern", "--language", "--model", "--revision", *OUTPUT),
    ],
}
MERGE = ["merge", "--model", "demo", "--adapter", "a", "--output", "b"]
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    code = run_reporting_faults(group, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.out, captured.err


def run_json(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def write_adapter(folder: Path, model: Path) -> Adapter:
    config = read_model_config(model)
    weights = random_adapter(config.linear_shapes(), r=2, seed=1)
    adapter = Adapter(weights=weights, r=2, lora_alpha=4.0, num_layers=2)
    write_adapter_folder(folder, adapter, to="mlx")
    return adapter


def check_options(capsys: Capture, command: click.Command | None, *name: str) -> None:
    promised = DATA_OPTIONS[name[1]] if len(name) > 1 else OPTIONS[name[0]]
    assert command is not None
    found = [
        option
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    ]
    assert sorted(found) == sorted(promised)
    code, out, _ = run(capsys, *name, "--help")
    assert code == 0
    assert all(option in out for option in promised) and "Example" in out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_commands_have_the_promised_options(capsys: Capture, name: str) -> None:
    check_options(capsys, group.get_command(click.Context(group), name), name)


def test_the_data_commands_have_the_promised_options(capsys: Capture) -> None:
    data = group.get_command(click.Context(group), "data")
    assert isinstance(data, click.Group) and list(data.commands) == list(DATA_OPTIONS)
    for name, command in data.commands.items():
        check_options(capsys, command, "data", name)


def test_help_lists_every_command(capsys: Capture) -> None:
    assert list(COMMANDS) == list(OPTIONS)
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS)


def test_version_names_the_package(capsys: Capture) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("phi3-lora ")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["trian"], "did you mean train?"),
        (["frobnicate"], "no command 'frobnicate'"),
        (["train", "--frobnicate"], "No such option"),
        (["train"], "model is missing"),
        (["train", "--model", "demo", "--output", "x"], "pass --data"),
        (["train", "--model", "demo", "--data", "demo"], "pass --output"),
        (["train", "--resume"], "--resume needs --output"),
        (["train", "--preset", "x"], "no preset 'x'"),
        (["train", "-c", "/nowhere/c.yaml"], "no such config file"),
        (["evaluate", "--model", "/nowhere/m", "--data", "demo"], "no such model folder"),
        (["evaluate", "--model", "demo", "--data", "/nowhere/d"], "no such data file"),
        (["generate", "--model", "/nowhere/m", "--prompt", "x"], "no such model folder"),
        (["generate", "--model", "demo"], "--prompt"),
        (["inspect", "/nowhere/a"], "no such adapter folder"),
        (["inspect", "demo", "--plot", "x.svg"], "a .png or an .html"),
        (["push", "/nowhere/a"], "REPO"),
        (["push", "/nowhere/a", "orders"], "REPO must be owner/name"),
        (["convert", "/nowhere/a", "/nowhere/b", "--to", "peft"], "no such adapter folder"),
        (["convert", "a", "b"], "--to LAYOUT or --for TOOL"),
        (["convert", "a", "b", "--to", "onnx"], "onnx"),
        (["convert", "a", "b", "--to", "mlx", "--for", "vllm"], "leave out --to mlx"),
        (["convert", "a", "b", "--for", "ollama"], "--for ollama needs --model"),
        ([*MERGE, "--to", "adapter", "--dtype", "float16"], "omit them"),
        ([*MERGE, "--to", "adapter", "--outtype", "f16"], "omit them"),
        ([*MERGE, "--weight", "nan"], "--weight must be a number"),
        (["convert", "a", "b", "--to", "both", "--for", "llama.cpp"], "leave out --to both"),
        ([*MERGE, "--to", "gguf", "--dtype", "float16"], "with --to gguf use --outtype"),
        ([*MERGE, "--outtype", "f16"], "with --to hf use --dtype"),
    ],
)
def test_wrong_usage_exits_2(capsys: Capture, arguments: list[str], phrase: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and phrase in err and out == ""


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"--model": "/nowhere/m"}, "no such model folder"),
        ({"--data": "/nowhere/d"}, "no such data file"),
        ({"--rank": "0"}, "--rank"),
        ({"--targets": "w_proj"}, "matches no layer"),
        ({"--adapter": "/nowhere/a"}, "no such adapter folder"),
        ({"--set": "training_config.sed=1"}, "did you mean seed?"),
    ],
)
def test_train_with_a_bad_setting_exits_2_and_writes_nothing(
    capsys: Capture, tmp_path: Path, changes: dict[str, str], phrase: str
) -> None:
    target = tmp_path / "run"
    settings = {"--model": "demo", "--data": "demo", "--output": str(target), **changes}
    code, out, err = run(capsys, "train", *(x for pair in settings.items() for x in pair))
    assert code == 2 and phrase in err and out == ""
    assert not target.exists()


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: Capture) -> None:
    code = run_reporting_faults(group, ["inspect", "/nowhere/a", "--debug"])
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" in err and "error: no such adapter folder" in err


def test_an_internal_error_exits_1(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("phi3_lora.adapters.inspection.inspect_adapter", fail)
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 1 and "internal error: ZeroDivisionError: oops" in err and "--debug" in err


def test_dry_run_prints_one_object_and_writes_nothing(capsys: Capture, tmp_path: Path) -> None:
    target = tmp_path / "run"
    arguments = ["train", "--model", "demo", "--data", "demo", "--output", target, "--dry-run"]
    facts = run_json(capsys, *arguments)
    assert facts["model"] == "demo" and facts["documents_per_step"] == 4
    assert facts["total_steps"] == -(-facts["num_documents"] // 4) == facts["steps_per_epoch"]
    assert not target.exists()
    assert run_json(capsys, *arguments) == facts
    assert run_json(capsys, *arguments, "--seed", "1")["plan_hash"] != facts["plan_hash"]


def test_dry_run_of_a_bad_row_names_it(capsys: Capture, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    data = write_rows(tmp_path / "d.jsonl", [chat("q", "a"), {"text": "x"}])
    target = tmp_path / "run"
    arguments = ("train", "--model", model, "--data", data, "--output", target, "--dry-run")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and f"{data}:2: " in err and out == ""


def test_inspect_prints_one_object(capsys: Capture, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", write_model(tmp_path / "model"))
    facts = run_json(capsys, "inspect", tmp_path / "a")
    assert facts["layout"] == "mlx" and facts["r"] == 2 and facts["effective_scale"] == 2.0
    assert facts["layers"] == [0, 1] and len(facts["delta_norms"]) == 8
    code, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert code == 0 and "alpha / r" in out


def test_inspect_writes_the_heat_map_to_the_given_file(capsys: Capture, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", write_model(tmp_path / "model"))
    page = tmp_path / "map.html"
    facts = run_json(capsys, "inspect", tmp_path / "a", "--plot", page)
    assert facts["plot"] == str(page)
    text = page.read_text()
    assert all(f'title="{m}: {n:.6g}"' in text for m, n in facts["delta_norms"].items())
    code, out, _ = run(capsys, "inspect", tmp_path / "a", "--plot", page)
    assert code == 0 and f"heat map    {page}" in out


@pytest.mark.parametrize("to", ["peft", "both"])
def test_convert_prints_one_object(capsys: Capture, tmp_path: Path, to: str) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "a", model)
    arguments = ("convert", tmp_path / "a", tmp_path / "b", "--to", to, "--model", model)
    facts = run_json(capsys, *arguments)
    assert facts == {
        "from": "mlx",
        "to": to,
        "tensors": 16,
        "lossless": True,
        "max_weight_difference": 0.0,
        "notes": [],
    }
    found = read_adapter(tmp_path / "b").weights
    assert all((found[name] == value).all() for name, value in adapter.weights.items())
    raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_convert_into_a_used_folder_exits_2(capsys: Capture, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", write_model(tmp_path / "model"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "peft")
    assert code == 2 and "is in use" in err
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "phrase"), [("config.yaml", "another run"), ("notes.txt", "other files")]
)
def test_train_into_a_used_folder_exits_2(
    capsys: Capture, tmp_path: Path, name: str, phrase: str
) -> None:
    (tmp_path / name).write_text("{}")
    code, _, err = run(capsys, "train", "--model", "demo", "--data", "demo", "--output", tmp_path)
    assert code == 2 and f"already holds {phrase}" in err
    assert (tmp_path / name).read_text() == "{}"


def test_resume_without_a_run_exits_2(capsys: Capture, tmp_path: Path) -> None:
    code, _, err = run(capsys, "train", "--resume", "--output", tmp_path / "run")
    assert code == 2 and "holds no run to resume" in err
    assert not (tmp_path / "run").exists()
