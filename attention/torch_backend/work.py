"""A plan for the torch operations, made once a step and run once a layer."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention.algebra import Partial
from attention.explain import WorkSummary
from attention.forest import Int64Array
from attention.options import RunOptions
from attention.problem import Problem
from attention.segments import Segments
from attention.torch_backend.batches import Batches, make_batches
from attention.torch_backend.execute import execute, layer_of
from attention.torch_backend.groups import Group, make_groups
from attention.torch_backend.invariant import add_up, invariant_groups
from attention.torch_backend.items import WorkItems, work_items
from attention.torch_backend.joined import join_short
from attention.torch_backend.tail import Tail
from attention.torch_backend.turning import turned


class TorchWork:
    """The work items of segments and the batched calls they are run in.

    Attributes:
        segments: what was planned, as it is read: short segments joined to others.
        items: of these segments, before they are cut to the size of calls.
    """

    name = "torch"

    def __init__(self, problem: Problem, segments: Segments, reserve: int = 0) -> None:
        """Plan the work on segments, which `advance` may grow `reserve` times.

        Raises PlanMismatch for segments that `check_reserve` does not let advance.
        """
        self.problem = problem
        self._reserve = reserve
        self.update(segments)

    def update(self, segments: Segments, *_: object) -> None:
        """Plan the work on other segments.

        Raises PlanMismatch as when the work was made, which is left as it was.
        """
        if segments.on_paths and not self.problem.batch_invariant:
            segments = join_short(self.problem, segments)
        if self._reserve and self.problem.window is not None:
            segments = _with_own_blocks(segments)  # they are read again by `advance`
        self._tail = Tail(self.problem, segments, self._reserve)
        self.segments = segments
        self._plan(segments)

    def _plan(self, segments: Segments) -> None:
        problem = self.problem
        self.items = items = work_items(segments, problem.window, problem.sink_tokens)
        num_rows = len(segments.query)
        # Where each query has one row, q is brought into the order of the rows once.
        self._query_index: torch.Tensor | None = None
        query, position = segments.query, segments.position
        if num_rows == segments.num_queries:
            if np.count_nonzero(query[1:] < query[:-1]):
                self._query_index = torch.from_numpy(query).to(problem.device)
            query = np.arange(num_rows)
        else:
            position = np.empty(segments.num_queries, np.int64)
            position[query] = segments.position
        self._position = torch.from_numpy(position).to(problem.device)
        if problem.batch_invariant:
            self.groups = invariant_groups(problem, segments, query)
            return
        as_read, self.items = turned(problem, segments, items)
        self.groups, self._made = _grouped(problem, as_read, self.items, query)
        # Distances are counted in the order of the tokens: for slopes, which no plan knows of.
        self._in_order = self.groups if as_read is segments else None
        if self._in_order is None:
            self._unturned = _with_own_blocks(segments), items, query

    def advance(self, slots: npt.NDArray[Any] | torch.Tensor) -> None:
        """Let every sequence grow by one token, and its query move on to it.

        Args:
            slots: integers [S], slot of each sequence's new token, sequences in the packed order.

        Raises:
            PlanMismatch: slots are no S integers of at least 0.
            PlanExhausted: the work has been advanced `reserve` times. It is left as it was.

        O(S), but with a window O(plan): what it leaves behind is no longer read.
        """
        self._tail.advance(slots)
        if self.problem.window is None:
            self._position = self._position + 1
        else:
            self._plan(self.segments._replace(position=self._tail.position))

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial:
        """Attention of all queries in the packed order: o in q's dtype, and lse."""
        index = self._query_index
        if index is not None:
            q = q.index_select(0, index)
        layer = layer_of(self.problem, q, self._position, k_cache, v_cache, options)
        if self.problem.batch_invariant:
            total = add_up(self.problem, self.groups, layer)
        else:
            groups = self.groups if options.alibi_slopes is None else self._groups_in_order()
            total = execute(self.problem, [*groups, *self._tail.groups], layer)
        o = total.o
        if options.v_scale is not None:
            o = o * options.v_scale.view(-1, 1, 1)
        o, lse = o.flatten(1, 2), total.lse.flatten(1, 2)
        if o.dtype != q.dtype:
            o = o.to(q.dtype)
        if index is None:
            return Partial(o, lse)
        return Partial(
            torch.empty_like(o).index_copy_(0, index, o),
            torch.empty_like(lse).index_copy_(0, index, lse),
        )

    def _groups_in_order(self) -> list[Group]:
        """The calls where nothing is turned; planned by the first run that needs them."""
        if self._in_order is None:
            self._in_order, _ = _grouped(self.problem, *self._unturned)
        return self._in_order

    def summary(self) -> WorkSummary:
        """The batched calls; padding is no token, and nothing waits for a later merge."""
        if self.problem.batch_invariant:
            loaded = sum(group.size * group.tokens for group in self.groups)
        else:
            loaded = sum(int(batches.items.kv_len.sum()) for batches in self._made)
        return WorkSummary(
            units=(("work items", len(self.items.kv_len)), ("batched calls", len(self.groups))),
            kv_tokens_loaded=loaded,
            partials=0,
        )


def _with_own_blocks(segments: Segments) -> Segments:
    """The segments, whatever the caller does to his array of blocks."""
    return segments._replace(blocks=segments.blocks.copy())


def _grouped(
    problem: Problem, segments: Segments, items: WorkItems, query: Int64Array
) -> tuple[list[Group], list[Batches]]:
    """The batched calls of items, and the batches that they were made from."""
    views, gathers = make_batches(problem, segments, items, _kinds(segments))
    groups = make_groups(problem, segments, query, views, gathers)
    return groups, [some.batches for some in (views, gathers) if some is not None]


def _kinds(segments: Segments) -> Int64Array | None:
    """Segments of another temperature share no call."""
    if segments.temperature is None:
        return None
    return np.unique(segments.temperature, return_inverse=True)[1]
