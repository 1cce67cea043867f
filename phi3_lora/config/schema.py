"""The settings of a run. Field names are those of transformers, TRL and PEFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.data import DataConfig
from phi3_lora.config.require import require
from phi3_lora.config.training import TrainingConfig
from phi3_lora.models.config import QUANTIZATIONS, Dtype, Quantization

Device = Literal["auto", "cpu", "gpu"]
DtypeOption = Literal["auto", Dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All settings of a run."""

    model: str = ""
    """A folder, a hub id, or demo."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder of an adapter to start from."""
    backend: str = "auto"
    """mlx, cuda or auto."""
    device: Device = "auto"
    """auto, cpu or gpu."""
    dtype: DtypeOption = "auto"
    """float32, bfloat16, float16 or auto."""
    quantize: Quantization = "none"
    """Quantisation of the base model: none, 4bit or 8bit (equal weights on both backends), nf4 or
    mlx-affine."""
    output_dir: str = ""
    """The run folder."""
    data: DataConfig = field(default_factory=DataConfig)
    training_config: TrainingConfig = field(default_factory=TrainingConfig)
    peft_config: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(
            self.device in get_args(Device),
            f"device must be auto, cpu or gpu; got {self.device!r}",
        )
        require(
            self.dtype in get_args(DtypeOption),
            f"dtype must be one of {', '.join(get_args(DtypeOption))}; got {self.dtype!r}",
        )
        require(
            self.quantize in QUANTIZATIONS,
            f"quantize must be one of {', '.join(QUANTIZATIONS)}; got {self.quantize!r}",
        )
        for name, flag in (("model", "--model"), ("output_dir", "--output")):
            require(bool(getattr(self, name)), f"{name} is missing: set it or pass {flag}")
        has_data = bool(self.data.train or self.data.sources)
        require(has_data, "data is missing: set it or pass --data")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in config.yaml."""
        raw = dataclasses.asdict(self)
        peft = raw["peft_config"]
        raw["peft_config"] = {k: [*v] if isinstance(v, tuple) else v for k, v in peft.items()}
        return raw
