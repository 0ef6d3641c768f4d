"""Forests of block tables against a plain trie of their full blocks."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention import Forest, InvalidForest, block_tables, forest_from_block_tables


class Tables(NamedTuple):
    ids: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    block_size: int


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    """Tables of few ids, so that rows agree for a while, part, and meet the same ids again."""
    block_size = draw(st.integers(1, 4))
    max_blocks = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 2), min_size=max_blocks, max_size=max_blocks)
    rows = draw(st.lists(row, min_size=1, max_size=9))
    # Some rows are others, changed from some place on.
    for _ in range(draw(st.integers(0, 4))):
        of, place = draw(st.sampled_from(rows)), draw(st.integers(0, max_blocks))
        rows.append(of[:place] + draw(row)[place:])
    seq_lens = [draw(st.integers(1, max_blocks * block_size)) for _ in rows]
    query_lens = [draw(st.integers(1, length)) for length in seq_lens]
    ids = np.array(rows, np.int32)
    for index, length in enumerate(seq_lens):
        ids[index, -(-length // block_size) :] = draw(st.sampled_from((-1, 0, 7)))
    return Tables(
        ids,
        np.array(seq_lens, np.int32),
        np.cumsum([0, *query_lens], dtype=np.int32),
        block_size,
    )


def path(forest: Forest, node: int) -> list[int]:
    """Slots from the root to the end of a node."""
    slots: list[int] = []
    while node >= 0:
        assert forest.offset[node] == 0
        blocks = forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]].tolist()
        own = [b * forest.block_size + i for b in blocks for i in range(forest.block_size)]
        slots = own[: forest.length[node]] + slots
        node = int(forest.parent[node])
    return slots


@given(tables(), st.sampled_from((1, 8, 1 << 16)), st.sampled_from((1, 2, 256)))
def test_paths_are_those_of_the_tables_and_what_is_shared_stands_once(
    case: Tables, window: int, columns: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_tables, "_WINDOW", window)
        patch.setattr(block_tables, "_FIRST_COLUMNS", columns)
        forest = forest_from_block_tables(*case)
    forest.validate()
    assert forest.query_len.tolist() == np.diff(case.query_start_loc).tolist()
    block_size = case.block_size
    held = set()
    partial = 0
    shared_by: dict[tuple[int, ...], int] = {}
    for sequence, length in enumerate(case.seq_lens.tolist()):
        row = case.ids[sequence].tolist()
        slots = [row[i // block_size] * block_size + i % block_size for i in range(length)]
        assert path(forest, int(forest.leaf[sequence])) == slots
        full = length // block_size
        prefixes = [tuple(row[: place + 1]) for place in range(full)]
        held.update(prefixes)
        for prefix in prefixes:
            shared_by[prefix] = shared_by.get(prefix, 0) + 1
        partial += length % block_size > 0
    # Each distinct prefix of full blocks is one block of the forest, each partial block one more.
    assert len(forest.blocks) == len(held) + partial

    # And no node could be joined with its only child: one ends where sequences part or end.
    ends: dict[int, set[int]] = {}
    for node, parent in enumerate(forest.parent.tolist()):
        ends.setdefault(parent, set()).add(node)
    for node in range(len(forest.parent)):
        leaves = (forest.leaf == node).any()
        assert leaves or len(ends.get(node, ())) > 1


def test_where_tables_part() -> None:
    ids = np.array([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 2], [4, 6, 7, 8]], np.int32)
    forest = forest_from_block_tables(ids, np.array([16, 10, 14, 4]), np.arange(5), 4)
    # Block 9 of the second sequence and block 2 of the third are filled only in part.
    nodes = [
        (
            int(forest.parent[node]),
            int(forest.start[node]),
            int(forest.length[node]),
            forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]].tolist(),
        )
        for node in range(len(forest.parent))
    ]
    assert nodes == [
        (-1, 0, 8, [5, 6]),
        (0, 8, 4, [7]),
        (1, 12, 4, [8]),
        (0, 8, 2, [9]),
        (1, 12, 2, [2]),
        (-1, 0, 4, [4]),
    ]
    assert forest.leaf.tolist() == [2, 3, 4, 5]


def test_a_full_block_is_not_shared_with_one_being_filled() -> None:
    ids = np.array([[3, 1], [3, 1]], np.int32)
    forest = forest_from_block_tables(ids, np.array([8, 7]), np.arange(3), 4)
    assert forest.blocks.tolist() == [3, 1, 1]
    assert forest.length.tolist() == [4, 4, 3]
    # Filled by both, it is shared whole, and both end in one node.
    forest = forest_from_block_tables(ids, np.array([8, 8]), np.arange(3), 4)
    assert forest.blocks.tolist() == [3, 1]
    assert forest.leaf.tolist() == [0, 0]


@pytest.mark.parametrize("longest_first", [True, False])
def test_a_ladder_of_sequences(longest_first: bool) -> None:
    # Sequence s leaves the longest path at block s: one node a rung and one for each own rest.
    size = 300
    ids = np.tile(np.arange(size, dtype=np.int32), (size, 1))
    for row in range(size - 1):
        ids[row, row + 1 :] = size * (row + 1) + np.arange(size - row - 1)
    if longest_first:
        ids = ids[::-1]
    forest = forest_from_block_tables(ids, np.full(size, size), np.arange(size + 1), 1)
    forest.validate()
    assert len(forest.blocks) == len(np.unique(ids))
    for row in (0, 7, size - 1):
        assert path(forest, int(forest.leaf[row])) == ids[row].tolist()


def test_tensors_are_taken_as_arrays_are() -> None:
    ids = np.array([[5, 6, 7], [5, 6, 9]], np.int32)
    arrays = (ids, np.array([12, 11], np.int32), np.array([0, 1, 3], np.int32))
    expected = forest_from_block_tables(*arrays, 4)
    found = forest_from_block_tables(*map(torch.from_numpy, arrays), 4)
    for name, array in vars(expected).items():
        assert np.array_equal(getattr(found, name), array), name
    # Made for `attention.plan`, which reads blocks 5 and 6 once.
    plan = attention.plan(found, num_q_heads=2, num_kv_heads=1, head_dim=32, dtype=torch.float32)
    assert (plan.kv_tokens_read, plan.kv_tokens_per_path) == (8 + 4 + 3, 12 + 11)


GOOD: dict[str, Any] = {
    "block_tables": np.array([[5, 6, -1], [5, 6, 9]], np.int32),
    "seq_lens": np.array([7, 11]),
    "query_start_loc": np.array([0, 1, 3]),
    "block_size": 4,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a block size of nothing": ({"block_size": 0}, "block_size is 0"),
    "one dimension": ({"block_tables": np.arange(3)}, r"block_tables has shape \(3,\)"),
    "floating point": ({"block_tables": np.ones((2, 3))}, "block_tables has .* dtype float64"),
    "no sequence": ({"block_tables": np.ones((0, 3), np.int32)}, "block_tables is empty"),
    "lengths missing": ({"seq_lens": np.array([7])}, r"seq_lens has shape \(1,\), expected \(2,\)"),
    "floating lengths": ({"seq_lens": np.array([7.0, 11.0])}, "seq_lens has dtype float64"),
    "no token": ({"seq_lens": np.array([7, 0])}, r"seq_lens\[1\] is 0, expected from 1"),
    "beyond the table": ({"seq_lens": np.array([7, 13])}, r"seq_lens\[1\] is 13, .* 3 blocks of 4"),
    "ends missing": ({"query_start_loc": np.array([0, 1])}, "query_start_loc has shape"),
    "a first begin": ({"query_start_loc": np.array([1, 2, 3])}, r"query_start_loc\[0\] is 1"),
    "no query": ({"query_start_loc": np.array([0, 1, 1])}, "sequence 1 has 0 queries"),
    "more queries than tokens": (
        {"query_start_loc": np.array([0, 8, 9])},
        "sequence 0 has 8 queries .* its length 7",
    ),
    "padding within the length": ({"seq_lens": np.array([9, 11])}, r"block_tables\[0, 2\] is -1"),
    "an id beyond 32 bits": (
        {"block_tables": np.array([[5, 6, 7], [5, 6, 1 << 31]])},
        r"block_tables\[1, 2\] is 2147483648",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(case: str) -> None:
    changes, said = BAD[case]
    forest_from_block_tables(**GOOD)
    with pytest.raises(InvalidForest, match=said):
        forest_from_block_tables(**{**GOOD, **changes})
