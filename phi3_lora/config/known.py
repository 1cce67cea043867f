"""Known names of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig.

A dictionary from a script of another tool can be pasted into a configuration. A name that changes
nothing here is noted. A value that would change the result, but is not supported, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "epochs": "num_train_epochs",
    "alpha": "lora_alpha",
    "rank": "r",
}
"""Older or shorter name -> field."""

NO_EFFECT: Mapping[str, Mapping[str, str]] = {
    "training_config": {
        "do_train": "train always trains",
        "do_eval": "eval_strategy and the validation data decide",
        "overwrite_output_dir": "a folder with another run is never overwritten",
        "log_level": "use -v or -q",
        "logging_strategy": "logging_steps decides",
        "logging_dir": "metrics.jsonl is in the run folder",
        "logging_first_step": "logging_steps decides",
        "report_to": "metrics.jsonl is always written; trackers are not built in yet",
        "run_name": "there is no tracker",
        "remove_unused_columns": "only the columns of a row's format are read",
        "per_device_eval_batch_size": "the backend sizes its own batches",
        "gradient_checkpointing_kwargs": "the backend chooses the kind",
        "dataloader_num_workers": "the data is in memory",
        "dataloader_pin_memory": "the data is in memory",
        "dataloader_drop_last": "the last short step is kept",
        "dataset_text_field": "use data.columns: {text: NAME}",
        "dataset_num_proc": "tokenisation uses every core",
        "group_by_length": "a step's layout never pads",
        "output_dir": "the top-level output_dir decides",
        "push_to_hub": "nothing is uploaded",
        "hub_model_id": "nothing is uploaded",
        "save_safetensors": "every file is safetensors",
        "save_only_model": "checkpoints always hold the optimizer",
        "ddp_find_unused_parameters": "there is one process",
        "tf32": "the backend decides",
        "use_cpu": "use --device cpu",
        "disable_tqdm": "use -q",
        "data_seed": "seed decides",
    },
    "peft_config": {
        "peft_type": "LORA is the only type",
        "inference_mode": "the command decides",
        "base_model_name_or_path": "model decides",
        "revision": "the top-level revision decides",
        "fan_in_fan_out": "Phi-3 has no such layer",
        "peft_version": "it only records who wrote a file",
        "auto_mapping": "it only records who wrote a file",
        "megatron_core": "it belongs to Megatron",
    },
}
"""Section -> name -> the reason why it changes nothing here."""

_NOTHING: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {}, "none", "no")
ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "training_config": {
        "load_best_model_at_end": _NOTHING,
        "label_smoothing_factor": _NOTHING,
        "neftune_noise_alpha": _NOTHING,
        "deepspeed": _NOTHING,
        "fsdp": _NOTHING,
        "assistant_only_loss": (None, True),
        "completion_only_loss": (None, True),
        "padding_free": (*_NOTHING, True),
        "full_determinism": _NOTHING,
        "optim_args": _NOTHING,
        "auto_find_batch_size": _NOTHING,
    },
    "peft_config": {
        "task_type": (None, "CAUSAL_LM"),
        "layers_pattern": (*_NOTHING, "layers"),
        "layer_replication": _NOTHING,
        "target_parameters": _NOTHING,
        "trainable_token_indices": _NOTHING,
        "lora_bias": _NOTHING,
        "loftq_config": _NOTHING,
        "use_qalora": _NOTHING,
    },
}
"""Section -> name -> the values that change nothing; other values are not supported."""

INSTEAD: Mapping[str, str] = {
    "assistant_only_loss": "data.loss_on: all counts every token",
    "completion_only_loss": "data.loss_on: all counts every token",
}
"""Name in ONLY -> the setting here that replaces its other values."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "training_config": {"learning_rate": 5e-3, "per_device_train_batch_size": 8},
    },
    "sample-finetune": {
        "training_config": {
            "learning_rate": 5.0e-6,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "bf16": True,
            "logging_steps": 20,
            "save_steps": 100,
            "save_total_limit": 1,
            "max_length": 2048,
            "packing": True,
            "seed": 0,
        },
        "peft_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    },
}
"""demo suits the built-in task; sample-finetune has the values of Phi-3's sample_finetune.py."""
