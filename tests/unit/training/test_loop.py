from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from phi3_lora.config.training import TrainingConfig
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.batching import rank_share
from phi3_lora.errors import TrainingError
from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.training.loop import Task, fit
from phi3_lora.training.metrics import EvalMetrics, TrainMetrics
from phi3_lora.training.observer import Observer
from phi3_lora.training.plan.fixed import Plan
from phi3_lora.training.progress import Progress
from phi3_lora.training.signals import StopRequest
from tests.tiny import random_documents
from tests.unit.toy_engine import B_NAME, ToyEngine

LENGTHS = [5, 9, 3, 12, 7, 4, 10, 6]


def make_task(*, valid: bool = False, **changes: Any) -> Task:
    settings = {"learning_rate": 0.02, "num_train_epochs": 3, "logging_steps": 2, **changes}
    config = TrainingConfig(per_device_train_batch_size=3, max_length=16, **settings)
    documents = random_documents(LENGTHS, seed=1, vocab_size=32)
    plan = Plan(
        documents,
        rows_per_step=config.documents_per_step,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=0,
    )
    held_out = random_documents([6, 8], seed=2, vocab_size=32) if valid else []
    return Task(config, plan, held_out)


class Listener(Observer):
    """Observer that passes events to callables and keeps the lines of metrics."""

    def __init__(self, lines: list[dict[str, Any]] | None = None, **callables: Any) -> None:
        self.lines = [] if lines is None else lines
        self.callables = callables

    def on_metrics(self, metrics: TrainMetrics | EvalMetrics) -> None:
        self.lines.append(metrics.to_dict())

    def on_step(self, progress: Progress, loss: float) -> None:
        self._call("on_step", progress, loss)

    def on_best(self, progress: Progress, evaluation: Evaluation) -> None:
        self._call("on_best", progress, evaluation)

    def on_checkpoint_due(self, progress: Progress) -> None:
        self._call("on_checkpoint_due", progress)

    def _call(self, name: str, *values: Any) -> None:
        if name in self.callables:
            self.callables[name](*values)


def run(
    engine: ToyEngine, task: Task, progress: Progress | None = None, **listener: Any
) -> Progress:
    return fit(engine, task, Listener(**listener), progress or Progress(), StopRequest())


def test_loss_falls() -> None:
    task = make_task(num_train_epochs=60, logging_steps=3, learning_rate=0.1)
    lines: list[dict[str, Any]] = []
    progress = run(ToyEngine(), task, lines=lines)
    assert progress.step == task.plan.total_steps == 180
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]


def test_logged_loss_is_the_token_weighted_mean_of_its_window() -> None:
    task = make_task(logging_steps=4)
    lines: list[dict[str, Any]] = []
    losses: list[float] = []
    run(
        ToyEngine(),
        task,
        lines=lines,
        on_step=lambda progress, loss: losses.append(loss),
    )
    counts = [sum(d.loss_tokens for d in step.documents) for step in task.plan.steps()]
    assert [line["step"] for line in lines] == [4, 8, 9]
    for line, window in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 9)), strict=True):
        assert line["loss_tokens"] == sum(counts[window])
        expected = np.average(losses[window], weights=counts[window])
        assert line["loss"] == pytest.approx(expected, rel=1e-12)
    assert np.mean(losses[:4]) != pytest.approx(lines[0]["loss"], rel=1e-9)


def test_resumed_run_is_bit_equal() -> None:
    task = make_task(save_steps=5, logging_steps=3)
    whole, first = ToyEngine(), ToyEngine()
    whole_lines: list[dict[str, Any]] = []
    saved: list[Any] = []

    def save(progress: Progress) -> None:
        state = json.loads(json.dumps(progress.to_dict()))
        saved.append((state, first.read_adapter(), first.read_optimizer()))

    run(whole, task, lines=whole_lines)
    run(first, task, on_checkpoint_due=save)
    state, weights, moments = saved[0]
    assert state["step"] == 5 and state["window"]["steps"] == 2
    second = ToyEngine()
    second.write_adapter(weights)
    second.write_optimizer(moments)
    lines: list[dict[str, Any]] = []
    progress = run(second, task, Progress.from_dict(state), lines=lines)
    assert progress.step == 9
    expected, found = whole.read_adapter(), second.read_adapter()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    for name, value in whole.read_optimizer().items():
        np.testing.assert_array_equal(second.read_optimizer()[name], value)
    timeless = ("step", "epoch", "loss", "grad_norm", "lr", "loss_tokens", "tokens")
    rest = [line for line in whole_lines if line["step"] > 5]
    assert [[a[k] for k in timeless] for a in lines] == [[b[k] for k in timeless] for b in rest]


