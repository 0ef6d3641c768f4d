"""The figures of attention as a table, a summary and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch

from prefixtree.bench.clocks import Ceilings, device_name
from prefixtree.bench.compare import Measured, geometric_means
from prefixtree.bench.contenders import Ours
from prefixtree.bench.report import aligned

LABELLED = 40
"""Shapes whose names still fit below a picture."""


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures depend on, beside the machine."""
    return {
        "torch": torch.__version__,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def heading(device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> str:
    facts = setting(device, dtype)
    return (
        f"{facts['device']}, {facts['dtype']}, torch {facts['torch']}. Ceilings of this run: "
        f"{ceilings.bytes_per_s / 1e9:.1f} GB/s copied, {ceilings.flops_per_s / 1e9:,.0f} GFLOP/s. "
        "Medians in milliseconds; in brackets ours / theirs."
    )


def table(measured: Sequence[Measured], ceilings: Ceilings) -> str:
    """A line for each shape: the floor, the share of it that ours reaches, each contender.

    floor: what the ceilings allow for the KV read once and the operations. A contender that is
    nowhere present has no column.
    """
    names = list(dict.fromkeys(name for one in measured for name in one.results))
    lines = [["", "heads", "floor", "reached", "plan us", *names, "ours / best"]]
    for one in measured:
        floor = ceilings.floor_ms(one.kv_bytes, one.flops)
        ours = one.results.get(Ours.name)
        lines.append(
            [
                f"{one.shape.suite}: {one.shape.name}",
                one.shape.heads,
                _ms(floor),
                "-" if ours is None else f"{floor / ours.ms:.0%}",
                "-" if ours is None or ours.plan_us is None else f"{ours.plan_us:,.0f}",
                *(_cell(one, name) for name in names),
                _ratio(one.ratio(one.best_other)),
            ]
        )
    return aligned(lines)


def summary(measured: Sequence[Measured], ceilings: Ceilings) -> str:
    """The geometric means, the worst shape, the largest errors, and why contenders are missing."""
    lines = [
        f"ours / the best other, geometric mean: {suite} {value:.2f}"
        for suite, value in geometric_means(measured).items()
    ]
    known = [(one.ratio(one.best_other), one) for one in measured if one.best_other]
    ratios = [(ratio, one) for ratio, one in known if ratio is not None]
    if ratios:
        slower = sum(ratio > 1 for ratio, _ in ratios)
        ratio, worst = max(ratios, key=lambda pair: pair[0])
        lines.append(
            f"slower than the best other on {slower} of {len(ratios)} shapes, at most {ratio:.2f}: "
            f"{worst.shape.suite}: {worst.shape.name}, {worst.shape.heads}"
        )
    errors: dict[str, float] = {}
    reasons: dict[tuple[str, str], int] = {}
    for one in measured:
        for name, result in one.results.items():
            errors[name] = max(errors.get(name, 0.0), result.error)
        for name, reason in one.missing.items():
            key = name, reason.splitlines()[0][:120]
            reasons[key] = reasons.get(key, 0) + 1
    worst_errors = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    lines.append(f"largest error against float64: {worst_errors}")
    lines += [
        f"{name} missing on {count} of {len(measured)} shapes: {reason}"
        for (name, reason), count in reasons.items()
    ]
    return "\n".join(lines)


def plot(measured: Sequence[Measured], ceilings: Ceilings, file: Path) -> None:
    """The time of each contender over ours, shape by shape, a picture for each suite.

    Above the line at 1 are those that take longer than ours; the floor is what the ceilings allow.
    """
    from matplotlib.figure import Figure

    suites = list(dict.fromkeys(one.shape.suite for one in measured))
    names = list(dict.fromkeys(name for one in measured for name in one.results))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    columns = min(2, len(suites))
    rows = ceil(len(suites) / columns)
    figure = Figure(figsize=(8.5 * columns, 5.5 * rows), layout="constrained")
    every_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in every_axes[len(suites) :]:
        axes.set_visible(False)
    for axes, suite in zip(every_axes, suites, strict=False):
        mine = [one for one in measured if one.shape.suite == suite and Ours.name in one.results]
        for name in names:
            points = [
                (place, one.results[name].ms / one.results[Ours.name].ms)
                for place, one in enumerate(mine)
                if name in one.results
            ]
            style = "-" if name == Ours.name else "o"
            places, ratios = zip(*points, strict=True) if points else ((), ())
            axes.plot(places, ratios, style, color=colors[name], label=name, markersize=4)
        floors = [
            ceilings.floor_ms(one.kv_bytes, one.flops) / one.results[Ours.name].ms for one in mine
        ]
        axes.plot(range(len(mine)), floors, "_", color="black", label="floor")
        axes.set(yscale="log", ylabel="time / our time", title=suite)
        axes.grid(alpha=0.3, which="both", axis="y")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        labels = [f"{one.shape.name}, {one.shape.heads}" for one in mine]
        if len(labels) <= LABELLED:
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        else:
            axes.set_xlabel("shapes, in the order of the table")
    handles, labels = every_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=120)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:,.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(one: Measured, name: str) -> str:
    if name not in one.results:
        return "-"
    time = _ms(one.results[name].ms)
    return time if name == Ours.name else f"{time} ({_ratio(one.ratio(name))})"
