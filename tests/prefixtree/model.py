"""What a prefix cache must answer, from a dictionary of paths and lists of tokens.

The model knows no blocks, no nodes and no order of eviction. It keeps every committed prefix as a
tuple of tokens, and every open sequence as a list. It predicts matches, lengths and errors. What an
eviction took is learned from the cache afterwards (`forget`) and judged here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

Path = tuple[int, ...]


def prefixes(path: Sequence[int]) -> list[Path]:
    """All prefixes of the path but the empty one, shortest first."""
    return [tuple(path[:stop]) for stop in range(1, len(path) + 1)]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both start with."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


@dataclass
class Use:
    """When a committed token was used last.

    A use may be counted when a prompt matches it or when it is committed, and a cache is free to
    count the other calls of a sequence that holds it too. So the last use lies in an interval, and
    two of them are in order only when their intervals do not meet.
    """

    surely: int
    maybe: int


@dataclass(eq=False)
class ModelSequence:
    tokens: list[int]
    prompt_len: int
    cached_len: int
    committed: int
    fork_len: int = 1
    is_open: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def uncommitted(self) -> int:
        return len(self.tokens) - self.committed


class ModelCache:
    """Never runs out of memory and never forgets by itself."""

    def __init__(self) -> None:
        self.uses: dict[Path, Use] = {}
        self.sequences: list[ModelSequence] = []
        self.clock = 0

    @property
    def paths(self) -> Collection[Path]:
        """Every committed prefix."""
        return self.uses.keys()

    def cached(self, tokens: Sequence[int]) -> int:
        length = 0
        while length < len(tokens) and tuple(tokens[: length + 1]) in self.uses:
            length += 1
        return length

    def pending(self, tokens: Sequence[int]) -> int:
        """Tokens right behind the cached ones that are in an open sequence's prompt."""
        prompts = [sequence.tokens[: sequence.prompt_len] for sequence in self.sequences]
        return max(
            [0, *(common_length(tokens, prompt) - self.cached(tokens) for prompt in prompts)]
        )

    def leaves(self) -> list[Path]:
        """The paths that no other path continues, in a fixed order."""
        inner = {path[:-1] for path in self.uses}
        return sorted(path for path in self.uses if path not in inner)

    def pinned(self) -> set[Path]:
        return {
            path
            for sequence in self.sequences
            for path in prefixes(sequence.tokens[: sequence.committed])
        }

    def open(self, tokens: Sequence[int]) -> ModelSequence:
        cached = self.cached(tokens)
        sequence = ModelSequence(list(tokens), len(tokens), cached, cached)
        self.sequences.append(sequence)
        self._use(sequence, surely_from=0)
        return sequence

    def append(self, sequence: ModelSequence, tokens: Iterable[int]) -> None:
        sequence.tokens.extend(tokens)
        self._use(sequence)

    def commit(self, sequence: ModelSequence, length: int) -> None:
        before, sequence.committed = sequence.committed, length
        self._use(sequence, surely_from=before)

    def fork(self, sequence: ModelSequence, count: int) -> list[ModelSequence]:
        length = len(sequence)
        sequence.fork_len = length
        forks = [
            ModelSequence(list(sequence.tokens), length, length, length, fork_len=length)
            for _ in range(count)
        ]
        self.sequences.extend(forks)
        self._use(sequence)
        return forks

    def rollback(self, sequence: ModelSequence, count: int) -> None:
        self._use(sequence)
        length = len(sequence) - count
        del sequence.tokens[length:]
        sequence.committed = min(sequence.committed, length)
        sequence.prompt_len = min(sequence.prompt_len, length)

    def close(self, sequence: ModelSequence) -> None:
        self._use(sequence)
        sequence.is_open = False
        self.sequences.remove(sequence)

    def forget(self, remaining: set[Path], keep: Sequence[int] = ()) -> set[Path]:
        """Keeps only the paths that the cache still has, and returns those that went.

        Fails when the cache had no right to let one of them go: because an open sequence or the
        call itself (`keep`) holds it, because a longer path is still there, or because a leaf that
        was surely used before it, and that nobody held, stayed.
        """
        evicted = set(self.uses) - remaining
        pinned = self.pinned().union(prefixes(keep))
        assert remaining <= set(self.uses), "the cache has paths that nobody committed"
        assert not evicted & pinned, f"evicted while pinned: {sorted(evicted & pinned)}"
        orphans = {path for path in remaining if len(path) > 1 and path[:-1] not in remaining}
        assert not orphans, f"evicted below the paths {sorted(orphans)}"
        spared = [leaf for leaf in self.leaves() if leaf in remaining and leaf not in pinned]
        for leaf in spared:
            for path in evicted:
                assert self.uses[path].surely <= self.uses[leaf].maybe, (
                    f"evicted {path}, used at {self.uses[path].surely}, before {leaf}, "
                    f"used at {self.uses[leaf].maybe} at the latest"
                )
        self.uses = {path: use for path, use in self.uses.items() if path in remaining}
        return evicted

    def _use(self, sequence: ModelSequence, *, surely_from: int | None = None) -> None:
        self.clock += 1
        for path in prefixes(sequence.tokens[: sequence.committed]):
            use = self.uses.setdefault(path, Use(self.clock, self.clock))
            use.maybe = self.clock
            if surely_from is not None and len(path) > surely_from:
                use.surely = self.clock
