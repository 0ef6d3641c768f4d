"""The depth-first order of queries: under it, the queries that attend to a node are one range."""

from typing import NamedTuple

import numpy as np

from attention.forest import ForestArrays, Int64Array


class QueryOrder(NamedTuple):
    """Queries of a forest in depth-first order: a node's own before those of its children.

    Attributes:
        packed: int64 [num_queries], place of each query in the packed order of the sequences.
        position: int64 [num_queries], position of each query in its path.
        sequence_end: int64 [S], end of each sequence's queries, sequences depth-first.
        begin, end: int64 [N], the range of queries that belong to sequences through each node.
        depth: int64 [N], 0 for roots.
        preorder: int64 [N], the nodes depth-first, children in the order of their indices.
    """

    packed: Int64Array
    position: Int64Array
    sequence_end: Int64Array
    begin: Int64Array
    end: Int64Array
    depth: Int64Array
    preorder: Int64Array


# Queries and nodes are counted together, in the upper and the lower half of an int64.
_HALF = 32
_LOWER = (1 << _HALF) - 1


def depth_first(forest: ForestArrays) -> QueryOrder:
    """Order the queries of a valid forest of fewer than 2^31 nodes and queries.

    O(N log N + num_queries), and O(N log depth) for sums over subtrees and paths by pointer
    doubling (Hillis and Steele 1986); no Python loop over nodes or levels.
    """
    num_nodes = len(forest.parent)
    # Node i is i + 1 here; 0 is the forest itself, the parent of the roots and its own.
    parent = np.zeros(num_nodes + 1, np.int64)
    np.add(forest.parent, 1, out=parent[1:])
    own = np.zeros(num_nodes + 1, np.int64)
    np.add.at(own, forest.leaf.astype(np.int64) + 1, forest.query_len)
    own <<= _HALF
    own[1:] += 1

    total, ancestor, ancestors = own.copy(), parent, []
    while ancestor.any():
        ancestors.append(ancestor)
        np.add.at(total, ancestor, total.copy())
        ancestor = ancestor.take(ancestor)
    total[0] = own.sum()

    place = _behind_parent(parent, own, total)
    depth = np.ones(num_nodes + 1, np.int64)
    depth[0] = 0
    for ancestor in ancestors:
        place += place.take(ancestor)
        depth += depth.take(ancestor)

    begin = place[1:] >> _HALF
    preorder = np.empty(num_nodes, np.int64)
    preorder[place[1:] & _LOWER] = np.arange(num_nodes)
    sequences = _by_leaf(forest, begin)
    path_len = (forest.start + forest.length).take(forest.leaf.take(sequences))
    packed, position, sequence_end = _queries(forest.query_len, sequences, path_len)
    return QueryOrder(
        packed=packed,
        position=position,
        sequence_end=sequence_end,
        begin=begin,
        end=begin + (total[1:] >> _HALF),
        depth=depth[1:] - 1,
        preorder=preorder,
    )


def _behind_parent(parent: Int64Array, own: Int64Array, total: Int64Array) -> Int64Array:
    """How far each node's place is behind its parent's: own ones come first, then the children's.

    Args:
        own, total: what is counted of each node itself, and of it and all its descendants.
    """
    # 16-bit numbers are sorted by radix.
    narrow = parent[1:].astype(np.uint16) if len(parent) <= 1 << 16 else parent[1:]
    siblings = narrow.argsort(kind="stable") + 1
    behind = np.zeros_like(own)
    behind[siblings] = total.take(siblings).cumsum()
    behind -= total
    # What all children of earlier nodes count, less the node's own.
    before = (total - own).cumsum() - total
    behind -= before.take(parent)
    behind[0] = 0
    return behind


def _by_leaf(forest: ForestArrays, begin: Int64Array) -> Int64Array:
    """The sequences in the order of their leaves' queries, those of one leaf in their own."""
    first = begin.take(forest.leaf)
    return first.argsort(kind="stable")


def _queries(
    query_len: Int64Array, sequences: Int64Array, path_len: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Packed place and position of each query, sequence after sequence, and where these end."""
    lengths = query_len.take(sequences)
    end = lengths.cumsum()
    if end[-1] == len(end):
        return sequences, path_len - 1, end
    queries = np.arange(end[-1])
    packed_end = query_len.cumsum().take(sequences)
    return (
        queries + np.repeat(packed_end - end, lengths),
        queries + np.repeat(path_len - end, lengths),
        end,
    )
