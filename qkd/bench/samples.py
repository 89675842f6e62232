"""Find the sample that models are scored on, and whose expected logits are whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from export import Sample, read_sample
from qkd.failures import UsageError
from qkd.files import sha256_of
from qkd.report.records import read_record

FILE = Path("export") / "sample.npz"  # in a run folder


def own_sample(runs: Mapping[str, Path]) -> Sample | None:
    """Return the sample of run folders, with the logits expected of the models of each; None if they have none.

    Args:
        runs: Prefix of the names of a run's models -> its folder.

    Raises:
        UsageError: If their images or labels differ.
        ValueError: If a sample is damaged.
    """
    found = {prefix: folder / FILE for prefix, folder in runs.items()}
    samples = {prefix: read_sample(path) for prefix, path in found.items() if path.is_file()}
    if not samples:
        return None
    first = next(iter(samples.values()))
    if any(not np.array_equal(one.images, first.images) for one in samples.values()):
        raise UsageError(
            "the runs have different test images, or prepare them differently, so one sample cannot serve them all: "
            "measure them one by one"
        )
    if any(not _same_labels(one, first) for one in samples.values()):
        raise UsageError(
            "the runs have the same test images with different labels, so one sample cannot score them all: measure "
            "them one by one"
        )
    logits = {prefix + name: values for prefix, one in samples.items() for name, values in one.logits.items()}
    return replace(first, logits=logits, files={})


def given_sample(path: Path, models: Mapping[str, Path]) -> Sample:
    """Return a sample from a file, with only those of its logits that are of the named models.

    A name proves nothing: the sample records the hashes of its models, or stands beside them in a run folder.

    Args:
        path: The npz file.
        models: Name -> file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or the record of the run beside it is.
    """
    sample = read_sample(path)
    hashes = {**_hashes_beside(path), **sample.files}
    logits = {}
    for name, model in models.items():
        sha256 = sha256_of(model)
        for known, values in sample.logits.items():
            beside = path.resolve().parent / f"{known}.onnx"
            if hashes[known] == sha256 if known in hashes else model.resolve() == beside:
                logits[name] = values
    return replace(sample, logits=logits, files={})


def is_own_sample(path: Path | None, folder: Path) -> bool:
    """Return whether models are scored on a run's own images and labels.

    Args:
        path: The sample that was named; None if none was, so that the run's own is used.
        folder: The run folder.

    Raises:
        ValueError: If a sample is damaged.
    """
    if path is None:
        return True
    if not (folder / FILE).is_file():
        return False
    given, own = read_sample(path), read_sample(folder / FILE)
    return np.array_equal(given.images, own.images) and _same_labels(given, own)


def _hashes_beside(path: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files of the export that a sample stands beside; empty if there is none."""
    record = path.resolve().parent / "export.json"
    facts = read_record(record) if record.is_file() else {}
    return {name: model["sha256"] for name, model in facts.items() if model.get("sha256")}


def _same_labels(one: Sample, other: Sample) -> bool:
    if one.labels is None or other.labels is None:
        return one.labels is other.labels
    return np.array_equal(one.labels, other.labels)
