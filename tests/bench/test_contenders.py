"""Every way to compute attention gives the same results, ours and the others'."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attention
from prefixtree.bench import flex
from prefixtree.bench.contenders import (
    Contender,
    FlashPerLevel,
    Ours,
    OursUnshared,
    SdpaPadded,
    SdpaPerSequence,
    Unavailable,
)
from prefixtree.bench.flash_infer import FlashInferCascade, FlashInferDecode
from prefixtree.bench.flex import Allowance, Flex
from prefixtree.bench.inputs import Inputs, exact_sample, make_inputs
from prefixtree.bench.shapes import Shape
from prefixtree.bench.trees import Tree, level_tree, tree

CPU = torch.device("cpu")
UNIFORM = level_tree((2, 4, 8), (20, 7, 3))
RAGGED = level_tree((1, 2, 5), (9, [30, 2], [1, 2, 3, 4, 5]))
ONE = tree(np.array([-1]), np.array([40]), np.zeros(3, np.int64))
DRAFTS = tree(np.array([-1, 0, 0, 1]), np.array([33, 1, 1, 1]), np.array([1, 2, 3]))
SPLIT = level_tree((1, 2), (21, 6))._replace(continues=np.array([False, True, False]))
TREES = {"uniform": UNIFORM, "ragged": RAGGED, "one": ONE, "drafts": DRAFTS, "split": SPLIT}


def inputs_of(shaped: Tree, *, heads: tuple[int, int] = (6, 2)) -> Inputs:
    shape = Shape("test", "test", shaped, *heads, head_dim=32)
    return make_inputs(shape, torch.float32, CPU, seed=5)


def expected(inputs: Inputs) -> torch.Tensor:
    return attention.attend(inputs.forest, inputs.q, inputs.k_cache, inputs.v_cache)[0]


def assert_right(contender: Contender, inputs: Inputs) -> None:
    contender.plan()
    out = contender.run()
    assert out.dtype == inputs.dtype
    torch.testing.assert_close(out.double(), expected(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shaped", TREES.values(), ids=TREES)
@pytest.mark.parametrize("kind", [Ours, OursUnshared, SdpaPerSequence, SdpaPadded])
def test_ours_and_sdpa_compute_any_tree(kind: type[Contender], shaped: Tree) -> None:
    inputs = inputs_of(shaped)
    assert_right(kind(inputs), inputs)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("name", ["uniform", "one", "split"])
def test_flash_per_level_computes_uniform_trees(name: str, heads: tuple[int, int]) -> None:
    inputs = inputs_of(TREES[name], heads=heads)
    assert_right(FlashPerLevel(inputs), inputs)


@pytest.mark.parametrize("name", ["ragged", "drafts"])
def test_flash_per_level_refuses_other_trees(name: str) -> None:
    with pytest.raises(Unavailable, match="not uniform"):
        FlashPerLevel(inputs_of(TREES[name]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shaped", TREES.values(), ids=TREES)
def test_flex_computes_any_tree(shaped: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(function: Any, **_: Any) -> Any:
        return function

    monkeypatch.setattr(flex.torch, "compile", uncompiled)
    inputs = inputs_of(shaped)
    assert_right(Flex(inputs, Allowance(1e9)), inputs)


@pytest.mark.parametrize("kind", [SdpaPerSequence, SdpaPadded, Flex])
def test_what_would_take_too_much_memory_is_refused(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtree.bench import contenders

    monkeypatch.setitem(contenders.MOST_COPIED, "cpu", 10)
    with pytest.raises(Unavailable, match=r"copy of KV has 0.0 GiB|too large"):
        kind(inputs_of(RAGGED), *([Allowance(1.0)] if kind is Flex else []))


def test_compiling_ends_when_its_time_is_up() -> None:
    allowance = Allowance(0.01)

    def never_done() -> None:
        with allowance.spend("compiling"):
            while True:
                pass

    with pytest.raises(Unavailable, match="compiling took too long"):
        never_done()
    with pytest.raises(Unavailable, match="the time for compiling flex_attention is used up"):
        Flex(inputs_of(ONE), allowance)


class FakeDecode:
    """FlashInfer's decode wrapper in float64: queries against the pages of each run."""

    def __init__(self, workspace: torch.Tensor, layout: str, **_: Any) -> None:
        assert layout == "NHD"

    def plan(self, indptr: Any, indices: Any, last: Any, *rest: Any, **_: Any) -> None:
        self.table, self.page = (indptr, indices, last), rest[3]
        self.query_ptr = torch.arange(len(last) + 1)

    def run(self, q: torch.Tensor, kv: Any) -> torch.Tensor:
        return self.partial(q, kv).o.to(q.dtype)

    def partial(self, q: torch.Tensor, kv: Any) -> attention.Partial:
        indptr, indices, last = self.table
        assert kv[0].shape[1] == self.page
        parts = []
        for run in range(len(last)):
            pages = indices[indptr[run] : indptr[run + 1]].long()
            length = (len(pages) - 1) * self.page + int(last[run])
            k, v = (cache[pages].flatten(0, 1)[:length].double() for cache in kv)
            rows = q[self.query_ptr[run] : self.query_ptr[run + 1]].double()
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            logits = torch.einsum("qhd,thd->qht", rows, k) * q.shape[2] ** -0.5
            o = torch.einsum("qht,thd->qhd", logits.softmax(2), v)
            parts.append((o, logits.logsumexp(2)))
        return attention.Partial(*(torch.cat(x) for x in zip(*parts, strict=True)))


