"""PEFT's format with q, k, v and gate, up as separate modules, as in Unsloth."""

from __future__ import annotations

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.fused import is_unfused, unfuse
from phi3_lora.adapters.formats.peft import WEIGHTS_NAME, peft_content, read_peft
from phi3_lora.adapters.formats.record import FolderContent, FolderFormat
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig


def _encode(adapter: Adapter, base: ModelConfig | None) -> FolderContent:
    if base is None:
        raise AdapterError("unfused needs the sizes of q, k and v: pass --model")
    return peft_content(unfuse(adapter, base), base)


UNFUSED = FolderFormat(
    name="unfused",
    tool="PEFT",
    weights_name=WEIGHTS_NAME,
    detect=is_unfused,
    read=read_peft,
    encode=_encode,
)
