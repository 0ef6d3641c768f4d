"""The benchmark of attention: what is measured, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefixtree.bench import attention_report, report
from prefixtree.bench.clocks import Ceilings, TensorClock, measure_ceilings
from prefixtree.bench.compare import Measured, geometric_means, makers_for, measure_shapes
from prefixtree.bench.measure import Rounds
from prefixtree.bench.shapes import Shape, UnknownSuite, shapes_of
from prefixtree.bench.usable import UnusableInput, require_writable, write_figures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIXES_OF_QUICK = (" + 0", " + 128", " + 512")


def device_named(name: str) -> torch.device:
    """Raises UnusableInput where torch has no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UnusableInput("--device cuda: torch sees no CUDA device")
    return torch.device(name)


def dtype_named(name: str | None, device: torch.device) -> torch.dtype:
    """bfloat16 on a CUDA device, float32 on a CPU, unless it is named."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def chosen_shapes(
    suites: Sequence[str], limit_mb: float, itemsize: int, *, quick: bool
) -> list[Shape]:
    """The shapes of these suites whose paths together have at most `limit_mb` MB of KV.

    `quick`: of Hydragen's suffixes only a few. Raises UnusableInput when there are no such shapes.
    """
    try:
        shapes = shapes_of(suites)
    except UnknownSuite as error:
        raise UnusableInput(f"--shapes: {error}") from None
    fitting = [shape for shape in shapes if shape.path_bytes(itemsize) <= limit_mb * 1e6]
    if quick:
        fitting = [
            s for s in fitting if s.suite != "hydragen" or s.name.endswith(SUFFIXES_OF_QUICK)
        ]
    if not fitting:
        least = min(shape.path_bytes(itemsize) for shape in shapes) / 1e6
        raise UnusableInput(f"--limit {limit_mb:g}: the smallest of the shapes has {least:.0f} MB")
    return fitting


def measure_attention(
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    clock: TensorClock,
    rounds: Rounds,
    flex_seconds: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> bool:
    """Measures every shape, prints a table, writes the files asked for. Whether ours always ran.

    Raises UnusableInput for files that cannot be written.
    """
    require_writable(json_file, plot_file)
    ceilings = measure_ceilings(device, dtype, clock)
    print(attention_report.heading(device, dtype, ceilings), flush=True)
    makers = makers_for(device, flex_seconds)
    running = measure_shapes(shapes, makers, clock, rounds, dtype, device)
    measured = list(tqdm(running, total=len(shapes), unit=" shapes", leave=False))
    print(attention_report.table(measured, ceilings))
    print("\n" + attention_report.summary(measured, ceilings))
    write_figures(json_file, figures(measured, ceilings, device, dtype))
    if plot_file is not None:
        attention_report.plot(measured, ceilings, plot_file)
    return not any(one.failed for one in measured)


def figures(
    measured: Sequence[Measured],
    ceilings: Ceilings | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything measured, for a JSON file; shapes only where the ceilings are known."""
    return {
        **report.machine(),
        **attention_report.setting(device, dtype),
        "ceilings": None if ceilings is None else ceilings._asdict(),
        "shapes": [] if ceilings is None else [one.record(ceilings) for one in measured],
        "geometric_mean": geometric_means(measured),
    }
