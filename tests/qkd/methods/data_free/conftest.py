"""One trained teacher that the data-free runs of these tests take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qkd.config import RunConfig
from qkd.run.folder import RunFolder
from qkd.testing import run_tiny, tiny_config, write_npz_set

FEW = {
    "rdskd": {"train": {"epochs": 2, "optimizer": "adamw", "lr": 1e-3}, "steps_per_epoch": 3},
    "deep_inversion": {"pool_images": 10, "pool_steps": 3, "lr": 0.05},
    "dfad": {"student_steps": 2},
    "dafl_joint": {},
    "adaptive_inversion": {"pool_images": 20, "pool_steps": 3, "lr": 0.05},
}
LIKE = {
    "dafl": "rdskd", "mskd": "rdskd", "gdfq": "rdskd", "generative": "rdskd",
    "zskd": "deep_inversion", "cmi": "deep_inversion",
    "zskt": "dfad", "dfq": "dfad",
    "cmi_adversarial": "adaptive_inversion", "fast_dfkd": "adaptive_inversion",
}  # fmt: skip
WITHOUT_GENERATOR = ("noise", "procedural", "deep_inversion", "zskd", "adaptive_inversion")
BATCHED = ("rdskd", "deep_inversion", "adaptive_inversion")  # those whose images come in batches of their own size


def data_free(method: str, **changes: Any) -> dict[str, Any]:
    """Return a section ``student.data_free`` that takes a moment."""
    few = dict(FEW.get(LIKE.get(method, method), {}))
    few |= {"warmup_steps": 2} if method == "dfq" else {}
    sizes = {} if method in WITHOUT_GENERATOR else {"latent": 8, "width": 8}
    batch = {"batch_size": 8} if LIKE.get(method, method) in BATCHED else {}
    return {"method": method, "images_per_epoch": 32, **sizes, **batch, **few, **changes}


@pytest.fixture(scope="package")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="package")
def teacher_run(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose teacher is trained."""
    config = tiny_config(data_folder, {"name": "teacher"})
    with run_tiny(config, tmp_path_factory.mktemp("teacher"), "teacher") as run:
        return run.path


@pytest.fixture(scope="package")
def config_of(data_folder: Path, teacher_run: Path) -> Callable[..., RunConfig]:
    """Return what makes a config of a data-free method with the trained teacher."""

    def make(method: str, changes: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        own = {
            "teacher.run": str(teacher_run),
            "student.net": "lenet5_half",  # its low-bit form is made in no time
            "student.init": "random",
            "student.agent": {"policy": "none"},
            "student.data_free": data_free(method, **settings),
            "student.terms": [{"loss": "soft_target"}],
        }
        return tiny_config(data_folder, {**own, **(changes or {})})

    return make


@pytest.fixture
def borrowed(tmp_path: Path) -> Callable[[RunConfig], RunFolder]:
    """Return what opens the run of a config, up to its distillation; a run of one name is opened once."""

    def begin(config: RunConfig) -> RunFolder:
        return run_tiny(config, tmp_path / "runs", "teacher", "search")

    return begin
