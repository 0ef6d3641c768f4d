"""Benchmarks that users can repeat: `python -m prefixtree bench`."""
