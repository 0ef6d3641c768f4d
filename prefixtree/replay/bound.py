"""The most that any eviction policy could have hit, from knowing the future."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int64s
from prefixtree.replay.request import Request


@dataclass(frozen=True, slots=True)
class Accesses:
    """Which pieces of the tree of all paths each request touches, from the root down.

    A piece is a run of tokens that requests touch together or not at all.
    """

    piece: Int64s
    """int64 [accesses], those of request i at bounds[i] .. bounds[i + 1] - 1."""
    tokens: Int64s
    """Tokens of the piece, int64 [accesses]."""
    in_prompt: npt.NDArray[np.bool_]
    """Whether it is of the prompt, where a hit counts, or of the output: bool [accesses]."""
    bounds: Int64s
    """int64 [requests + 1]."""

    @property
    def footprint(self) -> int:
        """Tokens of all paths, shared ones once: what a cache needs to evict nothing."""
        _, at = np.unique(self.piece, return_index=True)
        return int(self.tokens[at].sum())


def accesses(requests: Sequence[Request]) -> Accesses:
    """The accesses of these requests, in their order. O(runs log runs)."""
    firsts = np.concatenate([request.firsts for request in requests])
    lengths = np.concatenate([request.lengths for request in requests])
    runs = np.array([len(request.firsts) for request in requests])
    before = np.cumsum(lengths) - lengths  # position of each run in all requests' tokens
    run_starts = np.cumsum(runs) - runs
    prompt_ends = before[run_starts] + [request.input_length for request in requests]
    # Token ids are unique to a block and a place in it, so a set of ids says where pieces start:
    # wherever some request's run starts or ends, or its prompt ends.
    cut_runs = np.searchsorted(before, prompt_ends - 1, side="right") - 1
    prompt_cuts = firsts[cut_runs] + prompt_ends - before[cut_runs]
    cuts = np.unique(np.concatenate([firsts, firsts + lengths, prompt_cuts]))
    low = np.searchsorted(cuts, firsts)
    counts = np.searchsorted(cuts, firsts + lengths) - low
    ends = np.cumsum(counts)
    interval = np.arange(ends[-1]) + np.repeat(low - (ends - counts), counts)
    tokens = cuts[interval + 1] - cuts[interval]
    position = cuts[interval] - np.repeat(firsts - before, counts)
    per_request = np.add.reduceat(counts, run_starts)
    bounds = np.concatenate([[0], np.cumsum(per_request)])
    in_prompt = position < np.repeat(prompt_ends, per_request)
    return Accesses(_on_paths(interval, bounds), tokens, in_prompt, bounds)


def _on_paths(interval: Int64s, bounds: Int64s) -> Int64s:
    """Numbers for the pieces: the same tokens behind another path are another piece."""
    number: dict[int, int] = {}
    piece: list[int] = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        above = 0
        for own in interval[start:stop].tolist():
            above = number.setdefault(above << 32 | own, len(number) + 1)
            piece.append(above)
    return np.array(piece, np.int64)


def clairvoyant_hits(
    access: Accesses, capacity: int, admitted: npt.NDArray[np.bool_] | None = None
) -> int:
    """Prompt tokens hit by a cache of `capacity` tokens that knows what comes.

    `admitted[i]`: whether request i is served at all, all by default; one whose prompt does not fit
    never is. O(accesses log accesses).

    Whenever there are too many tokens, those go whose next use is farthest (L. A. Belady, A study
    of replacement algorithms for a virtual-storage computer, IBM Systems Journal 1966). No cache
    of paged blocks hits more on these requests in this order, whatever it evicts:

    - Think of each token by itself. A hit takes a place from the token's last use until then. Which
      of these intervals to serve, so that nowhere more than `capacity` overlap, is the choice; all
      are worth 1. Where too many overlap, dropping the one that ends last loses least (Carlisle and
      Lloyd, On the k-coloring of intervals, Discrete Applied Mathematics 1995). The tokens of a
      piece have the same intervals, so pieces, of which a part may be dropped, are as exact.
    - An output that is computed again is no hit, and holding it until then is worth nothing.
    - At each request its own prompt takes room, hit or not; that is exact for every cache.
    - What a real cache has to do beyond this is left out, which can only raise the figure: requests
      that run at the same time hold their blocks, outputs come later, blocks are not full.

    It is close, too: what is above a token in its path is used no later than the token, so
    dropping the farthest keeps paths whole, and a tree cache could do the same. Sequences that
    are aborted hit less than they are taken for here. Only resuming after a preemption is outside:
    it may bring tokens back without a request.
    """
    spans = np.stack([access.bounds[:-1], access.bounds[1:]], 1)
    before = np.concatenate([[0], np.cumsum(access.tokens * access.in_prompt)])
    prompts = before[spans[:, 1]] - before[spans[:, 0]]
    served = prompts <= capacity
    if admitted is not None:
        served &= admitted
    spans, prompts = spans[served], prompts[served]
    next_use = _next_counted_use(access, spans).tolist()
    tokens = access.tokens.tolist()

    held = [0] * len(tokens)  # by the access that will use it: how many tokens wait for it
    farthest: list[int] = []  # accesses that something waits for, negated: a heap
    total = hits = 0

    def shrink_to(room: int) -> None:
        nonlocal total
        while total > room:
            last = -farthest[0]
            dropped = min(held[last], total - room)
            held[last] -= dropped
            total -= dropped
            if not held[last]:
                heappop(farthest)

    for (start, stop), prompt in zip(spans.tolist(), prompts.tolist(), strict=True):
        found = sum(held[start:stop])
        held[start:stop] = [0] * (stop - start)
        hits += found
        total -= found
        shrink_to(capacity - prompt)
        for at in range(start, stop):
            use = next_use[at]
            if use >= 0:
                held[use] = tokens[at]
                total += tokens[at]
                heappush(farthest, -use)
        shrink_to(capacity)
    return hits


def _next_counted_use(access: Accesses, spans: Int64s) -> Int64s:
    """For each access the next one of the same piece if that is in a prompt, else -1."""
    result = np.full(len(access.piece), -1)
    served = np.zeros(len(access.piece) + 1, np.int64)
    np.add.at(served, spans[:, 0], 1)
    np.add.at(served, spans[:, 1], -1)
    at = np.flatnonzero(np.cumsum(served[:-1]))
    at = at[np.argsort(access.piece[at], kind="stable")]
    now, then = at[:-1], at[1:]
    same = (access.piece[now] == access.piece[then]) & access.in_prompt[then]
    result[now[same]] = then[same]
    return result
