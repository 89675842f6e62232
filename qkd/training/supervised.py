"""The training step of a single net (cross-entropy with the labels), and the check that its outputs are logits."""

from __future__ import annotations

from torch import Tensor, nn

from qkd.losses import cross_entropy_loss
from qkd.training.job import Batch, Step, StepResult

_SUM_ROUNDING = 1e-4  # of a sum of probabilities in float32


class LogitsGuard:
    """Rejects the outputs of a net that ends in softmax or log_softmax, since losses take logits and soften them.

    Only the first batch whose outputs differ between images is checked, since a check waits for the GPU.

    Args:
        who: Names the net in the message.
    """

    def __init__(self, who: str = "the teacher") -> None:
        self._who, self._has_looked = who, False

    def __call__(self, outputs: Tensor) -> None:
        """Check the outputs of a batch, ``[batch, classes]``.

        Raises:
            ValueError: If they are probabilities or log-probabilities.
        """
        if self._has_looked or outputs.dim() != 2 or outputs.shape[1] < 2:
            return
        values = outputs.detach().double()
        is_constant = bool((values == values[:1]).all())
        if is_constant:  # a head of zeros, whose bias may be the logarithm of the classes' shares
            return
        self._has_looked = True
        is_softmax = bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < _SUM_ROUNDING).all())
        if is_softmax or bool((values.logsumexp(1).abs() < _SUM_ROUNDING).all()):
            raise ValueError(
                f"{self._who} returns {'' if is_softmax else 'logarithms of '}probabilities: it ends in "
                f"{'softmax' if is_softmax else 'log_softmax'}, but losses take logits; remove that layer from the net "
                "(it has no weights)"
            )


def supervised_step(model: nn.Module, *, label_smoothing: float = 0.0) -> Step:
    """Return the step that trains ``model`` on the labels alone.

    Args:
        model: Returns logits ``[batch, classes]``.
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.

    Returns:
        A function of a batch; its loss is a scalar in nats. It raises a ``ValueError`` if the net's first outputs are
        probabilities, and a ``TypeError`` if they are not a tensor.
    """

    guard = LogitsGuard("the net")

    def step(batch: Batch) -> StepResult:
        outputs = model(batch.images)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the net returns a {type(outputs).__name__} in train(), but a training on the labels takes one tensor "
                f"of logits: return it in both modes (a small module around the net can take it out)"
            )
        logits = outputs.float()
        guard(logits)
        other = (None, None) if batch.mixed is None else (batch.mixed.labels, batch.mixed.share)
        loss = cross_entropy_loss(logits, batch.labels, *other, label_smoothing=label_smoothing)
        return StepResult(loss=loss, terms={"cross_entropy": loss}, logits=logits)

    return step
