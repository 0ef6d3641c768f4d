"""What the Triton backend makes of segments: a schedule on the device, which can grow in place."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention.algebra import Partial
from attention.counting import pairs_seen, tokens_per_path, tokens_read
from attention.errors import PlanExhausted, PlanFull
from attention.explain import WorkSummary
from attention.options import RunOptions
from attention.problem import Problem
from attention.reserve import check_reserve
from attention.segments import Segments
from attention.triton_backend.buffers import Columns, Values
from attention.triton_backend.cost import costs, device_of, predict
from attention.triton_backend.entries import (
    EntryColumns,
    PieceColumns,
    expand_pieces,
    piece_columns,
)
from attention.triton_backend.expand import expand_on_device
from attention.triton_backend.growth import Growth
from attention.triton_backend.invariant import make_invariant_plan
from attention.triton_backend.launch import launch
from attention.triton_backend.planner import (
    MergeColumns,
    Shape,
    UnitColumns,
    UnitPlan,
    make_plan,
)
from attention.triton_backend.tiles import arch_of, tiles_for
from attention.triton_backend.units import Entries, Merges, Rows, Schedule, Units

# Programs of the segment kernel that run on a multiprocessor at once.
OCCUPANCY = 2
# From one size to the next: kernels are compiled for arguments that begin at 16 bytes.
_APART = 4

Columned = UnitColumns | MergeColumns | PieceColumns | EntryColumns


def shape_of(problem: Problem) -> Shape:
    """The shape of schedules for a problem on its device.

    Raises PlanMismatch for a problem that the kernels do not compute.
    """
    tiles = tiles_for(problem)
    processors = None
    if problem.device.type == "cuda":
        processors = torch.cuda.get_device_properties(problem.device).multi_processor_count
    device = device_of(arch_of(problem.device), processors)
    programs = max(1, device.processors * OCCUPANCY // problem.num_kv_heads)
    lean, fat = tiles.lean, tiles.fat
    if problem.batch_invariant:
        lean = fat = tiles.invariant
    return Shape(
        lean_rows=lean.rows_per_tile,
        fat_rows=fat.rows_per_tile,
        block_n=lean.block_n,
        programs=programs,
        costs=costs(problem, device),
    )


class TritonWork:
    """A schedule on the problem's device, in tensors that stay where they are.

    Attributes:
        problem: what is planned for.
        schedule: what the kernels read.
    """

    name = "triton"

    def __init__(
        self,
        problem: Problem,
        segments: Segments,
        reserve: int = 0,
        *,
        shape: Shape | None = None,
    ) -> None:
        """Plan the work on segments.

        Args:
            reserve: how often `advance` may be called before the next `update`.
            shape: of the schedule, by default that for the problem's device.

        Raises:
            PlanMismatch: the kernels do not compute the problem, or `check_reserve` does not let
                the segments advance.
        """
        check_reserve(problem, segments, reserve)
        self.problem = problem
        self._reserve = reserve
        self._captured_queries: int | None = None  # the fewest that a captured run has
        self._shape = shape_of(problem) if shape is None else shape
        self._segments = segments
        self._made = plan = self._plan(segments)
        self._growth: Growth | None = None
        self._columns = _make_columns(problem, plan)
        self._kinds = tuple(plan.units)
        self.schedule = _schedule(self._columns, self._kinds, plan)
        self._write(plan)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial:
        """Attention of all queries in the packed order: o in q's dtype, and lse."""
        if _is_captured(q):
            fewest = self._captured_queries
            self._captured_queries = len(q) if fewest is None else min(fewest, len(q))
        return launch(self.problem, self.schedule, q, k_cache, v_cache, options)

    @property
    def kv_tokens_loaded(self) -> int:
        """KV tokens that the units load, one as often as it is loaded; O(entries)."""
        tokens = np.append(0, np.cumsum(self.schedule.entries.length.cpu().numpy(), dtype=np.int64))
        loaded = 0
        for units in self.schedule.units:
            of = slice(int(units.size))
            begin, end = units.entry_begin[of].cpu().numpy(), units.entry_end[of].cpu().numpy()
            loaded += int((tokens[end] - tokens[begin]).sum())
        return loaded

    def summary(self) -> WorkSummary:
        """The units by kind of tile; predictions are those of `cost`, not tuned on hardware."""
        plan, costs = self._made, self._shape.costs
        unique = tokens_read(self.problem, self._segments)
        per_path = tokens_per_path(self.problem, self._segments)
        pairs = pairs_seen(self.problem, self._segments)
        loaded, partials = self.kv_tokens_loaded, plan.num_partials
        row_lanes = sum(
            rows_per_tile * int((units.entry_end - units.entry_begin << units.log2_width).sum())
            for rows_per_tile, units in plan.units.items()
        )
        return WorkSummary(
            units=tuple(
                (f"tiles of {rows_per_tile} rows", len(units.ordinal))
                for rows_per_tile, units in plan.units.items()
            ),
            kv_tokens_loaded=loaded,
            partials=partials,
            predicted_seconds=predict(
                costs,
                unique=unique,
                loaded=loaded,
                row_lanes=row_lanes,
                partials=partials,
                launches=len(plan.units) + (partials > 0),
            ),
            predicted_seconds_unshared=predict(
                costs,
                unique=unique,
                loaded=per_path,
                row_lanes=max(pairs, per_path * self._shape.lean_rows),
                partials=0,
                launches=1,
            ),
        )

    def update(self, segments: Segments, *_: object) -> None:
        """Plan for other segments in the same tensors.

        Raises:
            PlanMismatch: as when the work was made.
            PlanFull: they do not fit, or a captured run had fewer queries. The schedule is left
                as it was.
        """
        check_reserve(self.problem, segments, self._reserve)
        if self._captured_queries is not None and segments.num_queries > self._captured_queries:
            raise PlanFull(
                f"there are {segments.num_queries} queries, a captured run of the plan has "
                f"{self._captured_queries}"
            )
        # What has columns must be written.
        ones = np.ones(len(segments.length), np.float32)
        if self.schedule.entries.scale is not None and segments.temperature is None:
            segments = segments._replace(temperature=ones)
        if self.schedule.entries.bias is not None and segments.log_weight is None:
            segments = segments._replace(log_weight=ones - 1)
        plan = self._plan(segments)
        self._write(plan)
        self._segments, self._made = segments, plan

    def advance(self, slots: npt.NDArray[Any]) -> None:
        """Let every sequence grow by one token, and its query move on to it.

        Args:
            slots: integers [S], slot of each sequence's new token, sequences in the packed order.

        Raises:
            PlanMismatch: slots are no S integers of at least 0.
            PlanExhausted: the work has been advanced `reserve` times. It is left as it was.
        """
        # Not before a row grows: many plans of a busy engine do not live to see that.
        if self._growth is None and self._made.tails is not None:
            units = _units(self._shape.lean_rows)
            self._growth = Growth(self._made, units, self._reserve)
        if self._growth is None or self._growth.left == 0:
            raise PlanExhausted(
                f"the plan has been advanced {self._reserve} times, all that it reserved room for"
            )
        self._columns.patch(self._growth.advance(slots))

    def _plan(self, segments: Segments) -> UnitPlan:
        if self.problem.batch_invariant:
            return make_invariant_plan(self.problem, segments, self._shape)
        return make_plan(self.problem, segments, self._shape, self._reserve)

    def _write(self, plan: UnitPlan) -> None:
        """Write a plan to the columns, or raise PlanFull and change nothing."""
        columns, segments = self._columns, plan.segments
        if not set(plan.units) <= set(self._kinds):
            raise PlanFull(
                f"tiles of {max(plan.units)} and {min(plan.units)} rows are needed, the plan has "
                f"room for those of {self._kinds}"
            )
        if plan.num_partials > self.schedule.num_partials:
            raise PlanFull(
                f"{plan.num_partials} partial results are to be merged, the plan has room for "
                f"{self.schedule.num_partials}"
            )
        values: dict[str, Values] = {
            "rows.query": segments.query,
            "rows.position": segments.position,
            "rows.partial": plan.partial,
            **_named("merges", plan.merges),
        }
        sizes = []
        for kind in self._kinds:
            units = plan.units.get(kind)
            values |= {} if units is None else _named(_units(kind), units)
            sizes.append(0 if units is None else len(units.ordinal))
        values["sizes"] = apart = np.zeros((len(sizes) + 1) * _APART, np.int32)
        apart[::_APART] = [*sizes, len(plan.merges.query)]
        pieces = piece_columns(segments, plan.pieces)
        columns.check(dict.fromkeys(_entry_names(segments), plan.num_entries))
        on_gpu = "pieces.entry" in columns
        if on_gpu:
            values |= _named("pieces", pieces) | {"blocks": segments.blocks}
        columns.write(values)
        if self.problem.batch_invariant:
            # No piece has the entries that are left empty between pieces.
            self.schedule.entries.length.zero_()
        if on_gpu and len(pieces.entry):
            expand_on_device(
                {
                    **{name: columns[f"pieces.{name}"] for name in PieceColumns._fields[:-2]},
                    "scale": _floats(columns, "pieces.scale"),
                    "bias": _floats(columns, "pieces.bias"),
                },
                len(pieces.entry),
                columns["blocks"],
                segments.block_size,
                self.schedule.entries,
                plan.num_entries,
            )
        elif not on_gpu:
            entries = expand_pieces(pieces, segments.blocks, segments.block_size)
            place, *_ = entries
            columns.patch(
                [
                    (name, place, column)
                    for name, column in _named("entries", entries).items()
                    if name != "entries.place"
                ]
            )
        self._growth = None


