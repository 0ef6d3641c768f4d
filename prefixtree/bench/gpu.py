"""Everything to be known of a device in one run of bounded length: right, how fast, how near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan, nan
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

from prefixtree.bench import attention_report
from prefixtree.bench.attention import figures
from prefixtree.bench.checks import Outcome, check
from prefixtree.bench.clocks import Ceilings, TensorClock, measure_ceilings
from prefixtree.bench.compare import Makers, Measured, measure_shapes
from prefixtree.bench.measure import Rounds
from prefixtree.bench.shapes import Shape
from prefixtree.bench.usable import write_figures
from prefixtree.bench.variants import Variant

CHECKS_SHARE = 0.45
"""Of the time: what is left of it goes to the shapes."""
T = TypeVar("T")


class Deadline:
    """Ends loops when the time is up."""

    def __init__(self, seconds: float) -> None:
        self.end = monotonic() + seconds

    def until_passed(self, items: Sequence[T], what: str) -> Iterator[T]:
        """The items as long as there is time, shown on stderr."""
        for item in tqdm(items, unit=f" {what}", leave=False):
            if monotonic() >= self.end:
                return
            yield item


class Work(NamedTuple):
    """What a run is to do; where a list is empty, that part is left out.

    Attributes:
        variants: to check against float64.
        shapes: to time, in the order of their worth: those at the end may get no time.
        makers: the contenders.
        rounds: of each shape.
        seconds: for everything.
        seed: of the first variant's tensors; each has its own.
    """

    variants: Sequence[Variant]
    shapes: Sequence[Shape]
    makers: Makers
    rounds: Rounds
    seconds: float
    seed: int


def run_device(
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype,
    clock: TensorClock,
    backend: str | None,
    json_file: Path | None,
) -> bool:
    """Checks, measures the ceilings, times; prints a table last. Whether all went well.

    What was found until then is written even when something raises.
    """
    whole = Deadline(work.seconds)
    outcomes: list[Outcome] = []
    measured: list[Measured] = []
    ceilings: Ceilings | None = None
    try:
        checking = Deadline(work.seconds * (CHECKS_SHARE if work.shapes else 1.0))
        for place, variant in enumerate(checking.until_passed(work.variants, "variants")):
            outcomes.append(check(variant, device, backend, work.seed + 2 * place))
        if work.shapes:
            ceilings = measure_ceilings(device, dtype, clock)
        timed = whole.until_passed(work.shapes, "shapes")
        for one in measure_shapes(timed, work.makers, clock, work.rounds, dtype, device):
            measured.append(one)  # noqa: PERF402, what was measured before an error counts
    finally:
        found = figures(measured, ceilings, device, dtype) | {
            "seed": work.seed,
            "checks": [outcome.record() for outcome in outcomes],
            "variants_left": len(work.variants) - len(outcomes),
            "shapes_left": len(work.shapes) - len(measured),
        }
        write_figures(json_file, found)
        if work.variants:
            print(checks_summary(outcomes, len(work.variants)), flush=True)
        if ceilings is not None:
            in_order = sorted(measured, key=lambda one: (one.shape.suite, one.shape.name))
            print(shapes_summary(in_order, len(work.shapes), ceilings, device, dtype), flush=True)
    return not any(outcome.wrong for outcome in outcomes) and not any(
        one.failed for one in measured
    )


def checks_summary(outcomes: Sequence[Outcome], total: int) -> str:
    """How many are right, the largest error of each dtype, and all that is wrong."""
    right = sum(not outcome.wrong for outcome in outcomes)
    lines = [f"checked {len(outcomes)} of {total} variants: {right} right"]
    lines += [f"WRONG {o.variant.name}: {'; '.join(o.wrong):.300}" for o in outcomes if o.wrong]
    for dtype in dict.fromkeys(outcome.variant.dtype for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.variant.dtype == dtype]
        known = [outcome for outcome in mine if not isnan(outcome.error)]
        errors = max((outcome.error for outcome in known), default=nan)
        lse_errors = max((outcome.lse_error for outcome in known), default=nan)
        lines.append(f"{dtype}: largest error {errors:.1e}, of lse {lse_errors:.1e}")
    return "\n".join(lines)


def shapes_summary(
    measured: Sequence[Measured],
    total: int,
    ceilings: Ceilings,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The tables of `bench attention`, and how many shapes got no time."""
    lines = [attention_report.heading(device, dtype, ceilings)]
    if measured:
        lines += [attention_report.table(measured, ceilings), ""]
        lines.append(attention_report.summary(measured, ceilings))
    lines.append(f"timed {len(measured)} of {total} shapes in the time")
    return "\n".join(lines)


def every(items: Sequence[T], first: int, step: int) -> list[T]:
    """Item `first` (from 1) and every `step`-th behind it: one of `step` slices of all."""
    return list(items[first - 1 :: step])


def by_worth(shapes: Sequence[Shape]) -> list[Shape]:
    """One of each suite in turn, those of a suite far from each other first.

    Places in a suite are taken in bit-reversed order, as of van der Corput (1935).
    """
    suites: dict[str, list[Shape]] = {}
    for shape in shapes:
        suites.setdefault(shape.suite, []).append(shape)
    ranked = [
        (place, suite, shape)
        for suite, members in suites.items()
        for place, shape in enumerate(_spread(members))
    ]
    return [shape for _, _, shape in sorted(ranked, key=lambda ranking: ranking[:2])]


def _spread(members: list[Shape]) -> list[Shape]:
    bits = len(members).bit_length()
    return [
        members[place]
        for place in (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
        if place < len(members)
    ]
