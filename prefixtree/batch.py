"""Sequences that take their steps together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int64s
from prefixtree.errors import InvalidBatch, InvalidLength
from prefixtree.sequence import Sequence

if TYPE_CHECKING:
    from prefixtree.cache import PrefixCache


class Batch:
    """Open sequences of one cache; saves looking them up each step.

    Made by `PrefixCache.batch`. Used with a sequence that was closed or preempted meanwhile, even
    if it was resumed, it raises `SequenceClosed`.
    """

    __slots__ = ("cache", "sequences", "serials", "tails")

    def __init__(self, cache: PrefixCache, sequences: Iterable[Sequence]) -> None:
        self.cache = cache
        self.sequences = tuple(sequences)
        for member in self.sequences:
            if not isinstance(member, Sequence):
                raise InvalidBatch(f"a batch is made of sequences, got {member!r:.60}")
        if any(sequence._cache is not cache for sequence in self.sequences):
            raise InvalidBatch("a sequence of the batch belongs to another cache")
        serials = [sequence._serial for sequence in self.sequences]
        if len(set(serials)) < len(serials):
            raise InvalidBatch("a sequence is in the batch twice")
        self.serials: Int64s = np.array(serials, np.int64)
        self.tails: Int64s = np.array([s._tail for s in self.sequences], np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def per_sequence(self, values: npt.ArrayLike | None, default: int, name: str) -> Int64s:
        """An argument that has one integer a sequence, or `default` for each."""
        if values is None:
            return np.full(len(self), default, np.int64)
        array = np.asarray(values)
        if array.shape != (len(self),) or (array.dtype.kind not in "iu" and len(array)):
            raise InvalidLength(
                f"{name} must be {len(self)} integers, got {array.dtype} {array.shape}"
            )
        return array.astype(np.int64)
