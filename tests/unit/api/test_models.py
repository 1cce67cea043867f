"""A loaded model: whole answers, pieces of answers, scores and repr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from phi3_lora import LoadedModel
from phi3_lora.engine.protocol import Batch, Scores
from phi3_lora.engine.request import Sampling
from phi3_lora.errors import AdapterError, ConfigError
from phi3_lora.inference.base_model import find_base_model
from tests.tiny import chat, write_model, write_rows
from tests.unit.toy_engine import ToyEngine

ANSWER = "Caf\u00e9, noted."


class EchoEngine(ToyEngine):
    """An engine with one answer for every prompt, and half a nat for every token."""

    def __init__(self, answer: list[int], stop: int) -> None:
        super().__init__(vocab_size=264)
        self._answer = [*answer, stop]
        self.asked: list[tuple[list[list[int]], Sampling]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        self.asked.append(([list(p) for p in prompts], sampling))
        for index in range(len(prompts)):
            for token in self._answer[: sampling.max_new_tokens]:
                yield index, token

    def score(self, batch: Batch) -> Scores:
        assert len(batch.doc_starts) > 1
        return super().score(batch)


@pytest.fixture
def engine(tmp_path: Path) -> EchoEngine:
    base = find_base_model(str(write_model(tmp_path / "model")))
    return EchoEngine(base.tokenizer.encode_text(ANSWER), min(base.stop_ids))


@pytest.fixture
def model(tmp_path: Path, engine: EchoEngine) -> LoadedModel:
    return LoadedModel(find_base_model(str(tmp_path / "model")), engine, None)


def test_an_answer_whole_and_in_pieces(model: LoadedModel, engine: EchoEngine) -> None:
    assert model.generate("q") == ANSWER
    pieces = model.generate("q", stream=True, max_new_tokens=99, temperature=0.5, seed=3)
    assert not isinstance(pieces, str)
    found = list(pieces)
    assert len(found) == len(ANSWER) and "".join(found) == ANSWER
    (first, defaults), (second, sampling) = engine.asked
    assert first == second
    assert defaults == Sampling(stop_ids=model.base.stop_ids)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (99, 0.5, 3)


def test_a_batch_mixes_messages_and_conversations(model: LoadedModel, engine: EchoEngine) -> None:
    conversation = [{"role": "user", "content": "q"}]
    assert model.generate_batch(["q", conversation], max_new_tokens=2) == [ANSWER[:2]] * 2
    ((prompts, _),) = engine.asked
    assert prompts[0] == prompts[1]


def test_evaluate_scores_and_answers(model: LoadedModel, tmp_path: Path) -> None:
    rows = [chat("q", ANSWER), chat("r", "other"), chat("s", ANSWER)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    scores = model.score(data)
    plain = model.evaluate(data)
    assert plain.to_dict() == scores.to_dict()
    assert plain.answers is None and plain.exact_match is None
    found = model.evaluate(data, generate=True, limit=2)
    assert found.num_documents == 2
    assert found.answers is not None
    assert [answer.is_exact for answer in found.answers] == [True, False]
    assert found.to_dict()["exact_match"] == 0.5 and found.to_dict()["num_answers"] == 2
    assert "answers" not in found.to_dict()


def test_values_of_options_are_checked(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="loss_on must be one of assistant, last, all"):
        model.evaluate("demo", loss_on="none")  # type: ignore[arg-type]


def test_the_repr_shows_model_and_device(model: LoadedModel, tmp_path: Path) -> None:
    assert repr(model) == f"<LoadedModel {tmp_path}/model, no adapter, float64 on numpy>"


def test_a_model_without_an_adapter_has_nothing_to_save(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to save"):
        model.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_with_block_frees_the_model(model: LoadedModel, engine: EchoEngine) -> None:
    with model as same:
        assert same is model and not engine.is_closed
    assert engine.is_closed
