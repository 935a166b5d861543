from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.manifest import Manifest, digest, parse

manifests = st.builds(
    Manifest,
    ticket_id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    attempt=st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**32 - 1),
    start=st.integers(0, 2**64 - 1),
    count=st.integers(0, 2**32 - 1),
    length=st.integers(0, 2**64 - 1),
    digest=st.binary(min_size=16, max_size=16),
)


@settings(deadline=None)
@given(manifests)
def test_what_is_packed_is_parsed(manifest: Manifest) -> None:
    assert parse(manifest.pack()) == manifest


@settings(deadline=None)
@given(st.binary(max_size=120) | manifests.map(Manifest.pack))
def test_parsing_raises_nothing_but_value_error(data: bytes) -> None:
    try:
        parsed = parse(data)
    except ValueError:
        return
    assert parsed.pack() == data


@settings(deadline=None)
@given(manifests, st.data())
def test_a_shortened_or_another_version_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    packed = manifest.pack()
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ValueError, match="bytes"):
        parse(packed[:cut])
    with pytest.raises(ValueError, match="version is 2"):
        parse(b"\x02" + packed[1:])


@pytest.mark.parametrize(
    ("field", "value"),
    [("attempt", -1), ("sequence", 2**32), ("ticket_id", "00"), ("ticket_id", "xyz"), ("digest", b"short")],
)
def test_fields_that_do_not_fit_are_refused(field: str, value: object) -> None:
    fields: dict[str, object] = {
        "ticket_id": "a" * 32, "attempt": 0, "sequence": 0, "start": 0, "count": 1, "length": 1, "digest": bytes(16),
        field: value,
    }  # fmt: skip
    with pytest.raises(ValueError):
        Manifest(**fields).pack()  # type: ignore[arg-type]


def test_the_digest_sees_every_byte() -> None:
    data = np.arange(4096, dtype=np.uint64).view(np.uint8)
    before = digest(data)
    assert len(before) == 16
    for index in (0, 1000, data.nbytes - 1):
        data[index] ^= 1
        assert digest(data) != before
        data[index] ^= 1
    assert digest(data) == before
