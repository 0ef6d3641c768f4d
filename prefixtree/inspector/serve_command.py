"""`python -m prefixtree serve-inspector`: the page of a snapshot, or of a small cache at work."""

import argparse
from pathlib import Path

HELP = "show a snapshot, or a demonstration, in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "snapshot",
        nargs="?",
        type=Path,
        metavar="SNAPSHOT",
        help="a file of PrefixCache.save (default: a demonstration)",
    )
    add("--host", default="127.0.0.1", help=f"address to listen at {default}")
    add("--port", type=_port, default=0, metavar="N", help="port (default: a free one)")
    add("--token-text", action="store_true", help="show the tokens: text, or ids of a snapshot")


def run(args: argparse.Namespace) -> int:
    """0 when it was ended by Ctrl-C, 2 when it cannot begin."""
    import time

    from allocator import AllocatorError
    from prefixtree.cache import PrefixCache
    from prefixtree.errors import PrefixTreeError
    from prefixtree.inspector.command import refuse
    from prefixtree.inspector.demo import Demo, decode
    from prefixtree.inspector.server import serve

    try:
        demo = None if args.snapshot else Demo()
        cache = demo.cache if demo else PrefixCache.restore(args.snapshot)
        inspector = serve(
            cache,
            host=args.host,
            port=args.port,
            token_text=args.token_text,
            decode=decode if demo and args.token_text else None,
        )
    except (PrefixTreeError, AllocatorError, OSError) as error:
        return refuse(f"{type(error).__name__}: {error}", "serve-inspector")
    except ImportError as error:
        reason = f"{error}; snapshots need: pip install 'prefixtree[snapshot]'"
        return refuse(reason, "serve-inspector")
    with inspector:
        print(f"{inspector.url}  (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(0.5)
            if demo:
                demo.step()
                inspector.publish()


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port, 0..65535, not {text!r}")
    return int(text)
