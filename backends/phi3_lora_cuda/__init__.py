"""The PyTorch backend: transformers' Phi-3 with PEFT's LoRA layers, on NVIDIA GPUs and CPUs."""

from phi3_lora_cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
