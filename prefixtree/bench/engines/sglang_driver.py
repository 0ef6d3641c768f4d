"""SGLang, with its overlapped scheduler, on PyTorch's attention where it is stock."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from prefixtree.bench.engines.model import save_model
from prefixtree.bench.engines.serving import Reply, Serving, Setup


def start(setup: Setup) -> Serving:
    from prefixtree.bench.engines import sglang_plugin

    info = setup.folder / "prefixtree_bench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prefixtree-bench\nVersion: 0\n")
    (info / "entry_points.txt").write_text(sglang_plugin.ENTRY_POINTS)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(setup.folder), os.environ["PYTHONPATH"]]),
        "SGLANG_PLATFORM": sglang_plugin.PLATFORM,
        sglang_plugin.STEPS: str(setup.steps),
        sglang_plugin.CLOCK: setup.clock,
    }
    sys.path.insert(0, str(setup.folder))
    return SGLang(setup)


class SGLang:
    """An engine, whose scheduler is another process."""

    def __init__(self, setup: Setup) -> None:
        from sglang.srt.entrypoints.engine import Engine

        from prefixtree.engines.sglang.platform import STOCK_ATTENTION
        from prefixtree.engines.sglang.plugin import NAME

        options = {"radix_cache_backend": NAME} if "cache" in setup.parts else {}
        self._engine = Engine(
            model_path=str(save_model(setup.model, setup.longest + 8, setup.folder / "model")),
            device="cpu",
            dtype="float32",
            attention_backend=NAME if "attention" in setup.parts else STOCK_ATTENTION,
            sampling_backend="pytorch",
            grammar_backend="none",
            skip_tokenizer_init=True,
            disable_cuda_graph=True,
            page_size=setup.page,
            max_total_tokens=setup.pool_tokens,
            max_running_requests=setup.concurrency,
            chunked_prefill_size=setup.step_tokens,
            max_prefill_tokens=setup.step_tokens,
            log_level="error",
            **options,
        )
        self._loop = self._engine.loop
        self._replies: asyncio.Queue[Reply | BaseException] = asyncio.Queue()
        self._asked: set[asyncio.Task[None]] = set()

    def submit(self, request: str, prompt: list[int], output: int) -> None:
        task = self._loop.create_task(self._ask(request, prompt, output))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    def receive(self) -> list[Reply]:
        reply = self._loop.run_until_complete(self._replies.get())
        if isinstance(reply, BaseException):
            raise reply
        return [reply]

    def close(self) -> None:
        self._engine.shutdown()

    async def _ask(self, request: str, prompt: list[int], output: int) -> None:
        tokens: list[int] = []
        try:
            stream = await self._engine.async_generate(
                input_ids=prompt,
                sampling_params={
                    "temperature": 0,
                    "max_new_tokens": output,
                    "ignore_eos": True,
                },
                rid=request,
                stream=True,
            )
            async for answer in stream:
                tokens = list(answer["output_ids"])
                info: dict[str, Any] = answer["meta_info"]
                done = info["finish_reason"] is not None
                await self._replies.put(Reply(request, tokens, done, info["cached_tokens"]))
        except Exception as error:
            await self._replies.put(error)
