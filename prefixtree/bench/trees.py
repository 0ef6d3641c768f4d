"""Trees of KV as attention sees them, made from the lengths of their nodes: no tokens, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attention import Forest
from prefixtree.columns import Int64s


class Tree(NamedTuple):
    """N nodes, a parent before its children, and S sequences of one query each.

    Attributes:
        parent: int64 [N], -1 for a root.
        length: int64 [N], tokens, >= 1.
        leaf: int64 [S], deepest node of each sequence.
        continues: bool [N], the node begins in its parent's last block, right behind the parent.
    """

    parent: Int64s
    length: Int64s
    leaf: Int64s
    continues: npt.NDArray[np.bool_]

    def path_lengths(self) -> Int64s:
        """Tokens on the path of each sequence, int64 [S]."""
        end = self.length.copy()
        for level in levels_of(self.parent)[1:]:
            end[level] += end[self.parent[level]]
        return end[self.leaf]


def level_tree(nodes: Sequence[int], lengths: Sequence[int | Sequence[int] | Int64s]) -> Tree:
    """A tree by its levels: how many nodes each has, and their tokens (one number for all).

    Child j of a level has the parent j * |level above| // |level|. A sequence ends in each node of
    the last level.
    """
    parents, tokens, begin = [np.full(nodes[0], -1)], [], 0
    for above, count in pairwise(nodes):
        parents.append(begin + np.arange(count) * above // count)
        begin += above
    for count, length in zip(nodes, lengths, strict=True):
        tokens.append(np.broadcast_to(np.asarray(length, np.int64), count))
    return tree(np.concatenate(parents), np.concatenate(tokens))


def tree(
    parent: Int64s,
    length: Int64s,
    leaf: Int64s | None = None,
    continues: npt.NDArray[np.bool_] | None = None,
) -> Tree:
    """A tree with a sequence on each node that has no children, unless `leaf` says otherwise.

    No node continues its parent's block unless `continues` says so.
    """
    if leaf is None:
        leaf = np.setdiff1d(np.arange(len(parent)), parent)
    if continues is None:
        continues = np.zeros(len(parent), np.bool_)
    return Tree(parent.astype(np.int64), length.astype(np.int64), leaf, continues)


def levels_of(parent: Int64s) -> list[Int64s]:
    """The nodes of each depth, roots first."""
    depth = np.zeros(len(parent), np.int64)
    above = parent
    while (above >= 0).any():
        depth += above >= 0
        above = np.where(above >= 0, parent[above], -1)
    by_depth = np.argsort(depth, kind="stable")
    return np.split(by_depth, np.cumsum(np.bincount(depth))[:-1])


def forest_of(tree: Tree, block_size: int, shuffle: int | None = None) -> tuple[Forest, int]:
    """The tree in blocks of its own, and how many blocks there are.

    Blocks are handed out node by node, or in an order drawn from the seed `shuffle`. A few vector
    operations for each level.
    """
    num_nodes = len(tree.parent)
    start, offset = np.zeros(num_nodes, np.int64), np.zeros(num_nodes, np.int64)
    levels = levels_of(tree.parent)
    for level in levels[1:]:
        parent = tree.parent[level]
        start[level] = start[parent] + tree.length[parent]
        behind = (offset[parent] + tree.length[parent]) % block_size
        offset[level] = np.where(tree.continues[level], behind, 0)
    shares = tree.continues & (offset > 0)
    count = -(-(offset + tree.length) // block_size)
    new = count - shares
    first_new = np.cumsum(new) - new
    num_blocks = int(new.sum())

    last = first_new + new - 1
    for level in levels[1:]:
        inside = level[new[level] == 0]
        last[inside] = last[tree.parent[inside]]
    block_ptr = np.append(0, np.cumsum(count))
    node = np.repeat(np.arange(num_nodes), count)
    place = np.arange(block_ptr[-1]) - block_ptr[node]
    blocks = first_new[node] + place - shares[node]
    shared = shares[node] & (place == 0)
    blocks[shared] = last[tree.parent[node[shared]]]
    if shuffle is not None:
        blocks = np.random.default_rng(shuffle).permutation(num_blocks)[blocks]
    forest = Forest(
        block_size=block_size,
        parent=tree.parent.astype(np.int32),
        start=start,
        length=tree.length,
        offset=offset.astype(np.int32),
        block_ptr=block_ptr.astype(np.int64),
        blocks=blocks.astype(np.int32),
        leaf=tree.leaf.astype(np.int32),
        query_len=np.ones(len(tree.leaf), np.int64),
    )
    return forest, num_blocks


def path_nodes(forest: Forest) -> Int64s:
    """The node of each depth on each sequence's path, int64 [depths, S]; -1 below its leaf."""
    levels = levels_of(forest.parent.astype(np.int64))
    depth = np.empty(len(forest.parent), np.int64)
    for number, level in enumerate(levels):
        depth[level] = number
    nodes = np.full((len(levels), len(forest.leaf)), -1, np.int64)
    sequence, node = np.arange(len(forest.leaf)), forest.leaf.astype(np.int64)
    while len(node):
        nodes[depth[node], sequence] = node
        node = forest.parent[node].astype(np.int64)
        sequence, node = sequence[node >= 0], node[node >= 0]
    return nodes


def unshared(forest: Forest) -> Forest:
    """The same sequences, each with a chain of nodes of its own on the very same blocks.

    What is attended to, and where it lies, stays as it is; nobody can see that it is shared.
    """
    table = path_nodes(forest).T  # [S, depths]
    there = table >= 0
    node = table[there]
    first = np.cumsum(there.sum(1)) - there.sum(1)
    is_root = np.zeros(len(node), np.bool_)
    is_root[first] = True
    count = np.diff(forest.block_ptr)[node]
    block_ptr = np.append(0, np.cumsum(count))
    inside = np.arange(block_ptr[-1]) - np.repeat(block_ptr[:-1], count)
    return Forest(
        block_size=forest.block_size,
        parent=np.where(is_root, -1, np.arange(len(node)) - 1).astype(np.int32),
        start=forest.start[node],
        length=forest.length[node],
        offset=forest.offset[node],
        block_ptr=block_ptr.astype(np.int64),
        blocks=forest.blocks[np.repeat(forest.block_ptr[node], count) + inside],
        leaf=np.append(first[1:] - 1, len(node) - 1).astype(np.int32),
        query_len=forest.query_len,
    )


def node_slots(forest: Forest) -> list[Int64s]:
    """The slot of each token of each node."""
    node = np.repeat(np.arange(len(forest.parent)), forest.length)
    end = np.cumsum(forest.length)
    place = forest.offset[node] + np.arange(end[-1]) - (end - forest.length)[node]
    block = forest.blocks[forest.block_ptr[node] + place // forest.block_size].astype(np.int64)
    slots = block * forest.block_size + place % forest.block_size
    return np.split(slots, end[:-1])


def path_slots(forest: Forest) -> list[Int64s]:
    """The slot of each token on each sequence's path, from the root on."""
    slots = node_slots(forest)
    paths = path_nodes(forest).T.tolist()
    return [np.concatenate([slots[node] for node in path if node >= 0]) for path in paths]
