"""Weights from and to files: round trips, and a refusal that tells what does not fit."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qkd.nets import WeightsError, build_net, load_weights, save_weights
from qkd.nets.checkpoints import AVERAGES, WRAPPERS


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


@pytest.mark.parametrize("wrapper", [None, *WRAPPERS, *AVERAGES])
def test_a_torch_file_of_tensors_is_read(tmp_path: Path, wrapper: str | None) -> None:
    source, target = net(seed=1), net(seed=2)
    state = source.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    note = load_weights(target, tmp_path / "w.pth")
    assert same(source, target)
    assert note == (f"taken from `{wrapper}`" if wrapper else "")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "a.b.student."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_prefixes_are_stripped_where_all_names_then_fit(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    source, target = net(seed=1), net(seed=2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({wrapper: state, "hyper_parameters": {"lr": 0.1}} if wrapper else state, tmp_path / "w.ckpt")
    note = load_weights(target, tmp_path / "w.ckpt")
    assert same(source, target)
    assert "without" in note and (wrapper is None or f"taken from `{wrapper}`" in note)
    assert prefix.rpartition(".")[0].rpartition(".")[2] in note


def test_parts_inside_names_are_taken_out_too(tmp_path: Path) -> None:
    """`net.features = DataParallel(net.features)`, and `net.layer1 = torch.compile(net.layer1)`."""
    source, target = net(seed=1), net(seed=2)
    state = {name.replace("layer1.", "layer1.module.").replace("layer2.", "layer2._orig_mod."): value
             for name, value in source.state_dict().items()}  # fmt: skip
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth") == "without `_orig_mod.` and `module.` in the names"
    assert same(source, target)


def test_weights_come_before_their_average_and_both_are_told(tmp_path: Path) -> None:
    source, average, target = net(seed=1), net(seed=3), net(seed=2)
    averaged = {"n_averaged": torch.tensor(7)}
    averaged |= {f"module.{name}": value for name, value in average.state_dict().items()}
    torch.save({"model_ema": averaged, "model": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth") == "taken from `model`; also there: `model_ema`"
    assert same(source, target)
    torch.save({"model_ema": averaged, "epoch": 3}, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth") == "taken from `model_ema`, without `module.` in the names"
    assert same(average, target)


def test_the_state_dict_that_fits_is_taken(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2)
    content = {"model": net("resnet20").state_dict(), "ema": {"decay": 0.9, "module": source.state_dict()}}
    torch.save(content, tmp_path / "w.pth")
    assert "taken from `ema.module`" in load_weights(target, tmp_path / "w.pth")
    assert same(source, target)


@pytest.mark.parametrize("name", ["w.pth.tar", "w.bin", "w.ckpt", "w", "w.safetensors", "w.onnx", "model.tar.gz"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch"])
def test_content_decides_not_the_suffix(tmp_path: Path, name: str, kind: str) -> None:
    source, target = net(seed=1), net(seed=2)
    if kind == "safetensors":
        save_weights(source, tmp_path / name)
    else:
        torch.save(source.state_dict(), tmp_path / name, _use_new_zipfile_serialization=kind == "torch")
    assert load_weights(target, tmp_path / name) == ""
    assert same(source, target)


def test_a_prefix_that_does_not_make_all_names_fit_is_not_stripped(tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in net().state_dict().items()}
    torch.save({**state, "criterion.weight": torch.ones(10)}, tmp_path / "w.pth")
    text = refusal(net(), tmp_path / "w.pth")
    assert "names in the file (" in text and "model.conv1.weight" in text
    torch.save({"state_dict": {f"module.{k}": v for k, v in net("resnet20").state_dict().items()}}, tmp_path / "w.pth")
    text = refusal(net(), tmp_path / "w.pth")
    assert "(taken from `state_dict`, without `module.` in the names) are not for this net" in text
    assert "unexpected in the file (" in text and "missing" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "it looks like an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "it looks like a web page"),
        (b"\x08\x07\x12\x07pytorch", "its kind is unknown"),
    ],
)
def test_other_kinds_of_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    text = refusal(net(), tmp_path / "w.pth")
    assert message in text and "needs safetensors or torch.save format" in text


def test_the_class_of_a_refused_object_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    text = refusal(net(), tmp_path / "w.pth")
    assert "holds pickled objects (of argparse.Namespace)" in text and "weights_only=False" in text


def test_what_the_refusal_says_works(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2)
    torch.save({"state_dict": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "OLD.pth")
    program = refusal(net(), tmp_path / "OLD.pth").split('-c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", program, "OLD.pth", "NEW.pth"], cwd=tmp_path, check=True)
    load_weights(target, tmp_path / "NEW.pth")
    assert same(source, target)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/constants.pkl", b"\x80\x02).")
    assert "w.pth: " in refusal(net(), tmp_path / "w.pth")


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
    assert f"the head `{head}` of the file has 100 classes, but this net has 10" in text
    assert "missing" not in text


def test_missing_unexpected_and_ill_shaped_keys_are_listed(tmp_path: Path) -> None:
    save_weights(net("resnet20", channels=3), tmp_path / "w.safetensors")
    text = refusal(net("resnet8"), tmp_path / "w.safetensors")
    assert "unexpected in the file (" in text and "layer1.1.bn1.bias" in text
    assert "wrong shape (1): conv1.weight [16, 3, 3, 3] instead of [16, 1, 3, 3]" in text
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
    torch.save(net(), tmp_path / "renamed.safetensors")
    text = refusal(net(), tmp_path / "renamed.safetensors")
    assert "holds pickled objects" in text and "weights_only=False" in text and "OLD.pth NEW.pth" in text


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    assert "needs a mapping of names to tensors" in refusal(net(), tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    assert "needs a mapping of names to tensors" in refusal(net(), tmp_path / "dict.pth")
    (tmp_path / "w.onnx").write_bytes(b"")
    assert "is not a readable weights file" in refusal(net(), tmp_path / "w.onnx")
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


def test_an_average_that_counts_beside_its_weights_is_read(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2)
    torch.save({"ema": {"n_averaged": torch.tensor(3), **source.state_dict()}}, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth") == "taken from `ema`"
    assert same(source, target)


@pytest.mark.parametrize("kind", ["torch", "old torch", "safetensors"])
def test_altered_files_are_worded(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "w.bin", nn.Linear(3, 2)
    if kind == "safetensors":
        save_weights(nn.Linear(3, 2), path)
    else:
        torch.save({"model": nn.Linear(3, 2).state_dict()}, path, _use_new_zipfile_serialization=kind == "torch")
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 400) if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_weights(target, path)
        except WeightsError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, suffix: str) -> None:
    """Opening a named pipe that nobody writes to would block for ever."""
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    text = refusal(net(), path)
    assert f"{path}: is a named pipe, not a file" in text and text.count(str(path)) == 1
    (tmp_path / "link").symlink_to(path)
    assert "link: is a named pipe" in refusal(net(), tmp_path / "link")
    assert "is a device, not a file" in refusal(net(), Path("/dev/zero"))
    assert "is a folder" in refusal(net(), tmp_path)
    assert "no such weights file" in refusal(net(), tmp_path / "a" / "b.pth")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda value: value.to("meta"), "meta"),
        (lambda value: value.to_sparse(), "sparse"),
        (lambda value: value.to(torch.complex64), "complex64"),
        (lambda value: value.to(torch.int64), "int64"),
        (lambda value: value.to(torch.bool), "bool"),
        pytest.param(
            lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            "quantized",
            marks=pytest.mark.filterwarnings("ignore"),
        ),
    ],
)
def test_tensors_that_a_float_net_cannot_take_as_they_are_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], kind: str
) -> None:
    state = net().state_dict()
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "w.pth")
    assert f"fc.weight ({kind}" in refusal(net(seed=2), tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_weights_of_other_widths_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    source, target = net(seed=1), net(seed=2)
    state = source.state_dict()
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.state_dict()["fc.weight"], state["fc.weight"].to(dtype).float())
