"""The options of `python -m prefixtree bench cache`."""

import argparse
from pathlib import Path

from prefixtree.options import count, names, non_negative

HELP = "the cache's bookkeeping: match, insert, evict, decode steps, memory"
DESCRIPTION = (
    "Measures the cache's bookkeeping, without any model: operations against the size of the tree, "
    "of the prompt and of the running batch, and memory; or a trace of real requests. With "
    "--against, other engines' caches do the same in turn with ours, in this process."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "--max-nodes",
        type=count,
        default=1_000_000,
        metavar="N",
        help=f"nodes of the largest tree; sizes are powers of 10 from 1,000 on {default}",
    )
    add(
        "--max-tokens",
        type=count,
        default=2**20,
        metavar="N",
        help=f"tokens of the longest prompt; sizes are powers of 2 from 1,024 on {default}",
    )
    add(
        "--max-sequences",
        type=count,
        default=4096,
        metavar="N",
        help=f"sequences of the largest decode batch; sizes are powers of 4 {default}",
    )
    add("--block-size", type=count, default=16, metavar="N", help=f"tokens of a block {default}")
    add(
        "--rounds",
        type=count,
        default=31,
        metavar="N",
        help=f"times that each operation is measured, at most; the median is reported {default}",
    )
    add(
        "--seconds",
        type=non_negative,
        default=20.0,
        metavar="S",
        help=f"no more rounds of one size after this long {default}",
    )
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the time that this process itself used, for machines that do other work as well "
        f"{default}",
    )
    add(
        "--against",
        type=names,
        default=[],
        metavar="ENGINES",
        help="what else to measure, with commas: sglang, vllm; observed is ours with KV events, "
        "metrics and the inspector on",
    )
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="play this trace of requests (a Mooncake JSONL file, may be .gz) at block sizes 1 and "
        "16, instead of the sizes above",
    )
    add("--requests", type=count, metavar="N", help="only the trace's first N (default: all)")
    add(
        "--pool-tokens",
        type=count,
        default=3_000_000,
        metavar="N",
        help=f"tokens that the trace's cache has room for {default}",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    add("--plot", type=Path, metavar="FILE.png", help="draw the figures against the sizes")


def run(args: argparse.Namespace) -> int:
    """0 when all is measured, 2 for input that cannot be used."""
    from prefixtree.bench.cache import Sizes, measure_sizes, play_trace

    if args.trace is not None:
        play_trace(
            args.trace,
            requests=args.requests,
            pool_tokens=args.pool_tokens,
            clock=args.clock,
            against=args.against,
            json_file=args.json,
            plot_file=args.plot,
        )
    else:
        measure_sizes(
            Sizes(args.max_nodes, args.max_tokens, args.max_sequences),
            block_size=args.block_size,
            rounds=args.rounds,
            seconds=args.seconds,
            clock=args.clock,
            against=args.against,
            json_file=args.json,
            plot_file=args.plot,
        )
    return 0
