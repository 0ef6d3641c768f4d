"""Bad input: a named error that says the value and what was expected."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import attention
from attention import Forest, InvalidForest, PlanMismatch
from attention.segments import segments_of
from tests.attention.strategies import Case, Node, Tensors, build_forest, tensors


@pytest.fixture
def forest() -> Forest:
    nodes = [Node(-1, 6, offset=1), Node(0, 5, shares_block=True), Node(0, 3)]
    return build_forest(4, nodes, [(1, 2), (2, 1)])[0]


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


BAD_FORESTS: dict[str, tuple[Callable[[Forest], dict[str, Any]], str]] = {
    "a parent after its child": (
        lambda f: {"parent": changed(f.parent, 1, 2)},
        r"parent\[1\] is 2, expected -1 or an earlier node",
    ),
    "a cycle of two": (
        lambda f: {"parent": np.array([1, 0, 0], np.int32)},
        r"parent\[0\] is 1, expected -1 or an earlier node",
    ),
    "a cycle of one": (lambda f: {"parent": changed(f.parent, 0, 0)}, r"parent\[0\] is 0"),
    "a parent below -1": (lambda f: {"parent": changed(f.parent, 2, -2)}, r"parent\[2\] is -2"),
    "a start that is not the parent's end": (
        lambda f: {"start": changed(f.start, 2, 5)},
        r"start\[2\] is 5, expected the end of the parent",
    ),
    "a root that does not start at 0": (
        lambda f: {"start": f.start + 1},
        r"start\[0\] is 1, .* 0 for a root",
    ),
    "an empty node": (lambda f: {"length": changed(f.length, 0, 0)}, r"length\[0\] is 0"),
    "an offset of a whole block": (
        lambda f: {"offset": changed(f.offset, 1, 4)},
        r"offset\[1\] is 4, expected from 0 to below the block size 4",
    ),
    "a negative offset": (lambda f: {"offset": changed(f.offset, 1, -1)}, r"offset\[1\] is -1"),
    "a block too few": (
        lambda f: {"block_ptr": changed(f.block_ptr, 1, 1)},
        r"node 0 has 1 blocks, expected 2",
    ),
    "a block behind a full one": (
        lambda f: {
            "length": changed(f.length, 2, 4),
            "block_ptr": changed(f.block_ptr, 3, 6),
            "blocks": np.append(f.blocks, np.int32(1)),
        },
        r"node 2 has 2 blocks, expected 1",
    ),
    "an offset of a whole block, and a block for it": (
        lambda f: {
            "offset": changed(f.offset, 2, 4),
            "block_ptr": changed(f.block_ptr, 3, 6),
            "blocks": np.append(f.blocks, np.int32(1)),
        },
        r"offset\[2\] is 4, expected from 0 to below the block size 4",
    ),
    "blocks that do not begin at 0": (
        lambda f: {"block_ptr": changed(f.block_ptr, 0, 1)},
        r"block_ptr\[0\] is 1, expected 0",
    ),
    "more blocks than block_ptr says": (
        lambda f: {"blocks": np.append(f.blocks, np.int32(1))},
        r"blocks has shape \(6,\), expected \(5,\)",
    ),
    "a negative block": (lambda f: {"blocks": changed(f.blocks, 2, -1)}, r"blocks\[2\] is -1"),
    "a leaf that is no node": (lambda f: {"leaf": changed(f.leaf, 0, 3)}, r"leaf\[0\] is 3"),
    "a negative leaf": (lambda f: {"leaf": changed(f.leaf, 1, -1)}, r"leaf\[1\] is -1"),
    "no query": (lambda f: {"query_len": changed(f.query_len, 1, 0)}, r"query_len\[1\] is 0"),
    "more queries than tokens": (
        lambda f: {"query_len": changed(f.query_len, 1, 10)},
        r"query_len\[1\] is 10, expected from 1 to the length of the sequence's path",
    ),
    "no sequence": (
        lambda f: {"leaf": f.leaf[:0], "query_len": f.query_len[:0]},
        "leaf is empty, expected at least one sequence",
    ),
    "arrays of different lengths": (
        lambda f: {"length": f.length[:2]},
        r"length has shape \(2,\), expected \(3,\)",
    ),
    "floating point": (
        lambda f: {"start": f.start.astype(np.float64)},
        "start has dtype float64, expected a signed integer",
    ),
    "no block size": (lambda f: {"block_size": 0}, "block_size is 0, expected an integer, at le"),
    "half a token a block": (lambda f: {"block_size": 4.5}, "block_size is 4.5, expected an integ"),
}


@pytest.mark.parametrize("what", BAD_FORESTS)
def test_a_forest_that_contradicts_itself(forest: Forest, what: str) -> None:
    change, message = BAD_FORESTS[what]
    bad = replace(forest, **change(forest))
    with pytest.raises(InvalidForest, match=message):
        bad.validate()
    with pytest.raises(InvalidForest, match=message):
        plan_of(bad)


@pytest.mark.parametrize("dtype", ["i1", "i2", "<i4", ">i4", "i8"])
@pytest.mark.parametrize("name", ["leaf", "offset", "blocks"])
def test_a_negative_number_is_found_whatever_the_bound_and_the_type(name: str, dtype: str) -> None:
    nodes = [Node(-1, 3), *(Node(0, 1) for _ in range(100))]
    good, _ = build_forest(1 << 33, nodes, [(1, 1), (2, 1)])
    good = replace(good, **{name: getattr(good, name).astype(dtype)})
    good.validate(1 << 33)
    for value in (-1, -2, np.iinfo(dtype).min):
        bad = replace(good, **{name: changed(getattr(good, name), 1, value)})
        with pytest.raises(InvalidForest, match=rf"{name}\[1\] is {value}, expected"):
            bad.validate(1 << 33)


def test_numbers_in_another_byte_order(forest: Forest) -> None:
    leaf = forest.leaf.astype(">i4")
    found, expected = (segments_of(f) for f in (replace(forest, leaf=leaf), forest))
    assert found.query.tolist() == expected.query.tolist()
    with pytest.raises(InvalidForest, match=r"leaf\[0\] is 16777216, expected a node"):
        replace(forest, leaf=changed(leaf, 0, 1 << 24)).validate()


def test_narrow_integers_are_planned_as_wide_ones(forest: Forest) -> None:
    names = ("parent", "start", "length", "offset", "block_ptr", "blocks", "leaf", "query_len")
    narrow = {name: getattr(forest, name).astype(np.int8) for name in names}
    long = {"length": np.array([6, 5, 120]), "block_ptr": np.array([0, 2, 4, 34])}
    forest = replace(forest, **long, blocks=np.arange(34, dtype=np.int32))
    narrow |= {name: getattr(forest, name).astype(np.int8) for name in (*long, "blocks")}
    found, expected = (segments_of(f) for f in (replace(forest, **narrow), forest))
    for name in ("start", "length", "offset", "first_block"):
        assert getattr(found, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    plan_of(replace(forest, **narrow))


def test_blocks_beyond_the_pool(forest: Forest) -> None:
    highest = int(forest.blocks.max())
    forest.validate(highest + 1)
    with pytest.raises(InvalidForest, match=rf"is {highest}, expected from 0 to below {highest}"):
        forest.validate(highest)


def plan_of(forest: Forest, **arguments: Any) -> attention.Plan:
    defaults = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": torch.float32}
    return attention.plan(forest, **{**defaults, **arguments})


BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"num_q_heads": 5}, "num_q_heads is 5, expected a multiple of num_kv_heads, 2"),
    ({"num_q_heads": 0}, "num_q_heads is 0"),
    ({"num_q_heads": 4.0}, "num_q_heads is 4.0, expected an integer"),
    ({"num_kv_heads": 0}, "num_kv_heads is 0, expected at least 1"),
    ({"head_dim": 0}, "head_dim is 0, expected at least 1"),
    ({"head_dim": 32.0}, "head_dim is 32.0, expected an integer"),
    ({"value_head_dim": -1}, "value_head_dim is -1, expected at least 1"),
    ({"dtype": torch.int32}, "dtype is torch.int32, expected torch.float64"),
    ({"dtype": torch.float8_e5m2}, "dtype is torch.float8_e5m2, expected torch.float64"),
    (
        {"kv_dtype": torch.bfloat16},
        "kv_dtype is torch.bfloat16, expected the dtype of q, torch.float32, or torch.float8_e4m3",
    ),
    (
        {"kv_dtype": torch.float8_e4m3fnuz},
        "kv_dtype is torch.float8_e4m3fnuz, expected .* or torch.float8_e4m3fn or float8_e5m2",
    ),
    ({"layout": "DHN"}, "layout is 'DHN', expected"),
    ({"window": 0}, "window is 0, expected at least 1 or None"),
    ({"window": 2.5}, "window is 2.5, expected an integer"),
    ({"sink_tokens": -1}, "sink_tokens is -1, expected at least 0"),
    ({"sink_tokens": None}, "sink_tokens is None, expected an integer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PLANS)
def test_an_impossible_plan(forest: Forest, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        plan_of(forest, **arguments)


def test_sinks_are_seen_with_or_without_a_window(forest: Forest) -> None:
    given = tensors(Case(forest, num_blocks=7))
    without = attention.run(plan_of(forest), *given)
    for mine, expected in zip(
        attention.run(plan_of(forest, sink_tokens=3), *given), without, strict=True
    ):
        assert mine.equal(expected)


BAD_WEIGHTS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": np.ones(2)}, r"temperature has shape \(2,\), expected \(3,\)"),
    ({"temperature": np.array([1, 0, 1])}, r"temperature\[1\] is 0.0, expected a positive number"),
    ({"temperature": np.array([1, 1, -2])}, r"temperature\[2\] is -2.0, expected a positive"),
    ({"temperature": np.array([np.inf, 1, 1])}, r"temperature\[0\] is inf, expected a positive"),
    ({"temperature": np.array([1, np.nan, 1])}, r"temperature\[1\] is nan, expected a positive"),
    ({"log_weight": np.zeros((3, 1))}, r"log_weight has shape \(3, 1\), expected \(3,\)"),
    ({"log_weight": np.array([0, -np.inf, 0])}, r"log_weight\[1\] is -inf, expected a finite"),
    ({"log_weight": np.array([0, 0, np.nan])}, r"log_weight\[2\] is nan, expected a finite"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_WEIGHTS)
def test_weights_of_nodes_that_weigh_nothing(
    forest: Forest, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidForest, match=message):
        plan_of(forest, **arguments)


def test_a_plan_for_fewer_blocks_than_the_forest_has(forest: Forest) -> None:
    highest = int(forest.blocks.max())
    plan_of(forest, num_blocks=highest + 1)
    with pytest.raises(InvalidForest, match=f"id {highest}, expected ids from 0 to below 2"):
        plan_of(forest, num_blocks=2)


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], dict[str, Any]], str]] = {
    "a query too many": (
        lambda t: {"q": torch.cat([t.q, t.q[:1]])},
        r"q has shape \(4, 4, 32\), expected \(3, 4, 32\)",
    ),
    "other query heads": (lambda t: {"q": t.q[:, :2]}, r"q has shape \(3, 2, 32\)"),
    "another head_dim": (lambda t: {"q": t.q[..., :16]}, r"q has shape \(3, 4, 16\)"),
    "keys of another head_dim": (
        lambda t: {"k_cache": t.k_cache[..., :16]},
        r"k_cache has shape \(7, 4, 2, 16\), expected at least 4 blocks of \(4, 2, 32\)",
    ),
    "the other layout": (
        lambda t: {"v_cache": t.v_cache.transpose(1, 2)},
        r"v_cache has shape \(7, 2, 4, 32\), expected .* \(4, 2, 32\) in the layout NHD",
    ),
    "another block size": (
        lambda t: {"k_cache": t.k_cache[:, :2]},
        r"k_cache has shape \(7, 2, 2, 32\)",
    ),
    "too few blocks": (
        lambda t: {"v_cache": t.v_cache[:3]},
        r"v_cache has shape \(3, 4, 2, 32\), expected at least 4 blocks",
    ),
    "a dimension too few": (lambda t: {"v_cache": t.v_cache[0]}, "v_cache has shape"),
    "no dimension": (lambda t: {"v_cache": torch.tensor(0.0)}, r"v_cache has shape \(\)"),
    "another dtype of q": (
        lambda t: {"q": t.q.double()},
        "q has dtype torch.float64, expected torch.float32",
    ),
    "another dtype of the cache": (
        lambda t: {"v_cache": t.v_cache.bfloat16()},
        "v_cache has dtype torch.bfloat16, expected torch.float32",
    ),
    "another device": (
        lambda t: {"k_cache": t.k_cache.to("meta")},
        "k_cache is on meta, expected cpu",
    ),
    "a last dimension with a stride": (
        lambda t: {"k_cache": t.k_cache.repeat_interleave(2, -1)[..., ::2]},
        "k_cache has stride 2 in its last dimension, expected 1",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_the_plan_was_not_made_for(forest: Forest, what: str) -> None:
    given = tensors(Case(forest, num_blocks=7))
    change, message = BAD_TENSORS[what]
    with pytest.raises(PlanMismatch, match=message):
        attention.run(plan_of(forest), *given._replace(**change(given)))


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"k_scale": 0.5}, "k_scale is 0.5, expected a tensor"),
    *(
        ({name: value}, rf"{name} is {value}, expected a positive number or None")
        for name in ("scale", "softcap")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    (
        {"alibi_slopes": torch.ones(2)},
        r"alibi_slopes has shape \(2,\), expected \(4,\)",
    ),
    ({"alibi_slopes": torch.ones(1, 4)}, r"alibi_slopes has shape \(1, 4\), expected \(4,\)"),
    (
        {"alibi_slopes": torch.ones(4).double()},
        "alibi_slopes has dtype torch.float64, expected torch.float32",
    ),
    (
        {"alibi_slopes": torch.ones(4, device="meta")},
        "alibi_slopes is on meta, expected cpu",
    ),
    (
        {"alibi_slopes": torch.ones(8)[::2]},
        r"alibi_slopes has strides \(2,\), expected a contiguous tensor",
    ),
    *(
        ({name: value}, f"{name} {message}")
        for name in ("k_scale", "v_scale")
        for value, message in (
            (torch.ones(4), r"has shape \(4,\), expected \(2,\) or \(1,\) or \(\)"),
            (torch.ones(2, 1), r"has shape \(2, 1\), expected \(2,\)"),
            (torch.ones(2).half(), "has dtype torch.float16, expected torch.float32"),
            (torch.ones((), device="meta"), "is on meta, expected cpu"),
            (torch.ones(1).expand(2), r"has strides \(0,\), expected a contiguous tensor"),
        )
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_no_layer_has(forest: Forest, options: dict[str, Any], message: str) -> None:
    given = tensors(Case(forest, num_blocks=7))
    with pytest.raises(PlanMismatch, match=message):
        attention.run(plan_of(forest), *given, **options)


def test_another_step_has_another_plan(forest: Forest) -> None:
    given = tensors(Case(forest, num_blocks=7))
    grown = replace(forest, query_len=changed(forest.query_len, 1, 2))
    with pytest.raises(PlanMismatch, match=r"q has shape \(3, 4, 32\), expected \(4, 4, 32\)"):
        attention.run(plan_of(grown), *given)


@pytest.mark.parametrize("device", ["nope", "cpu:x"])
def test_no_such_device(forest: Forest, device: str) -> None:
    with pytest.raises(attention.UnsupportedBackend, match=f"device is '{device}', expected one"):
        plan_of(forest, device=device)
