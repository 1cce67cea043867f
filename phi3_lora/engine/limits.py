"""Notes on a request that the device cannot follow, and the memory of the process."""

from __future__ import annotations

import resource
import sys

from phi3_lora.engine.request import LoadRequest


def unused_precision(request: LoadRequest, dtype: str) -> list[str]:
    """A note where bf16 or fp16 was asked for and the engine computes in another dtype."""
    if request.gpu_dtype in (None, dtype):
        return []
    return [f"bf16 and fp16 have no effect here: computing in {dtype}"]


def out_of_memory_advice(request: LoadRequest) -> str:
    """Return the advice for a micro-batch that does not fit into the device's memory."""
    return (
        f"out of memory with micro-batches of {request.micro_batch_tokens:,} tokens: halve "
        "per_device_train_batch_size and double gradient_accumulation_steps (the run stays the "
        "same), set gradient_checkpointing: true, or lower max_length"
    )


def process_peak_bytes() -> int:
    """Largest memory that this process has held, whatever the device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024
