"""Writes K and V of new tokens to their slots of the caches."""

import torch

from attention.backends import device_lacks
from attention.errors import InvalidSlots, WriteMismatch
from attention.ops import LIBRARY
from attention.options import check_option, scale_shapes
from attention.problem import FLOAT8_DTYPES, LAYOUTS, QUERY_DTYPES


@torch.no_grad()
def write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str = "NHD",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    check_slots: bool = False,
) -> None:
    """Write K and V of n tokens to their slots.

    Args:
        k: [n, num_kv_heads, head_dim], v: [n, num_kv_heads, value_head_dim], of any strides;
            float64, float32, bfloat16 or float16.
        k_cache, v_cache: as for `attention.run`, but of any strides: what is written to. Of one
            dtype, any of those of k or float8_e4m3fn or float8_e5m2, to which k and v are rounded;
            beyond the largest finite float8, that one is written.
        slots: int64 or int32 [n], block * block_size + offset, distinct: which one of several
            tokens with one slot is written, is not defined. A token whose slot lies in no block,
            such as -1, is not written.
        layout: of the caches, "NHD" or "HND".
        k_scale, v_scale: as for `attention.run`: float32, of one element or [num_kv_heads], by
            which K and V are divided, in float32 (float64 where they are); 1 by default.
        check_slots: look at the slots and raise instead, for those in no block other than -1 and
            for those that occur twice. The host then waits for the device.

    Raises:
        WriteMismatch: a tensor is not of the shape, dtype or device that the others or the list
            above ask for. Nothing has been written.
        InvalidSlots: a slot is in no block or occurs twice, where this is checked. Nothing has
            been written.

    On GPUs, one kernel that can be captured in a CUDA graph, if triton knows the GPU; elsewhere a
    few torch operations. No gradient flows through the caches. `torch.compile` sees one node, the
    operator prefixtree::write, that mutates the caches.
    """
    execute = _operator if torch.compiler.is_compiling() else _execute
    execute(k, v, k_cache, v_cache, slots, layout, k_scale, v_scale, check_slots)


def _execute(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    layout: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    check_slots: bool,
) -> None:
    if layout not in LAYOUTS:
        raise WriteMismatch(f"layout is {layout!r}, expected one of {LAYOUTS}")
    _check_tensors(k, v, k_cache, v_cache, slots, layout)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_option(name, scale, scale_shapes(k.shape[1]), k.device, WriteMismatch)
    if layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if check_slots:
        _check_slots(slots, k_cache.shape[0] * k_cache.shape[1])
    if k.device.type == "cuda" and device_lacks(k.device) is None:
        from attention.triton_backend.write import write_slots

        write_slots(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    else:
        _write_slots(k, v, k_cache, v_cache, slots, k_scale, v_scale)


LIBRARY.define(
    "write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, str layout, "
    "Tensor? k_scale, Tensor? v_scale, bool check_slots) -> ()"
)
LIBRARY.impl("write", _execute, "CompositeExplicitAutograd")
# It returns nothing, and what it mutates keeps its shape.
torch.library.register_fake("prefixtree::write", lambda *_: None, lib=LIBRARY)
_operator = torch.ops.prefixtree.write.default


def _write_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """With torch operations; the caches are [num_blocks, block_size, num_kv_heads, head_dim]."""
    num_blocks, block_size = k_cache.shape[:2]
    if not len(slots):
        return
    lowest, highest = map(int, slots.aminmax())
    if lowest < 0 or highest >= num_blocks * block_size:
        written = (slots >= 0) & (slots < num_blocks * block_size)
        k, v, slots = k[written], v[written], slots[written]
    block, offset = slots // block_size, slots % block_size
    for values, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        cache[block, offset] = _stored(values, cache.dtype, scale)


def _stored(values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        if values.dtype != torch.float64:
            values = values.float()
        values = values / scale.reshape(-1, 1)
    if dtype in FLOAT8_DTYPES:
        largest = torch.finfo(dtype).max
        values = values.float().clamp(-largest, largest)
    return values.to(dtype)


def _check_tensors(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    layout: str,
) -> None:
    if k_cache.ndim != 4:
        raise WriteMismatch(f"k_cache has shape {tuple(k_cache.shape)}, expected 4 dimensions")
    num_kv_heads, head_dim = k_cache.shape[2 if layout == "NHD" else 1], k_cache.shape[3]
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        raise WriteMismatch(
            f"v_cache has shape {tuple(v_cache.shape)}, expected "
            f"{(*k_cache.shape[:-1], 'any')} as k_cache has"
        )
    if slots.ndim != 1:
        raise WriteMismatch(f"slots have shape {tuple(slots.shape)}, expected 1 dimension")
    for name, values, dim in (("k", k, head_dim), ("v", v, v_cache.shape[-1])):
        expected = (len(slots), num_kv_heads, dim)
        if values.shape != expected:
            raise WriteMismatch(
                f"{name} has shape {tuple(values.shape)}, expected {expected}: slots, and heads "
                f"and dimensions of {name}_cache in the layout {layout}"
            )
        if values.dtype not in QUERY_DTYPES:
            raise WriteMismatch(f"{name} has dtype {values.dtype}, expected one of {QUERY_DTYPES}")
    if k_cache.dtype not in (*QUERY_DTYPES, *FLOAT8_DTYPES):
        raise WriteMismatch(
            f"k_cache has dtype {k_cache.dtype}, expected one of {QUERY_DTYPES + FLOAT8_DTYPES}"
        )
    if v_cache.dtype != k_cache.dtype:
        raise WriteMismatch(
            f"v_cache has dtype {v_cache.dtype}, expected that of k_cache, {k_cache.dtype}"
        )
    if slots.dtype not in (torch.int64, torch.int32):
        raise WriteMismatch(f"slots have dtype {slots.dtype}, expected torch.int64 or int32")
    for name, tensor in (("k", k), ("v", v), ("v_cache", v_cache), ("slots", slots)):
        if tensor.device != k_cache.device:
            raise WriteMismatch(
                f"{name} is on {tensor.device}, expected the device of k_cache, {k_cache.device}"
            )


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    known = (slots >= -1) & (slots < num_slots)
    if not known.all():
        at = int(known.logical_not().nonzero()[0])
        raise InvalidSlots(f"slots[{at}] is {int(slots[at])}, expected -1 to {num_slots - 1}")
    distinct, counts = slots[slots >= 0].unique(return_counts=True)
    if (counts > 1).any():
        raise InvalidSlots(f"slot {int(distinct[counts > 1][0])} occurs twice, expected it once")
