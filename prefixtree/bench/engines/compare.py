"""Runs of an engine, stock and with ours in turn, and what they amount to."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from prefixtree.bench.engines import report
from prefixtree.bench.engines.drivers import ENGINES, require
from prefixtree.bench.engines.figures import compared, differing, figures_of, record
from prefixtree.bench.engines.job import Job, Run
from prefixtree.bench.engines.model import ModelSize
from prefixtree.bench.engines.serving import Setup
from prefixtree.bench.engines.workload import Workload
from prefixtree.bench.measure import in_turn
from prefixtree.bench.report import machine
from prefixtree.bench.usable import UnusableInput, require_writable, write_figures

POLL_S = 0.2
ROOT = Path(__file__).parents[3]


class EngineFailed(Exception):
    """A run of an engine ended with an error; the message has the end of what it said."""


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        parts: which of ours, "cache" and "attention".
        pool_tokens: room in the KV cache; None: for half of what is distinct, so that eviction
            matters, but enough for what runs at a time.
    """

    engine: str
    parts: frozenset[str]
    model: ModelSize
    pool_tokens: int | None
    step_tokens: int
    rounds: int
    threads: int
    clock: str


def compare(
    options: Options,
    workload: Workload,
    name: str,
    *,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> bool:
    """Measures and prints. Whether stock and ours gave the same tokens.

    Raises UnusableInput, or EngineFailed.
    """
    require_writable(json_file, plot_file)
    version = require(options.engine, options.parts)
    setup, turns = _setup(options, workload), len(workload.turns)
    stock, ours = _all_runs(options, setup, workload)
    facts = {
        "engine": options.engine,
        "engine_version": version,
        "torch": _torch_version(),
        "workload": name,
        **_facts(options, setup, workload),
    }
    result = compared([figures_of(run) for run in stock], [figures_of(run) for run in ours])
    wrong = [differing(a, b) for a, b in zip(stock, ours, strict=True)]
    print(report.heading(facts), report.table(result), sep="\n")
    print(report.agreement(wrong, turns))
    write_figures(
        json_file,
        {
            **facts,
            "figures": {key: {**one._asdict(), "ratio": one.ratio} for key, one in result.items()},
            "differing": wrong,
            "stock": [record(run) for run in stock],
            "ours": [record(run) for run in ours],
        },
    )
    if plot_file is not None:
        report.plot(result, f"{options.engine} {version}\n{name}", plot_file)
    return not any(wrong)


def _all_runs(
    options: Options, setup: dict[str, Any], workload: Workload
) -> tuple[list[Run], list[Run]]:
    """Of stock and of ours; who is first changes from round to round."""
    runs: dict[str, list[Run]] = {"stock": [], "ours": []}
    setup_with = partial(Setup, **setup)
    kinds = [("stock", frozenset[str]()), ("ours", options.parts)]
    total = len(workload.turns) * 2 * options.rounds
    with tqdm(total=total, unit=" requests", leave=False) as bar:
        for number in range(options.rounds):
            for label, parts in in_turn(kinds, number):
                bar.set_description(f"round {number + 1}, {label}")
                setup_of_this = partial(setup_with, parts=parts)
                runs[label].append(_run(options, setup_of_this, workload, bar))
    return runs["stock"], runs["ours"]


def _facts(options: Options, setup: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """What the figures depend on, beside the engine."""
    of_setup = ("pool_tokens", "page", "longest", "concurrency", "step_tokens", "clock")
    return {
        **machine(),
        **options.model._asdict(),
        **{key: setup[key] for key in of_setup},
        "parts": sorted(options.parts, reverse=True),
        "threads": options.threads,
        "rounds": options.rounds,
        "requests": len(workload.turns),
        "prompt_tokens": sum(turn.prompt for turn in workload.turns),
        "distinct": workload.distinct,
    }


def _setup(options: Options, workload: Workload) -> dict[str, Any]:
    """What stock and ours have in common."""
    page, longest = ENGINES[options.engine].page, workload.longest
    room = (-(-longest // page) + 1) * page  # a block more: engines look a token ahead
    pool = options.pool_tokens
    if pool is None:
        # What runs at a time has room, whether it shares much or nothing.
        all_shared = workload.distinct * 5 // 4 + workload.concurrency * 3 * page
        pool = max(workload.distinct // 2, min(workload.concurrency * room, all_shared))
    elif pool < room:
        raise UnusableInput(f"a pool of {pool} tokens: the longest sequence needs {room}")
    return {
        "model": options.model,
        "pool_tokens": -(-pool // page) * page,
        "page": page,
        "longest": longest,
        "concurrency": workload.concurrency,
        "step_tokens": options.step_tokens,
        "clock": options.clock,
    }


def _run(
    options: Options, setup_with: Callable[..., Setup], workload: Workload, bar: tqdm[Any]
) -> Run:
    """One run in a process of its own, gone with all that it has started when this returns."""
    with TemporaryDirectory(prefix="prefixtree-bench-") as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        setup = setup_with(steps=folder / "steps", folder=work)
        (folder / "job").write_bytes(pickle.dumps(Job(options.engine, setup, workload)))
        (folder / "progress").touch()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": str(options.threads),
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefixtree.bench.engines.worker", name],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            seen = 0
            try:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_S)
                    answered = (folder / "progress").stat().st_size
                    if answered > seen:
                        bar.update(answered - seen)
                        seen = answered
                    if process.returncode is not None:
                        break
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not (folder / "run").exists():
            said = (folder / "log").read_text(errors="replace")[-4000:]
            raise EngineFailed(f"{options.engine} ended with {process.returncode}:\n{said}")
        run: Run = pickle.loads((folder / "run").read_bytes())
        return run


def _torch_version() -> str:
    import torch

    return torch.__version__
