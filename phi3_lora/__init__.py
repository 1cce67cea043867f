"""LoRA fine-tuning of the Phi-3 family on MLX and PyTorch with the same numbers.

The core: configuration, data, plan, training loop, files. No framework is imported here.
"""

from phi3_lora.api import LoadedModel, load, train

__all__ = ["LoadedModel", "load", "train"]
