"""The names that a config can use: listed for users, and checked in a config before it is run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

DATASET_NOTES = {
    "cifar10": "60,000 color images 32x32, 10 classes (torchvision)",
    "cifar100": "60,000 color images 32x32, 100 classes (torchvision)",
    "digits": "1,797 handwritten digits 8x8, or enlarged to image_size; comes with scikit-learn",
    "fashion-mnist": "70,000 gray images 28x28, 10 classes (torchvision)",
    "folder": "data.path with train/<class>/ and test/<class>/ of image files",
    "mnist": "70,000 handwritten digits 28x28 (torchvision)",
    "npz": "data.path with train.npz and test.npz, each `images` uint8 and `labels`",
    "svhn": "99,289 house numbers 32x32 in color (torchvision)",
}

POLICY_NOTES = {
    "crop": "random crop after padding",
    "crop_flip": "random crop after padding, then flip half of the images",
    "cutmix": "CutMix: after crop and flip, paste a box of another image into half of the images (share: `cutmix`)",
    "file": "a schedule of policies over the epochs, from the YAML file that `schedule` names",
    "none": "no augmentation",
    "pba": "PBA: zero to two operations per image, stronger in each third of the training, then crop and flip",
    "randaugment": "RandAugment: `operations` operations per image, all at `magnitude` (0..30), then crop and flip",
    "search": "what this run's population search finds for the role, then crop and flip",
    "teacher": "for the student: the teacher's policy",
    "trivial": "TrivialAugment (wide): one operation per image at a random magnitude, then crop and flip",
}

METHOD_TERMS = ("filtered_soft_target", "lipschitz", "soft_target")  # published as methods: KDDG, LONDON, plain KD

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/nvgpu", "/dev/dxg", "/dev/kfd")  # WSL has dxg, AMD kfd


@dataclass(frozen=True)
class Listing:
    """What ``qkd ls`` prints: table -> name -> a few words (possibly none)."""

    tables: Mapping[str, Mapping[str, str]]

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the tables as plain data."""
        return {name: dict(rows) for name, rows in self.tables.items()}

    def to_text(self) -> str:
        """Return the tables as text, each under its name if there are several."""
        blocks = []
        for name, rows in self.tables.items():
            width = max((len(key) for key in rows), default=0)
            lines = [f"{key:<{width}}  {words}".rstrip() for key, words in rows.items()]
            blocks.append("\n".join(lines if len(self.tables) == 1 else [f"{name}:", *(f"  {line}" for line in lines)]))
        return "\n\n".join(blocks)


def table(name: str) -> dict[str, str]:
    """Return a table by its name: each entry with a few words about it.

    Args:
        name: A key of ``TABLES``.
    """
    return TABLES[name]()


def _configs() -> dict[str, str]:
    from qkd.config.binding import shipped_configs

    return {name: _purpose(path.read_text(encoding="utf-8")) for name, path in shipped_configs().items()}


def _purpose(text: str) -> str:
    """Return what follows ``Purpose:`` in a config's opening comment, up to its next entry."""
    words: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or (words and ":" in line[:12]):
            break
        words.append(line.lstrip("# ").removeprefix("Purpose:").strip())
    return " ".join(words)


def _datasets() -> dict[str, str]:
    return dict(DATASET_NOTES)


def _nets() -> dict[str, str]:
    from qkd.nets import net_names

    return dict.fromkeys(net_names(), "")


def method_notes() -> dict[str, str]:
    """Return methods that have their own key instead of a term: key -> a few words."""
    from qkd.methods.table import METHODS

    notes = {entry.asked_by.replace("[].", ": "): entry.about for entry in METHODS.values() if entry.asked_by}
    notes |= {
        "student.method": "a custom method: path/to/file.py:Class, package.module:Class, or an entry point's name",
        "student.phases: combine": "distillation gradients clipped to the length of the task's (Lee, Kim, Song 2018)",
        "teacher.untrained": "Apprentice: a teacher that learns with its student (Mishra, Marr 2018)",
    }
    return dict(sorted(notes.items()))


def _methods() -> dict[str, str]:
    """Return the training methods of a student: sections of a config, and terms that are a method on their own."""
    from qkd.terms import LOSSES

    terms = {f"student.terms: {name}": LOSSES[name] for name in METHOD_TERMS}
    rows = {name: f"{entry.summary} ({entry.source})" for name, entry in terms.items()}
    return dict(sorted({**method_notes(), **rows}.items()))


def _losses() -> dict[str, str]:
    from qkd.terms import LOSSES
    from qkd.terms.method_losses import METHOD_LOSSES

    rows = {name: f"{entry.summary} ({entry.source})" for name, entry in sorted(LOSSES.items())}
    rows |= {name: f"{entry.summary} ({entry.source})" for name, entry in METHOD_LOSSES.items()}
    return {**rows, **method_notes()}


def _quantizers() -> dict[str, str]:
    from qkd.config import QuantConfig

    roles: dict[str, list[str]] = {}
    for role in ("weight", "act"):
        for name in get_args(QuantConfig.model_fields[f"{role}_quantizer"].annotation):
            roles.setdefault(name, []).append("weights" if role == "weight" else "activations")
    return {name: " and ".join(users) for name, users in sorted(roles.items())}


def _devices() -> dict[str, str]:
    from qkd.machine import usable_cpus

    rows = {"auto": "cuda if available, else cpu", "cpu": f"{usable_cpus()} processors"}
    return {**rows, **_cuda_devices(), "local": "for bench: this machine", **_bench_devices()}


def _cuda_devices() -> dict[str, str]:
    """Return the graphics processors by name; torch, which takes seconds to import, is used only with a driver."""
    if sys.platform == "linux" and not any(Path(path).exists() for path in GPU_DRIVERS):
        return {}
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(count)}


def _bench_devices() -> dict[str, str]:
    from qkd.bench.device_file import default_file, read_devices

    file = default_file()
    return {name: f"for bench: {device.address} ({file})" for name, device in read_devices(file).items()}


def _policies() -> dict[str, str]:
    return dict(POLICY_NOTES)


def _targets() -> dict[str, str]:
    from export.targets import TARGETS

    return {name: target.summary for name, target in TARGETS.items()}


TABLES: dict[str, Callable[[], dict[str, str]]] = {
    "configs": _configs,
    "datasets": _datasets,
    "nets": _nets,
    "losses": _losses,
    "methods": _methods,
    "quantizers": _quantizers,
    "devices": _devices,
    "policies": _policies,
    "targets": _targets,
}
