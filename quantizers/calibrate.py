"""Sets a student's activation scales from data, re-estimates batch norm, and moves scales off rounding ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.layers import ActQuantizer
from quantizers.modes import evaluating
from quantizers.settle import settle
from quantizers.student import act_quantizers, quant_layers, require_image_shape, require_student
from quantizers.tensor_quant import ActQuant, RangeObserver


def calibrate(student: nn.Module, batches: Iterable[Any], *, keep_statistics: bool = False) -> None:
    """Set activation scales from data, re-estimate batch-norm statistics, and settle the scales, all in place.

    Three passes over the batches: the ranges seen with float activations give initial scales; those with all
    quantizers on give the final ones (each layer sees the real output of its quantized predecessors); the last pass
    estimates batch-norm statistics as the average over the batches. Other parameters do not change.

    Args:
        student: A network from :func:`prepare`.
        batches: Image batches as the network takes them, float, ``[batch, channels, height, width]`` (or tuples that
            start with one), or one such batch. They are kept in memory during the call; a few hundred images suffice.
        keep_statistics: Leave batch norm's running statistics unchanged. Use it when the images are unlike the real
            ones, for example generated.

    Raises:
        TypeError: If it is not a student, or a batch is not a floating tensor (or a tuple that starts with one).
        ValueError: If there are no batches, one is empty, of images of another size than those of ``prepare``, or
            without a batch axis; if an image holds NaN or infinity, or all are zero.

    Example:
        >>> from quantizers import QuantSpec, prepare
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(16, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(), images)
        >>> calibrate(student, images.split(8))
        >>> all(bool((scale > 0).all()) for scale in quantizer_scales(student))
        True
    """
    require_student(student, "calibrate")
    images = [_images(batch, student) for batch in as_batches(batches)]
    _check(images)
    quantizers = act_quantizers(student)
    was_frozen = {layer: layer.deployed_in_training for layer in quant_layers(student).values()}
    with evaluating(student), torch.no_grad():
        try:
            freeze_batch_norm(student, False)  # a frozen layer would leave its reset statistics empty
            _batch_statistics(student, enabled=True)
            _observe(student, quantizers, images, bypass=True)
            _observe(student, quantizers, images, bypass=False)
            if not keep_statistics:
                _reestimate(student, images)
            _widen_steps(student)
        finally:
            for layer, frozen in was_frozen.items():
                layer.deployed_in_training = frozen
    settle(student)


def reestimate_batch_norm(student: nn.Module, batches: Iterable[Any]) -> None:
    """Set batch norm's running statistics, in place, to their average over batches under the current weights.

    Running statistics lag behind the weights, and low-bit weights that oscillate between two codes change a layer's
    output faster than that. Call it before :func:`freeze_batch_norm`, or at the end of training if you do not freeze;
    then call :func:`settle`.

    Args:
        student: A network from :func:`prepare`, calibrated.
        batches: As for :func:`calibrate`; they are read one after another.

    Raises:
        TypeError: If it is not a student, or a batch is not a floating tensor (or a tuple that starts with one).
        ValueError: If there are no batches, or one is empty or not of the size of ``prepare``.

    References:
        Nagel et al., `Overcoming Oscillations in Quantization-Aware Training <https://arxiv.org/abs/2203.11086>`_,
        2022, section 2.

    Example:
        >>> from quantizers import QuantSpec, prepare
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
        >>> student = prepare(net, QuantSpec(), torch.rand(2, 1, 8, 8))
        >>> calibrate(student, images := torch.rand(16, 1, 8, 8))
        >>> reestimate_batch_norm(student, images.split(8))
    """
    require_student(student, "reestimate_batch_norm")
    images = as_batches(batches)
    layers = quant_layers(student).values()
    was_frozen = {layer: layer.deployed_in_training for layer in layers}
    with evaluating(student), torch.no_grad():
        try:
            freeze_batch_norm(student, False)
            _batch_statistics(student, enabled=True)
            _reestimate(student, (_images(batch, student) for batch in images))
        finally:
            for layer, frozen in was_frozen.items():
                layer.deployed_in_training = frozen


def as_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches unchanged, and a single batch as a list of one.

    Args:
        batches: Batches; or images ``[batch, ...]``, or a tuple of images and integer labels ``[batch]``.

    Returns:
        The batches.

    Raises:
        TypeError: If they are neither.

    Example:
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> len(as_batches(images)), len(as_batches((images, labels))), len(as_batches([images, images]))
        (1, 1, 2)
    """
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be image tensors, or tuples that start with one, got {type(batches).__name__}; give a list "
            "of them, or one such batch"
        )
    if not isinstance(batches, tuple) or len(batches) != 2 or not all(isinstance(one, Tensor) for one in batches):
        return batches
    images, labels = batches
    is_labels = labels.dim() == 1 < images.dim() and not labels.is_floating_point()
    return [batches] if is_labels else batches


def _images(batch: Any, student: nn.Module) -> Tensor:
    tensor = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(tensor, Tensor) and tensor.numel() == 0:
        raise ValueError(f"a calibration batch of shape {tuple(tensor.shape)} holds no images; leave it out")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(
            f"batches must be float image tensors, got {type(tensor).__name__} {getattr(tensor, 'dtype', '')}"
        )
    device = next((p.device for p in student.parameters()), tensor.device)
    return tensor.to(device)


