from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.load import load_settings, read_yaml
from phi3_lora.config.schema import DtypeOption
from phi3_lora.config.training import OPTIMIZERS, Optimizer, TrainingConfig
from phi3_lora.errors import ConfigError
from phi3_lora.models.config import DTYPES, QUANTIZATIONS, Quantization

NEEDED = {"model": "m", "output_dir": "o", "data.train": "d"}

# The model card's sample_finetune.py, as it stands there.
SAMPLE_TRAINING = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
SAMPLE_PEFT = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


def load(base: dict[str, Any] | None = None, *assignments: str, **others: Any) -> Any:
    return load_settings(base=base, assignments=assignments, flags=NEEDED, **others)


def refused(base: dict[str, Any] | None = None, *assignments: str) -> str:
    with pytest.raises(ConfigError) as problem:
        load(base, *assignments)
    return str(problem.value)


def write_yaml(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_precedence(tmp_path: Path) -> None:
    def rate(*, file: bool, assignment: bool, flag: bool) -> float:
        written = {"training_config": {"learning_rate": 1e-3}}
        return float(
            load_settings(
                preset="demo",
                config_file=write_yaml(tmp_path / "c.yaml", written) if file else None,
                assignments=["training_config.learning_rate=5e-4"] if assignment else [],
                flags={**NEEDED, "training_config.learning_rate": 1e-4 if flag else None},
            ).config.training_config.learning_rate
        )

    assert rate(file=False, assignment=False, flag=False) == 5e-3
    assert rate(file=True, assignment=False, flag=False) == 1e-3
    assert rate(file=True, assignment=True, flag=False) == 5e-4
    assert rate(file=True, assignment=True, flag=True) == 1e-4


def test_a_later_source_keeps_the_other_values_of_a_section() -> None:
    config = load(None, "training_config.seed=3", preset="demo").config
    assert config.training_config.per_device_train_batch_size == 8
    assert config.training_config.seed == 3


def test_number_that_yaml_reads_as_a_string(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "c.yaml", "training_config: {learning_rate: 2e-4, max_steps: 1e2}")
    assert isinstance(yaml.safe_load("2e-4"), str)
    training = load(config_file=path).config.training_config
    assert training.learning_rate == 2e-4
    assert training.max_steps == 100 and isinstance(training.max_steps, int)


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("training_config.learning_rte=1", "did you mean learning_rate?"),
        ("peft_config.lora_alpa=1", "did you mean lora_alpha?"),
        ("modle=x", "did you mean model?"),
        ("peft_confg.r=1", "did you mean peft_config?"),
        ("data.trian=x", "did you mean train?"),
        ("peft_config.zzzz=0.1", "known: r, lora_alpha"),
    ],
)
def test_unknown_key_names_the_nearest(assignment: str, hint: str) -> None:
    message = refused(None, assignment)
    assert f"unknown key {assignment.partition('=')[0].removesuffix('.r')}" in message
    assert hint in message


def test_every_problem_is_listed_at_once() -> None:
    message = refused(None, "training_config.sed=1", "training_config.seed=x", "peft_config.r=0")
    assert "unknown key training_config.sed" in message
    assert "training_config.seed must be an integer, got 'x'" in message
    assert "peft_config.r must be >= 1, got 0" in message


def test_sample_script_pastes_in() -> None:
    settings = load({"training_config": SAMPLE_TRAINING, "peft_config": SAMPLE_PEFT})
    training, lora = settings.config.training_config, settings.config.peft_config
    fields = TrainingConfig.__dataclass_fields__
    used = {k: v for k, v in SAMPLE_TRAINING.items() if k in fields}
    assert {name: getattr(training, name) for name in used} == used
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32.0, 0.05)
    assert lora.target_modules == "all-linear"
    noted = {note.split(" has no effect")[0] for note in settings.notes}
    unused = {f"training_config.{k}" for k in SAMPLE_TRAINING if k not in fields}
    assert noted == unused
    assert settings.config.output_dir == "o"


def test_sample_preset_equals_the_sample_script() -> None:
    preset = load(preset="sample-finetune").config
    pasted = load({"training_config": SAMPLE_TRAINING, "peft_config": SAMPLE_PEFT}).config
    changed = {"packing": True, "max_length": 2048}
    assert preset.peft_config == pasted.peft_config
    expected = {**pasted.to_dict()["training_config"], **changed}
    assert preset.to_dict()["training_config"] == expected


@pytest.mark.parametrize(
    ("assignment", "phrase"),
    [
        ("peft_config.task_type=SEQ_CLS", "task_type: 'SEQ_CLS' is not supported"),
        ("peft_config.lora_bias=true", "lora_bias: True is not supported"),
        ("peft_config.layers_pattern=[h]", "layers_pattern: ['h'] is not supported"),
        ("training_config.neftune_noise_alpha=5", "is not supported"),
        ("training_config.load_best_model_at_end=true", "is not supported"),
    ],
)
def test_unsupported_value_is_an_error(assignment: str, phrase: str) -> None:
    assert phrase in refused(None, assignment)


