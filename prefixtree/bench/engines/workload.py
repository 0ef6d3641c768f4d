"""What is asked of an engine: turns of a trace's sessions, or samples behind a few-shot tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from prefixtree.columns import Int64s
from prefixtree.replay.request import Request

FIRST_TOKEN = 3
"""Those before it have a meaning in most vocabularies."""

_ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbours end up far apart


@dataclass(frozen=True, eq=False)
class Turn:
    """One request.

    Attributes:
        ids: int64 [prompt and output], names of tokens: equal ones are equal tokens.
        prompt: how many of them are the prompt, at least 1.
        output: how many tokens are generated, at least 1; those behind the ids have no name.
    """

    ids: Int64s
    prompt: int
    output: int


Session = list[Turn]
"""Turns that come one after the other."""


@dataclass(frozen=True)
class Workload:
    """Sessions in phases, each begun when the one before is done.

    Attributes:
        phases: a session that has had a turn waits behind the others for its next.
        concurrency: requests at a time.
        vocabulary: how many tokens there are.
    """

    phases: list[list[Session]]
    concurrency: int
    vocabulary: int

    @property
    def turns(self) -> list[Turn]:
        return [turn for sessions in self.phases for session in sessions for turn in session]

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request, tokens."""
        return max(turn.prompt + turn.output for turn in self.turns)

    @property
    def distinct(self) -> int:
        """Tokens of prompts and outputs, those that are shared once."""
        unnamed = sum(turn.prompt + turn.output - len(turn.ids) for turn in self.turns)
        return len(np.unique(np.concatenate([turn.ids for turn in self.turns]))) + unnamed


@dataclass
class Text:
    """Turns ids into tokens, and remembers what was generated for which, in one session.

    A later prompt that contains an output of the trace gets the tokens that the model wrote in
    its place: so what an engine keeps of outputs is of use, as it is with real conversations.
    """

    vocabulary: int
    _ids: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    _tokens: Int64s = field(default_factory=lambda: np.empty(0, np.int64))

    def prompt(self, turn: Turn) -> list[int]:
        """The tokens of a turn's prompt. O(its length * log of what was generated)."""
        ids = turn.ids[: turn.prompt]
        tokens = fold(ids, self.vocabulary)
        if len(self._ids):
            at = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
            tokens = np.where(self._ids[at] == ids, self._tokens[at], tokens)
        written: list[int] = tokens.tolist()
        return written

    def generated(self, turn: Turn, tokens: Sequence[int]) -> None:
        ids = turn.ids[turn.prompt :]
        known = np.concatenate([self._ids, ids])
        values = np.concatenate([self._tokens, np.asarray(tokens[: len(ids)], np.int64)])
        # Of what is generated twice, the first counts.
        self._ids, first = np.unique(known, return_index=True)
        self._tokens = values[first]


def fold(ids: Int64s, vocabulary: int) -> Int64s:
    """A token for each id: the same for equal ones, for others by chance.

    Prefixes that are equal stay so; one that ends goes on by a token with a chance of 1 in
    `vocabulary`. Source of the hash: Knuth's multiplicative one.
    """
    spread = (ids.astype(np.uint64) * np.uint64(_ODD)) >> np.uint64(33)
    tokens: Int64s = (spread % np.uint64(vocabulary - FIRST_TOKEN)).astype(np.int64) + FIRST_TOKEN
    return tokens


def sessions(
    requests: Iterable[Request],
    *,
    scale: int,
    turns: int | None,
    concurrency: int,
    vocabulary: int,
) -> Workload:
    """The sessions of traces, of each the first `turns` requests, shortened.

    Of each text every `scale`-th token is kept. So equal prefixes remain equal, at 1 / scale of
    their length, and others remain different. O(tokens before).
    """
    by_session: dict[int, Session] = {}
    for request in requests:
        session = by_session.setdefault(request.session, [])
        if turns is None or len(session) < turns:
            ids = request.tokens()[::scale].astype(np.int64)
            prompt = -(-request.input_length // scale)
            session.append(Turn(ids, prompt, max(1, len(ids) - prompt)))
    return Workload([list(by_session.values())], concurrency, vocabulary)


def few_shot(
    *,
    header: int,
    problems: int,
    problem: int,
    samples: int,
    output: int,
    vocabulary: int,
) -> Workload:
    """A header of so many tokens, problems behind it, and samples of each; all samples at once.

    Each problem is asked once before, so that all samples find it. A sample ends in a token of its
    own: samples then part though decoding is greedy, which makes runs comparable token for token.
    """
    fresh = iter(range(0, 2**40, 2**20))  # ids for each text, none of which is that long

    def text(length: int) -> Int64s:
        begin = next(fresh)
        return np.arange(begin, begin + length, dtype=np.int64)

    head = text(header)
    asked = [np.concatenate([head, text(problem)]) for _ in range(problems)]
    # Two tokens: transformers keeps nothing of what the step computes that ends a request.
    first = [[Turn(ids, len(ids), 2)] for ids in asked]
    # Of neighbouring ids, `fold` makes different tokens.
    ends = text(problems * samples).reshape(problems, samples, 1)
    then = chain.from_iterable(
        [[Turn(np.concatenate([ids, end]), len(ids) + 1, output)] for end in own]
        for ids, own in zip(asked, ends, strict=True)
    )
    return Workload([first, list(then)], problems * samples, vocabulary)
