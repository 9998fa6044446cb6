"""Quantities as a person reads them: three significant digits and the unit, the same in every report."""

from __future__ import annotations

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", " thousand", " million", " billion", " trillion")


def _digits(value: float) -> str:
    """At least three significant digits, no exponent: `0.123`, `1.23`, `12.3`, `123`, `1234`."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    decimals = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def size(count: float) -> str:
    """Bytes as `B`, `KiB`, `MiB`, ... (powers of 1024)."""
    value, unit = float(count), 0
    while abs(value) >= 1023.5 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{_digits(value)} {_BINARY[unit]}"


def seconds(value: float) -> str:
    """Time as `s`, `ms` or `us`."""
    if value == 0:
        return "0 ms"
    if abs(value) >= 0.9995:
        return f"{_digits(value)} s"
    if abs(value) >= 0.0000995:
        return f"{_digits(value * 1e3)} ms"
    return f"{_digits(value * 1e6)} us"


def number(count: int) -> str:
    """A count in words from a million on: `8.03 billion`; with separators below."""
    if abs(count) < 1_000_000:
        return f"{count:,}"
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_DECIMAL) - 1:
        value, unit = value / 1000, unit + 1
    return f"{_digits(value)}{_DECIMAL[unit]}"


def percent(fraction: float) -> str:
    """`0.4%`, `12%`; never `0%` for what is not zero."""
    value = fraction * 100
    if value == 0:
        return "0%"
    if abs(value) < 0.01:
        return "below 0.01%"
    return f"{value:.2f}%" if abs(value) < 0.1 else f"{value:.1f}%" if abs(value) < 10 else f"{value:.0f}%"


def shape(dims: tuple[int, ...]) -> str:
    """`4096 x 14336`; a tensor without dims is a `scalar`."""
    return " x ".join(map(str, dims)) if dims else "scalar"


def times(count: int, noun: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
