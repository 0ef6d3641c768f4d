"""What Prometheus is told: all of it parses, is named by its rules, and is what is asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree.inspector import serve
from tests.inspector.caches import Grown, small
from tests.inspector.test_server import ask

parser = pytest.importorskip("prometheus_client.parser")
client = pytest.importorskip("prometheus_client")

from prefixtree import metrics  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"


def families(text: bytes) -> dict[str, Any]:
    return {family.name: family for family in parser.text_string_to_metric_families(text.decode())}


def everything() -> pt.PrefixCache:
    """A cache in which everything happened."""
    cache = Grown(7, 60, 4).cache
    cache.evict(2)
    cache.forget()
    assert len(cache.stats().evictions) == 2
    return cache


def samples(text: bytes) -> set[str]:
    return {sample.name for family in families(text).values() for sample in family.samples}


def test_the_numbers_are_those_of_the_statistics() -> None:
    stats = everything().stats()
    found = families(metrics.exposition(stats))
    for table in (metrics.GAUGES, metrics.COUNTERS):
        for name, (attribute, text) in table.items():
            family = found.pop(f"prefixtree_{name}")
            (sample,) = family.samples
            assert sample.value == getattr(stats, attribute), name
            assert family.documentation == text
            assert family.type == ("gauge" if table is metrics.GAUGES else "counter")
    for name, (field, _) in metrics.EVICTIONS.items():
        family = found.pop(f"prefixtree_{name}")
        assert {
            (sample.labels["policy"], sample.labels["reason"]): sample.value
            for sample in family.samples
        } == {(count.policy, count.reason): getattr(count, field) for count in stats.evictions}
    for name, (attribute, _) in metrics.HISTOGRAMS.items():
        family = found.pop(f"prefixtree_{name}")
        histogram = getattr(stats, attribute)
        assert family.type == "histogram"
        values = {sample.name.rsplit("_", 1)[1]: sample.value for sample in family.samples}
        assert values["sum"] == pytest.approx(histogram.total)
        assert values["count"] == histogram.observed
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        assert buckets == histogram.cumulative()
    assert not found


def test_names_and_units_follow_the_rules() -> None:
    for name, family in families(metrics.exposition(everything().stats())).items():
        assert re.fullmatch(r"prefixtree(_[a-z]+)+", name)
        assert family.documentation.endswith(".")
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
    for name in metrics.HISTOGRAMS:
        assert name.endswith(("_tokens", "_nodes", "_seconds"))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    text = metrics.exposition(everything().stats())
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    rules = ["promtool", "check", "rules", str(DOCS / "alerts.yaml")]
    assert subprocess.run(rules, capture_output=True).returncode == 0


def test_a_collector_reads_at_each_scrape_and_not_before() -> None:
    cache, running = small()
    read = []

    def stats() -> pt.Stats:
        read.append(cache.stats())
        return read[-1]

    registry = client.CollectorRegistry()
    registry.register(metrics.StatsCollector(stats, bytes_per_token=1024))
    assert not read
    cache.forest(running, query_lens=[len(one) - one.committed or 1 for one in running])
    read_by_attention = "prefixtree_saved_attention_bytes"
    expected = cache.stats().saved_attention_bytes(1024)
    assert registry.get_sample_value(read_by_attention) == expected > 0
    read.clear()
    saved = "prefixtree_saved_bytes"
    assert registry.get_sample_value(saved) == 1024 * cache.stats().shared_tokens > 0
    for sequence in running:
        sequence.close()
    assert registry.get_sample_value(saved) == 0
    assert len(read) == 2
    with pytest.raises(InvalidArgument, match="bytes_per_token"):
        metrics.StatsCollector(stats, bytes_per_token=0)


def test_the_inspector_serves_the_statistics_of_what_it_may_read() -> None:
    cache, running = small()
    with serve(cache) as inspector:
        published = cache.stats()
        running[0].close()
        status, body = ask(inspector, "/metrics")
        assert (status, body) == (200, metrics.exposition(published))  # not those of now
        inspector.publish()
        assert ask(inspector, "/metrics")[1] == metrics.exposition(cache.stats()) != body
    shared = pt.PrefixCache(8, thread_safe=True)
    with serve(shared) as inspector:
        shared.open([1, 2, 3])
        assert ask(inspector, "/metrics")[1] == metrics.exposition(shared.stats())


def test_the_inspector_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith("prometheus_client"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "prefixtree.metrics")
    with serve(small()[0]) as inspector:
        status, body = ask(inspector, "/metrics")
        assert status == 501
        assert "pip install 'prefixtree[metrics]'" in json.loads(body)["error"]
        assert ask(inspector, "/tree.json")[0] == 200


def test_the_cache_does_without_prometheus_client() -> None:
    script = """
import sys
sys.modules["prometheus_client"] = None
import prefixtree
print(prefixtree.PrefixCache(8).stats().free_blocks)
try:
    import prefixtree.metrics
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    free, missing = done.stdout.splitlines()
    assert free == "8"
    assert missing == "metrics need prometheus_client: pip install 'prefixtree[metrics]'"


def expressions() -> dict[str, list[str]]:
    board = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return {"grafana.json": queries, "alerts.yaml": [(DOCS / "alerts.yaml").read_text()]}


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yaml"])
def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(file: str) -> None:
    known = samples(metrics.exposition(everything().stats()))
    queries = expressions()[file]
    for query in queries:
        asked = set(re.findall(r"prefixtree_\w+", query))
        assert asked
        assert asked <= known


def test_the_dashboard_shows_all_that_is_exported() -> None:
    known = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in samples(metrics.exposition(everything().stats()))
    }
    asked = set(
        re.findall(r"prefixtree_[a-z_]+?(?=_bucket|\b)", " ".join(expressions()["grafana.json"]))
    )
    assert known - asked == {
        "prefixtree_blocks",
        "prefixtree_cached_tokens",
        "prefixtree_joins_total",
    }
