"""The command `bench gpu` on a CPU: the same checks and timings, on very little."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import attention
from prefixtree.__main__ import main
from prefixtree.bench import checks, shapes, tuning, variants
from prefixtree.bench.checks import check, poisoned
from prefixtree.bench.clocks import HostClock
from prefixtree.bench.gpu import Deadline, by_worth, every
from prefixtree.bench.shapes import SUITES, Shape, shapes_of
from prefixtree.bench.trees import level_tree
from prefixtree.bench.tuning import best_tiles, candidates, tune
from prefixtree.bench.variants import TREES, Variant, forest_named

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FEW = [Variant(dtype="float32"), Variant(tree="chain", layout="HND"), Variant(window=9)]


def tiny() -> Iterator[Shape]:
    yield Shape("tiny", "even", level_tree((1, 4), (20, 3)), 4, 2, head_dim=16)
    yield Shape("tiny", "one", level_tree((1,), (30,)), 4, 2, head_dim=16)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SUITES, "tiny", tiny)
    monkeypatch.setattr(variants, "variants", lambda: FEW)


def bench(*options: str) -> int:
    given = ["--device", "cpu", "--shapes", "tiny", "--rounds", "2", "--flex-seconds", "0"]
    return main(["bench", "gpu", *given, *options])


def test_all_is_checked_and_timed(
    little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench("--json", str(file), "--seed", "7") == 0
    figures = json.loads(file.read_text())
    assert [found["name"] for found in figures["checks"]] == [
        "dtype float32",
        "tree chain, layout HND",
        "window 9",
    ]
    assert all(found["error"] < 1e-2 and not found["wrong"] for found in figures["checks"])
    assert {shape["name"] for shape in figures["shapes"]} == {"even", "one"}
    assert (figures["variants_left"], figures["shapes_left"], figures["seed"]) == (0, 0, 7)
    out = capsys.readouterr().out
    assert "checked 3 of 3 variants: 3 right" in out
    assert "timed 2 of 2 shapes in the time" in out


def test_what_has_no_time_is_counted(
    little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench("--seconds", "0", "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert (figures["variants_left"], figures["shapes_left"]) == (3, 2)
    assert "timed 0 of 2 shapes in the time" in capsys.readouterr().out


def test_parts_and_slices_are_left_out(
    little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench("--parts", "checks", "--slice", "2/2", "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert [found["name"] for found in figures["checks"]] == ["tree chain, layout HND"]
    assert figures["shapes"] == []
    assert bench("--parts", "shapes", "--slice", "1/2", "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert figures["checks"] == []
    assert [shape["name"] for shape in figures["shapes"]] == ["even"]
    capsys.readouterr()
    assert bench("--parts", "check") == 2
    assert "no part 'check', expected checks, shapes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench("--slice", "3/2")
    assert "expected I/N with I up to N, not '3/2'" in capsys.readouterr().err


def test_a_wrong_result_is_the_exit_status(
    little: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, lambda out, lse: (out * 1.1, lse))
    assert bench("--parts", "checks") == 1
    assert "WRONG window 9: error 1.0e-01, at most 1.5e-02" in capsys.readouterr().out


def test_what_was_found_before_an_error_is_written(
    little: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr("prefixtree.bench.gpu.measure_ceilings", fail)
    file = tmp_path / "figures.json"
    with pytest.raises(RuntimeError, match="device lost"):
        bench("--json", str(file))
    figures = json.loads(file.read_text())
    assert len(figures["checks"]) == 3
    assert figures["ceilings"] is None


def broken(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    run = attention.run

    def changed(*arguments: Any, **options: Any) -> Any:
        return change(*run(*arguments, **options))

    monkeypatch.setattr(checks.attention, "run", changed)


def only_wrong(**fields: Any) -> str:
    outcome = check(Variant(dtype="float32")._replace(**fields), CPU, "torch", 3)
    return "; ".join(outcome.wrong)


def test_a_right_variant_has_nothing_wrong() -> None:
    outcome = check(Variant(dtype="float32"), CPU, "torch", 3)
    assert outcome.wrong == []
    assert 0 < outcome.error < 1e-5
    assert 0 < outcome.lse_error < 1e-4
    assert outcome.record()["name"] == "dtype float32"


def test_a_wrong_lse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda out, lse: (out, lse + 0.01))
    assert "lse error 1.0e-02" in only_wrong()


def test_an_element_never_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(out: torch.Tensor, lse: torch.Tensor) -> Any:
        result = torch.empty_like(out)
        result[1:] = out[1:]
        return result, lse

    broken(monkeypatch, unwritten)
    assert "error nan" in only_wrong()


def test_bits_that_change_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(range(100))
    broken(monkeypatch, lambda out, lse: (out + 1e-7 * next(runs), lse))
    assert only_wrong().startswith("two runs differ in their bits")


def test_bits_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda out, lse: (out * (1 + 1e-6 * (len(out) > 12)), lse))
    assert "sequence 0 has other bits when it runs alone" in only_wrong(batch_invariant=True)


def test_an_exception_is_one_of_the_things_that_are_wrong() -> None:
    assert "PlanMismatch: num_q_heads is 5" in only_wrong(num_q_heads=5)


def test_a_result_for_other_tensors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    broken(monkeypatch, lambda out, lse: kept.append((out, lse)) or kept[0])
    assert "error" in only_wrong()


def test_memory_is_poisoned_only_meanwhile() -> None:
    with poisoned():
        assert torch.empty(100).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_variants_cover_what_attention_can_be_varied_in() -> None:
    found = variants.variants()
    assert len({variant.name for variant in found}) == len(found)
    for field, values in {
        "tree": set(TREES),
        "dtype": {"float32", "bfloat16", "float16"},
        "layout": {"NHD", "HND"},
        "head_dim": {32, 64, 80, 96, 128, 192, 256, 576},
        "kv_dtype": {None, "float8_e4m3fn", "float8_e5m2"},
    }.items():
        assert {getattr(variant, field) for variant in found} == values
    groups = {v.num_q_heads // v.num_kv_heads for v in found}
    assert groups >= {1, 2, 3, 5, 6, 7, 8, 16, 32}
    for option in ("window", "sink_tokens", "softcap", "scale", "alibi", "kv_scales"):
        assert any(getattr(variant, option) for variant in found)
    assert any(variant.node_weights and variant.softcap for variant in found)


@pytest.mark.parametrize("name", TREES)
def test_odd_trees_are_valid_forests(name: str) -> None:
    forest, num_blocks = forest_named(name)
    forest.validate(num_blocks)
    assert len(forest.query_len) == len(forest.leaf)


def test_the_worthiest_shapes_are_of_every_suite_and_none_is_lost() -> None:
    found = shapes_of(list(SUITES))
    ordered = by_worth(found)
    assert Counter(map(id, ordered)) == Counter(map(id, found))
    assert {shape.suite for shape in ordered[: len(SUITES)]} == set(SUITES)
    first = [shape for shape in ordered if shape.suite == "hydragen"][:4]
    assert len({shape.name.partition(" on ")[0] for shape in first}) >= 3


def test_slices_make_up_the_whole() -> None:
    parts = [every(range(10), first, 3) for first in (1, 2, 3)]
    assert parts[1] == [1, 4, 7]
    assert sorted(item for part in parts for item in part) == list(range(10))


def test_nothing_begins_when_the_time_is_up() -> None:
    assert list(Deadline(0.0).until_passed([1, 2], "things")) == []
    assert list(Deadline(600.0).until_passed([1, 2], "things")) == [1, 2]


def test_tiles_are_tried_in_every_module_and_put_back() -> None:
    pytest.importorskip("triton")
    tiles: Any = import_module("attention.triton_backend.tiles")
    launch: Any = import_module("attention.triton_backend.launch")
    original = tiles.tiles_for
    problem = attention.plan(
        forest_named("single")[0],
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.bfloat16,
        backend="torch",
    ).problem
    tile = tiles.Tile(32, 64, 4, 2, 8)
    with tuning._tiles_of_kind(tiles, "fat", tile):
        for module in (tiles, launch):
            assert module.tiles_for(problem).fat == tile
            assert module.tiles_for(problem).lean == original(problem).lean
    assert tiles.tiles_for is launch.tiles_for is original


def test_each_tile_is_timed_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("tune", "8/2", level_tree((2, 6), (40, 3)), 8, 2, head_dim=32)
    tried = [replace_shape(candidate, shape) for candidate in list(candidates())[:3]]
    clock = HostClock(iter(range(0, 10**12, 10**6)).__next__)
    options = {"device": CPU, "dtype": torch.float32, "clock": clock, "rounds": 3}
    deadline = Deadline(600.0)
    trials = tune(tried, backend="torch", deadline=deadline, **options)  # type: ignore[arg-type]
    assert [trial.ms for trial in trials] == [1.0] * 3
    assert [trial.tile.block_m for trial in trials] == [c.sizes[0] for c in tried]
    assert "0 of 3 failed" in best_tiles(trials)
    failing = tune(tried, backend="none", deadline=deadline, **options)  # type: ignore[arg-type]
    assert all("UnsupportedBackend" in str(trial.failed) for trial in failing)
    assert tuning.record(failing[0])["ms"] is None
    assert "3 of 3 failed" in best_tiles(failing)


def replace_shape(candidate: tuning.Candidate, shape: Shape) -> tuning.Candidate:
    return candidate._replace(shape=shape)


def test_candidates_have_room_for_their_heads() -> None:
    for candidate in candidates():
        shape = candidate.shape
        assert candidate.sizes[0] >= shape.num_q_heads // shape.num_kv_heads


@pytest.mark.skipif(find_spec("triton") is None, reason="no kernels")
def test_kernels_are_checked_under_the_interpreter(tmp_path: Path) -> None:
    script = f"""
import sys
from prefixtree.__main__ import main
from prefixtree.bench import shapes, variants
from prefixtree.bench.shapes import Shape
from prefixtree.bench.trees import level_tree
from prefixtree.bench.variants import Variant
shapes.SUITES["tiny"] = lambda: iter(
    [Shape("tiny", "even", level_tree((1, 4), (20, 3)), 4, 2, head_dim=32)]
)
few = [
    Variant(tree="single", dtype="float32"),
    Variant(tree="single", dtype="float16", batch_invariant=True),
]
variants.variants = lambda: few
options = "--device cpu --backend triton --shapes tiny --rounds 1 --flex-seconds 0"
sys.exit(main(["bench", "gpu", *options.split(), "--json", {str(tmp_path / "a.json")!r}]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [found["wrong"] for found in figures["checks"]] == [[], []]
    assert figures["shapes"][0]["contenders"]["prefixtree"]["error"] < 1e-4
