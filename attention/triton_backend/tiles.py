"""Shapes of the tiles that the segment kernel works with, by architecture and problem.

A program holds `block_m` rows, query rows times the query heads of a KV head, and walks its
entries `block_n` tokens at a time. Lean tiles are for KV that few rows share: they are bound by
memory, need bytes in flight, and more rows would be padding. Fat tiles are for KV that many rows
share: every row more saves one more load of the KV. Batch-invariant plans know one tile only, as
the shape decides the order of additions.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from attention.errors import PlanMismatch
from attention.problem import Problem

DEFAULT_ARCH = "sm_90"  # where there is no GPU: for schedules made on a CPU
MAX_HEADS = 64  # more query heads a KV head than this are spread over several programs
_KIB = 1024


class Tile(NamedTuple):
    """A shape, and how a program of it is run.

    Attributes:
        block_m: rows of a program: rows_per_tile query rows times `Tiles.heads`, rounded up.
        block_n: KV tokens a step.
        num_warps: warps a program.
        num_stages: depth of the pipeline of loads.
        rows_per_tile: query rows that fit.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    rows_per_tile: int


class Tiles(NamedTuple):
    """The tiles of one problem on one architecture.

    Attributes:
        heads: query heads of one KV head that a program takes.
        lean: for few rows, fat: for many; equal where the heads alone fill a fat tile.
        invariant: the only one of batch-invariant plans.
    """

    heads: int
    lean: Tile
    fat: Tile
    invariant: Tile

    def of(self, problem: Problem, rows_per_tile: int) -> Tile:
        """The smallest tile for units of so many rows.

        Raises PlanMismatch if there is none.
        """
        for tile in (self.invariant,) if problem.batch_invariant else (self.lean, self.fat):
            if rows_per_tile <= tile.rows_per_tile:
                return tile
        raise PlanMismatch(
            f"units have {rows_per_tile} rows, expected at most {tile.rows_per_tile}"
        )


class _Arch(NamedTuple):
    """What bounds a tile.

    Attributes:
        shared: bytes of shared memory that a program may have.
        fat_rows: rows of a fat tile, where its accumulators fit in registers.
        fat_tokens: tokens of a step of it, where their logits do, too.
        fat_warps: warps of it.
        max_stages: stages of loads; the last one computes, the others have a buffer each.
        wide_rows, wide_tokens, wide_stages: of a fat tile whose values are wider than 256, as in
            latent attention: what it needs of shared memory differs between architectures.
    """

    shared: int
    fat_rows: int
    fat_tokens: int
    fat_warps: int
    max_stages: int
    wide_rows: int
    wide_tokens: int
    wide_stages: int


_ARCHS = {
    "sm_80": _Arch(163 * _KIB, 128, 32, 8, 4, 64, 16, 4),
    "sm_87": _Arch(163 * _KIB, 128, 32, 8, 4, 64, 16, 4),
    "sm_90": _Arch(227 * _KIB, 128, 64, 8, 4, 64, 32, 3),
    "sm_100": _Arch(227 * _KIB, 128, 64, 8, 4, 64, 32, 2),
    "sm_103": _Arch(227 * _KIB, 128, 64, 8, 4, 64, 32, 2),
    "gfx942": _Arch(64 * _KIB, 128, 32, 4, 2, 64, 32, 2),
    "gfx950": _Arch(160 * _KIB, 128, 32, 4, 2, 64, 32, 2),
}
_OTHER_CUDA = _Arch(99 * _KIB, 64, 64, 8, 3, 32, 32, 2)  # the least of any since sm_80
_OTHER_HIP = _Arch(64 * _KIB, 64, 64, 4, 2, 64, 32, 2)


@lru_cache
def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like; of a CPU, the default to plan for."""
    if device.type != "cuda":
        return DEFAULT_ARCH
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def converts_float8(arch: str) -> bool:
    """Whether kernels can convert from float8_e4m3fn there."""
    return arch.startswith("gfx") or int(arch.removeprefix("sm_")) >= 89


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that a program may have."""
    return _arch(arch).shared


@lru_cache
def tiles_for(problem: Problem, arch: str | None = None) -> Tiles:
    """The tiles of a problem, by default for its device.

    Raises PlanMismatch for float64: the kernels compute in float32.
    """
    if problem.dtype == torch.float64:
        raise PlanMismatch("dtype is torch.float64, expected float32, bfloat16 or float16")
    limits = _arch(arch_of(problem.device) if arch is None else arch)
    heads = -(-problem.group // -(-problem.group // MAX_HEADS))
    head_dim = sum(split_dim(problem.head_dim))
    value_dim = sum(split_dim(problem.value_head_dim))
    token_bytes = (head_dim + value_dim) * problem.kv_dtype.itemsize

    def tile(
        block_m: int, block_n: int, num_warps: int, shared: int, most: int = limits.max_stages
    ) -> Tile:
        query_bytes = block_m * head_dim * problem.dtype.itemsize
        while block_n > 16 and query_bytes + block_n * token_bytes > shared:
            block_n //= 2
        buffers = max(0, shared - query_bytes) // (block_n * token_bytes)
        return Tile(block_m, block_n, num_warps, min(most, 1 + buffers), block_m // heads)

    # Two programs of a lean tile share a multiprocessor: one loads while the other one computes.
    half = limits.shared // 2
    fewest = max(16, power_of_two_from(heads))
    if problem.dtype == torch.float32:  # no tensor cores: products are held in registers
        lean = tile(fewest, 16, 8, half)
        fat = tile(max(fewest, 32), 16, 8, limits.shared)
        return Tiles(heads, lean, fat, fat)
    wide = head_dim + value_dim > 256
    rows, tokens, stages = limits.fat_rows, limits.fat_tokens, limits.max_stages
    if value_dim > 256:
        rows, tokens, stages = limits.wide_rows, limits.wide_tokens, limits.wide_stages
    elif wide:
        rows, tokens = 64, 32
    fat = tile(max(fewest, rows), tokens, limits.fat_warps, limits.shared, stages)
    if fewest == fat.block_m:
        return Tiles(heads, fat, fat, fat)
    # Float8 is converted in registers, which do not hold more tokens for it.
    in_registers = (head_dim + value_dim) * problem.dtype.itemsize
    lean_tokens = min(128, max(32, power_of_two_up_to(32 * _KIB // in_registers)))
    if value_dim > 256:  # too wide for two programs
        lean = tile(fewest, lean_tokens, 8, limits.shared)
    else:
        lean = tile(fewest, lean_tokens, 4, half)
    if wide:
        return Tiles(heads, lean, fat, fat)
    return Tiles(heads, lean, fat, tile(max(fewest, 64), 64, 4, half))


def split_dim(dim: int) -> tuple[int, int]:
    """Powers of two, 0 or at least 16, that together hold `dim`, as tiles of matrices are.

    576 is 512 and 64, 96 is 64 and 32, 100 is 64 and 64 of which 28 are padding.
    """
    first = max(16, power_of_two_up_to(dim))
    return first, 0 if dim <= first else max(16, power_of_two_from(dim - first))


def power_of_two_up_to(n: int) -> int:
    """The largest power of two that is at most n, 0 for 0."""
    return 1 << n.bit_length() - 1 if n else 0


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _arch(arch: str) -> _Arch:
    return _ARCHS.get(arch, _OTHER_HIP if arch.startswith("gfx") else _OTHER_CUDA)
