"""What the world outside knows of the cache: its whole blocks, with their hashes and tokens.

Kept apart from the cache, so that hashes are computed, and everything can be told anew, without
it. A whole block has one row, numbered as in `journal`: about 100 bytes at 16 tokens a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

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


class Ledger:
    """The blocks that were told of, and the events that tell of them."""

    def __init__(
        self,
        block_size: int,
        chain: ChainedHash,
        whole_hashes: bool,
        medium: str | None,
        lora_name: Callable[[Namespace], str | None],
    ) -> None:
        self._block_size = block_size
        self._chain = chain
        self._whole_hashes = whole_hashes
        self._medium = medium
        self._lora_name = lora_name
        self._digests: npt.NDArray[np.uint8] = np.empty((0, chain.size), np.uint8)
        self._tokens: Int32s = np.empty((0, block_size), np.int32)
        self._parents: Int32s = np.empty(0, np.int32)
        self._roots: Int32s = np.empty(0, np.int32)  # the first block of a block's path
        self._depths: Int32s = np.empty(0, np.int32)  # blocks in front of it, or UNKNOWN
        self._namespaces: dict[int, Namespace] = {}  # of first blocks, but for the default one
        self._count = 0

    def __len__(self) -> int:
        """Blocks that can be matched."""
        return self._count

    def apply(self, changes: Changes) -> list[Event]:
        """Takes over what changed; returns the events that say so, in order."""
        events: list[Event] = []
        if len(changes.removed):
            events.append(self._remove(changes.removed))
        self._reach(int(changes.stored.max(initial=-1)) + 1)
        self._count += len(changes.stored)
        self._tokens[changes.stored] = changes.tokens.reshape(-1, self._block_size)
        bounds = pairwise([0, *np.cumsum(changes.counts).tolist()])
        for run, (parent, (first, behind)) in enumerate(
            zip(changes.parents.tolist(), bounds, strict=True)
        ):
            if run in changes.namespaces:
                self._namespaces[int(changes.stored[first])] = changes.namespaces[run]
            blocks = changes.stored[first:behind]
            self._store(parent, blocks)
            events.append(self._stored(blocks))
        return events

    def everything(self) -> Iterator[Event]:
        """Events that tell somebody who knows nothing all that there is, parents first."""
        yield AllBlocksCleared()
        for blocks in self._runs():
            yield self._stored(blocks)

    def _remove(self, blocks: Int32s) -> Event:
        self._count -= len(blocks)
        self._depths[blocks] = UNKNOWN
        if self._namespaces:
            for root in self._namespaces.keys() & blocks.tolist():
                del self._namespaces[root]
        if not self._count:
            return AllBlocksCleared()
        return BlockRemoved(block_hashes=self._hashes(blocks), medium=self._medium)

    def _store(self, parent: int, blocks: Int32s) -> None:
        first = int(blocks[0])
        if parent >= 0:
            before = self._digests[parent].tobytes()
            root, depth = self._roots[parent], self._depths[parent] + 1
        else:
            before = self._chain.begin(self._namespaces.get(first, DEFAULT))
            root, depth = np.int32(first), np.int32(0)
        tokens = self._tokens[blocks].astype("<i4", copy=False).tobytes()
        digests = self._chain.extend(before, tokens, 4 * self._block_size)
        self._digests[blocks] = np.frombuffer(digests, np.uint8).reshape(len(blocks), -1)
        self._parents[first] = parent
        self._parents[blocks[1:]] = blocks[:-1]
        self._roots[blocks] = root
        self._depths[blocks] = np.arange(depth, depth + len(blocks))

    def _stored(self, blocks: Int32s | Int64s) -> BlockStored:
        """The event for a run of blocks."""
        parent = self._parents[blocks[:1]]
        namespace = self._namespaces.get(int(self._roots[blocks[0]]), DEFAULT)
        parts = namespace if isinstance(namespace, tuple) else (namespace,)
        return BlockStored(
            block_hashes=self._hashes(blocks),
            parent_block_hash=None if parent[0] < 0 else self._hashes(parent)[0],
            token_ids=self._tokens[blocks].ravel().tolist(),
            block_size=self._block_size,
            lora_id=None,
            medium=self._medium,
            lora_name=self._lora_name(namespace),
            extra_keys=None if namespace == DEFAULT else [parts] * len(blocks),
        )

    def _hashes(self, blocks: Int32s | Int64s) -> list[BlockHash]:
        digests = self._digests[blocks]
        if self._whole_hashes:
            return [digest.tobytes() for digest in digests]
        # As vLLM's integers: the last bytes, the first of them counting most.
        numbers: list[BlockHash] = digests[:, -8:].copy().view(">u8").ravel().tolist()
        return numbers

    def _runs(self) -> Iterator[Int64s]:
        """All blocks in runs as long as no path branches off, parents first. O(n log n)."""
        blocks: Int64s = np.flatnonzero(self._depths != UNKNOWN)
        parents = self._parents[blocks]
        behind = np.bincount(parents[parents >= 0], minlength=len(self._depths))
        # A run goes on with the only block behind its last one. `head` finds the run's first block
        # by doubling steps.
        head = np.arange(len(self._depths))
        goes_on = (parents >= 0) & (behind[parents] == 1)
        head[blocks[goes_on]] = parents[goes_on]
        while not np.array_equal(further := head[head], head):
            head = further
        heads, depths = head[blocks], self._depths[blocks]
        blocks = blocks[np.lexsort((depths, heads, self._depths[heads]))]
        cuts = np.flatnonzero(np.diff(head[blocks])) + 1
        for first, last in pairwise([0, *cuts.tolist(), len(blocks)]):
            if first < last:
                yield blocks[first:last]

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