@pytest.mark.parametrize(
    ("assignment", "phrase"),
    [
        ("peft_config.r=0", "peft_config.r must be >= 1, got 0 (--rank)"),
        ("peft_config.r=2.5", "peft_config.r must be an integer, got 2.5"),
        ("peft_config.lora_alpha=0", "lora_alpha must be > 0"),
        ("peft_config.lora_alpha=.nan", "lora_alpha must be > 0"),
        ("peft_config.lora_dropout=1.0", "lora_dropout must be in [0, 1)"),
        ("peft_config.target_modules=[]", "target_modules is empty"),
        ("peft_config.target_modules=[1]", "must be a string or a list of strings"),
        ("training_config.learning_rate=0", "learning_rate must be > 0"),
        ("training_config.learning_rate=true", "must be a number, got True"),
        ("training_config.learning_rate=.inf", "learning_rate must be > 0"),
        ("training_config.packing=1", "must be true or false, got 1"),
        ("training_config.seed=-1", "seed must be >= 0"),
        ("training_config.warmup_ratio=1.0", "warmup_ratio must be in [0, 1)"),
        ("training_config.optim=lion", "optim must be one of"),
        ("training_config.eval_strategy=never", "eval_strategy must be one of no, steps, epoch"),
        ("training_config.num_train_epochs=0", "nothing to do"),
        ("data.valid_fraction=1", "valid_fraction must be in [0, 1)"),
        ("device=tpu", "device must be auto, cpu or gpu"),
        ("dtype=3", "dtype must be a string, got 3"),
        ("training_config.optim=3", "training_config.optim must be a string, got 3"),
        ("dtype=int8", "dtype must be one of"),
        ("training_config=3", "training_config must be a mapping, got 3"),
    ],
)
def test_bad_value_is_an_error(assignment: str, phrase: str) -> None:
    assert phrase in refused(None, assignment)


def test_bf16_and_fp16_together_are_an_error() -> None:
    assert "cannot both be true" in refused({"training_config": {"bf16": True, "fp16": True}})


@pytest.mark.parametrize(
    ("name", "flag"), [("model", "--model"), ("output_dir", "--output"), ("data.train", "--data")]
)
def test_missing_setting_names_its_flag(name: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        load_settings(flags={k: v for k, v in NEEDED.items() if k != name})


def test_other_names_of_fields() -> None:
    training = {"max_seq_length": 99, "epochs": 2, "evaluation_strategy": "no"}
    config = load({"training_config": training, "peft_config": {"rank": 3, "alpha": 6}}).config
    assert config.training_config.max_length == 99
    assert config.training_config.num_train_epochs == 2
    assert config.training_config.eval_strategy == "no"
    assert config.peft_config == LoraConfig(r=3, lora_alpha=6)


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy"])
def test_no_without_quotes_is_the_strategy(name: str) -> None:
    found = load(None, f"training_config.{name}=no").config.training_config
    assert getattr(found, name) == "no"


def test_eval_steps_survive_a_stored_configuration() -> None:
    first = load(None, "training_config.eval_strategy=epoch", "training_config.eval_steps=5").config
    assert first.training_config.eval_strategy == "steps"
    assert TrainingConfig(eval_steps=5).eval_strategy == "steps"
    assert TrainingConfig(eval_steps=5, eval_strategy="no").eval_strategy == "no"


def test_eval_steps_mean_the_steps_strategy() -> None:
    assert (
        load(None, "training_config.eval_steps=5").config.training_config.eval_strategy == "steps"
    )


def test_data_may_be_a_string() -> None:
    config = load_settings(base={"model": "m", "output_dir": "o", "data": "chats.jsonl"}).config
    assert config.data.train == "chats.jsonl"


def test_stored_configuration_reads_back() -> None:
    config = load(None, "peft_config.target_modules=[qkv_proj]", preset="sample-finetune").config
    again = load_settings(base=yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again.config == config and again.notes == []


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: b: c"])
def test_file_without_a_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(write_yaml(tmp_path / "c.yaml", text))


def test_missing_file_and_preset_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="there are: demo, sample-finetune"):
        load_settings(preset="x")


def test_assignment_without_a_value_is_an_error() -> None:
    assert "--set takes section.key=value" in refused(None, "training_config.seed")


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.2, 0, 3), (0.0, 0, 0), (0.2, 7, 7)])
def test_warm_up_steps(ratio: float, steps: int, expected: int) -> None:
    config = TrainingConfig(warmup_ratio=ratio, warmup_steps=steps)
    assert config.num_warmup_steps(11) == expected


def test_scaling() -> None:
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_literals_hold_what_the_models_and_the_optimizers_know() -> None:
    assert get_args(DtypeOption) == ("auto", *DTYPES)
    assert get_args(Quantization) == QUANTIZATIONS
    assert get_args(Optimizer) == tuple(OPTIMIZERS)
