"""The K and V tensors of a paged cache."""

from __future__ import annotations

from typing import Literal

import torch

from allocator.errors import InvalidArgument, KVMismatch, SlotOutOfRange, at_least


class KVStorage:
    """K and V of `num_layers` layers in blocks of `block_size` token slots.

    Attributes: `k` and `v`, one tensor a layer; `layout`, "NHD" for [num_blocks, block_size,
    num_kv_heads, head_dim] or "HND" for [num_blocks, num_kv_heads, block_size, head_dim]; the
    other arguments. V has value_head_dim in the place of head_dim. On a CPU the tensors are views
    of memory in which all of one head lies before the next, whatever the layout.

    The tensors start as zeros: slots never written stand behind masks, where NaN would survive
    the product with a weight of 0.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: Literal["NHD", "HND"] = "NHD",
        value_head_dim: int | None = None,
    ) -> None:
        """InvalidArgument unless the sizes are integers >= 1, `dtype` floating, `layout` known."""
        self.num_layers = at_least(1, "num_layers", num_layers)
        self.num_blocks = at_least(1, "num_blocks", num_blocks)
        self.block_size = at_least(1, "block_size", block_size)
        self.num_kv_heads = at_least(1, "num_kv_heads", num_kv_heads)
        self.head_dim = at_least(1, "head_dim", head_dim)
        self.value_head_dim = (
            self.head_dim
            if value_head_dim is None
            else at_least(1, "value_head_dim", value_head_dim)
        )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InvalidArgument(f"dtype is {dtype!r}, expected a floating torch.dtype")
        if layout not in ("NHD", "HND"):
            raise InvalidArgument(f"layout is {layout!r}, expected 'NHD' or 'HND'")
        self.dtype = dtype
        self.layout = layout
        # A tensor made in inference mode could never be written outside of it.
        with torch.inference_mode(False):
            layers = range(self.num_layers)
            self.k = tuple(self._zeros(self.head_dim, device) for _ in layers)
            self.v = tuple(self._zeros(self.value_head_dim, device) for _ in layers)
        self.device = self.k[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V of all layers."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one slot, all layers."""
        return self.num_bytes // (self.num_blocks * self.block_size)

    @torch.no_grad()
    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes k [n, num_kv_heads, head_dim] and v [n, num_kv_heads, value_head_dim] to slots.

        `slots`: int64 [n], distinct; slot = block * block_size + offset. No gradient flows
        through the storage.

        Raises KVMismatch for a wrong layer, shape, dtype or device, SlotOutOfRange for slots that
        lie in no block; then nothing has been written. Only slots on the CPU are looked at: on
        another device the check would wait for that device, at every layer.
        """
        self._check_slots(layer, slots)
        self._check_values("k", k, len(slots), self.head_dim)
        self._check_values("v", v, len(slots), self.value_head_dim)
        slots = slots.to(self.device)
        block, offset = slots // self.block_size, slots % self.block_size
        self._offset_first(self.k[layer])[block, offset] = k
        self._offset_first(self.v[layer])[block, offset] = v

    @torch.no_grad()
    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of k [n, num_kv_heads, head_dim] and v [n, num_kv_heads, value_head_dim].

        `slots` and what is raised: as for `write`, but slots may repeat.
        """
        self._check_slots(layer, slots)
        slots = slots.to(self.device)
        block, offset = slots // self.block_size, slots % self.block_size
        return (
            self._offset_first(self.k[layer])[block, offset],
            self._offset_first(self.v[layer])[block, offset],
        )

    def _zeros(self, dim: int, device: torch.device | str) -> torch.Tensor:
        """K or V of a layer."""
        blocks, heads, block_size = self.num_blocks, self.num_kv_heads, self.block_size
        if torch.device(device).type == "cpu":
            # Attention reads head by head; what it reads lies side by side if the heads lie apart.
            shape = heads, blocks, block_size, dim
            tensor = torch.zeros(shape, dtype=self.dtype, device=device)
            return tensor.permute(1, 2, 0, 3) if self.layout == "NHD" else tensor.transpose(0, 1)
        inner = (block_size, heads) if self.layout == "NHD" else (heads, block_size)
        return torch.zeros((blocks, *inner, dim), dtype=self.dtype, device=device)

    def _offset_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [num_blocks, block_size, num_kv_heads, dim] in either layout."""
        return tensor if self.layout == "NHD" else tensor.transpose(1, 2)

    def _check_slots(self, layer: int, slots: torch.Tensor) -> None:
        if not 0 <= layer < self.num_layers:
            raise KVMismatch(f"layer is {layer}, expected 0..{self.num_layers - 1}")
        if slots.ndim != 1 or slots.dtype != torch.int64:
            raise KVMismatch(
                f"slots have shape {tuple(slots.shape)} and dtype {slots.dtype}, "
                "expected one dimension of torch.int64"
            )
        if slots.device.type != "cpu":
            if slots.device != self.device:
                raise KVMismatch(f"slots are on {slots.device}, expected cpu or {self.device}")
        elif len(slots):
            num_slots = self.num_blocks * self.block_size
            for slot in map(int, slots.aminmax()):
                if not 0 <= slot < num_slots:
                    raise SlotOutOfRange(f"slot {slot}, expected 0..{num_slots - 1}")

    def _check_values(self, name: str, values: torch.Tensor, num_slots: int, dim: int) -> None:
        shape = (num_slots, self.num_kv_heads, dim)
        if values.shape != shape:
            raise KVMismatch(f"{name} has shape {tuple(values.shape)}, expected {shape}")
        if values.dtype != self.dtype:
            raise KVMismatch(f"{name} has dtype {values.dtype}, expected {self.dtype}")
        if values.device != self.device:
            raise KVMismatch(f"{name} is on {values.device}, expected {self.device}")
