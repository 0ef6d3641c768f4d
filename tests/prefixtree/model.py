"""What a prefix cache must answer, from a dictionary of paths and lists of tokens.

The model knows no blocks, no nodes and no order of eviction. It keeps every committed prefix (of
whole blocks, where only these are shared) as a namespace and a tuple of tokens, and every open
sequence as a list. It predicts matches, lengths, errors and what `forget` drops. What an eviction
took is learned from the cache afterwards (`lose`) and judged here.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_PRIORITY = 35

Namespace = str | tuple[str | int | None, ...]


class Path(NamedTuple):
    """Tokens from the first on, in a namespace."""

    namespace: Namespace
    tokens: tuple[int, ...]

    def starts_with(self, other: Path) -> bool:
        return (
            self.namespace == other.namespace and self.tokens[: len(other.tokens)] == other.tokens
        )


def in_order(paths: Iterable[Path]) -> list[Path]:
    """The paths in an order that is always the same: namespaces do not compare."""
    return sorted(paths, key=lambda path: (repr(path.namespace), path.tokens))


def prefixes(namespace: Namespace, tokens: Sequence[int], align: int = 1) -> list[Path]:
    """All prefixes of a multiple of `align` tokens but the empty one, shortest first."""
    stops = range(align, len(tokens) + 1, align)
    return [Path(namespace, tuple(tokens[:stop])) for stop in stops]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both start with."""
    pairs = zip(left, right, strict=False)
    return next(
        (length for length, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right))
    )


@dataclass
class Use:
    """When a committed token was used last.

    A use may be counted when a prompt matches it or when it is committed, and a cache is free to
    count the other calls of a sequence or a pin that holds it too. So the last use lies in an
    interval, and two of them are in order only when their intervals do not meet.
    """

    surely: int
    maybe: int


