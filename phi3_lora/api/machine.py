"""The machine: versions, devices and backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phi3_lora.report.doctor import examine


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """Facts about this machine and the problems found on it."""

    facts: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        """Faults of this machine, each with the line that mends it."""
        return list(self.facts["problems"])

    def to_dict(self) -> dict[str, Any]:
        """Return the facts by name."""
        return dict(self.facts)


def doctor() -> DoctorResult:
    """Examine versions, devices, backends and caches, and list what is missing."""
    return DoctorResult(examine())
