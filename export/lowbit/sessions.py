"""Use the low-bit execution provider where other code names a provider."""

from __future__ import annotations

from os import PathLike

from export.lowbit.build import LowBitUnavailableError
from export.lowbit.provider import PROVIDER, availability, register
from export.runtime import claimed_nodes, open_session


def made_known(provider: str) -> str:
    """Register a provider if it is the low-bit one, and return it; other providers are onnxruntime's own.

    Args:
        provider: Its name.

    Raises:
        ValueError: If it is the low-bit one, and not available.
        OSError: If its library cannot be written to the cache.
    """
    try:
        return register() if provider == PROVIDER else provider
    except LowBitUnavailableError as error:
        raise ValueError(f"provider {provider!r} is not offered here: {error}") from error


def low_bit_for(path: str | PathLike[str]) -> str | None:
    """Return the low-bit provider's name if this machine offers it and it takes some of a file, else None.

    Args:
        path: An ONNX file.

    Raises:
        ValueError: If the file is damaged.
        FileNotFoundError: If it does not exist.
        ImportError: If onnxruntime is missing.
        OSError: If the provider's library cannot be written to the cache.
    """
    if not availability().is_offered:
        return None
    session = open_session(path, optimize=True, provider=register(), records_claims=True)
    return None if claimed_nodes(session, PROVIDER) == frozenset() else PROVIDER