def _check(images: Sequence[Tensor]) -> None:
    if not images:
        raise ValueError("calibrate needs at least one batch of images, got none")
    for index, batch in enumerate(images):
        if not bool(torch.isfinite(batch).all()):
            raise ValueError(f"calibration batch {index} holds NaN or infinite values; check the images")
    if not any(bool(batch.any()) for batch in images):
        raise ValueError("all calibration images are zero; scales cannot be set from them")


def _batch_statistics(student: nn.Module, *, enabled: bool) -> None:
    """Make layers with batch norm use the batch's statistics, whatever mode the other layers are in."""
    for layer in quant_layers(student).values():
        if layer.bn is not None:
            layer.training = enabled
            layer.bn.training = enabled


def _observe(
    student: nn.Module, quantizers: dict[str, ActQuantizer], images: Sequence[Tensor], *, bypass: bool
) -> None:
    for quantizer in quantizers.values():
        quantizer.quant.observer, quantizer.quant.bypass = RangeObserver(), bypass
    momenta = _freeze_running_statistics(student)
    deployed = _use_float_biases(student)
    try:
        for index, batch in enumerate(images):
            _forward(student, batch, index)
        _set_scales([q.quant for q in quantizers.values()])
    finally:
        for quantizer in quantizers.values():
            quantizer.quant.observer, quantizer.quant.bypass = None, False
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for layer, training in deployed.items():
            layer.training = training


def _forward(student: nn.Module, batch: Tensor, index: int) -> None:
    try:
        require_image_shape(student, tuple(batch.shape))
        student(batch)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"calibration batch {index} of shape {tuple(batch.shape)} cannot be passed through the student: {error}; "
            "give float batches [batch, channels, height, width] of the size of example_inputs, several images each"
        ) from error


def _use_float_biases(student: nn.Module) -> dict[nn.Module, bool]:
    """Keep layers without batch norm from rounding biases to a grid that is not set yet."""
    before: dict[nn.Module, bool] = {layer: layer.training for layer in quant_layers(student).values()}
    for layer in before:
        layer.training = True
    return before


def _freeze_running_statistics(student: nn.Module) -> dict[_BatchNorm, float | None]:
    norms = {m: m.momentum for m in student.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.momentum = 0.0
    return norms


def _set_scales(quants: Sequence[ActQuant]) -> None:
    groups: dict[ActQuant, list[ActQuant]] = {}
    for quant in quants:
        groups.setdefault(quant.owner, []).append(quant)
    for owner, members in groups.items():
        seen = [m for m in members if m.observer is not None and not m.observer.is_empty]
        for member in seen:
            member.set_range(member.observer)  # type: ignore[arg-type]
        if seen:
            owner.set_step(max(member.start_step(member.observer) for member in seen))  # type: ignore[arg-type]
        for member in members:
            member.mark_calibrated()


def _reestimate(student: nn.Module, images: Iterable[Tensor]) -> None:
    norms = [m for m in student.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
        count = 0
        for index, batch in enumerate(images):
            _forward(student, batch, index)
            count += 1
        if not count:
            raise ValueError("batch norm needs at least one batch of images to estimate its statistics from, got none")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _widen_steps(student: nn.Module) -> None:
    """Widen grids that would fit within a single unit of the accumulators or means they read.

    That happens after dead layers and where values cancel, so that only zeros were seen. A step below
    ``unit / 2**bits`` only distinguishes zero from nonzero, but it would expose the rounding errors of a zero that is
    summed in floating point; and runtimes reject a mean whose grid is 256 times finer than its unit.
    """
    _widen_sums(student)
    _widen_means(student)
    _widen_sums(student)  # of layers that read such a mean


def _widen_sums(student: nn.Module) -> None:
    for layer in quant_layers(student).values():
        _, scale, _ = layer.folded()
        unit = float(scale.max() * layer.source.quant.step)
        for consumer in layer.consumers:
            _widen(consumer, unit / 2.0**consumer.quant.bits)


def _widen_means(student: nn.Module) -> None:
    for quantizer in act_quantizers(student).values():
        origin = quantizer.origin
        if origin is not None and origin.kind == "mean" and origin.sources[0].quant.owner is not quantizer.quant.owner:
            unit = float(origin.sources[0].quant.step) / max(origin.counts)
            _widen(quantizer, 2 * unit / 2.0**quantizer.quant.bits)  # well within what runtimes take


def _widen(quantizer: ActQuantizer, least: float) -> None:
    if float(quantizer.quant.step) < least:
        quantizer.quant.owner.set_step(least)


def freeze_batch_norm(student: nn.Module, enabled: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a sentence
    """Make training use the deployed arithmetic: running statistics folded into the weights, int32 biases.

    At 2 bits the bias grid is coarse, and a student that has never trained on it changes at export. So train the last
    epochs this way. Gradients reach weights, scales and batch norm's affine parameters; the statistics do not change.

    Args:
        student: A network from :func:`prepare`.
        enabled: False returns to batch statistics.

    Raises:
        TypeError: If it is not a student.
    """
    require_student(student, "freeze_batch_norm")
    for layer in quant_layers(student).values():
        layer.deployed_in_training = enabled


def quantizer_scales(student: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales of weights and activations, each once, for a separate parameter group.

    Scales of frozen weights are included. They are frozen, so an optimizer skips them.

    Args:
        student: A network from :func:`prepare`.

    Returns:
        Scales and steps, positive, in network order.
    """
    quants = [layer.quant for layer in quant_layers(student).values()]
    quants += [quantizer.quant for quantizer in act_quantizers(student).values()]  # type: ignore[misc]
    return list(dict.fromkeys(p for quant in quants for p in quant.parameters(recurse=False)))
