"""Report on this machine: its versions and backends, and a command that fixes each problem."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phi3_lora.engine.protocol import BackendDescription
from phi3_lora.engine.registry import backend_names, load_backend
from phi3_lora.errors import Phi3LoraError


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Report on one backend of this machine."""

    reason: str | None = None
    """Why the backend cannot run here; None if it can."""
    description: BackendDescription | None = None
    """Software and devices; None if the backend cannot run here."""
    problems: list[str] = field(default_factory=list)
    """Causes of slow runs, each with a command that fixes it."""

    @property
    def is_available(self) -> bool:
        """True if the backend can run here."""
        return self.reason is None

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        if self.description is None:
            facts: dict[str, Any] = {"reason": self.reason}
        else:
            facts = self.description.to_dict()
        return {"available": self.is_available, **facts, "problems": self.problems}


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Versions, backends and problems of this machine."""

    phi3_lora: str
    python: str
    platform: str
    num_cpus: int | None
    hub_cache: str
    backends: dict[str, BackendReport]
    problems: list[str]
    """Problems of all backends, or the one that no backend can run."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        return {
            "phi3_lora": self.phi3_lora,
            "python": self.python,
            "platform": self.platform,
            "num_cpus": self.num_cpus,
            "hub_cache": self.hub_cache,
            "backends": {name: report.to_dict() for name, report in self.backends.items()},
            "problems": self.problems,
        }


def examine() -> DoctorReport:
    """Examine versions, caches and every installed backend."""
    backends = {name: _examine_backend(name) for name in backend_names()}
    problems = [text for report in backends.values() for text in report.problems]
    if not any(report.is_available for report in backends.values()):
        problems.append(
            "no backend can run: pip install 'phi3-lora[mlx]' on a Mac, 'phi3-lora[cuda]' elsewhere"
        )
    return DoctorReport(
        phi3_lora=version("phi3-lora"),
        python=platform.python_version(),
        platform=platform.platform(),
        num_cpus=os.cpu_count(),
        hub_cache=str(_hub_cache()),
        backends=backends,
        problems=problems,
    )


def _examine_backend(name: str) -> BackendReport:
    try:
        backend = load_backend(name)
        backend.check("cpu")
        description = backend.describe()
    except Phi3LoraError as reason:
        return BackendReport(reason=str(reason))
    return BackendReport(description=description, problems=backend.diagnose())


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
