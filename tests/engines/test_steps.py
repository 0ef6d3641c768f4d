"""The decode step after the one before, against a loop over tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefixtree.engines.steps import grew_by_a_token, slots_of_last

SIZES = st.sampled_from([1, 2, 3])
ROWS = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(0, 2), min_size=8, max_size=8)),
    min_size=1,
    max_size=3,
)


@given(
    rows=ROWS,
    size=SIZES,
    grown=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    changes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=2),
    columns=st.integers(8, 9),
)
def test_only_more_of_the_same_follows(
    rows: list[tuple[int, list[int]]],
    size: int,
    grown: list[int],
    changes: list[tuple[int, int]],
    columns: int,
) -> None:
    lengths_before = np.array([length for length, _ in rows])
    tables_before = np.array([table for _, table in rows], np.int32)
    by = np.array(grown[: len(rows)]) if min(grown) else np.ones(len(rows), int)
    lengths = lengths_before + by
    tables = np.full((len(rows), columns), 9, np.int32)
    tables[:, :8] = tables_before
    for row, column in changes:
        tables[row % len(rows), column] = 7
    same = all(
        tables[row, at // size] == tables_before[row, at // size]
        for row, length in enumerate(lengths_before)
        for at in range(length)
    )
    expected = same and (by == 1).all()
    assert grew_by_a_token(tables, lengths, tables_before, lengths_before, size) == expected


def test_other_rows_do_not_follow() -> None:
    tables, lengths = np.zeros((2, 4), np.int32), np.array([3, 4])
    assert grew_by_a_token(tables, lengths + 1, tables, lengths, 2)
    assert not grew_by_a_token(tables, lengths + 1, tables[:1], lengths[:1], 2)
    assert not grew_by_a_token(tables, lengths, tables, lengths, 2)


@given(rows=ROWS, size=SIZES)
def test_the_slot_of_the_last_token(rows: list[tuple[int, list[int]]], size: int) -> None:
    tables = np.array([table for _, table in rows], np.int32)
    lengths = np.array([length for length, _ in rows], np.int32)
    slots = [table[(length - 1) // size] * size + (length - 1) % size for length, table in rows]
    assert slots_of_last(tables, lengths, size).tolist() == slots
