"""`python -m prefixtree inspect`: the tree of a snapshot, or of a running process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtree.options import count

if TYPE_CHECKING:
    from prefixtree.inspector.terminal import Selection

HELP = "show the tree of a snapshot or of a running process, in the terminal or as a page"
EXIT_UNUSABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("snapshot", nargs="?", type=Path, metavar="SNAPSHOT", help="a file of PrefixCache.save")
    add(
        "--watch",
        metavar="URL",
        help="follow a running process's inspector",
    )
    add("--min-tokens", type=count, metavar="N", help="nodes of N tokens at least, and those above")
    add("--depth", type=count, metavar="N", help="N levels of the tree")
    add("--namespace", metavar="NAME", help="this one only; a JSON list where it is a tuple")
    add("--html", type=Path, metavar="FILE", help="write a page for a browser there")


def run(args: argparse.Namespace) -> int:
    """0, or 2 for input that cannot be used."""
    import shutil

    from allocator import AllocatorError
    from prefixtree.errors import PrefixTreeError
    from prefixtree.inspector.terminal import CannotWatch, Selection, namespace_of

    if (args.snapshot is None) == (args.watch is None):
        return refuse("expected a SNAPSHOT or --watch URL")
    if args.watch and args.html:
        return refuse("--html is of a snapshot, expected no --watch: a browser can open the URL")
    columns, rows = shutil.get_terminal_size((100, 60))
    try:
        selection = Selection(
            min_tokens=args.min_tokens,
            depth=args.depth,
            namespace=None if args.namespace is None else namespace_of(args.namespace),
            width=columns,
            nodes=max(rows // 2, 12),
        )
        if args.watch:
            _watch(args.watch, selection)
        else:
            _inspect(args.snapshot, selection, args.html)
    except (PrefixTreeError, AllocatorError, CannotWatch, OSError) as error:
        return refuse(f"{type(error).__name__}: {error}")
    except ImportError as error:
        return refuse(f"{error}; snapshots need: pip install 'prefixtree[snapshot]'")
    return 0


def refuse(reason: str, command: str = "inspect") -> int:
    print(f"python -m prefixtree {command}: error: {reason}", file=sys.stderr)
    return EXIT_UNUSABLE


def _inspect(path: Path, selection: Selection, html: Path | None) -> None:
    from prefixtree.cache import PrefixCache
    from prefixtree.inspector.terminal import printer, screen
    from prefixtree.view_text import excerpts

    view = PrefixCache.restore(path).tree()
    printer()(screen(view, excerpts(None), selection))
    if html:
        chosen = view.filter(
            min_tokens=selection.min_tokens, depth=selection.depth, namespace=selection.namespace
        )
        chosen.to_html(html, title=path.name)
        print(f"\nwritten to {html}")


def _watch(url: str, selection: Selection) -> None:
    from prefixtree.inspector.terminal import clear, printer, watch

    show = printer()
    for text in watch(url, selection):
        clear()
        show(text)
