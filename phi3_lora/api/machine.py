"""The machine: versions, devices and backends."""

from __future__ import annotations

from phi3_lora.report.doctor import DoctorReport, examine


def doctor() -> DoctorReport:
    """Examine versions, devices, backends and caches, and list what is missing."""
    return examine()
