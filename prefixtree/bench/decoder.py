"""A decoder of the Llama family with random weights, in plain torch operations: what surrounds
attention in a decode step, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch.nn.functional import linear, rms_norm, silu

Attend: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer, q [T, Hq, d], k and v [T, Hkv, d]: writes K and V, returns [T, Hq, d]."""


class ModelShape(NamedTuple):
    """Sizes of a decoder; heads of hidden / num_q_heads."""

    layers: int
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    intermediate: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_q_heads

    @property
    def parameters(self) -> int:
        """Numbers in all weight matrices."""
        kv = 2 * self.num_kv_heads * self.head_dim
        layer = self.hidden * (2 * self.hidden + kv + 3 * self.intermediate)
        return self.layers * layer + 2 * self.vocab * self.hidden

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of a token's K and V in all layers."""
        return 2 * self.layers * self.num_kv_heads * self.head_dim * itemsize


MODELS = {
    "tiny": ModelShape(4, 512, 8, 2, 1408, 4096),
    "7b": ModelShape(32, 4096, 32, 32, 11_008, 32_016),
    "13b": ModelShape(40, 5120, 40, 40, 13_824, 32_016),
}
"""A model for a CPU, and CodeLlama's two of Hydragen's figures."""

ROTARY_BASE = 1_000_000.0


class Decoder:
    """The weights, normally distributed as models are initialised."""

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            matrix = torch.empty(rows, columns, dtype=dtype, device=device)
            return matrix.normal_(0.0, columns**-0.5, generator=generator)

        self.shape = shape
        self.embeddings = weight(shape.vocab, shape.hidden)
        self.head = weight(shape.vocab, shape.hidden)
        qkv = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.layers = [
            (
                weight(qkv, shape.hidden),
                weight(shape.hidden, shape.hidden),
                weight(2 * shape.intermediate, shape.hidden),
                weight(shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        pairs = torch.arange(0, shape.head_dim, 2, device=device)
        self.frequencies = ROTARY_BASE ** (-pairs / shape.head_dim)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The likeliest next tokens [T] behind tokens [T] at positions [T]."""
        shape = self.shape
        x = self.embeddings[tokens]
        angle = (positions[:, None] * self.frequencies).to(torch.float32)[:, None]
        turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
        for number, (qkv, out, gate_up, down) in enumerate(self.layers):
            rows = linear(_normed(x), qkv).view(len(x), -1, shape.head_dim)
            q, k, v = torch.split_with_sizes(rows, heads, dim=1)
            attended = attend(number, _rotated(q, *turn), _rotated(k, *turn), v)
            x = x + linear(attended.flatten(1), out)
            gate, up = linear(_normed(x), gate_up).chunk(2, dim=1)
            x = x + linear(silu(gate) * up, down)
        return linear(_normed(x), self.head).argmax(1)


def _normed(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of heads [T, heads, d]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
