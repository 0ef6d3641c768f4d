"""Runs of plans in compiled graphs: one node, for one plan after another."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attention
from attention import Plan, PlanMismatch
from tests.attention.strategies import Case, Node, Tensors, build_forest, tensors

Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def decode(
    sequences: int, dtype: torch.dtype = torch.float32, first: int = 6
) -> tuple[Plan, Tensors]:
    """A plan of one query for each of some sequences behind a shared node, and its tensors."""
    nodes = [Node(-1, first), *(Node(0, 1 + i) for i in range(sequences))]
    forest, _ = build_forest(4, nodes, [(1 + i, 1) for i in range(sequences)])
    plan = attention.plan(forest, num_q_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype)
    return plan, tensors(Case(forest, num_blocks=40, dtype=dtype), seed=sequences)


def compiled(counter: CompileCounterWithBackend, **options: Any) -> Layer:
    @torch.compile(backend=counter, fullgraph=True, **options)
    def layer(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = attention.run(plan, q * 2, k, v, softcap=30.0)
        return out + 1, lse

    return layer


def assert_as_eager(layer: Layer, plan: Plan, given: Tensors) -> None:
    out, lse = layer(plan, *given)
    expected_out, expected_lse = attention.run(
        plan, given.q * 2, given.k_cache, given.v_cache, softcap=30.0
    )
    assert torch.equal(out, expected_out + 1)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("grad", [False, True])
def test_one_node_of_a_whole_graph(grad: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    plan, given = decode(3)
    given.q.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert_as_eager(compiled(counter), plan, given)
    (graph,) = counter.graphs
    calls = [node.target for node in graph.graph.nodes if "prefixtree" in str(node.target)]
    assert calls == [torch.ops.prefixtree.run.default]


def test_the_next_plan_runs_through_the_same_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = compiled(counter)
    for first in (6, 7, 8, 30):
        # Sequences, and so shapes, are as many; what they attend to differs.
        assert_as_eager(layer, *decode(3, first=first))
    assert counter.frame_count == 1


def test_batches_of_all_sizes_run_through_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = compiled(counter, dynamic=True)
    # The first is no other tensor's size: the compiler takes equal sizes to stay equal.
    for sequences in (7, 3, 5, 8, 4):
        assert_as_eager(layer, *decode(sequences))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_fake_has_the_shapes_dtypes_and_strides_of_the_real(dtype: torch.dtype) -> None:
    plan, given = decode(3, dtype)
    for options in ((None, None), (0.3, 20.0)):
        torch.library.opcheck(
            torch.ops.prefixtree.run.default, (plan.handle, *given, *options, None, None, None)
        )


def test_the_checks_are_those_of_a_run() -> None:
    layer = compiled(CompileCounterWithBackend("aot_eager"))
    plan, given = decode(3)
    with pytest.raises(PlanMismatch, match=r"q has shape \(2, 4, 32\), expected \(3, 4, 32\)"):
        layer(plan, *given._replace(q=given.q[:2]))
    assert_as_eager(layer, plan, given)


def test_a_handle_does_not_keep_its_plan() -> None:
    plan, given = decode(3)
    handle = plan.handle
    del plan
    gc.collect()
    with pytest.raises(PlanMismatch, match=rf"plan of handle {handle.item()} is gone"):
        torch.ops.prefixtree.run(handle, *given, None, None, None, None, None)


def test_every_plan_has_its_own_handle() -> None:
    plan, _ = decode(3)
    changed = dataclasses.replace(plan, block_size=8)
    assert changed.handle.item() != plan.handle.item()
    with torch.inference_mode():
        assert not decode(3)[0].handle.is_inference()
