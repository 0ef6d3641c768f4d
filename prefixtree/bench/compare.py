"""One shape, computed by every contender in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import exp, log
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from prefixtree.bench.clocks import Ceilings, Run, TensorClock
from prefixtree.bench.contenders import (
    Contender,
    FlashPerLevel,
    Ours,
    OursUnshared,
    SdpaPadded,
    SdpaPerSequence,
    Unavailable,
)
from prefixtree.bench.flash_infer import FlashInferCascade, FlashInferDecode
from prefixtree.bench.flex import Allowance, Flex
from prefixtree.bench.inputs import Inputs, exact_sample, make_inputs
from prefixtree.bench.measure import Rounds, in_turn
from prefixtree.bench.shapes import Shape

Makers = Mapping[str, Callable[[Inputs], Contender]]
PLANS_TIMED = 5


class Result(NamedTuple):
    """What was measured of one contender.

    Attributes:
        ms: median of one run.
        plan_us: median of one plan, None where there is nothing to plan.
        error: largest difference from float64 over a sample of sequences.
        captured: it was timed as a captured graph.
    """

    ms: float
    plan_us: float | None
    error: float
    captured: bool


class Measured(NamedTuple):
    """What was measured on one shape.

    Attributes:
        kv_bytes, path_bytes: bytes of K and V, each token once; and once for every path.
        flops: floating-point operations.
        rounds: how often each contender ran.
        results: by contender; ours are the first, when they are there.
        missing: by contender why it has no result.
        explained: what our plan says of its work, the seconds that its costs predict included.
    """

    shape: Shape
    kv_bytes: int
    path_bytes: int
    flops: int
    rounds: int
    results: dict[str, Result]
    missing: dict[str, str]
    explained: dict[str, Any]

    @property
    def failed(self) -> bool:
        """One of ours has no result."""
        return Ours.name in self.missing or OursUnshared.name in self.missing

    @property
    def best_other(self) -> str | None:
        """The fastest that is not ours."""
        others = [name for name in self.results if name not in (Ours.name, OursUnshared.name)]
        return min(others, key=lambda name: self.results[name].ms, default=None)

    def ratio(self, name: str | None) -> float | None:
        """Our time over that of `name`; None where one of them is missing."""
        if name not in self.results or Ours.name not in self.results:
            return None
        return self.results[Ours.name].ms / self.results[name].ms

    def record(self, ceilings: Ceilings) -> dict[str, Any]:
        """The same for a JSON file, with rates and the time that the ceilings allow."""
        shape = self.shape
        results = {
            name: {
                **result._asdict(),
                "gbytes_per_s": self.kv_bytes / result.ms / 1e6,
                "gflops_per_s": self.flops / result.ms / 1e6,
            }
            for name, result in self.results.items()
        }
        return {
            "suite": shape.suite,
            "name": shape.name,
            "num_q_heads": shape.num_q_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "block_size": shape.block_size,
            "sequences": len(shape.tree.leaf),
            "kv_bytes": self.kv_bytes,
            "path_bytes": self.path_bytes,
            "flops": self.flops,
            "floor_ms": ceilings.floor_ms(self.kv_bytes, self.flops),
            "rounds": self.rounds,
            "contenders": results,
            "missing": self.missing,
            "explained": self.explained,
            "best_other": self.best_other,
            "ratio": self.ratio(self.best_other),
        }


def makers_for(device: torch.device, flex_seconds: float, backend: str | None = None) -> Makers:
    """Every contender that may run on the device, ours (by this backend) first."""
    allowance = Allowance(flex_seconds)

    def flex(inputs: Inputs) -> Contender:
        return Flex(inputs, allowance)

    kinds: list[type[Contender]] = [SdpaPerSequence, SdpaPadded, FlashPerLevel]
    if device.type == "cuda":
        kinds += [FlashInferDecode, FlashInferCascade]
    ours = {kind.name: partial(kind, backend=backend) for kind in (Ours, OursUnshared)}
    return {**ours, **{kind.name: kind for kind in kinds}, Flex.name: flex}


def measure_shape(
    shape: Shape, makers: Makers, clock: TensorClock, rounds: Rounds, inputs: Inputs
) -> Measured:
    """Runs all contenders in turn, round after round; what one of them raises is noted."""
    exact = exact_sample(inputs)
    contenders: dict[str, Contender] = {}
    runs: dict[str, tuple[Run, bool]] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contender = make(inputs)
            errors[name] = exact.error(contender.run())
            runs[name] = clock.ready(contender.run)
            contenders[name] = contender
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    number = 0
    for number in rounds if contenders else ():
        for name in in_turn(list(contenders), number):
            taken[name].append(clock.time(runs[name][0]))
    itemsize = inputs.dtype.itemsize
    ours = contenders.get(Ours.name)
    tokens, explained = int(shape.tree.length.sum()), {}
    if isinstance(ours, Ours):
        tokens = ours.planned.kv_tokens_read
        explained = ours.planned.explain().work._asdict()
    return Measured(
        shape=shape,
        kv_bytes=2 * shape.num_kv_heads * shape.head_dim * itemsize * tokens,
        path_bytes=shape.path_bytes(itemsize),
        flops=shape.flops,
        rounds=number + 1,
        results={
            name: Result(median(times), _plan_us(contenders[name]), errors[name], runs[name][1])
            for name, times in taken.items()
        },
        missing=missing,
        explained=explained,
    )


def measure_shapes(
    shapes: Iterable[Shape],
    makers: Makers,
    clock: TensorClock,
    rounds: Rounds,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Measured]:
    """Shape after shape, each with tensors of its own that are gone before the next one's."""
    for shape in shapes:
        yield measure_shape(shape, makers, clock, rounds, make_inputs(shape, dtype, device))


def geometric_means(measured: Sequence[Measured]) -> dict[str, float]:
    """By suite, and over all of them: our time over that of the best of the others."""
    ratios: dict[str, list[float]] = {}
    for one in measured:
        ratio = one.ratio(one.best_other)
        if ratio is not None:
            ratios.setdefault(one.shape.suite, []).append(log(ratio))
    every = [ratio for suite in ratios.values() for ratio in suite]
    if len(ratios) > 1:
        ratios["all"] = every
    return {suite: exp(mean(logs)) for suite, logs in ratios.items()}


def _plan_us(contender: Contender) -> float | None:
    if not contender.plans:
        return None
    taken = []
    for _ in range(PLANS_TIMED):
        began = perf_counter()
        contender.plan()
        taken.append((perf_counter() - began) * 1e6)
    return median(taken)
