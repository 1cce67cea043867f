"""The fingerprint of an adapter, replayed on a toy engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME, encode_fingerprint
from phi3_lora.errors import AdapterError
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.inference.loading import Placement
from phi3_lora.verification import fingerprint
from phi3_lora.verification.fingerprint import (
    Verification,
    probe_batch,
    take_fingerprint,
    verify_adapter,
)
from tests.tiny import write_model
from tests.unit.toy_engine import ToyEngine

VOCABULARY = 264
ORIGIN = {"backend": "toy", "dtype": "float32", "model_identity": "here"}


def engine(seed: int = 0) -> ToyEngine:
    return ToyEngine(vocab_size=VOCABULARY, seed=seed)


@pytest.fixture
def base(tmp_path: Path) -> FoundModel:
    return find_base_model(str(write_model(tmp_path / "m", vocab_size=VOCABULARY)))


@pytest.fixture
def adapter(tmp_path: Path, base: FoundModel) -> Path:
    (tmp_path / "a").mkdir()
    taken = take_fingerprint(engine(), probe_batch(base.tokenizer), ORIGIN)
    (tmp_path / "a" / FINGERPRINT_NAME).write_bytes(encode_fingerprint(taken))
    return tmp_path / "a"


def verify(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, base: FoundModel, here: ToyEngine, name: str
) -> Verification:
    opened = SimpleNamespace(engine=here, base=SimpleNamespace(identity=name))
    monkeypatch.setattr(fingerprint, "with_adapter", lambda base, path: (base, None))
    monkeypatch.setattr(fingerprint, "open_engine", lambda *arguments: opened)
    return verify_adapter(str(adapter), lambda: base, Placement(), lambda text: None)


def test_an_adapter_with_unchanged_behaviour_is_equal(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, base: FoundModel
) -> None:
    here = engine()
    found = verify(monkeypatch, adapter, base, here, "here")
    assert found.equal and found.verdict.same_base
    assert found.verdict.max_difference == 0 and found.verdict.greedy_agreement == 1
    assert ORIGIN.items() <= found.origin.items()
    assert here.is_closed


def test_an_adapter_is_different_on_another_base(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, base: FoundModel
) -> None:
    found = verify(monkeypatch, adapter, base, engine(seed=1), "elsewhere")
    assert not found.equal and not found.verdict.same_base
    assert found.verdict.base_max_difference > found.verdict.threshold
    assert found.to_dict()["equal"] is False


def test_a_base_with_a_smaller_vocabulary_is_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: FoundModel
) -> None:
    (tmp_path / "a").mkdir()
    batch = probe_batch(base.tokenizer)
    taken = take_fingerprint(engine(), batch, ORIGIN)
    taken.tokens[0] = VOCABULARY
    (tmp_path / "a" / FINGERPRINT_NAME).write_bytes(encode_fingerprint(taken))
    here = engine()
    with pytest.raises(AdapterError, match="trained on another one"):
        verify(monkeypatch, tmp_path / "a", base, here, "here")
    assert not here.is_closed


def test_an_adapter_without_a_fingerprint_is_refused_before_the_base_is_read(
    tmp_path: Path,
) -> None:
    def find() -> FoundModel:
        raise AssertionError("the base model was read")

    with pytest.raises(AdapterError, match="nothing to compare with"):
        verify_adapter(str(tmp_path), find, Placement(), lambda text: None)
