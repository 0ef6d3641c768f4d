"""The capacity curve: what each policy hits, against what was possible."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, NullLocator

from prefixtree.replay.report import Replay

MARKERS = "osD^vPX*<>hd"
LARGEST_MARKER = 13


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
        axes.plot(
            capacities,
            rates,
            linewidth=1,
            # Hollow and one inside the other, so that curves that coincide are all seen.
            marker=MARKERS[number % len(MARKERS)],
            markersize=max(LARGEST_MARKER - 1.5 * number, 3),
            markerfacecolor="none",
            label=policy,
        )
    axes.set_xscale("log")
    axes.set_xticks(capacities)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter([_short(capacity) for capacity in capacities]))
    axes.tick_params(axis="x", labelrotation=30)
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


def _short(count: int) -> str:
    """The count in three digits: 950, 12.5k, 3M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
