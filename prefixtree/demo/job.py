"""What both ways of generating are given, what they give back, and how the two are compared."""

from dataclasses import dataclass
from itertools import zip_longest

from prefixtree.engines.sampling import SamplingParams


@dataclass(frozen=True)
class Job:
    """Prompts as token ids; prompt i is continued by `params[i].n` samples."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(problem, sample) of every sequence, problems outermost."""
        return [(i, s) for i, params in enumerate(self.params) for s in range(params.n)]


@dataclass(frozen=True)
class Outcome:
    """One run of a job.

    tokens[problem][sample]: the new token ids, a stop token included.
    tokens_computed: token positions that went through the model.
    kv_bytes: memory of the KV cache at its largest.
    seconds: wall-clock time.
    """

    tokens: list[list[list[int]]]
    tokens_computed: int
    kv_bytes: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """The first place where two outcomes differ; a token is None where a sample had ended."""

    problem: int
    sample: int
    position: int
    expected: int | None
    actual: int | None


def tokens_asked(job: Job, outcome: Outcome) -> int:
    """Token positions of all sequences as if each were computed alone.

    The last new token of a sequence is given back without a pass through the model.
    """
    return sum(
        len(prompt) + len(sample) - 1
        for prompt, samples in zip(job.prompts, outcome.tokens, strict=True)
        for sample in samples
    )


def first_difference(expected: Outcome, actual: Outcome) -> Difference | None:
    """None when all tokens agree. Both outcomes are of the same job."""
    for problem, samples in enumerate(zip(expected.tokens, actual.tokens, strict=True)):
        for sample, pair in enumerate(zip(*samples, strict=True)):
            for position, (want, got) in enumerate(zip_longest(*pair)):
                if want != got:
                    return Difference(problem, sample, position, want, got)
    return None


def agreement(expected: Outcome, actual: Outcome) -> tuple[int, int]:
    """(positions at which both have the same token, positions at which either has one)."""
    pairs = [
        pair
        for samples in zip(expected.tokens, actual.tokens, strict=True)
        for both in zip(*samples, strict=True)
        for pair in zip_longest(*both)
    ]
    return sum(want == got for want, got in pairs), len(pairs)
