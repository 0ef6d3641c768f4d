"""K and V of a group's tokens from caches of any strides: views where they can be."""

import math
from typing import NamedTuple

import torch

from attention.torch_backend.groups import Gathered, Group, InPlace, Rows
from attention.torch_backend.scratch import GATHERED, scratch


class Caches(NamedTuple):
    """K and V of one layer.

    Attributes:
        k, v: [num_blocks, block_size, Hkv, d], of any strides.
        both: [num_blocks, block_size, Hkv, width], where a token's K and V of a head lie in one
            row: K is its first columns; None where they lie apart.
        v_begin: the first column of V in it.
    """

    k: torch.Tensor
    v: torch.Tensor
    both: torch.Tensor | None
    v_begin: int


def caches_of(k: torch.Tensor, v: torch.Tensor) -> Caches:
    """The caches of a layer, [num_blocks, block_size, Hkv, d] of any strides."""
    alike = k.stride() == v.stride() and k.shape[:3] == v.shape[:3]
    if not alike or k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr():
        return Caches(k, v, None, 0)
    begin = int(v.storage_offset()) - int(k.storage_offset())
    end = max(begin + v.shape[3], k.shape[3])
    steps = [step for step, size in zip(k.stride(), k.shape[:3], strict=False) if size > 1]
    if begin < 0 or end > min(steps, default=end) or end > k.shape[3] + v.shape[3]:
        return Caches(k, v, None, 0)
    return Caches(k, v, k.as_strided((*k.shape[:3], end), k.stride()), begin)


def tokens_of(caches: Caches, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [size, Hkv, tokens, d] of a group; one tensor, as wide as K, if V is its first part.

    They may lie in memory that the next call for tokens writes to.
    """
    k, v, both, v_begin = caches
    latent = both is not None and v_begin == 0 and v.shape[3] <= k.shape[3]
    where = group.kv
    if isinstance(where, InPlace):
        keys = _view(k, where, group.size, group.tokens)
        values = keys if latent else _view(v, where, group.size, group.tokens)
        if keys is not None and values is not None:
            return keys, values
        where = Gathered(_slots(where, group.size, group.tokens, k), 1, None, {})
    if both is not None:
        (rows,) = _gather([both], where, group.tokens, GATHERED)
        rows = _to_all(rows, group)
        keys = rows[..., : k.shape[3]]
        return keys, keys if latent else rows[..., v_begin : v_begin + v.shape[3]]
    if k.stride() == v.stride() and k.shape == v.shape:
        keys, values = _gather([k, v], where, group.tokens, GATHERED)
    else:
        (keys,), (values,) = (
            _gather([cache], where, group.tokens, number)
            for number, cache in enumerate((k, v), GATHERED)
        )
    return _to_all(keys, group), _to_all(values, group)


def _to_all(gathered: torch.Tensor, group: Group) -> torch.Tensor:
    """Where all items of a group read the same tokens, these are gathered once."""
    size = group.size
    return gathered if gathered.shape[0] == size else gathered.expand(size, -1, -1, -1)


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
    return items[:, None] + torch.arange(tokens, device=cache.device)


def _gather(
    caches: list[torch.Tensor], where: Gathered, tokens: int, number: int
) -> list[torch.Tensor]:
    """Tokens of caches of one shape and equal strides, into the scratch buffers from `number` on.

    index_select copies whole rows, several times as fast as indexing in two dimensions. So a cache,
    whatever its strides, becomes rows at their greatest common stride. A row is a block, or a
    block's part of a head, where whole blocks are asked for and their tokens lie side by side; else
    it is a slot, or a slot's part of a head.
    """
    shape, strides = caches[0].shape, caches[0].stride()
    # Layers have caches alike.
    kind = (*shape, *strides)
    rows = where.known.get(kind)
    if rows is None:
        rows = where.known[kind] = _rows(caches[0], where, tokens)
    size, (_, _, heads, head_dim) = where.ids.shape[0], shape
    gathered = []
    for one, cache in enumerate(caches, number):
        source = cache.as_strided((rows.num_rows, rows.width), (rows.step, 1))
        copy = scratch(one, rows.chosen.shape[0], rows.width, source.dtype, source.device)
        torch.index_select(source, 0, rows.chosen, out=copy)
        if rows.heads_together:
            if rows.blank is not None:
                copy.view(-1, heads, head_dim).index_fill_(0, rows.blank, 0)
            gathered.append(copy.view(size, tokens, heads, head_dim).transpose(1, 2))
        else:
            if rows.blank is not None:
                copy.view(-1, head_dim).index_fill_(0, rows.blank, 0)
            gathered.append(copy.view(size, heads, tokens, head_dim))
    return gathered


def _rows(cache: torch.Tensor, where: Gathered, tokens: int) -> Rows:
    """The cache as rows, and those that are to be gathered."""
    _, block_size, heads, head_dim = cache.shape
    by_block, by_slot, by_head, _ = cache.stride()
    size, index, unit = len(where.ids), where.ids.flatten(), where.unit
    heads_together = by_head == head_dim or heads == 1
    if unit > 1 and by_slot != (heads * head_dim if heads_together else head_dim):
        slot = torch.arange(block_size, device=cache.device)
        index, unit = (index[:, None] * block_size + slot).flatten(), 1
    strides = [by_block]
    if unit == 1 and block_size > 1:
        strides.append(by_slot)
    if not heads_together:
        strides.append(by_head)
    step = math.gcd(*strides)
    if unit > 1 or block_size == 1:
        index = index * (by_block // step) if by_block != step else index
    elif by_block != block_size * by_slot or step != by_slot:
        index = index // block_size * (by_block // step) + index % block_size * (by_slot // step)
    width, blank = unit * head_dim * (heads if heads_together else 1), where.blank
    if not heads_together:
        head = torch.arange(heads, device=cache.device)
        index = index[:, None] + head * (by_head // step)
        index = index.view(size, tokens // unit, heads).transpose(1, 2).flatten()
        if blank is not None:
            blank = blank // tokens * (heads * tokens) + blank % tokens
            blank = (blank[:, None] + head * tokens).flatten()
    last = sum((n - 1) * s for n, s in zip(cache.shape[:3], cache.stride(), strict=False))
    count = (last + head_dim - width) // step + 1
    return Rows(index, blank, count, width, step, heads_together)
