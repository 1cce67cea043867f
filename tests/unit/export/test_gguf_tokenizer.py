from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from phi3_lora.errors import ModelError
from phi3_lora.export.gguf_tokenizer import GgufVocabulary, TokenType, read_vocabulary
from phi3_lora.models.config_json import read_model_config
from tests.tiny import MARKERS, TEMPLATE, write_model, write_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_ADDED = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
MERGES = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("▁", "abc"), ("a", "bc")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", vocab_size=320)


def read(folder: Path) -> GgufVocabulary:
    return read_vocabulary(folder, read_model_config(folder))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_byte_level(folder: Path, split: Any, markers: Sequence[str] = MARKERS) -> None:
    """Write a byte-level tokenizer with one merge and a pre-tokenizer pattern."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    tokenizer.save(str(folder / "tokenizer.json"))


def by_pattern(pattern: str) -> Any:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return pre_tokenizers.Sequence([split, to_bytes])


def write_llama(folder: Path, *, eats: Sequence[str] = MARKERS[1:], bos: str = "<s>") -> None:
    """Write a tokenizer like Phi-3's: character merges, byte fallback, and ▁ for a space."""
    pieces = [*LLAMA_ADDED, *BYTES, "▁a", "bc", "▁abc", "abc", "▁", "a", "b", "c"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    added = [
        AddedToken(t, special=t != "</s>", normalized=False, rstrip=t in {*eats, "</s>"})
        for t in (*LLAMA_ADDED, *MARKERS)
    ]
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", bos_token=bos, unk_token="<unk>")


class TestByteLevel:
    def test_tokens_types_and_merges_are_the_tokenizers_own(self, model: Path) -> None:
        write_byte_level(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
        found = read(model)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        count = tokenizer.get_vocab_size()
        assert found.tokens[:count] == [tokenizer.id_to_token(i) for i in range(count)]
        assert found.types[:257] == [TokenType.NORMAL] * 257
        assert found.types[257:count] == [TokenType.CONTROL] * len(MARKERS)
        assert (found.model, found.merges, found.scores) == ("gpt2", ["a b"], [])

    def test_rows_without_a_token_are_unused(self, model: Path) -> None:
        found = read(model)
        assert len(found.tokens) == len(found.types) == 320
        assert found.tokens[261:] == [f"[PAD{i}]" for i in range(261, 320)]
        assert set(found.types[261:]) == {TokenType.UNUSED}

    @pytest.mark.parametrize(
        ("split", "name"),
        [
            (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
            (by_pattern(CL100K), "dbrx"),
            (by_pattern(O200K), "gpt-4o"),
        ],
        ids=["GPT-2", "Phi-4", "Phi-4-mini"],
    )
    def test_the_way_to_split_text_has_llama_cpps_name(
        self, model: Path, split: Any, name: str
    ) -> None:
        write_byte_level(model, split)
        found = read(model)
        assert (found.pre, found.notes) == (name, [])

    @pytest.mark.parametrize(
        "split",
        [by_pattern(CL100K.replace("{1,3}", "")), pre_tokenizers.ByteLevel(add_prefix_space=True)],
        ids=["single digits", "space before"],
    )
    def test_another_way_to_split_text_is_the_default_with_a_note(
        self, model: Path, split: Any
    ) -> None:
        write_byte_level(model, split)
        found = read(model)
        assert found.pre == "default"
        assert any("splits differently" in note for note in found.notes)

    def test_a_normalizer_is_noted(self, model: Path) -> None:
        write_byte_level(model, by_pattern(CL100K))
        change(model / "tokenizer.json", normalizer={"type": "NFC"})
        assert any("does not normalize" in note for note in read(model).notes)

    def test_markers_that_eat_white_space_are_noted(self, model: Path) -> None:
        found = read(model)
        assert found.eating == set(MARKERS[1:])
        assert any("white space beside <|assistant|>" in note for note in found.notes)
        write_tokenizer(model, eats_space=False)
        assert read(model).notes == []

    def test_the_models_name_is_not_phi_3s_whose_tokens_llama_cpp_would_look_up(
        self, model: Path
    ) -> None:
        assert "phi" not in read(model).model_name.lower()

    def test_a_marker_that_is_not_called_special_is_one(self, model: Path) -> None:
        raw = json.loads((model / "tokenizer.json").read_text())
        added = {"id": 261, "content": "<|tool|>", "special": False, "normalized": False}
        other = {**added, "id": 262, "content": "word"}
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        raw["added_tokens"] += [{**added, **flags}, {**other, **flags}]
        (model / "tokenizer.json").write_text(json.dumps(raw))
        assert read(model).types[261:263] == [TokenType.CONTROL, TokenType.USER_DEFINED]


class TestLlama:
    def test_tokens_have_their_kinds(self, model: Path) -> None:
        write_llama(model)
        found = read(model)
        kinds = dict(zip(found.tokens, found.types, strict=True))
        assert {kinds[b] for b in BYTES} == {TokenType.BYTE}
        assert {kinds[m] for m in (*MARKERS, "<unk>", "<s>")} == {TokenType.CONTROL}
        assert kinds["</s>"] == TokenType.USER_DEFINED
        assert {kinds[t] for t in ("▁abc", "a")} == {TokenType.NORMAL}
        assert (found.model, found.pre, found.merges) == ("llama", "default", [])

    def test_scores_are_in_the_order_of_the_merges(self, model: Path) -> None:
        write_llama(model)
        found = read(model)
        scores = dict(zip(found.tokens, found.scores, strict=True))
        assert [scores[t] for t in ("▁a", "bc", "▁abc", "abc")] == [0, -1, -2, -3]
        assert max(scores[t] for t in ("▁", "a", "b", "c")) < -3

    def test_space_is_put_before_text_where_the_tokenizer_does(self, model: Path) -> None:
        write_llama(model)
        assert read(model).adds_space
        change(
            model / "tokenizer.json",
            normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        )
        assert not read(model).adds_space

    def test_the_models_name_lets_llama_cpp_eat_white_space_as_phi_3_does(
        self, model: Path
    ) -> None:
        write_llama(model)
        found = read(model)
        assert "Phi-3" in found.model_name
        assert found.notes == []

    def test_markers_that_eat_otherwise_than_phi_3s_are_noted(self, model: Path) -> None:
        write_llama(model, eats=MARKERS[2:])
        assert any("white space beside <|assistant|> " in note for note in read(model).notes)


class TestSpecialTokens:
    def test_have_the_ids_of_tokenizer_config(self, model: Path) -> None:
        write_llama(model)
        ids = {text: i for i, text in enumerate(read(model).tokens)}
        assert read(model).special_ids == {
            "bos": ids["<s>"],
            "eos": ids["<|endoftext|>"],
            "unk": ids["<unk>"],
            "pad": ids["<|endoftext|>"],
            "eot": ids["<|end|>"],
        }

    def test_take_the_end_from_the_model_where_the_tokenizer_tells_none(self, model: Path) -> None:
        change(model / "tokenizer_config.json", eos_token=None)
        assert read(model).special_ids["eos"] == 256

    @pytest.mark.parametrize("prefix", ["", "{{ bos_token }}"])
    def test_bos_is_added_where_the_chat_template_adds_it(self, model: Path, prefix: str) -> None:
        write_llama(model)
        settings = {"chat_template": prefix + TEMPLATE, "add_bos_token": not prefix}
        change(model / "tokenizer_config.json", **settings)
        found = read(model)
        assert found.adds_bos is bool(prefix)
        assert found.chat_template == prefix + TEMPLATE


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(model: Path, kind: str) -> None:
    vocab = {"a": 0, "<unk>": 1}
    of_kind = {
        "WordLevel": models.WordLevel(vocab, unk_token="<unk>"),
        "BPE": models.BPE(vocab=vocab, merges=[]),
    }
    Tokenizer(of_kind[kind]).save(str(model / "tokenizer.json"))
    with pytest.raises(ModelError, match=rf"holds a {kind} tokenizer.*merge --to hf instead"):
        read(model)
