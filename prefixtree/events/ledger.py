"""What the world outside knows of the cache: its whole blocks, with their hashes and tokens.

Kept apart from the cache, so that hashes are computed, and everything can be told anew, without
it. A whole block has one row, numbered as in `journal`: about 100 bytes at 16 tokens a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int32s, Int64s
from prefixtree.events.hashing import ChainedHash
from prefixtree.events.messages import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
)
from prefixtree.journal import Changes
from prefixtree.tree import DEFAULT, Namespace

UNKNOWN = -1

AT_ONCE = 1 << 14
"""Blocks whose tokens are made lists at once."""


class Told(NamedTuple):
    """What changed, and what consumers are to be told of its namespaces."""

    changes: Changes
    lora_names: dict[int, str | None]
    """By index of the run, for `changes.namespaces`."""


class _Owner(NamedTuple):
    """Who may match a path."""

    namespace: Namespace
    lora_name: str | None


class Ledger:
    """The blocks that were told of, and the events that tell of them."""

    def __init__(
        self,
        block_size: int,
        chain: ChainedHash,
        whole_hashes: bool,
        medium: str | None,
        lora_name: str | None,
    ) -> None:
        """`lora_name` is that of the default namespace."""
        self._block_size = block_size
        self._chain = chain
        self._whole_hashes = whole_hashes
        self._medium = medium
        self._nobody = _Owner(DEFAULT, lora_name)
        self._digests: npt.NDArray[np.uint8] = np.empty((0, chain.size), np.uint8)
        self._tokens: Int32s = np.empty((0, block_size), np.int32)
        self._parents: Int32s = np.empty(0, np.int32)
        self._roots: Int32s = np.empty(0, np.int32)  # the first block of a block's path
        self._depths: Int32s = np.empty(0, np.int32)  # blocks in front of it, or UNKNOWN
        self._owners: dict[int, _Owner] = {}  # of first blocks, but for the default namespace
        self._count = 0

    def __len__(self) -> int:
        """Blocks that can be matched."""
        return self._count

    def apply(self, told: Told) -> list[Event]:
        """Takes over what changed; returns the events that say so, in order."""
        changes = told.changes
        events: list[Event] = []
        removed = self._known(changes.removed)
        if len(removed):
            events.append(self._remove(removed))
        if len(changes.stored):
            self._store(changes, told.lora_names)
            events.extend(self._stored(changes.stored, changes.counts))
        return events

    def everything(self) -> Iterator[Event]:
        """Events that tell somebody who knows nothing all that there is, parents first."""
        yield AllBlocksCleared()
        blocks, counts = self._runs()
        ends = np.cumsum(counts)
        first = 0
        while first < len(counts):  # by pieces, since lists of all tokens would be large
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + AT_ONCE, side="right")))
            yield from self._stored(blocks[done : ends[last - 1]], counts[first:last])
            first = last

    def _known(self, blocks: Int32s) -> Int32s:
        """Those that were told of, each once, where it comes first."""
        blocks = blocks[blocks < len(self._depths)]
        blocks = blocks[self._depths[blocks] != UNKNOWN]
        return blocks[np.sort(np.unique(blocks, return_index=True)[1])]

    def _remove(self, blocks: Int32s) -> Event:
        self._count -= len(blocks)
        self._depths[blocks] = UNKNOWN
        if self._owners:
            for root in self._owners.keys() & blocks.tolist():
                del self._owners[root]
        if not self._count:
            return AllBlocksCleared()
        return BlockRemoved(block_hashes=self._hashes(blocks), medium=self._medium)

    def _store(self, changes: Changes, lora_names: dict[int, str | None]) -> None:
        blocks, parents, counts = changes.stored, changes.parents, changes.counts
        self._reach(int(blocks.max()) + 1)
        self._count += len(blocks)
        firsts = np.cumsum(counts) - counts
        above = np.concatenate([blocks[:1], blocks[:-1]])
        above[firsts] = parents
        self._parents[blocks] = above
        pieces = changes.tokens
        known = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self._tokens[blocks] = known.reshape(-1, self._block_size)
        for run, namespace in changes.namespaces.items():
            self._owners[int(blocks[firsts[run]])] = _Owner(namespace, lora_names[run])

        # A run may go on behind one that comes in the same changes.
        order = np.argsort(blocks)
        at = order[np.minimum(np.searchsorted(blocks, parents, sorter=order), len(blocks) - 1)]
        near = np.where(blocks[at] == parents, at, -1).tolist()
        digests: list[bytes] = []
        roots, depths = np.empty(len(blocks), np.int32), np.empty(len(blocks), np.int32)
        tokens = known.astype("<i4", copy=False).tobytes()
        step, size = 4 * self._block_size, self._chain.size
        above_them = self._digests[parents].tobytes()
        runs = zip(parents.tolist(), firsts.tolist(), counts.tolist(), near, strict=True)
        for run, (parent, first, count, place) in enumerate(runs):
            if parent < 0:
                root, depth = blocks[first], 0
                before = self._chain.begin(changes.namespaces.get(run, DEFAULT))
            elif place >= 0:
                root, depth = roots[place], depths[place] + 1
                before = digests[place]
            else:
                root, depth = self._roots[parent], self._depths[parent] + 1
                before = above_them[size * run : size * (run + 1)]
            roots[first : first + count] = root
            depths[first : first + count] = range(depth, depth + count) if count > 1 else depth
            digests += self._chain.extend(
                before, tokens[step * first : step * (first + count)], step
            )
        self._roots[blocks], self._depths[blocks] = roots, depths
        self._digests[blocks] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, size)

    def _stored(self, blocks: Int32s | Int64s, counts: Int64s) -> Iterator[Event]:
        """The events for runs of blocks, packed."""
        behind = np.cumsum(counts)
        firsts = blocks[behind - counts]
        parents = self._parents[firsts]
        hashes, before = self._hashes(blocks), self._hashes(parents)
        tokens = self._tokens[blocks].ravel().tolist()
        size, first = self._block_size, 0
        runs = zip(self._roots[firsts].tolist(), parents.tolist(), behind.tolist(), strict=True)
        for run, (root, parent, last) in enumerate(runs):
            namespace, lora_name = self._owners.get(root, self._nobody)
            parts = namespace if isinstance(namespace, tuple) else (namespace,)
            yield BlockStored(
                block_hashes=hashes[first:last],
                parent_block_hash=None if parent < 0 else before[run],
                token_ids=tokens[first * size : last * size],
                block_size=size,
                lora_id=None,
                medium=self._medium,
                lora_name=lora_name,
                extra_keys=None if namespace == DEFAULT else [parts] * (last - first),
            )
            first = last

    def _hashes(self, blocks: Int32s | Int64s) -> list[BlockHash]:
        digests = self._digests[blocks]
        if self._whole_hashes:
            return [digest.tobytes() for digest in digests]
        # As vLLM's integers: the last bytes, the first of them counting most.
        numbers: list[BlockHash] = digests[:, -8:].copy().view(">u8").ravel().tolist()
        return numbers

    def _runs(self) -> tuple[Int64s, Int64s]:
        """All blocks in runs as long as no path branches off, packed, parents first; their counts.

        O(n log n), vectorised.
        """
        blocks: Int64s = np.flatnonzero(self._depths != UNKNOWN)
        parents = self._parents[blocks]
        behind = np.bincount(parents[parents >= 0], minlength=len(self._depths))
        goes_on = (parents >= 0) & (behind[parents] == 1)
        # The first block of each one's run is found by steps that double.
        head = np.arange(len(self._depths))
        head[blocks[goes_on]] = parents[goes_on]
        while not np.array_equal(further := head[head], head):
            head = further
        heads = head[blocks]
        blocks = blocks[np.lexsort((self._depths[blocks], heads, self._depths[heads]))]
        cuts = np.flatnonzero(np.diff(head[blocks], prepend=-1))
        return blocks, np.diff(cuts, append=len(blocks))

    def _reach(self, rows: int) -> None:
        """Makes room for that many blocks."""
        before = len(self._depths)
        if rows > before:
            for name in ("_digests", "_tokens", "_parents", "_roots", "_depths"):
                old: npt.NDArray[Any] = getattr(self, name)
                new = np.empty((max(rows, 2 * before), *old.shape[1:]), old.dtype)
                new[:before] = old
                setattr(self, name, new)
            self._depths[before:] = UNKNOWN