def test_nan_loss_names_the_step_and_its_rows() -> None:
    engine, task = ToyEngine(), make_task(save_steps=1)
    engine.nan_at_step = 3
    saved: list[int] = []
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan") as problem:
        run(engine, task, on_checkpoint_due=lambda p: saved.append(p.step))
    assert saved == [1, 2]
    assert task.plan.step(3).documents[0].source in str(problem.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_gradients_sum_to_one_ranks(world_size: int) -> None:
    task = make_task()
    step = task.plan.step(1)
    engine = ToyEngine()
    run(engine, make_task(max_steps=2))
    total = sum(d.loss_tokens for d in step.documents)

    def gradients(chosen: Sequence[Document]) -> dict[str, Any]:
        return engine.gradients(make_batch(chosen), loss_tokens=total)

    whole = gradients(step.documents)
    shares = [gradients(rank_share(step.documents, r, world_size)) for r in range(world_size)]
    for name, expected in whole.items():
        found = sum(share[name] for share in shares)
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_toy_gradient_is_the_finite_difference() -> None:
    engine, task = ToyEngine(), make_task(max_steps=2)
    run(engine, task)
    batch = make_batch(random_documents(LENGTHS, seed=1, vocab_size=32)[:3])
    weights = engine.read_adapter()
    losses = []
    step = np.float32(2.0**-8)
    for sign in (1, -1):
        moved = {name: value.copy() for name, value in weights.items()}
        moved[B_NAME][1, 1] += sign * step
        engine.write_adapter(moved)
        losses.append(float(engine.score(batch).nats.sum()))
    engine.write_adapter(weights)
    expected = engine.gradients(batch, loss_tokens=1)[B_NAME][1, 1]
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "epoch"}, [3, 6, 9]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 9]),
        ({"eval_strategy": "steps", "logging_steps": 5}, [5, 9]),
        ({"eval_strategy": "no"}, []),
    ],
)
def test_evaluates_when_the_strategy_says(settings: dict[str, Any], steps: list[int]) -> None:
    engine = ToyEngine()
    lines: list[dict[str, Any]] = []
    run(engine, make_task(valid=True, **settings), lines=lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == steps
    assert engine.num_scored == len(steps)


def test_never_evaluates_without_validation_data() -> None:
    engine = ToyEngine()
    run(engine, make_task(eval_strategy="steps", eval_steps=1))
    assert engine.num_scored == 0


def test_best_is_called_for_better_evaluations_only() -> None:
    found: list[float] = []
    lines: list[dict[str, Any]] = []
    run(
        ToyEngine(),
        make_task(valid=True, eval_strategy="steps", eval_steps=1),
        lines=lines,
        on_best=lambda progress, evaluation: found.append(evaluation.loss),
    )
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    better = [x for i, x in enumerate(losses) if all(x < y for y in losses[:i])]
    assert found == better


def test_stop_finishes_the_step_and_saves() -> None:
    stop, saved = StopRequest(), []

    def on_step(progress: Progress, loss: float) -> None:
        if progress.step == 2:
            stop.signal_number = 15

    listener = Listener(on_step=on_step, on_checkpoint_due=lambda p: saved.append(p.step))
    progress = fit(ToyEngine(), make_task(), listener, Progress(), stop)
    assert progress.step == 2 and saved == [2] and stop.exit_code == 143


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_strategy": "no"}, [9]),
        ({"save_strategy": "epoch"}, [3, 6, 9]),
        ({"save_steps": 4}, [4, 8, 9]),
    ],
)
def test_saves_when_the_strategy_says(settings: dict[str, Any], steps: list[int]) -> None:
    saved: list[int] = []
    run(ToyEngine(), make_task(**settings), on_checkpoint_due=lambda p: saved.append(p.step))
    assert saved == steps
