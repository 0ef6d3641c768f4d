"""How long a call on tensors takes, on the host or on a CUDA device; and what the device can do."""

from __future__ import annotations

import platform
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

from attention.torch_backend.products import HAS_OPERATOR, product
from prefixtree.bench.measure import CLOCKS, Clock

Run = Callable[[], object]


class TensorClock(Protocol):
    def ready(self, run: Run) -> tuple[Run, bool]:
        """The call warmed up and as it is to be timed, and whether it became a captured graph."""

    def time(self, run: Run) -> float:
        """Milliseconds of one call, its inputs not in the device's cache."""


class HostClock:
    """By a clock of the host. The processor's caches hold what they happen to hold."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def ready(self, run: Run) -> tuple[Run, bool]:
        run()
        return run, False

    def time(self, run: Run) -> float:
        began = self._clock()
        run()
        return (self._clock() - began) / 1e6


class CudaClock:
    """Time between events around a graph's replay, right after the L2 cache was overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        event: Any = torch.cuda.Event
        self._events = event(enable_timing=True), event(enable_timing=True)
        self._flushing = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def ready(self, run: Run) -> tuple[Run, bool]:
        """What cannot be captured is timed as it is, launches and all."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            return run, False
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph.replay, True

    def time(self, run: Run) -> float:
        begin, end = self._events
        self._flushing.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def clock_of(device: torch.device, name: str = "wall") -> TensorClock:
    """The device's own clock, or for the CPU one of `CLOCKS`."""
    return CudaClock(device) if device.type == "cuda" else HostClock(CLOCKS[name])


class Ceilings(NamedTuple):
    """What the device reached in the same run; nothing that moves or multiplies goes much faster.

    Attributes:
        bytes_per_s: of a large copy, bytes read and bytes written.
        flops_per_s: of a large matrix product in the dtype of the attention.
    """

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        """The least time for so many bytes and operations."""
        return 1e3 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    clock: TensorClock,
    *,
    copied: int | None = None,
    side: int | None = None,
) -> Ceilings:
    """Medians of five copies of `copied` bytes and of five products of matrices side x side.

    Where a processor has no arithmetic for the dtype, float32 is the faster way to compute in it;
    of torch's own product and oneDNN's, the faster one counts.
    """
    on_cuda = device.type == "cuda"
    copied = copied or (2 << 30 if on_cuda else 256 << 20)
    side = side or (8192 if on_cuda else 768)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(clock, lambda: target.copy_(source))
    multiply_ms = [_multiply_ms(clock, device, dtype, side)]
    if not on_cuda and dtype != torch.float32:
        multiply_ms.append(_multiply_ms(clock, device, torch.float32, side))
    if not on_cuda and HAS_OPERATOR:
        a, b = torch.randn(2, side, side)
        multiply_ms.append(_median_ms(clock, lambda: product(a, b)))
    return Ceilings(2e3 * source.nbytes / copy_ms, 2e3 * side**3 / min(multiply_ms))


def _multiply_ms(clock: TensorClock, device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return _median_ms(clock, lambda: torch.mm(a, b.T))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _median_ms(clock: TensorClock, run: Run) -> float:
    run, _ = clock.ready(run)
    return median(clock.time(run) for _ in range(5))
