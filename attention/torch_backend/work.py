"""A plan for the torch operations, made once a step and run once a layer."""

from typing import Any

import numpy.typing as npt
import torch

from attention.algebra import Partial
from attention.errors import PlanExhausted
from attention.explain import WorkSummary
from attention.options import RunOptions
from attention.problem import Problem
from attention.segments import Segments
from attention.torch_backend.batches import make_batches
from attention.torch_backend.execute import execute
from attention.torch_backend.groups import make_groups
from attention.torch_backend.items import work_items


class TorchWork:
    """The work items of segments and the batched calls they are run in."""

    name = "torch"

    def __init__(self, problem: Problem, segments: Segments) -> None:
        self.problem = problem
        self.items = work_items(segments, problem.window)
        batches = make_batches(
            segments,
            self.items,
            token_bytes=problem.token_bytes,
            pair_flops=problem.pair_flops,
            viewable=problem.layout == "NHD",
        )
        self._tokens_loaded = int(batches.items.kv_len.sum())
        self.groups = make_groups(
            segments,
            batches,
            window=problem.window,
            mask_dtype=problem.precision,
            device=problem.device,
        )
        in_order = bool((segments.query[1:] > segments.query[:-1]).all())
        self.query_index = None if in_order else torch.from_numpy(segments.query).to(problem.device)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial:
        """Attention of all queries in the packed order: o in q's dtype, and lse."""
        return execute(self.problem, self.groups, self.query_index, q, k_cache, v_cache, options)

    def summary(self) -> WorkSummary:
        """The batched calls; padding is no token, and nothing waits for a later merge."""
        return WorkSummary(
            units=(("work items", len(self.items.kv_len)), ("batched calls", len(self.groups))),
            kv_tokens_loaded=self._tokens_loaded,
            partials=0,
        )

    def advance(self, slots: npt.NDArray[Any]) -> None:
        """Raise PlanExhausted: this backend reserves no room."""
        raise PlanExhausted(f"the backend {self.name!r} makes a new plan for each step")
