"""The last layer of a net: find it, and load weights without it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

KEEP, NEW = "keep", "new"  # config values for the head of given weights


class HeadError(ValueError):
    """A net whose last layer cannot be determined; the message does not include the file name."""


def head_layer(net: nn.Module, head: str) -> str:
    """Return the path of the layer that gives the logits.

    Args:
        net: The net.
        head: ``new``: the last linear layer in the order of definition, or the last convolution of a net without one;
            ``new:<path>``: that layer.

    Raises:
        HeadError: If there is no such layer.
    """
    path = head.partition(":")[2]
    if path:
        if path not in dict(net.named_modules()):
            raise HeadError(f"head: the net has no layer {path!r}; it ends with {_ends(net)}")
        return path
    for kind in (nn.Linear, nn.Conv2d):
        layers: list[str] = [name for name, module in net.named_modules() if isinstance(module, kind)]
        if layers:
            return layers[-1]
    raise HeadError(f"head: the net has no linear layer and no convolution; it ends with {_ends(net)}")


def without_head(
    net: nn.Module, head: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Return a file's tensors, with those of the last layer replaced by the net's own.

    Args:
        net: Receives the weights; its last layer stays unchanged: random.
        head: ``new`` or ``new:<path>``.
        wanted: The net's state dict.
        found: The file's, under the net's names; its last layer may have another shape, or be missing.

    Returns:
        The tensors, and a description of what was done.

    Raises:
        HeadError: If the net has no such layer, or the shapes of other layers differ, too.
    """
    layer = head_layer(net, head)
    own = {name: value for name, value in wanted.items() if name.startswith(f"{layer}.")}
    others = [
        f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name not in own and name in found and found[name].shape != wanted[name].shape
    ]
    if others:
        raise HeadError(
            f"head: the last layer is assumed to be `{layer}`, but {', '.join(others[:4])} differ, too; name the layer "
            f"that gives the logits (head: new:<layer>), or use weights of this net"
        )
    rest = {name: value for name, value in found.items() if not name.startswith(f"{layer}.")}
    then = next((f" ({list(found[name].shape)[0]} classes in the file)" for name in own if name in found), "")
    return {**rest, **own}, f"new head `{layer}`{then}, randomly initialized"


def _ends(net: nn.Module) -> str:
    return ", ".join([name for name, _ in net.named_modules() if name][-4:]) or "nothing"
