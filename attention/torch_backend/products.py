"""Attention of many rows on a CPU as products of matrices, which oneDNN multiplies.

Torch's fused kernel multiplies with the library behind `torch.matmul` of float32, MKL, bfloat16 too
where there is no AMX. On AMD's CPUs that leaves half of AVX-512 idle. oneDNN does not, but asks for
matrices whose rows lie side by side, and for a call for each.
"""

import torch

from attention.algebra import Partial, merge_
from attention.torch_backend.batches import KV_TILE
from attention.torch_backend.bias import Bias
from attention.torch_backend.scratch import KEYS, QUERIES, VALUES, WEIGHTS, scratch

# What the copies of keys and values cost is made up for by so many rows times their width, and what
# the calls cost by so many multiplications of each thread for one of the products.
LEAST_WIDTH = 8 << 10
LEAST_PRODUCT = 4 << 20
# Logits held at once: more of them, with the probabilities beside them, leave the second cache.
LOGITS = 1 << 18

HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_GAINS = HAS_OPERATOR and torch.backends.cpu.get_cpu_capability() == "AVX512"


def worthwhile(q: torch.Tensor, tokens: int) -> bool:
    """Whether rows q [size, Hkv, rows, d] on so many tokens are faster this way."""
    width = q.shape[2] * q.shape[3]
    return (
        _GAINS
        and q.device.type == "cpu"
        and q.dtype != torch.float64
        and width >= LEAST_WIDTH
        and width * tokens >= LEAST_PRODUCT * torch.get_num_threads()
    )


def by_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    width: int,
    bias: Bias,
    scale: float,
    softcap: float | None,
) -> Partial:
    """As `softmax`, in float32 whatever the dtypes; a row that sees no token gives the identity."""
    size, heads, rows, _ = q.shape
    tokens = k.shape[2]
    o = q.new_empty((size, heads, rows, width), dtype=torch.float32)
    lse = q.new_empty((size, heads, rows), dtype=torch.float32)
    same = v is k and width == k.shape[3]
    step = max(LOGITS // min(tokens, KV_TILE), 1)
    for item in range(size):
        for head in range(heads):
            queries = _copied(q[item, head], QUERIES).mul_(scale)
            for begin in range(0, tokens, KV_TILE):
                of = slice(begin, begin + KV_TILE)
                keys = _side_by_side(k[item, head, of], KEYS)
                values = keys if same else _side_by_side(v[item, head, of, :width], VALUES)
                for first in range(0, rows, step):
                    some = slice(first, first + step)
                    logits = product(queries[some], keys)
                    if softcap is not None:
                        logits.div_(softcap).tanh_().mul_(softcap)
                    part = _weighted(logits, bias.of(item, head, some, of), values)
                    into = Partial(o[item, head, some], lse[item, head, some])
                    if begin:
                        merge_(into, part)
                    else:
                        into.o.copy_(part.o)
                        into.lse.copy_(part.lse)
    return Partial(o, lse)


def _weighted(logits: torch.Tensor, added: torch.Tensor | None, values: torch.Tensor) -> Partial:
    """The partial of rows whose logits are [rows, tokens], with something added to them."""
    if added is not None:
        logits += added
    # In memory that is kept, as the logits cannot be: for both the system would fetch new pages.
    weights = scratch(WEIGHTS, len(logits), logits.shape[1], logits.dtype, logits.device)
    torch.softmax(logits, 1, out=weights)
    top = logits.amax(1)
    # The largest weight is 1 over the sum of the others as parts of it.
    lse = top - weights.amax(1).log_()
    o = product(weights, values.t())
    if added is None:
        return Partial(o, lse)
    unseen = top == -torch.inf
    return Partial(o.masked_fill_(unseen.unsqueeze(1), 0.0), lse.masked_fill_(unseen, -torch.inf))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float32 a [m, k] times the transpose of b [n, k], whose rows or columns lie side by side."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def _side_by_side(x: torch.Tensor, number: int) -> torch.Tensor:
    """x [tokens, d] as float32 rows without a gap, in the scratch buffer of that number if not."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return _copied(x, number)


def _copied(x: torch.Tensor, number: int) -> torch.Tensor:
    return scratch(number, len(x), x.shape[1], torch.float32, x.device).copy_(x)
