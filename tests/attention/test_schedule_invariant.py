"""Batch-invariant schedules: a sequence's order of additions depends on nothing else planned."""

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Forest
from attention.errors import PlanFull, PlanMismatch
from attention.segments import segments_of
from attention.triton_backend.planner import Shape
from attention.triton_backend.work import TritonWork
from tests.attention.strategies import LARGE, Node, build_forest, forests, path_slots
from tests.attention.test_schedule import LEAN, check, node_sets, problem_of, windows

Steps = list[tuple[tuple[int, int], ...]]


def invariant_work(
    source: Forest, window: int | None, sink_tokens: int, lean_rows: int, block_n: int
) -> TritonWork:
    problem = dataclasses.replace(problem_of(window, sink_tokens), batch_invariant=True)
    shape = Shape(lean_rows, lean_rows, block_n, 4, LEAN)
    return TritonWork(problem, segments_of(source), shape=shape)


def order_of(work: TritonWork, block_n: int) -> dict[int, list[Steps]]:
    """For each query and partial: the (lane, slot) pairs that it sees in each step, if any."""
    schedule, problem = work.schedule, work.problem
    rows, entries = schedule.rows, schedule.entries
    (units,) = schedule.units
    steps_of: dict[int, Steps] = {}
    query_of: dict[int, int] = {}
    for unit in range(int(units.size)):
        begin, end = int(units.entry_begin[unit]), int(units.entry_end[unit])
        assert int(units.entry_mid[unit]) == begin
        width = 1 << int(units.log2_width[unit])
        assert (end - begin) * width % block_n == 0
        for row in range(int(units.row_begin[unit]), int(units.row_end[unit])):
            own = int(rows.position[row])
            steps: dict[int, list[tuple[int, int]]] = {}
            for entry in range(begin, end):
                if not int(entries.row_begin[entry]) <= row < int(entries.row_end[entry]):
                    continue
                for token in range(int(entries.length[entry])):
                    position = int(entries.position[entry]) + token
                    lane = (entry - begin) * width + token
                    in_window = problem.window is None or position > own - problem.window
                    if position <= own and (in_window or position < problem.sink_tokens):
                        slot = int(entries.slot[entry]) + token
                        steps.setdefault(lane // block_n, []).append((lane % block_n, slot))
            slot = int(rows.partial[row]) + int(units.ordinal[unit])
            assert slot not in steps_of
            steps_of[slot] = [tuple(steps[step]) for step in sorted(steps)]
            query_of[slot] = int(rows.query[row])
    orders = {}
    merges = schedule.merges
    for index in range(int(merges.size)):
        query = int(merges.query[index])
        slots = range(int(merges.begin[index]), int(merges.end[index]))
        assert all(query_of[slot] == query for slot in slots)
        orders[query] = [steps_of[slot] for slot in slots]
    return orders


def alone(forest: Forest, sequence: int) -> Forest:
    """The sequence without the others: its whole path as one node, in blocks of one token."""
    slots = path_slots(forest, int(forest.leaf[sequence]))
    return Forest(
        block_size=1,
        parent=np.array([-1], np.int32),
        start=np.array([0]),
        length=np.array([len(slots)]),
        offset=np.array([0], np.int32),
        block_ptr=np.array([0, len(slots)]),
        blocks=slots.astype(np.int32),
        leaf=np.array([0], np.int32),
        query_len=forest.query_len[sequence : sequence + 1],
    )


def assert_invariant(
    forest: Forest, window: int | None, sink_tokens: int, lean_rows: int, block_n: int
) -> None:
    orders = order_of(invariant_work(forest, window, sink_tokens, lean_rows, block_n), block_n)
    assert sorted(orders) == list(range(forest.num_queries))
    query = 0
    for sequence, count in enumerate(forest.query_len.tolist()):
        work = invariant_work(alone(forest, sequence), window, sink_tokens, 3, block_n)
        expected = order_of(work, block_n)
        assert [orders[query + i] for i in range(count)] == [expected[i] for i in range(count)]
        query += count


sinks = st.sampled_from((0, 3, 20))
tiles = st.sampled_from((1, 3, 16))
block_ns = st.sampled_from((4, 16, 64))


@settings(max_examples=40)
@given(forests(), windows, sinks, tiles, block_ns)
def test_alone_or_with_others_is_the_same(
    forest: tuple[Forest, int], window: int | None, sink_tokens: int, lean_rows: int, block_n: int
) -> None:
    assert_invariant(forest[0], window, sink_tokens, lean_rows, block_n)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("sink_tokens", [0, 5])
def test_over_chunks(window: int | None, sink_tokens: int) -> None:
    nodes = [Node(-1, 509), Node(0, 30), Node(1, 1100), Node(0, 2, shares_block=True), Node(3, 600)]
    forest, _ = build_forest(16, nodes, [(2, 1), (4, 3), (2, 12), (3, 1), (0, 2)])
    assert_invariant(forest, window, sink_tokens, 16, 64)


@settings(max_examples=40)
@given(forests() | node_sets(), windows, sinks, tiles, block_ns)
def test_every_query_sees_what_it_should(
    source: tuple[Forest, int], window: int | None, sink_tokens: int, lean_rows: int, block_n: int
) -> None:
    work = invariant_work(source[0], window, sink_tokens, lean_rows, block_n)
    check(work, segments_of(source[0]), source[1])


@settings(max_examples=40)
@given(forests(), forests(), windows, sinks, tiles, block_ns)
def test_updating_leaves_nothing_of_what_was_there(
    before: tuple[Forest, int],
    after: tuple[Forest, int],
    window: int | None,
    sink_tokens: int,
    lean_rows: int,
    block_n: int,
) -> None:
    work = invariant_work(before[0], window, sink_tokens, lean_rows, block_n)
    with contextlib.suppress(PlanFull):
        work.update(segments_of(after[0]))
        check(work, segments_of(after[0]), after[1])


def test_wide_entries_where_positions_and_slots_agree() -> None:
    forest, _ = build_forest(16, [Node(-1, 1024), Node(0, 64)], [(1, 1)])
    work = invariant_work(forest, None, 0, 16, 64)
    assert set(work.schedule.units[0].log2_width[:3].tolist()) == {4}


def test_nothing_is_reserved() -> None:
    forest, _ = build_forest(16, *LARGE["decodes of very different lengths"])
    problem = dataclasses.replace(problem_of(), batch_invariant=True)
    with pytest.raises(PlanMismatch, match=r"reserve is 1, expected 0 in a batch-invariant plan"):
        TritonWork(problem, segments_of(forest), 1, shape=Shape(4, 4, 64, 4, LEAN))
