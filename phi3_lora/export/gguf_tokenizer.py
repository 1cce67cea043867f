"""Conversion of a model folder's tokenizer to the keys of a GGUF file.

Source: llama.cpp, convert_hf_to_gguf.py (Phi3MiniModel.set_vocab, get_vocab_base) for what is
written, src/llama-vocab.cpp for how it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

from phi3_lora.data.chat.template import special_token_strings, template_source
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.errors import ModelError
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.json_file import read_json

_KINDS = ("bos", "eos", "unk", "pad")
_ADDED_SCORE = -1000.0
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "dbrx": rf"{_ENDINGS}|{_LEAD}\p{{L}}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": rf"{_LEAD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""llama.cpp's name of a pre-tokenizer -> its pattern. Phi-4 has dbrx, Phi-4-mini gpt-4o."""
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n\U0001f680 (normal) \u2705 \U0001f999\U0001f999 "
    "3 33 333 3333 33333 333333 3.3 3..3 3...3 \u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e "
    "------======= \u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL camelCaseWords HTTPServer path/to//x/\n  end"
)
"""Text that every pre-tokenizer splits differently, modelled on llama.cpp's own."""
_PHI3_NAMED = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})
"""Tokens that llama.cpp looks up in a model named Phi-3; it fails if one is missing."""
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class TokenType(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    CONTROL = 3
    """Recognised by its text; not shown in answers."""
    USER_DEFINED = 4
    """Recognised by its text; shown in answers."""
    UNUSED = 5
    BYTE = 6


class GgufVocabulary(NamedTuple):
    """The keys tokenizer.ggml.* of a GGUF file, and notes on differences in llama.cpp."""

    model: str
    """llama (merges by score, bytes as <0xNN>) or gpt2 (merges by rank, on bytes)."""
    pre: str
    tokens: list[str]
    """One for each row of the embedding; rows without a token are [PADn]."""
    types: list[int]
    scores: list[float]
    """Merge scores for llama; empty for gpt2."""
    merges: list[str]
    """Merges by rank for gpt2; empty for llama."""
    special_ids: dict[str, int]
    """Token ids by the names bos, eos, unk, pad and eot."""
    adds_bos: bool
    """True if the chat template starts with the bos token."""
    adds_space: bool
    chat_template: str
    model_name: str
    """Name of the model; llama.cpp strips white space after markers by this name."""
    eating: frozenset[str]
    """Markers after which the tokenizer strips white space."""
    notes: list[str]
    """Differences between llama.cpp and this tokenizer, one sentence each."""


def read_vocabulary(model_dir: Path, config: ModelConfig) -> GgufVocabulary:
    """Read the tokenizer of a model folder for a GGUF file.

    Raises:
        ModelError: when a file is missing or damaged, or llama.cpp has no such tokenizer.
    """
    chat = ChatTokenizer(model_dir, vocab_size=config.vocab_size)
    raw = read_json(model_dir / "tokenizer.json")
    settings_path = model_dir / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    kind = _kind(raw, model_dir)
    notes: list[str] = []
    tokens, types = _tokens(raw, config.vocab_size)
    scores, merges, pre = [], [], "default"
    if kind == "llama":
        scores = _scores(raw, tokens, types)
    else:
        merges = [" ".join(pair) for pair in _merges(raw)]
        pre = _pre_tokenizer(model_dir, raw, notes)
    strings = special_token_strings(settings)
    ids = {text: i for i, text in enumerate(tokens)}
    special = {name: ids.get(strings.get(f"{name}_token", "")) for name in _KINDS}
    special["eot"] = chat.end_of_turn_id
    if special["eos"] is None:
        # If the key is missing, llama.cpp uses id 11 (gpt2) or 2 (llama).
        special["eos"] = min(config.stop_ids, default=chat.end_of_turn_id)
    start = chat.template.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    bos = strings.get("bos_token", "")
    return GgufVocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=[int(t) for t in types],
        scores=scores,
        merges=merges,
        special_ids={name: i for name, i in special.items() if i is not None},
        adds_bos=bool(bos) and start.startswith(bos),
        adds_space=kind == "llama" and _prepends_space(raw),
        chat_template=template_source(model_dir, settings),
        model_name=_model_name(raw, kind, notes),
        eating=_eating(raw),
        notes=notes,
    )


