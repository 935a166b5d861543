from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.layout import AHEAD_SPANS, SLAB_SPANS, ahead, ahead_together, cut, span_limit
from tandem.errors import ConfigError
from tandem.testing.kv import small_layout

LAYOUT = small_layout()


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_spans_tile_the_range_and_none_is_too_long(start: int, end: int, tokens: int) -> None:
    spans = list(cut(start, end, tokens))
    assert [token for span in spans for token in range(span.start, span.end)] == list(range(start, end))
    assert all(0 < span.count <= tokens for span in spans)


@settings(deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(2001, 4000), st.integers(1, 300))
def test_borders_do_not_depend_on_where_the_cut_starts(one: int, other: int, end: int, tokens: int) -> None:
    later = max(one, other)
    borders = [{span.end for span in cut(start, end, tokens) if span.start >= later} for start in (one, other)]
    assert borders[0] - borders[1] <= {min(borders[0] | {end})}
    assert borders[1] - borders[0] <= {min(borders[1] | {end})}


@pytest.mark.parametrize(("start", "tokens"), [(0, 0), (-1, 5)])
def test_a_cut_that_makes_no_sense_is_refused(start: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        list(cut(start, 10, tokens))


def test_a_span_leaves_room_for_others_in_the_slab_and_fits_the_senders_staging() -> None:
    slab = 1 << 20
    assert span_limit(LAYOUT, 16, slab) == 16
    assert span_limit(LAYOUT, 1 << 30, slab) * LAYOUT.token_bytes * SLAB_SPANS <= slab
    assert span_limit(LAYOUT, 1 << 30, slab, max_bytes=4 * LAYOUT.token_bytes + 1) == 4
    with pytest.raises(ConfigError, match=f"{LAYOUT.token_bytes} bytes"):
        span_limit(LAYOUT, 16, LAYOUT.token_bytes)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(0, 100))
def test_grants_ahead_of_computation_take_half_of_the_slab_at_most(spans: int, tickets: int) -> None:
    each = ahead(spans, tickets)
    assert 1 <= each <= AHEAD_SPANS
    assert each == 1 or each * tickets <= ahead_together(spans)
    assert ahead_together(spans) == max(1, spans // 2)
