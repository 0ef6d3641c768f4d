"""The options of `python -m prefixtree bench engines`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtree.bench.usable import UnusableInput
from prefixtree.options import count, names

if TYPE_CHECKING:
    from prefixtree.bench.engines.workload import Workload

HELP = "a real serving engine, stock and with ours"
DESCRIPTION = (
    "Measures a serving engine as it is and with prefixtree in it: the same work on the same tiny "
    "model with random weights, in turn, each run in a fresh process on this machine's CPU. "
    "Reports prefix-hit tokens, time to first token, scheduler time and decode attention time as "
    "ratios, and whether the tokens agree. Without --trace, samples behind a few-shot tree are "
    "decoded."
)
EXIT_FAILED = 1
PARTS = ("cache", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", choices=("transformers", "sglang", "vllm"))
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "--with",
        dest="parts",
        type=names,
        default=list(PARTS),
        metavar="PARTS",
        help="which of ours: cache, attention, or both with a comma (default: both)",
    )
    sessions = parser.add_argument_group("sessions of a trace")
    add = sessions.add_argument
    add(
        "--trace",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="play the sessions of these traces instead, turn by turn (Mooncake, Qwen-Bailian or "
        "agent sessions, may be .gz)",
    )
    add(
        "--scale",
        type=count,
        default=64,
        metavar="N",
        help=f"keep every Nth token of each text {default}",
    )
    add("--turns", type=count, metavar="N", help="of each session the first N (default: all)")
    add(
        "--concurrency",
        type=count,
        default=2,
        metavar="N",
        help=f"requests at a time; sessions take turns {default}",
    )
    tree = parser.add_argument_group("few-shot tree")
    add = tree.add_argument
    add("--header", type=count, default=1024, metavar="N", help=f"tokens {default}")
    add("--problems", type=count, default=4, metavar="N", help=default)
    add("--problem", type=count, default=128, metavar="N", help=f"tokens of each {default}")
    add("--samples", type=count, default=32, metavar="N", help=f"of each problem {default}")
    add("--output", type=count, default=32, metavar="N", help=f"tokens of each sample {default}")
    engine = parser.add_argument_group("engine and model")
    add = engine.add_argument
    add(
        "--pool-tokens",
        type=count,
        metavar="N",
        help="tokens that the KV cache has room for (default: half of the distinct ones, for "
        "which eviction matters; at least what runs at a time)",
    )
    add(
        "--step-tokens",
        type=count,
        default=2048,
        metavar="N",
        help=f"the most tokens that are computed in a step {default}",
    )
    add("--layers", type=count, default=2, metavar="N", help=default)
    add("--hidden", type=count, default=256, metavar="N", help=f"hidden size {default}")
    add("--q-heads", type=count, default=8, metavar="N", help=default)
    add("--kv-heads", type=count, default=2, metavar="N", help=default)
    add("--head-dim", type=count, default=64, metavar="N", help=default)
    add("--vocabulary", type=count, default=2048, metavar="N", help=f"tokens {default}")
    add("--threads", type=count, default=1, metavar="N", help=f"of torch {default}")
    add = parser.add_argument
    add("--rounds", type=count, default=3, metavar="N", help=f"runs of each kind {default}")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="of scheduler and attention; cpu: the time that the engine's thread itself used, for "
        f"machines that do other work as well, with one thread {default}",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios")


def run(args: argparse.Namespace) -> int:
    """0 when all agrees, 1 when a run failed or tokens differ, 2 for input that cannot be used."""
    from prefixtree.bench.engines import compare
    from prefixtree.bench.engines.model import ModelSize

    unknown = set(args.parts) - set(PARTS)
    if unknown:
        raise UnusableInput(f"no part {', '.join(unknown)!r}, expected {', '.join(PARTS)}")
    name, work = _few_shot(args) if args.trace is None else _sessions(args)
    size = ModelSize(
        args.layers,
        args.hidden,
        args.q_heads,
        args.kv_heads,
        args.head_dim,
        args.vocabulary,
    )
    options = compare.Options(
        args.engine,
        frozenset(args.parts),
        size,
        args.pool_tokens,
        args.step_tokens,
        args.rounds,
        args.threads,
        args.clock,
    )
    try:
        agrees = compare.compare(options, work, name, json_file=args.json, plot_file=args.plot)
    except compare.EngineFailed as error:
        print(f"python -m prefixtree bench engines: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0 if agrees else EXIT_FAILED


def _few_shot(args: argparse.Namespace) -> tuple[str, Workload]:
    from prefixtree.bench.engines import workload

    name = (
        f"few-shot tree {args.header} -> {args.problems} x {args.problem} -> "
        f"{args.samples} samples of {args.output}"
    )
    return name, workload.few_shot(
        header=args.header,
        problems=args.problems,
        problem=args.problem,
        samples=args.samples,
        output=args.output,
        vocabulary=args.vocabulary,
    )


def _sessions(args: argparse.Namespace) -> tuple[str, Workload]:
    from prefixtree.bench.engines import workload
    from prefixtree.replay.traces import TraceError, load_traces

    first, *others = (file.name for file in args.trace)
    more = f" and {len(others)} more" if others else ""
    try:
        requests = load_traces(args.trace)
    except TraceError as error:
        raise UnusableInput(str(error)) from error
    return f"sessions of {first}{more}, 1 token in {args.scale}", workload.sessions(
        requests,
        scale=args.scale,
        turns=args.turns,
        concurrency=args.concurrency,
        vocabulary=args.vocabulary,
    )
