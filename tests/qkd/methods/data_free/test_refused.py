"""What a data-free run refuses before anything is trained: a teacher that lacks what is read, unfit images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from qkd.cli.entry import main
from qkd.methods.data_free.checks import require_teacher_fits
from qkd.methods.data_free.making.kinds import KINDS
from qkd.testing import synthetic_images

NETS = """
from torch import nn


def plain(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))


def without_statistics(num_classes, in_channels):
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))


def convolutional(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 8), nn.Flatten())


def inner_linear(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 3), nn.Unflatten(1, (3, 1, 1)),
                         nn.Conv2d(3, num_classes, 1), nn.Flatten())


class Scaled(nn.Module):
    # its last linear layer does not give the logits: its input and its weights are those of another function
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body, self.norm = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(144, num_classes)

    def forward(self, x):
        return 2 * self.fc(self.norm(self.body(x)).relu().flatten(1))


scaled = Scaled


def color(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""
STATISTICS = "reads running statistics of the teacher's batch norms, but"


def images(folder: Path, classes: int) -> Path:
    folder.mkdir()
    for name in ("train", "test"):
        found, labels = synthetic_images(32, classes=classes)
        np.savez(folder / f"{name}.npz", images=found[:, 0].numpy(), labels=labels.numpy())
    return folder


def run(tmp_path: Path, net: str, method: str, *, classes: int = 4) -> int:
    (tmp_path / "nets.py").write_text(NETS)
    config = tmp_path / "bad.yaml"
    config.write_text(
        f"name: bad\ndata: {{name: npz, path: {images(tmp_path / 'set', classes)}}}\n"
        f"teacher: {{net: '{net}', train: {{epochs: 1}}}}\n"
        "student: {init: random, quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1},\n"
        f"  data_free: {{method: {method}}}, agent: {{policy: none}}}}\n"
    )
    return main(["run", str(config), "--runs-dir", str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("net", "method", "match"),
    [
        ("nets.py:plain", "adaptive_inversion", f"{STATISTICS} nets.py:plain has none"),
        ("nets.py:without_statistics", "fast_dfkd", f"{STATISTICS} nets.py:without_statistics has none"),
        ("nets.py:convolutional", "dafl_joint", "reads the linear layer whose output is the teacher's logits, but"),
        ("nets.py:inner_linear", "zskd", "inner_linear are the output of none; use another net"),
        ("nets.py:scaled", "mskd", "scaled are the output of none; use another net"),
        ("nets.py:color", "dfad", "channels"),
    ],
)
def test_a_net_that_does_not_fit(
    net: str, method: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, net, method) == 2
    said = capsys.readouterr().err
    assert match.replace("nets.py", str(tmp_path / "nets.py")) in said or match in said, said
    assert not (tmp_path / "runs" / "bad" / "teacher").exists()


def test_a_set_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "resnet8", "rdskd", classes=1) == 2
    said = capsys.readouterr().err
    assert "every image of .npz. is of one class (0); needs at least two" in said.replace("'", "."), said
    assert not (tmp_path / "runs" / "bad" / "teacher").exists()


def test_every_method_says_which_others_do_without() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1), nn.Flatten())
    for method, kind in KINDS.items():
        if kind.needs_last_layer:
            with pytest.raises(
                ValueError,
                match=r"are the output of none; use another net, .* not need it: noise, procedural, rdskd",
            ):
                require_teacher_fits(method, "inner", net, 2, (1, 2, 2))
        with pytest.raises(ValueError, match="at least two classes, got 1: add images"):
            require_teacher_fits(method, "inner", net, 1, (1, 2, 2))


def test_validate_knows_the_weights_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "digits/data-free/rdskd", "student.data_free.weights={noise_weight: 1}"]) == 2
    assert "student.data_free.weights: unknown weight `noise_weight` of method `rdskd`" in capsys.readouterr().err
