"""The algebra of attention partials.

A partial is the attention of queries over a part of their keys: `o`, the softmax-weighted mean of
the values [..., head_dim], and `lse`, the natural log-sum-exp of the logits [...]. Merging the
partials of disjoint parts gives the partial of their union (online softmax: Milakov and Gimelshein
2018, arXiv 1805.02867), so partials form a commutative monoid.
"""

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """o [..., head_dim] and lse [...], of the same leading shape."""

    o: torch.Tensor
    lse: torch.Tensor


IDENTITY = Partial(torch.tensor(0.0), torch.tensor(-torch.inf))
"""The partial over no keys at all: o = 0, lse = -inf. Broadcasts against any partial."""


def merge(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> Partial:
    """The partial over the keys of both `a` and `b`; two identities give the identity.

    Either may have fewer dimensions and is then broadcast. A learned sink logit for each head, as
    gpt-oss has, is a key whose value is 0: `merge((o, lse), (IDENTITY.o, sink_logits))`.
    """
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf minus -inf is NaN: where neither side saw a key, both weights are exp(-inf - 0) = 0.
    reference = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    weight_a = torch.exp(lse_a - reference).unsqueeze(-1)
    weight_b = torch.exp(lse_b - reference).unsqueeze(-1)
    return Partial(weight_a * o_a + weight_b * o_b, lse)


def merge_(into: Partial, part: Partial) -> None:
    """Merge `part` into `into` in place: one pass over o, for partials of equal shape and dtype."""
    # Where the part saw no key its weight is 0; where only `into` saw none, sigmoid(inf) is 1.
    weight = torch.sigmoid(part.lse - into.lse)
    weight.masked_fill_(part.lse == -torch.inf, 0.0)
    into.o.lerp_(part.o, weight.unsqueeze(-1))
    torch.logaddexp(into.lse, part.lse, out=into.lse)


def scan(o: torch.Tensor, lse: torch.Tensor, dim: int = 0) -> Partial:
    """Inclusive running merge along `dim` of lse: entry i is the merge of the partials 0..i.

    Args:
        o: [..., head_dim], lse: [...]; `dim` counts the dimensions of lse.

    O(n log n) work in O(log n) steps (Hillis and Steele 1986).
    """
    dim = dim % lse.dim()
    o, lse = o.movedim(dim, 0), lse.movedim(dim, 0)
    step = 1
    while step < len(lse):
        merged = merge((o[:-step], lse[:-step]), (o[step:], lse[step:]))
        o = torch.cat([o[:step], merged.o])
        lse = torch.cat([lse[:step], merged.lse])
        step *= 2
    return Partial(o.movedim(0, dim), lse.movedim(0, dim))