class FakeCascade:
    """FlashInfer's cascade: a wrapper for each level, merged."""

    def __init__(self, levels: int, workspace: torch.Tensor, layout: str) -> None:
        self.levels = [FakeDecode(workspace, layout) for _ in range(levels)]

    def plan(self, query_ptrs: Any, indptrs: Any, indices: Any, lasts: Any, *rest: Any, **_: Any):
        tables = zip(self.levels, query_ptrs, indptrs, indices, lasts, strict=True)
        for level, query_ptr, *table in tables:
            level.plan(*table, *rest)
            level.query_ptr = query_ptr

    def run(self, q: torch.Tensor, kv: Any) -> torch.Tensor:
        total = self.levels[0].partial(q, kv)
        for level in self.levels[1:]:
            total = attention.merge(total, level.partial(q, kv))
        return total.o.to(q.dtype)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FakeDecode,
        MultiLevelCascadeAttentionWrapper=FakeCascade,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", library)


@pytest.mark.parametrize("shaped", TREES.values(), ids=TREES)
def test_flashinfer_is_given_pages_of_every_path(shaped: Tree, flashinfer: None) -> None:
    inputs = inputs_of(shaped)
    assert_right(FlashInferDecode(inputs), inputs)


@pytest.mark.parametrize("name", ["uniform", "ragged", "one", "split"])
def test_flashinfer_cascades_over_levels(name: str, flashinfer: None) -> None:
    inputs = inputs_of(TREES[name])
    assert_right(FlashInferCascade(inputs), inputs)


def test_flashinfer_cannot_cascade_over_every_tree(flashinfer: None) -> None:
    with pytest.raises(Unavailable, match="must stand in the order of the tree"):
        FlashInferCascade(inputs_of(DRAFTS))
    early = tree(np.array([-1, 0]), np.array([20, 5]), np.array([0, 1]))
    with pytest.raises(Unavailable, match="levels must hold every sequence"):
        FlashInferCascade(inputs_of(early))


def test_without_flashinfer_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(Unavailable, match="flashinfer cannot be imported"):
        FlashInferDecode(inputs_of(ONE))


def test_the_sample_is_exact() -> None:
    inputs = inputs_of(UNIFORM)
    out = expected(inputs)
    sample = exact_sample(inputs, most=3)
    assert sample.sequences.tolist() == [0, 3, 7]
    assert sample.error(out) < 1e-12
    out[3, 0, 0] += 0.5
    assert sample.error(out) == pytest.approx(0.5)
    assert len(exact_sample(inputs, most=100).sequences) == 8
