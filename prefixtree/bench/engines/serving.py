"""What a driver of an engine is, and playing a workload on one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol

from prefixtree.bench.engines.model import ModelSize
from prefixtree.bench.engines.workload import Session, Text, Turn, Workload


@dataclass(frozen=True)
class Setup:
    """How an engine is started.

    Attributes:
        parts: which of ours it has: "cache", "attention".
        pool_tokens: tokens that its KV cache has room for.
        page: tokens of a block of it.
        longest: tokens of the longest sequence.
        concurrency: the most requests at a time.
        step_tokens: the most tokens that are computed in a step.
        steps: where the watch of its process is to write.
        clock: of the watch, see `watch.CLOCKS`.
        folder: an empty one to work in.
    """

    parts: frozenset[str]
    model: ModelSize
    pool_tokens: int
    page: int
    longest: int
    concurrency: int
    step_tokens: int
    steps: Path
    clock: str
    folder: Path


class Reply(NamedTuple):
    """What an engine has of a request.

    Attributes:
        tokens: all that were generated so far.
        cached: tokens of the prompt that it found in its cache, by its own account.
    """

    request: str
    tokens: list[int]
    done: bool
    cached: int


class Serving(Protocol):
    """An engine that runs. Decoding is greedy, and goes on whatever the tokens are."""

    def submit(self, request: str, prompt: list[int], output: int) -> None: ...

    def receive(self) -> list[Reply]:
        """Waits until there is something new."""

    def close(self) -> None: ...


class Driver(Protocol):
    """A module that is one engine; importing it imports the engine."""

    def start(self, setup: Setup) -> Serving: ...


class Answer(NamedTuple):
    """What became of a request; seconds from when it was submitted."""

    request: str
    prompt: int
    cached: int
    tokens: list[int]
    first_s: float
    last_s: float


def play(engine: Serving, workload: Workload) -> Iterator[Answer]:
    """All turns, each session's in order; as many requests at a time as the workload says."""
    for number, phase in enumerate(workload.phases):
        yield from _play(engine, phase, f"{number}", workload)


@dataclass
class _Asked:
    """A request that is not answered yet."""

    text: Text
    turns: Iterator[tuple[int, Turn]]
    session: int
    turn: Turn
    prompt: int
    begin: float
    first: float | None = None


def _play(
    engine: Serving, sessions: list[Session], phase: str, workload: Workload
) -> Iterator[Answer]:
    waiting = deque(
        (number, Text(workload.vocabulary), iter(list(enumerate(session))))
        for number, session in enumerate(sessions)
    )
    asked: dict[str, _Asked] = {}
    while waiting or asked:
        while waiting and len(asked) < workload.concurrency:
            session, text, turns = waiting.popleft()
            following = next(turns, None)
            if following is None:
                continue
            place, turn = following
            prompt = text.prompt(turn)
            name = f"{phase}.{session}.{place}"
            asked[name] = _Asked(text, turns, session, turn, len(prompt), perf_counter())
            engine.submit(name, prompt, turn.output)
        if not asked:
            return
        for reply in engine.receive():
            one, now = asked[reply.request], perf_counter()
            if one.first is None and reply.tokens:
                one.first = now
            if reply.done:
                del asked[reply.request]
                if len(reply.tokens) != one.turn.output or one.first is None:
                    raise RuntimeError(
                        f"request {reply.request} has {len(reply.tokens)} tokens, expected "
                        f"{one.turn.output}"
                    )
                one.text.generated(one.turn, reply.tokens)
                waiting.append((one.session, one.text, one.turns))
                yield Answer(
                    reply.request,
                    one.prompt,
                    reply.cached,
                    reply.tokens,
                    one.first - one.begin,
                    now - one.begin,
                )
