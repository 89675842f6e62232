"""Nets that a person brings: found beside the config, called with what they ask for, copied into the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkd.checking import name_faults
from qkd.foreign.user_code import code_hash, place_fault
from qkd.nets import build_net
from qkd.nets.own.copies import keep_net, located_net, module_hash, portable_net, resolved_nets, same_net
from qkd.nets.own.spelling import net_title, parse_net, spelled

NET = """
from torch import nn
from layers import block


def build(num_classes, in_channels=3, width=4):
    head = nn.Linear(width, num_classes)
    return nn.Sequential(block(in_channels, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Pair(nn.Linear):
    def __init__(self):
        super().__init__(8, 5)

    def forward(self, x):
        return super().forward(x).mean((1, 2)), x


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 7)

    def forward(self, x):
        return self.fc(x.flatten(1))


def broken():
    raise RuntimeError("no such luck")


def words():
    return "a net"


number = 3
instance = Fixed()
"""
LAYERS = """
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(NET, encoding="utf-8")
    (tmp_path / "layers.py").write_text(LAYERS, encoding="utf-8")
    return tmp_path


def test_a_net_is_built_with_what_its_signature_names(home: Path) -> None:
    net = build_net(f"{home}/mynet.py:build", classes=5, channels=1, image_size=(8, 6))
    assert net(torch.zeros(2, 1, 8, 6)).shape == (2, 5) and net.training
    wide = build_net(spelled(f"{home}/mynet.py:build", {"width": 6}), classes=5, channels=1, image_size=8)
    assert wide[3].in_features == 6


def test_two_files_with_a_module_of_one_name_beside_them_do_not_meet(home: Path) -> None:
    other = home / "other"
    other.mkdir()
    (other / "mynet.py").write_text(NET, encoding="utf-8")
    (other / "layers.py").write_text(LAYERS.replace("nn.ReLU()", "nn.ReLU6()"), encoding="utf-8")
    first, second = (
        build_net(f"{folder}/mynet.py:build", classes=2, channels=1, image_size=8) for folder in (home, other)
    )
    assert [type(net[0][2]).__name__ for net in (first, second)] == ["ReLU", "ReLU6"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mynet.py:Fixed", r"must return logits \[batch, 5\] for 1 x 8x8 images, got \[2, 7\]"),
        ("mynet.py:Pair", r"got a tuple; return one tensor in eval\(\)"),
        ("mynet.py:broken", "failed: RuntimeError: no such luck"),
        ("mynet.py:words", "returns str, not a torch.nn.Module"),
        ("mynet.py:number", "has type int, but must be a function or class"),
        (
            "mynet.py:instance",
            "is an instance of Fixed, a net that is already built; name the class Fixed, or a ",
        ),
        ("mynet.py:nothing", "cannot be loaded: AttributeError"),
        ("gone.py:build", "cannot be loaded: ImportError: .*no such file"),
        ("no.such.package:build", "cannot be loaded: ModuleNotFoundError"),
        ('mynet.py:build{"depth": 3}', "building it with .*depth=3.* failed: TypeError.*`net_options` are"),
    ],
)
def test_what_is_wrong_with_a_net_is_said(home: Path, name: str, message: str) -> None:
    name = f"{home}/{name}" if ".py:" in name else name
    with pytest.raises(ValueError, match=message):
        build_net(name, classes=5, channels=1, image_size=8)


DRAWN = """
import random
import numpy as np
import torch
from torch import nn


class Shuffled(nn.Module):
    def __init__(self, num_classes, how):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)
        if how == "attribute":
            self.order = torch.randperm(64)
        elif how == "list":
            self.order = random.sample(range(64), 64)
        elif how == "numpy":
            self.order = torch.from_numpy(np.random.permutation(64))
        else:
            self.register_buffer("order", torch.randperm(64), persistent=how == "buffer")

    def forward(self, x):
        return self.fc(x.flatten(1)[:, self.order])


kept = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def same():
    return kept


def shared():
    return nn.Sequential(nn.Flatten(), kept[1])


def growing(sizes=[]):
    sizes.append(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, len(sizes)), nn.Linear(len(sizes), 5))
"""


