"""Schedules, executed in float64: every row sees what it should, and each token is read once."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Forest, NodeSets
from attention.counting import tokens_read
from attention.options import RunOptions
from attention.problem import Problem
from attention.segments import Segments, segments_of
from attention.triton_backend.cost import Costs
from attention.triton_backend.planner import Shape
from attention.triton_backend.work import TritonWork
from tests.attention.strategies import forests
from tests.attention.unit_reference import execute

# Costs under which tiles are fat wherever they can be, and under which they never are.
FAT = Costs(load=1.0, reload=1.0, pair=0.0, partial=0.0, launch=0.0)
LEAN = FAT._replace(launch=float("inf"))

windows = st.none() | st.sampled_from((1, 2, 9, 33, 100))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    lean = draw(st.sampled_from((1, 2, 4)))
    fat = lean * draw(st.sampled_from((1, 2, 3, 8)))
    return Shape(
        lean, fat, 8, draw(st.sampled_from((1, 4, 1000))), draw(st.sampled_from((FAT, LEAN)))
    )


def problem_of(window: int | None = None, sink_tokens: int = 0) -> Problem:
    return Problem(
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        value_head_dim=8,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device=torch.device("cpu"),
        layout="NHD",
        window=window,
        sink_tokens=sink_tokens,
        batch_invariant=False,
    )


class Tensors(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def tensors_for(segments: Segments, num_blocks: int, problem: Problem) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cache = (num_blocks, segments.block_size, problem.num_kv_heads, problem.head_dim)
    q = random(segments.num_queries, problem.num_q_heads, problem.head_dim)
    return Tensors(q, random(*cache), random(*cache))


def seen(problem: Problem, segments: Segments) -> list[list[tuple[int, int, float, float]]]:
    """For each packed query, what it sees: slot, position, temperature and log-weight."""
    of: list[list[tuple[int, int, float, float]]] = [[] for _ in range(segments.num_queries)]
    size = segments.block_size
    for segment in range(len(segments.length)):
        place = segments.offset[segment] + np.arange(segments.length[segment])
        block = segments.blocks[segments.first_block[segment] + place // size].astype(np.int64)
        slot = block * size + place % size
        position = segments.start[segment] + np.arange(segments.length[segment])
        temperature = 1.0 if segments.temperature is None else segments.temperature[segment]
        weight = 0.0 if segments.log_weight is None else segments.log_weight[segment]
        for row in range(segments.row_begin[segment], segments.row_end[segment]):
            own = segments.position[row]
            visible = position <= own
            if problem.window is not None:
                visible &= (position > own - problem.window) | (position < problem.sink_tokens)
            of[segments.query[row]] += [
                (int(s), int(p), float(temperature), float(weight))
                for s, p in zip(slot[visible], position[visible], strict=True)
            ]
    return of


def dense(
    problem: Problem, segments: Segments, tensors: Tensors, options: RunOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attention.run` computes, query by query."""
    keys, values = (cache.double().flatten(0, 1)[:, 0] for cache in tensors[1:])
    outs, lses = [], []
    for query, tokens in enumerate(seen(problem, segments)):
        if not tokens:
            outs.append(torch.zeros(problem.num_q_heads, problem.head_dim, dtype=torch.float64))
            lses.append(torch.full((problem.num_q_heads,), -torch.inf, dtype=torch.float64))
            continue
        slot, _, temperature, weight = (torch.tensor(c) for c in zip(*tokens, strict=True))
        logits = tensors.q[query].double() @ keys[slot].T * options.scale / temperature + weight
        outs.append(torch.softmax(logits, 1) @ values[slot])
        lses.append(torch.logsumexp(logits, 1))
    return torch.stack(outs), torch.stack(lses)


OPTIONS = RunOptions(0.3, None, None, None, None)


