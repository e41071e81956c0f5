"""What an operator chooses is checked before minutes of loading."""

from __future__ import annotations

import pytest

from serve.config import ServerConfig


def test_the_defaults_are_loopback_and_valid():
    assert ServerConfig().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("policy", "fast"),
        ("page_size", 0),
        ("num_pages", -1),
        ("max_context", 0),
        ("tpot_slo_ms", 0.0),
        ("tpot_slo_ms", float("nan")),
        ("buckets", ()),
        ("buckets", (8, 0)),
        ("rho", 1.5),
        ("reserve", -0.1),
    ],
)
def test_what_cannot_work_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        ServerConfig(**{option: value})
