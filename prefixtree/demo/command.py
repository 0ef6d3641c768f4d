"""The options of `python -m prefixtree demo`."""

import argparse
import os
import sys
from pathlib import Path

from prefixtree.options import count, non_negative, seed

HELP = (
    "sample solutions of programming problems behind a shared few-shot header, with transformers' "
    "generate and with prefixtree, and check that the tokens are identical"
)
EXIT_DIFFERENT = 1
EXIT_UNUSABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--problems", type=count, default=6, metavar="N", help=f"how many problems {default}")
    add("--samples", type=count, default=8, metavar="N", help=f"samples of each {default}")
    add(
        "--max-new-tokens",
        type=count,
        default=48,
        metavar="N",
        help=f"most tokens of a sample {default}",
    )
    add(
        "--temperature",
        type=non_negative,
        default=0.8,
        metavar="T",
        help=f"of the sampled run, which follows a greedy one; 0 leaves it out {default}",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help=f"of the sampling and of the random weights {default}",
    )
    add(
        "--block-size",
        type=count,
        default=16,
        metavar="N",
        help=f"tokens of a block of KV {default}",
    )
    add(
        "--model",
        metavar="ID_OR_PATH",
        help="a model with its tokenizer (default: a small Llama with random weights)",
    )
    add(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="your own problems: on each line a JSON object with a string 'prompt'; may be .gz "
        "(default: functions of Python's standard library)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when all tokens are identical, 1 when one differs, 2 for input that cannot be used."""
    # Threads that spin while they wait for each other stall on cores that another process uses as
    # well: there both ways of generating take several times as long. OpenMP reads it with torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from prefixtree.demo.run import UnusableInput, run_demo
    except ModuleNotFoundError as error:
        return _refuse(f"{error}; the demo needs: pip install 'prefixtree[transformers]'")
    try:
        identical = run_demo(
            problems=args.problems,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            block_size=args.block_size,
            model=args.model,
            prompts_file=args.prompts,
        )
    except UnusableInput as error:
        return _refuse(str(error))
    return 0 if identical else EXIT_DIFFERENT


def _refuse(reason: str) -> int:
    print(f"python -m prefixtree demo: error: {reason}", file=sys.stderr)
    return EXIT_UNUSABLE
