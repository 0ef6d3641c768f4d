"""vLLM, engine and scheduler in this process."""

from __future__ import annotations

import os
from typing import Any

from prefixtree.bench.engines.model import save_model
from prefixtree.bench.engines.serving import Reply, Serving, Setup
from prefixtree.bench.engines.watch import Watch


def start(setup: Setup) -> Serving:
    # Before vLLM is imported, which reads them then.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PREFIXTREE_ATTENTION": str(int("attention" in setup.parts)),
    }
    return VLLM(setup)


class VLLM:
    """An engine that is stepped by whoever waits for it."""

    def __init__(self, setup: Setup) -> None:
        from vllm import LLM

        if setup.parts:
            from prefixtree.engines.vllm import plugin

            plugin.register()
        watch = Watch(setup.steps, setup.clock)
        _watch_attention(watch, setup.parts)
        options: dict[str, Any] = {}
        if "cache" in setup.parts:
            options["scheduler_cls"] = "prefixtree.engines.vllm.scheduler.PrefixTreeScheduler"
        llm = LLM(
            model=str(save_model(setup.model, setup.longest + 8, setup.folder / "model")),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            block_size=setup.page,
            num_gpu_blocks_override=setup.pool_tokens // setup.page + 1,  # one is never used
            max_model_len=setup.longest + 8,
            max_num_seqs=setup.concurrency,
            max_num_batched_tokens=setup.step_tokens,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            distributed_executor_backend="uni",
            seed=0,
            **options,
        )
        self._engine = llm.llm_engine
        core: Any = self._engine.engine_core.engine_core
        watch.time("scheduler", core.scheduler, "schedule", "update_from_output")
        _watch_steps(watch, core.model_executor)

    def submit(self, request: str, prompt: list[int], output: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(request, {"prompt_token_ids": prompt}, params)

    def receive(self) -> list[Reply]:
        return [
            Reply(
                output.request_id,
                list(output.outputs[0].token_ids),
                output.finished,
                output.num_cached_tokens or 0,
            )
            for output in self._engine.step()
        ]

    def close(self) -> None:
        pass


def _watch_attention(watch: Watch, parts: frozenset[str]) -> None:
    """The backend of this run: building its metadata, writing KV, and attending."""
    if "attention" in parts:
        from prefixtree.engines.vllm import attention

        watch.time("attention", attention.TreeAttentionMetadataBuilder, "build")
        watch.time("attention", attention.TreeAttentionImpl, "do_kv_cache_update", "forward")
    else:
        from vllm.v1.attention.backends import cpu_attn

        watch.time("attention", cpu_attn.CPUAttentionMetadataBuilder, "build")
        watch.time("attention", cpu_attn.CPUAttentionBackendImpl, "do_kv_cache_update", "forward")


def _watch_steps(watch: Watch, executor: Any) -> None:
    execute_model = executor.execute_model

    def execute_then_note(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute_model(scheduled, *args, **kwargs)
        sequences = len(scheduled.num_scheduled_tokens)
        if sequences:
            decoding = scheduled.total_num_scheduled_tokens == sequences
            watch.step(decoding=decoding, sequences=sequences)
        return result

    executor.execute_model = execute_then_note
