"""The command line: `python -m prefixtree COMMAND`."""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast


class Command(Protocol):
    """A module that is one command. Importing it must be cheap: `--help` imports them all."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """Does the work and returns the exit status."""


COMMANDS = {
    "bench": "prefixtree.bench.command",
    "demo": "prefixtree.demo.command",
    "inspect": "prefixtree.inspector.command",
    "replay": "prefixtree.replay.command",
    "serve-inspector": "prefixtree.inspector.serve_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (default: the process's arguments) names.

    Returns its exit status. Raises SystemExit(2) for arguments that make no sense, and
    SystemExit(0) after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m prefixtree", description="A paged radix-tree KV cache with tree attention."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = cast(Command, import_module(module))
        command_parser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(command_parser)
        command_parser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return cast(int, args.run(args))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
