"""Short segments joined to those below: each row reads the same tokens, in fewer pieces."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import Forest
from attention.problem import Problem
from attention.segments import Segments, segments_of
from attention.torch_backend import joined
from attention.torch_backend.joined import join_short
from tests.attention.checks import assert_as_good_as_flat, plan_of
from tests.attention.strategies import Case, Node, build_forest, cases, forests, tensors

# 4 KiB of KV a token, results of 2 KiB a row.
PROBLEM = Problem(
    8, 4, 128, 128, torch.float32, torch.float32, torch.device("cpu"), "NHD", None, 0, False
)


def row_tokens(segments: Segments) -> list[list[tuple[int, int, float]]]:
    """For each row, (position, slot, log-weight) of the tokens it reads, segment by segment."""
    rows: list[list[tuple[int, int, float]]] = [[] for _ in segments.query]
    block_size, weights = segments.block_size, segments.log_weight
    for index in np.argsort(segments.round, kind="stable").tolist():
        start, length = int(segments.start[index]), int(segments.length[index])
        token = int(segments.offset[index]) + np.arange(length)
        block = segments.blocks[segments.first_block[index] + token // block_size]
        slots = (block.astype(np.int64) * block_size + token % block_size).tolist()
        weight = 0.0 if weights is None else float(weights[index])
        read = [(start + place, slot, weight) for place, slot in enumerate(slots)]
        for row in range(segments.row_begin[index], segments.row_end[index]):
            rows[row] += read
    return rows


@given(forests(), st.sampled_from((0, 4, 1 << 20)), st.booleans())
def test_each_row_reads_the_same_tokens(
    forest: tuple[Forest, int], bytes_a_number: int, weighed: bool
) -> None:
    weight = np.arange(len(forest[0].length)) // 3.0 if weighed else None
    segments = segments_of(forest[0], log_weight=weight)
    with patch.object(joined, "BYTES_A_NUMBER", bytes_a_number):
        result = join_short(PROBLEM, segments)
    assert row_tokens(result) == row_tokens(segments)
    assert (result.row_begin[1:] >= result.row_begin[:-1]).all()
    below = result.parent >= 0
    above = result.parent[below]
    assert (result.start[below] == (result.start + result.length)[above]).all()
    assert (result.start[~below] == 0).all()
    assert (result.round[below] > result.round[above]).all()


@given(cases())
def test_as_good_as_flat_attention_where_all_that_can_be_is_joined(case: Case) -> None:
    with patch.object(joined, "BYTES_A_NUMBER", 1 << 20):
        assert_as_good_as_flat(case, tensors(case))


def lengths(
    nodes: list[Node], sequences: dict[int, int], temperature: list[float] | None = None
) -> list[int]:
    """Lengths of the segments of a forest with so many sequences of one query on each leaf."""
    leaves = [(leaf, 1) for leaf, count in sequences.items() for _ in range(count)]
    forest, _ = build_forest(16, nodes, leaves)
    weights = None if temperature is None else np.array(temperature)
    return join_short(PROBLEM, segments_of(forest, temperature=weights)).length.tolist()


def test_a_short_node_goes_to_its_children_if_the_results_of_its_rows_cost_more() -> None:
    # A token more costs as much as the result of a row.
    nodes = [Node(-1, 16), Node(0, 32), Node(0, 48)]
    assert lengths(nodes, {1: 8, 2: 8}) == [48, 64]
    assert lengths(nodes, {1: 8, 2: 7}) == [16, 32, 48]
    nodes = [Node(-1, 16), Node(0, 16), Node(0, 16), Node(0, 16)]
    assert lengths(nodes, {1: 11, 2: 11, 3: 10}) == [32, 32, 32]
    assert lengths(nodes, {1: 11, 2: 11, 3: 9}) == [16, 16, 16, 16]


def test_what_has_been_joined_counts_for_the_nodes_below() -> None:
    nodes = [Node(-1, 16), Node(0, 16), Node(0, 16), *(Node(n, 16) for n in (1, 1, 2, 2))]
    assert lengths(nodes, dict.fromkeys((3, 4, 5, 6), 8)) == [32, 16, 16, 32, 16, 16]
    assert lengths(nodes, dict.fromkeys((3, 4, 5, 6), 16)) == [48, 48, 48, 48]


def test_a_chain_is_one_segment_where_its_blocks_go_on() -> None:
    assert lengths([Node(-1, 20), Node(0, 30, shares_block=True), Node(1, 3)], {2: 1}) == [50, 3]
    assert lengths([Node(-1, 20), Node(0, 30)], {1: 1}) == [20, 30]
    assert lengths([Node(-1, 32), Node(0, 30, offset=1)], {1: 1}) == [32, 30]


@pytest.mark.parametrize(
    ("nodes", "sequences", "temperature"),
    [
        # 64 tokens are read in place by themselves.
        ([Node(-1, 64), Node(0, 16)], {1: 1}, None),
        ([Node(-1, 16), Node(0, 64)], {1: 1}, None),
        # A sequence ends at the upper one.
        ([Node(-1, 16), Node(0, 16)], {0: 1, 1: 1}, None),
        ([Node(-1, 16), Node(0, 16)], {1: 1}, [1.0, 2.0]),
    ],
)
def test_what_stays_apart(
    nodes: list[Node], sequences: dict[int, int], temperature: list[float] | None
) -> None:
    assert lengths(nodes, sequences, temperature) == [node.length for node in nodes]


def test_a_plan_reads_what_is_joined() -> None:
    forest, num_blocks = build_forest(
        16, [Node(-1, 16), Node(0, 16), Node(0, 32)], [(leaf, 1) for leaf in [1, 2] * 8]
    )
    case = Case(forest, num_blocks, num_q_heads=8, num_kv_heads=4, head_dim=128)
    assert plan_of(case).work.items.kv_len.tolist() == [32, 48]
    in_own_chunks = Case(**{**vars(case), "batch_invariant": True})
    assert plan_of(in_own_chunks).work.segments.length.tolist() == [16, 16, 32]
    assert_as_good_as_flat(case, tensors(case))
