"""Folders as people have them: with and without test and val, flat; images of any size brought to one by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import DataError, DataFacts, Splits, changes, load_splits, read_facts
from qkd.data.sets import Fit
from qkd.data.sets.images import decode
from qkd.data.sets.layout import layout_of
from qkd.predicting import predict as program


def paint(path: Path, size: tuple[int, int] = (8, 8), level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(level).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def fill(folder: Path, count: int, first: int = 0) -> None:
    for name in ("ant", "bee"):
        for index in range(first, first + count):
            paint(folder / name / f"{index}.png", level=index)


def load(folder: Path, seed: int = 0, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="folder", path=folder, **settings), seed=seed)


def names(split: Any) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in split.files}


def test_class_folders_alone_are_divided_by_a_stated_share_and_seed(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    splits = load(tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [14, 2, 4]
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    assert splits.held_out == (
        "14 training images; held out: 2 for validation (0.1 of 16 images), 4 for the test (0.2 of each "
        "class by data.split_seed 0, since there is no test/)"
    )
    assert names(splits.test) == names(load(tmp_path, seed=5).test), "the run's seed does not choose the test images"
    assert names(splits.test) != names(load(tmp_path, split_seed=1).test)
    assert len(load(tmp_path, test_fraction=0.5).test) == 10
    config = DataConfig(name="folder", path=tmp_path)
    assert read_facts(config) == splits.facts
    assert read_facts(config.model_copy(update={"split_seed": 1})) != splits.facts


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_part_is_used_as_what_it_is(tmp_path: Path, name: str) -> None:
    """Beside a test it is what is chosen by; without one it is what is scored in the end."""
    fill(tmp_path / "train", 6)
    fill(tmp_path / name, 2, first=50)
    scored = load(tmp_path, val_fraction=0.25)
    assert names(scored.test) == {"ant/50.png", "ant/51.png", "bee/50.png", "bee/51.png"}
    assert f"4 for the test ({name}/)" in scored.held_out and len(scored.val) == 3
    fill(tmp_path / "test", 3, first=90)
    splits = load(tmp_path, val_fraction=0.25)
    assert (len(splits.train), len(splits.test)) == (12, 6)
    assert names(splits.val) == names(scored.test), "its own part, whatever val_fraction says"
    assert "4 for validation (its own part), 6 for the test (test/)" in splits.held_out


def test_a_training_part_alone_is_divided(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    splits = load(tmp_path)
    assert len(splits.test) == 2 and "since there is no test/" in splits.held_out


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(DataError, match=r"0.2 of its 2 images would leave none .*raise data.test_fraction"):
        load(tmp_path)
    with pytest.raises(DataError, match="classes \\['cat'\\] are not in"):
        fill(tmp_path / "set" / "train", 3)
        paint(tmp_path / "set" / "val" / "cat" / "0.png")
        load(tmp_path / "set")


def picture(width: int, height: int) -> Image.Image:
    columns = np.tile(np.arange(width, dtype=np.uint8), (height, 1))
    return Image.fromarray(columns)


@pytest.mark.parametrize(
    ("name", "size", "wanted", "resized"),
    [
        ("crop", (40, 20), (10, 10), (20, 10)),
        ("crop", (40, 20), (10, 20), (40, 20)),
        ("crop", (20, 40), (12, 8), (12, 24)),
        ("crop:16", (40, 20), (10, 10), (32, 16)),
        ("stretch", (40, 20), (10, 10), (10, 10)),
        ("pad", (40, 20), (10, 10), (10, 5)),
        ("pad:bicubic", (20, 40), (10, 20), (10, 20)),
    ],
)
def test_rules_of_resizing(name: str, size: tuple[int, int], wanted: tuple[int, int], resized: tuple[int, int]) -> None:
    """Sizes are width and height; whatever the rule, the image has the wanted size in the end."""
    fit = Fit.named(name)
    assert fit.name == name
    assert fit.resized(size, wanted) == resized
    assert fit(picture(*size), wanted).size == wanted


def test_what_is_cut_and_what_is_added_is_even() -> None:
    cut = np.array(Fit("crop")(picture(20, 10), (10, 10)))
    assert cut[0].tolist() == list(range(5, 15)), "the center, not resized"
    padded = np.array(Fit("pad")(picture(4, 2), (4, 4)))
    assert padded[0].tolist() == padded[3].tolist() == [0] * 4 and padded[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="must be crop, stretch or pad"):
        Fit.named("zoom")


def test_sizes_rules_and_channels_of_a_config(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    splits = load(tmp_path, image_size=(6, 4), resize="stretch", channels=3)
    assert (splits.image_shape, splits.resize, len(splits.mean)) == ((3, 6, 4), "stretch", 3)
    assert load(tmp_path, image_size=8).resize == "crop"
    assert load_splits(DataConfig(name="digits", channels=3), seed=0).image_shape == (3, 8, 8)


def test_mean_and_std_are_the_ones_given(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    splits = load(tmp_path, mean=(0.25,), std=(0.5,))
    assert (splits.mean, splits.std) == ((0.25,), (0.5,))
    with pytest.raises(DataError, match=r"data.mean: has 3 values, but the images have 1 channels; .*channels: 3"):
        load(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="must be given together"):
        DataConfig(name="digits", mean=(0.5,))


def test_preprocess_is_that_of_the_weights(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    splits = load(tmp_path, preprocess="torchvision/resnet18", image_size=32)
    assert (splits.mean, splits.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (splits.image_shape, splits.resize) == ((3, 32, 32), "crop:37")  # 32 * 256 / 224
    whole = load(tmp_path, preprocess="torchvision/efficientnet_b0")
    assert (whole.image_size, whole.resize) == (224, "crop:256:bicubic")
    half = load(tmp_path, preprocess="torchvision/inception_v3", image_size=16)
    assert half.mean == half.std == (0.5, 0.5, 0.5), "its own scale, which torchvision puts into the net"


@pytest.mark.parametrize(
    ("names", "odd", "part"),
    [
        (("Train", "Test"), "Test", "test"),
        (("training", "testing"), "testing", "test"),
        (("train", "testing"), "testing", "test"),
        (("train", "dev"), "dev", "val"),
        (("train", "val", "valid", "test"), "valid", "val"),
        (("train", "TEST"), "TEST", "test"),
        (("training_set", "test_set"), "test_set", "test"),
        (("seg_train", "seg_test", "seg_pred"), "seg_test", "test"),
        (("TrainImages", "valImages"), "TrainImages", "train"),
        (("train2017", "val2017"), "train2017", "train"),
        (("Train", "test"), "Train", "train"),
        (("train-set", "valid"), "train-set", "train"),
    ],
)
def test_folders_that_are_named_almost_like_parts_are_refused(
    tmp_path: Path, names: tuple[str, ...], odd: str, part: str
) -> None:
    """They would be classes, so that test images are trained on, or be ignored without a word."""
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{odd}: is named like a part of the set.*rename it to {part}"):
        layout_of(tmp_path, lambda name: name.startswith("."))


@pytest.mark.parametrize("names", [
    ("running", "training", "walking"), ("dev", "ops"), ("test", "exam"), ("train_freight", "train_local"),
    ("test_tube", "training_shoe", "vase"), ("constrained", "contested"), ("train_station", "test_tube"),
    ("pre-train", "pre-test"),
])  # fmt: skip
def test_classes_may_have_such_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    assert layout_of(tmp_path, lambda name: name.startswith(".")).train == tmp_path


@pytest.mark.parametrize(
    "size", [(224, 224), (223, 223), (300, 301), (640, 427), (1000, 251), (256, 256), (375, 500), (90, 61)]
)
@pytest.mark.parametrize("rule", ["crop:256", "crop:232", "crop:224", "crop:256:bicubic"])
def test_a_stated_shorter_side_is_torchvisions_transform(tmp_path: Path, size: tuple[int, int], rule: str) -> None:
    """Bit for bit, whatever the size of the file; and the program beside exported files does the same."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    fit = Fit.named(rule)
    how = InterpolationMode.BICUBIC if "bicubic" in rule else InterpolationMode.BILINEAR
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    image.save(tmp_path / "a.png")
    wanted = np.asarray(Compose([Resize(fit.resize_size, how), CenterCrop(224)])(image))
    found = decode(tmp_path / "a.png", channels=3, image_size=224, fit=fit).permute(1, 2, 0).numpy()
    facts = {"input_mean": [0.5] * 3, "input_std": [0.5] * 3, "input_size": [224, 224], "resize": rule}
    assert np.array_equal(found, program.read_image(str(tmp_path / "a.png"), facts)[0])
    assert found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= 1
    assert (found == wanted).mean() > 0.98, "Pillow may take rows first, which rounds a value apart here and there"