@pytest.mark.parametrize("how", ["attribute", "list", "numpy", "temporary"])
def test_what_is_drawn_when_a_net_is_built_must_be_in_its_state(home: Path, how: str) -> None:
    """Its weights are stored, and loaded into a net that is built again: that one would compute something else."""
    (home / "drawn.py").write_text(DRAWN)
    name = spelled(f"{home}/drawn.py:Shuffled", {"how": how})
    with pytest.raises(
        ValueError, match=r"something that it draws when it is built is not in its state_dict; make it a"
    ):
        build_net(name, classes=5, channels=1, image_size=8)
    build_net(spelled(f"{home}/drawn.py:Shuffled", {"how": "buffer"}), classes=5, channels=1, image_size=8)


CHANGING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, how):
        super().__init__()
        self.fc, self.how, self.calls, self.mean = nn.Linear(64, num_classes), how, 0, torch.zeros(1)
        self.register_buffer("count", torch.zeros(1))
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.norm(x.flatten(1)))
        if self.training:
            self.calls += 1
            self.mean = x.mean().detach().reshape(1) + 1
            self.count += 1
        if self.how == "counter" and self.training:
            x = x / (1 + self.calls)
        if self.how == "tensor":
            x = x + self.mean
        if self.how == "buffer":
            x = x / (1 + self.count)
        return self.fc(x)

    def get_extra_state(self):
        if self.how == "extra":
            return torch.tensor([self.calls])
        return {"calls": self.calls} if self.how == "mapping" else None

    def set_extra_state(self, state):
        pass
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("counter", r"its forward in train\(\) changes something that is not in its state_dict"),
        ("tensor", r"its forward in train\(\) changes something that is not in its state_dict"),
        ("extra", r"its state_dict returns copies \('_extra_state': get_extra_state"),
        ("mapping", "its state '_extra_state' has type dict, but only tensors are stored"),
    ],
)
def test_what_forward_changes_in_training_must_be_in_its_state(home: Path, how: str, message: str) -> None:
    text = CHANGING if how in ("extra", "mapping") else CHANGING[: CHANGING.index("    def get_extra_state")]
    (home / "changing.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        build_net(spelled(f"{home}/changing.py:Net", {"how": how}), classes=5, channels=1, image_size=8)
    (home / "right.py").write_text(CHANGING[: CHANGING.index("    def get_extra_state")])
    build_net(spelled(f"{home}/right.py:Net", {"how": "buffer"}), classes=5, channels=1, image_size=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("same", "returns 2 tensors of the net that it returned before"),
        ("shared", "returns 2 tensors of the net that it returned before"),
        ("growing", "its state fits no other net that its builder returns: .*size mismatch"),
    ],
)
def test_a_builder_makes_a_new_net_of_one_kind_in_every_call(home: Path, name: str, message: str) -> None:
    (home / "drawn.py").write_text(DRAWN)
    with pytest.raises(ValueError, match=message):
        build_net(f"{home}/drawn.py:{name}", classes=5, channels=1, image_size=8)


