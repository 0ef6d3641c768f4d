"""The command `bench plan`, on forests so small that the figures mean nothing."""

import importlib.util
import json
from pathlib import Path

import pytest
import triton

from prefixtree.__main__ import main
from prefixtree.bench import planning
from prefixtree.bench.trees import level_tree

TREES = {"three": level_tree([1, 3], [20, 5]), "alone": level_tree([2], [40])}
STEPS = ("plan", "plan in place", "first advance", "advance")


@pytest.mark.parametrize("interpreted", [False, True])
def test_every_step_is_measured_on_every_forest(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    interpreted: bool,
) -> None:
    monkeypatch.setattr(planning, "TREES", TREES)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    file = tmp_path / "figures.json"
    assert main(["bench", "plan", "--rounds", "2", "--json", str(file)]) == 0
    backends = ("torch", "triton") if interpreted else ("torch",)
    steps = ["order and segments", "torch: batches of segments", "triton: units of segments"]
    steps += [f"{backend}: {step}" for backend in backends for step in STEPS]
    figures = json.loads(file.read_text())
    assert list(figures["steps"]) == steps
    for of_forests in figures["steps"].values():
        assert list(of_forests) == list(TREES)
        assert all(one["count"] == 2 for one in of_forests.values())
        assert all(0 < one["least_us"] <= one["median_us"] for one in of_forests.values())
    heading, columns, *lines = capsys.readouterr().out.splitlines()
    assert "64 tokens in reserve" in heading
    assert columns.split() == list(TREES)
    assert [line.partition("  ")[0] for line in lines] == steps


def test_without_triton_the_plans_of_torch_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "TREES", TREES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(planning, "find_spec", lambda _: None)
    assert main(["bench", "plan", "--rounds", "1"]) == 0
    assert "triton" not in capsys.readouterr().out


def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", "--json", "/nowhere/figures.json"]) == 2
    assert "cannot write /nowhere/figures.json" in capsys.readouterr().err
