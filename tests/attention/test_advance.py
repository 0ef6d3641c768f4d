"""Plans that grow by a token a sequence, and plans that become others in the same tensors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
from attention import Forest
from attention.errors import PlanExhausted, PlanFull, PlanMismatch
from attention.segments import Segments, segments_of
from attention.torch_backend import TorchWork
from attention.triton_backend.planner import Shape
from attention.triton_backend.work import TritonWork
from tests.attention.strategies import Node, build_forest, forests, sets_of, with_sequences
from tests.attention.test_schedule import FAT, LEAN, check, problem_of, shapes, windows


def decoding(forest: Forest) -> Forest:
    """The same nodes and leaves with one query a sequence."""
    return with_sequences(forest, [(int(leaf), 1) for leaf in forest.leaf])


def grown(segments: Segments, slots: list[np.ndarray]) -> Segments:
    """The segments, and one of one token for each sequence and step, in blocks of their own.

    Args:
        slots: for each step, slot of each sequence's token, in the packed order.
    """
    rows = len(segments.query)
    for step, of_query in enumerate(slots):
        slot = of_query[segments.query]
        block = slot // segments.block_size
        segments = segments._replace(
            blocks=np.append(segments.blocks, block.astype(np.int32)),
            node=np.append(segments.node, np.full(rows, -1)),
            start=np.append(segments.start, segments.position + 1),
            length=np.append(segments.length, np.ones(rows, np.int64)),
            offset=np.append(segments.offset, slot % segments.block_size),
            first_block=np.append(segments.first_block, len(segments.blocks) + np.arange(rows)),
            row_begin=np.append(segments.row_begin, np.arange(rows)),
            row_end=np.append(segments.row_end, np.arange(rows) + 1),
            round=np.append(segments.round, np.full(rows, segments.round.max() + 1 + step)),
            position=segments.position + 1,
        )
        for name in ("temperature", "log_weight"):
            assert getattr(segments, name) is None
    return segments


@st.composite
def growths(draw: st.DrawFn) -> tuple[Segments, int, list[np.ndarray]]:
    """A decoding batch, the blocks it needs, and the slots of the tokens to come.

    Tokens follow their sequence's last one in its block, if they can, or go to any other slot.
    """
    forest, num_blocks = draw(forests())
    segments = segments_of(decoding(forest))
    size, sequences, steps = segments.block_size, len(forest.leaf), draw(st.integers(1, 6))
    used = np.zeros((num_blocks + sequences * steps) * size, np.bool_)
    for segment in range(len(forest.length)):
        place = forest.offset[segment] + np.arange(forest.length[segment])
        blocks = forest.blocks[forest.block_ptr[segment] :]
        used[blocks[place // size] * size + place % size] = True
    last_place = forest.offset[forest.leaf] + forest.length[forest.leaf] - 1
    last_block = forest.blocks[forest.block_ptr[forest.leaf] + last_place // size]
    last = (last_block * size + last_place % size).tolist()
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    straying = draw(st.sampled_from((0.0, 0.3)))
    slots = []
    for _ in range(steps):
        for sequence in range(sequences):
            follows = last[sequence] + 1
            if follows % size == 0 or used[follows] or generator.random() < straying:
                follows = int(generator.choice(np.flatnonzero(~used)))
            used[follows] = True
            last[sequence] = follows
        slots.append(np.array(last))
    return segments, len(used) // size, slots


@settings(max_examples=60)
@given(growths(), windows, shapes())
def test_advancing_is_planning_again(
    growth: tuple[Segments, int, list[np.ndarray]],
    window: int | None,
    shape: Shape,
) -> None:
    segments, num_blocks, slots = growth
    work = TritonWork(problem_of(window, 3), segments, len(slots), shape=shape)
    check(work, segments, num_blocks)
    for step in range(len(slots)):
        work.advance(slots[step])
        if step in (0, len(slots) - 1):
            check(work, grown(segments, slots[: step + 1]), num_blocks)
    with pytest.raises(PlanExhausted, match=f"advanced {len(slots)} times"):
        work.advance(slots[-1])
    check(work, grown(segments, slots), num_blocks)


@st.composite
def set_growths(draw: st.DrawFn) -> tuple[Segments, int, list[np.ndarray]]:
    """As `growths`, of sequences that have one node each, anywhere before their position."""
    forest, num_blocks = draw(forests())
    node = st.integers(0, len(forest.length) - 1)
    nodes, starts = draw(st.lists(node, min_size=1, max_size=12)), st.sampled_from((0, 7))
    members = [[(node, draw(starts))] for node in nodes]
    ends = [start + int(forest.length[node]) for [(node, start)] in members]
    positions = [end - 1 + draw(st.sampled_from((0, 3))) for end in ends]
    segments = segments_of(sets_of(forest, members, positions, [1] * len(nodes)))
    first = num_blocks * forest.block_size
    slots = [first + np.arange(len(nodes)) * 4 + step for step in range(draw(st.integers(1, 4)))]
    return segments, (first + 4 * len(nodes)) // forest.block_size + 1, slots


@settings(max_examples=40)
@given(set_growths(), windows, shapes())
def test_advancing_sets_is_planning_again(
    growth: tuple[Segments, int, list[np.ndarray]], window: int | None, shape: Shape
) -> None:
    segments, num_blocks, slots = growth
    work = TritonWork(problem_of(window), segments, len(slots), shape=shape)
    check(work, segments, num_blocks)
    for step in range(len(slots)):
        work.advance(slots[step])
        check(work, grown(segments, slots[: step + 1]), num_blocks)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 30}, {"alibi_slopes": torch.tensor([0.5, 0.1])}]
)
def test_the_array_of_blocks_is_free_once_the_plan_is_made(
    backend: str, options: dict[str, Any]
) -> None:
    # A long node whose blocks fall, and a tail that begins inside of a block.
    forest, num_blocks = build_forest(16, [Node(-1, 1024), Node(0, 5, offset=3)], [(1, 1)])
    forest.blocks[:64] = forest.blocks[:64][::-1].copy()
    window, slopes = options.get("window"), options.get("alibi_slopes")
    heads = {"num_q_heads": 2, "num_kv_heads": 2, "head_dim": 256}
    plans = [
        attention.plan(
            source, backend=backend, reserve=2, window=window, dtype=torch.float32, **heads
        )
        for source in (forest, replace(forest, blocks=forest.blocks.copy()))
    ]
    forest.blocks[:] = num_blocks
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 256, generator=generator)
    caches = torch.randn(2, num_blocks + 1, 16, 2, 256, generator=generator)
    for slot in (16 * num_blocks + 8, 16 * num_blocks + 9):
        for plan in plans:
            plan.advance(np.array([slot]))
        results = (attention.run(plan, q, *caches, alibi_slopes=slopes) for plan in plans)
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


@settings(max_examples=40)
@given(forests(), forests(), windows, shapes())
def test_updating_is_planning_again_in_the_same_tensors(
    before: tuple[Forest, int], after: tuple[Forest, int], window: int | None, shape: Shape
) -> None:
    first, second = (segments_of(decoding(forest)) for forest, _ in (before, after))
    second = second._replace(temperature=None, log_weight=None)
    work = TritonWork(problem_of(window), first, 2, shape=shape)
    tensors = [column.data_ptr() for column in (*work.schedule.rows, *work.schedule.units[-1][:-1])]
    try:
        work.update(second)
    except PlanFull:
        check(work, first, before[1])  # as it was
        return
    assert tensors == [
        column.data_ptr() for column in (*work.schedule.rows, *work.schedule.units[-1][:-1])
    ]
    check(work, second, after[1])
    work.advance(np.arange(len(second.query)) + after[1] * second.block_size)


def decode_batch(lengths: list[int], block_size: int = 4) -> Segments:
    """Sequences of so many tokens of their own behind 40 shared ones."""
    nodes = [Node(-1, 40), *(Node(0, length) for length in lengths)]
    forest, _ = build_forest(block_size, nodes, [(1 + i, 1) for i in range(len(lengths))])
    return segments_of(forest)


SHAPE = Shape(2, 8, 8, 4, LEAN)


def test_a_smaller_batch_fits_into_the_tensors_of_a_larger_one() -> None:
    work = TritonWork(problem_of(), decode_batch([9] * 20), shape=SHAPE)
    for lengths in ([3], [5, 60], [9] * 20):
        segments = decode_batch(lengths)
        work.update(segments)
        check(work, segments, int(segments.blocks.max()) + 1)


@pytest.mark.parametrize(
    ("lengths", "name"),
    [([9] * 2000, "entries.slot needs room for 16000"), ([90_000], "partial results")],
)
def test_what_does_not_fit_is_named_and_changes_nothing(lengths: list[int], name: str) -> None:
    before = decode_batch([9] * 4)
    work = TritonWork(problem_of(), before, shape=SHAPE)
    with pytest.raises(PlanFull, match=name):
        work.update(decode_batch(lengths))
    check(work, before, int(before.blocks.max()) + 1)


def test_tiles_of_another_kind_do_not_fit() -> None:
    fat = Shape(2, 8, 8, 4, FAT)
    work = TritonWork(problem_of(), decode_batch([9]), shape=fat)
    with pytest.raises(PlanFull, match=r"tiles of 8 and 2 rows are needed"):
        work.update(decode_batch([9] * 9))


def test_temperatures_can_be_left_out_later_but_not_come_later() -> None:
    forest, num_blocks = build_forest(4, [Node(-1, 9), Node(0, 5)], [(1, 1)])
    plain = segments_of(forest)
    warm = segments_of(forest, np.array([2.0, 0.5]), np.array([0.1, -0.3]))
    work = TritonWork(problem_of(), warm, 1, shape=SHAPE)
    check(work, warm, num_blocks)
    work.update(plain)
    check(work, plain, num_blocks)
    work = TritonWork(problem_of(), plain, 1, shape=SHAPE)
    with pytest.raises(PlanFull, match=r"entries.scale"):
        work.update(warm)
    check(work, plain, num_blocks)


def test_a_tail_grows_with_the_temperature_of_its_node() -> None:
    forest, _ = build_forest(4, [Node(-1, 9), Node(0, 5), Node(0, 5)], [(1, 1), (2, 1)])
    temperature, weight = np.array([2.0, 0.5, 3.0]), np.array([0.1, -0.3, 0.7])
    work = TritonWork(problem_of(), segments_of(forest, temperature, weight), 6, shape=SHAPE)
    longer = forest
    for step in range(6):
        nodes = [Node(-1, 9), Node(0, 6 + step), Node(0, 6 + step)]
        longer, _ = build_forest(4, nodes, [(1, 1), (2, 1)])
        # Blocks are numbered anew with each length; the tokens before keep theirs.
        longer.blocks[:3] = [0, 1, 2]
        of_first, of_second = longer.block_ptr[1], longer.block_ptr[2]
        longer.blocks[of_first:of_second] = [3, 4, 20, 21][: of_second - of_first]
        longer.blocks[of_second:] = [5, 6, 30, 31][: len(longer.blocks) - of_second]
        place = 5 + step
        last = longer.blocks[[of_first + place // 4, of_second + place // 4]] * 4 + place % 4
        work.advance(last)
        check(work, segments_of(longer, temperature, weight), 40)


@pytest.mark.parametrize(("length", "opened"), [(5, 0), (12, 0), (13, 1)])
def test_a_tail_goes_on_in_its_last_entry(length: int, opened: int) -> None:
    # Entries are a block wide, and the tail begins inside of one.
    nodes = [Node(-1, 256), Node(0, length, offset=3)]
    forest, num_blocks = build_forest(16, nodes, [(1, 1)])
    segments = segments_of(forest)
    work = TritonWork(problem_of(), segments, 1, shape=SHAPE)
    (units,) = work.schedule.units
    assert units.log2_width[0] == 4
    end = int(units.entry_end[: int(units.size)].max())
    slots = np.array([16 * int(forest.blocks[-1]) + 3 + length])
    work.advance(slots)
    check(work, grown(segments, [slots]), num_blocks + 1)
    assert int(units.entry_end[: int(units.size)].max()) == end + opened


def test_tails_where_nothing_is_read_by_lean_tiles() -> None:
    # Two sequences end with the shared node, and a window of 1 leaves them no other token.
    forest, num_blocks = build_forest(4, [Node(-1, 6)], [(0, 1), (0, 1)])
    segments, slots = segments_of(forest), np.array([8, 12])
    work = TritonWork(problem_of(window=1), segments, 1, shape=Shape(1, 2, 8, 1, FAT))
    check(work, segments, num_blocks)
    work.advance(slots)
    check(work, grown(segments, [slots]), num_blocks)


def test_only_single_queries_reserve() -> None:
    forest, _ = build_forest(4, [Node(-1, 9), Node(0, 5)], [(1, 1), (1, 2)])
    with pytest.raises(PlanMismatch, match=r"reserve is 3 for 3 queries of 2 sequences"):
        TritonWork(problem_of(), segments_of(forest), 3, shape=SHAPE)
    forest, _ = build_forest(4, [Node(-1, 20)], [(0, 1)])
    inside = segments_of(sets_of(forest, [[(0, 0)], [(0, 0)]], [30, 9], [1, 1]))
    for make in (TritonWork, TorchWork):
        with pytest.raises(PlanMismatch, match="reserve is 2 and a query at position 9 is before"):
            make(problem_of(), inside, 2)
    for reserve in (-1, 1.5):
        with pytest.raises(PlanMismatch, match=f"reserve is {reserve}, expected an integer, at"):
            TritonWork(problem_of(), decode_batch([1]), reserve, shape=SHAPE)


def test_bad_slots_change_nothing() -> None:
    segments = decode_batch([3, 4])
    work = TritonWork(problem_of(), segments, 1, shape=SHAPE)
    for slots, message in (
        ([1], r"shape \(1,\)"),
        ([1.0, 2.0], "float64"),
        ([-1, 2], "slots has -1"),
    ):
        with pytest.raises(PlanMismatch, match=message):
            work.advance(np.array(slots))
    check(work, segments, int(segments.blocks.max()) + 1)
    work.advance(np.array([200, 204]))
    with pytest.raises(PlanExhausted):
        work.advance(np.array([201, 205]))


def test_without_reserve_nothing_advances() -> None:
    work = TritonWork(problem_of(), decode_batch([3, 4]), shape=SHAPE)
    with pytest.raises(PlanExhausted, match="advanced 0 times"):
        work.advance(np.array([200, 204]))


def test_the_reference_reserves_nothing() -> None:
    forest, _ = build_forest(4, [Node(-1, 9)], [(0, 1)])
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float32}
    with pytest.raises(PlanMismatch, match=r"reserve is 3, expected 0 for .*reference"):
        attention.plan(forest, backend="reference", reserve=3, **heads)
    for backend in ("torch", "reference"):
        with pytest.raises(PlanExhausted):
            attention.plan(forest, backend=backend, **heads).advance(np.array([12]))
