"""Compiles variants of the kernels for an architecture and prints what the compiler says of them.

    python -m tests.attention.compiling sm_90

One JSON object a variant. A process of its own: in that of the other tests Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from attention.algebra import Partial
from attention.options import RunOptions
from attention.problem import Problem
from attention.triton_backend.compile import compile_for
from attention.triton_backend.entries import PieceColumns
from attention.triton_backend.expand import arguments_of as expand_arguments
from attention.triton_backend.expand import expand_kernel
from attention.triton_backend.launch import merge_arguments, segment_arguments
from attention.triton_backend.merge import merge
from attention.triton_backend.segment import segment
from attention.triton_backend.tiles import tiles_for
from attention.triton_backend.units import Entries, Merges, Rows, Schedule, Units
from attention.triton_backend.write import arguments_of, write_kernel

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Each option of the kernels in some variant, not each with each.
VARIANTS: dict[str, dict[str, Any]] = {
    "lean": {"tile": "lean"},
    "fat": {"tile": "fat"},
    "latent": {"tile": "fat", "heads": (16, 1), "dims": (576, 512)},
    "everything": {
        "tile": "lean",
        "heads": (6, 2),
        "dims": (96, 80),
        "dtype": F16,
        "kv_dtype": E4M3,
        "layout": "HND",
        "window": 100,
        "options": True,
    },
    "float32": {"tile": "lean", "dtype": F32, "kv_dtype": E5M2},
}


def compiled(
    arch: str,
    tile: str,
    heads: tuple[int, int] = (32, 8),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    window: int | None = None,
    options: bool = False,
) -> tuple[Any, Any]:
    """The segment kernel and the merge kernel of a problem."""
    problem = Problem(
        *heads, *dims, dtype, kv_dtype or dtype, torch.device("cpu"), layout, window, 4, False
    )
    column, number = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    units = Units(*[column] * 8, getattr(tiles_for(problem, arch), tile).rows_per_tile)
    weights = number if options else None
    schedule = Schedule(
        Rows(*[column] * 3),
        Entries(*[column] * 5, weights, weights),
        (units,),
        Merges(*[column] * 4),
        16,
    )
    inner = (16, heads[1]) if layout == "NHD" else (heads[1], 16)
    keys = torch.zeros(4, *inner, dims[0], dtype=problem.kv_dtype)
    values = torch.zeros(4, *inner, dims[1], dtype=problem.kv_dtype)
    if dims == (576, 512):
        values = keys[..., :512]
    q = torch.zeros(4, heads[0], dims[0], dtype=dtype)
    result, parts = Partial(q, number), Partial(number, number)
    run_options = (
        RunOptions(1.0, 30.0, number, number, number)
        if options
        else RunOptions(1.0, None, None, None, None)
    )
    return (
        compile_for(
            arch,
            segment,
            segment_arguments(
                problem, schedule, units, q, keys, values, result, parts, run_options, arch
            ),
        ),
        compile_for(arch, merge, merge_arguments(problem, schedule, result, parts)),
    )


def compiled_write(arch: str, cache_dtype: torch.dtype) -> Any:
    """The kernel that writes K and V of new tokens."""
    k = torch.zeros(4, 8, 128, dtype=BF16)
    cache = torch.zeros(2, 16, 8, 128, dtype=BF16).to(cache_dtype)
    scale = None if cache_dtype == BF16 else torch.ones(8)
    slots = torch.zeros(4, dtype=torch.int32)
    return compile_for(arch, write_kernel, arguments_of(k, k, cache, cache, slots, scale, scale))


def compiled_expand(arch: str, *, weighted: bool) -> Any:
    """The kernel that writes the entries of pieces."""
    column = torch.zeros(16, dtype=torch.int32)
    weights = {"scale": torch.zeros(16), "bias": torch.zeros(16)} if weighted else {}
    pieces = dict.fromkeys(PieceColumns._fields[:9], column) | weights
    entries = Entries(*[column] * 5, weights.get("scale"), weights.get("bias"))
    return compile_for(arch, expand_kernel, expand_arguments(pieces, 3, column, 16, entries, 9))


def report(kernel: Any) -> dict[str, int]:
    """Shared memory, stack or spilled registers, and how matrices are multiplied and loaded.

    ahead: most groups of copies that a wait leaves in flight, 0 if none is loaded ahead.
    """
    found = {"shared": kernel.metadata.shared}
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", code)
        assert spilled
        return found | {"stack": int(spilled[1]), "matrix": len(re.findall("v_mfma", code))}
    code = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack
    return found | {
        "stack": int(stack[1]),
        "matrix": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", code)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", code)),
        "copies": len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10, ", code)),
        "ahead": max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", code)), default=0),
    }


def main(arch: str) -> None:
    for name, variant in VARIANTS.items():
        of_segment, of_merge = (report(kernel) for kernel in compiled(arch, **variant))
        print(json.dumps({"variant": name, "segment": of_segment, "merge": of_merge}), flush=True)
    for dtype in (BF16, E4M3, E5M2):
        found = report(compiled_write(arch, dtype))
        print(json.dumps({"variant": f"write {dtype}", "write": found}), flush=True)
    for weighted in (False, True):
        found = report(compiled_expand(arch, weighted=weighted))
        print(json.dumps({"variant": f"expand {weighted}", "expand": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
