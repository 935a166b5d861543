"""What a worker's page says of drafts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from tandem.engine.output import DraftOutcome
from tandem.worker.metrics import DraftMetrics


def test_drafts_are_counted_by_drafter() -> None:
    registry = CollectorRegistry()
    metrics = DraftMetrics(registry)
    for outcome in (DraftOutcome("head", 4, 3), DraftOutcome("head", 5, 0), DraftOutcome("ngram", 8, 8)):
        metrics.add(outcome)

    def value(name: str, drafter: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"drafter": drafter, **labels})

    names = ("steps_total", "draft_tokens_total", "accepted_tokens_total", "accepted_length_sum")
    assert [value(f"tandem_spec_{name}", "head") for name in names] == [2, 9, 3, 5]
    assert [value(f"tandem_spec_{name}", "ngram") for name in names] == [1, 8, 8, 9]
    assert value("tandem_spec_accepted_length_bucket", "head", le="1.0") == 1
