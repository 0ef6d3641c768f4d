"""The figures as tables and pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixtree.bench.measure import Row
from prefixtree.bench.peers import Ours
from prefixtree.bench.played import Played

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("-", "--", ":", "-.")
"""Of our line, and those of at most three peers'."""


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def heading(block_size: int, clock: str) -> str:
    facts = machine()
    return (
        f"Blocks of {block_size} tokens; Python {facts['python']}, numpy {facts['numpy']}, "
        f"{facts['machine']}, {facts['cores']} cores. Medians of {clock} time; in brackets ours / "
        "theirs."
    )


def table(rows: Sequence[Row]) -> str:
    """A line for each row, operation by operation; ours first, behind a peer's ours / theirs."""
    operations = list(dict.fromkeys(row.operation for row in rows))
    rows = sorted(rows, key=lambda row: operations.index(row.operation))
    names = list(dict.fromkeys([Ours.name, *(name for row in rows for name in row.median_us)]))
    lines = [["", rows[0].unit, *names]]
    lines += [[row.operation, f"{row.size:,}", *_figures(row.median_us, names)] for row in rows]
    return aligned(lines)


def weights(memory: Sequence[dict[str, Any]], nodes: int) -> str:
    """What a node and a token weigh in each cache."""
    lines = [[f"memory, {nodes:,} nodes", "bytes a node", "bytes a token"]]
    lines += [
        [weight["cache"], f"{weight['bytes_a_node']:,.0f}", f"{weight['bytes_a_token']:.1f}"]
        for weight in memory
    ]
    return aligned(lines)


def played(result: Played) -> str:
    """The mean and the median of each step, and which share of the tokens was cached."""
    names = list(result.hit_tokens)
    lines = [["", "", *names]]
    for step, measured in result.steps.items():
        for which in ("mean", "median"):
            figures = {name: taken[f"{which}_us"] for name, taken in measured.items()}
            lines.append([step, which, *_figures(figures, names)])
    hits = ", ".join(f"{name} {hit / result.tokens:.1%}" for name, hit in result.hit_tokens.items())
    return (
        f"{result.requests:,} requests, {result.tokens:,} prompt tokens, blocks of "
        f"{result.block_size}; cached: {hits}\n{aligned(lines)}"
    )


def plot_sizes(rows: Sequence[Row], file: Path) -> None:
    """Time against size on two logarithmic axes, a picture for each unit of size.

    An operation has a colour, a cache a style of line.
    """
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(row.unit for row in rows))
    names = dict.fromkeys(name for row in rows for name in row.median_us)
    styles = dict(zip(names, STYLES, strict=False))
    figure = Figure(figsize=(6 * len(units), 6.0), layout="constrained")
    every_axes = figure.subplots(1, len(units), squeeze=False)[0]
    for axes, unit in zip(every_axes, units, strict=True):
        mine = [row for row in rows if row.unit == unit]
        for color, operation in enumerate(dict.fromkeys(row.operation for row in mine)):
            points = [row for row in mine if row.operation == operation]
            axes.plot([], [], color=f"C{color}", label=operation)
            for name, style in styles.items():
                known = [row for row in points if name in row.median_us]
                times = [row.median_us[name] for row in known]
                sizes = [row.size for row in known]
                axes.plot(sizes, times, style, marker=".", color=f"C{color}")
        for name in dict.fromkeys(name for row in mine for name in row.median_us):
            axes.plot([], [], styles[name], color="black", label=name)
        axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="microseconds")
        axes.grid(alpha=0.3)
        _legend_below(axes)
    figure.savefig(file, dpi=120)


def plot_played(results: Sequence[Played], file: Path) -> None:
    """The mean of each step as bars, a picture for each block size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(results), 6.0), layout="constrained")
    every_axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(every_axes, results, strict=True):
        steps, names = list(result.steps), list(result.hit_tokens)
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            means = [result.steps[step].get(name, {}).get("mean_us", 0.0) for step in steps]
            axes.bar(np.arange(len(steps)) + place * width, means, width, label=name)
        labels = [step.replace(" + ", "\n+ ") for step in steps]
        axes.set_xticks(np.arange(len(steps)) + 0.4 - width / 2, labels)
        axes.set(ylabel="microseconds, mean", title=f"blocks of {result.block_size}")
        _legend_below(axes)
    figure.savefig(file, dpi=120)


def _legend_below(axes: Axes) -> None:
    """Where it covers no line, wherever the lines run."""
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _figures(figures: dict[str, float], names: Sequence[str]) -> list[str]:
    """One cell a name: the time, and in brackets ours divided by it."""
    cells = []
    for name in names:
        if name not in figures:
            cells.append("-")
        elif name == Ours.name or Ours.name not in figures:
            cells.append(_time(figures[name]))
        else:
            cells.append(f"{_time(figures[name])} ({figures[Ours.name] / figures[name]:.2f})")
    return cells


def _time(microseconds: float) -> str:
    if microseconds >= 100_000:
        return f"{microseconds / 1000:,.0f} ms"
    if microseconds >= 1_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds:.1f} us"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
