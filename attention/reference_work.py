"""A plan for the float64 reference: what it reads of the source is what every run reads."""

import torch

from attention.algebra import Partial
from attention.forest import ForestArrays
from attention.node_sets import NodeSets
from attention.options import RunOptions
from attention.problem import Problem
from attention.reference import attend
from attention.segments import FloatArray


class ReferenceWork:
    """The source itself, attended to densely in float64 and rounded once, at the end."""

    name = "reference"

    def __init__(
        self,
        problem: Problem,
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None,
        log_weight: FloatArray | None,
    ) -> None:
        self.problem = problem
        self.source = source
        self.temperature = temperature
        self.log_weight = log_weight

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial:
        """Attention of all queries in the packed order: o in q's dtype, and lse."""
        given = options._asdict() | {
            "layout": self.problem.layout,
            "window": self.problem.window,
            "sink_tokens": self.problem.sink_tokens or None,
            "temperature": self.temperature,
            "log_weight": self.log_weight,
        }
        given = {name: value for name, value in given.items() if value is not None}
        o, lse = attend(self.source, q, k_cache, v_cache, **given)
        return Partial(o.to(self.problem.dtype), lse.to(self.problem.precision))
