"""What this machine can run, what is missing, and the line that mends it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phi3_lora.engine.registry import backend_names, load_backend
from phi3_lora.errors import Phi3LoraError


def examine() -> dict[str, Any]:
    """Versions, and for each backend whether it runs, on what, and what slows it down."""
    backends = {name: _examine_backend(name) for name in backend_names()}
    problems = [text for facts in backends.values() for text in facts["problems"]]
    if not any(facts["available"] for facts in backends.values()):
        problems.append(
            "no backend can run: pip install 'phi3-lora[mlx]' on a Mac, 'phi3-lora[cuda]' elsewhere"
        )
    return {
        "phi3_lora": version("phi3-lora"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "hub_cache": str(_hub_cache()),
        "backends": backends,
        "problems": problems,
    }


def _examine_backend(name: str) -> dict[str, Any]:
    try:
        backend = load_backend(name)
        backend.check("cpu")
        facts = backend.describe().to_dict()
    except Phi3LoraError as reason:
        return {"available": False, "reason": str(reason), "problems": []}
    return {"available": True, **facts, "problems": backend.diagnose()}


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
