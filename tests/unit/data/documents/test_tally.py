"""Tallies: parts add up to the whole, and each note names the right total."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora.data.documents import tally as tallies
from phi3_lora.data.documents.overlap import overlap_note
from phi3_lora.data.documents.tally import Tally
from tests.tiny import random_documents

KINDS = [
    tallies.BAD,
    tallies.DROPPED,
    tallies.NO_LOSS_TOKENS,
    tallies.HAS_MARKER_TEXT,
    tallies.LEAKED,
]


def counted(kinds: list[str | None], start: int = 1) -> Tally:
    """Return the tally of one row of each kind, named by its number."""
    tally = Tally()
    for number, kind in enumerate(kinds, start):
        tally += Tally(num_rows=1, longest=number if kind == tallies.DROPPED else 0)
        tally = tally.plus(kind, 1, [f"a:{number}"]) if kind else tally
    return tally


@given(kinds=st.lists(st.sampled_from([None, *KINDS]), max_size=40), cut=st.integers(0, 40))
def test_parts_add_up_to_the_whole(kinds: list[str | None], cut: int) -> None:
    whole = counted(kinds)
    assert counted(kinds[:cut]) + counted(kinds[cut:], 1 + len(kinds[:cut])) == whole
    assert whole + Tally() == Tally() + whole == whole
    kept = json.loads(json.dumps(whole.to_dict()))
    assert Tally.from_dict(kept) == whole


def test_each_note_names_the_total_of_its_kind() -> None:
    kinds = [
        None,
        tallies.BAD,
        tallies.DROPPED,
        tallies.NO_LOSS_TOKENS,
        tallies.HAS_MARKER_TEXT,
        tallies.LEAKED,
    ]
    notes = counted([*kinds, tallies.DROPPED, tallies.LEAKED]).notes(
        "d", limit="9 tokens", too_long="drop"
    )
    assert notes == [
        "d: skipped 1 bad row(s):\n  a:2",
        "d: dropped 2 of 7 rows longer than 9 tokens (longest 7; first a:3)",
        "d: dropped 1 of 7 rows without a supervised token (first a:4)",
        "d: 1 of 4 rows hold markers as text, kept as text (first a:5)",
        "d: 2 of 4 rows are in the validation data, too, so its loss is too low (first a:6)",
    ]


@pytest.mark.parametrize("values", [{"num_rows": -1}, {"longest": True}, {"x": 1}, [], None])
def test_a_damaged_tally_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="not counts of rows"):
        Tally.from_dict(values)


def test_a_document_that_is_trained_on_twice_is_one_that_is_shared() -> None:
    valid = random_documents([5, 9])
    train = [valid[0]._replace(source=f"t:{i}") for i in range(3)]
    note = overlap_note(train, valid)
    assert note is not None and ": 1 of 2 different rows" in note


def test_a_checkpoint_keeps_the_keys_that_older_ones_have() -> None:
    stored = Tally(num_rows=3, num_stripped=2).plus(tallies.STRIPPED_WHITESPACE, 1, ["a:1"])
    assert stored.to_dict() == {
        "num_rows": 3,
        "longest": 0,
        "num_eaten": 2,
        "counts": {"eaten": 1},
        "first": {"eaten": ["a:1"]},
    }
    kinds = (tallies.HAS_MARKER_TEXT, tallies.NO_LOSS_TOKENS, tallies.SYSTEM_DROPPED)
    assert kinds == ("marked", "silent", "systemless")
