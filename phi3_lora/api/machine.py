"""The function that examines the machine: doctor."""

from __future__ import annotations

from phi3_lora.report.doctor import DoctorReport, examine


def doctor() -> DoctorReport:
    """Report the versions, devices, backends and caches of this machine, and its problems."""
    return examine()
