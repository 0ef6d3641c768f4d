"""Sampling the next token of a batch in which every row has its own parameters and random stream.

Tokens are drawn by the Gumbel-max method: the largest of logit / temperature + noise, where the
noise of a token is a function of (seed, sample index, position, token). So a sample's tokens depend
on its seed, its index and its logits only, not on the other rows of the batch nor on a preemption.

And they stay the same when the logits come out a rounding error different, as they do in a batch of
another shape: only a tie of two tokens is then decided otherwise. Inverting the cumulative
distribution would be cheaper, but moves every boundary between two tokens.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from prefixtree.engines.errors import InvalidLogits, InvalidSampling

# A row of a batch as the sampler sees it.
STREAM = np.dtype([("key", "u8"), ("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8")])

# SplitMix64's constants as signed 64-bit numbers: torch has no unsigned arithmetic.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

# The float64 work is done on so many logits at a time: what a cache holds on a CPU; elsewhere a
# bound on the memory.
_CHUNK = {"cpu": 1 << 20}
_LARGE_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    max_new_tokens: most tokens of a sample, >= 1.
    n: samples that continue the same prompt, >= 1.
    temperature: divides the logits, finite; 0 takes the most likely token (the first of equals).
    top_k: only the k most likely tokens, of equal ones the lower ids; 0 for all.
    top_p: after top_k, only the smallest set of most likely tokens whose probability reaches
        top_p (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020); 0 < top_p <= 1.
    seed: 0 <= seed < 2**64. Sample i of every request with this seed draws the same uniforms.
    stop_tokens: a sample ends with the first of these ids, which is still part of it.

    Raises InvalidSampling for a value outside its range, NaN included.
    """

    max_new_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require("max_new_tokens", Integral, lambda v: 1 <= v < 2**31, "an integer >= 1")
        self._require("n", Integral, lambda v: v >= 1, "an integer >= 1")
        self._require(
            "temperature", Real, lambda v: v >= 0 and math.isfinite(v), "a finite number >= 0"
        )
        self._require("top_k", Integral, lambda v: 0 <= v < 2**31, "an integer >= 0")
        self._require("top_p", Real, lambda v: 0 < v <= 1, "a number in (0, 1]")
        self._require("seed", Integral, lambda v: 0 <= v < 2**64, "an integer in [0, 2**64)")
        self._require(
            "stop_tokens", tuple, lambda v: all(map(_is_token, v)), "a tuple of token ids"
        )

    def _require(self, name: str, kind: type, valid: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
            raise InvalidSampling(f"{name} is {value!r}, expected {expected}")


def _is_token(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**31


def streams(params: SamplingParams, samples: Iterable[int]) -> NDArray[np.void]:
    """The rows (dtype STREAM) of these samples of a request."""
    return np.array(
        [
            (stream_key(params.seed, sample), params.temperature, params.top_k, params.top_p)
            for sample in samples
        ],
        dtype=STREAM,
    )


def stream_key(seed: int, sample: int) -> int:
    """64 bits that stand for the random stream of one sample."""
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed, sample))


def splitmix(states: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Outputs of the generator SplitMix64, number `outputs` (from 0) of the one with each state.

    int64 tensors that broadcast; their bits are the unsigned numbers. The state is a counter, so
    any output is reached at once. Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014.
    """
    z = states + (outputs + 1) * _STEP
    # Shifts of signed numbers copy the sign; the masks clear the copies.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX[0]
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX[1]
    return z ^ ((z >> 31) & (2**33 - 1))


def gumbels(
    keys: NDArray[np.uint64], positions: NDArray[np.int64], vocab: int, device: torch.device
) -> torch.Tensor:
    """Gumbel noise, float64 [B, vocab]: row i is that of stream `keys[i]` at `positions[i]`."""
    states = splitmix(
        torch.from_numpy(keys.view(np.int64).copy()).to(device),
        torch.from_numpy(positions.astype(np.int64)).to(device),
    )
    bits = splitmix(states.unsqueeze(1), torch.arange(vocab, device=device))
    # The upper 53 bits, moved by half a step so that no logarithm is of 0 or 1.
    uniforms = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniforms.log_().neg_().log_().neg_()


def sample(
    logits: torch.Tensor, streams: NDArray[np.void], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """One token for each row.

    logits: [B, V], any floating dtype and device; -inf forbids a token. streams: [B], a structured
    array with the fields of STREAM. positions: [B], those of the tokens to be sampled.

    Waits for the device once. Raises InvalidLogits when a row has NaN, +inf or only -inf.
    """
    top, tokens = logits.max(dim=-1)
    drawn = np.flatnonzero(streams["temperature"] > 0)
    step = max(1, _CHUNK.get(logits.device.type, _LARGE_CHUNK) // logits.shape[1])
    for first in range(0, len(drawn), step):
        some = drawn[first : first + step]
        at = torch.from_numpy(some).to(logits.device)
        tokens[at] = _draw(logits[at], streams[some], positions[some])
    result = torch.where(top.isfinite(), tokens, -1).cpu().numpy()
    if (result < 0).any():
        raise InvalidLogits(np.flatnonzero(result < 0).tolist())
    return result


def _draw(
    logits: torch.Tensor, streams: NDArray[np.void], positions: NDArray[np.int64]
) -> torch.Tensor:
    """The winners of the race of each row's tokens. Returns [B]."""
    vocab = logits.shape[1]
    shifted = logits.double()
    shifted = shifted - shifted.amax(dim=-1, keepdim=True)
    scores = shifted.div_(_column(streams["temperature"], logits))
    truncated = (streams["top_p"] < 1) | ((streams["top_k"] > 0) & (streams["top_k"] < vocab))
    if truncated.any():
        at = torch.from_numpy(np.flatnonzero(truncated)).to(logits.device)
        scores[at] = _truncate(scores[at], streams[truncated])
    return (scores + gumbels(streams["key"], positions, vocab, logits.device)).argmax(dim=-1)


def _truncate(scores: torch.Tensor, streams: NDArray[np.void]) -> torch.Tensor:
    """Scores [B, V] with -inf for what top_k and then top_p leave out."""
    vocab = scores.shape[1]
    ranked, tokens = scores.sort(dim=-1, descending=True, stable=True)
    cdf = ranked.exp().cumsum(dim=-1)
    top_k = streams["top_k"]
    last = _column(np.where(top_k > 0, np.minimum(top_k, vocab), vocab) - 1, scores)
    reach = _column(streams["top_p"], scores) * cdf.gather(1, last)
    # Only in a row of NaN does the search end behind the last token.
    last = torch.searchsorted(cdf, reach).clamp_(max=vocab - 1)
    kept = torch.arange(vocab, device=scores.device) <= last
    return torch.full_like(scores, -torch.inf).scatter_(
        1, tokens, ranked.masked_fill_(~kept, -torch.inf)
    )


def _column(values: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device).unsqueeze(1)
