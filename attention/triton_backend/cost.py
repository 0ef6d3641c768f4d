"""What units cost on a GPU: a roofline with few constants, to choose between plans, not to time.

Bandwidths and matrix rates are the vendors' peak figures; what a partial result and a second launch
cost follows from the bytes that they move and from launch latencies that are commonly measured.
None of it is tuned on hardware.
"""

from typing import NamedTuple

from attention.problem import Problem


class Device(NamedTuple):
    """What a kernel runs on.

    Attributes:
        bytes_per_us: bandwidth of the memory.
        l2_bytes_per_us: bandwidth of the second-level cache.
        flops_per_us: dense rate of 16-bit matrix products.
        launch_us: least time of a kernel among others.
        processors: streaming multiprocessors (compute units).
    """

    bytes_per_us: float
    l2_bytes_per_us: float
    flops_per_us: float
    launch_us: float
    processors: int


# Memory and matrix rates: NVIDIA A100, H100 SXM and B200 and AMD MI300X and MI355X data sheets. The
# second-level caches of A100 and H100 were measured at about 2 to 2.5 times the memory's rate.
_DEVICES = {
    "sm_80": Device(2.0e6, 4.5e6, 312e6, 2.5, 108),
    "sm_90": Device(3.35e6, 7.0e6, 990e6, 2.5, 132),
    "sm_100": Device(8.0e6, 14.0e6, 2250e6, 2.5, 148),
    "gfx942": Device(5.3e6, 10.0e6, 1300e6, 4.0, 304),
    "gfx950": Device(8.0e6, 12.0e6, 2500e6, 4.0, 256),
}


def device_of(arch: str, processors: int | None = None) -> Device:
    """The constants of an architecture, those of sm_90 if it is not known.

    Args:
        processors: how many there really are; of the full chip by default.
    """
    device = _DEVICES.get(arch, _DEVICES["sm_90"])
    return device if processors is None else device._replace(processors=processors)


class Costs(NamedTuple):
    """Microseconds of the device as a whole, of one layer.

    Attributes:
        load: to load a token's K and V from memory, all heads.
        reload: to load it from the second-level cache.
        pair: to compute one query row on one token, all heads.
        partial: to write a row's partial result and to read it for the merge.
        launch: of one kernel more.
    """

    load: float
    reload: float
    pair: float
    partial: float
    launch: float


def costs(problem: Problem, device: Device) -> Costs:
    """The costs of a problem's units on a device."""
    partial_bytes = problem.num_q_heads * (problem.value_head_dim + 1) * problem.precision.itemsize
    return Costs(
        load=problem.token_bytes / device.bytes_per_us,
        reload=problem.token_bytes / device.l2_bytes_per_us,
        pair=problem.pair_flops / device.flops_per_us,
        # Written, then read soon after: most of it does not leave the cache.
        partial=2 * partial_bytes / device.l2_bytes_per_us,
        launch=device.launch_us,
    )


def predict(
    costs: Costs,
    *,
    unique: int,
    loaded: int,
    row_lanes: int,
    partials: int,
    launches: int,
) -> float:
    """Seconds of one layer: what takes longer, memory or arithmetic, and what comes on top.

    Args:
        unique: KV tokens that are loaded at all; the first time each comes from memory.
        loaded: KV tokens loaded, one as often as it is.
        row_lanes: rows of tiles times lanes of units, padding included.
        partials: results that are written to be merged.
        launches: kernels.
    """
    memory = unique * costs.load + max(loaded - unique, 0) * costs.reload
    busy = max(memory, row_lanes * costs.pair) + partials * costs.partial
    return (busy + launches * costs.launch) * 1e-6
