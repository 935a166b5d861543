"""The hand-over's series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from kvtransfer.measure import HandOverMetrics


def test_each_hook_moves_its_own_series() -> None:
    registry = CollectorRegistry()
    leases = Counter("leases", "Leases", ["of"], registry=registry)
    metrics = HandOverMetrics(registry, Counter("failures", "Failures", ["kind"], registry=registry), leases)
    moved: list[tuple[str, str, int, float]] = []
    written: list[tuple[str, str, int, float]] = []
    receiver, sender = (
        metrics.receiver(lambda *values: moved.append(values)),
        metrics.sender(lambda *values: written.append(values)),
    )
    receiver.moved("p0", "nixl", 7, 0.5)
    receiver.open_tickets(1)
    receiver.open_tickets(1)
    receiver.open_tickets(-1)
    receiver.quarantined(4096)
    sender.moved("d0", "nixl", 9, 0.25)
    sender.open_tickets(1)
    sender.pending_sends(1)
    sender.failed("digest")
    sender.failed("lease")
    assert moved == [("p0", "nixl", 7, 0.5)]
    assert written == [("d0", "nixl", 9, 0.25)]
    assert registry.get_sample_value("tandem_kv_open_tickets", {"end": "receiver"}) == 1
    assert registry.get_sample_value("tandem_kv_open_tickets", {"end": "sender"}) == 1
    assert registry.get_sample_value("tandem_kv_quarantined_bytes") == 4096
    assert registry.get_sample_value("tandem_kv_pending_sends") == 1
    assert registry.get_sample_value("failures_total", {"kind": "digest"}) == 1
    assert registry.get_sample_value("failures_total", {"kind": "lease"}) is None
    assert registry.get_sample_value("leases_total", {"of": "peer"}) == 1
