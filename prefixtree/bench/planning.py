"""What the host does for attention between two steps of an engine, timed: plans and their parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import attention
from attention.backends import device_lacks
from attention.forest import ForestArrays
from attention.problem import Problem
from attention.segments import segments_of
from attention.torch_backend import TorchWork
from attention.triton_backend.planner import make_plan
from attention.triton_backend.work import shape_of
from prefixtree.bench import attention_report
from prefixtree.bench.measure import Rounds, in_turn
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


class Taken(NamedTuple):
    """Microseconds of one step on one forest, each time that it was taken."""

    step: str
    forest: str
    times: list[float]

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "step": self.step,
            "forest": self.forest,
            "median_us": median(self.times),
            "least_us": min(self.times),
            "rounds": len(self.times),
        }


def measure_planning(
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: Rounds,
    clock_name: str,
    json_file: Path | None,
) -> list[Taken]:
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
    taken: list[Taken] = []
    for name, tree in tqdm(TREES.items(), unit=" forests", leave=False):
        forest, _ = forest_of(tree, block_size=BLOCK_SIZE)
        taken += measure_forest(name, forest, device, dtype, rounds)
    print(table(taken))
    planned = {
        "clock": clock_name,
        "block_size": BLOCK_SIZE,
        "heads": [Q_HEADS, KV_HEADS],
        "head_dim": HEAD_DIM,
        "reserve": RESERVE,
    }
    steps = [one.record() for one in taken]
    write_figures(json_file, {**machine(), **setting, **planned, "steps": steps})
    return taken


def measure_forest(
    name: str, forest: ForestArrays, device: torch.device, dtype: torch.dtype, rounds: Rounds
) -> list[Taken]:
    """The steps of every backend there is, in turn."""
    backends = ["torch"]
    if device_lacks(device) is None:
        backends.append("triton")
    kinds: list[Parts | Plans] = [
        Parts(forest, device, dtype),
        *(Plans(forest, device, dtype, b) for b in backends),
    ]
    for kind in kinds:  # what is called for the first time takes longer
        for _, call in kind.steps():
            call()
    times: defaultdict[str, list[float]] = defaultdict(list)
    for number in rounds:
        for kind in in_turn(kinds, number):
            for step, call in kind.steps():
                begin = rounds.clock()
                call()
                times[step].append((rounds.clock() - begin) / 1000)
    return [Taken(step, name, all_times) for step, all_times in times.items()]


class Parts:
    """From the forest's arrays to work items, without the tensors that are made of them."""

    def __init__(self, forest: ForestArrays, device: torch.device, dtype: torch.dtype) -> None:
        self._forest, self._segments = forest, segments_of(forest)
        self._problem = Problem(
            num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            value_head_dim=HEAD_DIM,
            dtype=dtype,
            kv_dtype=dtype,
            device=device,
            layout="NHD",
            window=None,
            sink_tokens=0,
            batch_invariant=False,
        )

    def steps(self) -> Iterator[Step]:
        """Those of one round."""
        problem, segments = self._problem, self._segments
        yield "order and segments", partial(segments_of, self._forest)
        yield "torch: batches of segments", partial(TorchWork, problem, segments, RESERVE)
        shape = shape_of(problem)
        yield "triton: units of segments", partial(make_plan, problem, segments, shape, RESERVE)


class Plans:
    """Whole plans of a backend: made, made anew in place, and advanced by a token."""

    def __init__(
        self, forest: ForestArrays, device: torch.device, dtype: torch.dtype, backend: str
    ) -> None:
        self._forest, self._backend = forest, backend
        self._make = partial(
            attention.plan,
            forest,
            num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=device,
            reserve=RESERVE,
            backend=backend,
        )
        self._plan = self._make()
        behind = (int(forest.blocks.max()) + 1) * forest.block_size
        self._slots = behind + RESERVE * np.arange(len(forest.leaf))

    def steps(self) -> Iterator[Step]:
        """Those of one round."""
        yield f"{self._backend}: plan", self._make
        yield f"{self._backend}: plan in place", partial(self._plan.update, self._forest)
        for number, which in enumerate(("first advance", "advance")):
            slots = self._slots + number
            yield f"{self._backend}: {which}", partial(self._plan.advance, slots)


def table(taken: list[Taken]) -> str:
    """A line for each step, a column for each forest."""
    forests = list(dict.fromkeys(one.forest for one in taken))
    cells = {
        (one.step, one.forest): f"{median(one.times):,.0f} ({min(one.times):,.0f})" for one in taken
    }
    steps = dict.fromkeys(one.step for one in taken)
    rows = [[step, *(cells[step, forest] for forest in forests)] for step in steps]
    return aligned([["", *forests], *rows])