def test_a_shorter_side_without_effect_is_noted(tmp_path: Path) -> None:
    """Configs of older runs may have one; new ones are refused (tests of conflicts)."""
    fill(tmp_path, 5)

    def noted(**settings: Any) -> list[str]:
        return [note for note in load(tmp_path, **settings).notes if note.startswith("data.")]

    assert noted(image_size=6, resize_size=7) == noted(image_size=6) == []
    below = "data.resize_size: not used, because it is below the size of the images, 6"
    assert noted(image_size=6, resize_size=5) == [below]
    assert noted(preprocess="torchvision/resnet18", resize_size=9, interpolation="bicubic") == [
        "data.interpolation: not used, because `preprocess` sets it to bilinear",
        "data.resize_size: not used, because `preprocess` sets it to 256",
    ]


def test_images_that_move_to_the_validation_part_are_noticed(tmp_path: Path) -> None:
    """At the end of the last class, files and their order stay the same: only where the part begins differs."""
    for part in ("train", "val", "test"):
        fill(tmp_path / part, 3, first={"train": 0, "val": 5, "test": 9}[part])
    config = DataConfig(name="folder", path=tmp_path)
    then = read_facts(config)
    (tmp_path / "train" / "bee" / "2.png").rename(tmp_path / "val" / "ant" / "0.png")
    assert changes(then, read_facts(config))
    (tmp_path / "val" / "ant" / "0.png").rename(tmp_path / "train" / "bee" / "2.png")
    assert changes(then, read_facts(config)) == []
    moved = replace(then, validation=7)
    assert changes(then, moved) == ["number of validation images (6 then, 7 now)"]
    plain = json.loads(json.dumps(then.to_json()))
    assert DataFacts.from_json(plain) == then
    before = DataFacts.from_json({key: value for key, value in plain.items() if key != "validation"})
    assert changes(before, moved) == [], "a record of before says nothing about it"
    with pytest.raises(ValueError, match="number of images"):
        DataFacts.from_json({**plain, "validation": -1})
