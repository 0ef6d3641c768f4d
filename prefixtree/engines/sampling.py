"""Sampling the next token of a batch in which every row has its own parameters and random stream.

A sample's tokens depend on its seed, its index and its logits only. The uniform that decides a
token is a function of (seed, sample index, position), so neither the other rows of the batch nor
a preemption in between changes it. The distribution is computed in float64, where the order of a
sum, which does depend on the shape of the batch, makes a difference of 1e-16 only.
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


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position): 53 bits of SplitMix64's output at `position`.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014. Its state is
    a counter, so any position is reached at once. Positions are >= 0.
    """
    z = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


def sample(
    logits: torch.Tensor, streams: NDArray[np.void], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """One token for each row.

    logits: [B, V], any floating dtype and device; -inf forbids a token. streams: [B], a structured
    array with the fields of STREAM. positions: [B], those of the tokens to be sampled.

    Waits for the device once. Raises InvalidLogits when a row has NaN, +inf or only -inf.
    """
    top, tokens = logits.max(dim=-1)
    drawn = streams["temperature"] > 0
    if drawn.any():
        vocab = logits.shape[1]
        truncated = (streams["top_p"] < 1) | ((streams["top_k"] > 0) & (streams["top_k"] < vocab))
        u = uniforms(streams["key"], positions)
        step = max(1, _CHUNK.get(logits.device.type, _LARGE_CHUNK) // vocab)
        # The order of the sum is part of the result, so what a row goes through depends on its own
        # parameters alone.
        for draw, chosen in ((_draw, drawn & ~truncated), (_draw_truncated, drawn & truncated)):
            rows = np.flatnonzero(chosen)
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                at = torch.from_numpy(some).to(logits.device)
                tokens[at] = draw(logits[at], streams[some], u[some])
    result = torch.where(top.isfinite(), tokens, -1).cpu().numpy()
    if (result < 0).any():
        raise InvalidLogits(np.flatnonzero(result < 0).tolist())
    return result


def _draw(logits: torch.Tensor, streams: NDArray[np.void], u: NDArray[np.float64]) -> torch.Tensor:
    """Inverse of the cumulative distribution over token ids at u. Returns [B]."""
    cdf = _cumulative(logits, streams)
    return torch.searchsorted(cdf, _column(u, logits) * cdf[:, -1:], right=True).squeeze(1)


def _draw_truncated(
    logits: torch.Tensor, streams: NDArray[np.void], u: NDArray[np.float64]
) -> torch.Tensor:
    """The same over the most likely tokens, from the most likely one downward. Returns [B]."""
    logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    cdf = _cumulative(logits, streams)
    vocab = logits.shape[1]
    top_k = streams["top_k"]
    last = _column(np.where(top_k > 0, np.minimum(top_k, vocab), vocab) - 1, logits)
    reach = _column(streams["top_p"], logits) * cdf.gather(1, last)
    last = torch.searchsorted(cdf, reach).clamp_(max=vocab - 1)
    rank = torch.searchsorted(cdf, _column(u, logits) * cdf.gather(1, last), right=True)
    # Only in a row of NaN does a search end behind the last token.
    return tokens.gather(1, rank.clamp_(max=vocab - 1)).squeeze(1)


def _cumulative(logits: torch.Tensor, streams: NDArray[np.void]) -> torch.Tensor:
    """Running sum of exp((logits - largest) / temperature), float64 [B, V], not normalised."""
    shifted = logits.double()
    shifted = shifted - shifted.amax(dim=-1, keepdim=True)
    return shifted.div_(_column(streams["temperature"], logits)).exp_().cumsum(dim=-1)


def _column(values: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device).unsqueeze(1)
