"""What schedules of the shapes that the field measures on load, and how it is spread."""

import numpy as np
import pytest
import torch

from attention import Forest
from attention.counting import tokens_per_path, tokens_read
from attention.problem import Problem
from attention.segments import segments_of
from attention.triton_backend.work import TritonWork, shape_of
from tests.attention.strategies import LARGE, Node, build_forest, level_forest

# Nodes a level / tokens a level.
SHAPES = (
    ((1, 2, 64), (8, 256, 32)),
    ((1, 4, 256), (8, 256, 32)),
    ((1, 4, 8, 256), (8, 256, 256, 32)),
    ((1, 256), (256, 32)),
    ((1, 1024), (2048, 32)),
    ((1, 16, 64), (1024, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
    ((1, 10), (4000, 400)),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (256, 128, 64, *(16,) * 6)),
    ((1, 8, 512), (512, 2048, 256)),
    ((2, 8, 16, 256), (256, 256, 32, 32)),
    ((4, 16, 256, 512), (512, 32, 128, 32)),
    ((256,), (1024,)),
    ((1, 30), (8000, 400)),
)
HEADS = ((32, 8), (16, 1), (32, 32), (64, 8), (8, 1), (12, 4))


def problem_of(num_q_heads: int, num_kv_heads: int, window: int | None = None) -> Problem:
    return Problem(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        value_head_dim=128,
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        layout="NHD",
        window=window,
        sink_tokens=0,
        batch_invariant=False,
    )


def level_shape(nodes: tuple[int, ...], tokens: tuple[int, ...]) -> Forest:
    return level_forest([[length] * count for count, length in zip(nodes, tokens, strict=True)])[0]


def lanes_of(work: TritonWork) -> list[np.ndarray]:
    """Lanes of the units of each kind."""
    return [
        ((units.entry_end - units.entry_begin) << units.log2_width)[: int(units.size)].numpy()
        for units in work.schedule.units
    ]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_loads_more_than_path_by_path(
    shape: tuple[tuple[int, ...], tuple[int, ...]], heads: tuple[int, int]
) -> None:
    segments = segments_of(level_shape(*shape))
    problem = problem_of(*heads)
    work = TritonWork(problem, segments)
    unique, per_path = tokens_read(problem, segments), tokens_per_path(problem, segments)
    assert unique <= work.kv_tokens_loaded <= per_path
    # Few lanes are empty, and no unit has much more of them than the others have on average.
    programs = shape_of(problem).programs
    lanes = lanes_of(work)
    assert sum(of.sum() for of in lanes) <= 1.05 * work.kv_tokens_loaded
    for of in lanes:
        assert of.max() < 1.6 * max(256, of.sum() / programs) + 128
        assert (np.diff(of) <= 0).all()


@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[6], SHAPES[7], SHAPES[9], SHAPES[12]])
def test_shared_nodes_are_read_once_a_fat_tile_and_others_once(
    shape: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    nodes, tokens = shape
    work = TritonWork(problem_of(32, 8), segments_of(level_shape(*shape)))
    assert [units.rows_per_tile for units in work.schedule.units] == [32, 4]
    expected = 0
    for count, length in zip(nodes, tokens, strict=True):
        rows = nodes[-1] // count
        expected += count * length * (-(-rows // 32) if rows > 4 else 1)
    assert work.kv_tokens_loaded == expected


def test_without_sharing_there_is_nothing_to_merge() -> None:
    work = TritonWork(problem_of(32, 8), segments_of(level_shape((256,), (1024,))))
    assert work.kv_tokens_loaded == 256 * 1024
    assert [len(lanes) for lanes in lanes_of(work)] == [256]
    assert work.schedule.num_partials == int(work.schedule.merges.size) == 0


def test_a_long_sequence_alone_keeps_all_multiprocessors_busy() -> None:
    problem = problem_of(32, 8)
    work = TritonWork(problem, segments_of(level_shape((1,), (100_000,))))
    (lanes,) = lanes_of(work)
    assert len(lanes) * 8 >= 132
    assert lanes.max() <= 1.1 * lanes.mean()


def test_short_rows_share_tiles_if_there_are_many_and_not_if_there_are_few() -> None:
    problem = problem_of(32, 8)
    many = TritonWork(problem, segments_of(level_shape((1024,), (32,))))
    few = TritonWork(problem, segments_of(level_shape((8,), (100,))))
    assert [len(lanes) for lanes in lanes_of(many)] == [256]
    assert [len(lanes) for lanes in lanes_of(few)] == [8]


def test_a_long_row_among_short_ones_has_a_tile_of_its_own() -> None:
    lengths = [32] * 1024
    lengths[501] = 5000
    work = TritonWork(problem_of(32, 8), segments_of(level_forest([lengths])[0]))
    (units,) = work.schedule.units
    begin, end = (column[: int(units.size)] for column in (units.row_begin, units.row_end))
    assert set((end - begin)[(begin <= 501) & (end > 501)].tolist()) == {1}
    assert (end - begin).max() == 4


def test_tiles_of_a_prompt_share_one_list() -> None:
    forest, _ = build_forest(16, [Node(-1, 3008), Node(0, 5184)], [(1, 8192)])
    work = TritonWork(problem_of(32, 8), segments_of(forest))
    (units,) = work.schedule.units
    assert units.rows_per_tile == 32
    assert work.summary().partials == 0
    assert work._made.num_entries <= 2 * 8192 // 16
    (lanes,) = lanes_of(work)
    assert sorted(lanes.tolist()) == [16 * -(-32 * (tile + 1) // 16) for tile in range(256)]


def test_a_window_leaves_out_what_nobody_sees() -> None:
    segments = segments_of(level_shape((1, 64), (100_000, 300)))
    problem = problem_of(32, 8, window=256)
    work = TritonWork(problem, segments)
    assert work.kv_tokens_loaded == tokens_read(problem, segments) == 64 * 256
    assert work.schedule.num_partials == 0


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("window", [None, 300])
def test_large_shapes_load_every_token_that_is_seen(name: str, window: int | None) -> None:
    segments = segments_of(build_forest(16, *LARGE[name])[0])
    problem = problem_of(32, 8, window)
    work = TritonWork(problem, segments)
    assert work.kv_tokens_loaded >= tokens_read(problem, segments)
    assert str(work.summary())


def test_no_fat_tile_ends_inside_what_a_lean_tile_reads() -> None:
    # 40 nodes of 3 leaves: a fat tile of 32 rows holds 10 of them whole, and 4 tiles hold them all.
    work = TritonWork(problem_of(32, 8), segments_of(level_shape((1, 40, 120), (2000, 100, 40))))
    assert [units.rows_per_tile for units in work.schedule.units] == [32, 4]
    assert work.kv_tokens_loaded == 4 * 2000 + 40 * 100 + 120 * 40
