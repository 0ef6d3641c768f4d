"""The options of `python -m prefixtree bench gpu`."""

import argparse
from pathlib import Path

from prefixtree.bench.attention_command import LIMITS_MB, add_device
from prefixtree.bench.usable import UnusableInput, require_writable, write_figures
from prefixtree.options import count, names, non_negative, seed

HELP = "a device in one run: every kernel checked, its ceilings, the shapes of attention timed"
DESCRIPTION = (
    "In one run of bounded length: checks every kind of attention kernel against float64 on fresh "
    "random tensors, measures what the device can do, and times the shapes of `bench attention`; "
    "what the time does not suffice for is left out and counted. Exit status 1 if a check fails or "
    "ours cannot run."
)
EXIT_WRONG = 1
QUICK_VARIANTS = 6
"""Every so many variants are checked in a quick run."""
SECONDS_A_SHAPE = 3.0
"""No more rounds of one shape after this long."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add_device(parser, "cuda")
    add(
        "--backend",
        choices=("torch", "triton", "reference"),
        help="what runs our plans (default: what is chosen without being told)",
    )
    add(
        "--parts",
        type=names,
        default=["checks", "shapes"],
        metavar="PARTS",
        help="which of checks, shapes (default: both)",
    )
    add(
        "--slice",
        type=one_of,
        default=(1, 1),
        metavar="I/N",
        help="only the I-th of N slices of variants and of shapes, to spread them over runs",
    )
    add("--shapes", type=names, metavar="SUITES", help="as of bench attention")
    add("--limit", type=non_negative, metavar="MB", help="as of bench attention")
    add(
        "--seconds",
        type=non_negative,
        default=520.0,
        metavar="S",
        help=f"for everything; the step in progress is finished {default}",
    )
    add(
        "--rounds",
        type=count,
        default=21,
        metavar="N",
        help=f"times that each shape is measured, at most; the median is reported {default}",
    )
    add(
        "--flex-seconds",
        type=non_negative,
        default=60.0,
        metavar="S",
        help=f"how long flex_attention may compile, all shapes together {default}",
    )
    add("--seed", type=seed, metavar="N", help="of the checks' tensors (default: drawn anew)")
    add("--quick", action="store_true", help="a sixth of the variants, smaller shapes, 5 rounds")
    add("--tune", action="store_true", help="instead, try tiles of the kernels and show the best")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")


def one_of(text: str) -> tuple[int, int]:
    """I/N with 1 <= I <= N."""
    first, _, step = text.partition("/")
    slice_ = count(first), count(step)
    if slice_[0] > slice_[1]:
        raise argparse.ArgumentTypeError(f"expected I/N with I up to N, not {text!r}")
    return slice_


def run(args: argparse.Namespace) -> int:
    """0 when all went well, 1 when a check or ours failed, 2 for input that cannot be used."""
    import torch

    from prefixtree.bench import attention, gpu, tuning
    from prefixtree.bench.clocks import clock_of
    from prefixtree.bench.compare import makers_for
    from prefixtree.bench.measure import Rounds
    from prefixtree.bench.shapes import SUITES
    from prefixtree.bench.variants import interpretable, variants

    for part in args.parts:
        if part not in ("checks", "shapes"):
            raise UnusableInput(f"--parts: no part {part!r}, expected checks, shapes")
    require_writable(args.json)
    device = attention.device_named(args.device)
    dtype = attention.dtype_named(args.dtype, device)
    clock = clock_of(device, args.clock)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.tune:
        trials = tuning.tune(
            gpu.every(list(tuning.candidates()), *args.slice),
            device=device,
            dtype=dtype,
            clock=clock,
            backend=args.backend or "triton",
            rounds=args.rounds,
            deadline=gpu.Deadline(args.seconds),
        )
        write_figures(args.json, {"trials": [tuning.record(trial) for trial in trials]})
        print(tuning.best_tiles(trials))
        return 0
    limit = LIMITS_MB[device.type][args.quick] if args.limit is None else args.limit
    suites = args.shapes or list(SUITES)
    shapes = attention.chosen_shapes(suites, limit, dtype.itemsize, quick=args.quick)
    checked = variants()
    if device.type == "cpu" and args.backend == "triton":
        checked = interpretable(checked)
    work = gpu.Work(
        variants=gpu.every(gpu.every(checked, 1, QUICK_VARIANTS if args.quick else 1), *args.slice)
        if "checks" in args.parts
        else [],
        shapes=gpu.every(gpu.by_worth(shapes), *args.slice) if "shapes" in args.parts else [],
        makers=makers_for(device, 0.0 if args.quick else args.flex_seconds, args.backend),
        rounds=Rounds(5 if args.quick else args.rounds, SECONDS_A_SHAPE),
        seconds=args.seconds,
        seed=int(torch.seed() % 2**31) if args.seed is None else args.seed,
    )
    right = gpu.run_device(
        work,
        device=device,
        dtype=dtype,
        clock=clock,
        backend=args.backend,
        json_file=args.json,
    )
    return 0 if right else EXIT_WRONG
