"""Pictures of what an agent shows have the boxes of other images that a training has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from qkd.analysis.schedules import sample_policy
from qkd.config import DataConfig
from qkd.predicting.predictions import _as_agents_show
from qkd.progress import Silent
from qkd.roles.images import run_images
from qkd.run.folder import RunFolder
from qkd.testing import tiny_config, write_npz_set


def test_a_sample_of_cutmix_has_boxes(tmp_path: Path) -> None:
    pictures = []
    for policy in ("crop_flip", "cutmix"):
        out = tmp_path / f"{policy}.png"
        sample_policy(policy, DataConfig(name="digits"), epochs=range(8), out=out)
        pictures.append(np.asarray(Image.open(out)))
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


def test_the_page_of_a_run_shows_boxes(tmp_path: Path) -> None:
    shown, data = [], write_npz_set(tmp_path / "data")
    for name, agent in (("plain", {"policy": "crop"}), ("mixed", {"policy": "crop", "cutmix": 1.0})):
        config = tiny_config(data, {"name": name, "student.agent": agent})
        with RunFolder.open(config, tmp_path / "runs") as run:
            shown.append(_as_agents_show(run, run_images(run, Silent()))["agent.student"])
    assert shown[0].shape == shown[1].shape
    different = (shown[0] != shown[1]).reshape(*shown[0].shape[:2], -1).any(-1)
    assert different.mean() > 0.5, "every image gets a box, small ones maybe of the same pixels"
