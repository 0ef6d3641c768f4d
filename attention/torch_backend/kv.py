"""K or V of a group's tokens from a cache of any strides: a view where it can be one."""

import math

import torch

from attention.torch_backend.groups import Gathered, Group, InPlace


def tokens_of(cache: torch.Tensor, group: Group) -> torch.Tensor:
    """K or V [size, Hkv, tokens, d] of a group, from a cache [num_blocks, block_size, Hkv, d]."""
    if isinstance(group.kv, InPlace):
        view = _view(cache, group.kv, group.size, group.tokens)
        if view is not None:
            return view
        index = _slots(group.kv, group.size, group.tokens, cache)
        return _gather(cache, Gathered(index, 1, None), group.size, group.tokens)
    # Tokens of one item are those of all.
    items = len(group.kv.ids) * group.kv.unit // group.tokens
    gathered = _gather(cache, group.kv, items, group.tokens)
    return gathered.expand(group.size, -1, -1, -1)


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


def _gather(cache: torch.Tensor, where: Gathered, size: int, tokens: int) -> torch.Tensor:
    """index_select copies whole rows, several times as fast as indexing in two dimensions.

    So the cache, whatever its strides, becomes rows at their greatest common stride. A row is a
    block, or a block's part of a head, where whole blocks are asked for and their tokens lie side
    by side; else it is a slot, or a slot's part of a head.
    """
    _, block_size, heads, head_dim = cache.shape
    index, unit = where.ids, where.unit
    _, by_slot, by_head, _ = cache.stride()
    heads_together = by_head == head_dim
    if unit > 1 and by_slot != (heads * head_dim if heads_together else head_dim):
        slot = torch.arange(block_size, device=cache.device)
        index, unit = (index[:, None] * block_size + slot).flatten(), 1
    width = unit * head_dim * (heads if heads_together else 1)
    rows, index = _rows(cache, index, unit, width, heads_together)
    if heads_together:
        gathered = rows.index_select(0, index).view(size * tokens, heads, head_dim)
        if where.blank is not None:
            gathered.index_fill_(0, where.blank, 0)
        return gathered.view(size, tokens, heads, head_dim).transpose(1, 2)
    index = index.view(size, tokens // unit, heads).transpose(1, 2).flatten()
    gathered = rows.index_select(0, index).view(size, heads, tokens, head_dim)
    if where.blank is not None:
        item, token = where.blank // tokens, where.blank % tokens
        of_head = torch.arange(heads, device=cache.device) * tokens
        blank = (item * (heads * tokens) + token)[:, None] + of_head
        gathered.view(-1, head_dim).index_fill_(0, blank.flatten(), 0)
    return gathered


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
