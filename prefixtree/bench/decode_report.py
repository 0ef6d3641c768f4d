"""Throughputs as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtree.bench.report import aligned

if TYPE_CHECKING:
    from prefixtree.bench.decode import Throughput

AXES = {
    "batch": "sequences",
    "prefix": "tokens of the shared prefix",
    "levels": "levels of sharing",
}


def heading(facts: dict[str, Any], clock: str) -> str:
    return (
        f"{facts['device']}, {facts['dtype']}, torch {facts['torch']}. Model {facts['model']}: "
        f"{facts['layers']} layers, hidden size {facts['hidden']}, heads "
        f"{facts['num_q_heads']}/{facts['num_kv_heads']}, random weights. Tokens a second by the "
        f"median step, {clock} time; in brackets the share of what no attention at all gives."
    )


def table(measured: Sequence[Throughput]) -> str:
    """A line for each point: how many sequences and prompt tokens, the throughput of each mode."""
    modes = list(dict.fromkeys(mode for one in measured for mode in one.tokens_per_s))
    lines = [["", "sequences", "prompt", *modes, "shared / not"]]
    for one in measured:
        scenario, rates = one.point.scenario, one.tokens_per_s
        cells = [
            f"{one.point.experiment} {one.point.label}",
            f"{scenario.batch:,}",
            f"{scenario.few_shot}+{scenario.problem}"
            if scenario.problem
            else f"{scenario.few_shot}",
        ]
        cells += [_cell(rates, mode) for mode in modes]
        gain = "-"
        if "prefixtree" in rates and "not shared" in rates:
            gain = f"{rates['prefixtree'] / rates['not shared']:.2f}"
        lines.append([*cells, gain if one.missing is None else one.missing])
    return aligned(lines)


def plot(measured: Sequence[Throughput], file: Path) -> None:
    """Throughput against the batch, against the prefix, and by levels of sharing."""
    from matplotlib.figure import Figure

    experiments = list(dict.fromkeys(one.point.experiment for one in measured))
    modes = list(dict.fromkeys(mode for one in measured for mode in one.tokens_per_s))
    figure = Figure(figsize=(5.5 * len(experiments), 5.0), layout="constrained")
    every_axes = figure.subplots(1, len(experiments), squeeze=False)[0]
    for axes, experiment in zip(every_axes, experiments, strict=True):
        mine = [one for one in measured if one.point.experiment == experiment]
        labels = [one.point.label for one in mine]
        for number, mode in enumerate(modes):
            known = [
                (place, one.tokens_per_s[mode])
                for place, one in enumerate(mine)
                if mode in one.tokens_per_s
            ]
            places, rates = zip(*known, strict=True) if known else ((), ())
            axes.plot(places, rates, "o-", color=f"C{number}", label=mode)
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel=AXES[experiment], ylabel="tokens a second", ylim=(0, None))
        axes.grid(alpha=0.3)
    handles, names = every_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(modes), fontsize="small")
    figure.savefig(file, dpi=120)


def _cell(rates: dict[str, float], mode: str) -> str:
    if mode not in rates:
        return "-"
    rate = f"{rates[mode]:,.0f}" if rates[mode] >= 100 else f"{rates[mode]:.1f}"
    most = rates.get("no attention")
    return rate if most is None or mode == "no attention" else f"{rate} ({rates[mode] / most:.0%})"
