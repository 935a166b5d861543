from __future__ import annotations

import pytest

from kvtransfer.leases import LeaseTable


def test_a_lease_lasts_as_long_as_it_is_renewed_in_time() -> None:
    now = 100.0
    table = LeaseTable(lambda: now)
    assert table.ran_out("peer")
    table.grant("peer", 10.0)
    now = 109.0
    assert table.renew("peer")
    now = 118.9
    assert not table.ran_out("peer")
    now = 119.0
    assert table.ran_out("peer")
    assert not table.renew("peer"), "it must not come back to life"
    assert table.ran_out("peer")
    table.grant("peer", 5.0)
    assert not table.ran_out("peer")
    table.drop("peer")
    table.drop("peer")
    assert table.ran_out("peer")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_lease_must_have_a_length(seconds: float) -> None:
    with pytest.raises(ValueError, match="lease_s"):
        LeaseTable().grant("peer", seconds)
