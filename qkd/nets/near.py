"""Suggestions for an unknown net name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qkd.foreign import nearest

PREFIX = "torchvision/"
_MOST = 3
_ELSEWHERE = re.compile(r"^(?:torchvision|timm|models|tv|pytorch|torch|hub)[./_]+(?:models[./_]+)?")


def near_nets(name: str, known: Sequence[str]) -> list[str]:
    """Return the known nets that a name may mean, the likeliest first, at most three.

    A name that torchvision knows means torchvision's net or our variant of it; capitals, hyphens and the names of other
    collections before it make no difference. Otherwise the name that is spelled most like it.

    Args:
        name: The requested name.
        known: All names, ours and ``torchvision/...``.

    Example:
        >>> near_nets("ResNet-18", ["resnet8", "resnet18_cifar", "torchvision/resnet18"])
        ['torchvision/resnet18', 'resnet18_cifar']
    """
    bare = _ELSEWHERE.sub("", name.lower()).replace(" ", "_")
    spellings = list(dict.fromkeys(text for text in (bare, bare.replace("-", "_"), re.sub(r"[-_ ]", "", bare)) if text))
    found = [prefix + text for text in spellings for prefix in (PREFIX, "") if prefix + text in known]
    found += [one for text in spellings for one in known if one.startswith(f"{text}_") and PREFIX + text in known]
    found = found or nearest(name, known) or nearest(bare, known)
    return list(dict.fromkeys(found))[:_MOST]


def net_hint(name: str, known: Sequence[str]) -> str:
    """Return the near nets as a question.

    Args:
        name: What was written.
        known: Names of nets.

    Returns:
        ``did you mean `x` or `y`?``; empty where none is near.
    """
    near = near_nets(name, known)
    return f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else ""
