"""What may differ from layer to layer under one plan."""

from typing import NamedTuple

import torch

Shapes = tuple[tuple[int, ...], ...]


class RunOptions(NamedTuple):
    """As documented at `attention.run`, checked, with the default scale filled in."""

    scale: float
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def scale_shapes(num_kv_heads: int) -> Shapes:
    """What k_scale and v_scale may have."""
    return ((num_kv_heads,), (1,), ())


def check_option(
    name: str,
    tensor: torch.Tensor,
    shapes: Shapes,
    device: torch.device,
    error: type[ValueError],
) -> None:
    """Raise `error` unless a tensor is contiguous float32 of one of the shapes, on the device."""
    if not isinstance(tensor, torch.Tensor):
        raise error(f"{name} is {tensor!r}, expected a tensor")
    if tensor.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise error(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype != torch.float32:
        raise error(f"{name} has dtype {tensor.dtype}, expected torch.float32")
    if tensor.device != device:
        raise error(f"{name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise error(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
