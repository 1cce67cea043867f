"""The settings of a run. Field names are those of transformers, TRL and PEFT."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from phi3_lora.backend import OptimSpec, lora_scaling
from phi3_lora.data.sources import Source, check_columns, check_format
from phi3_lora.errors import ConfigError
from phi3_lora.models import DTYPES, QUANTIZATIONS
from phi3_lora.schedule import SCHEDULERS

STRATEGIES = ("no", "steps", "epoch")
OPTIMIZERS = {"adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "sgd": "sgd"}
"""Accepted names and the update rule they mean."""
LOSS_ON = ("assistant", "last", "all")
"""What the loss counts on: every answer with its end token, the last one, or every token."""
TOO_LONG = ("drop", "truncate_left", "truncate_right", "error")
"""What becomes of a row that is longer than max_length."""
ON_BAD_ROW = ("error", "skip")
"""What becomes of a row that cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapter (`peft_config`)."""

    r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """The delta is (lora_alpha / r) B A."""
    lora_dropout: float = 0.0
    """Probability that an input feature of a LoRA layer is zeroed in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names, full paths, one regular expression, or all-linear; q_proj, k_proj, v_proj,
    gate_proj and up_proj mean those rows of the fused weights."""
    exclude_modules: str | tuple[str, ...] = ()
    """Of those, what is not adapted after all."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the decoder layers to adapt; null is all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or regular expression -> its own r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name or regular expression -> its own lora_alpha."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Train the norm of each row of the weight on its own."""
    bias: str = "none"
    """none, all or lora_only: Phi-3 has no bias, so nothing is trained by it."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules whose whole weight is trained and kept in the adapter."""
    init_lora_weights: bool | str | None = True
    """true (B = 0), pissa, pissa_niter_N or olora (from the base's own weights)."""

    def __post_init__(self) -> None:
        _require(self.r >= 1, f"peft_config.r must be >= 1, got {self.r} (--rank)")
        _require(
            math.isfinite(self.lora_alpha) and self.lora_alpha > 0,
            f"peft_config.lora_alpha must be > 0, got {self.lora_alpha} (--alpha)",
        )
        _require(
            0.0 <= self.lora_dropout < 1.0,
            f"peft_config.lora_dropout must be in [0, 1), got {self.lora_dropout} (--dropout)",
        )
        _require(
            bool(self.target_modules),
            "peft_config.target_modules is empty: name modules, or all-linear (--targets)",
        )
        _require(
            self.bias in ("none", "all", "lora_only"),
            f"peft_config.bias must be none, all or lora_only; got {self.bias!r}",
        )
        if self.init_lora_weights is None:
            object.__setattr__(self, "init_lora_weights", True)
        init = self.init_lora_weights
        _require(
            init is True or bool(re.fullmatch(r"pissa|pissa_niter_\d{1,3}|olora", str(init))),
            "peft_config.init_lora_weights must be true, pissa, pissa_niter_N or olora; got "
            f"{init!r}",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            bad = {k: v for k, v in getattr(self, name).items() if not 0 < v < math.inf}
            _require(not bad, f"peft_config.{name} must hold numbers > 0, got {bad}")

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return lora_scaling(self.lora_alpha, self.r, use_rslora=self.use_rslora)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The run (`training_config`)."""

    learning_rate: float = 2e-4
    """Largest learning rate of the schedule."""
    num_train_epochs: float = 1.0
    """Passes over the training data, when max_steps is not positive."""
    max_steps: int = -1
    """Optimizer steps; a positive number wins over num_train_epochs."""
    per_device_train_batch_size: int = 4
    """Documents (with packing: rows) a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches an optimizer step; documents a step are the product, on any number of ranks."""
    lr_scheduler_type: str = "cosine"
    """linear, cosine, constant or constant_with_warmup."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: int = 0
    """Steps of warm-up; positive wins over warmup_ratio."""
    optim: str = "adamw_torch"
    """adamw_torch (also adamw, adamw_torch_fused) or sgd."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    loraplus_lr_ratio: float = 1.0
    """The learning rate of every B over that of A (LoRA+); 1 is none."""
    max_length: int = 2048
    """Tokens a document may have; longer ones are dropped and counted."""
    packing: bool = False
    """A step takes as many whole documents as fit into its rows of max_length tokens."""
    seed: int = 0
    """Of the adapter's start, the order of documents, and dropout."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_strategy: str = "epoch"
    """When to score the validation data: no, steps or epoch; with the last two also at the end."""
    eval_steps: int = 0
    """Steps between two evaluations; positive turns eval_strategy epoch into steps."""
    save_strategy: str = "steps"
    """When to save a checkpoint: no, steps or epoch; the end always counts."""
    save_steps: int = 100
    """Steps between two checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept; 0 keeps all."""
    bf16: bool = False
    """Compute in bfloat16 on a GPU."""
    fp16: bool = False
    """Compute in float16 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    """Fuse each layer's small operations: CUDA in half precision, after a minute of compiling."""

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= smallest,
                f"training_config.{name} must be >= {smallest}, got {value}",
            )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(
                value in allowed,
                f"training_config.{name} must be one of {', '.join(allowed)}; got {value!r}",
            )
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"training_config.{name} must be in [0, 1), got {value}")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate must be > 0 and finite, got {self.learning_rate} (--lr)",
        )
        _require(
            self.max_steps == -1 or 0 < self.max_steps <= _MOST_STEPS,
            f"max_steps must be -1 (num_train_epochs decides) or 1 to {_MOST_STEPS:,}, got "
            f"{self.max_steps}",
        )
        _require(
            self.max_steps > 0 or 0 < self.num_train_epochs < math.inf,
            f"nothing to do: max_steps is {self.max_steps} and num_train_epochs is "
            f"{self.num_train_epochs}; one must be > 0",
        )
        _require(not (self.bf16 and self.fp16), "bf16 and fp16 cannot both be true")
        if self.eval_steps > 0 and self.eval_strategy == "epoch":
            object.__setattr__(self, "eval_strategy", "steps")

    @property
    def documents_per_step(self) -> int:
        """Documents (with packing: rows) an optimizer step takes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def optim_spec(self) -> OptimSpec:
        """What a backend needs of the optimizer."""
        return OptimSpec(
            name=OPTIMIZERS[self.optim],
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lr_ratio=self.loraplus_lr_ratio,
        )

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of this length."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)


_MOST_STEPS = 100_000_000
_SMALLEST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "adam_epsilon": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "loraplus_lr_ratio": 1e-6,
    "max_length": 2,
    "seed": 0,
    "logging_steps": 1,
    "eval_steps": 0,
    "save_steps": 1,
    "save_total_limit": 0,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": SCHEDULERS,
    "optim": tuple(OPTIMIZERS),
    "eval_strategy": STRATEGIES,
    "save_strategy": STRATEGIES,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data (`data`)."""

    train: str = ""
    """A file, a folder, a pattern, a data set of the hub (owner/name[/subset][:split]), or demo."""
    valid: str | None = None
    """The same, to validate on."""
    valid_fraction: float = 0.0
    """Share of the training rows to validate on, when there is nothing else for it."""
    sources: tuple[Source, ...] = ()
    """More to train on: a list of {path, weight, split, subset, format, columns, streaming}."""
    format: str = "auto"
    """Of the rows of train and valid: messages, sharegpt, prompt-completion, alpaca,
    classification or text; auto takes the first row's."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the one in train and valid."""
    split: str | None = None
    """Which part of a folder or a data set to train on; null is train."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    streaming: bool = False
    """Train on rows as they are read, without a pass over them first; needs max_steps."""
    buffer_size: int = 10_000
    """Rows that are read and shuffled at a time when streaming."""
    on_bad_row: str = "error"
    """What a row that cannot be used does: error, or skip, which counts and names it."""
    loss_on: str = "assistant"
    """assistant (every answer), last (the last answer) or all; a row's own weights win."""
    too_long: str = "drop"
    """Rows longer than max_length: drop, truncate_left, truncate_right (whole turns) or error."""
    chat_template: str | None = None
    """A Jinja file in place of the model's own chat template."""

    def __post_init__(self) -> None:
        choices = (("loss_on", LOSS_ON), ("too_long", TOO_LONG), ("on_bad_row", ON_BAD_ROW))
        for name, allowed in choices:
            value = getattr(self, name)
            _require(
                value in allowed, f"data.{name} must be one of {', '.join(allowed)}; got {value!r}"
            )
        _require(
            0.0 <= self.valid_fraction < 1.0,
            f"data.valid_fraction must be in [0, 1), got {self.valid_fraction}",
        )
        check_format(self.format)
        check_columns(self.columns)
        _require(self.buffer_size >= 1, f"data.buffer_size must be >= 1, got {self.buffer_size}")
        of_train = ("format", "columns", "split", "subset")
        stray = [name for name in of_train if getattr(self, name) not in ("auto", {}, None)]
        _require(
            bool(self.train) or not stray,
            f"data.{', data.'.join(stray)} without data.train: set it in the entries of "
            "data.sources",
        )

    @property
    def source(self) -> Source | None:
        """What train names, with the settings that belong to it; None when it names nothing."""
        if not self.train:
            return None
        return Source(
            path=self.train,
            split=self.split,
            subset=self.subset,
            format=self.format,
            columns=self.columns,
            streaming=self.streaming,
        )

    @property
    def more(self) -> tuple[Source, ...]:
        """The entries of sources, streaming where the run does."""
        if not self.streaming:
            return self.sources
        return tuple(dataclasses.replace(source, streaming=True) for source in self.sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run."""

    model: str = ""
    """A folder, a hub id, or demo."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """An adapter folder to start from."""
    backend: str = "auto"
    """mlx, cuda or auto."""
    device: str = "auto"
    """auto, cpu or gpu."""
    dtype: str = "auto"
    """float32, bfloat16, float16 or auto."""
    quantize: str = "none"
    """The base: none, 4bit or 8bit (equal weights on both backends), nf4 or mlx-affine."""
    output_dir: str = ""
    """The run folder."""
    data: DataConfig = field(default_factory=DataConfig)
    training_config: TrainingConfig = field(default_factory=TrainingConfig)
    peft_config: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _require(
            self.device in ("auto", "cpu", "gpu"),
            f"device must be auto, cpu or gpu; got {self.device!r}",
        )
        _require(
            self.dtype in ("auto", *DTYPES),
            f"dtype must be one of auto, {', '.join(DTYPES)}; got {self.dtype!r}",
        )
        _require(
            self.quantize in QUANTIZATIONS,
            f"quantize must be one of {', '.join(QUANTIZATIONS)}; got {self.quantize!r}",
        )
        for name, flag in (("model", "--model"), ("output_dir", "--output")):
            _require(bool(getattr(self, name)), f"{name} is missing: set it or pass {flag}")
        has_data = bool(self.data.train or self.data.sources)
        _require(has_data, "data is missing: set it or pass --data")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as config.yaml holds them."""
        raw = dataclasses.asdict(self)
        peft = raw["peft_config"]
        raw["peft_config"] = {k: [*v] if isinstance(v, tuple) else v for k, v in peft.items()}
        return raw


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
