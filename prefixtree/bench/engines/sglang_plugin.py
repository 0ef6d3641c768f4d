"""What the benchmark puts into each of SGLang's processes: our names and the watch.

SGLang finds it by entry points, which `sglang_driver` writes into a folder on the path; where the
watch writes, and by which clock, is in the environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefixtree.bench.engines.watch import Watch
from prefixtree.engines.sglang import plugin
from prefixtree.engines.sglang.platform import STOCK_ATTENTION

STEPS, CLOCK = "PREFIXTREE_BENCH_STEPS", "PREFIXTREE_BENCH_CLOCK"
"""Environment variables."""

PLATFORM = "prefixtree_bench_cpu"

ENTRY_POINTS = f"""[sglang.srt.platforms]
{PLATFORM} = prefixtree.engines.sglang.plugin:platform
[sglang.srt.plugins]
prefixtree_bench = {__name__}:register
"""


def register() -> None:
    """An entry point, called in each process of SGLang."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    plugin.register()
    for name in (STOCK_ATTENTION, plugin.NAME):
        ATTENTION_BACKENDS[name] = _watched(ATTENTION_BACKENDS[name])


def _watched(make: Any) -> Any:
    """A backend is made once, in the process in which the scheduler is; that is when it begins."""

    def make_watched(runner: Any) -> Any:
        from sglang.srt.managers.scheduler import Scheduler

        backend = make(runner)
        watch = Watch(Path(os.environ[STEPS]), os.environ[CLOCK])
        watch.time("attention", backend, "init_forward_metadata", "forward_decode")
        watch.time(
            "scheduler",
            Scheduler,
            "get_next_batch_to_run",
            idle=lambda plan: plan.batch_to_run is None,
        )
        watch.time("scheduler", Scheduler, "process_batch_result")
        run_batch = Scheduler.run_batch

        def run_then_note(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            result = run_batch(self, batch, *args, **kwargs)
            watch.step(decoding=batch.forward_mode.is_decode(), sequences=len(batch.reqs))
            return result

        Scheduler.run_batch = run_then_note
        return backend

    return make_watched
