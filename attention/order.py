"""The depth-first order of queries: under it, the queries that attend to a node are one range."""

from typing import NamedTuple

import numpy as np

from attention.forest import ForestArrays, Int32Array, Int64Array


class QueryOrder(NamedTuple):
    """Nodes and queries of a forest, depth-first: a node's own queries before its children's.

    Attributes:
        packed: int64 [num_queries], place of each query in the packed order of the sequences.
        position: int64 [num_queries], position of each query in its path.
        sequence_end: int64 [S], end of each sequence's queries, sequences depth-first.
        node: int64 [N], the nodes in preorder, siblings in the order of their indices.
        parent: int64 [N], place of each one's parent among them, -1 for roots.
        begin, end: int64 [N], the range of queries that belong to sequences through `node`.
        depth: int64 [N], number of ancestors of `node`.
    """

    packed: Int64Array
    position: Int64Array
    sequence_end: Int64Array
    node: Int64Array
    parent: Int64Array
    begin: Int64Array
    end: Int64Array
    depth: Int64Array


def depth_first(forest: ForestArrays) -> QueryOrder:
    """Order the nodes and queries of a valid forest.

    O(N log N + num_queries), without a Python loop over nodes or levels.
    """
    place, size, above = _preorder(forest.parent)
    num_nodes = len(size)
    nodes = np.arange(num_nodes)
    node = np.empty_like(nodes)
    node[place] = nodes
    subtree_end = size.take(node)
    subtree_end += nodes
    # Of the subtrees that begin before a node, those of its ancestors have not ended.
    ended = np.bincount(subtree_end).cumsum()

    leaf = forest.leaf
    leaf_place = place.take(leaf)
    queries_before = np.zeros(num_nodes + 1, np.int64)
    np.add.at(queries_before[1:], leaf_place, forest.query_len)
    queries_before = queries_before.cumsum()

    sequences = _sorted(leaf_place, num_nodes)
    path_len = (forest.start + forest.length).take(leaf)
    packed, position, sequence_end = _queries(sequences, forest.query_len, path_len)
    return QueryOrder(
        packed=packed,
        position=position,
        sequence_end=sequence_end,
        node=node,
        parent=above.take(node),
        begin=queries_before[:-1],
        end=queries_before.take(subtree_end),
        depth=nodes - ended[:-1],
    )


def _preorder(parent_of: Int32Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Place of each node in preorder, the size of its subtree, and its parent's place or -1.

    Sums over subtrees and over paths are taken by pointer doubling (Hillis and Steele 1986).
    """
    # Node i is i + 1 here; 0 is the root above the roots, and its own parent.
    parent = np.zeros(len(parent_of) + 1, np.int64)
    np.add(parent_of, 1, out=parent[1:])
    size = np.ones(len(parent), np.int64)
    ancestor, ancestors = parent, []
    while np.count_nonzero(ancestor):
        ancestors.append(ancestor)
        np.add.at(size, ancestor, size.copy())
        ancestor = ancestor.take(ancestor)
    size[0] = len(size)

    # A node is behind its parent by 1 and the subtrees of its earlier siblings: among the subtrees
    # of all children, those before it but for the children of earlier nodes.
    children = _sorted(parent, len(parent))
    sizes = size.take(children)
    sizes[0] = 0
    place = np.empty_like(parent)
    place[children] = sizes.cumsum()
    place -= size
    before = size.cumsum()
    before -= size
    before -= np.arange(1, len(size) + 1)
    place -= before.take(parent)
    place[0] = 0
    for ancestor in ancestors:
        place += place.take(ancestor)
    place -= 1
    return place[1:], size[1:], place.take(parent)[1:]


def _sorted(keys: Int64Array, bound: int) -> Int64Array:
    """Stable order of keys from 0 to below the bound; those of 16 bits are sorted by radix."""
    narrow = keys.astype(np.uint16) if bound <= 1 << 16 else keys
    return narrow.argsort(kind="stable")


def _queries(
    sequences: Int64Array, query_len: Int64Array, path_len: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Packed place and position of each query in the order `sequences`, and where each ends.

    Args:
        query_len, path_len: of each sequence, in the packed order.
    """
    path_len = path_len.take(sequences)
    if query_len.max() == 1:
        return sequences, path_len - 1, np.arange(1, len(sequences) + 1)
    packed_end, query_len = query_len.cumsum().take(sequences), query_len.take(sequences)
    end = query_len.cumsum()
    queries = np.arange(end[-1])
    return (
        queries + np.repeat(packed_end - end, query_len),
        queries + np.repeat(path_len - end, query_len),
        end,
    )
