"""What a worker is told, and what it tells: both cross processes as pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from prefixtree.bench.engines.serving import Answer, Setup
from prefixtree.bench.engines.workload import Workload
from prefixtree.columns import Int64s


@dataclass(frozen=True)
class Job:
    """What is to run: an engine by its name, set up so, and what is asked of it."""

    engine: str
    setup: Setup
    workload: Workload


class Run(NamedTuple):
    """What came out. steps: int64 [steps, fields of `watch.Step`]; seconds: from first to last."""

    answers: list[Answer]
    steps: Int64s
    seconds: float
