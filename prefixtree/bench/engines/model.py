"""The model that all engines load: a Llama made on the spot, with random weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class ModelSize(NamedTuple):
    """What can be chosen of it."""

    layers: int
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int


def make_model(size: ModelSize, longest: int) -> Any:
    """The same weights every time. longest: tokens of a sequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.num_q_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=longest,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Logits so far apart that the order of a float32 sum does not decide which is the largest.
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def save_model(size: ModelSize, longest: int, folder: Path) -> Path:
    """For engines that load from a folder, which is returned. There is no tokenizer."""
    make_model(size, longest).save_pretrained(folder)
    return folder
