"""Reads the structure of tensors that a network returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from quantizers.graph.form.refusal import RewriteError

RESERVED = ("", "images")  # no name at all, and what exported files call their input


def structure(result: Any, network: str, node_of: Callable[[Tensor], fx.Node | None], *, is_inner: bool = False) -> Any:
    """Return what a network returned, with nodes in place of tensors.

    Args:
        result: A tensor, or a tuple, list or dict of tensors.
        network: Name of the network, for messages.
        node_of: Returns the node of a tensor, or None if it does not depend on the images.
        is_inner: Whether it is within another structure.

    Raises:
        RewriteError: If it is of another type, nested, or holds a constant, or an exported file cannot name an output
            so.
    """
    if isinstance(result, Tensor):
        node = node_of(result)
        if node is None:
            raise RewriteError(
                f"{network}: an output does not depend on the images, as far as torch can see; return what is computed "
                "from them, with torch operations (not numpy)"
            )
        return node
    if is_inner and isinstance(result, (dict, tuple, list)):
        raise RewriteError(
            f"{network}: returns a {type(result).__name__} within another; use one tuple, list or dict of tensors"
        )

    def inner(item: Any) -> Any:
        return structure(item, network, node_of, is_inner=True)

    if isinstance(result, dict):
        if len({str(key) for key in result}) < len(result):
            raise RewriteError(
                f"{network}: returns a dict with keys that are one as text, such as 1 and '1'; use others"
            )
        for key in result:
            if str(key) in RESERVED:
                raise RewriteError(
                    f"{network}: returns a dict with the key {str(key)!r}, which no output of a file can have"
                )
        return {str(key): inner(item) for key, item in result.items()}  # a plain dict, whatever the network's own type
    if isinstance(result, (tuple, list)):
        return (tuple if isinstance(result, tuple) else list)(inner(item) for item in result)
    if result is None:
        return None
    raise RewriteError(
        f"{network}: returns a {type(result).__name__}; return a tensor, or a tuple, list or dict of tensors"
    )


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors that a network returned, in order, whatever custom types hold them."""
    if isinstance(result, Tensor):
        return [result]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]
