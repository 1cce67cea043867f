"""Settings of train from a configuration and from keywords."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_lora import check_data, dry_run, resolve_settings, train
from phi3_lora.api.options import OptionError
from phi3_lora.config.schema import RunConfig
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import ConfigError, Phi3LoraError
from phi3_lora.training.rundir import write_config
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group
from tests.tiny import chat, write_model, write_rows

NEEDED: dict[str, Any] = {"model": "m", "data": "chats.jsonl", "output_dir": "runs/a"}


def config_of(*arguments: Any, **settings: Any) -> RunConfig:
    return resolve_settings(*arguments, **settings).config


def test_keywords_are_the_options_of_the_command() -> None:
    config = config_of(
        **NEEDED,
        lr=0.1,
        rank=4,
        packing=True,
        epochs=2,
        targets="q_proj, o_proj",
        set=["data.loss_on=last"],
    )
    assert (config.model, config.data.train, config.output_dir) == ("m", "chats.jsonl", "runs/a")
    assert (config.training_config.learning_rate, config.peft_config.r) == (0.1, 4)
    assert config.training_config.packing and config.training_config.num_train_epochs == 2
    assert config.peft_config.target_modules == ("q_proj", "o_proj")
    assert config.data.loss_on == "last"
    assert config == config_of(
        **NEEDED,
        lr=0.1,
        rank=4,
        packing=True,
        epochs=2,
        targets=["q_proj", "o_proj"],
        set=("data.loss_on=last",),
    )


def test_a_regular_expression_stays_unchanged() -> None:
    assert config_of(**NEEDED, targets=r".*\.(a|b)").peft_config.target_modules == r".*\.(a|b)"


def test_keywords_override_every_form_of_configuration(tmp_path: Path) -> None:
    mapping = {**NEEDED, "peft_config": {"r": 4, "lora_alpha": 8}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(mapping))
    whole = config_of(mapping)
    assert (whole.peft_config.r, whole.peft_config.lora_alpha) == (4, 8)
    for config in (mapping, path, str(path), whole):
        assert config_of(config) == whole
        found = config_of(config, rank=2, data="other.jsonl")
        assert (found.peft_config.r, found.peft_config.lora_alpha) == (2, 8)
        assert found.data.train == "other.jsonl"


def test_a_mapping_overrides_the_preset_like_a_file(tmp_path: Path) -> None:
    mapping = {**NEEDED, "training_config": {"learning_rate": 0.5}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(mapping))
    config = config_of(mapping, preset="sample-finetune")
    assert config.training_config.learning_rate == 0.5
    assert config.training_config.packing
    assert config == config_of(path, preset="sample-finetune")


def test_resume_starts_from_the_stored_configuration(tmp_path: Path) -> None:
    stored = config_of({**NEEDED, "output_dir": str(tmp_path)}, rank=3, lr=0.2)
    write_config(tmp_path, stored)
    assert config_of(resume=True, output_dir=tmp_path) == stored
    changed = config_of(resume=True, output_dir=tmp_path, batch_size=1)
    assert changed.peft_config.r == 3
    assert changed.training_config.per_device_train_batch_size == 1


def test_unknown_keywords_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match=r"no setting 'max_step'; did you mean max_steps\?"):
        resolve_settings(**NEEDED, max_step=3)
    with pytest.raises(OptionError, match="no setting 'xyzzy'; known: model, "):
        resolve_settings(**NEEDED, xyzzy=3)


def test_a_preset_does_not_change_a_whole_configuration() -> None:
    with pytest.raises(OptionError, match="preset has no effect on a RunConfig"):
        resolve_settings(config_of(**NEEDED), preset="demo")


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(Phi3LoraError, match=r"data must be a path, .*; got int"):
        check_data(3)  # type: ignore[arg-type]


def test_a_source_keeps_its_own_settings() -> None:
    source = Source(path="chats.jsonl", columns={"text": "body"}, weight=2)
    config = config_of(**{**NEEDED, "data": source})
    assert config.data.sources == (source,) and not config.data.train


def test_a_dry_run_equals_that_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    data = write_rows(tmp_path / "d.jsonl", [chat("q", "a"), chat("r", "b")])
    output = tmp_path / "run"
    plan = dry_run(model=str(model), data=data, output_dir=output, max_steps=3, rank=2)
    options = {"--model": model, "--data": data, "--output": output, "--max-steps": 3, "--rank": 2}
    arguments = [str(part) for option in options.items() for part in option]
    assert run_reporting_faults(group, ["train", *arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan.to_dict()
    assert plan.to_dict()["total_steps"] == 3
    assert not output.exists()


def test_notes_of_the_settings_reach_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError):
        resolve_settings({"data": "d"})
    config = {**NEEDED, "model": str(tmp_path), "training_config": {"do_train": True}}
    with pytest.raises(ValueError):
        train(config)
    assert "training_config.do_train has no effect" in caplog.text
