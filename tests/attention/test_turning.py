"""Runs of blocks that fall: read in place from their other end, where order is all the same."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.options import RunOptions
from attention.segments import segments_of
from attention.torch_backend import TorchWork, turning
from attention.torch_backend.groups import InPlace
from tests.attention.checks import assert_as_good_as_flat, plan_of
from tests.attention.strategies import Case, Node, build_forest, cases, forests, tensors


def fallen(case: Case) -> Case:
    """The same nodes on blocks in the opposite order."""
    forest = case.forest
    blocks = case.num_blocks - 1 - forest.blocks
    return replace(case, source=type(forest)(**{**vars(forest), "blocks": blocks}))


@given(cases(source=forests()), st.sampled_from((0, 4096)))
def test_as_good_as_flat_attention_on_falling_blocks(case: Case, worthwhile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turning, "WORTH_A_CALL", worthwhile)
        case = fallen(case)
        assert_as_good_as_flat(case, tensors(case))


def decoding(length: int, query_len: int = 1) -> Case:
    """Two sequences of some length behind 640 shared tokens."""
    nodes = [Node(-1, 640), Node(0, length), Node(0, length)]
    forest, num_blocks = build_forest(16, nodes, [(1, query_len), (2, query_len)])
    return Case(forest, num_blocks, num_q_heads=4, num_kv_heads=2, head_dim=64)


def in_place(case: Case) -> int:
    """Tokens that are read in place."""
    groups = plan_of(case).work.groups
    return sum(group.size * group.tokens for group in groups if isinstance(group.kv, InPlace))


@pytest.mark.parametrize("length", [512, 519])
def test_falling_runs_are_read_in_place_but_for_what_does_not_fill_a_block(length: int) -> None:
    case = decoding(length)
    assert in_place(case) == 640 + 2 * length
    case = fallen(case)
    assert in_place(case) == 640 + 2 * 512
    assert_as_good_as_flat(case, tensors(case))


def test_what_causality_hides_in_part_stays_in_order() -> None:
    case = fallen(decoding(519, query_len=300))
    assert in_place(case) == 640
    assert_as_good_as_flat(case, tensors(case))


def test_what_is_too_small_for_a_call_stays_in_order() -> None:
    case = fallen(decoding(48))
    segments = segments_of(case.forest)
    work = TorchWork(plan_of(case).problem, segments)
    assert work.items.kv_len.tolist() == [640, 48, 48]


def test_slopes_bring_the_order_back_also_in_a_plan_that_grew() -> None:
    case = fallen(decoding(519))
    problem, segments = plan_of(case).problem, segments_of(case.forest)
    turns, keeps_order = (TorchWork(problem, segments, reserve=1) for _ in range(2))
    given = tensors(case)
    plain = RunOptions(0.125, None, None, None, None)
    sloped = plain._replace(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))
    keeps_order.run(*given, sloped)
    for work in (turns, keeps_order):
        work.advance(16 * case.forest.blocks[:2].astype(np.int64))
    for options in (plain, sloped, plain):
        one, other = (work.run(*given, options) for work in (turns, keeps_order))
        torch.testing.assert_close(one.o, other.o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.lse, other.lse, rtol=1e-5, atol=1e-5)
    case = replace(case, alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
    assert_as_good_as_flat(case, given)


def test_runs_with_and_without_slopes_at_the_same_time() -> None:
    case = fallen(decoding(519))
    given = tensors(case)
    plain = RunOptions(0.125, None, None, None, None)
    sloped = plain._replace(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))
    problem, segments = plan_of(case).problem, segments_of(case.forest)
    expected = {
        options is plain: TorchWork(problem, segments).run(*given, options).o
        for options in (plain, sloped)
    }
    for _ in range(20):
        work = TorchWork(problem, segments)
        with ThreadPoolExecutor(3) as pool:
            options = [sloped, plain, sloped]
            runs = [pool.submit(work.run, *given, one) for one in options]
        for one, run in zip(options, runs, strict=True):
            assert torch.equal(run.result().o, expected[one is plain])
