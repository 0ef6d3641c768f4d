"""The cache's invariants, recounted."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from allocator import BlockPool, BrokenInvariant
from prefixtree.columns import Int32s
from prefixtree.pins import Pins
from prefixtree.tree import ROOT, RadixTree


def check(
    tree: RadixTree,
    pool: BlockPool,
    pins: Pins,
    tails: list[int],
    kept: Iterable[int],
    aside: Int32s,
) -> None:
    """Raises `BrokenInvariant` naming what is wrong.

    `tails` are those of the open sequences, `kept` the nodes pinned for good, once for each pin,
    `aside` the blocks in use that are on no node.
    """
    pool.check()
    nodes = [int(node) for node in tree.nodes.rows() if node != ROOT]
    _check_blocks(tree, pool, nodes, aside)
    _check_slots(tree, nodes)
    _check_shape(tree, nodes, set(tails))
    _check_pins(tree, pins, nodes, [*tails, *kept])


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenInvariant(message)


def _check_blocks(tree: RadixTree, pool: BlockPool, nodes: list[int], aside: Int32s) -> None:
    """Reference counts are the numbers of nodes, and no other block is in use."""
    counts = np.bincount(aside, minlength=pool.num_blocks)
    for node in nodes:
        held = tree.blocks.get(node)
        _expect(len(set(held.tolist())) == len(held), f"node {node} holds a block twice")
        counts[held] += 1
    wrong = np.flatnonzero(counts != pool.refs)
    if len(wrong):
        block = int(wrong[0])
        raise BrokenInvariant(
            f"block {block} has {pool.refs[block]} references but is on {counts[block]} nodes"
        )
    in_use = int((counts > 0).sum())
    _expect(pool.num_free + in_use == pool.num_blocks, "free and referenced blocks are not all")


def _check_slots(tree: RadixTree, nodes: list[int]) -> None:
    """No slot belongs to two nodes, and a block on several is on one path, topmost first."""
    owner: dict[int, int] = {}
    holders: dict[int, list[int]] = {}
    for node in nodes:
        size = tree.nodes.length[node]
        if tree.nodes.writer[node]:
            size = tree.tail_tokens.size[node]
        needed = tree.blocks_for(node, size)
        held = tree.blocks.size[node]
        _expect(held == needed, f"node {node} holds {held} blocks but needs {needed}")
        for slot in tree.slots(node, 0, size).tolist():
            _expect(slot not in owner, f"slot {slot} belongs to nodes {owner.get(slot)} and {node}")
            owner[slot] = node
        for block in tree.blocks.get(node).tolist():
            holders.setdefault(block, []).append(node)
    for block, on in holders.items():
        on.sort(key=lambda node: (tree.nodes.start[node], tree.nodes.linked[node] == 0))
        for above, below in pairwise(on):
            _expect(
                above in tree.path(tree.nodes.parent[below]),
                f"block {block} is on nodes {above} and {below}, which are not on one path",
            )
        for place, node in enumerate(on):
            shares = tree.nodes.shares_first[node] and tree.blocks.get(node)[0] == block
            _expect(bool(shares) == (place > 0), f"node {node} misjudges who holds block {block}")


def _check_shape(tree: RadixTree, nodes: list[int], tails: set[int]) -> None:
    """Links, lengths and tokens fit together; children differ in their first token."""
    children: dict[int, set[bytes]] = {}
    cached = 0
    for node in nodes:
        table = tree.nodes
        parent = table.parent[node]
        _expect(bool(table.used[parent]), f"node {node} hangs below {parent}, which is free")
        _expect(table.start[node] == tree.end(parent), f"node {node} does not start at its parent")
        _expect(not table.writer[parent], f"node {node} hangs below the tail {parent}")
        _expect(bool(table.writer[node]) == (node in tails), f"node {node}: tail or not?")
        if tree.is_root(node):
            _expect(not table.length[node], f"node {node} is the root of a namespace but not empty")
            continue
        _expect(
            bool(table.linked[node]) == (table.length[node] > 0), f"node {node} is empty but linked"
        )
        if not table.linked[node]:
            _expect(node in tails, f"node {node} is neither in the tree nor a tail")
            continue
        edge = tree.edge(node)
        _expect(len(edge) == 4 * table.length[node], f"node {node}: tokens and length differ")
        first = edge[: 4 * tree.align]
        _expect(tree.aligned(table.length[node]) == table.length[node], f"node {node}: alignment")
        siblings = children.setdefault(parent, set())
        _expect(first not in siblings, f"two children of node {parent} begin with {first!r}")
        siblings.add(first)
        _expect(tree.child(parent, first) == node, f"node {node} is not found from its parent")
        cached += table.length[node]
    for node in [ROOT, *nodes]:
        count = len(children.get(node, ()))
        _expect(
            tree.nodes.children[node] == count, f"node {node} has {count} children, not as said"
        )
    _expect(cached == tree.cached_tokens, f"{tree.cached_tokens} cached tokens, recount {cached}")


def _check_pins(tree: RadixTree, pins: Pins, nodes: list[int], ends: list[int]) -> None:
    """Pins are the paths in use, given by their ends; the evictable are just the rest."""
    counts = dict.fromkeys(nodes, 0)
    for end in ends:
        for node in tree.path(end):
            counts[node] += 1
    evictable = []
    for node, count in counts.items():
        _expect(
            tree.nodes.pins[node] == count,
            f"node {node} has {tree.nodes.pins[node]} pins, {count} paths in use pass through it",
        )
        if not count:
            evictable.append(node)
    tokens = sum(tree.nodes.length[node] for node in evictable)
    _expect(pins.evictable_tokens == tokens, f"{pins.evictable_tokens} evictable, recount {tokens}")
    kept = {block for node in nodes if counts[node] for block in tree.blocks.get(node).tolist()}
    held = {block for node in nodes for block in tree.blocks.get(node).tolist()}
    blocks = len(held - kept)
    _expect(
        pins.evictable_blocks == blocks,
        f"{pins.evictable_blocks} evictable blocks, recount {blocks}",
    )
    leaves = {node for node in evictable if not tree.nodes.children[node]}
    _expect(not any(map(tree.is_root, leaves)), "a namespace without anything in it has a root")
    for node in pins.check_retention():
        _expect(
            node in counts and tree.nodes.linked[node] > 0 and not tree.nodes.writer[node],
            f"node {node} is retained but not in the tree, or a tail",
        )
    _expect(pins.check_order() == leaves, "the eviction order is not the unpinned leaves")
