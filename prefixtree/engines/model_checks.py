"""What a transformers model must be like to run on the paged cache, looked for before it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from prefixtree.engines.errors import UnsupportedAttention, UnsupportedModel


class AttentionShape(NamedTuple):
    """What every attention layer of a model has in common."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    device: torch.device


def check_configuration(model: Any) -> None:
    """Raises UnsupportedModel for what the model and its configuration say about themselves."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"{name} is not a transformers.PreTrainedModel")
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder model, expected decoder-only")
    if config.get_text_config() is not config:
        raise UnsupportedModel(f"{name} is composed of several models, expected a text model")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name} has no language-model head that takes logits_to_keep")
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(f"{name} does not go through transformers' attention interface")
    if config._attn_implementation == "prefixtree":
        raise UnsupportedModel(f"{name} belongs to another PagedModel, which must be closed first")
    if model.training:
        raise UnsupportedModel(f"{name} is in training mode, call its eval() first")
    # Positions of one batch element decide over all others there, and KV that is cached keeps the
    # rotation it was computed with.
    for kind in _rope_types(model):
        if "dynamic" in kind or kind == "longrope":
            raise UnsupportedModel(
                f"{name} has rotary embeddings of type {kind!r}, which depend on the longest "
                "sequence of a batch"
            )


def probe(model: PreTrainedModel) -> AttentionShape:
    """Runs two tokens through a model that has the attention implementation of this package.

    Raises UnsupportedModel unless every layer writes its own K and V once, attends to them once
    with the window that its configuration names, and all layers agree in their shapes.
    """
    name = type(model).__name__
    windows = _configured_windows(model.config)
    notes = _Probe()
    positions = torch.arange(2, device=model.device)
    try:
        with torch.inference_mode():
            logits = model(
                input_ids=torch.zeros_like(positions)[None],
                position_ids=positions[None],
                past_key_values=notes,
                use_cache=True,
                logits_to_keep=positions[1:],
                prefixtree=notes,
            ).logits
    except UnsupportedModel:
        raise
    except UnsupportedAttention as error:
        raise UnsupportedModel(f"{name}: {error}") from error
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{name} cannot run on a cache of keys and values alone: {error!r}"
        ) from error
    layers = model.config.num_hidden_layers
    if sorted(notes.shapes) != list(range(layers)):
        raise UnsupportedModel(
            f"{name} has {layers} layers, of which {sorted(notes.shapes)} attend to cached KV"
        )
    for layer, window in enumerate(windows):
        if notes.windows[layer] != window:
            raise UnsupportedModel(
                f"layer {layer} of {name} has a window of {window} in its configuration, "
                f"but tells its attention function {notes.windows[layer]}"
            )
    if len(set(notes.shapes.values())) != 1:
        raise UnsupportedModel(f"the layers of {name} differ: {set(notes.shapes.values())}")
    if logits.shape[:2] != (1, 1):
        raise UnsupportedModel(f"{name} gives logits {tuple(logits.shape)} for one wanted row")
    return notes.shapes[0]


class _Probe(Cache):
    """Stands in for the cache, and notes what each layer hands over."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shapes: dict[int, AttentionShape] = {}
        self.windows: dict[int, int | None] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.written:
            raise UnsupportedModel(f"layer {layer_idx} writes KV twice")
        self.written[layer_idx] = key_states, value_states
        return key_states, value_states

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        own = self.written.get(layer)
        if own is None or own[0] is not key or own[1] is not value or layer in self.shapes:
            raise UnsupportedModel(f"layer {layer} attends to other KV than that it wrote")
        if not (query.dtype == key.dtype == value.dtype):
            raise UnsupportedModel(
                f"layer {layer} has queries, keys and values of {query.dtype}, {key.dtype} and "
                f"{value.dtype}, expected one dtype"
            )
        _, num_kv_heads, _, head_dim = key.shape
        self.windows[layer] = window
        self.shapes[layer] = AttentionShape(
            query.shape[1], num_kv_heads, head_dim, value.shape[3], key.dtype, key.device
        )
        return query.new_zeros(query.shape[2], query.shape[1], value.shape[3])


def _configured_windows(config: Any) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layers of type {kind!r} are not plain attention")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rope_types(model: PreTrainedModel) -> Iterator[str]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        yield from kinds.values() if isinstance(kinds, dict) else [kinds] if kinds else []
