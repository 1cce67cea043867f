"""Logits from unchanged transformers and PEFT, without our layers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from phi3_lora.arrays import Float32, Int32
from phi3_lora.errors import AdapterError


def stock_logits(model_dir: Path, adapter_dir: Path, tokens: Int32) -> Float32:
    """Compute the logits (T, vocabulary) of one document, in float32 on a CPU.

    Raises:
        AdapterError: when PEFT does not load the adapter, or only a part of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.Phi3ForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, local_files_only=True
        )
        # PEFT only warns about missing tensors; here this is an error.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            model = peft.PeftModel.from_pretrained(base, str(adapter_dir)).eval()
        except (ValueError, KeyError, RuntimeError, TypeError, UserWarning) as cause:
            raise AdapterError(f"PEFT does not load {adapter_dir}: {cause}") from cause
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        return np.asarray(model(ids).logits[0].float().numpy())
