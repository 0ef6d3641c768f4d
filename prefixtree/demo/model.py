"""The model of the demo and the text form of its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


@dataclass(frozen=True)
class TextModel:
    """A causal language model with the two ways between text and its token ids."""

    model: PreTrainedModel
    stop_tokens: tuple[int, ...]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    description: str


def random_llama(seed: int) -> TextModel:
    """A small float32 Llama with random weights drawn from `seed`, over UTF-8 bytes as tokens.

    It ends no text of its own accord.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2**20,
        # The usual 0.02 leaves a model this small nearly blind to its context: it repeats one
        # byte for ever, and any cache would look right. At 0.1 attention picks out positions and
        # the text varies, while float32 rounding stays near 1e-5 of the spread of the logits.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.requires_grad_(False).train(False)
    description = (
        f"a Llama of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{model.num_parameters() / 1e6:.1f} M parameters, float32, made on the spot with random "
        f"weights (seed {seed}): it does all the work of a real model and writes noise"
    )
    return TextModel(model, (), lambda text: list(text.encode()), _decode_bytes, description)


def pretrained(name_or_path: str) -> TextModel:
    """A model and its tokenizer from a directory or the Hugging Face Hub, in float32.

    Raises OSError or ValueError, as transformers does, for what it cannot load.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    model.requires_grad_(False).train(False)
    stop = model.generation_config.eos_token_id
    # A model may bring penalties and temperatures of its own, which the engine does not have.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return TextModel(
        model,
        () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop),
        lambda text: list(tokenizer(text).input_ids),
        lambda tokens: str(tokenizer.decode(list(tokens))),
        f"{name_or_path} ({type(model).__name__}, {model.num_parameters() / 1e6:.1f} M "
        "parameters, float32)",
    )


def next_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [V] behind `tokens`, from one pass through the model without any cache."""
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)], device=model.device), use_cache=False)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def _decode_bytes(tokens: Sequence[int]) -> str:
    """Escapes where the bytes are not ASCII: a token alone need not be a whole UTF-8 character."""
    return bytes(tokens).decode("ascii", "backslashreplace")
