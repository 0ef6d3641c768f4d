"""What the host does for attention between two steps of an engine, timed: plans and their parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import attention
from attention.backends import device_lacks
from attention.forest import ForestArrays
from attention.plan import Plan
from attention.problem import Problem
from attention.segments import segments_of
from attention.torch_backend import TorchWork
from prefixtree.bench import attention_report
from prefixtree.bench.measure import Rounds, Timings, in_turn
from prefixtree.bench.report import aligned, machine
from prefixtree.bench.trees import forest_of, level_tree
from prefixtree.bench.usable import require_writable, write_figures

BLOCK_SIZE = 16
RESERVE = 64
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TREES = {
    "1,024 on 6 levels": level_tree([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256]),
    "1,024 on one prompt": level_tree([1, 1024], [2048, 32]),
    "1,024 alone": level_tree([1024], [512]),
    "32 on one prompt": level_tree([1, 32], [2048, 64]),
}

Step = tuple[str, Callable[[], object]]
Summaries = dict[str, dict[str, dict[str, float]]]
"""Step, forest, and then what `Timings.summary` says."""


def measure_planning(
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: Rounds,
    clock_name: str,
    json_file: Path | None,
) -> Summaries:
    """Measures every step on every forest, prints a table, writes the file asked for.

    Raises UnusableInput for a file that cannot be written.
    """
    require_writable(json_file)
    setting = attention_report.setting(device, dtype)
    print(
        f"{setting['device']}, {setting['dtype']}, torch {setting['torch']}. Microseconds of the "
        f"host ({clock_name} time), median and least; steps in turn; heads "
        f"{Q_HEADS}/{KV_HEADS}, d {HEAD_DIM}, {RESERVE} tokens in reserve.",
        flush=True,
    )
    timings, steps = Timings(rounds.clock), dict[str, None]()
    for name, tree in tqdm(TREES.items(), unit=" forests", leave=False):
        forest, _ = forest_of(tree, block_size=BLOCK_SIZE)
        kinds = steps_for(forest, device, dtype)
        for step, call in chain.from_iterable(kinds):
            steps[step] = None
            call()  # the first time takes longer
        for number in rounds:
            for step, call in chain.from_iterable(in_turn(kinds, number)):
                timings.time(step, name, call)
    summaries = {step: timings.summary(step) for step in steps}
    print(table(summaries))
    planned = {
        "clock": clock_name,
        "block_size": BLOCK_SIZE,
        "heads": [Q_HEADS, KV_HEADS],
        "head_dim": HEAD_DIM,
        "reserve": RESERVE,
    }
    write_figures(json_file, {**machine(), **setting, **planned, "steps": summaries})
    return summaries


def steps_for(forest: ForestArrays, device: torch.device, dtype: torch.dtype) -> list[list[Step]]:
    """The parts of plans, and whole ones of each backend there is."""
    make = partial(
        attention.plan,
        forest,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
        reserve=RESERVE,
    )
    backends = ["torch"] + (["triton"] if device_lacks(device) is None else [])
    plans = [plan_steps(forest, backend, partial(make, backend=backend)) for backend in backends]
    return [part_steps(forest, make(backend="torch").problem), *plans]


def part_steps(forest: ForestArrays, problem: Problem) -> list[Step]:
    """From the forest's arrays to work items, without the tensors that are made of them."""
    segments = segments_of(forest)
    steps: list[Step] = [
        ("order and segments", partial(segments_of, forest)),
        ("torch: batches of segments", partial(TorchWork, problem, segments, RESERVE)),
    ]
    if find_spec("triton") is not None:
        from attention.triton_backend.planner import make_plan
        from attention.triton_backend.work import shape_of

        units = partial(make_plan, problem, segments, shape_of(problem), RESERVE)
        steps.append(("triton: units of segments", units))
    return steps


def plan_steps(forest: ForestArrays, backend: str, make: Callable[[], Plan]) -> list[Step]:
    """A whole plan: made, made anew in place, and then advanced by a token, twice."""
    plan = make()
    behind = (int(forest.blocks.max()) + 1) * forest.block_size
    slots = behind + RESERVE * np.arange(len(forest.leaf))
    return [
        (f"{backend}: plan", make),
        (f"{backend}: plan in place", partial(plan.update, forest)),
        (f"{backend}: first advance", partial(plan.advance, slots)),
        (f"{backend}: advance", partial(plan.advance, slots + 1)),
    ]


def table(summaries: Summaries) -> str:
    """A line for each step, a column for each forest."""
    forests = list(next(iter(summaries.values())))
    lines = [["", *forests]]
    lines += [
        [step, *(f"{one['median_us']:,.0f} ({one['least_us']:,.0f})" for one in of.values())]
        for step, of in summaries.items()
    ]
    return aligned(lines)
