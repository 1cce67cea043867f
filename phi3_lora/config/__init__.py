"""Settings: the fields, where they come from, and what each known name means."""

from phi3_lora.config.load import RunSettings, load_settings
from phi3_lora.config.schema import LoraConfig, RunConfig, TrainingConfig

__all__ = ["LoraConfig", "RunConfig", "RunSettings", "TrainingConfig", "load_settings"]
