"""The options of `python -m prefixtree replay`."""

import argparse
import sys
from pathlib import Path

from prefixtree.options import count, counts, rate, seed

HELP = (
    "play recorded request traces through a cache under every eviction policy and several "
    "capacities, against what a policy that knows the future could hit"
)
EXIT_BROKEN = 1
EXIT_UNUSABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "traces",
        nargs="+",
        type=Path,
        metavar="TRACE",
        help="Mooncake or Qwen-Bailian JSON Lines, or a coding-agent session; may be .gz",
    )
    add(
        "--capacities",
        type=counts,
        metavar="N,N,...",
        help="sizes of the cache in tokens (default: 2 to 40%% of what the traces fill)",
    )
    add("--block-size", type=count, default=16, metavar="N", help=f"tokens of a block {default}")
    add(
        "--policies",
        type=_policies,
        metavar="NAME,NAME,...",
        help="eviction policies (default: all there are)",
    )
    add("--limit", type=count, metavar="N", help="play the first N requests only")
    add(
        "--running",
        type=count,
        default=16,
        metavar="N",
        help=f"most requests that run at a time {default}",
    )
    add(
        "--disturb",
        type=rate,
        default=0.0,
        metavar="RATE",
        help="abort, preempt and resume, and forget at random, each at this rate a request "
        f"{default}",
    )
    add("--seed", type=seed, default=0, metavar="N", help=f"of the disturbances {default}")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add(
        "--record",
        type=Path,
        metavar="FILE.html",
        help="write a page there that shows the tree over the time of the first run: of the first "
        "policy at the smallest capacity, whose time then includes that",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw hit rate over capacity there")


def run(args: argparse.Namespace) -> int:
    """0 when the cache came out whole and empty, 1 when not, 2 for input that cannot be used."""
    from allocator import BrokenInvariant, DoubleFree, ForeignBlock
    from prefixtree.errors import CacheBroken

    try:
        from prefixtree.replay.record import Recorder
        from prefixtree.replay.run import UnusableCapacity, replay

        if args.plot:
            from prefixtree.replay.plot import plot
    except ModuleNotFoundError as error:
        return _refuse(f"{error}; a replay needs: pip install 'prefixtree[bench]'")
    from allocator import policy_names
    from prefixtree.bench.usable import UnusableInput, require_writable
    from prefixtree.replay.report import Settings, as_json, as_text
    from prefixtree.replay.traces import TraceError, load_traces

    recorder = Recorder() if args.record else None
    try:
        requests = load_traces(args.traces)[: args.limit]
        require_writable(args.json, args.record, args.plot)
        found = replay(
            requests,
            traces=args.traces,
            policies=args.policies or policy_names(),
            capacities=args.capacities,
            settings=Settings(args.block_size, args.running, args.disturb, args.seed),
            recorder=recorder,
        )
    except (TraceError, UnusableCapacity, UnusableInput) as error:
        return _refuse(str(error))
    except (BrokenInvariant, CacheBroken, DoubleFree, ForeignBlock) as error:
        print(f"THE CACHE IS BROKEN: {type(error).__name__}: {error}")
        return EXIT_BROKEN
    print(as_text(found))
    try:
        if args.json:
            args.json.write_text(as_json(found))
        if recorder:
            recorder.write(args.record, title=", ".join(path.name for path in args.traces))
        if args.plot:
            plot(found, args.plot)
    except (OSError, ValueError) as error:
        return _refuse(f"cannot write: {error}")
    return 0


def _refuse(reason: str) -> int:
    print(f"python -m prefixtree replay: error: {reason}", file=sys.stderr)
    return EXIT_UNUSABLE


def _policies(text: str) -> list[str]:
    from allocator import policy_names

    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in policy_names():
            known = ", ".join(policy_names())
            raise argparse.ArgumentTypeError(f"expected names out of {known}, not {name!r}")
    return names
