"""Runs a plan with torch operations, on any device; the fast path on CPU."""

import torch

from attention.algebra import Partial, merge_
from attention.problem import Problem
from attention.torch_backend.attend import attend, query_range
from attention.torch_backend.groups import Group
from attention.torch_backend.layer import Layer


def execute(problem: Problem, groups: list[Group], layer: Layer) -> Partial:
    """Partials of all queries over all groups, [N, Hkv, group, d] in the problem's precision."""
    total: Partial | None = None
    for group in groups:
        part = attend(group, layer)
        if total is None:
            if group.first_query == 0 and len(part.o) == len(layer.q) and group.rows is None:
                total = Partial(part.o.contiguous(), part.lse.contiguous())
                continue
            total = _nothing(problem, layer)
        _add(total, group, part)
    return _nothing(problem, layer) if total is None else total


def _nothing(problem: Problem, layer: Layer) -> Partial:
    shape = layer.q.shape[:3]
    return Partial(
        layer.q.new_zeros((*shape, problem.value_head_dim), dtype=problem.precision),
        layer.q.new_full(shape, -torch.inf, dtype=problem.precision),
    )


def _add(total: Partial, group: Group, part: Partial) -> None:
    """Merge the kept rows of a group into those of their queries, none of which occurs twice."""
    if group.rows is not None and group.targets is not None:
        part = Partial(part.o.index_select(0, group.rows), part.lse.index_select(0, group.rows))
        index = group.targets
    elif group.query_index is not None:
        index = group.query_index
    else:
        of = query_range(group)
        merge_(Partial(total.o[of], total.lse[of]), part)
        return
    merged = Partial(total.o.index_select(0, index), total.lse.index_select(0, index))
    merge_(merged, part)
    total.o.index_copy_(0, index, merged.o)
    total.lse.index_copy_(0, index, merged.lse)
