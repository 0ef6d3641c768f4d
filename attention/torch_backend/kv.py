"""K or V of a group's tokens from a cache of any strides, piece by piece.

What a product reads should lie in the processor's cache, its tokens close to each other. Heads that
lie between each other are far apart: a token's part of one head is alone on its page, and alone on
its cache line's way. So they are copied in the order in which they lie, in pieces that stay in
the cache until they are read; in float32, where the copy takes as long as it saves, short runs of
tokens are read where they are.
"""

import math
from typing import NamedTuple, Protocol

import torch

from attention.torch_backend.groups import Gathered, Group, InPlace
from attention.torch_backend.workspace import workspace


class Source(Protocol):
    """K or V of a group's items."""

    def in_place(self, dtype: torch.dtype) -> bool:
        """Whether nothing is copied to read it in this dtype."""
        ...

    def read(self, items: slice, tokens: slice, dtype: torch.dtype, buffer: int) -> torch.Tensor:
        """[items, Hkv, tokens, d] in dtype, valid until the buffer of that number is used again.

        The tokens are all, or those of one item only; they begin and end where units do.
        """
        ...


class Viewed(NamedTuple):
    """Tokens that lie at one stride: [size, Hkv, tokens, d] in their memory's dtype.

    Attributes:
        dtype: what the memory holds.
        near: tokens of a head lie side by side.
    """

    view: torch.Tensor
    dtype: torch.dtype
    near: bool

    def in_place(self, dtype: torch.dtype) -> bool:
        good = self.near or dtype.itemsize >= 4 or self.view.device.type != "cpu"
        return good and dtype == self.dtype

    def read(self, items: slice, tokens: slice, dtype: torch.dtype, buffer: int) -> torch.Tensor:
        view = self.view[items, :, tokens].view(self.dtype)
        if self.in_place(dtype):
            return view
        size, heads, count, head_dim = view.shape
        if self.near:
            return workspace(buffer, tuple(view.shape), dtype, view.device).copy_(view)
        by_token = workspace(buffer, (size, count, heads, head_dim), dtype, view.device)
        return by_token.copy_(view.transpose(1, 2)).transpose(1, 2)


