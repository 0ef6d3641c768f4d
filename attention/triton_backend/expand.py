"""Entries from pieces, on a GPU: the host has nothing to do for each block of the KV."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from attention.triton_backend.entries import PieceColumns
from attention.triton_backend.units import Entries

_BLOCK = 256  # entries that a program writes


def expand_on_device(
    pieces: Mapping[str, torch.Tensor | None],
    num_pieces: int,
    blocks: torch.Tensor,
    block_size: int,
    entries: Entries,
    num_entries: int,
) -> None:
    """Write the entries of pieces: columns of `PieceColumns` as int32 and float32 tensors."""
    with torch.cuda.device(blocks.device) if blocks.is_cuda else nullcontext():
        expand_kernel[(triton.cdiv(num_entries, _BLOCK),)](
            **arguments_of(pieces, num_pieces, blocks, block_size, entries, num_entries)
        )


def arguments_of(
    pieces: Mapping[str, torch.Tensor | None],
    num_pieces: int,
    blocks: torch.Tensor,
    block_size: int,
    entries: Entries,
    num_entries: int,
) -> dict[str, Any]:
    """What the kernel is called with."""
    return {
        **{f"piece_{name}": pieces.get(name) for name in PieceColumns._fields},
        "blocks": blocks,
        **{f"entry_{name}": column for name, column in entries._asdict().items()},
        "num_pieces": num_pieces,
        "num_entries": num_entries,
        "block_size": block_size,
        "steps": num_pieces.bit_length(),
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }


# Sizes differ from step to step, and none is worth a variant of its own.
@triton.jit(do_not_specialize=["num_pieces", "num_entries", "steps"])
def expand_kernel(
    piece_entry,
    piece_entries,
    piece_log2_width,
    piece_place,
    piece_length,
    piece_first_block,
    piece_position,
    piece_row_begin,
    piece_row_end,
    piece_scale,
    piece_bias,
    blocks,
    entry_slot,
    entry_length,
    entry_position,
    entry_row_begin,
    entry_row_end,
    entry_scale,
    entry_bias,
    num_pieces,
    num_entries,
    block_size,
    steps,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of entries; what is None is not there."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last piece that begins at or before each entry, by halving.
    piece = tl.full([BLOCK], 0, tl.int32)
    behind = piece + num_pieces
    for _ in range(steps):
        middle = (piece + behind) // 2
        before = tl.load(piece_entry + middle) <= entry
        piece = tl.where(before, middle, piece)
        behind = tl.where(before, behind, middle)
    ordinal = entry - tl.load(piece_entry + piece)
    # Behind a piece's entries lie those that are kept free.
    used = (entry < num_entries) & (ordinal < tl.load(piece_entries + piece))
    place = tl.load(piece_place + piece)
    shift = tl.load(piece_log2_width + piece)
    multiple = (place >> shift) + ordinal
    begin = tl.maximum(place, multiple << shift)
    end = tl.minimum(place + tl.load(piece_length + piece), (multiple + 1) << shift)
    first_block = tl.load(piece_first_block + piece)
    block = tl.load(blocks + first_block + begin // block_size, mask=used, other=0)
    tl.store(entry_slot + entry, block * block_size + begin % block_size, mask=used)
    tl.store(entry_length + entry, end - begin, mask=used)
    position = tl.load(piece_position + piece) + begin - place
    tl.store(entry_position + entry, position, mask=used)
    tl.store(entry_row_begin + entry, tl.load(piece_row_begin + piece), mask=used)
    tl.store(entry_row_end + entry, tl.load(piece_row_end + piece), mask=used)
    if entry_scale is not None:
        tl.store(entry_scale + entry, tl.load(piece_scale + piece), mask=used)
    if entry_bias is not None:
        tl.store(entry_bias + entry, tl.load(piece_bias + piece), mask=used)
