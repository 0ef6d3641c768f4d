"""The plan of attention over a forest: made once a step, run once a layer."""

import html
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from attention.algebra import Partial
from attention.backends import choose
from attention.counting import tokens_per_path, tokens_read
from attention.errors import InvalidForest, PlanMismatch, UnsupportedBackend
from attention.explain import Explanation, WorkSummary, explain
from attention.forest import ForestArrays
from attention.node_sets import NodeSets
from attention.ops import handle_of
from attention.options import RunOptions
from attention.problem import Problem
from attention.reference_work import ReferenceWork
from attention.segments import FloatArray, Segments, segments_of
from attention.torch_backend import TorchWork

AnyArray = npt.NDArray[Any]


class Work(Protocol):
    """What a backend makes of segments: everything that its runs share."""

    @property
    def name(self) -> str: ...
    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: RunOptions
    ) -> Partial: ...
    def summary(self) -> WorkSummary: ...
    def advance(self, slots: AnyArray) -> None: ...
    def update(
        self,
        segments: Segments,
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None,
        log_weight: FloatArray | None,
    ) -> None:
        """Become the work on other segments; what they were made of is for backends without."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """What `attention.run` executes. Made by `attention.plan`; holds no token and no KV.

    Attributes:
        problem: heads, dimensions, dtypes, device and layout, as given to `plan`.
        num_queries: queries of all sequences together, the rows of q and of the result.
        block_size: tokens a block of the caches must hold.
        min_num_blocks: blocks the caches must have: the highest block id + 1.
        segments: what is attended to and by whom, for any backend.
        work: what the backend made of them.
        handle: int64 [1] on the CPU, what stands for the plan in a compiled graph.
    """

    problem: Problem
    num_queries: int
    block_size: int
    min_num_blocks: int
    segments: Segments = field(repr=False)
    work: Work = field(repr=False)
    handle: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", handle_of(self))

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens from the first to the last that any query sees of a segment, summed over them.

        Each once, however many sequences share it.
        """
        return tokens_read(self.problem, self.segments)

    @property
    def kv_tokens_per_path(self) -> int:
        """The same summed over the sequences: what is read where nothing is shared."""
        return tokens_per_path(self.problem, self.segments)

    @property
    def backend(self) -> str:
        """Name of the backend that runs the plan."""
        return self.work.name

    def advance(self, slots: npt.ArrayLike | torch.Tensor) -> None:
        """Go on to the next decode step: every sequence grows by a token, its query moves to it.

        The plan runs then as one made anew, in the same tensors. What it says of itself, `segments`
        and `explain`, stays that of the step it was made for.

        Args:
            slots: integers [S], slot (block * block_size + offset) of each sequence's new token.

        Raises:
            PlanMismatch: slots are no S integers of at least 0.
            PlanExhausted: the plan was advanced as often as it reserved room for.

        O(S) on the host, and one copy to a GPU.
        """
        slots = slots.cpu().numpy() if isinstance(slots, torch.Tensor) else np.asarray(slots)
        self.work.advance(slots)
        needed = int(slots.max()) // self.block_size + 1
        self._become(min_num_blocks=max(self.min_num_blocks, needed))

    def update(
        self,
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None = None,
        log_weight: FloatArray | None = None,
        *,
        num_blocks: int | None = None,
    ) -> None:
        """Plan in place for another forest of the same problem: sequences came, went or forked.

        The plan runs then as one made anew, with the reserve that it was made with; its handle
        stays. The kernels of the backend "triton" read the new plan from the tensors of the old
        one, so a CUDA graph that a run was captured in stays valid for as many queries as its q
        has, or fewer: then the first `num_queries` of q are read, and the rest of the results is
        left unset. The tensors have room for what the plan was made for and about a quarter more:
        an engine makes the plan for the largest batch that a graph is to serve. Plans are made,
        updated and advanced between replays, not while a graph is captured.

        Args:
            source, temperature, log_weight, num_blocks: see `attention.plan`.

        Raises:
            InvalidForest: the arrays of the source contradict each other or `num_blocks`.
            PlanMismatch: the block size is another one, or the plan has a reserve and a sequence
                has not one query in one place.
            PlanFull: it does not fit into the tensors of the backend "triton", or a captured run
                had fewer queries.

            The plan is left as it was.

        Host work as `attention.plan`; on a GPU in the order of the current stream.
        """
        segments, min_num_blocks = _checked(source, temperature, log_weight, num_blocks)
        if segments.block_size != self.block_size:
            raise PlanMismatch(
                f"block_size is {segments.block_size}, expected that of the plan, {self.block_size}"
            )
        self.work.update(segments, source, temperature, log_weight)
        self._become(
            num_queries=segments.num_queries,
            min_num_blocks=min_num_blocks,
            segments=segments,
        )

    def _become(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def explain(self) -> Explanation:
        """What one layer takes and what sharing is worth; `print` it."""
        return explain(self.problem, self.segments, self.backend, self.work.summary())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self.explain()))}</pre>"


