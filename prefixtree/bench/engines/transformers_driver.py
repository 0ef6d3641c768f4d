"""The continuous batching of the transformers library."""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.generation.continuous_batching import input_outputs
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from prefixtree.bench.engines.model import make_model
from prefixtree.bench.engines.serving import Reply, Serving, Setup
from prefixtree.bench.engines.watch import Watch

STOCK_ATTENTION = "sdpa"


def start(setup: Setup) -> Serving:
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    return Transformers(setup)


class Transformers:
    """A manager, whose generation thread does the work."""

    def __init__(self, setup: Setup) -> None:
        model = make_model(setup.model, setup.longest)
        model.set_attn_implementation(STOCK_ATTENTION)
        names = [STOCK_ATTENTION]
        if setup.parts:
            from prefixtree.engines import continuous_batching
            from prefixtree.engines.continuous_batching.allocator import NAME

            continuous_batching.install()
            names.append(NAME)
        self._cached: dict[str, int] = {}
        self._watch(Watch(setup.steps, setup.clock), names)
        config: Any = GenerationConfig
        greedy = config(do_sample=False, eos_token_id=-1)
        self._manager = model.init_continuous_batching(
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=setup.page,
                num_blocks=setup.pool_tokens // setup.page,
                max_batch_tokens=setup.step_tokens,
                max_requests_per_batch=setup.concurrency,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.start()

    def submit(self, request: str, prompt: list[int], output: int) -> None:
        self._manager.add_request(prompt, request, max_new_tokens=output, streaming=True)

    def receive(self) -> list[Reply]:
        output = None
        while output is None:
            output = self._manager.get_result(timeout=1)
            if output is None and not self._manager.is_running():
                raise RuntimeError("the generation thread has ended")
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id}: {output.error}")
        request = output.request_id
        # A copy: the thread goes on to write to it.
        tokens = list(output.generated_tokens)
        return [Reply(request, tokens, output.is_finished(), self._cached.get(request, 0))]

    def close(self) -> None:
        self._manager.stop(block=True)

    def _watch(self, watch: Watch, attentions: list[str]) -> None:
        watch.time(
            "scheduler",
            ContinuousBatchProcessor,
            "prepare_next_batch",
            idle=lambda is_busy: not is_busy,
        )
        watch.time("scheduler", ContinuousBatchProcessor, "update_batch")
        # Attention by a mask is not without the mask.
        watch.time("attention", input_outputs, "build_attention_mask")
        interface: Any = AttentionInterface
        for name in attentions:
            interface.register(name, watch.timed("attention", interface()[name]))
        _then(
            ContinuousBatchProcessor, "_generation_step", lambda _, batch, *__: _row(watch, batch)
        )
        _then(PagedAttentionCache, "search_prefix_match", self._found)

    def _found(self, tokens: int, _: Any, request: str, *__: Any) -> None:
        # Who loses its blocks begins again, and finds what it has computed itself.
        self._cached.setdefault(request, tokens)


def _then(owner: Any, name: str, after: Any) -> None:
    """Calls `after(result, *arguments)` after each call."""
    function = getattr(owner, name)

    @wraps(function)
    def call(*args: Any) -> Any:
        result = function(*args)
        after(result, *args)
        return result

    setattr(owner, name, call)


def _row(watch: Watch, processor: Any) -> None:
    data = processor.inputs_and_outputs
    sequences = data.num_request_in_batch
    watch.step(decoding=data.total_seqlen_q == sequences, sequences=sequences)
