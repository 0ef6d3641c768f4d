"""The cache's benchmark: what is measured, printed and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from prefixtree.bench import report
from prefixtree.bench.measure import CLOCKS, Rounds, Row
from prefixtree.bench.operations import (
    NODE_TOKENS,
    by_nodes,
    by_sequences,
    by_tokens,
    bytes_a_token,
)
from prefixtree.bench.peers import Peer, PeerMissing, make_peers
from prefixtree.bench.played import Played, play
from prefixtree.bench.usable import UnusableInput, require_writable, write_figures
from prefixtree.columns import Int32s

TRACE_BLOCK_SIZES = (1, 16)
TOKENS_WEIGHED = 2**22
T = TypeVar("T")


class Sizes(NamedTuple):
    """The largest of each kind."""

    nodes: int
    tokens: int
    sequences: int


def measure_sizes(
    largest: Sizes,
    *,
    block_size: int,
    rounds: int,
    seconds: float,
    clock: str,
    against: Sequence[str],
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measures everything against its size, prints a table, writes the files asked for.

    Raises UnusableInput for engines that cannot be had and files that cannot be written.
    """
    makers = _makers(against)
    require_writable(json_file, plot_file)
    print(report.heading(block_size, clock), flush=True)
    # Kept until the end: the trees below are not built in memory that these have given back.
    filled = [make(TOKENS_WEIGHED + block_size, block_size) for make in makers]
    a_token = {peer.name: bytes_a_token(peer, TOKENS_WEIGHED) for peer in filled}
    stop = Rounds(rounds, seconds, CLOCKS[clock])
    rows: list[Row] = []
    memory: list[dict[str, Any]] = []

    def show(measured: list[Row]) -> None:
        rows.extend(measured)
        print("\n" + report.table(measured), flush=True)

    node_sizes = powers(10, 1_000, largest.nodes)
    of_nodes = list(_shown(by_nodes(makers, node_sizes, block_size, stop), node_sizes, "trees"))
    show([row for nodes in of_nodes for row in nodes.rows])
    token_sizes = powers(2, 1_024, largest.tokens)
    of_tokens = _shown(by_tokens(makers, token_sizes, block_size, stop), token_sizes, "prompts")
    show([row for measured in of_tokens for row in measured])
    batch_sizes = powers(4, 1, largest.sequences)
    of_batches = _shown(by_sequences(batch_sizes, block_size, stop), batch_sizes, "batches")
    show([row for measured in of_batches for row in measured])
    for name, weight in of_nodes[-1].memory.items():
        each = a_token[name] or 0.0
        beside = weight - each * NODE_TOKENS
        memory.append({"cache": name, "bytes_a_node": beside, "bytes_a_token": each})
    if memory:
        print("\n" + report.weights(memory, largest.nodes))
    result = {"rows": [row._asdict() for row in rows], "memory": memory}
    write_figures(
        json_file, {"block_size": block_size, "clock": clock, **report.machine(), **result}
    )
    if plot_file is not None:
        report.plot_sizes(rows, plot_file)


def play_trace(
    trace: Path,
    *,
    requests: int | None,
    pool_tokens: int,
    clock: str,
    against: Sequence[str],
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Plays the prompts of a trace at each of `TRACE_BLOCK_SIZES`, prints what the steps took.

    Raises UnusableInput for a trace that cannot be read or has a prompt larger than the pool, and
    as `measure_sizes`.
    """
    from prefixtree.replay.traces import TraceError, load_traces

    makers = _makers(against)
    require_writable(json_file, plot_file)
    try:
        recorded = load_traces([trace])[:requests]
    except TraceError as error:
        raise UnusableInput(str(error)) from None
    longest = max(request.input_length for request in recorded)
    if longest > pool_tokens:
        raise UnusableInput(
            f"{trace} has a prompt of {longest} tokens, --pool-tokens {pool_tokens}"
        )

    def prompts() -> Iterator[Int32s]:
        for request in tqdm(recorded, unit=" requests", leave=False):
            yield request.tokens()[: request.input_length]

    results: list[Played] = []
    for block_size in TRACE_BLOCK_SIZES:
        results.append(play(prompts(), makers, pool_tokens, block_size, CLOCKS[clock]))
        print(report.played(results[-1]) + "\n", flush=True)
    write_figures(
        json_file,
        {"clock": clock, **report.machine(), "played": [result._asdict() for result in results]},
    )
    if plot_file is not None:
        report.plot_played(results, plot_file)


def powers(base: int, first: int, largest: int) -> list[int]:
    """first, first * base, ... and `largest` itself, which may be less than `first`."""
    sizes = []
    while first < largest:
        sizes.append(first)
        first *= base
    return [*sizes, largest]


def _shown(part: Iterator[T], sizes: Sequence[int], what: str) -> Iterator[T]:
    """Shows on stderr how far it is."""
    return iter(tqdm(part, total=len(sizes), unit=f" {what}", leave=False))


def _makers(against: Sequence[str]) -> list[type[Peer]]:
    try:
        return make_peers(against)
    except PeerMissing as error:
        raise UnusableInput(str(error)) from None