def _make_columns(problem: Problem, plan: UnitPlan) -> Columns:
    """Columns for a plan, with room for others that are somewhat larger."""
    segments, pieces = plan.segments, plan.pieces
    weights = _weights(segments)
    staged: list[tuple[str, tuple[str, ...], int]] = [("rows", Rows._fields, len(segments.query))]
    for kind, units in plan.units.items():
        staged.append((_units(kind), UnitColumns._fields, len(units.ordinal)))
    staged.append(("merges", MergeColumns._fields, len(plan.merges.query)))
    if problem.device.type != "cpu":
        staged.append(("pieces", (*PieceColumns._fields[:-2], *weights), len(pieces.entry)))
    capacity = {"sizes": (len(plan.units) + 1) * _APART}
    for prefix, names, size in staged:
        capacity |= dict.fromkeys([f"{prefix}.{name}" for name in names], _with_room(size))
    if problem.device.type != "cpu":
        capacity |= {"blocks": _with_room(len(segments.blocks))}
    entries = dict.fromkeys(_entry_names(segments), _with_room(plan.num_entries))
    return Columns(capacity | entries, len(capacity), problem.device)


def _schedule(columns: Columns, kinds: tuple[int, ...], plan: UnitPlan) -> Schedule:
    def required(prefix: str, *names: str) -> dict[str, torch.Tensor]:
        return {name: columns[f"{prefix}.{name}"] for name in names}

    sizes = columns["sizes"]
    *unit_sizes, num_merges = (sizes[_APART * i :][:1] for i in range(len(kinds) + 1))
    return Schedule(
        rows=Rows(**required("rows", *Rows._fields)),
        entries=Entries(
            **required("entries", *Entries._fields[:5]),
            scale=_floats(columns, "entries.scale"),
            bias=_floats(columns, "entries.bias"),
        ),
        units=tuple(
            Units(size=size, **required(_units(kind), *UnitColumns._fields), rows_per_tile=kind)
            for kind, size in zip(kinds, unit_sizes, strict=True)
        ),
        merges=Merges(size=num_merges, **required("merges", *MergeColumns._fields)),
        num_partials=_with_room(plan.num_partials),
    )


def _floats(columns: Columns, name: str) -> torch.Tensor | None:
    return columns[name].view(torch.float32) if name in columns else None


def _weights(segments: Segments) -> list[str]:
    """The columns of weights that there are."""
    weights = {"scale": segments.temperature, "bias": segments.log_weight}
    return [name for name, values in weights.items() if values is not None]


def _entry_names(segments: Segments) -> list[str]:
    return [f"entries.{name}" for name in (*Entries._fields[:5], *_weights(segments))]


def _named(prefix: str, columns: Columned) -> dict[str, Values]:
    """The columns of a named tuple that are there, by the names that they have in the buffer."""
    return {
        f"{prefix}.{name}": column
        for name, column in zip(columns._fields, columns, strict=True)
        if column is not None
    }


def _units(rows_per_tile: int) -> str:
    return f"units of {rows_per_tile} rows"


def _is_captured(q: torch.Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _with_room(size: int) -> int:
    """A quarter more, so that a batch may change a little without new tensors."""
    return size + size // 4 + -(size + size // 4) % 64
