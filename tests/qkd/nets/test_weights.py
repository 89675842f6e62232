"""Weights from and to files: round trips, and a refusal that tells what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qkd.nets import WeightsError, build_net, load_weights, save_weights


def net(name: str = "resnet8", classes: int = 10, channels: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_net(name, classes=classes, channels=channels, image_size=8)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def refusal(target: nn.Module, path: Path) -> str:
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(target, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())  # all or none
    return str(caught.value)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2)
    source(torch.randn(4, 1, 8, 8))  # batch-norm statistics and counts move
    assert not same(source, target)
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_torch_file_of_tensors_is_read(tmp_path: Path, wrapper: str | None) -> None:
    source, target = net(seed=1), net(seed=2)
    state = source.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(source, target)


def test_a_torchvision_net_takes_torchvision_files(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    source = squeezenet1_1(weights=None, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    target = build_net("torchvision/squeezenet1_1", classes=10, channels=3, image_size=64)
    load_weights(target, tmp_path / "w.pth")
    assert same(source, target)


def test_counters_that_old_files_lack_are_forgiven(tmp_path: Path) -> None:
    state = {key: value for key, value in net(seed=1).state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "w.pth")
    target = net(seed=2)
    load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(("name", "head"), [("resnet8", "fc"), ("lenet5", "fc2"), ("torchvision/resnet18", "fc")])
def test_a_head_of_another_class_count_is_named_as_such(tmp_path: Path, name: str, head: str) -> None:
    save_weights(net(name, classes=100), tmp_path / "w.safetensors")
    text = refusal(net(name, classes=10), tmp_path / "w.safetensors")
    assert f"the head `{head}` of the file has 100 classes, this net has 10" in text
    assert "missing" not in text


def test_missing_unexpected_and_ill_shaped_keys_are_listed(tmp_path: Path) -> None:
    save_weights(net("resnet20", channels=3), tmp_path / "w.safetensors")
    text = refusal(net("resnet8"), tmp_path / "w.safetensors")
    assert "unexpected in the file (" in text and "layer1.1.bn1.bias" in text
    assert "of another shape (1): conv1.weight [16, 3, 3, 3] instead of [16, 1, 3, 3]" in text
    save_weights(net("resnet8"), tmp_path / "w.safetensors")
    text = refusal(net("resnet20"), tmp_path / "w.safetensors")
    assert "missing in the file (" in text and "more" in text and "head" not in text


class Pickled:
    """An object that a pickle would run code for."""


def test_a_pickled_object_is_refused(tmp_path: Path) -> None:
    torch.save(Pickled(), tmp_path / "object.pth")
    assert "holds pickled objects" in refusal(net(), tmp_path / "object.pth")
    torch.save(net(), tmp_path / "module.pth")  # a whole module, as many programs save it
    assert "holds pickled objects" in refusal(net(), tmp_path / "module.pth")
    torch.save(net().state_dict(), tmp_path / "renamed.safetensors")
    assert "pickle" in refusal(net(), tmp_path / "renamed.safetensors")


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    assert "needs a mapping of names to tensors" in refusal(net(), tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    assert "needs a mapping of names to tensors" in refusal(net(), tmp_path / "dict.pth")
    (tmp_path / "w.onnx").write_bytes(b"")
    assert "is no weights file" in refusal(net(), tmp_path / "w.onnx")
    assert "no such weights file" in refusal(net(), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(net().state_dict(), path)
    else:
        save_weights(net(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refusal(net(), path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = net(seed=1)
    with torch.no_grad():
        source.get_parameter("fc.bias")[2] = float("nan")
    save_weights(source, tmp_path / "w.safetensors")
    assert "NaN or infinite values in fc.bias" in refusal(net(), tmp_path / "w.safetensors")
