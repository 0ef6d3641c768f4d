"""The plan, apart from any arithmetic: its items cover what queries see, once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention import Forest, Plan
from attention.order import depth_first
from attention.torch_backend.places import slots_of
from tests.attention.strategies import (
    LARGE,
    Node,
    build_forest,
    forests,
    level_forest,
    path_slots,
)

windows = st.none() | st.sampled_from((1, 2, 9, 33, 100))


def plan_of(forest: Forest, window: int | None = None) -> Plan:
    return attention.plan(
        forest,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        dtype=torch.float32,
        window=window,
    )


def seen_slots(forest: Forest, window: int | None) -> list[set[int]]:
    """For each query in packed order, the slots of the tokens it sees."""
    seen = []
    for leaf, query_len in zip(forest.leaf, forest.query_len, strict=True):
        path = path_slots(forest, int(leaf)).tolist()
        for position in range(len(path) - query_len, len(path)):
            first = 0 if window is None else max(0, position - window + 1)
            seen.append(set(path[first : position + 1]))
    return seen


@given(forests(), windows)
def test_items_cover_what_each_query_sees_exactly_once(
    forest: tuple[Forest, int], window: int | None
) -> None:
    plan = plan_of(forest[0], window)
    expected = seen_slots(forest[0], window)
    covered: list[list[int]] = [[] for _ in expected]
    rounds: set[tuple[int, int]] = set()
    for index in range(len(plan.work.items.segment)):
        item = plan.work.items.take(np.array([index]))
        slots = set(slots_of(plan.work.segments, item, item.kv_len).tolist())
        for query in range(int(item.row_begin[0]), int(item.row_end[0])):
            packed = int(plan.segments.query[query])
            if not item.masked[0]:
                assert slots <= expected[packed]
            covered[packed] += slots & expected[packed]
            assert (int(item.round[0]), query) not in rounds
            rounds.add((int(item.round[0]), query))
    for slots_of_query, expected_of_query in zip(covered, expected, strict=True):
        assert sorted(slots_of_query) == sorted(expected_of_query)


@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("shape", LARGE)
def test_items_of_a_round_have_no_query_in_common(shape: str, window: int | None) -> None:
    forest, _ = build_forest(16, *LARGE[shape])
    items = plan_of(forest, window).work.items
    order = np.lexsort((items.row_begin, items.round))
    items = items.take(order)
    same_round = items.round[1:] == items.round[:-1]
    assert (items.row_begin[1:] >= items.row_end[:-1])[same_round].all()


@given(forests(), windows)
def test_every_item_is_seen_by_some_query(forest: tuple[Forest, int], window: int | None) -> None:
    plan = plan_of(forest[0], window)
    expected = seen_slots(forest[0], window)
    items = plan.work.items
    for index in range(len(items.segment)):
        item = items.take(np.array([index]))
        slots = slots_of(plan.work.segments, item, item.kv_len)
        queries = range(items.row_begin[index], items.row_end[index])
        for slot in (int(slots[0]), int(slots[-1])):
            assert any(slot in expected[plan.segments.query[query]] for query in queries)


@given(forests())
def test_tokens_read_without_a_window(forest: tuple[Forest, int]) -> None:
    plan = plan_of(forest[0])
    seen = seen_slots(forest[0], None)
    assert plan.kv_tokens_read == len(set().union(*seen))
    path_len = forest[0].start + forest[0].length
    assert plan.kv_tokens_per_path == path_len[forest[0].leaf].sum()


def test_tokens_read_through_a_window() -> None:
    # Ten tokens are shared; a window of 6 on paths of 13 and 15 tokens starts at 7 and 9.
    forest, _ = build_forest(4, [Node(-1, 10), Node(0, 3), Node(0, 5)], [(1, 1), (2, 1)])
    plan = plan_of(forest, window=6)
    assert plan.kv_tokens_read == (10 - 7) + 3 + 5
    assert plan.kv_tokens_per_path == 6 + 6
    # Two queries see one token more than one does; no window reaches behind the first token.
    forest, _ = build_forest(4, [Node(-1, 10), Node(0, 3), Node(0, 5)], [(1, 2), (0, 10)])
    plan = plan_of(forest, window=6)
    assert plan.kv_tokens_read == 10 + 3
    assert plan.kv_tokens_per_path == 7 + 10


def test_decodes_read_each_node_once() -> None:
    forest, _ = level_forest([[100], [20, 30], [1, 2, 3, 4, 5, 6, 7, 8]])
    plan = plan_of(forest)
    assert len(plan.work.items.segment) == len(forest.parent)
    assert not plan.work.items.masked.any()
    assert plan.kv_tokens_read == 100 + 20 + 30 + 36
    assert plan.kv_tokens_per_path == 8 * 100 + 4 * 20 + 4 * 30 + 36


def test_a_node_no_sequence_passes_through_is_not_read() -> None:
    forest, _ = build_forest(4, [Node(-1, 5), Node(-1, 6), Node(0, 7), Node(0, 8)], [(2, 1)])
    plan = plan_of(forest)
    assert sorted(plan.segments.node.tolist()) == [0, 2]
    assert plan.kv_tokens_read == 12


@pytest.mark.parametrize("depth", [1, 300])
def test_a_deep_chain(depth: int) -> None:
    forest, _ = build_forest(4, [Node(i - 1, 2) for i in range(depth)], [(depth - 1, 1)] * 2)
    plan = plan_of(forest)
    assert plan.segments.round.tolist() == list(range(depth))
    assert plan.kv_tokens_read == 2 * depth


def test_depth_first_order_of_sequences() -> None:
    nodes = [Node(-1, 1), Node(-1, 1), Node(0, 1), Node(1, 1), Node(0, 1), Node(2, 1)]
    forest, _ = build_forest(4, nodes, [(3, 1), (5, 1), (4, 2), (2, 1), (1, 1), (0, 1)])
    order = depth_first(forest)
    # The root 0 has its own query, then those below node 2 (its own first), then those of node 4.
    assert order.packed.tolist() == [6, 4, 1, 2, 3, 5, 0]
    assert order.position.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert order.node.tolist() == [0, 2, 5, 4, 1, 3]
    assert np.column_stack((order.begin, order.end)).tolist() == [
        [0, 5],
        [1, 3],
        [2, 3],
        [3, 5],
        [5, 7],
        [6, 7],
    ]
    assert order.depth.tolist() == [0, 1, 2, 1, 0, 1]
