"""The comparison of two runs of an engine as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixtree.bench.engines.figures import UNITS, Compared
from prefixtree.bench.report import aligned


def heading(facts: dict[str, Any]) -> str:
    return (
        f"{facts['engine']} {facts['engine_version']}, torch {facts['torch']}, "
        f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}; ours: "
        f"{' and '.join(facts['parts'])}. {facts['layers']} layers, hidden size "
        f"{facts['hidden']}, heads {facts['num_q_heads']}/{facts['num_kv_heads']} of "
        f"{facts['head_dim']}, float32, random weights.\n"
        f"{facts['workload']}: {facts['requests']:,} requests, {facts['concurrency']} at a time, "
        f"{facts['prompt_tokens']:,} prompt tokens, the longest sequence {facts['longest']:,}; "
        f"{facts['distinct']:,} distinct tokens, room for {facts['pool_tokens']:,} in blocks of "
        f"{facts['page']}.\n"
        f"Medians of {facts['rounds']} rounds, {facts['clock']} time; ratios are the rounds' own."
    )


def table(compared: dict[str, Compared]) -> str:
    """A line for each figure: stock, ours, and the median, least and most of the ratios."""
    lines = [["", "stock", "ours", "ours / stock", "from", "to"]]
    for name, one in compared.items():
        ratios = [one.ratio, min(one.ratios, default=None), max(one.ratios, default=None)]
        lines.append(
            [
                name,
                _figure(one.stock, UNITS[name]),
                _figure(one.ours, UNITS[name]),
                *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            ]
        )
    return aligned(lines)


def agreement(differing: list[list[str]], requests: int) -> str:
    """Whether stock and ours gave the same tokens; which requests did not, by round."""
    wrong = sum(map(len, differing))
    if not wrong:
        return f"tokens: the same in all {requests:,} requests of each round"
    named = ", ".join(dict.fromkeys(name for names in differing for name in names))
    return (
        f"TOKENS DIFFER in {wrong:,} of {requests * len(differing):,} requests: {named:.200} "
        "(phase.session.turn; what follows a turn that differs has another prompt)"
    )


def plot(compared: dict[str, Compared], title: str, file: Path) -> None:
    """Ours over stock, a bar a figure with the range of the rounds."""
    from matplotlib.figure import Figure

    known = {name: one for name, one in compared.items() if one.ratio is not None}
    names = list(known)[::-1]
    ratios = [known[name].ratio or 0.0 for name in names]
    below = [r - min(known[name].ratios) for name, r in zip(names, ratios, strict=True)]
    above = [max(known[name].ratios) - r for name, r in zip(names, ratios, strict=True)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, ratios, xerr=[below, above], capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="ours / stock", title=title)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=120)


def _figure(value: float, unit: str) -> str:
    if not unit:
        return f"{value:,.0f}"
    digits = 0 if value >= 1000 else 1 if value >= 10 else 3
    return f"{value:,.{digits}f} {unit}"
