"""Losses under the names that configs use."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from qkd.config import TermConfig
from qkd.failures import UsageError
from qkd.foreign import nearest
from qkd.terms import LOSSES, check_terms


def loss(name: str, **options: float | int | str | bool) -> Callable[..., Tensor]:
    """Return a loss with its options, as a function of tensors.

    Args:
        name: A name of ``qkd ls losses``, e.g. ``soft_target``.
        **options: As in a config, e.g. ``temperature=4``.

    Returns:
        A function that takes what the loss reads, in the order of its table (``qkd.terms.LOSSES[name].inputs``:
        ``student_logits``, ``teacher_logits``, ``labels``, ...), and gives a scalar, shape ``[]``.

    Raises:
        UsageError: If there is no such loss, or it has a trainable module.
        ValueError: If an option is unknown or out of range.

    Example:
        >>> import torch
        >>> soft_target = loss("soft_target", temperature=4)
        >>> float(soft_target(torch.ones(2, 3), torch.ones(2, 3)))
        0.0
    """
    if name not in LOSSES:
        near = nearest(name, LOSSES)
        raise UsageError(f"no loss {name!r}; {f'did you mean {near[0]!r}?' if near else '`qkd ls losses` lists them'}")
    entry = LOSSES[name]
    if entry.module is not None:
        raise UsageError(f"{name} is computed with a module that learns; use it as a term of qkd.distill")
    taps = (("features", "features"),) if "student_feature" in entry.inputs or "student_stages" in entry.inputs else ()
    faults = check_terms([TermConfig(loss=name, options=options, taps=taps)])
    if faults:
        raise ValueError("; ".join(f"{name}: {fault.partition('.options.')[2] or fault}" for fault in faults))
    defaults = {key: option.default for key, option in entry.options.items() if option.default is not None}
    return functools.partial(entry.function, **{**defaults, **options})
