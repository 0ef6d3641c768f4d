"""What runs amount to: some figures of each, and their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from prefixtree.bench.engines.job import Run
from prefixtree.bench.engines.serving import Answer
from prefixtree.bench.engines.watch import Step

UNITS = {
    "prefix-hit tokens": "",
    "prompt tokens computed": "",
    "TTFT, median": "ms",
    "TTFT, 90th percentile": "ms",
    "scheduler, mean a step": "us",
    "scheduler, median a step": "us",
    "decode attention, median a step": "ms",
    "decode attention, mean a step": "ms",
    "steps": "",
    "all requests": "s",
}


def figures_of(run: Run) -> dict[str, float]:
    """By the names of UNITS, in those units.

    TTFT is from the submission of a request to its first token. Attention is of steps in which
    every sequence has one query, all layers together; a step without a layer of it has none.
    """
    first = [1e3 * answer.first_s for answer in run.answers]
    columns = dict(zip(Step._fields, run.steps.T, strict=True))
    scheduler = columns["scheduler"] / 1e3
    decoding = columns["attention"][columns["decoding"] == 1] / 1e6
    values = (
        sum(answer.cached for answer in run.answers),
        sum(answer.prompt - answer.cached for answer in run.answers),
        median(first),
        np.percentile(first, 90),
        scheduler.mean(),
        np.median(scheduler),
        np.median(decoding) if len(decoding) else 0,
        decoding.mean() if len(decoding) else 0,
        len(run.steps),
        run.seconds,
    )
    return {name: float(value) for name, value in zip(UNITS, values, strict=True)}


class Compared(NamedTuple):
    """Medians over the rounds, and ours over stock's round by round."""

    stock: float
    ours: float
    ratios: list[float]

    @property
    def ratio(self) -> float | None:
        """The median; None where stock has 0."""
        return median(self.ratios) if self.ratios else None


def compared(
    stock: Sequence[dict[str, float]], ours: Sequence[dict[str, float]]
) -> dict[str, Compared]:
    """By the names of UNITS."""
    result = {}
    for name in UNITS:
        theirs, mine = [one[name] for one in stock], [one[name] for one in ours]
        ratios = [m / t for t, m in zip(theirs, mine, strict=True) if t]
        result[name] = Compared(median(theirs), median(mine), ratios)
    return result


def differing(stock: Run, ours: Run) -> list[str]:
    """The requests that were not answered with the same tokens."""
    theirs = _tokens(stock.answers)
    return [name for name, tokens in _tokens(ours.answers).items() if theirs.get(name) != tokens]


def _tokens(answers: Sequence[Answer]) -> dict[str, list[int]]:
    return {answer.request: answer.tokens for answer in answers}


def record(run: Run) -> dict[str, Any]:
    """For a JSON file: the figures, and what they are of."""
    return {
        **figures_of(run),
        "answers": [answer._asdict() for answer in run.answers],
    }
