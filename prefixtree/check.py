"""The cache's invariants: all of them recounted, or those of a sample of nodes.

What holds for each node by itself is in `node_checks`; here are the counts that involve all nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from allocator import BlockPool, BlockSet, BrokenInvariant
from prefixtree.columns import Int32s, Int64s
from prefixtree.node_checks import NodeChecks, num_tokens
from prefixtree.pins import Pins
from prefixtree.ragged import spans
from prefixtree.tree import ROOT, RadixTree


class TokenSums(NamedTuple):
    """Tokens as they are counted on the way, see `Stats`."""

    logical: int
    pending: int
    kept: int


class State(NamedTuple):
    """All that a cache consists of."""

    tree: RadixTree
    pool: BlockPool | BlockSet
    pins: Pins
    tails: dict[int, int]
    """Those of the open sequences, by their serial number."""
    kept: list[int]
    """Nodes pinned for good, once for each pin."""
    aside: Int32s
    """Blocks that something else than a node holds, once for each reference."""
    sums: TokenSums


def check(state: State) -> None:
    """Recounts everything; raises `BrokenInvariant` naming what is wrong.

    O(nodes + blocks): vector operations, and a few Python calls a node.
    """
    state.pool.check()
    rows = state.tree.nodes.rows()
    nodes = rows[rows != ROOT]
    checks = NodeChecks(state.tree, state.pool, state.pins, state.tails)
    _check_ends(state)
    checks.links(nodes)
    checks.sizes(nodes)
    checks.found(nodes)
    _check_tree(state.tree, nodes)
    _check_blocks(state, nodes)
    _check_pins(state, nodes)
    _check_retention(state)
    _check_sums(state)


def check_sample(state: State, size: int, random: np.random.Generator) -> None:
    """Checks about `size` random nodes and the paths to them, as far as can be seen from there.

    Raises `BrokenInvariant` naming what is wrong. A sample of as many nodes as there are is the
    full check; a smaller one costs O(size * depth) and a scan of the reference counts.
    """
    if size >= len(state.tree.nodes) - 1:
        check(state)
    else:
        check_nodes(state, _sample(state.tree, size, random))


def check_nodes(state: State, nodes: Int64s) -> None:
    """What can be seen from these nodes, which are distinct, in use and not the root."""
    checks = NodeChecks(state.tree, state.pool, state.pins, state.tails)
    checks.counters()
    checks.links(nodes)
    checks.sizes(nodes)
    checks.found(nodes)
    checks.paths(nodes)
    checks.order(nodes)


def _sample(tree: RadixTree, size: int, random: np.random.Generator) -> Int64s:
    """Up to `size` distinct nodes; fewer where most rows of the table are free."""
    rows = random.integers(tree.nodes.top, size=4 * size)
    rows = rows[(np.asarray(tree.nodes.used)[rows] != 0) & (rows != ROOT)]
    return np.unique(rows[:size])


def _check_ends(state: State) -> None:
    """Where paths begin and end: the roots, the tails, the nodes pinned for good."""
    tree, table = state.tree, state.tree.nodes
    if table.start[ROOT] or table.length[ROOT] or tree.blocks.size[ROOT]:
        raise BrokenInvariant("the root is not empty")
    for namespace, node in tree.roots():
        if not (table.used[node] and tree.is_root(node)) or table.length[node]:
            raise BrokenInvariant(f"namespace {namespace!r} has node {node} for its root")
    for serial, tail in state.tails.items():
        if not table.used[tail] or table.writer[tail] != serial:
            raise BrokenInvariant(f"node {tail} is not the tail of open sequence {serial}")
    for node in state.kept:
        if not table.used[node]:
            raise BrokenInvariant(f"node {node} is pinned for good, but free")


def _check_tree(tree: RadixTree, nodes: Int64s) -> None:
    """The counts of nodes, children, edges and tokens."""
    table = tree.nodes
    if len(table) != len(nodes) + 1:
        raise BrokenInvariant(f"{len(table)} nodes counted, {len(nodes) + 1} in use")
    linked = nodes[np.asarray(table.length)[nodes] > 0]
    count = np.bincount(np.asarray(table.parent)[linked], minlength=table.top)
    every = np.append(nodes, ROOT)
    for node in every[np.asarray(table.children)[every] != count[every]]:
        raise BrokenInvariant(
            f"node {node} has {count[node]} children, not {table.children[node]} as said"
        )
    # Each linked node was found by its own first tokens, so no two children begin alike.
    if tree.num_edges != len(linked):
        raise BrokenInvariant(f"{tree.num_edges} edges for {len(linked)} linked nodes")
    cached = int(np.asarray(table.length)[linked].sum())
    if cached != tree.cached_tokens:
        raise BrokenInvariant(f"{tree.cached_tokens} cached tokens, recount {cached}")
    branches = int(np.count_nonzero(count))
    if branches != tree.branches:
        raise BrokenInvariant(f"{tree.branches} nodes with nodes below them, recount {branches}")


def _check_blocks(state: State, nodes: Int64s) -> None:
    """Reference counts are numbers of holders; no slot belongs to two nodes."""
    tree, pool = state.tree, state.pool
    held = np.asarray(tree.blocks.size)[nodes]
    blocks = tree.blocks.gather(nodes, held)
    on_nodes = np.bincount(blocks, minlength=pool.num_blocks)
    aside = np.bincount(state.aside, minlength=pool.num_blocks)
    for block in np.flatnonzero(on_nodes + aside != pool.refs):
        raise BrokenInvariant(
            f"block {block} has {pool.refs[block]} references but is on {on_nodes[block]} nodes"
            f" and {aside[block]} times aside"
        )
    for block in np.flatnonzero(aside > 1):
        raise BrokenInvariant(f"block {block} was given up {aside[block]} times")
    (several,) = np.nonzero(on_nodes[blocks] > 1)
    places = spans(np.zeros(len(nodes), np.int64), held)
    owners = np.repeat(nodes, held)
    _check_shared(tree, nodes, blocks[several], owners[several], places[several])


def _check_shared(
    tree: RadixTree, nodes: Int64s, blocks: Int32s, owners: Int64s, places: Int64s
) -> None:
    """A block on several nodes is on one path, in order; all but the topmost say so.

    The arrays name each holder of such a block: `blocks[i]` is `owners[i]`'s block number
    `places[i]`.
    """
    table, size = tree.nodes, tree.block_size
    unlinked = np.asarray(table.linked)[owners] == 0
    down = np.lexsort((unlinked, np.asarray(table.start)[owners], blocks))
    blocks, owners, places = blocks[down], owners[down], places[down]
    offsets = np.asarray(table.offset)[owners]
    begins = np.where(places == 0, offsets, 0)
    ends = np.minimum(offsets + num_tokens(tree, owners) - places * size, size)

    below = 1 + np.flatnonzero(blocks[1:] == blocks[:-1])
    for at in below[owners[below] == owners[below - 1]]:
        raise BrokenInvariant(f"node {owners[at]} holds block {blocks[at]} twice")
    for at in below[begins[below] < ends[below - 1]]:
        raise BrokenInvariant(
            f"slot {int(blocks[at]) * size + begins[at]} belongs to nodes {owners[at - 1]} and"
            f" {owners[at]}, or comes after one of the second"
        )
    for at in below[~_is_above(tree, owners[below - 1], owners[below])]:
        raise BrokenInvariant(
            f"block {blocks[at]} is on nodes {owners[at - 1]} and {owners[at]}, which are not on"
            " one path"
        )
    shares = np.zeros(table.top, np.int8)
    shares[owners[below]] = 1
    for node in nodes[shares[nodes] != np.asarray(table.shares_first)[nodes]]:
        raise BrokenInvariant(f"node {node} misjudges who holds its first block")


def _is_above(tree: RadixTree, upper: Int64s, lower: Int64s) -> npt.NDArray[np.bool_]:
    """Whether each node of `upper` is an ancestor of that of `lower`. Links have been checked."""
    parent, start = np.asarray(tree.nodes.parent), np.asarray(tree.nodes.start)
    node = parent[lower].astype(np.int64)
    (climbing,) = np.nonzero(node != upper)
    while len(climbing):
        climbing = climbing[start[node[climbing]] > start[upper[climbing]]]
        node[climbing] = parent[node[climbing]]
        climbing = climbing[node[climbing] != upper[climbing]]
    found: npt.NDArray[np.bool_] = node == upper
    return found


def _check_pins(state: State, nodes: Int64s) -> None:
    """Pins are the paths in use, and what is evictable is all the rest."""
    tree, pins = state.tree, state.pins
    table, num_blocks = tree.nodes, state.pool.num_blocks
    pinned = np.asarray(table.pins)
    parents, lengths = np.asarray(table.parent), np.asarray(table.length)
    ends = np.array([*state.tails.values(), *state.kept], np.int64)
    passing = np.bincount(parents[nodes], pinned[nodes], table.top).astype(np.int64)
    count = np.bincount(ends, minlength=table.top) + passing
    wrong = nodes[pinned[nodes] != count[nodes]]
    # A wrong count makes the node above look wrong as well: name the lowest.
    for node in wrong[np.argsort(-np.asarray(table.start)[wrong], kind="stable")]:
        raise BrokenInvariant(
            f"node {node} has {pinned[node]} pins, {count[node]} paths in use end there or pass"
        )

    evictable = nodes[pinned[nodes] == 0]
    tokens = int(lengths[evictable].sum())
    if pins.evictable_tokens != tokens:
        raise BrokenInvariant(f"{pins.evictable_tokens} evictable tokens, recount {tokens}")
    going = np.zeros(num_blocks, np.bool_)
    for some, goes in ((evictable, True), (nodes[pinned[nodes] > 0], False)):
        going[tree.blocks.gather(some, np.asarray(tree.blocks.size)[some])] = goes
    blocks = int(np.count_nonzero(going))
    if pins.evictable_blocks != blocks:
        raise BrokenInvariant(f"{pins.evictable_blocks} evictable blocks, recount {blocks}")

    leaves = evictable[np.asarray(table.children)[evictable] == 0]
    for node in leaves[lengths[leaves] == 0]:
        raise BrokenInvariant(f"node {node} is the root of a namespace without anything")
    ordered = np.sort(np.fromiter(pins.order, np.int64))
    if len(pins.order) != len(ordered):
        raise BrokenInvariant(f"{len(pins.order)} leaves in the order, recount {len(ordered)}")
    for node in np.setdiff1d(leaves, ordered, assume_unique=True):
        raise BrokenInvariant(f"node {node}, an unpinned leaf, is not in the eviction order")
    for node in np.setdiff1d(ordered, leaves, assume_unique=True):
        raise BrokenInvariant(f"node {node}, in the eviction order, is no unpinned leaf")


def _check_sums(state: State) -> None:
    """The sums over all sequences and pins are those of their paths."""
    tree, table = state.tree, state.tree.nodes
    tails = np.fromiter(state.tails.values(), np.int64, len(state.tails))
    kept = np.array(state.kept, np.int64)
    start, length = np.asarray(table.start), np.asarray(table.length)
    size = np.asarray(tree.tail_tokens.size)[tails]
    recount = TokenSums(
        logical=int((start[tails] + size).sum()),
        pending=int((size - length[tails]).sum()),
        kept=int((start[kept] + length[kept]).sum()),
    )
    for name, said, found in zip(TokenSums._fields, state.sums, recount, strict=True):
        if said != found:
            raise BrokenInvariant(f"{said} {name} tokens, recount {found}")


def _check_retention(state: State) -> None:
    """Only ordinary nodes have a priority of their own."""
    table = state.tree.nodes
    for node in state.pins.check_retention():
        if not table.linked[node] or table.writer[node] or state.tree.is_root(node):
            raise BrokenInvariant(f"node {node} is retained but not in the tree, or a tail")
