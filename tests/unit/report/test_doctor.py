"""The report on a machine."""

from __future__ import annotations

import pytest

from phi3_lora.errors import BackendUnavailableError
from phi3_lora.report import doctor


def test_a_backend_that_cannot_run_is_reported_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise BackendUnavailableError(f"no {name}")

    monkeypatch.setattr(doctor, "backend_names", lambda: ["toy"])
    monkeypatch.setattr(doctor, "load_backend", missing)
    report = doctor.examine()
    assert not report.backends["toy"].is_available
    found = report.to_dict()
    assert found["backends"] == {"toy": {"available": False, "reason": "no toy", "problems": []}}
    assert list(found)[-2:] == ["backends", "problems"]
    assert "no backend can run" in found["problems"][0]
