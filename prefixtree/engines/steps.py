"""Whether an engine's batch is the decode step after the one before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESERVE = 64
"""Decode steps for which one plan reserves room before it is made anew."""


def grew_by_a_token(
    tables: NDArray[np.int32],
    lengths: NDArray[np.integer],
    tables_before: NDArray[np.int32],
    lengths_before: NDArray[np.integer],
    block_size: int,
) -> bool:
    """Whether each row has one token more, and what it had lies in the same blocks.

    Whose rows they are does not matter, a plan knows blocks and lengths only. An engine may change
    the blocks of a request that decodes: when it finds, a step late, that its prompt was cached.

    Args:
        tables: int32 [S, columns], block ids of each row; anything behind its length.
        lengths: integers [S], tokens of each row.
        tables_before, lengths_before: the same of the step before, with any S and columns.

    O(S * columns), of one comparison.
    """
    if not np.array_equal(lengths, lengths_before + 1):
        return False
    columns = -(-int(lengths_before.max(initial=0)) // block_size)
    row, column = np.nonzero(tables[:, :columns] != tables_before[:, :columns])
    return bool((column * block_size >= lengths_before[row]).all())


def slots_of_last(
    tables: NDArray[np.int32], lengths: NDArray[np.integer], block_size: int
) -> NDArray[np.int64]:
    """Slots (block * block_size + offset) of the last token of each row, int64 [S]."""
    last = lengths.astype(np.int64) - 1
    blocks = tables[np.arange(len(last)), last // block_size].astype(np.int64)
    return blocks * block_size + last % block_size
