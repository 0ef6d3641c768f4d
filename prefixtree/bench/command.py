"""`python -m prefixtree bench`: the benchmarks by name, each a command of its own."""

import argparse
import sys
from importlib import import_module
from typing import cast

from prefixtree.bench.usable import UnusableInput

EXIT_UNUSABLE = 2
HELP = "measure prefixtree on this machine"

BENCHMARKS = {
    "cache": "prefixtree.bench.cache_command",
    "attention": "prefixtree.bench.attention_command",
    "plan": "prefixtree.bench.plan_command",
    "decode": "prefixtree.bench.decode_command",
    "gpu": "prefixtree.bench.gpu_command",
    "engines": "prefixtree.bench.engines_command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, path in BENCHMARKS.items():
        module = import_module(path)
        benchmark = benchmarks.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(benchmark)


def run(args: argparse.Namespace) -> int:
    """The benchmark's own exit status; 2 for input that it cannot use and what is not installed."""
    try:
        if getattr(args, "plot", None) is not None:
            import_module("matplotlib")  # not only after all is measured
        return cast(int, import_module(BENCHMARKS[args.benchmark]).run(args))
    except ModuleNotFoundError as error:
        reason = f"{error}; the benchmarks need: pip install 'prefixtree[bench]'"
    except UnusableInput as error:
        reason = str(error)
    print(f"python -m prefixtree bench {args.benchmark}: error: {reason}", file=sys.stderr)
    return EXIT_UNUSABLE
