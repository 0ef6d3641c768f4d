"""The capacity curve: what each policy hits, against what was possible."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from prefixtree.replay.report import Replay

# Told apart without colours, too.
MARKERS = "osD^vPX*<>hd"


def plot(replay: Replay, path: Path) -> None:
    """Draws hit rate over capacity into an image of the kind that `path` names.

    Raises OSError when the file cannot be written, ValueError for a kind that is not known.
    """
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    capacities = [limit.capacity for limit in replay.limits]
    axes.axhline(
        100 * replay.unlimited_hit_rate, color="0.6", linestyle=":", label="unlimited cache"
    )
    bounds = [100 * limit.hit_rate for limit in replay.limits]
    axes.plot(capacities, bounds, color="black", linestyle="--", marker=".", label="clairvoyant")
    for number, policy in enumerate(dict.fromkeys(run.policy for run in replay.runs)):
        rates = [100 * run.hit_rate for run in replay.runs if run.policy == policy]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(capacities, rates, marker=marker, markersize=5, linewidth=1.2, label=policy)
    axes.set_xscale("log")
    axes.set_xticks(capacities)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=None))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity of the cache, tokens")
    axes.set_ylabel("prompt tokens hit, %")
    names = ", ".join(Path(trace).name for trace in replay.traces[:3])
    more = f" and {len(replay.traces) - 3} more" if len(replay.traces) > 3 else ""
    axes.set_title(
        f"{names}{more}\n{replay.requests:,} requests, blocks of {replay.settings.block_size}"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)
