"""Recorded request traces, played through a real cache: `python -m prefixtree replay TRACE...`."""
