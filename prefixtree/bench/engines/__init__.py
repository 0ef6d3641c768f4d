"""Real serving engines, stock and with ours: each run a process, the same work for all.

| module | what it has |
|---|---|
| `workload` | what is asked: sessions of a trace, or samples behind a few-shot tree |
| `model` | the tiny model that all engines load |
| `watch` | the stopwatch in an engine's process: a row a step, in a file |
| `serving` | what a driver of an engine is, and playing a workload on one |
| `transformers_driver`, `sglang_driver`, `vllm_driver` | one engine each |
| `drivers` | the engines by name |
| `job`, `worker` | one run, a process of its own |
| `compare`, `figures`, `report` | runs in turn, what they amount to, and the table |
"""
