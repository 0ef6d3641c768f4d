"""The options of `python -m prefixtree bench attention`."""

import argparse
from pathlib import Path

from prefixtree.options import count, names, non_negative

HELP = "attention over shared prefixes, beside what else computes it"
DESCRIPTION = (
    "Measures decode attention on the trees of the published systems and some of ours, beside "
    "torch's own attention, Hydragen's way, flex_attention and, on a CUDA device, FlashInfer, all "
    "in turn in one run; every result is compared with float64."
)
EXIT_FAILED = 1
LIMITS_MB = {"cpu": (512.0, 256.0), "cuda": (40_000.0, 4_000.0)}
"""By device: of a whole run and of a quick one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add_device(parser)
    add(
        "--shapes",
        type=names,
        default=["small", "fasttree", "pat", "deft", "hydragen", "ours"],
        metavar="SUITES",
        help="suites of shapes, with commas (default: small,fasttree,pat,deft,hydragen,ours)",
    )
    add(
        "--limit",
        type=non_negative,
        metavar="MB",
        help="leave out shapes whose paths together have more than this of K and V: so much is "
        "read where nothing is shared (default: on a CPU 512, quick 256; on CUDA 40000, 4000)",
    )
    add(
        "--rounds",
        type=count,
        default=21,
        metavar="N",
        help=f"times that each shape is measured, at most; the median is reported {default}",
    )
    add(
        "--seconds",
        type=non_negative,
        default=3.0,
        metavar="S",
        help=f"no more rounds of one shape after this long {default}",
    )
    add(
        "--flex-seconds",
        type=non_negative,
        default=120.0,
        metavar="S",
        help=f"how long flex_attention may compile, all shapes together {default}",
    )
    add("--quick", action="store_true", help="smaller shapes, fewer rounds, no flex_attention")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    add("--plot", type=Path, metavar="FILE.png", help="draw each contender's time over ours")


def add_device(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """What every benchmark of tensors lets choose."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of q, K and V (default: float32 on a CPU, bfloat16 on CUDA)",
    )
    parser.add_argument("--threads", type=count, metavar="N", help="of torch (default: its own)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="on a CPU: the time that this process itself used, for machines that do other work as "
        "well; it adds up over threads (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when all is measured, 1 when ours failed on a shape, 2 for input that cannot be used."""
    import torch

    from prefixtree.bench import attention
    from prefixtree.bench.clocks import clock_of
    from prefixtree.bench.measure import Rounds

    device = attention.device_named(args.device)
    dtype = attention.dtype_named(args.dtype, device)
    limit = LIMITS_MB[device.type][args.quick] if args.limit is None else args.limit
    shapes = attention.chosen_shapes(args.shapes, limit, dtype.itemsize, quick=args.quick)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    complete = attention.measure_attention(
        shapes,
        device=device,
        dtype=dtype,
        clock=clock_of(device, args.clock),
        rounds=Rounds(3 if args.quick else args.rounds, args.seconds),
        flex_seconds=0.0 if args.quick else args.flex_seconds,
        json_file=args.json,
        plot_file=args.plot,
    )
    return 0 if complete else EXIT_FAILED
