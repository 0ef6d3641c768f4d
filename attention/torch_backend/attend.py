"""The partials of one group: piece by piece of its KV, in reach of the processor."""

import torch

from attention.algebra import Partial
from attention.torch_backend.groups import Gathered, Group
from attention.torch_backend.kv import source_of
from attention.torch_backend.layer import Layer
from attention.torch_backend.softmax import (
    Bias,
    combined,
    compute_dtype,
    softmax,
    without_unseen,
)

# Bytes of K and V of a piece, and what its tokens are a multiple of where they are not all.
PIECE_BYTES = 2 << 20
PIECE_STEP = 256
# Elsewhere than on a CPU all items are one piece, of so many tokens: logits are held at once.
DEVICE_TOKENS = 2048


def query_range(group: Group) -> slice:
    """The consecutive queries of a group that has such."""
    assert group.first_query is not None
    return slice(group.first_query, group.first_query + group.size * group.queries)


def attend(group: Group, layer: Layer) -> Partial:
    """Partials of a group's rows: o [size * queries, Hkv, group, d] and lse without d."""
    size, queries = group.size, group.queries
    if group.query_index is not None:
        q = layer.q.index_select(0, group.query_index)
    else:
        q = layer.q[query_range(group)]
    _, kv_heads, per_head, head_dim = q.shape
    # All query heads of a KV head are rows of one matrix: [size, Hkv, queries * group, d].
    q = q.reshape(size, queries, kv_heads, per_head, head_dim).transpose(1, 2).flatten(2, 3)
    part = _over_pieces(group, layer, q)
    width = part.o.shape[3]
    rows = (size, kv_heads, queries, per_head)
    o = part.o.reshape(*rows, width).transpose(1, 2).flatten(0, 1)
    lse = part.lse.reshape(rows).transpose(1, 2).flatten(0, 1)
    return Partial(o.to(lse.dtype), _shifted(group, layer, lse))


def _over_pieces(group: Group, layer: Layer, q: torch.Tensor) -> Partial:
    """Partials of rows [size, Hkv, rows, d]."""
    keys = source_of(layer.k_cache, layer.kv_dtype, group)
    values = None if layer.latent else source_of(layer.v_cache, layer.kv_dtype, group)
    bias, scale = _bias(group, layer), layer.scale / group.temperature
    width, dtype = layer.v_cache.shape[3], compute_dtype(q)
    q = q.to(dtype)
    in_place = keys.in_place(dtype) and (values is None or values.in_place(dtype))
    plain = bias.mask is None and bias.slope is None and layer.softcap is None
    done: list[Partial] = []
    for items, ranges in _pieces(group, layer, whole=in_place and plain):
        size, parts = items.stop - items.start, []
        for tokens in ranges:
            k = keys.read(items, tokens, dtype, 0)
            v = k if values is None else values.read(items, tokens, dtype, 1)
            queries, added = q[items], bias.of(items, tokens)
            if in_place and plain and k.shape[2] > PIECE_STEP:
                k, v = _apart(k), _apart(v)
                queries = queries.expand(len(k), -1, -1, -1)
            part = softmax(queries, k, v, width, added, scale, layer.softcap)
            if added.mask is not None and len(ranges) > 1:
                part = without_unseen(part, added.mask)
            parts.append(part)
        done.append(combined(parts, size))
    if len(done) == 1:
        return done[0]
    return Partial(*(torch.cat(columns) for columns in zip(*done, strict=True)))


def _pieces(group: Group, layer: Layer, *, whole: bool) -> list[tuple[slice, list[slice]]]:
    """Ranges of items, each with ranges of their tokens: parts of one item, or whole items.

    whole: nothing is copied, so that pieces need not be small.
    """
    size, tokens = group.size, group.tokens
    if layer.q.device.type != "cpu":
        step, items = DEVICE_TOKENS, size
    elif whole:
        step = max(tokens // PIECE_STEP, 1) * PIECE_STEP
        items = size if tokens <= PIECE_STEP else 1
    else:
        k, v = layer.k_cache, layer.v_cache
        most = PIECE_BYTES // (k.shape[2] * (k.shape[3] + v.shape[3]) * layer.kv_dtype.itemsize)
        step, items = max(most // PIECE_STEP, 1) * PIECE_STEP, max(most // tokens, 1)
        if isinstance(group.kv, Gathered):
            step = max(step // group.kv.unit, 1) * group.kv.unit
    ranges = [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]
    return [(slice(first, min(first + items, size)), ranges) for first in range(0, size, items)]


def _apart(x: torch.Tensor) -> torch.Tensor:
    """Runs of PIECE_STEP tokens of [1, Hkv, tokens, d] as items of their own.

    All heads of a run are then read before the next one is, while its pages are in reach.
    """
    _, heads, tokens, width = x.shape
    return x.view(heads, tokens // PIECE_STEP, PIECE_STEP, width).transpose(0, 1)


def _bias(group: Group, layer: Layer) -> Bias:
    mask = group.mask
    per_head = layer.q.shape[2]
    if mask is not None:
        if mask.shape[1] > 1 and per_head > 1:
            mask = mask.repeat_interleave(per_head, dim=1)
        mask = mask.unsqueeze(1)
    if layer.slopes is None:
        return Bias(mask, None, None)
    # As seen from behind the item, for any query: what is left of the distance shifts the lse.
    distance = torch.arange(-group.tokens, 0, device=layer.q.device, dtype=layer.slopes.dtype)
    slope = layer.slopes.repeat(1, group.queries).unsqueeze(2)
    return Bias(mask, slope, distance)


def _shifted(group: Group, layer: Layer, lse: torch.Tensor) -> torch.Tensor:
    """lse [size * queries, Hkv, group] with what has been left out of all logits of an item."""
    if group.log_weight is not None:
        lse = lse + group.log_weight.repeat_interleave(group.queries)[:, None, None]
    if layer.slopes is not None:
        index = group.query_index
        position = layer.position[query_range(group) if index is None else index]
        end = (group.first_position + group.tokens).repeat_interleave(group.queries)
        lse = lse - layer.slopes * (position - end)[:, None, None]
    return lse
