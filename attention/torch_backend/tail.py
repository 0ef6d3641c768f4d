"""The tokens that sequences have grown by since their plan was made."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention.errors import PlanExhausted, PlanMismatch
from attention.forest import Int64Array
from attention.problem import Problem
from attention.reserve import check_reserve, grown_segments
from attention.segments import Segments
from attention.torch_backend.batches import GATHER_BYTES, MAX_QUERIES
from attention.torch_backend.groups import Gathered, Group, additive


class Tail:
    """The tokens of R rows, each a query of its own, behind what was planned.

    All rows grow together, so there are as many tokens for each: no padding and no mask.

    Attributes:
        groups: the batched calls that attend to them.
        position: int64 [R], positions of the rows' queries.
    """

    def __init__(self, problem: Problem, segments: Segments, reserve: int) -> None:
        """Begin with no token.

        Raises PlanMismatch for what `check_reserve` does not let advance.
        """
        check_reserve(problem, segments, reserve)
        self.groups: list[Group] = []
        self.position = segments.position
        self._problem = problem
        self._query = segments.query
        self._slots = np.empty((len(segments.query) if reserve else 0, reserve), np.int64)
        self._tokens = 0
        self._parts = _parts(segments) if reserve else []

    def advance(self, slots: npt.NDArray[Any] | torch.Tensor) -> None:
        """Append a token at slots[query] to each row.

        Raises:
            PlanMismatch: slots are no R integers of at least 0.
            PlanExhausted: as many tokens as were reserved are there. Nothing is changed.
        """
        reserve = self._slots.shape[1]
        if self._tokens == reserve:
            raise PlanExhausted(
                f"the plan was advanced {self._tokens} times, expected at most its reserve, "
                f"{reserve}"
            )
        slots = slots.cpu().numpy() if isinstance(slots, torch.Tensor) else slots
        if slots.shape != self._query.shape or slots.dtype.kind not in "iu":
            raise PlanMismatch(
                f"slots has shape {slots.shape} and dtype {slots.dtype}, "
                f"expected {self._query.shape} integers"
            )
        if slots.min() < 0:
            raise PlanMismatch(f"slots has {slots.min()}, expected at least 0")
        self._slots[:, self._tokens] = slots[self._query]
        self._tokens += 1
        self.position = self.position + 1
        self.groups = [group for part in self._parts for group in self._groups(*part)]

    def _groups(
        self, rows: Int64Array | None, temperature: float, log_weight: float
    ) -> list[Group]:
        """The calls for rows (None for all) whose tokens have this temperature and weight."""
        problem, tokens = self._problem, self._tokens
        slots = self._slots[:, :tokens] if rows is None else self._slots[rows, :tokens]
        first_position = self.position + 1 - tokens
        if rows is not None:
            first_position = first_position[rows]
        mask = self._mask(first_position)
        # One tensor each, of which every call takes its part.
        ids, positions = self._tensor(slots.reshape(-1)), self._tensor(first_position)
        index = None if rows is None else self._tensor(rows)
        weights = None
        if log_weight:
            weights = torch.full((len(slots),), log_weight, dtype=problem.precision)
            weights = weights.to(problem.device)
        size = max(1, min(GATHER_BYTES // (tokens * problem.token_bytes), MAX_QUERIES))
        groups = []
        for begin in range(0, len(slots), size):
            end = min(begin + size, len(slots))
            of = slice(begin, end)
            groups.append(
                Group(
                    size=end - begin,
                    queries=1,
                    tokens=tokens,
                    kv=Gathered(ids[begin * tokens : end * tokens], 1, None),
                    mask=None if mask is None else mask[of],
                    first_query=begin if index is None else None,
                    query_index=None if index is None else index[of],
                    rows=None,
                    targets=None,
                    first_position=positions[of],
                    temperature=temperature,
                    log_weight=None if weights is None else weights[of],
                )
            )
        return groups

    def _mask(self, first_position: Int64Array) -> torch.Tensor | None:
        window, tokens = self._problem.window, self._tokens
        if window is None or window >= tokens:
            return None
        token = np.arange(tokens)
        seen = token < (self._problem.sink_tokens - first_position)[:, None]
        seen |= token >= tokens - window
        return additive(self._problem, seen[:, None])

    def _tensor(self, values: Int64Array) -> torch.Tensor:
        return torch.from_numpy(values).to(self._problem.device)


def _parts(segments: Segments) -> list[tuple[Int64Array | None, float, float]]:
    """Rows that grow at the end of segments of one temperature and weight; None for all."""
    if segments.temperature is None and segments.log_weight is None:
        return [(None, 1.0, 0.0)]
    last = grown_segments(segments)
    columns = np.stack(
        [
            np.full(len(last), default) if values is None else values[last]
            for values, default in ((segments.temperature, 1.0), (segments.log_weight, 0.0))
        ]
    )
    values, part = np.unique(columns, axis=1, return_inverse=True)
    part = part.reshape(-1)
    return [
        (np.flatnonzero(part == number), float(temperature), float(log_weight))
        for number, (temperature, log_weight) in enumerate(values.T)
    ]
