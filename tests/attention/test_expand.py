"""The kernel that writes entries of pieces, interpreted, held to the host's way."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Forest
from attention.segments import segments_of
from attention.triton_backend.entries import expand_pieces, piece_columns
from attention.triton_backend.invariant import make_invariant_plan
from attention.triton_backend.planner import Shape, make_plan
from attention.triton_backend.units import Entries
from tests.attention.strategies import LARGE, build_forest, forests
from tests.attention.test_schedule import problem_of, shapes, windows


def _interpreted() -> ModuleType:
    """A copy of the kernel's module in which the kernel is interpreted."""
    importlib.import_module("triton.language")  # which is not to be interpreted with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.find_spec("attention.triton_backend.expand")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


interpreted = _interpreted()


def assert_the_same(
    forest: Forest, window: int | None, shape: Shape, *, weighted: bool, invariant: bool
) -> None:
    nodes = len(forest.length)
    weights = (np.linspace(0.5, 2, nodes), np.linspace(-1, 1, nodes)) if weighted else (None, None)
    segments = segments_of(forest, *weights)
    make = make_invariant_plan if invariant else make_plan
    plan = make(problem_of(window, 3), segments, shape)
    pieces = piece_columns(plan.segments, plan.pieces)
    assert (np.diff(pieces.entry) >= 0).all()
    expected = expand_pieces(pieces, segments.blocks, segments.block_size)

    columns = {
        name: torch.from_numpy(column).to(
            torch.float32 if column.dtype.kind == "f" else torch.int32
        )
        for name, column in pieces._asdict().items()
        if column is not None
    }
    entries = Entries(
        *(torch.full((plan.num_entries + 5,), -7, dtype=torch.int32) for _ in range(5)),
        *(torch.full((plan.num_entries + 5,), -7.0) if weighted else None for _ in range(2)),
    )
    blocks = torch.from_numpy(segments.blocks)
    interpreted.expand_on_device(
        columns, len(pieces.entry), blocks, segments.block_size, entries, plan.num_entries
    )
    untouched = np.ones(plan.num_entries + 5, np.bool_)
    untouched[expected.place] = False
    for name, column in entries._asdict().items():
        if column is None:
            assert getattr(expected, name) is None
            continue
        np.testing.assert_allclose(column.numpy()[expected.place], getattr(expected, name), 1e-6)
        assert (column.numpy()[untouched] == -7).all()


@settings(max_examples=30)
@given(forests(), windows, shapes(), st.booleans(), st.booleans())
def test_host_and_device_write_the_same(
    forest: tuple[Forest, int], window: int | None, shape: Shape, weighted: bool, invariant: bool
) -> None:
    assert_the_same(forest[0], window, shape, weighted=weighted, invariant=invariant)


@pytest.mark.parametrize("name", ["a prefix longer than one gather", "a prompt of many tiles"])
@given(shape=shapes())
@settings(max_examples=2)
def test_many_entries(name: str, shape: Shape) -> None:
    forest, _ = build_forest(16, *LARGE[name])
    assert_the_same(forest, None, shape, weighted=False, invariant=False)
