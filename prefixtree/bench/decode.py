"""The benchmark of whole decode steps: cache, plan and model, against batch and prefix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import attention
from allocator import KVStorage
from prefixtree.bench import decode_report, report
from prefixtree.bench.attention_report import setting
from prefixtree.bench.decoder import MODELS, Decoder, ModelShape
from prefixtree.bench.measure import Rounds, in_turn
from prefixtree.bench.trees import unshared
from prefixtree.bench.usable import UnusableInput, require_writable, write_figures
from prefixtree.cache import PrefixCache
from prefixtree.columns import Int64s
from prefixtree.sequence import Sequence as Running

BLOCK_SIZE = 16
WARM_UP = 2
MODES = ("prefixtree", "not shared", "no attention")
MEMORY_SHARE = 0.9
"""Of what is free: the rest is for what a step computes."""
RESERVE = 16
"""Steps that a plan advances before the next one is made: more, and tails would weigh in runs."""


class Scenario(NamedTuple):
    """Samples of problems behind one few-shot prompt, all decoded in one batch.

    Attributes:
        few_shot: tokens that all sequences begin with.
        problem: tokens that follow, of each problem.
        problems, samples: how many problems, and samples of each.
        shares_problem: a problem's samples share its KV; else each sample has it for itself.
    """

    few_shot: int
    problem: int = 0
    problems: int = 1
    samples: int = 1
    shares_problem: bool = True

    @property
    def batch(self) -> int:
        return self.problems * self.samples

    def blocks(self, steps: int) -> int:
        """Blocks for all of it and so many new tokens a sequence."""
        copies = self.problems if self.shares_problem else self.batch
        behind = -(-self.problem // BLOCK_SIZE) + 1
        new = -(-steps // BLOCK_SIZE) + 1
        return -(-self.few_shot // BLOCK_SIZE) + 1 + copies * behind + self.batch * new


class Point(NamedTuple):
    """One scenario of an experiment.

    Attributes:
        experiment: what it belongs to.
        label: where it stands there.
        scenario: what is decoded.
        modes: which of `MODES` are measured.
    """

    experiment: str
    label: str
    scenario: Scenario
    modes: Sequence[str] = MODES


class Throughput(NamedTuple):
    """What was measured of one point: tokens a second by mode, or why nothing was."""

    point: Point
    tokens_per_s: dict[str, float]
    steps: int
    missing: str | None

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        point = self.point
        return {
            "experiment": point.experiment,
            "label": point.label,
            **point.scenario._asdict(),
            "batch": point.scenario.batch,
            "tokens_per_s": self.tokens_per_s,
            "steps": self.steps,
            "missing": self.missing,
        }


class Sizes(NamedTuple):
    """How large the experiments are.

    Attributes:
        batches: to decode at a prefix of `prefix` tokens.
        prefix: see `batches`.
        prefixes: to decode at, by the largest batch.
        few_shot, problem, problems, samples: of the competitive-programming shape.
    """

    batches: Sequence[int]
    prefix: int
    prefixes: Sequence[int]
    few_shot: int
    problem: int
    problems: int
    samples: int


SIZES = {
    "cpu": Sizes((1, 4, 16, 32), 1024, (256, 1024, 4096), 2400, 400, 4, 8),
    "cuda": Sizes(
        (32, 64, 128, 256, 512, 1024), 2048, (1024, 2048, 4096, 8192, 16_256), 2400, 400, 8, 128
    ),
}
"""By device: a CPU's few minutes; Hydragen's figures (arXiv 2402.05099)."""


def points_of(sizes: Sizes) -> list[Point]:
    """Against the batch, against the prefix, and one against two levels of sharing."""
    points = [
        Point("batch", f"{batch}", Scenario(sizes.prefix, samples=batch)) for batch in sizes.batches
    ]
    largest = max(sizes.batches)
    points += [
        Point("prefix", f"{prefix}", Scenario(prefix, samples=largest)) for prefix in sizes.prefixes
    ]
    two = Scenario(sizes.few_shot, sizes.problem, sizes.problems, sizes.samples)
    one = two._replace(shares_problem=False)
    points.append(Point("levels", "one", one, MODES[:1]))
    points.append(Point("levels", "two", two))
    return points


class Setup:
    """A model and storage for the largest of the scenarios that fit."""

    def __init__(
        self,
        model: Decoder,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None = None,
    ) -> None:
        shape = model.shape
        self.model, self.device, self.dtype = model, device, dtype
        self.backend = backend
        # That backend makes every plan anew.
        self.reserve = 0 if backend == "reference" else RESERVE
        self.storage = KVStorage(
            shape.layers,
            num_blocks,
            BLOCK_SIZE,
            shape.num_kv_heads,
            shape.head_dim,
            dtype=dtype,
            device=device,
        )
        # The prompts are not computed: only decoding is measured.
        for tensor in (*self.storage.k, *self.storage.v):
            tensor.normal_()

    def plan(self, forest: attention.Forest) -> attention.Plan:
        shape = self.model.shape
        return attention.plan(
            forest,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
            reserve=self.reserve,
        )


class Decoding:
    """One scenario being decoded in one mode, with a cache of its own.

    Several may take turns on one storage: they write over each other's KV, of which only the amount
    matters.
    """

    def __init__(self, setup: Setup, scenario: Scenario, mode: str) -> None:
        self.setup, self.mode = setup, mode
        self.cache = PrefixCache(setup.storage.num_blocks, BLOCK_SIZE)
        self.batch = self.cache.batch(open_all(self.cache, scenario))
        prompt = torch.full((scenario.batch,), scenario.few_shot + scenario.problem)
        self.positions = prompt.to(setup.device)
        # Different first tokens: whoever went on alike would be one sequence to the cache.
        self.tokens = np.arange(scenario.batch, dtype=np.int32) % setup.model.shape.vocab
        self._plan: attention.Plan | None = None
        self._advances_left = 0

    def step(self) -> None:
        """Slots, plan, model, next tokens, commit."""
        setup, storage = self.setup, self.setup.storage
        appended = self.cache.append(self.batch, self.tokens)
        slots = torch.from_numpy(appended).to(setup.device)
        plan = None if self.mode == "no attention" else self._planned(appended)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            storage.write(layer, slots, k, v)
            if plan is None:
                return q
            return attention.run(plan, q, storage.k[layer], storage.v[layer])[0]

        tokens = torch.from_numpy(self.tokens).to(setup.device)
        following = setup.model.step(tokens, self.positions, attend)
        self.cache.commit(self.batch)
        self.positions += 1
        # Waits for the device: the next step needs the tokens.
        self.tokens = following.to("cpu", torch.int32).numpy()

    def _planned(self, slots: Int64s) -> attention.Plan:
        """The last plan, advanced to the new tokens' slots as long as it goes, or a new one."""
        if self._plan is None or self._advances_left == 0:
            self._plan, self._advances_left = self.setup.plan(self._forest()), self.setup.reserve
        else:
            self._plan.advance(slots)
            self._advances_left -= 1
        return self._plan

    def _forest(self) -> attention.Forest:
        forest = attention.Forest(**vars(self.cache.forest(self.batch)))
        return unshared(forest) if self.mode == "not shared" else forest


