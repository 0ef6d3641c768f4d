"""Models to test with, and what comes out of them without any cache."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefixtree.engines.sampling import SamplingParams, sample, streams
from prefixtree.forest import Forest

VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Logits so far apart that the order of a float32 sum does not decide which is the largest.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",  # the one that knows soft-capping in every release
}

_KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
}

KINDS = list(_KINDS)


def tiny_model(kind: str = "llama", **changes: object) -> PreTrainedModel:
    """A float32 model on the CPU with random weights, the same ones in every call."""
    model_class, config_class, special = _KINDS[kind]
    torch.manual_seed(0)
    return model_class(config_class(**{**_SIZES, **special, **changes})).eval()


@cache
def reference(kind: str) -> PreTrainedModel:
    """The same model once more, for what the library itself makes of it."""
    return tiny_model(kind)


def generated(kind: str, prompt: np.ndarray, params: SamplingParams, index: int = 0) -> list[int]:
    """A sample without stop tokens: generate() of the library, or a full forward for each token."""
    return _generated(kind, tuple(map(int, prompt)), params, index if params.temperature else 0)


@cache
def _generated(kind: str, prompt: tuple[int, ...], params: SamplingParams, index: int) -> list[int]:
    model = reference(kind)
    text = torch.tensor([prompt])
    with torch.inference_mode():
        if params.temperature == 0:
            text = model.generate(
                text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=params.max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        else:
            stream = streams(params, [index])
            for _ in range(params.max_new_tokens):
                logits = model(text, use_cache=False).logits[:, -1]
                token = sample(logits, stream, np.array([text.shape[1]]))
                text = torch.cat([text, torch.from_numpy(token)[None]], dim=1)
    return text[0, len(prompt) :].tolist()


class PathModel:
    """A stand-in for a model whose KV are the tokens themselves.

    Its logits are random numbers that the whole text up to the query decides. It reads that text
    through the forest from the slots that were written, so one wrong slot, position or block on the
    way changes what is generated.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int = VOCAB,
        max_positions: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.kv = np.full(num_blocks * block_size, -1)
        self.batches: list[int] = []

    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        forest: Forest,
        logits_at: np.ndarray,
    ) -> torch.Tensor:
        assert len(tokens) == len(positions) == len(slots) == forest.query_len.sum()
        written = slots[slots >= 0]
        assert len(np.unique(written)) == len(written)
        self.batches.append(len(tokens))
        self.kv[written] = tokens[slots >= 0]
        ends = np.cumsum(forest.query_len)
        logits = np.empty((len(logits_at), self.vocab_size), np.float32)
        for i, row in enumerate(logits_at):
            sequence = int(np.searchsorted(ends, row, side="right"))
            text = self._path(forest, int(forest.leaf[sequence]))
            query = len(text) - int(ends[sequence] - row)
            assert positions[row] == query
            assert tokens[row] == text[query]
            logits[i] = self.logits_behind(text[: query + 1])
        return torch.from_numpy(logits)

    def logits_behind(self, text: np.ndarray) -> np.ndarray:
        seed = hashlib.sha256(np.asarray(text, np.int64).tobytes()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        return rng.normal(size=self.vocab_size).astype(np.float32) * 3

    def generated(self, prompt: np.ndarray, params: SamplingParams, index: int = 0) -> list[int]:
        """A sample without stop tokens."""
        text = list(prompt)
        for _ in range(params.max_new_tokens):
            logits = torch.from_numpy(self.logits_behind(np.array(text)))[None]
            text.append(int(sample(logits, streams(params, [index]), np.array([len(text)]))[0]))
        return text[len(prompt) :]

    def _path(self, forest: Forest, node: int) -> np.ndarray:
        text = np.empty(0, np.int64)
        while node >= 0:
            blocks = forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]]
            slots = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
            first = int(forest.offset[node])
            text = np.concatenate([self.kv[slots[first : first + forest.length[node]]], text])
            node = int(forest.parent[node])
        return text
