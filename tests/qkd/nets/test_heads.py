"""Weights with another number of classes, and torchvision's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from qkd.nets import WeightsError, build_net, load_weights
from qkd.nets import imagenet as imagenet_module
from qkd.nets.imagenet import imagenet_file, weights_file


def net(name: str = "resnet8", classes: int = 4) -> torch.nn.Module:
    return build_net(name, classes=classes, channels=3, image_size=32)


@pytest.mark.parametrize(("name", "head"), [("resnet8", "fc"), ("torchvision/mobilenet_v3_small", "classifier.3"),
                                            ("torchvision/squeezenet1_1", "classifier.1")])  # fmt: skip
@pytest.mark.parametrize("classes", [4, 9])
def test_a_new_head_is_the_only_thing_that_stays_random(tmp_path: Path, name: str, head: str, classes: int) -> None:
    """Also where the file has as many classes: they are others."""
    file = tmp_path / "old.pth"
    old, new = net(name, classes), net(name)
    torch.save({"state_dict": {f"module.{key}": value for key, value in old.state_dict().items()}}, file)
    before = {key: value.clone() for key, value in new.state_dict().items()}
    note = load_weights(new, file, head="new")
    assert f"new head `{head}`" in note and "without `module.`" in note
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(f"{head}.") else old.state_dict()[key]), key


def test_without_it_the_way_is_said(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    torch.save(net(classes=9).state_dict(), file)
    with pytest.raises(
        WeightsError, match="head `fc` of the file has 9 classes, but this net has 4; set `head: new` next to"
    ):
        load_weights(net(), file)


def test_a_head_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    state = {**net(classes=9).state_dict(), "conv1.weight": torch.zeros(16, 1, 3, 3)}
    torch.save(state, file)
    with pytest.raises(WeightsError, match=r"assumed to be `fc`, but conv1.weight .* differ, too; name the layer"):
        load_weights(net(), file, head="new")
    with pytest.raises(WeightsError, match="no layer 'head'"):
        load_weights(net(), file, head="new:head")


def test_torchvision_weights_come_from_the_cache_with_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = build_net("torchvision/googlenet", classes=1000, channels=3, image_size=64)
    state = {**source.state_dict(), "aux1.fc2.weight": torch.zeros(1000, 1024)}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(
        imagenet_module, "_weights_of", lambda name: type("W", (), {"url": f"https://x.org/g-{digest}.pth"})
    )
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, dst, **_: file.rename(dst))
    found = imagenet_file("torchvision/googlenet")
    assert found == tmp_path / "checkpoints" / f"g-{digest}.pth"
    target = build_net("torchvision/googlenet", classes=5, channels=3, image_size=64)
    note = load_weights(target, weights_file(Path("imagenet"), "torchvision/googlenet"), head="new")
    assert "without its auxiliary heads" in note and "1000 classes in the file" in note
    found.write_bytes(b"x")
    with pytest.raises(WeightsError, match=f"damaged: its SHA-256 does not start with {digest}"):
        imagenet_file("torchvision/googlenet")


def test_without_a_network_the_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError, match=r"cannot download .*resnet18-\w+.pth .*put that file into .*checkpoints"):
        imagenet_file("torchvision/resnet18")
    with pytest.raises(WeightsError, match="torchvision only has weights for its own nets, but the net is 'resnet20'"):
        imagenet_file("resnet20")
