"""The tokens that sequences have grown by since their plan was made."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from attention.errors import PlanExhausted, PlanMismatch
from attention.forest import Int64Array
from attention.problem import Problem
from attention.reserve import check_reserve, grown_segments
from attention.segments import Segments
from attention.torch_backend.batches import GATHER_BYTES, most_queries
from attention.torch_backend.groups import Gathered, Group, additive


class _Part(NamedTuple):
    """R' rows whose new tokens have one temperature and weight.

    Attributes:
        query: int64 [R'], packed place of each row's query.
        slots: int64 [reserve, R'], of the new tokens, those of one step side by side.
        ids: the same on the device; on a CPU the very same memory.
        rows: int64 [R'], None for all.
        first_position: int64 [R'], position of each row's first new token; and on the device.
        temperature: of the new tokens.
        log_weight: [R'] on the device, or None for 0.
    """

    query: Int64Array
    slots: Int64Array
    ids: torch.Tensor
    rows: torch.Tensor | None
    first_position: Int64Array
    positions: torch.Tensor
    temperature: float
    log_weight: torch.Tensor | None


class Tail:
    """The tokens of R rows, each a query of its own, behind what was planned.

    All rows grow together, so there are as many tokens for each: no padding and no mask.

    Attributes:
        position: int64 [R], positions of the rows' queries.
    """

    def __init__(self, problem: Problem, segments: Segments, reserve: int) -> None:
        """Begin with no token.

        Raises PlanMismatch for what `check_reserve` does not let advance.
        """
        check_reserve(problem, segments, reserve)
        self.position = segments.position
        self._problem = problem
        self._num_rows = len(segments.query)
        self._tokens, self._reserve = 0, reserve
        self._parts = _parts(problem, segments, reserve) if reserve else []
        self._groups: list[Group] | None = []

    @property
    def groups(self) -> list[Group]:
        """The batched calls that attend to them, made by the first run of a step."""
        if self._groups is None:
            self._groups = [group for part in self._parts for group in self._groups_of(part)]
        return self._groups

    def advance(self, slots: npt.NDArray[Any] | torch.Tensor) -> None:
        """Append a token at slots[query] to each row.

        Raises:
            PlanMismatch: slots are no R integers of at least 0.
            PlanExhausted: as many tokens as were reserved are there. Nothing is changed.
        """
        if self._tokens == self._reserve:
            raise PlanExhausted(
                f"the plan was advanced {self._tokens} times, expected at most its reserve, "
                f"{self._reserve}"
            )
        slots = slots.cpu().numpy() if isinstance(slots, torch.Tensor) else slots
        if slots.shape != (self._num_rows,) or slots.dtype.kind not in "iu":
            raise PlanMismatch(
                f"slots has shape {slots.shape} and dtype {slots.dtype}, "
                f"expected {(self._num_rows,)} integers"
            )
        if slots.min() < 0:
            raise PlanMismatch(f"slots has {slots.min()}, expected at least 0")
        for part in self._parts:
            new = part.slots[self._tokens]
            new[:] = slots.take(part.query)
            if part.ids.device.type != "cpu":
                part.ids[self._tokens].copy_(torch.from_numpy(new))
        self._tokens += 1
        self.position = self.position + 1
        self._groups = None

    def _groups_of(self, part: _Part) -> list[Group]:
        """The calls for the rows of a part, as many rows each as a call may gather."""
        tokens, count = self._tokens, len(part.query)
        problem = self._problem
        size = max(1, min(GATHER_BYTES // (tokens * problem.token_bytes), most_queries(problem)))
        mask = self._mask(part.first_position)
        ids, weight = part.ids[:tokens].t(), part.log_weight
        groups = []
        for begin in range(0, count, size):
            end = min(begin + size, count)
            of = slice(begin, end)
            groups.append(
                Group(
                    size=end - begin,
                    queries=1,
                    tokens=tokens,
                    kv=Gathered(ids[of], 1, None, {}),
                    positions=part.positions,
                    item=begin,
                    temperature=part.temperature,
                    log_weight=None if weight is None else weight[of],
                    first_query=begin if part.rows is None else None,
                    query_index=None if part.rows is None else part.rows[of],
                    mask=None if mask is None else mask[of],
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


def _parts(problem: Problem, segments: Segments, reserve: int) -> list[_Part]:
    """The rows by temperature and weight of the segments that they grow at the end of."""
    if segments.temperature is None and segments.log_weight is None:
        return [_part(problem, segments, reserve, None, 1.0, 0.0)]
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
        _part(problem, segments, reserve, np.flatnonzero(part == number), *map(float, weights))
        for number, weights in enumerate(values.T)
    ]


def _part(
    problem: Problem,
    segments: Segments,
    reserve: int,
    rows: Int64Array | None,
    temperature: float,
    log_weight: float,
) -> _Part:
    device = problem.device
    query, first_position = segments.query, segments.position + 1
    if rows is not None:
        query, first_position = query.take(rows), first_position.take(rows)
    slots = np.empty((reserve, len(query)), np.int64)
    weight = None
    if log_weight:
        weight = torch.full((len(query),), log_weight, dtype=problem.precision).to(device)
    return _Part(
        query=query,
        slots=slots,
        ids=torch.from_numpy(slots).to(device),
        rows=None if rows is None else torch.from_numpy(rows).to(device),
        first_position=first_position,
        positions=torch.from_numpy(first_position).to(device),
        temperature=temperature,
        log_weight=weight,
    )
