"""vLLM on the tree: its KV cache manager and scheduler, and its attention, each usable alone.

- `scheduler.PrefixTreeScheduler`, for `scheduler_cls`: prefix hits and evictions come from a
  `PrefixIndex`; vLLM keeps its blocks, requests and block tables.
- `attention.TreeAttentionBackend`, the attention backend CUSTOM: KV that requests share is read
  once a step.
- `plugin.register`, what vLLM calls at its start through the entry point `vllm.general_plugins`.

Importing this package imports no vLLM.
"""

TESTED = ("0.32", "0.33")
"""The releases, major and minor, that the adapter was tested with. 0.33 has no build for CPUs: its
Python ran with the kernels of 0.32's."""
