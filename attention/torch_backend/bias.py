"""What is added to the logits of a batched call."""

from typing import NamedTuple

import torch


class Bias(NamedTuple):
    """mask + slope * distance.

    Attributes:
        mask: [size, 1, 1 or rows, tokens], or None for 0.
        slope: [Hkv, rows, 1], or None for 0.
        distance: [tokens].
    """

    mask: torch.Tensor | None
    slope: torch.Tensor | None
    distance: torch.Tensor | None

    def part(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        """For some of the rows and tokens, [size or 1, Hkv or 1, rows or 1, tokens]."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None), tokens]
        if self.slope is None or self.distance is None:
            return mask
        sloped = (self.slope[:, rows] * self.distance[tokens]).unsqueeze(0)
        return sloped if mask is None else sloped + mask

    def of(self, item: int, head: int, rows: slice, tokens: slice) -> torch.Tensor | None:
        """For some of the rows and tokens of one KV head of one item, [rows or 1, tokens]."""
        mask, slope = self.mask, self.slope
        one = Bias(
            None if mask is None else mask[item : item + 1],
            None if slope is None else slope[head : head + 1],
            self.distance,
        )
        part = one.part(rows, tokens)
        return None if part is None else part[0, 0]