def _parts(raw: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """List the steps of a tokenizer's normalizer or pre_tokenizer."""
    step = raw.get(name) or {}
    inner = step.get("normalizers") or step.get("pretokenizers")
    return list(inner) if inner else [step] if step else []


def _kind(raw: Mapping[str, Any], model_dir: Path) -> str:
    model = raw.get("model") or {}
    if model.get("type") == "BPE":
        if any(step.get("type") == "ByteLevel" for step in _parts(raw, "pre_tokenizer")):
            return "gpt2"
        if model.get("byte_fallback"):
            return "llama"
    raise ModelError(
        f"{model_dir}/tokenizer.json holds a {model.get('type')} tokenizer that llama.cpp does not "
        "have for Phi-3: it must be a byte-level BPE (Phi-4) or a BPE with byte_fallback (Phi-3); "
        "merge --to hf instead"
    )


def _merges(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return merges in order of rank; a file holds each as a text or a list."""
    found = []
    for pair in raw["model"].get("merges") or []:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        found.append((left, right))
    return found


def _tokens(raw: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    is_byte = raw["model"].get("byte_fallback")
    for text, i in raw["model"]["vocab"].items():
        tokens[i], types[i] = text, TokenType.NORMAL
        if is_byte and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = TokenType.BYTE
    for token in raw.get("added_tokens") or []:
        tokens[token["id"]] = token["content"]
        special = token.get("special") or _looks_special(token["content"])
        types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Return whether a token looks special; Phi-4-mini's file does not flag its tool tokens."""
    return text.startswith("<|") and text.endswith("|>")


def _scores(
    raw: Mapping[str, Any], tokens: Sequence[str], types: Sequence[TokenType]
) -> list[float]:
    """Compute llama.cpp's merge scores: minus the rank of the first merge to a token.

    A tokenizer.json holds no scores; its merges are in the order of SentencePiece's scores.
    """
    order: dict[str, int] = {}
    for left, right in _merges(raw):
        order.setdefault(left + right, len(order))
    scores = []
    for text, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL:
            # A token without a merge is a single character.
            scores.append(-float(order.setdefault(text, len(order))))
        else:
            scores.append(0.0 if kind == TokenType.BYTE else _ADDED_SCORE)
    return scores


def _prepends_space(raw: Mapping[str, Any]) -> bool:
    if any(step.get("type") == "Prepend" for step in _parts(raw, "normalizer")):
        return True
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _parts(raw, "pre_tokenizer")
    )


def _pre_tokenizer(model_dir: Path, raw: Mapping[str, Any], notes: list[str]) -> str:
    """Find llama.cpp's name of a byte-level tokenizer's pre-tokenizer.

    llama.cpp's converter hashes the token ids of a probe text. This function compares the pieces
    of the text, which do not depend on the vocabulary.
    """
    if raw.get("normalizer"):
        notes.append("llama.cpp does not normalize text as this tokenizer does")
    if raw["model"].get("ignore_merges"):
        notes.append("llama.cpp merges some words to other tokens: the tokenizer ignores merges")
    own = _pieces(Tokenizer.from_file(str(model_dir / "tokenizer.json")).pre_tokenizer)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, pattern in _SPLITS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        if own == _pieces(pre_tokenizers.Sequence([split, to_bytes])):
            return name
    notes.append(
        f"llama.cpp splits differently: the tokenizer's pattern is not in {', '.join(_SPLITS)}"
    )
    return "default"


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(_PROBE)]


def _eating(raw: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(t["content"] for t in raw.get("added_tokens") or [] if t.get("rstrip"))


def _model_name(raw: Mapping[str, Any], kind: str, notes: list[str]) -> str:
    """Choose a model name for which llama.cpp strips white space like the tokenizer."""
    added = raw.get("added_tokens") or []
    contents = {token["content"] for token in added}
    eating = _eating(raw)
    named = bool(eating) and kind == "llama" and contents >= _PHI3_NAMED
    missed = set(eating ^ (contents - _PHI3_KEEPS_SPACE) if named else eating)
    missed |= {token["content"] for token in added if token.get("lstrip")}
    if missed:
        shown = ", ".join(sorted(missed)[:5])
        notes.append(
            f"llama.cpp treats white space beside {shown} otherwise than this tokenizer: write "
            "prompts without any there (the Modelfile's template does)"
        )
    return "Phi-3 fine-tuned" if named else "fine-tuned"