def plan(
    source: ForestArrays | NodeSets,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layout: str = "NHD",
    value_head_dim: int | None = None,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    temperature: FloatArray | None = None,
    log_weight: FloatArray | None = None,
    batch_invariant: bool = False,
    reserve: int = 0,
    backend: str | None = None,
    num_blocks: int | None = None,
) -> Plan:
    """Plan the attention of a forest's queries over their paths.

    Args:
        source: the nodes and the sequences on them; see `attention.Forest`, `attention.NodeSets`.
        num_q_heads: a multiple of num_kv_heads; query head h reads KV head h // (their ratio).
        head_dim: of queries and keys.
        dtype: of q: float64, float32, bfloat16 or float16.
        device: where q and the caches are.
        layout: of the caches, "NHD" or "HND"; see `attention.run`.
        value_head_dim: of values and results, head_dim by default.
        kv_dtype: of the caches: dtype by default, or torch.float8_e4m3fn or float8_e5m2.
        window: a query at position p sees the positions > p - window only; None: no limit.
        sink_tokens: that many first positions are seen through every window; without one they
            are seen anyway.
        temperature, log_weight: floats [N]: the logits of a node's tokens are divided by the one
            and the other is added to them, so that exp(log_weight) weighs the node (1 and 0 by
            default).
        batch_invariant: the results of a sequence have the same bits whatever else is planned.
        reserve: how often the plan can be advanced; more than 0 only for sequences of one query,
            that sees all their tokens, and not for the backend "reference" or batch-invariant
            plans. New tokens have the temperature and log-weight of the node before them.
        backend: "triton" (kernels for CUDA of compute capability 8.0 and ROCm gfx9xx, or on the
            CPU under TRITON_INTERPRET=1), "torch" (torch operations, any device) or "reference"
            (float64, one query at a time, any device: what the others are held to). By default
            the kernels where the device is a GPU that has one for these arguments, else "torch".
        num_blocks: blocks of the caches, against which the source's block ids are then checked.

    Raises:
        InvalidForest: the arrays of the source contradict each other or `num_blocks`.
        PlanMismatch: an argument is outside what is said above.
        UnsupportedBackend: the backend asked for cannot run this, or there is no such device.

    Host work in O(nodes log nodes + blocks + queries of all work items), vectorised: Python loops
    over batched calls and the members of node sets only.
    """
    problem = Problem(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim if value_head_dim is None else value_head_dim,
        dtype=dtype,
        kv_dtype=dtype if kv_dtype is None else kv_dtype,
        device=_there(device),
        layout=layout,
        window=window,
        sink_tokens=sink_tokens,
        batch_invariant=batch_invariant,
    )
    chosen = choose(backend, problem)
    segments, min_num_blocks = _checked(source, temperature, log_weight, num_blocks)
    return Plan(
        problem=problem,
        num_queries=segments.num_queries,
        block_size=segments.block_size,
        min_num_blocks=min_num_blocks,
        segments=segments,
        work=_work(chosen, problem, source, segments, temperature, log_weight, reserve),
    )


def _checked(
    source: ForestArrays | NodeSets,
    temperature: FloatArray | None,
    log_weight: FloatArray | None,
    num_blocks: int | None,
) -> tuple[Segments, int]:
    """The segments, and how many blocks the caches must have for them."""
    segments = segments_of(source, temperature, log_weight)
    needed = int(segments.blocks.max()) + 1
    if num_blocks is not None and needed > num_blocks:
        raise InvalidForest(
            f"blocks has the id {needed - 1}, expected ids from 0 to below {num_blocks}"
        )
    return segments, needed


def _there(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" is the current one, and so are tensors made there."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise UnsupportedBackend(
            f"device is {device!r}, expected one that torch can use here: {error}"
        ) from error


def _work(
    backend: str,
    problem: Problem,
    source: ForestArrays | NodeSets,
    segments: Segments,
    temperature: FloatArray | None,
    log_weight: FloatArray | None,
    reserve: int,
) -> Work:
    match backend:
        case "reference":
            if reserve:
                raise PlanMismatch(f"reserve is {reserve}, expected 0 for the backend {backend!r}")
            return ReferenceWork(problem, segments, source, temperature, log_weight)
        case "triton":
            # Planning for torch needs no Triton.
            from attention.triton_backend.work import TritonWork

            return TritonWork(problem, segments, reserve)
        case _:
            return TorchWork(problem, segments, reserve)
