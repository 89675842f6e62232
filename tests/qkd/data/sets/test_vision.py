"""Torchvision's sets: read from files of the real formats, and a clear way out where there is no network."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision

from qkd.config import DataConfig
from qkd.data import DataError, MemorySplit, load_splits
from qkd.data.sets.vision import VISION_SETS

RNG = np.random.default_rng(0)


def config(name: str, root: Path, **settings: object) -> DataConfig:
    return DataConfig(name=name, root=root, val_fraction=0.0, **settings)  # type: ignore[arg-type]


def write_idx(path: Path, array: np.ndarray) -> None:  # type: ignore[type-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read(name: str, folder: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", labels[:count])
    splits = load_splits(config(name, tmp_path, download=False), seed=0)
    assert isinstance(splits.train, MemorySplit)
    assert np.array_equal(splits.train.images[:, 0].numpy(), images)
    assert splits.train.labels.tolist() == labels.tolist()
    assert (len(splits.test), splits.image_size, splits.channels, len(splits.classes)) == (10, 28, 1, 10)


def test_a_truncated_idx_file_is_told(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((20, 28, 28), np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.zeros(20, np.uint8))
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="delete damaged files there"):
        load_splits(config("mnist", tmp_path, download=False), seed=0)


def test_cifar_files_are_read_and_damaged_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = RNG.integers(0, 256, (60, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(60)]
    contents = {f"data_batch_{n + 1}": (pixels[n * 10 : n * 10 + 10], labels[n * 10 : n * 10 + 10]) for n in range(5)}
    contents["test_batch"] = (pixels[50:], labels[50:])
    sums = {}
    for name, (data, numbers) in contents.items():
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": numbers}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{n}" for n in range(10)]}))
    for path in base.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    # The real files' sums are built in; these are of the same format with their own sums.
    monkeypatch.setattr(kind, "train_list", [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    splits = load_splits(config("cifar10", tmp_path, download=False), seed=0)
    assert isinstance(splits.train, MemorySplit)
    assert np.array_equal(splits.train.images.numpy(), pixels[:50].reshape(-1, 3, 32, 32))
    assert splits.train.labels.tolist() == labels[:50]
    assert splits.classes == tuple(f"c{n}" for n in range(10))

    (base / "data_batch_3").write_bytes(
        pickle.dumps({"data": pixels, "labels": labels})
    )  # opened only if its sum is right
    with pytest.raises(DataError, match="cifar-10-python.tar.gz"):
        load_splits(config("cifar10", tmp_path, download=False), seed=0)


def test_svhn_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = (np.arange(20) % 10 + 1).reshape(20, 1)  # the files call zero 10
    lists = {}
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels})
        lists[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    splits = load_splits(config("svhn", tmp_path, download=False), seed=0)
    assert isinstance(splits.train, MemorySplit)
    assert np.array_equal(splits.train.images.numpy(), pixels.transpose(3, 2, 0, 1))
    assert splits.train.labels.tolist() == [index % 10 + 1 if index % 10 != 9 else 0 for index in range(20)]
    assert splits.classes == tuple("0123456789")


@pytest.mark.parametrize("name", sorted(VISION_SETS))
def test_missing_files_are_named_with_their_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_splits(config(name, tmp_path, download=False), seed=0)
    text = str(caught.value)
    for file in VISION_SETS[name].files:
        assert file in text
    assert str(tmp_path) in text and "data.download is false" in text


@pytest.mark.parametrize("name", sorted(VISION_SETS))
def test_no_network_is_told_with_the_way_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match="could not be read or downloaded.*Without a network, put ") as caught:
        load_splits(config(name, tmp_path), seed=0)
    assert str(tmp_path) in str(caught.value)


def test_files_that_were_put_there_are_unpacked_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    sums = []
    for part, count in (("train", 20), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            plain = raw / f"{part}-{kind}-ubyte"
            write_idx(plain, array)
            packed = plain.with_name(plain.name + ".gz")
            packed.write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
            sums.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    splits = load_splits(config("mnist", tmp_path), seed=0)
    assert (len(splits.train), len(splits.test)) == (20, 10)
