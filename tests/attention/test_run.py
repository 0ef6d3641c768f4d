"""Running a plan: right against float64, and the same however the forest is written down."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Forest, NodeSets
from attention.torch_backend import fused, softmax
from tests.attention.checks import assert_as_good_as_flat, attend, plan_of, run
from tests.attention.strategies import (
    LARGE,
    Case,
    Node,
    build_forest,
    cases,
    forests,
    level_forest,
    node_sets,
    node_slots,
    tensors,
    with_sequences,
)

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


@settings(max_examples=2 * settings().max_examples)
@given(cases())
def test_as_good_as_flat_attention_against_float64(case: Case) -> None:
    assert_as_good_as_flat(case, tensors(case))


@given(cases())
def test_the_same_bits_on_every_run(case: Case) -> None:
    given = tensors(case)
    first, second = run(case, given), run(case, given)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@given(cases(dtypes=(torch.float32,), source=forests()), st.integers(0, 99))
def test_the_order_of_siblings_and_sequences_does_not_matter(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = _parents_first(case.forest, rng)
    sequences = rng.permutation(len(case.forest.leaf))
    place = np.concatenate([[0], np.cumsum(case.forest.query_len)])
    queries = np.concatenate([np.arange(place[s], place[s + 1]) for s in sequences])
    given = tensors(case)
    out, lse = run(case, given)
    other = replace(
        case,
        source=_reordered(case.forest, nodes, sequences),
        temperature=case.temperature and tuple(case.temperature[node] for node in nodes),
        log_weight=case.log_weight and tuple(case.log_weight[node] for node in nodes),
    )
    other_out, other_lse = run(other, given._replace(q=given.q[queries]))
    # Other places in the batch mean other padding and other tiles, so other roundings: two results
    # that are each within the error of flat attention, which float64 tests bound.
    torch.testing.assert_close(other_out, out[queries], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(other_lse, lse[queries], rtol=1e-5, atol=2e-5)


def _parents_first(forest: Forest, rng: np.random.Generator) -> list[int]:
    """The nodes in a random order in which parents stand before their children."""
    order: list[int] = []
    ready = [node for node, parent in enumerate(forest.parent) if parent < 0]
    while ready:
        node = ready.pop(rng.integers(len(ready)))
        order.append(node)
        ready += [child for child, parent in enumerate(forest.parent) if parent == node]
    return order


def _reordered(forest: Forest, nodes: list[int], sequences: np.ndarray) -> Forest:
    new_place = np.empty(len(nodes), np.int64)
    new_place[nodes] = np.arange(len(nodes))
    parent = forest.parent[nodes]
    blocks = np.split(forest.blocks, forest.block_ptr[1:-1])
    return Forest(
        block_size=forest.block_size,
        parent=np.where(parent < 0, -1, new_place[parent]).astype(np.int32),
        start=forest.start[nodes],
        length=forest.length[nodes],
        offset=forest.offset[nodes],
        block_ptr=np.cumsum([0, *(len(blocks[node]) for node in nodes)], dtype=np.int64),
        blocks=np.concatenate([blocks[node] for node in nodes]),
        leaf=new_place[forest.leaf[sequences]].astype(np.int32),
        query_len=forest.query_len[sequences],
    )


@given(forests(), st.sampled_from((None, 1, 20)), st.sampled_from((None, 5.0)))
def test_values_of_another_width_than_keys(
    forest: tuple[Forest, int], window: int | None, softcap: float | None
) -> None:
    case = Case(*forest, head_dim=48, value_head_dim=32, window=window, softcap=softcap)
    given = tensors(case)
    out, lse = run(case, given)
    expected, expected_lse = attend(case, given)
    # Values up to 5 and some hundred roundings of 6e-8 on the longest paths.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "levels",
    [
        [[7, 7], [9, 10, 11, 4], [129, 2, 3, 4, 5, 6, 7, 128]],
        [[16384], [1, 128, 256]],
    ],
)
def test_the_ragged_trees_of_hydragen(
    levels: list[list[int]], dtype: torch.dtype, device: str
) -> None:
    case = Case(*level_forest(levels), num_q_heads=8, head_dim=64, dtype=dtype)
    assert_as_good_as_flat(case, tensors(case), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("softcap", "shuffle"), [(None, None), (4.0, 1)])
@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("shape", LARGE)
def test_shapes_at_which_work_is_cut(
    shape: str, window: int | None, softcap: float | None, shuffle: int | None, device: str
) -> None:
    forest, num_blocks = build_forest(16, *LARGE[shape], shuffle=shuffle)
    case = Case(forest, num_blocks, num_q_heads=8, window=window, softcap=softcap)
    assert_as_good_as_flat(case, tensors(case), device)


def test_single_queries_that_stand_inside_and_before_the_nodes_of_their_sets() -> None:
    # Nodes of 3 blocks at 0 and at 12; queries see all of both, parts of them, and of one nothing.
    sets = NodeSets(
        block_size=4,
        length=np.array([12, 12]),
        offset=np.zeros(2, np.int32),
        block_ptr=np.array([0, 3, 6]),
        blocks=np.arange(6, dtype=np.int32),
        member_ptr=np.array([0, 2, 4, 6, 7]),
        member=np.array([0, 1, 0, 1, 0, 1, 1], np.int32),
        member_start=np.array([0, 12, 0, 12, 0, 12, 12]),
        query_start=np.array([23, 15, 5, 3]),
        query_len=np.ones(4, np.int64),
    )
    case = Case(sets, 6)
    given_ = tensors(case)
    out, lse = run(case, given_)
    expected, expected_lse = attend(case, given_)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    assert (out[3] == 0).all()
    assert (lse[3] == -torch.inf).all()


def test_a_long_node_is_read_in_place_with_every_kind_of_softmax() -> None:
    # Contiguous and large enough not to be gathered, and longer than the tile of the unfused path.
    forest, num_blocks = build_forest(16, [Node(-1, 10_000), Node(0, 3)], [(1, 1), (1, 1), (0, 1)])
    for strides in ("plain", "interleaved"):
        for softcap in (None, 5.0):
            case = Case(forest, num_blocks, head_dim=64, strides=strides, softcap=softcap)
            assert_as_good_as_flat(case, tensors(case))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"softcap": 20.0},
        {"alibi_slopes": (0.125,) * 4},
        {"kv_dtype": torch.float8_e4m3fn},
    ],
)
def test_queries_that_see_no_token_of_the_last_tile(options: dict[str, object]) -> None:
    # 2,057 tokens in tiles of 2,048: the first of 16 queries stand before the last tile.
    forest, num_blocks = build_forest(16, [Node(-1, 2057)], [(0, 16)])
    case = Case(forest, num_blocks, **options)
    assert_as_good_as_flat(case, tensors(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strides", ["plain", "latent", "beside"])
@pytest.mark.parametrize(
    ("lengths", "calls"), [([1300], [2]), ([1024, 1024], [4]), ([1056, 1056], []), ([1023], [])]
)
def test_long_nodes_whose_heads_lie_between_each_other_are_read_in_chunks(
    lengths: list[int],
    calls: list[int],
    strides: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [Node(-1, length) for length in lengths]
    forest, num_blocks = build_forest(16, nodes, [(i, 1) for i in range(len(lengths))])
    width = 96 if strides == "latent" else None
    case = Case(
        forest, num_blocks, 8, 8, head_dim=128, value_head_dim=width, dtype=dtype, strides=strides
    )
    given_ = tensors(case)
    seen = []

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: object) -> object:
        seen.append(len(k) * (k.shape[2] // fused.CHUNK))
        return chunked(q, k, *rest)

    chunked = softmax.chunked
    monkeypatch.setattr(softmax, "chunked", watched)
    first, second = run(case, given_), run(case, given_)
    assert seen == 2 * calls
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert_as_good_as_flat(case, given_)


def test_chunks_of_values_whose_blocks_lie_further_apart_than_those_of_the_keys() -> None:
    forest, num_blocks = build_forest(1024, [Node(-1, 1024)] * 4, [(leaf, 1) for leaf in range(4)])
    case = Case(forest, num_blocks, 8, 8, head_dim=64)
    given_ = tensors(case)
    wide = torch.empty(num_blocks, 1024 * 8 * 64 + 64)
    apart = wide[:, :-64].unflatten(1, (1024, 8, 64)).copy_(given_.v_cache)
    out, _ = run(case, given_._replace(v_cache=apart))
    torch.testing.assert_close(out, run(case, given_)[0], rtol=1e-5, atol=1e-5)


def test_what_is_read_in_place_beside_what_is_gathered() -> None:
    lengths = (600, 600, 600, 20)
    nodes = [Node(-1, length, offset=3) for length in lengths]
    forest, num_blocks = build_forest(16, nodes, [(0, 1), (1, 1), (2, 1), (3, 1)])
    for scattered in (1, 3):
        blocks = slice(forest.block_ptr[scattered], forest.block_ptr[scattered + 1])
        forest.blocks[blocks] = forest.blocks[blocks][::-1].copy()
    for sequences in ([0, 1], [0, 3], [0, 1, 2, 3]):
        some = with_sequences(forest, [(leaf, 1) for leaf in sequences])
        case = Case(some, num_blocks, head_dim=128)
        assert_as_good_as_flat(case, tensors(case))


def test_a_query_that_is_a_slice_of_a_wider_tensor() -> None:
    case = Case(*level_forest([[20], [3, 4]]))
    given = tensors(case)
    wide = torch.cat([given.q, torch.full_like(given.q, torch.nan)], dim=1)
    sliced = given._replace(q=wide[:, : case.num_q_heads])
    assert torch.equal(run(case, sliced)[0], run(case, given)[0])


def test_bfloat16_is_accumulated_in_float32() -> None:
    # 4,096 equal keys: each weight is 2**-12. In bfloat16 the sum would stop growing at 2**-4.
    case = Case(*level_forest([[4096]]), dtype=torch.bfloat16)
    given = tensors(case)
    given.k_cache.zero_()
    given.v_cache.fill_(1.0)
    out, lse = run(case, given)
    assert torch.equal(out, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, float(np.log(4096))), rtol=0, atol=1e-4)


def test_a_thousand_ragged_tails_are_a_handful_of_calls() -> None:
    lengths = (1 + np.random.default_rng(0).integers(0, 64, 1024)).tolist()
    forest, num_blocks = level_forest([[100], lengths])
    case = Case(forest, num_blocks, num_q_heads=8, head_dim=64, dtype=torch.bfloat16)
    assert len(plan_of(case).work.groups) <= 10
    assert_as_good_as_flat(case, tensors(case))


@settings(max_examples=settings().max_examples // 4)
@given(cases(source=forests()), st.integers(0, 6))
def test_batch_invariant_results_have_the_bits_of_a_sequence_alone(case: Case, keep: int) -> None:
    case = replace(case, batch_invariant=True)
    given = tensors(case)
    assert_as_good_as_flat(case, given)
    sequence = keep % len(case.forest.leaf)
    query_len = int(case.forest.query_len[sequence])
    end = int(case.forest.query_len[: sequence + 1].sum())
    of = slice(end - query_len, end)
    some = with_sequences(case.forest, [(int(case.forest.leaf[sequence]), query_len)])
    out, lse = run(case, given)
    alone, alone_lse = run(replace(case, source=some), given._replace(q=given.q[of]))
    assert torch.equal(out[of], alone)
    assert torch.equal(lse[of], alone_lse)


@settings(max_examples=settings().max_examples // 4)
@given(cases(source=node_sets()))
def test_batch_invariant_sets_of_nodes(case: Case) -> None:
    assert_as_good_as_flat(replace(case, batch_invariant=True), tensors(case))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_bits_do_not_depend_on_where_nodes_end(
    dtype: torch.dtype, softcap: float | None
) -> None:
    lengths = [37, 300, 400, 263]
    chain = [Node(i - 1, length, shares_block=i > 0) for i, length in enumerate(lengths)]
    others = [Node(1, 5 + i % 7) for i in range(60)]
    shared, num_blocks = build_forest(
        16, [*chain, *others], [(4 + i, 1) for i in range(60)] + [(3, 3)]
    )
    alone, _ = build_forest(16, [Node(-1, 1000)], [(0, 3)])
    many = Case(
        shared, num_blocks, num_q_heads=6, dtype=dtype, softcap=softcap, batch_invariant=True
    )
    given = tensors(many)
    out, lse = run(many, given)
    one, one_lse = run(replace(many, source=alone), given._replace(q=given.q[-3:]))
    assert torch.equal(out[-3:], one)
    assert torch.equal(lse[-3:], one_lse)
    # Otherwise the roundings differ: the test can tell.
    fast = replace(many, batch_invariant=False)
    assert not torch.equal(run(fast, given)[1][-3:], one_lse)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("steps", "calls"),
    [
        ([1] * 7, 1),
        ([3] * 7, 1),
        ([1, 1, 4, 1, 1, 1, 1], 2),
        ([5, 1, 1, 1, 1, 9, 1], 3),
        ([2, 9, 2, 2, 7, 3, 3], 3),
    ],
)
def test_equally_spaced_nodes_are_read_in_one_call(
    steps: list[int], calls: int, layout: str
) -> None:
    # Of one block each, so that heads lie at one stride in both layouts.
    block_size = 256
    forest, _ = build_forest(block_size, [Node(-1, 256)] * 8, [(i, 1) for i in range(8)])
    spaced = replace(forest, blocks=np.cumsum([0, *steps]).astype(np.int32))
    case = Case(spaced, 40, num_q_heads=8, num_kv_heads=8, head_dim=128, layout=layout)
    assert len(plan_of(case).work.groups) == calls
    for strides in ("plain", "interleaved"):
        case = replace(case, strides=strides)
        assert_as_good_as_flat(case, tensors(case))


@pytest.mark.parametrize("sink_tokens", [0, 3, 20])
def test_what_windows_and_sinks_leave_out_is_not_read(sink_tokens: int) -> None:
    forest, num_blocks = build_forest(
        4, [Node(-1, 900), Node(0, 700), Node(0, 40)], [(1, 1), (2, 5), (1, 1)]
    )
    case = Case(forest, num_blocks, window=30, sink_tokens=sink_tokens)
    given = tensors(case)
    expected, expected_lse = attend(case, given)
    # Sequence 0 and 2 see the end of node 1, sequence 1 the end of node 0 and all of node 2.
    seen = np.zeros(1640, np.bool_)
    seen[:sink_tokens] = seen[900 + 5 - 30 : 900] = seen[1570:] = True
    slots = np.concatenate([node_slots(forest, node) for node in range(3)])[~seen]
    for cache in given[1:]:
        cache.flatten(0, 1)[slots] = torch.nan
    out, lse = run(case, given)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[[40]], [[40] * 3], [[40], [5, 9]]])
def test_results_are_contiguous(
    lengths: list[list[int]], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(*level_forest(lengths), *heads, head_dim=64, dtype=dtype)
    for result in run(case, tensors(case)):
        assert result.is_contiguous()
