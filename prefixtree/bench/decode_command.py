"""The options of `python -m prefixtree bench decode`."""

import argparse
from pathlib import Path

from prefixtree.bench.attention_command import add_device
from prefixtree.options import count, counts, non_negative

HELP = "whole decode steps of a model with random weights, against batch and prefix"
DESCRIPTION = (
    "Measures decode throughput of a Llama-like model with random weights on the cache and its "
    "attention: against the batch, against the length of the shared prefix, and with one and two "
    "levels of sharing; beside plans that share nothing and steps without attention."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add_device(parser)
    add(
        "--model",
        choices=("tiny", "7b", "13b"),
        help="its size; 7b and 13b are CodeLlama's (default: tiny on a CPU, 7b on CUDA)",
    )
    add(
        "--backend",
        choices=("torch", "triton", "reference"),
        help="what runs the plans (default: what is chosen without being told)",
    )
    add("--batches", type=counts, metavar="N,...", help="sequences (default: fits the device)")
    add("--prefix", type=count, metavar="N", help="tokens of the prefix shared by these batches")
    add("--prefixes", type=counts, metavar="N,...", help="tokens of the shared prefix")
    add(
        "--problems",
        type=count,
        metavar="N",
        help="problems behind a few-shot prompt, for one and two levels of sharing",
    )
    add("--samples", type=count, metavar="N", help="of each problem")
    add(
        "--steps",
        type=count,
        metavar="N",
        help="new tokens, at most; the median step counts (default: 10 on a CPU, 30 on CUDA)",
    )
    add(
        "--seconds",
        type=non_negative,
        default=10.0,
        metavar="S",
        help=f"no more steps of one kind after this long {default}",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    add("--plot", type=Path, metavar="FILE.png", help="draw the throughputs")


def run(args: argparse.Namespace) -> int:
    """0 when all is measured, 2 for input that cannot be used."""
    import torch

    from prefixtree.bench import decode
    from prefixtree.bench.attention import device_named, dtype_named
    from prefixtree.bench.measure import CLOCKS, Rounds

    device = device_named(args.device)
    on_cuda = device.type == "cuda"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in decode.Sizes._fields if name in args}
    sizes = decode.SIZES[device.type]._replace(
        **{name: value for name, value in given.items() if value is not None}
    )
    decode.measure_decode(
        args.model or ("7b" if on_cuda else "tiny"),
        decode.points_of(sizes),
        rounds=Rounds(args.steps or (30 if on_cuda else 10), args.seconds, CLOCKS[args.clock]),
        dtype=dtype_named(args.dtype, device),
        device=device,
        backend=args.backend,
        clock_name=args.clock,
        json_file=args.json,
        plot_file=args.plot,
    )
    return 0
