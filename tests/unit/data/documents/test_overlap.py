"""The note on rows that are in both the training and the validation data."""

from __future__ import annotations

from phi3_lora.data.documents.overlap import DocumentIndex, overlap_note
from tests.tiny import random_documents


def test_shared_documents_are_counted_once_each_and_the_first_is_named() -> None:
    train = random_documents([5, 9, 9, 7, 5, 12])
    valid = [
        train[2]._replace(source="v:1"),
        *random_documents([9, 7], seed=5),
        train[4]._replace(source="v:4"),
        train[4]._replace(source="v:5"),
    ]
    note = overlap_note([*train, train[2]], valid)
    assert note is not None and note.startswith(
        "validation data: 2 of 4 different rows are in the training data, too"
    )
    assert f"(first v:1, trained on as {train[2].source})" in note


def test_data_without_shared_rows_has_no_note() -> None:
    assert overlap_note(random_documents([5, 9]), random_documents([5, 9], seed=5)) is None
    assert overlap_note([], random_documents([5])) is None
    assert overlap_note(random_documents([5]), []) is None


def test_documents_with_different_masks_are_equal() -> None:
    document = random_documents([8])[0]
    other = document._replace(supervised=~document.supervised)
    assert [source for _, source in DocumentIndex([document]).among([other])] == [document.source]
