"""Exact and near duplicates, and leaks, compared with a search over all pairs."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest

from phi3_lora.data.quality import duplicates
from phi3_lora.data.quality.duplicates import (
    SIMILARITY,
    Groups,
    NearIndex,
    can_find_near,
    conversation_text,
    exact_duplicates,
    word_triples,
)
from phi3_lora.data.quality.leakage import find_leaks
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import ConfigError

WORDS = [f"word{i}" for i in range(5000)]


def row(user: str, answer: str = "yes", system: str | None = None, line: int = 1) -> Conversation:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), f"d.jsonl:{line}")


def random_text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def changed(rng: random.Random, text: str, count: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), count):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def jaccard(one: str, two: str) -> float:
    a, b = word_triples(one), word_triples(two)
    return len(a & b) / len(a | b)


def found_in(texts: list[str]) -> list[tuple[int, int]]:
    return [(m.row, m.other) for m in NearIndex(texts).duplicates(0, len(texts))]


@pytest.mark.parametrize(
    ("one", "two", "is_equal"),
    [
        ("two  red\ncups ", " two red cups", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("two red cups", "Two red cups", False),
        ("two red cups", "two red cup", False),
    ],
)
def test_exact_duplicates_are_equal_but_for_white_space_and_unicode_form(
    one: str, two: str, is_equal: bool
) -> None:
    assert bool(exact_duplicates([row(one), row(two)])) is is_equal


def test_the_same_text_in_other_roles_or_cut_otherwise_is_no_duplicate() -> None:
    rows = [row("a", "b"), row("b", "a"), row("a", "b", system="s"), row("a b", "b"), row("a", "")]
    assert exact_duplicates(rows) == []


def test_each_repetition_names_the_first_of_its_kind() -> None:
    found = exact_duplicates([row("a"), row("b"), row("a"), row("b"), row("a")])
    assert [(m.row, m.other) for m in found] == [(2, 0), (3, 1), (4, 0)]


def test_near_duplicates_are_those_that_comparing_every_pair_finds() -> None:
    rng = random.Random(0)
    texts = [random_text(rng, 60) for _ in range(150)]
    texts += [changed(rng, rng.choice(texts), rng.randint(0, 8)) for _ in range(150)]
    rng.shuffle(texts)
    triples = [word_triples(text) for text in texts]
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if len(triples[i] & triples[j]) >= SIMILARITY * len(triples[i] | triples[j])
    ]
    expected, found = Groups(len(texts)), Groups(len(texts))
    for i, j in pairs:
        expected.join(i, j)
    for i, j in found_in(texts):
        found.join(i, j)
    assert 40 < len(pairs) < 150
    assert [found.find(i) for i in range(300)] == [expected.find(i) for i in range(300)]


def test_each_match_is_verified_and_carries_the_true_overlap() -> None:
    rng = random.Random(1)
    first = random_text(rng, 50)
    texts = [first, changed(rng, first, 1), changed(rng, first, 3), changed(rng, first, 5)]
    for match in NearIndex(texts).duplicates(0, len(texts)):
        assert match.similarity == jaccard(texts[match.row], texts[match.other]) >= SIMILARITY
    assert jaccard(first, texts[3]) < SIMILARITY


def test_case_and_punctuation_make_no_difference_but_words_do() -> None:
    assert found_in(["Send two red cups to Oslo!", "send two, red cups: to oslo"]) == [(1, 0)]
    assert found_in(["send two red cups to Oslo", "send six red cups to Bergen"]) == []


def test_short_texts_are_compared_by_their_words() -> None:
    assert found_in(["yes please", "Yes, please.", "no please", "please yes"]) == [(1, 0)]


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    one = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u4e00\u8d77\u53bb\u516c\u56ed\u73a9"
    assert found_in([one, one + "\u5427"]) == [(1, 0)]
    assert found_in([one, one[::-1]]) == []


@pytest.mark.parametrize("text", ["", "!?", "\U0001f600 \U0001f600", "\ud800"])
def test_texts_without_a_word_are_near_to_nothing(text: str) -> None:
    assert found_in([text, text, "a b c d", text]) == []


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    rng = random.Random(2)
    texts = [random_text(rng, 60)]
    for place in range(0, 40, 2):
        words = texts[-1].split()
        words[place] = "new"
        texts.append(" ".join(words))
    assert jaccard(texts[0], texts[-1]) < SIMILARITY
    groups = Groups(len(texts))
    for i, j in found_in(texts):
        groups.join(i, j)
    assert {groups.find(i) for i in range(len(texts))} == {0}


def test_rows_of_one_template_are_not_all_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(3)
    template, count = random_text(rng, 60), 1000
    compared = 0
    true_similarity = NearIndex._similarity

    def counted(self: NearIndex, one: int, other: int) -> float:
        nonlocal compared
        compared += 1
        return true_similarity(self, one, other)

    monkeypatch.setattr(NearIndex, "_similarity", counted)
    near = [f"{template} {random_text(rng, 4)}" for _ in range(count)]
    assert len(found_in(near)) == count - 1 and compared < 2 * count
    unlike = [f"{template} {random_text(rng, 12)}" for _ in range(count)]
    assert found_in(unlike) == [] and compared < 20 * count


def test_a_shared_system_message_makes_no_near_duplicates() -> None:
    rng = random.Random(4)
    system = random_text(rng, 200)
    rows = [row(random_text(rng, 10), random_text(rng, 10), system) for _ in range(20)]
    assert found_in([conversation_text(r) for r in rows]) == []


def test_the_signature_is_the_same_in_every_process() -> None:
    code = (
        "from phi3_lora.data.quality.duplicates import NearIndex;"
        "print(NearIndex(['two red cups to Oslo'])._signatures.tobytes().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_duplicates_are_looked_for_within_the_rows_asked_for() -> None:
    text = "please send two red cups to Oslo today"
    index = NearIndex([text, text, text + "!", "other words in this one row here"])
    assert [(m.row, m.other) for m in index.duplicates(1, 4)] == [(2, 1)]


def test_without_datasketch_the_line_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'phi3-lora\[data\]'.*--no-near"):
        NearIndex(["a"])
    monkeypatch.setattr(duplicates.importlib.util, "find_spec", lambda name: None)
    assert not can_find_near()


def test_groups_join_all_that_their_members_belong_to() -> None:
    groups = Groups(6)
    for pair in ((4, 5), (1, 2), (2, 4)):
        groups.join(*pair)
    assert [groups.find(i) for i in range(6)] == [0, 1, 1, 3, 1, 1]


def test_leaks_are_exact_and_near_with_the_most_similar_training_row() -> None:
    rng = random.Random(5)
    texts = [random_text(rng, 40) for _ in range(6)]
    train = [row(text, line=i) for i, text in enumerate(texts)]
    train.append(row(changed(rng, texts[2], 2), line=6))
    valid = [
        row(random_text(rng, 40)),
        row("  " + texts[1]),
        row(texts[2] + " more"),
        row(changed(rng, texts[3], 12)),
    ]
    found = find_leaks(train, valid, NearIndex.of_rows([*train, *valid]))
    assert [(m.row, m.other) for m in found] == [(1, 1), (2, 2)]
    assert found[0].similarity == 1.0 and SIMILARITY <= found[1].similarity < 1.0
    assert [m.is_exact for m in found] == [True, False]
    exact = find_leaks(train, valid, None)
    assert [(m.row, m.other) for m in exact] == [(1, 1)]


def test_repetitions_within_one_side_are_no_leaks() -> None:
    train, valid = [row("a b c d"), row("a b c d")], [row("e f g h"), row("e f g h")]
    assert find_leaks(train, valid, NearIndex.of_rows([*train, *valid])) == []
    assert find_leaks([row("a")], [], NearIndex.of_rows([row("a")])) == []


def call(name: str, line: int, **fields: Any) -> Conversation:
    calls = [{"id": f"call_{line}", "function": {"name": name, "arguments": {"city": "Oslo"}}}]
    messages = (
        {"role": "user", "content": "Two red cups to Oslo, as fast as you can."},
        {"role": "assistant", "content": "", "tool_calls": calls},
    )
    return Conversation(messages, f"d.jsonl:{line}", **fields)


def test_calls_of_other_tools_are_no_duplicates_but_their_ids_do_not_matter() -> None:
    rows = [call("order", 1), call("cancel", 2), call("order", 3)]
    assert [(m.row, m.other) for m in exact_duplicates(rows)] == [(2, 0)]
    assert "cancel" in conversation_text(rows[1])


def test_rows_that_may_call_other_tools_are_no_exact_duplicates() -> None:
    rows = [
        Conversation(({"role": "system", "content": "", "tools": tools}, *row("x").messages), "d:1")
        for tools in ('[{"name": "order"}]', '[{"name": "cancel"}]')
    ]
    assert not exact_duplicates(rows)
