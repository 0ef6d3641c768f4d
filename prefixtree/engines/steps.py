"""One step of an engine whose batches are block tables: what all its layers have in common."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

import attention

RESERVE = 64
"""Decode steps for which one plan reserves room before it is made anew."""


class Step:
    """A forward pass, whose plans are made by the first layer of a kind; the others take them.

    Where it is the decode step after another one, on the same blocks, the plans of that one are
    advanced to it.

    Attributes:
        num_queries: new tokens of all rows.
        decodes: whether every row has one.
    """

    def __init__(
        self,
        tables: NDArray[np.int32],
        lengths: NDArray[np.integer],
        query_starts: NDArray[np.integer],
        block_size: int,
        before: Step | None = None,
    ) -> None:
        """Nothing is computed before a layer asks for its plan.

        Args:
            tables: int32 [S, columns], block ids of each row; anything behind its length.
            lengths: integers [S], tokens of each row, new ones included.
            query_starts: integers [S + 1], running sums of the rows' new tokens, at least one each.
            before: the step that ran before this one, whose plans nobody will ask for any more.

        The arrays are kept, not copied.
        """
        self.num_queries = int(query_starts[-1])
        self.decodes = self.num_queries == len(lengths)
        self._tables = tables
        self._lengths = lengths
        self._query_starts = query_starts
        self._block_size = block_size
        self._before = before
        self._plans: dict[tuple[object, ...], attention.Plan] = {}
        self._forest: attention.Forest | None = None
        if before is not None:
            before._before = None  # no chain of steps is kept

    def plan(self, window: int | None, **problem: Any) -> attention.Plan:
        """The plan for a layer: `attention.plan`'s arguments, of hashable values.

        All layers of an engine give the same ones in the same order.
        """
        if self._before is not None:
            self._plans, self._before = self._advanced(self._before), None
        window = reaching(window, self._lengths)
        key = (window, *problem.values())
        plan = self._plans.get(key)
        if plan is None:
            if self._forest is None:
                self._forest = attention.forest_from_block_tables(
                    self._tables, self._lengths, self._query_starts, self._block_size
                )
            plan = self._plans[key] = attention.plan(
                self._forest, window=window, reserve=RESERVE if self.decodes else 0, **problem
            )
        return plan

    def _advanced(self, before: Step) -> dict[tuple[object, ...], attention.Plan]:
        """The plans of the step before, taken from it and moved on to this one."""
        advanced: dict[tuple[object, ...], attention.Plan] = {}
        tables, lengths, size = self._tables, self._lengths, self._block_size
        if not (self.decodes and before.decodes and before._plans) or not grew_by_a_token(
            tables, lengths, before._tables, before._lengths, size
        ):
            return advanced
        slots = slots_of_last(tables, lengths, size)
        while before._plans:
            key, plan = before._plans.popitem()
            with suppress(attention.PlanExhausted):
                plan.advance(slots)
                advanced[key] = plan
        return advanced


def reaching(window: int | None, lengths: NDArray[np.integer]) -> int | None:
    """None instead of a window that nobody outgrows before the plan is made anew."""
    return None if window is None or window >= int(lengths.max()) + RESERVE else window


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
    if len(lengths) != len(lengths_before) or (lengths - lengths_before != 1).any():
        return False
    columns = -(-int(lengths_before.max(initial=0)) // block_size)
    changed = tables[:, :columns] != tables_before[:, :columns]
    if not changed.any():  # but where a row begins a block, what is behind it stays as it is
        return True
    row, column = np.nonzero(changed)
    return bool((column * block_size >= lengths_before[row]).all())


def slots_of_last(
    tables: NDArray[np.int32], lengths: NDArray[np.integer], block_size: int
) -> NDArray[np.int64]:
    """Slots (block * block_size + offset) of the last token of each row, int64 [S]."""
    last = lengths.astype(np.int64) - 1
    blocks = tables[np.arange(len(last)), last // block_size].astype(np.int64)
    return blocks * block_size + last % block_size
