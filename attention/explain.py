"""What a plan reads and computes, what sharing is worth, and why."""

from collections.abc import Sequence
from typing import NamedTuple

from attention.counting import num_sequences, pairs_seen, tokens_per_path, tokens_read
from attention.problem import Problem
from attention.segments import Segments


class WorkSummary(NamedTuple):
    """What a backend says of its work for one layer; the `summary()` of every `Work`.

    Attributes:
        units: what the work was cut into, as pairs of a label ("lean tiles", "batched calls") and
            how many of them.
        kv_tokens_loaded: KV tokens that the units load, one as often as it is loaded.
        partials: (query, unit) results that are written to be merged later; 0 if none is.
        predicted_seconds: of one layer by the backend's cost model, None where it has none.
        predicted_seconds_unshared: the same where every path is read by itself, with the same
            backend.
    """

    units: Sequence[tuple[str, int]]
    kv_tokens_loaded: int
    partials: int
    predicted_seconds: float | None = None
    predicted_seconds_unshared: float | None = None


class Explanation(NamedTuple):
    """What one layer under a plan takes; `str()` prints it as a table.

    Attributes:
        backend: who runs the plan.
        problem: heads, dimensions and dtypes.
        sequences, queries, segments: how many are planned for.
        kv_tokens_unique: KV tokens that queries see, each once (with those between two such).
        kv_tokens_per_path: the same, each once for every sequence that sees it.
        flops: floating-point operations of both products over all pairs of a query and a token
            that it sees.
        work: what the backend made of it.
    """

    backend: str
    problem: Problem
    sequences: int
    queries: int
    segments: int
    kv_tokens_unique: int
    kv_tokens_per_path: int
    flops: int
    work: WorkSummary

    @property
    def kv_bytes_unique(self) -> int:
        """Bytes of K and V of the unique tokens."""
        return self.kv_tokens_unique * self.problem.token_bytes

    @property
    def kv_bytes_loaded(self) -> int:
        """Bytes of K and V that the units load."""
        return self.work.kv_tokens_loaded * self.problem.token_bytes

    @property
    def kv_bytes_per_path(self) -> int:
        """Bytes of K and V where every path is read by itself."""
        return self.kv_tokens_per_path * self.problem.token_bytes

    @property
    def sharing(self) -> float:
        """How many sequences see a token, on average over the unique tokens."""
        return self.kv_tokens_per_path / max(self.kv_tokens_unique, 1)

    @property
    def predicted_gain(self) -> float | None:
        """How many times as fast as path by path the plan is predicted to be, if it is."""
        shared, alone = self.work.predicted_seconds, self.work.predicted_seconds_unshared
        return None if shared is None or alone is None else alone / shared

    @property
    def reason(self) -> str:
        """Why there is a gain from sharing or none, in one sentence."""
        per_path, loaded = self.kv_tokens_per_path, self.work.kv_tokens_loaded
        if self.kv_tokens_unique == per_path:
            return "No two sequences see the same token, so sharing has nothing to gain."
        if loaded >= per_path:
            return (
                f"A token is seen by {self.sharing:.1f} sequences on average, but to read it once "
                "for all would cost more than it saves, so every path is read by itself."
            )
        fewer = f"the plan loads {per_path / max(loaded, 1):.1f} times fewer KV tokens"
        gain = self.predicted_gain
        if gain is None:
            return f"Sequences share tokens, and {fewer} than path by path."
        if gain < _WORTHWHILE:
            return (
                f"Although {fewer} than path by path, no gain is predicted: operations, partials "
                "or launches take the time, not the KV."
            )
        return f"Because {fewer} than path by path, it is predicted to be {gain:.1f} times as fast."

    def __str__(self) -> str:
        problem, work = self.problem, self.work
        rows = [
            ("backend", self.backend),
            (
                "problem",
                f"{problem.num_q_heads}/{problem.num_kv_heads} heads, head_dim "
                f"{problem.head_dim}/{problem.value_head_dim}, {_name(problem.dtype)}, "
                f"KV {_name(problem.kv_dtype)} {problem.layout}",
            ),
            ("sequences", f"{self.sequences:,} with {self.queries:,} queries"),
            ("segments", f"{self.segments:,}"),
            ("KV unique", _tokens(self.kv_tokens_unique, self.kv_bytes_unique)),
            ("KV loaded", _tokens(work.kv_tokens_loaded, self.kv_bytes_loaded)),
            ("KV per path", _tokens(self.kv_tokens_per_path, self.kv_bytes_per_path)),
            ("sharing", f"{self.sharing:.2f} sequences see a token"),
            ("FLOPs", _scaled(self.flops, 1000, _DECIMAL, "FLOP")),
            *((label, f"{count:,}") for label, count in work.units),
            ("partials", f"{work.partials:,}"),
        ]
        if work.predicted_seconds is not None:
            rows.append(("predicted", f"{work.predicted_seconds * 1e6:,.1f} us a layer"))
        if work.predicted_seconds_unshared is not None:
            alone = work.predicted_seconds_unshared
            rows.append(("path by path", f"{alone * 1e6:,.1f} us a layer"))
        width = max(len(label) for label, _ in rows)
        table = [f"{label:<{width}}  {value}" for label, value in rows]
        return "\n".join((*table, self.reason))


# A predicted ratio below this is none.
_WORTHWHILE = 1.05
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
_DECIMAL = ("", "k", "M", "G", "T", "P")


def explain(problem: Problem, segments: Segments, backend: str, work: WorkSummary) -> Explanation:
    """The explanation of a plan; O(segments + runs of rows over all segments)."""
    return Explanation(
        backend=backend,
        problem=problem,
        sequences=num_sequences(segments),
        queries=segments.num_queries,
        segments=len(segments.node),
        kv_tokens_unique=tokens_read(problem, segments),
        kv_tokens_per_path=tokens_per_path(problem, segments),
        flops=pairs_seen(problem, segments) * problem.pair_flops,
        work=work,
    )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _tokens(tokens: int, size: int) -> str:
    return f"{tokens:,} tokens, {_scaled(size, 1024, _BINARY, 'B')}"


def _scaled(value: float, step: int, prefixes: Sequence[str], unit: str) -> str:
    for prefix in prefixes:
        if value < step or prefix == prefixes[-1]:
            break
        value /= step
    return f"{value:,.0f} {unit}" if not prefix else f"{value:,.1f} {prefix}{unit}"
