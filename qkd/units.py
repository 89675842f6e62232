"""Write figures with their units: percent, bytes, milliseconds."""

from __future__ import annotations


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with two digits; 100 % only where it is exactly that."""
    if fraction is None:
        return "-"
    if fraction < 1 and round(100 * fraction, 2) >= 100:
        return "99.99 %"  # rounding up would claim what is not so
    return f"{100 * fraction:.2f} %"


def megabytes(size_bytes: int | None) -> str:
    """Return a file size in kB or MB (powers of ten)."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def bytes_text(size_bytes: int) -> str:
    """Return a number of bytes: in bytes below 10 kB, else in kB or MB."""
    return f"{size_bytes:,} B" if size_bytes < 10_000 else megabytes(size_bytes)


def milliseconds(value_ms: float | None) -> str:
    """Return a latency with three significant digits."""
    return "-" if value_ms is None else f"{value_ms:.3g} ms"
