"""Node sets: what is refused, and segments that hold every member once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention import InvalidForest, NodeSets
from attention.segments import segments_of


@st.composite
def node_sets(draw: st.DrawFn) -> NodeSets:
    """Sets of any membership: nodes at several positions, unused ones, one set for several."""
    block_size = draw(st.integers(1, 8))
    num_nodes = draw(st.integers(1, 6))
    length = np.array(draw(st.lists(st.integers(1, 20), min_size=num_nodes, max_size=num_nodes)))
    offset = np.array([draw(st.integers(0, block_size - 1)) for _ in range(num_nodes)], np.int32)
    block_ptr = np.append(0, np.cumsum(-(-(offset + length) // block_size)))
    pair = st.tuples(st.integers(0, num_nodes - 1), st.sampled_from((0, 0, 3, 11)))
    members = draw(st.lists(st.lists(pair, min_size=1, max_size=6, unique=True), min_size=1))
    return NodeSets(
        block_size=block_size,
        length=length,
        offset=offset,
        block_ptr=block_ptr,
        blocks=np.arange(block_ptr[-1], dtype=np.int32),
        member_ptr=np.cumsum([0, *map(len, members)]),
        member=np.array([node for of in members for node, _ in of], np.int32),
        member_start=np.array([start for of in members for _, start in of]),
        query_start=np.array([draw(st.integers(0, 30)) for _ in members]),
        query_len=np.array([draw(st.integers(1, 3)) for _ in members]),
    )


@given(node_sets())
def test_rows_are_exactly_the_members(sets: NodeSets) -> None:
    segments = segments_of(sets)
    expected: list[tuple[int, int, int, int]] = []
    query = 0
    for sequence, query_len in enumerate(sets.query_len.tolist()):
        of = range(sets.member_ptr[sequence], sets.member_ptr[sequence + 1])
        for ordinal in range(query_len):
            expected += [
                (int(sets.member[i]), int(sets.member_start[i]), query, position)
                for i in of
                for position in [int(sets.query_start[sequence]) + ordinal]
            ]
            query += 1
    found: list[tuple[int, int, int, int]] = []
    for index, (node, start) in enumerate(
        zip(segments.node.tolist(), segments.start.tolist(), strict=True)
    ):
        rows = range(segments.row_begin[index], segments.row_end[index])
        assert len(rows) > 0
        found += [
            (node, start, int(segments.query[row]), int(segments.position[row])) for row in rows
        ]
        assert segments.length[index] == sets.length[node]
        assert segments.offset[index] == sets.offset[node]
        assert segments.first_block[index] == sets.block_ptr[node]
    assert sorted(found) == sorted(expected)
    assert segments.num_queries == query
    # Every row is in one segment, one after the other.
    assert segments.row_begin.tolist() == [0, *segments.row_end[:-1].tolist()]
    assert segments.row_end[-1] == len(segments.query)
    # A pair of a node and a place is one segment, however many sequences have it.
    pairs = list(zip(segments.node.tolist(), segments.start.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


@given(node_sets())
def test_segments_of_one_round_have_no_query_in_common(sets: NodeSets) -> None:
    segments = segments_of(sets)
    seen: set[tuple[int, int]] = set()
    for index, current in enumerate(segments.round.tolist()):
        for row in range(segments.row_begin[index], segments.row_end[index]):
            pair = (current, int(segments.query[row]))
            assert pair not in seen
            seen.add(pair)
    # And none could stand in an earlier one.
    for index, current in enumerate(segments.round.tolist()):
        of = segments.query[segments.row_begin[index] : segments.row_end[index]].tolist()
        for earlier in range(current):
            assert any((earlier, query) in seen for query in of)


@given(node_sets())
def test_runs_are_consecutive_queries_of_one_sequence(sets: NodeSets) -> None:
    segments = segments_of(sets)
    sequence_of = np.repeat(np.arange(len(sets.query_len)), sets.query_len)
    begin = 0
    for end in segments.run_end.tolist():
        of = slice(begin, end)
        assert len(set(sequence_of[segments.query[of]].tolist())) == 1
        assert (np.diff(segments.query[of]) == 1).all()
        assert (np.diff(segments.position[of]) == 1).all()
        assert end - begin == sets.query_len[sequence_of[segments.query[begin]]]
        begin = end
    assert begin == len(segments.query)
    # Segments end where runs do.
    assert set(segments.row_end.tolist()) <= set(segments.run_end.tolist())


def test_parallel_contexts_need_as_many_rounds_as_a_sequence_has_members() -> None:
    # Four sequences on the same five nodes: each node is read once, for all.
    sets = NodeSets(
        block_size=4,
        length=np.full(5, 4),
        offset=np.zeros(5, np.int32),
        block_ptr=np.arange(6),
        blocks=np.arange(5, dtype=np.int32),
        member_ptr=np.arange(0, 21, 5),
        member=np.tile(np.arange(5, dtype=np.int32), 4),
        member_start=np.zeros(20, np.int64),
        query_start=np.full(4, 4),
        query_len=np.ones(4, np.int64),
    )
    segments = segments_of(sets)
    assert segments.node.tolist() == segments.round.tolist() == [0, 1, 2, 3, 4]
    assert (segments.row_end - segments.row_begin).tolist() == [4] * 5


@pytest.fixture
def sets() -> NodeSets:
    return NodeSets(
        block_size=4,
        length=np.array([4, 6]),
        offset=np.array([0, 1], np.int32),
        block_ptr=np.array([0, 1, 3]),
        blocks=np.array([7, 8, 9], np.int32),
        member_ptr=np.array([0, 2, 3]),
        member=np.array([0, 1, 1], np.int32),
        member_start=np.array([0, 4, 0]),
        query_start=np.array([9, 5]),
        query_len=np.array([1, 2]),
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an empty node": ({"length": np.array([4, 0])}, r"length\[1\] is 0, expected at least 1"),
    "an offset of a whole block": ({"offset": np.array([4, 1])}, r"offset\[0\] is 4, expected"),
    "a block too many": ({"block_ptr": np.array([0, 2, 3])}, "node 0 has 2 blocks, expected 1"),
    "a negative block": ({"blocks": np.array([7, -8, 9])}, r"blocks\[1\] is -8"),
    "no sequence": ({"query_len": np.array([], np.int64)}, "query_len is empty"),
    "starts missing": ({"query_start": np.array([9])}, r"query_start has shape \(1,\)"),
    "ends missing": ({"member_ptr": np.array([0, 3])}, r"member_ptr has shape \(2,\)"),
    "a first begin": ({"member_ptr": np.array([1, 2, 3])}, r"member_ptr\[0\] is 1, expected 0"),
    "no member": ({"member_ptr": np.array([0, 3, 3])}, "sequence 1 has 0 members, expected some"),
    "ends that descend": ({"member_ptr": np.array([0, 4, 3])}, "sequence 1 has -1 members"),
    "members missing": ({"member": np.array([0, 1])}, r"member has shape \(2,\), expected \(3,\)"),
    "member starts missing": ({"member_start": np.array([0, 1])}, "member_start has shape"),
    "a member that is no node": ({"member": np.array([0, 2, 1])}, r"member\[1\] is 2, expected a"),
    "a negative member": ({"member": np.array([0, 1, -1])}, r"member\[2\] is -1"),
    "a negative start": ({"member_start": np.array([0, -4, 0])}, r"member_start\[1\] is -4"),
    "a negative position": ({"query_start": np.array([9, -1])}, r"query_start\[1\] is -1"),
    "no query": ({"query_len": np.array([0, 2])}, r"query_len\[0\] is 0, expected at least 1"),
    "a node twice at one place": (
        {"member": np.array([1, 1, 1]), "member_start": np.array([4, 4, 4])},
        "sequence 0 has node 1 at position 4 twice",
    ),
    "floating point": ({"member": np.array([0.0, 1.0, 1.0])}, "member has dtype float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sets(sets: NodeSets, case: str) -> None:
    changes, said = BAD[case]
    sets.validate()
    with pytest.raises(InvalidForest, match=said):
        segments_of(replace(sets, **changes))


def test_block_ids_are_held_to_a_number_of_blocks(sets: NodeSets) -> None:
    sets.validate(10)
    with pytest.raises(InvalidForest, match=r"blocks\[2\] is 9, expected from 0 to below 9"):
        sets.validate(9)


def test_a_node_at_two_places_of_a_sequence_is_two_segments(sets: NodeSets) -> None:
    twice = replace(sets, member=np.array([1, 1, 1], np.int32))
    segments = segments_of(twice)
    assert segments.node.tolist() == [1, 1]
    assert segments.start.tolist() == [0, 4]
    assert segments.round.tolist() == [0, 1]