@dataclass(eq=False)
class ModelSequence:
    namespace: Namespace
    tokens: list[int]
    prompt_len: int
    cached_len: int
    committed: int
    fork_len: int = 1
    align: int = 1
    is_open: bool = True
    runs: int = 1
    """How often it was opened: once, and once more with every resume."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def uncommitted(self) -> int:
        return len(self.tokens) - self.committed

    @property
    def path(self) -> Path:
        return Path(self.namespace, tuple(self.tokens))

    @property
    def held(self) -> list[Path]:
        """The committed paths that it keeps while it is open."""
        return prefixes(self.namespace, self.tokens[: self.found], self.align)

    @property
    def found(self) -> int:
        """Its tokens that others match."""
        return self.committed - self.committed % self.align


class Forgetting(NamedTuple):
    """What a call of `forget` drops, and what it should drop but somebody holds."""

    gone: set[Path]
    kept: set[Path]


class ModelCache:
    """Never runs out of memory and never forgets by itself."""

    def __init__(self, align: int = 1) -> None:
        self.align = align
        self.uses: dict[Path, Use] = {}
        self.sequences: list[ModelSequence] = []
        self.pins: list[Path] = []
        self.clock = 0
        self.retained: dict[Path, tuple[int, float]] = {}
        """Priority and deadline of the paths that were given one."""
        self.now = 0.0

    @property
    def paths(self) -> Collection[Path]:
        """Every committed prefix."""
        return self.uses.keys()

    def cached(self, namespace: Namespace, tokens: Sequence[int]) -> int:
        # One that is known has all its beginnings known.
        align, uses, tokens = self.align, self.uses, tuple(tokens)
        stops = range(align, len(tokens) + 1, align)
        return align * bisect_left(
            stops, True, key=lambda stop: Path(namespace, tokens[:stop]) not in uses
        )

    def prefixes(self, namespace: Namespace, tokens: Sequence[int]) -> list[Path]:
        """Those prefixes that the cache can know."""
        return prefixes(namespace, tokens, self.align)

    def aligned(self, length: int) -> int:
        return length - length % self.align

    def pending(self, namespace: Namespace, tokens: Sequence[int]) -> int:
        """Tokens right behind the cached ones that are in an open sequence's prompt."""
        cached = self.cached(namespace, tokens)
        common = [
            self.aligned(common_length(tokens, sequence.tokens[: sequence.prompt_len]))
            for sequence in self.sequences
            if sequence.namespace == namespace and sequence.prompt_len > sequence.found
        ]
        return max([0, *(length - cached for length in common)])

    def leaves(self) -> list[Path]:
        """The paths that no other path continues, in a fixed order."""
        inner = {Path(namespace, tokens[: -self.align]) for namespace, tokens in self.uses}
        return in_order(path for path in self.uses if path not in inner)

    def pinned(self) -> set[Path]:
        """The paths that open sequences and pins hold."""
        held = {path for sequence in self.sequences for path in sequence.held}
        return held.union(*(self.prefixes(*pin) for pin in self.pins))

    def open(self, namespace: Namespace, tokens: Sequence[int]) -> ModelSequence:
        cached = self.cached(namespace, tokens)
        sequence = ModelSequence(
            namespace, list(tokens), len(tokens), cached, cached, align=self.align
        )
        self.sequences.append(sequence)
        self._use(sequence.held, surely_from=0)
        return sequence

    def append(self, sequence: ModelSequence, tokens: Iterable[int]) -> None:
        sequence.tokens.extend(tokens)
        self._use(sequence.held)

    def commit(self, sequence: ModelSequence, length: int) -> None:
        before, sequence.committed = sequence.committed, length
        self._use(sequence.held, surely_from=before)

    def fork(self, sequence: ModelSequence, count: int) -> list[ModelSequence]:
        length = len(sequence)
        sequence.fork_len = length
        shared = self.aligned(length)
        forks = [
            ModelSequence(
                sequence.namespace,
                list(sequence.tokens),
                length,
                shared,
                shared,
                fork_len=length,
                align=self.align,
            )
            for _ in range(count)
        ]
        self.sequences.extend(forks)
        self._use(sequence.held)
        return forks

    def rollback(self, sequence: ModelSequence, count: int) -> None:
        self._use(sequence.held)
        length = len(sequence) - count
        del sequence.tokens[length:]
        if length < sequence.found:
            sequence.committed = self.aligned(length)
        sequence.committed = min(sequence.committed, length)
        sequence.prompt_len = min(sequence.prompt_len, length)

    def close(self, sequence: ModelSequence) -> None:
        """Ends a sequence that is open; to close a preempted one changes nothing here."""
        self._use(sequence.held)
        sequence.is_open = False
        self.sequences.remove(sequence)

    def preempt(self, sequence: ModelSequence) -> None:
        self.close(sequence)

    def resume(self, sequence: ModelSequence) -> None:
        """As if opened anew with all its tokens, which are its prompt now."""
        cached = self.cached(*sequence.path)
        sequence.prompt_len = len(sequence)
        sequence.cached_len = sequence.committed = cached
        sequence.is_open = True
        sequence.runs += 1
        self.sequences.append(sequence)
        self._use(sequence.held, surely_from=0)

    def pin(self, path: Path) -> Path:
        """Keeps what is cached of the path, and returns that."""
        namespace, tokens = path
        pin = Path(namespace, tokens[: self.cached(namespace, tokens)])
        self.pins.append(pin)
        self._use(self.prefixes(*pin))
        return pin

    def unpin(self, pin: Path) -> None:
        self._use(self.prefixes(*pin))
        self.pins.remove(pin)

    def retain(
        self, path: Path, start: int, stop: int, priority: int, duration: float | None
    ) -> int:
        """Gives the cached tokens of a range a priority; it is no use of them."""
        deadline = math.inf if duration is None else self.now + duration
        namespace, tokens = path
        cached = self.cached(namespace, tokens[:stop])
        covered = self.prefixes(namespace, tokens[:cached])[start // self.align :]
        self.retained.update(dict.fromkeys(covered, (priority, deadline)))
        return self.align * len(covered)

    def priority(self, path: Path) -> int:
        priority, deadline = self.retained.get(path, (DEFAULT_PRIORITY, math.inf))
        return priority if self.now < deadline else DEFAULT_PRIORITY

    def forget(self, top: Path) -> Forgetting:
        """Drops all strictly behind the path `top` that nobody holds.

        The empty path stands for the whole namespace. Behind a path that is not cached there is
        nothing. Forgetting is no use: the paths that stay are as old as before.
        """
        if len(top.tokens) % self.align:
            return Forgetting(set(), set())
        behind = {path for path in self.uses if path != top and path.starts_with(top)}
        kept = behind & self.pinned()
        for path in behind - kept:
            del self.uses[path]
            self.retained.pop(path, None)
        return Forgetting(behind - kept, kept)

    def lose(self, remaining: set[Path], keep: Iterable[Path] = ()) -> set[Path]:
        """Keeps only the paths that the cache still has after an eviction; returns those that went.

        Fails when the cache had no right to let one of them go: because an open sequence, a pin or
        the call itself (`keep`) holds it, because a longer path is still there, or because a leaf
        that nobody held stayed, of a lower priority or surely used before it at the same one.
        """
        evicted = set(self.uses) - remaining
        pinned = self.pinned().union(keep)
        assert remaining <= set(self.uses), "the cache has paths that nobody committed"
        assert not evicted & pinned, f"evicted while pinned: {in_order(evicted & pinned)}"
        orphans = {
            path
            for path in remaining
            if len(path.tokens) > self.align
            and path._replace(tokens=path.tokens[: -self.align]) not in remaining
        }
        assert not orphans, f"evicted below the paths {in_order(orphans)}"
        spared = [leaf for leaf in self.leaves() if leaf in remaining and leaf not in pinned]
        for leaf in spared:
            for path in evicted:
                mine, its = self.priority(path), self.priority(leaf)
                assert mine <= its, f"evicted {path} of {mine} before {leaf} of {its}"
                assert mine < its or self.uses[path].surely <= self.uses[leaf].maybe, (
                    f"evicted {path}, used at {self.uses[path].surely}, before {leaf}, "
                    f"used at {self.uses[leaf].maybe} at the latest"
                )
        self.uses = {path: use for path, use in self.uses.items() if path in remaining}
        for path in evicted:
            self.retained.pop(path, None)
        return evicted

    def _use(self, held: Iterable[Path], *, surely_from: int | None = None) -> None:
        self.clock += 1
        for path in held:
            use = self.uses.setdefault(path, Use(self.clock, self.clock))
            use.maybe = self.clock
            if surely_from is not None and len(path.tokens) > surely_from:
                use.surely = self.clock
