"""The options of `python -m prefixtree bench plan`."""

import argparse
from pathlib import Path

from prefixtree.bench.attention_command import add_device
from prefixtree.options import count, non_negative

HELP = "what planning attention takes, step by step"
DESCRIPTION = (
    "Measures what the host does between two steps of an engine: planning attention over a forest "
    "from scratch and in place, its parts, and advancing a plan by a token, for each backend that "
    "there is. The kernels' backend runs on CUDA, and under TRITON_INTERPRET=1 on a CPU, where the "
    "host also does what a kernel does on a GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add_device(parser)
    add(
        "--rounds",
        type=count,
        default=300,
        metavar="N",
        help=f"times that each step is measured, at most {default}",
    )
    add(
        "--seconds",
        type=non_negative,
        default=5.0,
        metavar="S",
        help=f"no more rounds on one forest after this long {default}",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")


def run(args: argparse.Namespace) -> int:
    """0 when all is measured, 2 for input that cannot be used."""
    import torch

    from prefixtree.bench import planning
    from prefixtree.bench.attention import device_named, dtype_named
    from prefixtree.bench.measure import CLOCKS, Rounds

    device = device_named(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    planning.measure_planning(
        device=device,
        dtype=dtype_named(args.dtype, device),
        rounds=Rounds(args.rounds, args.seconds, CLOCKS[args.clock]),
        clock_name=args.clock,
        json_file=args.json,
    )
    return 0
