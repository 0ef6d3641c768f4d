"""vLLM is in no environment of the continuous integration: run these where it is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
