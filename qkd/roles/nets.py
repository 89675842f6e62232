"""The nets of a run: built for its data, and loaded from the files of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkd.config import QuantConfig, RunConfig
from qkd.data import Splits
from qkd.files import read_json, read_metadata, read_safetensors, sha256_of, write_safetensors
from qkd.image_size import ImageSize, height_width, parsed_size, size_text
from qkd.nets import build_net, load_weights
from qkd.nets.imagenet import weights_file
from qkd.nets.own.copies import located_net, portable_net
from qkd.roles.stored import WEIGHTS_HASH
from qkd.run.folder import RunFolder
from qkd.seeding import global_stream
from qkd.training.assembly import WEIGHTS
from qkd.training.state import fill
from quantizers import QuantSpec, Student, prepare


def load_teacher(run: RunFolder) -> nn.Module:
    """Return the run's teacher (the first member of an ensemble), in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another net.
    """
    return load_float(run.path / "teacher" / WEIGHTS)


def fresh_net(config: RunConfig, net: str, splits: Splits, *names: str | int) -> nn.Module:
    """Return a float net with random weights from the run's seed, on the CPU.

    Args:
        config: The run's config.
        net: A name of ``qkd ls nets``.
        splits: The images, for their shape and classes.
        *names: Names of the random stream.
    """
    with global_stream(config.seed, "init", *names):
        return build_net(net, **sizes_of(splits))


def sizes_of(splits: Splits) -> dict[str, Any]:
    """Return the sizes that a net is built for."""
    return {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}


def blank_images(splits: Splits, device: torch.device | None = None) -> Tensor:
    """Return a batch of two black images, the same size as others, to find feature shapes with.

    Args:
        splits: The other images.
        device: Where to put them; defaults to the CPU.
    """
    return torch.zeros(2, *splits.image_shape, device=device)


def load_float_twin(run: RunFolder) -> nn.Module | None:
    """Return the student's net in full precision: from its float training, its starting weights, or the teacher.

    It is in eval mode, on the CPU; None if the run has none of these, or no longer (:func:`why_no_twin`).
    """
    own = run.path / "student" / "float" / WEIGHTS
    if own.exists():
        return load_float(own)
    config = run.config
    if config.student.weights is not None and config.student.head == "keep":  # a new head is untrained
        if why_no_twin(run):
            return None
        net = _build(_facts(run.path / "student" / WEIGHTS))
        load_weights(net, weights_file(config.student.weights, config.student_net))
        return net.eval()
    return load_teacher(run) if config.student_net == config.teacher_net else None


def why_no_twin(run: RunFolder) -> str:
    """Return why the net that the student started from cannot be read again; empty if it can, or need not be."""
    config, own = run.config, run.path / "student" / "float" / WEIGHTS
    if own.exists() or config.student.weights is None or config.student.head != "keep":
        return ""
    try:
        file = weights_file(config.student.weights, config.student_net)
        then = read_json(run.path / "student" / "result.json").get(WEIGHTS_HASH)
        is_other = then not in (None, sha256_of(file))
    except (OSError, ValueError, AttributeError) as error:
        return f"student.weights cannot be read ({error})"
    return (
        f"student.weights: {config.student.weights} has changed since the student started from it" if is_other else ""
    )


def load_student(run: RunFolder) -> Student:
    """Return the run's trained student, in eval mode (its deployed arithmetic), on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another student.
    """
    return load_low_bit(run.path / "student" / WEIGHTS, run.config.student.quant)


def start_head(config: RunConfig) -> str:
    """Return what happens to the last layer of the weights that a student starts from: ``keep`` or ``new``."""
    return config.student.head if config.student_start == "weights" else "keep"


def prepare_student(config: RunConfig, net: nn.Module, image_shape: tuple[int, int, int]) -> Student:
    """Return the uncalibrated low-bit student of a float net: :func:`prepare_low_bit` with ``student.quant``."""
    return prepare_low_bit(config.student.quant, net, image_shape)


def prepare_low_bit(quant: QuantConfig, net: nn.Module, image_shape: tuple[int, int, int]) -> Student:
    """Return the uncalibrated low-bit form of a float net.

    Args:
        quant: The bit widths.
        net: The float net; untouched.
        image_shape: Channels, height and width of the images.

    Raises:
        quantizers.RewriteError: If the net cannot be rewritten.
    """
    return prepare(net, QuantSpec(**quant.model_dump()), example_inputs=torch.zeros(2, *image_shape))


def save_net(path: Path, model: nn.Module, facts: Mapping[str, str]) -> str:
    """Write a net's weights with the facts to rebuild it; return the SHA-256 of the file."""
    return write_safetensors(path, model.state_dict(), metadata=facts)


def net_facts(net: str, *, classes: int, channels: int, image_size: ImageSize) -> dict[str, str]:
    """Return the facts that :func:`save_net` stores with the weights."""
    size = str(image_size) if isinstance(image_size, int) else size_text(image_size)
    return {"net": portable_net(net), "classes": str(classes), "channels": str(channels), "image_size": size}


def load_float(path: Path) -> nn.Module:
    """Return a float net that a role wrote, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If its file is damaged or of another net.
    """
    net = _build(_facts(path))
    load_weights(net, path)
    return net.eval()


def load_low_bit(path: Path, quant: QuantConfig) -> Student:
    """Return a low-bit net that a role wrote, in eval mode, on the CPU.

    Args:
        path: The file of its weights.
        quant: Its bit widths.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If its file is damaged or of another student.
    """
    facts = _facts(path)
    shape = (int(facts["channels"]), *height_width(parsed_size(facts["image_size"])))
    student = prepare_low_bit(quant, _build(facts), shape)
    try:
        fill(student, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return student.eval()


def _facts(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it first (qkd teacher, qkd distill)")
    facts = read_metadata(path)
    missing = [name for name in ("net", "classes", "channels", "image_size") if name not in facts]
    if missing:
        raise ValueError(f"{path} was not written by a stage: its header lacks {', '.join(missing)}")
    return {**facts, "net": located_net(facts["net"], path)}


def _build(facts: Mapping[str, str]) -> nn.Module:
    classes, channels = int(facts["classes"]), int(facts["channels"])
    return build_net(facts["net"], classes=classes, channels=channels, image_size=parsed_size(facts["image_size"]))
