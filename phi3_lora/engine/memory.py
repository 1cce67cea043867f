"""Memory: the peak of this process, and advice for a device whose memory is full."""

from __future__ import annotations

import resource
import sys

from phi3_lora.engine.request import LoadRequest


def out_of_memory_advice(request: LoadRequest) -> str:
    """Return the message for a micro-batch that does not fit the device's memory."""
    return (
        f"out of memory with micro-batches of {request.micro_batch_tokens:,} tokens: halve "
        "per_device_train_batch_size and double gradient_accumulation_steps (the run stays the "
        "same), set gradient_checkpointing: true, or lower max_length"
    )


def process_peak_bytes() -> int:
    """Return the peak memory of this process in the host's RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024
