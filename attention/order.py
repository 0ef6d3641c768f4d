"""The depth-first order of queries: under it, the queries that attend to a node are one range."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from attention.forest import ForestArrays, Int64Array


class QueryOrder(NamedTuple):
    """Queries of a forest in depth-first order.

    Attributes:
        packed: int64 [num_queries], place of each query in the packed order of the sequences.
        position: int64 [num_queries], position of each query in its path.
        sequence_end: int64 [S], end of each sequence's queries, sequences depth-first.
        begin, end: int64 [N], the range of queries that belong to sequences through each node.
        depth: int64 [N], 0 for roots.
    """

    packed: Int64Array
    position: Int64Array
    sequence_end: Int64Array
    begin: Int64Array
    end: Int64Array
    depth: Int64Array


def depth_first(forest: ForestArrays) -> QueryOrder:
    """Order the queries of a valid forest.

    O(N log N + num_queries), with a Python loop over the levels of the forest only.
    """
    depth = _depths(forest)
    begin, end = _query_ranges(forest, depth)

    sequences = np.argsort(begin[forest.leaf], kind="stable")
    leaf, query_len = forest.leaf[sequences], forest.query_len[sequences]
    sequence_end = np.cumsum(query_len)
    packed_end = np.cumsum(forest.query_len)[sequences]
    path_len = forest.start[leaf] + forest.length[leaf]
    queries = np.arange(sequence_end[-1])
    return QueryOrder(
        packed=queries + np.repeat(packed_end - sequence_end, query_len),
        position=queries + np.repeat(path_len - sequence_end, query_len),
        sequence_end=sequence_end,
        begin=begin,
        end=end,
        depth=depth,
    )


def _depths(forest: ForestArrays) -> Int64Array:
    """Number of ancestors of each node, by pointer doubling."""
    # Index -1 reads the entry behind the last node, which stands for "above the roots".
    ancestor = np.append(forest.parent, -1)
    depth = (ancestor >= 0).astype(np.int64)
    while ancestor.max() >= 0:
        depth += depth[ancestor]
        ancestor = ancestor[ancestor]
    return depth[:-1]


def _query_ranges(forest: ForestArrays, depth: Int64Array) -> tuple[Int64Array, Int64Array]:
    """First query of each node and the one behind its last, with the queries depth-first."""
    num_nodes = len(depth)
    by_level = np.argsort(depth * (num_nodes + 1) + forest.parent, kind="stable")
    parent = forest.parent[by_level]
    below_roots = [slice(a, b) for a, b in pairwise(np.cumsum(np.bincount(depth)).tolist())]

    # One entry more than nodes: index -1, the parent of the roots, is the forest itself.
    own = np.zeros(num_nodes + 1, np.int64)
    np.add.at(own, forest.leaf, forest.query_len)
    count = own.copy()
    for level in reversed(below_roots):
        np.add.at(count, parent[level], count[by_level[level]])

    # A node's own queries come first, then those of its children, sibling after sibling.
    counts = count[by_level]
    before = np.cumsum(counts) - counts
    first_sibling = np.append(0, np.flatnonzero(parent[1:] != parent[:-1]) + 1)
    siblings = np.diff(first_sibling, append=num_nodes)
    begin = np.zeros(num_nodes + 1, np.int64)
    begin[by_level] = before - np.repeat(before[first_sibling], siblings) + own[parent]
    for level in below_roots:
        begin[by_level[level]] += begin[parent[level]]
    return begin[:-1], (begin + count)[:-1]