def median_seconds(
    setup: Setup, scenario: Scenario, modes: Sequence[str], rounds: Rounds
) -> tuple[dict[str, float], int]:
    """Of a step in each mode, the modes in turn; and how many steps each took."""
    running = {mode: Decoding(setup, scenario, mode) for mode in modes}
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    for decoding in running.values():
        for _ in range(WARM_UP):
            decoding.step()
    for number in rounds:
        for mode in in_turn(modes, number):
            began = rounds.clock()
            running[mode].step()
            taken[mode].append((rounds.clock() - began) / 1e9)
    return {mode: median(seconds) for mode, seconds in taken.items()}, len(taken[modes[0]])


def open_all(cache: PrefixCache, scenario: Scenario) -> list[Running]:
    """The scenario's sequences, problem by problem, their prompts committed."""
    rng = np.random.default_rng(0)
    few_shot = rng.integers(0, 2**31 - 1, scenario.few_shot, np.int32)
    sequences: list[Running] = []
    copies = 1 if scenario.shares_problem else scenario.samples
    for _ in range(scenario.problems * copies):
        problem = rng.integers(0, 2**31 - 1, scenario.problem, np.int32)
        first = cache.open(np.concatenate([few_shot, problem]))
        first.commit(len(first))
        forks = scenario.samples // copies - 1
        sequences += [first, *(first.fork(forks) if forks else [])]
    return sequences


def measure_decode(
    model_name: str,
    points: Sequence[Point],
    *,
    rounds: Rounds,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    clock_name: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measures every point, prints a table, writes the files asked for.

    Raises UnusableInput for files that cannot be written and for a model that does not fit.
    """
    require_writable(json_file, plot_file)
    shape = MODELS[model_name]
    steps = rounds.most + WARM_UP
    room = _room(shape, dtype, device)
    fitting = [point for point in points if point.scenario.blocks(steps) <= room]
    if not fitting:
        raise UnusableInput(
            f"--model {model_name}: memory for {room} blocks of KV, the smallest scenario needs "
            f"{min(point.scenario.blocks(steps) for point in points)}"
        )
    facts = setting(device, dtype) | {"model": model_name, **shape._asdict()}
    print(decode_report.heading(facts, clock_name), flush=True)
    num_blocks = max(point.scenario.blocks(steps) for point in fitting)
    setup = Setup(Decoder(shape, dtype, device), num_blocks, dtype, device, backend)
    measured = []
    for point in tqdm(points, unit=" points", leave=False):
        needed = point.scenario.blocks(steps)
        if needed > room:
            missing = f"{needed} blocks of KV needed, memory for {room}"
            measured.append(Throughput(point, {}, 0, missing))
            continue
        seconds, taken = median_seconds(setup, point.scenario, point.modes, rounds)
        rates = {mode: point.scenario.batch / each for mode, each in seconds.items()}
        measured.append(Throughput(point, rates, taken, None))
    print(decode_report.table(measured))
    records = [one.record() for one in measured]
    write_figures(json_file, {**report.machine(), **facts, "points": records})
    if plot_file is not None:
        decode_report.plot(measured, plot_file)


def _room(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> int:
    """Blocks of KV that fit beside the weights."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = MEMORY_SHARE * free - shape.parameters * dtype.itemsize
    return max(0, int(left // (shape.token_bytes(dtype.itemsize) * BLOCK_SIZE)))
