"""The events of a whole run on a numpy engine, as the caller's observer hears them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_lora import train
from phi3_lora.engine.protocol import BackendDescription
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import Phi3LoraError
from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.training import run as run_module
from phi3_lora.training.facts import RunStart
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics
from phi3_lora.training.observer import Observer
from phi3_lora.training.progress import Progress
from tests.tiny import chat, tiny_config, write_model, write_rows
from tests.unit.toy_engine import MODULE, ToyEngine


class ToyBackend:
    """Backend that opens a ToyEngine."""

    name = "toy"
    quantizations: frozenset[str] = frozenset()

    def open(self, request: LoadRequest) -> ToyEngine:
        return ToyEngine(vocab_size=tiny_config()["vocab_size"], optim=request.optim)

    def describe(self) -> BackendDescription:
        return BackendDescription(versions={"toy": "1"}, devices=("cpu",), num_threads=1)


class Recorder(Observer):
    """Observer that keeps the name and the subject of each event."""

    def __init__(self, run_dir: Path, fail_at: str = "") -> None:
        self.run_dir = run_dir
        self.fail_at = fail_at
        self.events: list[tuple[str, Any]] = []

    def _hear(self, name: str, subject: Any) -> None:
        self.events.append((name, subject))
        if name == self.fail_at:
            raise Phi3LoraError(f"stopped in {name}")

    def on_note(self, text: str) -> None:
        self._hear("on_note", text)

    def on_start(self, start: RunStart) -> None:
        self._hear("on_start", start.step)

    def on_step(self, progress: Progress, loss: float) -> None:
        self._hear("on_step", progress.step)

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        last = (self.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last) == metrics.to_dict()
        self._hear("on_metrics", type(metrics))

    def on_best(self, progress: Progress, evaluation: Evaluation) -> None:
        assert (self.run_dir / "best" / "README.md").exists()
        self._hear("on_best", progress.step)

    def on_checkpoint_due(self, progress: Progress) -> None:
        assert not (self.run_dir / "checkpoints" / f"step-{progress.step:06d}").exists()
        self._hear("on_checkpoint_due", progress.step)

    def on_checkpoint(self, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        self._hear("on_checkpoint", folder.name)

    def on_finish(self, progress: Progress) -> None:
        assert (self.run_dir / "adapter" / "README.md").exists()
        self._hear("on_finish", progress.step)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(
        run_module, "choose_backend", lambda name, device: (ToyBackend(), "cpu", "a note")
    )
    rows = [chat(f"q{i}", f"a{i}") for i in range(4)]
    return {
        "model": str(write_model(tmp_path / "model", hidden_size=8, intermediate_size=8)),
        "data": write_rows(tmp_path / "train.jsonl", rows),
        "valid": write_rows(tmp_path / "valid.jsonl", [chat("x", "y")]),
        "output_dir": tmp_path / "run",
        "targets": MODULE,
        "rank": 2,
        "max_steps": 2,
        "batch_size": 2,
        "lr": 0.01,
        "set": [
            *("training_config.logging_steps=1", "training_config.save_steps=1"),
            *("training_config.eval_strategy=steps", "training_config.eval_steps=2"),
            *("training_config.warmup_ratio=0", "training_config.lr_scheduler_type=constant"),
        ],
    }


def test_an_observer_hears_every_event_in_order(settings: dict[str, Any]) -> None:
    observer = Recorder(settings["output_dir"])
    train(**settings, observer=observer)
    assert observer.events == [
        ("on_note", "a note"),
        ("on_start", 0),
        ("on_step", 1),
        ("on_metrics", TrainMetrics),
        ("on_checkpoint_due", 1),
        ("on_checkpoint", "step-000001"),
        ("on_step", 2),
        ("on_metrics", TrainMetrics),
        ("on_metrics", EvalMetrics),
        ("on_best", 2),
        ("on_checkpoint_due", 2),
        ("on_checkpoint", "step-000002"),
        ("on_finish", 2),
    ]


def test_a_resumed_run_starts_after_its_checkpoint(settings: dict[str, Any]) -> None:
    train(**settings)
    observer = Recorder(settings["output_dir"])
    train(**settings, resume=True, observer=observer)
    done = ("on_note", "this run is finished: all 2 steps are done")
    assert observer.events == [("on_note", "a note"), done, ("on_start", 2), ("on_finish", 2)]


@pytest.mark.parametrize(
    "event", [name for name in vars(Observer) if name.startswith("on_")], ids=str
)
def test_an_error_of_an_observer_stops_the_run(settings: dict[str, Any], event: str) -> None:
    observer = Recorder(settings["output_dir"], fail_at=event)
    with pytest.raises(Phi3LoraError, match=f"stopped in {event}"):
        train(**settings, observer=observer)
    assert [name for name, _ in observer.events].count(event) == 1
    assert observer.events[-1][0] == event


@pytest.mark.parametrize("is_hub_id", [True, False])
def test_the_model_card_has_the_head_that_the_hub_reads(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_hub_id: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    base_model = ""
    if is_hub_id:
        (tmp_path / "ada").mkdir()
        (tmp_path / "model").rename(tmp_path / "ada" / "tiny")
        settings["model"] = "ada/tiny"
        base_model = "base_model: ada/tiny\n"
    train(**settings)
    card = (settings["output_dir"] / "adapter" / "README.md").read_text()
    head = f"library_name: peft\ntags:\n- lora\n- phi-3\n{base_model}"
    assert card.startswith(f"---\n{head}---\n\n# LoRA adapter\n\n")
