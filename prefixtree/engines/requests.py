"""What the engine keeps of a request, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefixtree.columns import Int32s
from prefixtree.engines.sampling import STREAM, SamplingParams, streams
from prefixtree.sequence import Sequence

FinishReason: TypeAlias = Literal["stop", "length", "out_of_blocks", "aborted"]

# A running sample: its random stream, its newest token (whose KV is not computed yet), the
# position of that token, and how many more may follow it.
ROW = np.dtype([*STREAM.descr, ("token", "i8"), ("position", "i8"), ("remaining", "i8")])


class Event(NamedTuple):
    """A new token of a sample, the end of a sample, or both at once.

    finish_reason: None but in the last event of a sample: "stop" (`token` is a stop token),
    "length" (max_new_tokens, or the last position of the model), "out_of_blocks" (not one more
    token fits into the whole cache) or "aborted", the last two with `token` None.
    """

    request_id: int
    sample: int
    token: int | None
    finish_reason: FinishReason | None


class Completion(NamedTuple):
    """All tokens of a sample, a stop token included."""

    tokens: list[int]
    finish_reason: FinishReason


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and how to continue it."""

    id: int
    prompt: Int32s
    params: SamplingParams
    max_new_tokens: int
    """params.max_new_tokens, or fewer where the model has no more positions."""
    unfinished: set[int] = field(init=False)
    """The samples whose last event is still to come."""

    def __post_init__(self) -> None:
        self.unfinished = set(range(self.params.n))


class Continuation(NamedTuple):
    """Tokens, and the samples of a request that go on behind them.

    All samples and the prompt at first; one sample and its whole text after a preemption.
    """

    request: Request
    tokens: Int32s
    samples: list[int]

    def rows(self) -> NDArray[np.void]:
        """A row of ROW for each sample, for its next token, which is not known yet."""
        rows = np.zeros(len(self.samples), ROW)
        random = streams(self.request.params, self.samples)
        for name in STREAM.names or ():
            rows[name] = random[name]
        rows["position"] = len(self.tokens)
        generated = len(self.tokens) - len(self.request.prompt)
        rows["remaining"] = self.request.max_new_tokens - generated
        return rows


class Prefill(NamedTuple):
    """A continuation whose tokens are being computed."""

    work: Continuation
    sequence: Sequence

    @property
    def start(self) -> int:
        """Position of the first token to compute: at most the last one, for its logits."""
        return min(self.sequence.committed, len(self.work.tokens) - 1)

    @property
    def todo(self) -> int:
        """Tokens still to compute, at least 1."""
        return len(self.work.tokens) - self.start
