"""The ways of a schedule to a GPU, taken to another tensor on the CPU: the same results."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import attention
from attention.segments import segments_of
from attention.triton_backend import buffers, work
from attention.triton_backend.buffers import Columns, scatter
from attention.triton_backend.planner import Shape
from attention.triton_backend.work import TritonWork
from tests.attention.strategies import Node, build_forest, level_forest, sets_of
from tests.attention.test_schedule import FAT, problem_of

GPU = SimpleNamespace(device=SimpleNamespace(type="cuda"))


class CopiedColumns(Columns):
    """Columns that are not where the host writes."""

    def __init__(self, capacity: Mapping[str, int], staged: int, _: object) -> None:
        super().__init__(capacity, staged, torch.device("cpu"))
        self._host = torch.full((self._staged,), -77, dtype=torch.int32)
        self._array = self._host.numpy()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    make_columns = work._make_columns
    monkeypatch.setattr(work, "Columns", CopiedColumns)
    monkeypatch.setattr(work, "_make_columns", lambda _, plan: make_columns(GPU, plan))
    monkeypatch.setattr(buffers, "_pinned", lambda *shape: torch.empty(shape, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())


def test_a_patch_of_32_bits_overwrites_its_places() -> None:
    into = torch.zeros(6, dtype=torch.int32)
    scatter(into, torch.tensor([[4, 1], [7, -9]], dtype=torch.int32))
    assert into.tolist() == [0, -9, 0, 0, 7, 0]


def test_columns_begin_where_kernels_expect_it() -> None:
    lean_and_fat = Shape(4, 32, 16, 4, FAT)
    forest, _ = level_forest([[256], [20] * 4, [5] * 64])
    for shape in (None, lean_and_fat):
        schedule = TritonWork(problem_of(), segments_of(forest), 2, shape=shape).schedule
        columns = [*schedule.rows, *schedule.entries[:5], *schedule.merges]
        columns += [column for units in schedule.units for column in units[:-1]]
        base = min(column.data_ptr() for column in columns)
        assert all((column.data_ptr() - base) % 16 == 0 for column in columns)
        assert [units.size.numel() for units in schedule.units] == [1] * len(schedule.units)
    assert len(schedule.units) == 2


@pytest.mark.usefixtures("copied")
def test_there_is_nothing_to_be_read_at_first() -> None:
    forest, num_blocks = build_forest(4, [Node(-1, 6)], [(0, 1)])
    behind = sets_of(forest, [[(0, 0)], [(0, 0)]], [100, 100], [1, 1])
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "dtype": torch.float32}
    plans = [
        attention.plan(behind, backend=name, reserve=2, window=2, **heads)
        for name in ("triton", "torch")
    ]
    tensors = torch.randn(2, 2, 16), *torch.randn(2, num_blocks + 2, 4, 1, 16)
    for step in range(3):
        ours, expected = (attention.run(plan, *tensors) for plan in plans)
        for result, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        if step < 2:
            for plan in plans:
                plan.advance(4 * num_blocks + np.array([0, 4]) + step)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plans_are_made_updated_and_advanced(*, weighted: bool, batch_invariant: bool) -> None:
    nodes = [Node(-1, 70), Node(0, 9, offset=3), Node(0, 5), Node(2, 12)]
    arguments: dict[str, Any] = {
        "num_q_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "dtype": torch.float32,
        "batch_invariant": batch_invariant,
        "reserve": 0 if batch_invariant else 2,
    }
    weights = {"temperature": np.array([0.5, 1, 2, 1]), "log_weight": np.array([0, -1, 0.5, 0])}
    first, num_blocks = build_forest(4, nodes, [(1, 1), (3, 1), (2, 1)], shuffle=1)
    second, _ = build_forest(4, nodes, [(3, 1), (0, 1)], shuffle=1)
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, num_blocks + 3, 4, 1, 16, generator=generator)
    plans = [
        attention.plan(first, backend=name, **arguments, **(weights if weighted else {}))
        for name in ("triton", "torch")
    ]
    assert "pieces.entry" in plans[0].work._columns

    def assert_alike() -> None:
        q = torch.randn(plans[0].num_queries, 2, 16, generator=generator)
        ours, expected = (attention.run(plan, q, *caches) for plan in plans)
        for result, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)

    assert_alike()
    for forest, step in ((first, 0), (second, 1)):
        for plan in plans:
            plan.update(forest, **(weights if weighted else {}))
        assert_alike()
        if batch_invariant:
            continue
        new = 4 * np.arange(num_blocks, num_blocks + plans[0].num_queries)
        for slots in (new, new + 1 + step):
            for plan in plans:
                plan.advance(slots)
            assert_alike()
