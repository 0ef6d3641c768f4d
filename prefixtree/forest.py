"""The forest of a batch: what attention plans from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefixtree.columns import Int32s, Int64s
from prefixtree.tree import RadixTree


@dataclass(frozen=True)
class Forest:
    """The nodes under a batch of running sequences, as plain arrays; N nodes, S sequences.

    A parent stands before its children. Queries are in the order of the sequences, positions
    ascending; a query sees the positions up to its own on its own path.
    """

    block_size: int
    parent: Int32s
    """[N] index of the parent node in this forest, -1 for a root."""
    start: Int64s
    """[N] position of the node's first token in its path."""
    length: Int64s
    """[N] tokens, at least 1."""
    offset: Int32s
    """[N] of the first token in the node's first block."""
    block_ptr: Int64s
    """[N + 1] node i holds blocks[block_ptr[i]:block_ptr[i + 1]], just as many as it needs."""
    blocks: Int32s
    leaf: Int32s
    """[S] deepest node of each sequence."""
    query_len: Int64s
    """[S] queries: the last `query_len` positions of the sequence."""


def build_forest(tree: RadixTree, tails: Int64s, kv_lens: Int64s, query_lens: Int64s) -> Forest:
    """The forest of these sequences, as far as their first `kv_lens` tokens.

    A few vector operations for each level of the tree, however many sequences there are.
    """
    nodes = tree.nodes
    parents, starts = np.asarray(nodes.parent), np.asarray(nodes.start)
    committed = np.asarray(nodes.length)
    tail_lengths = kv_lens - starts[tails]
    with_tail = tail_lengths > 0
    leaves = np.where(with_tail, tails, parents[tails])

    # Place in the forest, counted from 1; 0 elsewhere, and again when this is done.
    place = np.asarray(nodes.place)
    levels = [np.empty(0, np.int64)]
    level = leaves
    while len(level):
        # Of those that are in a level twice, the one that wrote its number last stays.
        numbers = np.arange(1, len(level) + 1, dtype=np.int32)
        place[level] = numbers
        level = level[place[level] == numbers]
        levels.append(level)
        level = parents[level]
        level = level[(committed[level] > 0) & (place[level] == 0)]  # roots are empty
    members = np.concatenate(levels)
    member_starts = starts[members]
    order = np.argsort(member_starts, kind="stable")
    members = members[order]
    place[members] = np.arange(1, len(members) + 1)
    parent, leaf = place[parents[members]] - 1, place[leaves] - 1
    place[members] = 0

    lengths = committed[members]
    lengths[leaf[with_tail]] = tail_lengths[with_tail]
    offsets = np.asarray(nodes.offset)[members]
    block_ptr = np.zeros(len(members) + 1, np.int64)
    counts = (offsets + lengths + (tree.block_size - 1)) // tree.block_size
    np.add.accumulate(counts, out=block_ptr[1:])
    return Forest(
        block_size=tree.block_size,
        parent=parent,
        start=member_starts[order],
        length=lengths,
        offset=offsets,
        block_ptr=block_ptr,
        blocks=tree.blocks.gather(members, counts),
        leaf=leaf,
        query_len=query_lens,
    )
