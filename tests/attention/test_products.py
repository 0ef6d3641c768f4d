"""Attention as products of matrices, chosen for many rows, here for all."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.algebra import Partial
from attention.torch_backend import products, softmax
from attention.torch_backend.bias import Bias
from tests.attention.checks import assert_as_good_as_flat, run
from tests.attention.strategies import LARGE, Case, Node, build_forest, cases, tensors

pytestmark = pytest.mark.skipif(not products.HAS_OPERATOR, reason="needs a torch with oneDNN")


def all_by_products(tile: int = products.KV_TILE, logits: int = products.LOGITS) -> ExitStack:
    """Everything but float64 by products, in tiles of so many tokens and logits."""
    stack = ExitStack()
    stack.enter_context(patch.object(softmax, "worthwhile", lambda q, _: q.dtype != torch.float64))
    stack.enter_context(patch.object(products, "KV_TILE", tile))
    stack.enter_context(patch.object(products, "LOGITS", logits))
    return stack


@given(cases(), st.sampled_from((products.KV_TILE, 5)), st.sampled_from((products.LOGITS, 20)))
def test_as_good_as_flat_attention_against_float64(case: Case, tile: int, logits: int) -> None:
    with all_by_products(tile, logits):
        assert_as_good_as_flat(case, tensors(case))


@given(cases(), st.sampled_from((products.KV_TILE, 5)))
def test_the_same_bits_on_every_run(case: Case, tile: int) -> None:
    given_ = tensors(case)
    with all_by_products(tile):
        first, second = run(case, given_), run(case, given_)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("shape", LARGE)
def test_shapes_at_which_work_is_cut(shape: str, window: int | None, dtype: torch.dtype) -> None:
    forest, num_blocks = build_forest(16, *LARGE[shape])
    case = Case(forest, num_blocks, num_q_heads=8, window=window, dtype=dtype)
    with all_by_products(tile=100, logits=1000):
        assert_as_good_as_flat(case, tensors(case))


def test_a_row_that_sees_nothing_gives_the_identity() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    mask = torch.zeros(2, 1, 4, 6)
    mask[1, :, 2] = -torch.inf
    for tile in 6, 2:
        with all_by_products(tile):
            o, lse = products.by_products(q, k, k, 8, Bias(mask, None, None), 1.0, None)
        assert (o[1, :, 2] == 0).all()
        assert (lse[1, :, 2] == -torch.inf).all()
        o[1, :, 2], lse[1, :, 2] = 0.5, 1.0
        assert o.isfinite().all()
        assert lse.isfinite().all()


def test_many_rows_on_many_tokens_go_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_GAINS", True)
    seen = []

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Partial:
        seen.append((q.shape[2], k.shape[2]))
        return products.by_products(q, k, *rest)

    monkeypatch.setattr(softmax, "by_products", watched)
    # 32 sequences on 600 tokens, 4 query heads on each KV head; on 100 tokens; and 2 on 600.
    for length, sequences, expected in ((600, 32, [(128, 600)]), (100, 32, []), (600, 2, [])):
        nodes = [Node(-1, length), *[Node(0, 5)] * sequences]
        forest, num_blocks = build_forest(16, nodes, [(i + 1, 1) for i in range(sequences)])
        case = Case(forest, num_blocks, num_q_heads=8, num_kv_heads=2, head_dim=128)
        seen.clear()
        assert_as_good_as_flat(case, tensors(case))
        assert seen == expected


@pytest.mark.parametrize(
    ("rows", "tokens", "head_dim", "dtype", "threads", "chosen"),
    [
        (64, 512, 128, torch.float32, 1, True),
        (64, 512, 128, torch.bfloat16, 1, True),
        (64, 512, 128, torch.float64, 1, False),
        (63, 5120, 128, torch.float32, 1, False),
        (64, 511, 128, torch.float32, 1, False),
        (64, 512, 128, torch.float32, 2, False),
        (64, 1024, 128, torch.float32, 2, True),
        (64, 4096, 64, torch.float32, 1, False),
    ],
)
def test_which_shapes_go_this_way(
    rows: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    threads: int,
    chosen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_GAINS", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for size in 1, 7:
        q = torch.empty((size, 2, rows, head_dim), dtype=dtype)
        assert products.worthwhile(q, tokens) == chosen
