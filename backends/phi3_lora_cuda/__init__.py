"""The PyTorch backend: transformers' Phi-3 with PEFT's LoRA layers, on NVIDIA GPUs and CPUs."""

import logging

# PEFT imports bitsandbytes if it is installed; bitsandbytes then logs messages about its kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from phi3_lora_cuda.backend import CudaBackend  # noqa: E402

__all__ = ["CudaBackend"]
