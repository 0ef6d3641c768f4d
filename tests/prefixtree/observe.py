"""Looks at a cache through its public interface only, and checks what can be seen from there.

The whole tree is seen on a twin of the cache, which is made by repeating all calls: every committed
path is opened there (which takes no blocks, because all of it is cached), and one forest is asked
for all sequences of the twin. The cache itself does not notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

import prefixtree as pt

from .model import Namespace, Path, prefixes


def node_slots(forest: Any, node: int) -> list[int]:
    """The slots of one node of a forest, from its blocks, its offset and its length."""
    blocks = forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]]
    at = [int(forest.offset[node]) + i for i in range(int(forest.length[node]))]
    size = forest.block_size
    return [int(blocks[i // size]) * size + i % size for i in at]


def ancestry(forest: Any, node: int) -> list[int]:
    """The nodes from the root to `node`."""
    nodes: list[int] = []
    while node >= 0:
        nodes.append(int(node))
        node = int(forest.parent[node])
    return nodes[::-1]


def check_forest(
    forest: Any,
    batch: Sequence[pt.Sequence],
    kv_lens: Sequence[int] | None = None,
    query_lens: Sequence[int] | None = None,
) -> None:
    """Holds a forest against the slots of the sequences it was made for."""
    kv_lens = [len(sequence) for sequence in batch] if kv_lens is None else kv_lens
    query_lens = [1] * len(batch) if query_lens is None else query_lens
    dtypes = {
        "parent": np.int32,
        "start": np.int64,
        "length": np.int64,
        "offset": np.int32,
        "block_ptr": np.int64,
        "blocks": np.int32,
        "leaf": np.int32,
        "query_len": np.int64,
    }
    for name, dtype in dtypes.items():
        assert getattr(forest, name).dtype == dtype, name
        assert getattr(forest, name).ndim == 1, name
    count = len(forest.parent)
    assert len(forest.start) == len(forest.length) == len(forest.offset) == count
    assert len(forest.block_ptr) == count + 1
    assert forest.block_ptr[0] == 0
    assert forest.block_ptr[-1] == len(forest.blocks)
    assert forest.query_len.tolist() == list(query_lens)
    assert len(forest.leaf) == len(batch)

    for node in range(count):
        parent = int(forest.parent[node])
        assert -1 <= parent < node, "a parent stands before its children"
        above = 0 if parent < 0 else int(forest.start[parent] + forest.length[parent])
        assert forest.start[node] == above
        assert forest.length[node] >= 1
        assert 0 <= forest.offset[node] < forest.block_size
        blocks = int(forest.block_ptr[node + 1] - forest.block_ptr[node])
        last = int(forest.offset[node] + forest.length[node])
        assert blocks == -(-last // forest.block_size)

    used: set[int] = set()
    for leaf, sequence, kv_len in zip(forest.leaf, batch, kv_lens, strict=True):
        nodes = ancestry(forest, leaf)
        used.update(nodes)
        slots = [slot for node in nodes for slot in node_slots(forest, node)]
        assert slots == sequence.slots(0, kv_len).tolist()
    assert used == set(range(count)), "every node lies under a sequence of the batch"

    every = [slot for node in range(count) for slot in node_slots(forest, node)]
    assert len(every) == len(set(every)), "a slot lies in one node only"


@dataclass
class View:
    """Where everything lies: what one look at a cache found."""

    committed: dict[Path, int]
    """The slot of every committed path's last token; under alignment, of paths of whole blocks."""
    written: dict[int, Path]
    """What every slot with a committed token must hold."""
    reserved: dict[tuple[int, int], int]
    """The slot of every uncommitted token, by (index of the sequence, position)."""
    blocks: set[int]
    """All blocks with a committed or a reserved token on them."""
    nodes: int
    """Nodes with committed tokens."""


class Clock:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def turn(self, seconds: float) -> None:
        self.time += seconds


class Twin:
    """A cache made by a journal's calls, and what they made on it, in the order of making."""

    def __init__(self, cache: pt.PrefixCache, clock: Clock) -> None:
        self.cache = cache
        self.clock = clock
        self.sequences: list[pt.Sequence] = []
        self.pins: list[pt.Pin] = []

    def open(self, path: Path) -> pt.Sequence:
        return self.cache.open(path.tokens, namespace=path.namespace)

    def cached(self, path: Path) -> int:
        return self.cache.match(path.tokens, namespace=path.namespace).cached


class Journal:
    """The successful calls that changed a cache, to be repeated on another one.

    Calls that look and calls that were refused are not in it. So a twin that differs from its
    original proves that one of those left a trace.
    """

    def __init__(self, make: Callable[[Clock], pt.PrefixCache]) -> None:
        self.make = make
        self.calls: list[Callable[[Twin], object]] = []

    def replay(self) -> Twin:
        """A new cache in the same state."""
        clock = Clock()
        twin = Twin(self.make(clock), clock)
        for call in self.calls:
            call(twin)
        return twin


def look(
    twin: Twin,
    batch: list[pt.Sequence],
    namespaces: Sequence[Namespace],
    leaves: Sequence[Path],
    align: int,
) -> View:
    """Finds the slot of every token, and checks that tokens lie on blocks as they must.

    `batch` are all open sequences of the twin, `namespaces` are theirs, `leaves` are the longest
    committed paths, `align` what the lengths of matches are multiples of.
    """
    opened = len(batch)
    batch = [*batch, *map(twin.open, leaves)]
    namespaces = [*namespaces, *(leaf.namespace for leaf in leaves)]
    for sequence in batch[opened:]:
        assert sequence.cached_len == len(sequence)
    committed: dict[Path, int] = {}
    written: dict[int, Path] = {}
    reserved: dict[tuple[int, int], int] = {}
    if not batch:
        return View(committed, written, reserved, set(), 0)

    query_lens = [max(1, len(sequence) - sequence.committed) for sequence in batch]
    forest = twin.cache.forest(batch, query_lens=query_lens)
    check_forest(forest, batch, query_lens=query_lens)
    places: dict[int, set[tuple[Path, int]]] = defaultdict(set)
    nodes: set[int] = set()
    for index, sequence in enumerate(batch):
        slots = sequence.slots(0, len(sequence)).tolist()
        found = sequence.committed - sequence.committed % align
        for position, path in enumerate(prefixes(namespaces[index], sequence.tokens().tolist())):
            slot = slots[position]
            places[slot // twin.cache.block_size].add((path, slot))
            if position < found:
                assert written.setdefault(slot, path) == path, f"{path} is where others are"
                if (position + 1) % align == 0:
                    assert committed.setdefault(path, slot) == slot, f"{path} is cached twice"
            else:
                assert index < opened
                reserved[index, position] = slot
        for node in ancestry(forest, forest.leaf[index]):
            if forest.start[node] < found:
                nodes.add(node)
    taken = [*written, *reserved.values()]
    assert len(taken) == len(set(taken)), "two tokens share a slot"
    for block, tokens in places.items():
        _check_block(block, sorted(tokens, key=lambda token: token[1]))
    for sequence in batch[opened:]:
        sequence.close()
    return View(committed, written, reserved, set(places), len(nodes))


def _check_block(block: int, tokens: list[tuple[Path, int]]) -> None:
    """The tokens of a block stand in order on one path: a branch starts on a block of its own."""
    for (path, slot), (below, next_slot) in pairwise(tokens):
        assert below.starts_with(path), f"block {block} lies on two branches: {path}, {below}"
        further = len(below.tokens) - len(path.tokens)
        assert further == next_slot - slot, f"block {block} is out of order"
