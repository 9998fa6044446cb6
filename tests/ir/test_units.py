"""Quantities as people read them."""

from __future__ import annotations

import pytest

from autopar.ir import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (80 * 2**30, "80.0 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (1.5e-6, "1.50 us"), (9.9996e-4, "1.00 ms"), (0.0123, "12.3 ms"), (0.99949, "999 ms"), (1.0, "1.00 s"), (123.4, "123 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999_999, "999,999"), (1_000_000, "1.00 million"), (8_030_261_248, "8.03 billion"), (70 * 10**12, "70.0 trillion")],
)
def test_number(count: int, text: str) -> None:
    assert units.number(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0%"), (1e-9, "below 0.01%"), (5e-4, "0.05%"), (0.004, "0.4%"), (0.123, "12%"), (-0.004, "-0.4%")]
)
def test_percent(value: float, text: str) -> None:
    assert units.percent(value) == text
