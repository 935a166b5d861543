"""The hand-over's series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from kvtransfer.measure import HandOverMetrics


def test_each_hook_moves_its_own_series() -> None:
    registry = CollectorRegistry()
    metrics = HandOverMetrics(registry, Counter("failures", "Failures", ["kind"], registry=registry))
    moved: list[tuple[str, str, int, float]] = []
    receiver, sender = metrics.receiver(lambda *values: moved.append(values)), metrics.sender()
    receiver.moved("p0", "nixl", 7, 0.5)
    receiver.open_tickets(1)
    receiver.open_tickets(1)
    receiver.open_tickets(-1)
    receiver.quarantined(4096)
    sender.open_tickets(1)
    sender.pending_sends(1)
    sender.failed("digest")
    assert moved == [("p0", "nixl", 7, 0.5)]
    assert registry.get_sample_value("tandem_kv_open_tickets", {"end": "receiver"}) == 1
    assert registry.get_sample_value("tandem_kv_open_tickets", {"end": "sender"}) == 1
    assert registry.get_sample_value("tandem_kv_quarantined_bytes") == 4096
    assert registry.get_sample_value("tandem_kv_pending_sends") == 1
    assert registry.get_sample_value("failures_total", {"kind": "digest"}) == 1
