"""The bound on open requests."""

from __future__ import annotations

import pytest

from router.admission import Admission
from tandem.errors import Overloaded


def test_the_bound_holds_and_leaving_frees_a_place_once() -> None:
    admission = Admission(2)
    admission.enter("a")
    admission.enter("b")
    with pytest.raises(Overloaded, match="2 requests are in flight and at most 2 are admitted"):
        admission.enter("c")
    admission.leave("a")
    admission.leave("a")
    assert admission.inflight == 1
    admission.enter("c")
    with pytest.raises(ValueError, match="request_id c is already in flight"):
        admission.enter("c")
    admission.leave("b")
    admission.leave("c")
    assert admission.inflight == 0
