"""Blocks that somebody else hands out: which of them are held."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.errors import BlockTaken, BrokenInvariant, DoubleFree, InvalidArgument, at_least

Int32s = NDArray[np.int32]


class BlockSet:
    """A set of the blocks 0 .. num_blocks-1: the counterpart of `BlockPool` for a tree whose engine
    allocates by itself.

    It hands out nothing. What it is for: a block that is given twice, or given back twice, is found
    at the call that did it. Attributes: `num_blocks`; `block_size`, in tokens.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """InvalidArgument unless both are integers >= 1."""
        self.num_blocks = at_least(1, "num_blocks", num_blocks)
        self.block_size = at_least(1, "block_size", block_size)
        self._refs = np.zeros(self.num_blocks, np.int8)  # small: each call finds its part uncached
        self._held = 0

    def __len__(self) -> int:
        """How many blocks are held. O(1)."""
        return self._held

    @property
    def refs(self) -> NDArray[np.int8]:
        """int8 [num_blocks]: 1 for a block that is held, else 0. A read-only view."""
        view = self._refs.view()
        view.flags.writeable = False
        return view

    @property
    def num_free(self) -> int:
        """Blocks that are not held. O(1)."""
        return self.num_blocks - self._held

    @property
    def num_free_extents(self) -> int:
        """Runs of consecutive blocks that are not held. O(num_blocks) in numpy."""
        free = self._refs == 0
        return int(np.count_nonzero(free[1:] > free[:-1])) + int(free[0])

    def add(self, blocks: NDArray[np.integer[Any]]) -> None:
        """Holds `blocks`, integers [n].

        Raises InvalidArgument for one out of range, BlockTaken for those that are held already or
        named twice; then nothing has changed. O(n) in numpy.
        """
        # Read without a sign, what is below 0 is above all blocks.
        if np.maximum.reduce(blocks.view(f"u{blocks.itemsize}"), initial=0) >= self.num_blocks:
            outside = (blocks < 0) | (blocks >= self.num_blocks)
            raise InvalidArgument(
                f"block {blocks[outside][0]} is none of the engine's, expected"
                f" 0..{self.num_blocks - 1}"
            )
        places = blocks.astype(np.intp, copy=False)  # once, not at each use
        refs = self._refs.take(places)
        if np.count_nonzero(refs):
            raise BlockTaken(blocks[refs != 0])
        if np.count_nonzero(places[1:] <= places[:-1]):  # else they are distinct
            ordered = np.sort(places)
            again = ordered[1:] == ordered[:-1]
            if np.count_nonzero(again):
                raise BlockTaken(ordered[1:][again])
        self._refs[places] = 1
        self._held += len(blocks)

    def remove(self, blocks: Int32s) -> None:
        """Lets go of `blocks`, int32 [n], which are distinct and in range.

        Raises DoubleFree for those that are not held; then nothing has changed. O(n) in numpy.
        """
        places = blocks.astype(np.intp)
        refs = self._refs.take(places)
        if np.count_nonzero(refs) < len(refs):
            raise DoubleFree(blocks[refs == 0])
        self._refs[places] = 0
        self._held -= len(blocks)

    def check(self) -> None:
        """Raises BrokenInvariant unless just the held blocks are counted. O(num_blocks)."""
        found = int(np.count_nonzero(self._refs))
        if found != self._held:
            raise BrokenInvariant(f"{self._held} blocks held as counted, {found} in the set")
