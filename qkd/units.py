"""Write figures with their units: percent, bytes, milliseconds, numbers of things."""

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


def counted(number: int | str, noun: str, plural: str | None = None) -> str:
    """Return a number with what it counts: ``1 thread``, ``1,024 images``, ``2 classes``.

    Args:
        number: How many; text ("?") where that is unknown.
        noun: What one of them is called.
        plural: What several are called; by default the noun with an s.
    """
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def times_as_many(ratio: float) -> str:
    """Return a ratio with three significant digits: ``3.25 times as many``, or ``just as many``."""
    shown = f"{ratio:.3g}"
    return "just as many" if shown == "1" else f"{shown} times as many"
