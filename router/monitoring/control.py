"""The router's own bounds, and how near it is to them, on its metrics page."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.admission.gate import REFUSALS, Admission
from router.cache.prefix_index import PrefixIndex
from router.workers.pairs import PairHealth


class ControlMetrics:
    """Collects at each scrape what the gate, the index and the pairs count anyway."""

    def __init__(self, gate: Admission, index: PrefixIndex, pairs: PairHealth) -> None:
        self._gate = gate
        self._index = index
        self._pairs = pairs

    def collect(self) -> Iterable[Metric]:
        """Families without labels but for causes, so that all exist from the start."""
        gate, index = self._gate, self._index
        refused = CounterMetricFamily("tandem_admission_refused", "Requests that the full queue cost", labels=["cause"])
        for cause in REFUSALS:
            refused.add_metric([cause], gate.refused[cause])
        yield refused
        gauges = (
            ("tandem_admission_running", "Requests let in and not yet ended", gate.inflight),
            ("tandem_admission_running_limit", "Requests let in at once, at most", gate.max_inflight),
            ("tandem_admission_queued", "Requests that wait to be let in", gate.queued),
            ("tandem_admission_queued_limit", "Requests that may wait to be let in", gate.max_queued),
            ("tandem_admission_oldest_seconds", "How long the oldest of them has waited", gate.oldest_s),
            ("tandem_index_blocks", "Blocks of 64 tokens in the prefix index", len(index)),
            ("tandem_index_blocks_limit", "Blocks that it keeps at most", index.max_blocks),
            ("tandem_kv_pairs_avoided", "Pairs avoided now since hand-overs failed", len(self._pairs.broken())),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "tandem_index_unplaced_blocks", "Blocks of events without a known parent", value=index.unplaced
        )
