"""The command `bench attention`, on shapes so small that the figures mean nothing."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtree.__main__ import main
from prefixtree.bench import compare, shapes
from prefixtree.bench.attention import chosen_shapes
from prefixtree.bench.clocks import Ceilings, HostClock, measure_ceilings
from prefixtree.bench.compare import (
    Measured,
    Result,
    geometric_means,
    makers_for,
    measure_shape,
    measure_shapes,
)
from prefixtree.bench.contenders import Ours, SdpaPadded, Unavailable
from prefixtree.bench.inputs import Inputs
from prefixtree.bench.measure import Rounds
from prefixtree.bench.shapes import Shape
from prefixtree.bench.trees import level_tree
from prefixtree.bench.usable import UnusableInput

CPU = torch.device("cpu")


def tiny() -> Iterator[Shape]:
    yield Shape("tiny", "even", level_tree((1, 4), (20, 3)), 4, 2, head_dim=16)
    yield Shape("tiny", "ragged", level_tree((1, 3), (20, [3, 40, 5])), 2, 1, head_dim=16)


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SUITES, "tiny", tiny)


def bench(*options: str) -> int:
    return main(["bench", "attention", *options])


def test_every_contender_is_measured_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, plot_file = tmp_path / "figures.json", tmp_path / "figures.png"
    options = ["--shapes", "tiny", "--rounds", "2", "--flex-seconds", "0", "--seconds", "60"]
    assert bench(*options, "--json", str(json_file), "--plot", str(plot_file)) == 0
    figures = json.loads(json_file.read_text())
    assert figures["dtype"] == "float32"
    assert figures["ceilings"]["bytes_per_s"] > 0 < figures["ceilings"]["flops_per_s"]
    even, ragged = figures["shapes"]
    everywhere = {"prefixtree", "not shared", "SDPA gathered", "SDPA padded"}
    assert set(even["contenders"]) == {*everywhere, "flash per level"}
    assert set(ragged["contenders"]) == everywhere
    assert set(even["missing"]) == {"flex_attention"}
    assert ragged["missing"]["flash per level"] == "its levels are not uniform"
    for shape in figures["shapes"]:
        assert shape["rounds"] == 2
        for result in shape["contenders"].values():
            assert result["ms"] > 0
            assert result["error"] < 1e-5
            assert result["gbytes_per_s"] == pytest.approx(shape["kv_bytes"] / result["ms"] / 1e6)
        assert shape["explained"]["kv_tokens_loaded"] > 0
        ours = shape["contenders"]["prefixtree"]
        assert ours["plan_us"] > 0
        best = shape["contenders"][shape["best_other"]]
        assert shape["ratio"] == pytest.approx(ours["ms"] / best["ms"])
    assert even["kv_bytes"] == (20 + 4 * 3) * 2 * 2 * 16 * 4
    assert even["path_bytes"] == 4 * 23 * 2 * 2 * 16 * 4
    assert even["flops"] == 4 * 4 * 16 * 4 * 23
    assert set(figures["geometric_mean"]) == {"tiny"}
    assert plot_file.stat().st_size > 0
    out = capsys.readouterr().out
    assert "tiny: ragged" in out
    assert "flash per level missing on 1 of 2 shapes: its levels are not uniform" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "tiny,tinny"], "no shapes 'tinny', expected small, fasttree"),
        (["--shapes", "tiny", "--limit", "0.001"], "--limit 0.001: the smallest of the shapes has"),
        (["--shapes", "tiny", "--json", "/no/such/file"], "/no/such/file: No such file"),
    ],
)
def test_input_that_cannot_be_used_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_missing_library_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--shapes", "tiny", "--plot", "a.png") == 2
    assert "pip install 'prefixtree[bench]'" in capsys.readouterr().err


def test_the_limit_leaves_out_larger_shapes() -> None:
    every = chosen_shapes(["hydragen"], 1e9, 2, quick=False)
    some = chosen_shapes(["hydragen"], 400, 2, quick=False)
    assert 0 < len(some) < len(every) == 136
    assert all(shape.path_bytes(2) <= 400e6 for shape in some)
    quick = chosen_shapes(["hydragen"], 1e9, 2, quick=True)
    assert {shape.name.partition(" + ")[2] for shape in quick} == {"0", "128", "512"}
    with pytest.raises(UnusableInput):
        chosen_shapes(["hydragen"], 1, 2, quick=False)


class FixedClock:
    """Each run takes as long as the contender says."""

    def ready(self, run: Any) -> tuple[Any, bool]:
        return run, True

    def time(self, run: Any) -> float:
        return float(run.__self__.ms.pop())


def contender_of(*ms: float) -> Any:
    class Fixed(SdpaPadded):
        def __init__(self, inputs: Inputs) -> None:
            super().__init__(inputs)
            self.ms = list(ms)

    return Fixed


def first_inputs() -> tuple[Shape, Inputs]:
    from prefixtree.bench.inputs import make_inputs

    shape = next(tiny())
    return shape, make_inputs(shape, torch.float32, CPU)


def test_ratios_are_of_medians_and_leave_out_our_own() -> None:
    shape, inputs = first_inputs()
    makers = {
        "prefixtree": contender_of(2.0, 9.0, 3.0),
        "not shared": contender_of(0.1, 0.1, 0.1),
        "a": contender_of(4.0, 1.0, 8.0),
        "b": contender_of(6.0, 6.0, 6.0),
    }
    one = measure_shape(shape, makers, FixedClock(), Rounds(3, 60.0), inputs)
    assert {name: result.ms for name, result in one.results.items()} == {
        "prefixtree": 3.0,
        "not shared": 0.1,
        "a": 4.0,
        "b": 6.0,
    }
    assert one.best_other == "a"
    assert one.ratio("a") == 0.75
    assert one.ratio("not there") is None
    assert one.rounds == 3
    assert one.results["a"].captured


def test_what_contenders_raise_is_noted_and_ours_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, inputs = first_inputs()

    def unavailable(_: Inputs) -> Any:
        raise Unavailable("not today")

    def broken(_: Inputs) -> Any:
        raise RuntimeError("oh")

    makers: Any = {"a": unavailable, "b": broken, "c": contender_of(1.0)}
    one = measure_shape(shape, makers, FixedClock(), Rounds(1, 60.0), inputs)
    assert one.missing == {"a": "not today", "b": "RuntimeError: oh"}
    assert one.ratio(one.best_other) is None
    assert not one.failed
    assert measure_shape(shape, {Ours.name: broken}, FixedClock(), Rounds(1, 60.0), inputs).failed

    monkeypatch.setattr(Ours, "run", broken)
    options = ["--shapes", "tiny", "--rounds", "1", "--flex-seconds", "0"]
    assert bench(*options) == 1
    assert "prefixtree missing on 2 of 2 shapes: RuntimeError: oh" in capsys.readouterr().out


def measured_at(suite: str, ours: float, other: float) -> Measured:
    shape = Shape(suite, "x", level_tree((1,), (8,)), 1, 1)
    results = {
        "prefixtree": Result(ours, 5.0, 0.0, False),
        "other": Result(other, None, 0.0, False),
    }
    return Measured(shape, 100, 200, 4000, 1, results, {}, {})


def test_the_geometric_mean_is_by_suite_and_over_all() -> None:
    measured = [measured_at("a", 1, 4), measured_at("a", 1, 1), measured_at("b", 8, 1)]
    means = geometric_means(measured)
    assert means == pytest.approx({"a": 0.5, "b": 8.0, "all": 2 ** (1 / 3)})
    assert geometric_means(measured[:1]) == pytest.approx({"a": 0.25})
    assert geometric_means([]) == {}


def test_the_floor_is_the_slower_of_bytes_and_operations() -> None:
    ceilings = Ceilings(bytes_per_s=1e3, flops_per_s=1e4)
    assert ceilings.floor_ms(100, 10) == pytest.approx(100)
    assert ceilings.floor_ms(1, 1000) == pytest.approx(100)
    record = measured_at("a", 200.0, 1.0).record(ceilings)
    assert record["floor_ms"] == pytest.approx(400)


def test_ceilings_count_bytes_both_ways_and_two_operations_a_pair() -> None:
    class Second(HostClock):
        def time(self, run: Any) -> float:
            run()
            return 1000.0

    clock = Second(lambda: 0)
    found = measure_ceilings(CPU, torch.float32, clock, copied=4096, side=16)
    assert found == Ceilings(2 * 4096, 2 * 16**3)


def test_a_host_clock_counts_milliseconds() -> None:
    ticks = iter([1_000_000, 4_500_000])
    assert HostClock(lambda: next(ticks)).time(lambda: None) == 3.5


def test_ours_run_by_the_backend_that_is_asked_for() -> None:
    _, inputs = first_inputs()
    makers = makers_for(CPU, 0.0, backend="reference")
    assert list(makers)[:2] == ["prefixtree", "not shared"]
    ours: Any = makers["prefixtree"](inputs)
    assert ours.planned.backend == "reference"


def test_shape_after_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"prefixtree": compare.Ours}
    clock = HostClock(lambda: 0)
    found = list(measure_shapes(tiny(), makers, clock, Rounds(1, 60.0), torch.float32, CPU))
    assert [one.shape.name for one in found] == ["even", "ragged"]
