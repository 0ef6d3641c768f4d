"""torch's flex_attention over the whole forest at once, compiled."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prefixtree.bench.contenders import MOST_COPIED, Unavailable
from prefixtree.bench.inputs import Inputs
from prefixtree.bench.trees import node_slots, path_nodes


class Allowance:
    """Seconds that compiling may take, over all shapes of a run."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    @contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """Raises Unavailable when no time is left, and in the middle when it runs out.

        Only the main thread can be interrupted; in another, what was begun is finished.
        """
        if self.left <= 0:
            raise Unavailable(f"the time for {what} is used up")
        began = time.perf_counter()
        try:
            with _interrupted_after(self.left, f"{what} took too long"):
                yield
        finally:
            self.left -= time.perf_counter() - began


class Flex:
    """Every query against every slot of the caches, under a mask of what its path holds."""

    name: ClassVar[str] = "flex_attention"
    plans: ClassVar[bool] = True

    def __init__(self, inputs: Inputs, allowance: Allowance) -> None:
        num_slots = inputs.k_cache.shape[0] * inputs.k_cache.shape[1]
        # The mask is made as booleans, with larger numbers on the way.
        if 8 * inputs.num_sequences * num_slots > MOST_COPIED[inputs.device.type]:
            raise Unavailable("its mask would be too large")
        self.q, self.grouped = inputs.q, inputs.shape.num_q_heads != inputs.shape.num_kv_heads
        self.k, self.v = (rows.transpose(0, 1)[None] for rows in inputs.slot_rows())
        order, begin, end = _row_ranges(inputs)
        self.order = inputs.indices(order)
        self.place = inputs.indices(np.argsort(order))
        self.begin, self.end = inputs.indices(begin), inputs.indices(end)
        with allowance.spend("compiling flex_attention"):
            # Each shape is compiled for itself: with sizes left open the kernels are slower.
            torch._dynamo.reset()
            self.attend: Any = torch.compile(flex_attention, dynamic=False)
            self.plan()
            self.run()

    def plan(self) -> None:
        begin, end = self.begin, self.end

        def seen(
            _: torch.Tensor, __: torch.Tensor, row: torch.Tensor, slot: torch.Tensor
        ) -> torch.Tensor:
            return (begin[slot] <= row) & (row < end[slot])

        rows, slots = len(self.order), self.k.shape[2]
        self.mask = create_block_mask(seen, None, None, rows, slots, device=self.q.device.type)

    def run(self) -> torch.Tensor:
        q = self.q[self.order].transpose(0, 1)[None]
        out = self.attend(q, self.k, self.v, block_mask=self.mask, enable_gqa=self.grouped)
        result: torch.Tensor = out[0].transpose(0, 1)[self.place]
        return result


def _row_ranges(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Sequences in depth-first order, and for each slot the range of them that sees it."""
    forest = inputs.forest
    table = path_nodes(forest)
    order = np.lexsort(table[::-1])
    num_nodes, rows = len(forest.parent), np.arange(len(order))
    begin, end = np.full(num_nodes + 1, len(order)), np.zeros(num_nodes + 1, np.int64)
    for path_node in table[:, order]:
        np.minimum.at(begin, path_node, rows)
        np.maximum.at(end, path_node, rows + 1)
    by_slot = np.zeros((2, inputs.k_cache.shape[0] * forest.block_size), np.int64)
    slots = np.concatenate(node_slots(forest))
    by_slot[:, slots] = np.repeat([begin[:-1], end[:-1]], forest.length, axis=1)
    return order, *by_slot


@contextmanager
def _interrupted_after(seconds: float, reason: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise Unavailable(reason)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
