"""A plan for the float64 reference: what it reads of the source is what every run reads."""

from typing import Any

import numpy.typing as npt
import torch

from attention.algebra import Partial
from attention.counting import tokens_per_path
from attention.errors import PlanExhausted
from attention.explain import WorkSummary
from attention.forest import ForestArrays
from attention.node_sets import NodeSets
from attention.options import RunOptions
from attention.problem import Problem
from attention.reference import attend
from attention.segments import FloatArray, Segments


class ReferenceWork:
    """The source itself, attended to densely in float64 and rounded once, at the end."""

    name = "reference"

    def __init__(
        self,
        problem: Problem,
        segments: Segments,
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None,
        log_weight: FloatArray | None,
    ) -> None:
        self.problem = problem
        self.update(segments, source, temperature, log_weight)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial:
        """Attention of all queries in the packed order: o in q's dtype, and lse."""
        problem = self.problem
        o, lse = attend(
            self.source,
            q,
            k_cache,
            v_cache,
            layout=problem.layout,
            window=problem.window,
            sink_tokens=problem.sink_tokens,
            temperature=self.temperature,
            log_weight=self.log_weight,
            **options._asdict(),
        )
        return Partial(o.to(q), lse.to(q.device, problem.precision))

    def summary(self) -> WorkSummary:
        """Every query by itself, on the tokens of its sequence."""
        return WorkSummary(
            units=(("queries", self.segments.num_queries),),
            kv_tokens_loaded=tokens_per_path(self.problem, self.segments),
            partials=0,
        )

    def update(
        self,
        segments: Segments,
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None,
        log_weight: FloatArray | None,
    ) -> None:
        """Attend to another source."""
        self.segments = segments
        self.source = source
        self.temperature = temperature
        self.log_weight = log_weight

    def advance(self, slots: npt.NDArray[Any]) -> None:
        """Raise PlanExhausted: this backend reserves no room."""
        raise PlanExhausted(f"the backend {self.name!r} makes a new plan for each step")