class Rowed(NamedTuple):
    """Tokens that lie anywhere, as rows that are copied whole.

    Attributes:
        rows: [n, width], the cache's memory at the greatest common stride of what is read of it.
        at: int64 [items, tokens // unit], or [items, heads, tokens // unit] where each head has
            rows of its own.
        unit: tokens of a row.
        heads, head_dim: of the cache.
        dtype: what the memory holds.
        blank: see `Gathered`.
        size: how many items read what is here: all that are here, or all the same one.
    """

    rows: torch.Tensor
    at: torch.Tensor
    unit: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    blank: torch.Tensor | None
    size: int

    def in_place(self, dtype: torch.dtype) -> bool:
        return False

    def read(self, items: slice, tokens: slice, dtype: torch.dtype, buffer: int) -> torch.Tensor:
        same = len(self.at) < self.size
        here = slice(None) if same else items
        index = self.at[here, ..., tokens.start // self.unit : tokens.stop // self.unit]
        size, count = len(index), tokens.stop - tokens.start
        device, row = self.rows.device, self.rows.shape[1]
        raw = workspace(2 + buffer, (index.numel(), row), self.rows.dtype, device)
        torch.index_select(self.rows, 0, index.reshape(-1), out=raw)
        raw = raw.view(self.dtype)
        if raw.dtype != dtype:
            raw = workspace(buffer, tuple(raw.shape), dtype, device).copy_(raw)
        by_head = self.at.dim() == 3
        shape = (size, self.heads, count) if by_head else (size, count, self.heads)
        raw = raw.view(*shape, self.head_dim)
        read = raw if by_head else raw.transpose(1, 2)
        if self.blank is not None:
            self._clear(read, items.start, tokens)
        return read.expand(self.size, -1, -1, -1) if same else read

    def _clear(self, read: torch.Tensor, first: int, tokens: slice) -> None:
        assert self.blank is not None
        count = read.shape[2]
        begin = first * self.at.shape[-1] * self.unit + tokens.start
        blank = self.blank - begin
        blank = blank[(blank >= 0) & (blank < len(read) * count)]
        if len(blank):
            read.transpose(1, 2)[blank // count, blank % count] = 0


def source_of(cache: torch.Tensor, dtype: torch.dtype, group: Group) -> Source:
    """K or V of a group, from a cache [num_blocks, block_size, Hkv, d] that holds dtype."""
    if isinstance(group.kv, InPlace):
        view = _view(cache, group.kv, group.size, group.tokens)
        if view is not None:
            near = view.stride(2) <= view.stride(1) or view.shape[1] == 1
            return Viewed(view, dtype, near)
        slots = _slots(group.kv, group.size, group.tokens, cache)
        return _rowed(cache, dtype, Gathered(slots, 1, None), group)
    return _rowed(cache, dtype, group.kv, group)


def _view(cache: torch.Tensor, where: InPlace, size: int, tokens: int) -> torch.Tensor | None:
    """None where the tokens of an item do not lie at one stride."""
    _, block_size, heads, head_dim = cache.shape
    by_block, by_slot, by_head, _ = cache.stride()
    if block_size == 1:
        by_slot = by_block
    if where.offset + tokens > block_size and by_block != block_size * by_slot:
        return None
    return cache.as_strided(
        (size, heads, tokens, head_dim),
        (where.step * by_block, by_head, by_slot, 1),
        cache.storage_offset() + where.block * by_block + where.offset * by_slot,
    )


def _slots(where: InPlace, size: int, tokens: int, cache: torch.Tensor) -> torch.Tensor:
    block_size = cache.shape[1]
    first = where.block * block_size + where.offset
    items = torch.arange(size, device=cache.device) * (where.step * block_size) + first
    return (items[:, None] + torch.arange(tokens, device=cache.device)).flatten()


def _rowed(cache: torch.Tensor, dtype: torch.dtype, where: Gathered, group: Group) -> Rowed:
    """index_select copies whole rows, several times as fast as indexing in two dimensions.

    So the cache, whatever its strides, becomes rows at their greatest common stride. A row is a
    block, or a block's part of a head, where whole blocks are asked for and their tokens lie side
    by side; else it is a slot, or a slot's part of a head.
    """
    _, block_size, heads, head_dim = cache.shape
    index, unit = where.ids, where.unit
    # Tokens of one item are those of all.
    items = len(index) * unit // group.tokens
    _, by_slot, by_head, _ = cache.stride()
    heads_together = by_head == head_dim
    if unit > 1 and by_slot != (heads * head_dim if heads_together else head_dim):
        slot = torch.arange(block_size, device=cache.device)
        index, unit = (index[:, None] * block_size + slot).flatten(), 1
    width = unit * head_dim * (heads if heads_together else 1)
    rows, index = _rows(cache, index, unit, width, heads_together)
    if heads_together:
        index = index.view(items, -1)
    else:
        index = index.view(items, -1, heads).transpose(1, 2)
    return Rowed(rows, index, unit, heads, head_dim, dtype, where.blank, group.size)


def _rows(
    cache: torch.Tensor, index: torch.Tensor, unit: int, width: int, heads_together: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache as rows of `width`, and the rows of each unit (and of each of its heads)."""
    num_blocks, block_size, heads, _ = cache.shape
    by_block, by_slot, by_head, _ = cache.stride()
    strides, last = [by_block], (num_blocks - 1) * by_block
    if unit == 1 and block_size > 1:
        strides.append(by_slot)
        last += (block_size - 1) * by_slot
    if not heads_together:
        strides.append(by_head)
        last += (heads - 1) * by_head
    step = math.gcd(*strides)
    rows = cache.as_strided((last // step + 1, width), (step, 1))
    if unit > 1 or block_size == 1:
        index = index * (by_block // step) if by_block != step else index
    elif by_block != block_size * by_slot or step != by_slot:
        index = index // block_size * (by_block // step) + index % block_size * (by_slot // step)
    if not heads_together:
        head = torch.arange(heads, device=cache.device) * (by_head // step)
        index = index[:, None] + head
    return rows, index
