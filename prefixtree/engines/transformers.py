"""Models of the transformers library on the paged cache, their code unchanged.

Two of the library's own openings are used. The model is given a cache object, to which every
layer hands its new K and V, and an attention implementation, which every layer calls. The object
writes K and V into the storage and returns the layer's whole paged tensors; the function gets them
back together with the object (as the keyword `prefixtree` of the forward pass) and attends with the
plan of the step. Nothing is copied, no mask is built, and nothing is global but the function.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

import attention
from allocator import KVStorage
from prefixtree.engines.errors import InvalidStep, ModelClosed, UnsupportedAttention

try:
    from transformers import AttentionInterface, Cache, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "prefixtree.engines.transformers needs the transformers library (5.17 or newer): "
        "pip install prefixtree[transformers]"
    ) from error

from prefixtree.engines.keywords import check_keywords
from prefixtree.engines.model_checks import check_configuration, probe

Int64s: TypeAlias = NDArray[np.int64]


class PagedModel:
    """A loaded decoder-only model and the K/V storage it runs on.

    From construction to `close()` the model's attention implementation is "prefixtree" and the
    model runs through `forward` only. Usable as a context manager.

    Attributes: model, storage (a KVStorage), num_blocks, block_size, vocab_size (number of input
    embeddings), max_positions (as many as the configuration names, or None).
    """

    def __init__(self, model: PreTrainedModel, num_blocks: int, block_size: int = 16) -> None:
        """Runs two tokens through the model to see what its layers hand over.

        Raises UnsupportedModel, with the model as it was, unless the model's attention
        implementation can be set and every layer is plain causal attention over its own K and V,
        all layers with the same heads, head sizes, dtype and device. Linear attention, K/V shared
        between layers, attention sinks, chunked attention and rotary embeddings that depend on the
        longest sequence of a batch are among what is refused.
        """
        check_configuration(model)
        # The library types whatever a model has as Tensor | Module.
        self.model = cast(Any, model)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings
        self.max_positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        self._previous = self.model.config._attn_implementation
        self._is_open = True
        self.model.set_attn_implementation("prefixtree")
        try:
            self._shape = shape = probe(model)
            self.storage = KVStorage(
                self.model.config.num_hidden_layers,
                num_blocks,
                block_size,
                shape.num_kv_heads,
                shape.head_dim,
                value_head_dim=shape.value_head_dim,
                dtype=shape.dtype,
                device=shape.device,
            )
        except BaseException:
            self.close()
            raise

    def forward(
        self,
        tokens: Int64s,
        positions: Int64s,
        slots: Int64s,
        forest: attention.ForestArrays,
        logits_at: Int64s,
    ) -> torch.Tensor:
        """One pass over T tokens of any number of sequences, packed in the forest's query order.

        tokens, positions, slots: [T]. The K and V of a token go to its slot before any attention;
        slot -1: they are there already. logits_at: [L], the rows 0..T-1 whose logits are wanted.

        Returns logits [L, vocabulary] in the model's dtype, on its device, without gradient.

        Raises ModelClosed; InvalidStep, before anything was written, for arrays of unequal length
        and for tokens, slots or rows out of range; `InvalidForest` for a forest that is none.
        """
        if not self._is_open:
            raise ModelClosed("forward() after close()")
        count = int(forest.query_len.sum())
        for name, array in (("tokens", tokens), ("positions", positions), ("slots", slots)):
            if array.shape != (count,):
                raise InvalidStep(f"{name} has shape {array.shape}, the forest {count} queries")
        _check_range("tokens", tokens, 0, self.vocab_size)
        _check_range("slots", slots, -1, self.num_blocks * self.block_size)
        _check_range("logits_at", logits_at, 0, count)
        step = _Step(self, forest, slots)
        with torch.inference_mode():
            output = self.model(
                input_ids=self._tensor(tokens)[None],
                position_ids=self._tensor(positions)[None],
                past_key_values=step,
                use_cache=True,
                logits_to_keep=self._tensor(logits_at),
                prefixtree=step,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        """Gives the model its previous attention implementation back. Closing twice is no error."""
        if self._is_open:
            self._is_open = False
            self.model.set_attn_implementation(self._previous)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _tensor(self, array: Int64s) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(self._shape.device)

    def _plan(self, forest: attention.ForestArrays, window: int | None) -> attention.Plan:
        shape = self._shape
        return attention.plan(
            forest,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            value_head_dim=shape.value_head_dim,
            dtype=shape.dtype,
            device=shape.device,
            window=window,
        )


class _Step(Cache):
    """One forward pass: where its K and V go, and the plans its layers attend with."""

    def __init__(self, paged: PagedModel, forest: attention.ForestArrays, slots: Int64s) -> None:
        super().__init__(layers=[])
        self.paged = paged
        self.forest = forest
        self.slots = paged._tensor(slots)
        self.longest = int((forest.start + forest.length).max())
        self.plans: dict[int | None, attention.Plan] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes K and V [1, heads, T, head_dim]. Returns the paged tensors of the layer."""
        k, v = (states[0].transpose(0, 1) for states in (key_states, value_states))
        storage = self.paged.storage
        k_cache, v_cache = storage.k[layer_idx], storage.v[layer_idx]
        attention.write(k, v, k_cache, v_cache, self.slots, layout=storage.layout)
        return k_cache, v_cache

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
        if window is not None and window >= self.longest:
            window = None
        if window not in self.plans:
            self.plans[window] = self.paged._plan(self.forest, window)
        out, _ = attention.run(
            self.plans[window], query[0].transpose(0, 1), key, value, scale=scaling, softcap=softcap
        )
        return out


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefixtree: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that a bound model calls: query [1, Hq, T, head_dim]."""
    layer: Any = module.layer_idx
    if prefixtree is None:
        raise UnsupportedAttention(
            f"layer {layer} was not given the keyword `prefixtree`: a model in a PagedModel runs "
            "through PagedModel.forward, and its layers must pass unknown keywords on"
        )
    check_keywords(layer, module, {"attention_mask": attention_mask, **others})
    out = prefixtree.attend(layer, query, key, value, scaling, softcap, sliding_window)
    return out.unsqueeze(0), None


def _check_range(name: str, values: Int64s, low: int, high: int) -> None:
    wrong = (values < low) | (values >= high)
    if wrong.any():
        at = int(wrong.argmax())
        raise InvalidStep(f"{name}[{at}] is {values[at]}, expected {low}..{high - 1}")


# No mask function of this name is registered, and without one the library makes no mask.
AttentionInterface.register("prefixtree", _attention)