def check(work: TritonWork, segments: Segments, num_blocks: int) -> np.ndarray:
    """Execute the schedule, hold it to the dense formula, and count how often slots are read."""
    tensors = tensors_for(segments, num_blocks, work.problem)
    reads = np.zeros(num_blocks * segments.block_size, np.int64)
    out, lse = execute(work.problem, work.schedule, segments.num_queries, *tensors, OPTIONS, reads)
    expected_out, expected_lse = dense(work.problem, segments, tensors, OPTIONS)
    torch.testing.assert_close(out, expected_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    return reads


@settings(max_examples=40)
@given(forests(), windows, st.sampled_from((0, 3, 20)), shapes())
def test_every_query_sees_what_it_should(
    forest: tuple[Forest, int], window: int | None, sink_tokens: int, shape: Shape
) -> None:
    segments = segments_of(forest[0])
    work = TritonWork(problem_of(window, sink_tokens), segments, shape=shape)
    check(work, segments, forest[1])


@settings(max_examples=40)
@given(forests(), windows, st.sampled_from((0, 3, 20)))
def test_under_one_tile_each_token_is_read_once(
    forest: tuple[Forest, int], window: int | None, sink_tokens: int
) -> None:
    segments = segments_of(forest[0])
    rows = len(segments.position)
    problem = problem_of(window, sink_tokens)
    for shape in (Shape(rows, rows, 8, 1, LEAN), Shape(rows, 2 * rows, 8, 4, FAT)):
        work = TritonWork(problem, segments, shape=shape)
        reads = check(work, segments, forest[1])
        assert reads.max() == 1
        assert reads.sum() == tokens_read(problem, segments) == work.kv_tokens_loaded


@st.composite
def node_sets(draw: st.DrawFn) -> tuple[NodeSets, int]:
    """Sets of nodes at any positions, several nodes at one position too."""
    block_size = draw(st.integers(1, 9))
    length = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    offset = draw(st.lists(st.integers(0, 40), min_size=len(length), max_size=len(length)))
    offset = [o % block_size for o in offset]
    counts = [-(-(o + n) // block_size) for o, n in zip(offset, length, strict=True)]
    member_of = st.tuples(st.integers(0, len(length) - 1), st.sampled_from((0, 1, 7, 25)))
    members = draw(
        st.lists(st.lists(member_of, min_size=1, max_size=5, unique=True), min_size=1, max_size=6)
    )
    size = len(members)
    flat = [member for of in members for member in of]
    num_blocks = sum(counts)
    sets = NodeSets(
        block_size=block_size,
        length=np.array(length, np.int64),
        offset=np.array(offset, np.int32),
        block_ptr=np.cumsum([0, *counts], dtype=np.int64),
        blocks=np.random.default_rng(1).permutation(num_blocks).astype(np.int32),
        member_ptr=np.cumsum([0, *map(len, members)], dtype=np.int64),
        member=np.array([node for node, _ in flat], np.int32),
        member_start=np.array([start for _, start in flat], np.int64),
        query_start=np.array(draw(st.lists(st.integers(0, 60), min_size=size, max_size=size))),
        query_len=np.array(draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))),
    )
    return sets, num_blocks


@settings(max_examples=40)
@given(node_sets(), windows, st.sampled_from((0, 3, 20)), shapes())
def test_sets_of_nodes(
    sets: tuple[NodeSets, int], window: int | None, sink_tokens: int, shape: Shape
) -> None:
    segments = segments_of(sets[0])
    check(TritonWork(problem_of(window, sink_tokens), segments, shape=shape), segments, sets[1])


@settings(max_examples=40)
@given(forests() | node_sets(), shapes(), st.integers(0, 99))
def test_temperatures_and_weights(
    source: tuple[Forest | NodeSets, int], shape: Shape, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    nodes = len(source[0].length)
    temperature = generator.uniform(0.5, 2, nodes).astype(np.float32)
    log_weight = generator.normal(size=nodes).astype(np.float32)
    for weights in ((temperature, log_weight), (temperature, None), (None, log_weight)):
        segments = segments_of(source[0], *weights)
        check(TritonWork(problem_of(), segments, shape=shape), segments, source[1])
