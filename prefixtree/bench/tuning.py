"""Tries tile shapes of the Triton kernels on this device, one kind of tile at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch

from prefixtree.bench.clocks import TensorClock
from prefixtree.bench.contenders import Ours
from prefixtree.bench.gpu import Deadline
from prefixtree.bench.inputs import exact_sample, make_inputs
from prefixtree.bench.report import aligned
from prefixtree.bench.shapes import Shape
from prefixtree.bench.trees import level_tree
from prefixtree.bench.usable import UnusableInput

BACKEND = "attention.triton_backend"
ROWS = {"lean": (16, 32), "fat": (32, 64, 128)}
TOKENS = (32, 64, 128)
WARPS = (4, 8)
STAGES = (2, 3, 4)
HEADS = ((32, 8, 128), (8, 1, 128), (32, 32, 128), (32, 8, 64), (16, 2, 256))
"""Query heads, KV heads, head size."""
MOST_ERROR = 0.1


class Candidate(NamedTuple):
    """A tile to try on a shape: rows, tokens, warps, stages."""

    kind: str
    shape: Shape
    sizes: tuple[int, int, int, int]


class Trial(NamedTuple):
    """A tile that was tried: median milliseconds, or why there are none."""

    kind: str
    shape: Shape
    tile: Any
    ms: float
    failed: str | None


def candidates() -> Iterator[Candidate]:
    """Every tile of either kind, for each heads on a tree that is nearly all that kind's work."""
    for q_heads, kv_heads, head_dim in HEADS:
        for kind, levels in (
            ("lean", ((128,), (1024,))),
            ("fat", ((4, 512), (4096, 16))),
        ):
            name = f"{q_heads}/{kv_heads}, head size {head_dim}"
            shape = Shape("tune", name, level_tree(*levels), q_heads, kv_heads, head_dim)
            for sizes in product(ROWS[kind], TOKENS, WARPS, STAGES):
                if sizes[0] >= q_heads // kv_heads:
                    yield Candidate(kind, shape, sizes)


def tune(
    tried: Sequence[Candidate],
    *,
    device: torch.device,
    dtype: torch.dtype,
    clock: TensorClock,
    backend: str,
    rounds: int,
    deadline: Deadline,
) -> list[Trial]:
    """Times ours with each tile, the other kinds as they are; a wrong result is a failure.

    Raises UnusableInput where there are no kernels.
    """
    try:
        tiles_module: Any = import_module(f"{BACKEND}.tiles")
    except ImportError as error:
        raise UnusableInput(f"--tune: no kernels to tune: {error}") from None
    trials = []
    last: Shape | None = None
    for kind, shape, sizes in deadline.until_passed(tried, "tiles"):
        if shape is not last:
            last, inputs = shape, make_inputs(shape, dtype, device)
            exact = exact_sample(inputs)
        group = shape.num_q_heads // shape.num_kv_heads
        tile = tiles_module.Tile(*sizes, rows_per_tile=sizes[0] // group)
        failed, ms = None, float("nan")
        try:
            with _tiles_of_kind(tiles_module, kind, tile):
                contender = Ours(inputs, backend=backend)
                off = exact.error(contender.run())
                if off < MOST_ERROR:
                    run, _ = clock.ready(contender.run)
                    ms = median(clock.time(run) for _ in range(rounds))
                else:
                    failed = f"error {off:.1e}"
        except Exception as error:
            # Too much shared memory, registers, rows that the heads do not fit in.
            failed = f"{type(error).__name__}: {error}"
        trials.append(Trial(kind, shape, tile, ms, failed))
    return trials


def best_tiles(trials: Sequence[Trial]) -> str:
    """The three best tiles of each kind and heads, and how many failed."""
    lines = [["", "kind", "tile", "ms"]]
    for key in dict.fromkeys((trial.shape.name, trial.kind) for trial in trials):
        mine = [trial for trial in trials if (trial.shape.name, trial.kind) == key]
        good = sorted((t for t in mine if t.failed is None), key=lambda trial: trial.ms)
        lines += [[*key, repr(trial.tile), f"{trial.ms:.4f}"] for trial in good[:3]]
        lines.append([*key, f"{len(mine) - len(good)} of {len(mine)} failed", ""])
    return aligned(lines)


def record(trial: Trial) -> dict[str, Any]:
    """For a JSON file."""
    return {
        "kind": trial.kind,
        "heads": trial.shape.name,
        "tile": trial.tile._asdict(),
        "ms": None if trial.failed else trial.ms,
        "failed": trial.failed,
    }


@contextmanager
def _tiles_of_kind(tiles_module: Any, kind: str, tile: Any) -> Iterator[None]:
    """All of the backend see `tile` as the one of its kind.

    The backend has no such option, as nobody else needs one: what it imported is replaced.
    """
    original = tiles_module.tiles_for

    def tiles_for(*arguments: Any, **named: Any) -> Any:
        return original(*arguments, **named)._replace(**{kind: tile})

    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith(BACKEND) and getattr(module, "tiles_for", None) is original
    ]
    for module in users:
        vars(module)["tiles_for"] = tiles_for
    try:
        yield
    finally:
        for module in users:
            vars(module)["tiles_for"] = original
