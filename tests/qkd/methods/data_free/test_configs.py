"""Configs of data-free runs that come with the toolkit: every training of each takes its first steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qkd.config import RunConfig
from qkd.config.binding import load_config, shipped_configs
from qkd.config.data_free import FAMILIES, DataFreeConfig
from qkd.pipeline.dryrun import dry_run
from qkd.progress import Silent
from qkd.testing import write_npz_set

CONFIGS = sorted(name for name in shipped_configs() if "/data-free/" in name)


def test_a_dry_run_trains_the_teacher_on_real_images(config_of: Callable[..., RunConfig]) -> None:
    """Only the student is without them."""
    config = config_of("noise", {"teacher.run": None})
    found = {check.name: check.outcome for check in dry_run(config, Silent()).checks}
    assert found["teacher"].startswith("loss") and found["phase tutoring"].startswith("loss")


@pytest.mark.parametrize("method", FAMILIES)
def test_few_steps_can_be_bound_again(method: str) -> None:
    """Which happens where a net is the user's own, whose file a run folder copies."""
    tried = DataFreeConfig(method=method).tried(8)
    assert DataFreeConfig.model_validate(tried.model_dump()) == tried and tried.images_per_epoch == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes_a_dry_run(name: str, tmp_path: Path) -> None:
    words = ["threads=1"]
    if not name.startswith("digits/"):  # its images would be downloaded
        folder = write_npz_set(tmp_path, train=160, test=40, classes=10, image_size=28)
        words += ["data.name=npz", f"data.path={folder}"]
    checks = [check.name for check in dry_run(load_config(name, words), Silent()).checks]
    assert checks[:2] == ["data", "teacher"] and checks[-1] == "export" and len(checks) >= 5


def test_there_are_configs() -> None:
    assert len(CONFIGS) > 20
