"""The two learning rates of MetaDistil over a training."""

from __future__ import annotations

from qkd.config import MetaConfig, TrainConfig
from qkd.methods.meta_distil.step import MetaRates
from qkd.training.job import Batch
from qkd.training.optimizer import learning_rate


class MetaSchedule:
    """Gives the learning rates of a step: both rise and fall like the student's own.

    The assumed step's rate is ``inner_lr`` when the student's is at its peak. The teacher's is ``teacher_lr`` when
    the student's is largest, counting from the teacher's first epoch.

    Example:
        As published for images (240 epochs, rates a tenth at 150, 180 and 210), with ``inner_lr`` absent and
        ``teacher_lr`` 0.05 from epoch 150: the assumed step goes by 0.05, 0.005, ..., the teacher by 0.05 at 150,
        0.005 at 180 and 0.0005 at 210.

    Args:
        train: The student's training.
        meta: Peak rates and the teacher's first epoch.
        steps_per_epoch: Steps per epoch of the student's training.
        lr_factor: The phase's factor on the assumed step's rate.
        first_epoch: Epoch of the training, from 0, in which its first phase with a quiz begins: the teacher does not
            learn earlier.

    Raises:
        ValueError: If an epoch has no steps.
    """

    def __init__(
        self,
        train: TrainConfig,
        meta: MetaConfig,
        *,
        steps_per_epoch: int,
        lr_factor: float = 1.0,
        first_epoch: int = 0,
    ) -> None:
        if steps_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one step, got {steps_per_epoch=}")
        self._train, self._meta, self._steps = train, meta, steps_per_epoch
        peak = train.lr if meta.inner_lr is None else meta.inner_lr
        self._inner = peak * lr_factor / train.lr
        # No schedule rises after the warm-up.
        start = max(first_epoch, meta.teacher_start_epoch) * steps_per_epoch
        warm = round(train.warmup_epochs * steps_per_epoch)
        steps = {start, max(start, warm), max(start, warm - 1)}
        self._largest = max(learning_rate(train, step, steps_per_epoch) for step in steps)

    def __call__(self, batch: Batch) -> MetaRates:
        """Return the learning rates of the batch's epoch and step."""
        lr = learning_rate(self._train, batch.epoch * self._steps + batch.step, self._steps)
        if batch.epoch < self._meta.teacher_start_epoch:
            return MetaRates(self._inner * lr, None)
        return MetaRates(self._inner * lr, self._meta.teacher_lr * lr / self._largest)
