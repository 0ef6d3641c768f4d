"""What every layer of a plan has in common: heads, dimensions, dtypes, layout, what is visible."""

from dataclasses import dataclass
from numbers import Integral

import torch

from attention.errors import PlanMismatch

LAYOUTS = ("NHD", "HND")
QUERY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Problem:
    """As documented at `attention.plan`."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    layout: str
    window: int | None
    sink_tokens: int
    batch_invariant: bool

    def __post_init__(self) -> None:
        """Raise PlanMismatch for the first field outside what `attention.plan` takes."""
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "value_head_dim", "sink_tokens"):
            _check_integer(name, getattr(self, name))
        if self.window is not None:
            _check_integer("window", self.window)
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            if getattr(self, name) < 1:
                raise PlanMismatch(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_q_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise PlanMismatch(
                f"num_q_heads is {self.num_q_heads}, expected a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        if self.dtype not in QUERY_DTYPES:
            raise PlanMismatch(
                f"dtype is {self.dtype}, expected torch.float64, float32, bfloat16 or float16"
            )
        if self.kv_dtype not in (self.dtype, *FLOAT8_DTYPES):
            raise PlanMismatch(
                f"kv_dtype is {self.kv_dtype}, expected the dtype of q, {self.dtype}, or "
                "torch.float8_e4m3fn or float8_e5m2"
            )
        if self.layout not in LAYOUTS:
            raise PlanMismatch(f"layout is {self.layout!r}, expected one of {LAYOUTS}")
        if self.window is not None and self.window < 1:
            raise PlanMismatch(f"window is {self.window}, expected at least 1 or None")
        if self.sink_tokens < 0:
            raise PlanMismatch(f"sink_tokens is {self.sink_tokens}, expected at least 0")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def precision(self) -> torch.dtype:
        """Of logits, partials and lse: float64 where q is, float32 otherwise."""
        return lse_dtype(self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim) * self.kv_dtype.itemsize

    @property
    def pair_flops(self) -> int:
        """Floating-point operations of one query on one token, all heads together."""
        return 2 * self.num_q_heads * (self.head_dim + self.value_head_dim)


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, (int, Integral)):  # the abstract class alone is slow to ask
        raise PlanMismatch(f"{name} is {value!r}, expected an integer")


def lse_dtype(q_dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp, and of all that is computed on the way to it."""
    return torch.float64 if q_dtype == torch.float64 else torch.float32