def test_the_check_draws_nothing_from_the_streams_of_others(home: Path) -> None:
    states = []
    for _ in range(2):  # checked once
        torch.manual_seed(0)
        weight = build_net(f"{home}/mynet.py:build", classes=5, channels=1, image_size=9)[3].weight
        states.append((weight, torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_place_is_looked_at_without_running_it(home: Path) -> None:
    (home / "loud.py").write_text("raise SystemExit\ndef build(): pass\n", encoding="utf-8")
    assert place_fault(f"{home}/loud.py:build") == ""
    assert "did you mean `build`?" in place_fault(f"{home}/mynet.py:buidl")
    assert "no such file" in place_fault(f"{home}/gone.py:build")
    assert "no module 'no.such'" in place_fault("no.such:build")
    (home / "wrong.py").write_text("def (", encoding="utf-8")
    assert "is not Python that this version can parse" in place_fault(f"{home}/wrong.py:build")
    raw = {"teacher": {"net": f"{home}/mynet.py:buidl"}, "student": {"net": "nonet"}}
    found = dict(name_faults(raw))
    assert set(found) == {("teacher", "net"), ("student", "net")}


def test_spellings() -> None:
    text = spelled("resnet20", {"b": 1, "a": [2]})
    assert text == 'resnet20{"a": [2], "b": 1}' and parse_net(text).options == {"a": [2], "b": 1}
    assert net_title('/a/b/mynet.py:build{"w": 2}') == 'mynet.py:build{"w": 2}'
    with pytest.raises(ValueError, match="options after the name must be JSON"):
        parse_net("resnet20{a: 2}")
    with pytest.raises(ValueError, match="invalid options"):
        build_net('resnet8{"depth": 3}', classes=2, channels=1, image_size=8)


def test_a_copy_in_a_run_folder_is_the_net(home: Path, tmp_path: Path) -> None:
    """Its name tells its content, a run that has moved finds it, and the original may be gone."""
    run = tmp_path / "runs" / "one"
    own = f"{home}/mynet.py:build"
    kept = keep_net(own, run)
    digest = code_hash(home / "mynet.py")[:12]
    assert kept == f"{run}/nets/mynet-{digest}/mynet.py:build"
    assert (run / "nets" / f"mynet-{digest}" / "layers.py").read_text(encoding="utf-8") == LAYERS
    assert portable_net(kept) == f"nets/mynet-{digest}/mynet.py:build" and portable_net(own) == own
    assert same_net(own, kept) and not same_net(own, f"{home}/layers.py:block")
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    (home / "mynet.py").unlink()
    found = located_net(portable_net(kept), moved / "teacher" / "weights.safetensors")
    assert build_net(found, classes=3, channels=1, image_size=8)[3].out_features == 3
    assert keep_net(found, tmp_path / "second") == f"{tmp_path}/second/nets/mynet-{digest}/mynet.py:build"


def test_a_changed_file_is_another_net(home: Path, tmp_path: Path) -> None:
    before = code_hash(home / "mynet.py")
    (home / "layers.py").write_text(LAYERS + "# changed\n", encoding="utf-8")
    assert code_hash(home / "mynet.py") != before, "what it imports from beside it counts, too"


def test_paths_of_a_config_begin_at_its_folder(home: Path) -> None:
    raw = {"teacher": {"net": "mynet.py:build"}, "student": {"peers": {"nets": [{"net": "a/b.py:c"}, {"net": None}]}}}
    found = resolved_nets(raw, home)
    assert found["teacher"]["net"] == f"{home}/mynet.py:build"
    assert [peer["net"] for peer in found["student"]["peers"]["nets"]] == [f"{home}/a/b.py:c", None]
    assert resolved_nets({"teacher": {"net": "resnet20"}, "student": 3}, home) == {
        "teacher": {"net": "resnet20"},
        "student": 3,
    }


def test_modules_have_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypackage_of_nets.py").write_text(LAYERS, encoding="utf-8")
    assert len(module_hash("mypackage_of_nets:block") or "") == 64
    assert module_hash("resnet20") is None


def test_names_within_functions_are_not_those_of_a_module(tmp_path: Path) -> None:
    """They would be accepted by a validation, and fail when the net is built."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\nclass Net:\n    def forward(self, x):\n        inner = [one for one in x]\n        return inner\n"
        "if os.sep == '/':\n    build = Net\nelse:\n    def build():\n        pass\n"
        "def make():\n    global made\n    made = 1\n",
        encoding="utf-8",
    )
    assert [place_fault(f"{path}:{name}") for name in ("Net", "build", "make", "os", "made")] == [""] * 5
    for name in ("forward", "inner", "one"):
        assert f"has no `{name}`" in place_fault(f"{path}:{name}")
