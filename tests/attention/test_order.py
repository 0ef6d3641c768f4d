"""The depth-first order against a plain recursion, and the segments that follow from it."""

import numpy as np
import pytest
from hypothesis import given

from attention import Forest
from attention.order import depth_first
from attention.segments import segments_of
from tests.attention.strategies import LARGE, Node, build_forest, forests, with_sequences


def expected_order(forest: Forest) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int]]]:
    """(node, begin, end, depth) in preorder, and (packed place, position) of each query."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(forest.parent.tolist()):
        children.setdefault(parent, []).append(node)
    first_query = np.cumsum(forest.query_len) - forest.query_len
    path_len = forest.start + forest.length
    nodes: list[tuple[int, int, int, int]] = []
    queries: list[tuple[int, int]] = []

    def visit(node: int, depth: int) -> None:
        place, begin = len(nodes), len(queries)
        nodes.append((node, 0, 0, 0))
        for sequence in np.flatnonzero(forest.leaf == node).tolist():
            length = int(forest.query_len[sequence])
            queries.extend(
                (int(first_query[sequence]) + i, int(path_len[node]) - length + i)
                for i in range(length)
            )
        for child in children.get(node, []):
            visit(child, depth + 1)
        nodes[place] = (node, begin, len(queries), depth)

    for root in children[-1]:
        visit(root, 0)
    return nodes, queries


def assert_depth_first(forest: Forest) -> None:
    nodes, queries = expected_order(forest)
    order = depth_first(forest)
    columns = order.node, order.begin, order.end, order.depth
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == nodes
    parents = [-1 if above < 0 else order.node[above] for above in order.parent]
    assert parents == forest.parent[order.node].tolist()
    assert list(zip(order.packed.tolist(), order.position.tolist(), strict=True)) == queries
    lengths = np.diff(order.sequence_end, prepend=0)
    assert sorted(lengths.tolist()) == sorted(forest.query_len.tolist())

    used = [node for node in nodes if node[1] < node[2]]
    segments = segments_of(forest)
    columns = (segments.node, segments.row_begin, segments.row_end, segments.round)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == used
    assert (segments.start == forest.start[segments.node]).all()
    assert (segments.length == forest.length[segments.node]).all()
    assert (segments.offset == forest.offset[segments.node]).all()
    assert (segments.first_block == forest.block_ptr[segments.node]).all()


@given(forests())
def test_order_of_any_forest(built: tuple[Forest, int]) -> None:
    forest, _ = built
    assert_depth_first(forest)
    # The same sequences, all of them decoding, or with two queries at most.
    path_len = forest.start + forest.length
    for most in (1, 2):
        sequences = [(leaf, min(most, path_len[leaf])) for leaf in forest.leaf.tolist()]
        assert_depth_first(with_sequences(forest, sequences))


@pytest.mark.parametrize("shape", LARGE)
def test_order_of_large_forests(shape: str) -> None:
    assert_depth_first(build_forest(16, *LARGE[shape])[0])


def test_more_nodes_than_16_bits() -> None:
    # Roots of two nodes each, all children behind all roots, in opposite order.
    roots = 40_000
    nodes = [Node(-1, 1)] * roots + [Node(roots - 1 - i, 1) for i in range(roots)]
    sequences = [(roots + i, 1) for i in range(0, roots, 1000)] * 2
    forest, _ = build_forest(4, nodes, sequences)
    order = depth_first(forest)
    expected = np.column_stack((np.arange(roots), np.arange(2 * roots - 1, roots - 1, -1)))
    assert (order.node == expected.ravel()).all()
    assert (np.diff(order.begin) >= 0).all()
    assert order.depth.tolist() == [0, 1] * roots
    # Two sequences on each leaf, the leaves of the last roots first in the packed order.
    leaves = len(sequences) // 2
    assert order.packed.reshape(-1, 2).tolist() == [
        [leaves - 1 - i, 2 * leaves - 1 - i] for i in range(leaves)
    ]


def test_a_chain_of_ten_thousand() -> None:
    depth = 10_000
    chain = [Node(i - 1, 1) for i in range(depth)]
    forest, _ = build_forest(4, chain, [(depth - 1, 1), (0, 1), (depth // 2, 3)])
    order = depth_first(forest)
    assert order.node.tolist() == order.depth.tolist() == list(range(depth))
    assert order.packed.tolist() == [1, 2, 3, 4, 0]
    assert order.begin[[0, 1, depth // 2, depth // 2 + 1]].tolist() == [0, 1, 1, 4]
    assert (order.end == 5)[1:].all()
