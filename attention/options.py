"""What may differ from layer to layer under one plan."""

from typing import NamedTuple

import torch


class RunOptions(NamedTuple):
    """As documented at `attention.run`, checked, with the default scale filled in."""

    scale: float
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
