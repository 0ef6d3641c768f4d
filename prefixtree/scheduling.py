"""Which of the waiting requests to open next, and which of them should wait for another.

For engines with a queue: plain functions of a cache and the waiting requests, in the order of their
arrival. They change nothing, look each prompt up once and answer with indices into the queue;
requests that are equal in what counts keep their order. What they say is true until the cache or
the queue changes: ask again before the next step.

All of them raise `InvalidTokens` and `InvalidNamespace` as `PrefixCache.match` does. Keep the
tokens of waiting requests as int32 arrays: a list is converted anew each time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsFloat, SupportsIndex

import numpy as np

from allocator.errors import InvalidArgument, at_least
from prefixtree.cache import PrefixCache
from prefixtree.columns import Int32s
from prefixtree.tokens import INT32, TokensLike, agreement, as_prompt
from prefixtree.tree import DEFAULT, Namespace


class Waiting(NamedTuple):
    """A request that is not open yet."""

    tokens: TokensLike
    namespace: Namespace = DEFAULT
    waited: float = 0.0
    """Since its arrival, in seconds."""


class SharedPrefix(NamedTuple):
    """Requests that would all compute the same tokens behind what is cached."""

    computes: int | None
    """The request to open now; None when an open sequence computes the prefix already."""
    waits: tuple[int, ...]
    """Those to be opened when it is committed, ascending."""
    saved: tuple[int, ...]
    """For each of `waits`, the tokens that it then need not compute, beyond those cached now."""


def longest_match_first(cache: PrefixCache, waiting: Iterable[Waiting]) -> list[int]:
    """Those with the most cached tokens first.

    Uses what is cached before it is evicted, but a request without a match may wait for ever behind
    a stream of requests that have one. O(all tokens) in C.
    """
    looked = _look_up(cache, waiting)
    return sorted(range(len(looked)), key=lambda index: -looked[index].cached)


def heaviest_subtree_first(cache: PrefixCache, waiting: Iterable[Waiting]) -> list[int]:
    """Depth first through the tree, and from each node down the child with most requests below it.

    So requests that share cached tokens run one after the other, while these are hot. A request
    whose match ends at a node comes behind those that go on below it; those without a match are
    last, and may wait for ever as in `longest_match_first`. (The order "dfs-weight" of SGLang;
    Zheng et al., SGLang: Efficient Execution of Structured Language Model Programs, 2024.)
    O(n log n) comparisons in C of n prompts, plus O(n * depth).
    """
    return depth_first([one.prefix(one.cached) for one in _look_up(cache, waiting)])


def depth_first(paths: Sequence[bytes]) -> list[int]:
    """The order of `heaviest_subtree_first` for paths that are known already.

    Args:
        paths: of each request, int32 bytes: the number of its namespace, then what stands for its
            way through the tree, such as tokens or blocks.

    O(n log n) comparisons in C of n paths, plus O(n * depth).
    """
    # In the order of their bytes, paths below one node are neighbours, and a node branches where
    # neighbours part: a walk along them meets the whole tree with only one path open at a time.
    path = [_Subtree(0)]
    before = b""
    for index in sorted(range(len(paths)), key=paths.__getitem__):
        match = paths[index]
        shared = agreement(np.frombuffer(before, np.int32), np.frombuffer(match, np.int32))
        depth = len(match) // INT32.itemsize - 1
        _close(path, max(0, shared - 1))
        if depth > path[-1].depth:
            path.append(_Subtree(depth))
        path[-1].ending.append(index)
        before = match
    _close(path, 0)
    return path[0].order()


def highest_response_ratio_first(
    cache: PrefixCache, waiting: Iterable[Waiting], *, tokens_per_second: float
) -> list[int]:
    """By (waiting time + service time) / service time, the highest first.

    The service time is that of the tokens that are not cached, at least one, of which the engine
    computes `tokens_per_second`. Short work goes first, and so do hits; but the ratio of what waits
    grows without limit, so as long as the engine keeps up with what arrives nothing waits for ever.
    (Brinch Hansen, An analysis of response ratio scheduling, 1971.) O(all tokens) in C.

    Raises `InvalidArgument` unless each `waited` is finite and >= 0 and the rate finite and > 0.
    """
    queue = list(waiting)
    rate = _finite("tokens_per_second", tokens_per_second)
    if rate <= 0:
        raise InvalidArgument(f"tokens_per_second is {tokens_per_second!r}, expected more than 0")
    for index, request in enumerate(queue):
        if _finite(f"waited of request {index}", request.waited) < 0:
            raise InvalidArgument(
                f"waited of request {index} is {request.waited!r}, expected at least 0 seconds"
            )
    # Each ratio less 1, the same for all.
    ratios = [
        request.waited * rate / max(1, len(looked.prompt) - looked.cached)
        for request, looked in zip(queue, _look_up(cache, queue), strict=True)
    ]
    return sorted(range(len(queue)), key=lambda index: -ratios[index])


def shared_prefixes(
    cache: PrefixCache, waiting: Iterable[Waiting], *, min_saved: SupportsIndex = 1
) -> list[SharedPrefix]:
    """Who should wait for whom: the groups of requests that go on alike behind what is cached.

    Of each group the first in the queue computes, unless an open sequence has these tokens in its
    prompt (`Match.pending`); put the queue into the order in which you will open it. A request
    waits where it saves at least `min_saved` tokens; one that is in no group, or `computes`,
    shares less with all before it. The groups come in the order of their first request. When what
    a group waits for is aborted, the next call no longer says so and another request computes.

    Raises `InvalidArgument` unless `min_saved` is an integer >= 1. O(all tokens) in C.
    """
    least = at_least(1, "min_saved", min_saved)
    looked = _look_up(cache, waiting)
    # Where two agree in more than is cached, the same is cached of both. So those who save at
    # least `least` from each other are those with the same first `cached + least` tokens.
    groups: dict[bytes, list[int]] = {}
    for index, one in enumerate(looked):
        needed = -(-(one.cached + least) // cache.align) * cache.align
        if needed <= len(one.prompt):
            groups.setdefault(one.prefix(needed), []).append(index)
    shared = []
    for members in groups.values():
        first = looked[members[0]]
        if first.pending >= least:
            saved = tuple(looked[index].pending for index in members)
            shared.append(SharedPrefix(None, tuple(members), saved))
        elif len(members) > 1:
            waits = members[1:]
            common = [agreement(first.prompt, looked[index].prompt) for index in waits]
            saved = tuple(agreed - agreed % cache.align - first.cached for agreed in common)
            shared.append(SharedPrefix(members[0], tuple(waits), saved))
    return shared


class _LookedUp(NamedTuple):
    """A waiting request and its match."""

    prompt: Int32s
    namespace: int
    """Its number: 0 for that of the first request, and so on."""
    cached: int
    pending: int

    def prefix(self, length: int) -> bytes:
        """The first `length` tokens, behind the namespace as if that were one: int32 bytes."""
        return self.namespace.to_bytes(4, sys.byteorder) + self.prompt[:length].tobytes()


def _look_up(cache: PrefixCache, waiting: Iterable[Waiting]) -> list[_LookedUp]:
    looked = []
    numbers: dict[Namespace, int] = {}
    for tokens, namespace, _ in waiting:
        prompt = as_prompt(tokens)
        match = cache.match(prompt, namespace=namespace)
        number = numbers.setdefault(namespace, len(numbers))
        looked.append(_LookedUp(prompt, number, match.cached, match.pending))
    return looked


@dataclass
class _Subtree:
    """What is known so far of the requests at and below a prefix of `depth` tokens."""

    depth: int
    ending: list[int] = field(default_factory=list)
    """Requests whose match ends here."""
    below: list[list[int]] = field(default_factory=list)
    """The requests of each subtree below, in their order."""

    def order(self) -> list[int]:
        self.below.sort(key=lambda requests: (-len(requests), min(requests)))
        return [*(index for requests in self.below for index in requests), *sorted(self.ending)]


def _close(path: list[_Subtree], depth: int) -> None:
    """Ends the subtrees deeper than `depth`; the last on the path is then one of that depth."""
    while path[-1].depth > depth:
        done = path.pop().order()
        if path[-1].depth < depth:
            path.append(_Subtree(depth))
        path[-1].below.append(done)


def _finite(name: str, value: SupportsFloat) -> float:
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument(f"{name} is {value!r}, expected a finite number")
    return number
