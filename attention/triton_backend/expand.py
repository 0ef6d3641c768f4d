"""Entries from pieces, on a GPU: the host has nothing to do for each block of the KV."""

import torch
import triton
import triton.language as tl

from attention.triton_backend.entries import PieceColumns
from attention.triton_backend.units import Entries

_BLOCK = 256  # entries that a program writes


def expand_on_device(
    pieces: dict[str, torch.Tensor],
    num_pieces: int,
    blocks: torch.Tensor,
    block_size: int,
    entries: Entries,
    num_entries: int,
) -> None:
    """Write the entries of pieces: columns of `PieceColumns` as int32 and float32 tensors."""
    absent = entries.slot
    _expand[(triton.cdiv(num_entries, _BLOCK),)](
        *(pieces[name] for name in PieceColumns._fields[:9]),
        pieces.get("scale", absent),
        pieces.get("bias", absent),
        blocks,
        *entries[:5],
        absent if entries.scale is None else entries.scale,
        absent if entries.bias is None else entries.bias,
        num_pieces,
        num_entries,
        block_size,
        STEPS=num_pieces.bit_length(),
        HAS_SCALE=entries.scale is not None,
        HAS_BIAS=entries.bias is not None,
        BLOCK=_BLOCK,
    )


@triton.jit
def _expand(
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
    STEPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last piece that begins at or before each entry, by halving.
    piece = tl.full([BLOCK], 0, tl.int32)
    behind = piece + num_pieces
    for _ in range(STEPS):
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
    if HAS_SCALE:
        tl.store(entry_scale + entry, tl.load(piece_scale + piece), mask=used)
    if HAS_BIAS:
        tl.store(entry_bias + entry, tl.load(piece_bias + piece), mask=used)
