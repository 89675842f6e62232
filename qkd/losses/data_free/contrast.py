"""CMI's contrast: distinguish two views of a generated image from those of all others, including earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_temperature
from qkd.losses.stable import in_full_precision, unit_rows


@in_full_precision
def contrastive_loss(
    local_views: Tensor,
    global_views: Tensor,
    cached_local: Tensor | None = None,
    cached_global: Tensor | None = None,
    *,
    temperature: float = 0.1,
) -> Tensor:
    r"""Return CMI's contrastive loss of the current images and those of a memory bank.

    .. math:: \ell_i = -\log \frac{\exp(h_i \cdot g_i / \tau)}{\sum_j \exp(h_i \cdot g_j / \tau)},\quad
              L = \frac1B \sum_{i \le B} \ell_i + \frac1M \sum_{B < i \le B + M} \ell_i

    over the rows of the batch followed by those of the bank; all rows are normalized to length 1, and :math:`g` is a
    constant. Without a bank, the second mean is omitted.

    Args:
        local_views: :math:`h` of the current images, shape ``[batch, features]``, floating.
        global_views: :math:`g` of the same images, same shape. No gradient flows into it.
        cached_local: :math:`h` of earlier images, shape ``[cached, features]``. None or no rows if there are none.
        cached_global: Likewise. Required with ``cached_local`` and only then.
        temperature: :math:`\tau > 0`.

    Returns:
        A scalar, shape ``[]``, in nats; ``ln batch`` for a large temperature and no bank.

    Raises:
        ValueError: If shapes do not fit, only one of the two cached tensors is given, or ``temperature`` is out of
            range.

    References:
        Fang et al., `Contrastive Model Inversion <https://arxiv.org/abs/2105.08584>`_, 2021.

    Example:
        >>> views = torch.eye(4)
        >>> round(contrastive_loss(views, views, temperature=1e6).item(), 4)  # ln 4
        1.3863
    """
    check_temperature(temperature)
    if (cached_local is None) != (cached_global is None):
        raise ValueError("cached_local and cached_global belong together: give both or neither")
    if local_views.dim() != 2 or local_views.shape != global_views.shape or local_views.numel() == 0:
        raise ValueError(
            f"needs both views as [batch, features], got {tuple(local_views.shape)} and {tuple(global_views.shape)}"
        )
    batch = len(local_views)
    if cached_local is not None and cached_global is not None:
        if cached_local.shape != cached_global.shape or cached_local.shape[1:] != local_views.shape[1:]:
            raise ValueError(
                f"needs cached views as [cached, {local_views.shape[1]}], got {tuple(cached_local.shape)} and "
                f"{tuple(cached_global.shape)}"
            )
        local_views, global_views = torch.cat([local_views, cached_local]), torch.cat([global_views, cached_global])
    local_views = local_views.to(torch.promote_types(local_views.dtype, global_views.dtype))
    global_views = global_views.to(local_views.dtype)
    scores = unit_rows(local_views) @ unit_rows(global_views.detach()).T / temperature
    rows = functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="none")
    return rows[:batch].mean() + (rows[batch:].mean() if len(rows) > batch else 0)
