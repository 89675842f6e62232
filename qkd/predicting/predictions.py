"""The predictions of a run's files on the test images, by class, and pictures of mistakes and augmentations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents import build_agent
from qkd.config import AgentConfig
from qkd.data import Splits, iterate
from qkd.files import write_bytes, write_json
from qkd.methods.table import reads_images
from qkd.predicting.predict import Model
from qkd.report.intervals import pack_answers, paired_difference
from qkd.roles.agents import Role, role_agent, schedule_file
from qkd.run.folder import RunFolder
from qkd.seeding import stream

PREDICTIONS, GALLERY = "predictions.json", "gallery.npz"
MISTAKES = 12  # pictures of a page
SHOWN_IMAGES, SHOWN_EPOCHS = 6, 3  # of an agent: columns and rows
LARGEST_SIDE = 96  # pixels of a picture that is kept; larger images are scaled down


@dataclass(frozen=True)
class Predictions:
    """The classes that a file gives the test images.

    Args:
        labels: What they show, int64 ``[images]``.
        classes: What the file says, likewise.
        confidence: Probability of that class, float64 ``[images]``.
    """

    labels: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]

    @property
    def is_right(self) -> npt.NDArray[np.bool_]:
        """Which images got their class."""
        return np.asarray(self.labels == self.classes)

    def confusion(self) -> list[list[int]]:
        """Return ``[label, predicted class, images]`` for each pair that occurs."""
        pairs, counts = np.unique(np.stack([self.labels, self.classes], 1), axis=0, return_counts=True)
        return [[int(label), int(found), int(count)] for (label, found), count in zip(pairs, counts, strict=True)]


def write_predictions(run: RunFolder, splits: Splits) -> list[Path]:
    """Run the student's and the teacher's file on the test set; write what they say, and pictures for the report.

    Args:
        run: With ``export/student.onnx`` and ``export/teacher.onnx``.
        splits: Its images.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written.
    """
    folder = run.folder("export")
    found = {name: predictions_of(folder / f"{name}.onnx", run, splits) for name in ("student", "teacher")}
    record = {
        "images": len(splits.test),
        "classes": list(splits.classes),
        "models": {
            name: {
                "right": int(one.is_right.sum()),
                "correct": pack_answers(one.is_right),  # so that runs can be compared image by image
                "confusion": one.confusion(),
            }
            for name, one in found.items()
        },
        "difference": paired_difference(found["student"].is_right, found["teacher"].is_right),
    }
    write_json(folder / PREDICTIONS, record)
    pictures = {**_mistakes(found["student"], splits), **_as_agents_show(run, splits)}
    stream_of_bytes = io.BytesIO()
    np.savez_compressed(stream_of_bytes, **pictures)  # type: ignore[arg-type]
    write_bytes(folder / GALLERY, stream_of_bytes.getvalue())
    return [folder / PREDICTIONS, folder / GALLERY]


def predictions_of(path: Path, run: RunFolder, splits: Splits) -> Predictions:
    """Return a file's predictions on the test images, preprocessed as it says, with optimizations on.

    Args:
        path: The file.
        run: Whose batch size and number of threads hold.
        splits: Its images.
    """
    config, labels, classes, confidence = run.config, [], [], []
    model, order = Model(str(path), config.threads or 1), torch.arange(len(splits.test))
    for images, wanted in iterate(splits.test, order, config.data.eval_batch_size, "cpu", drop_last=False,
                                  workers=config.data.workers):  # fmt: skip
        probabilities = model.probabilities(images.permute(0, 2, 3, 1).numpy())
        labels.append(wanted.numpy())
        classes.append(probabilities.argmax(1))
        confidence.append(probabilities.max(1))
    return Predictions(np.concatenate(labels), np.concatenate(classes), np.concatenate(confidence))


def _mistakes(found: Predictions, splits: Splits) -> dict[str, npt.NDArray[Any]]:
    wrong = np.flatnonzero(~found.is_right)
    worst = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:MISTAKES]
    if not len(worst):
        return {}
    images, _ = splits.test.batch(torch.from_numpy(worst), "cpu")
    return {
        "mistakes": small(images),
        "mistakes.labels": found.labels[worst],
        "mistakes.classes": found.classes[worst],
        "mistakes.confidence": found.confidence[worst],
    }


def _as_agents_show(run: RunFolder, splits: Splits) -> dict[str, npt.NDArray[Any]]:
    """Return training images unchanged, and as each role's agent shows them early, halfway and late.

    They are not read for a page about a student that may not see them.
    """
    if not len(splits.train) or not reads_images(run.config):
        return {}
    samples = torch.linspace(0, len(splits.train) - 1, min(SHOWN_IMAGES, len(splits.train))).round().long()
    images, labels = splits.train.batch(samples, "cpu")
    pictures: dict[str, npt.NDArray[Any]] = {"samples": small(images)}
    lengths: Mapping[Role, Any] = {"teacher": run.config.teacher.train, "student": run.config.student.train}
    for role, train in lengths.items():
        if train is None:
            continue
        try:
            agent = build_agent(_trained_by(run, role), epochs=train.epochs, mean=splits.mean)
        except (OSError, ValueError):  # its schedule was another run's, or is gone: the page has no such pictures
            continue
        epochs = sorted({0, train.epochs // 2, train.epochs - 1})[:SHOWN_EPOCHS]
        draws = {epoch: stream(run.config.seed, role, "shown", epoch) for epoch in epochs}
        shown = [
            agent.with_labels(images, labels, generator=generator, epoch=epoch, samples=samples)[0]
            for epoch, generator in draws.items()
        ]
        pictures[f"agent.{role}"] = np.stack([small(one) for one in shown])
        pictures[f"agent.{role}.epochs"] = np.array(epochs, np.int64)
    return pictures


def _trained_by(run: RunFolder, role: Role) -> AgentConfig:
    """Return a role's agent with the run's own record of its schedule: the user's file may have changed since."""
    agent, kept = role_agent(run, role), schedule_file(run.path, role)
    return agent.model_copy(update={"schedule": kept}) if agent.policy == "file" and kept.is_file() else agent


def small(images: Tensor) -> npt.NDArray[np.uint8]:
    """Return images as uint8 ``[images, height, width, channels]``, scaled down to a bounded side."""
    from PIL import Image

    arrays = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    height, width = arrays.shape[1:3]
    factor = LARGEST_SIDE / max(height, width)
    if factor >= 1:
        return np.asarray(arrays)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    planes = [np.asarray(Image.fromarray(one.squeeze()).resize(size, Image.Resampling.BOX)) for one in arrays]
    return np.stack(planes).reshape(len(arrays), size[1], size[0], -1)
