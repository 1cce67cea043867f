"""The report on a machine and its backends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from phi3_lora.engine.protocol import BackendDescription
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


def test_a_backend_that_runs_is_reported_with_its_description(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    description = BackendDescription(
        versions={"numpy": "2.0"}, devices=("cpu",), num_threads=2, blas="openblas"
    )
    toy = SimpleNamespace(
        check=lambda device: None, describe=lambda: description, diagnose=lambda: ["slow: fix it"]
    )
    monkeypatch.setattr(doctor, "backend_names", lambda: ["toy"])
    monkeypatch.setattr(doctor, "load_backend", lambda name: toy)
    report = doctor.examine()
    assert report.backends["toy"].description is description
    assert report.problems == ["slow: fix it"]
    found = report.to_dict()["backends"]["toy"]
    assert list(found) == [
        *("available", "versions", "devices", "blas", "num_threads", "problems"),
    ]
    assert found["devices"] == ["cpu"] and found["available"] is True
