"""`python -m prefixtree bench`: the benchmarks by name, each a command of its own."""

import argparse
from importlib import import_module
from typing import cast

HELP = "measure prefixtree on this machine"

BENCHMARKS = {
    "cache": "prefixtree.bench.cache_command",
    "attention": "prefixtree.bench.attention_command",
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
    return cast(int, import_module(BENCHMARKS[args.benchmark]).run(args))
