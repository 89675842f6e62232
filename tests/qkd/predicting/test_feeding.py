"""A run's files can be fed by what they say of themselves, and so they are by `qkd predict` and `qkd val`."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image

import qkd.predicting.predict as program
from export.storage.preprocessing import KEYS, write_properties
from qkd.cli import main
from qkd.failures import UsageError
from qkd.files import read_json
from qkd.predicting.predict import InputError, Model
from qkd.predicting.scoring import _labels_of
from qkd.run.folder import RunFolder
from qkd.testing import run_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run that is exported with preprocessing inside, too, and packed."""
    config = tiny_config(data, {"export.preprocess": "inside", "export.pack": "packed", "student.quant.weight_bits": 2})
    made = run_tiny(config, tmp_path_factory.mktemp("runs"), "teacher", "search", "distill", "export")
    made.close()
    return made


PAGE = Path(__file__).resolve().parents[3] / "docs" / "feeding.md"


def snippet() -> str:
    """Return the page's program."""
    return PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("name", ["student", "student.uint8"])
def test_fifteen_lines_that_read_only_the_metadata_get_the_toolkits_accuracy(
    run: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    test = np.load(data / "test.npz")
    labels = test["labels"]
    np.save(tmp_path / "pixels.npy", test["images"][..., None])
    shutil.copy(run.path / "export" / f"{name}.onnx", tmp_path / "student.onnx")
    assert len([line for line in snippet().splitlines() if line and not line.startswith("import")]) <= 15
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(snippet(), found)  # noqa: S102 - a page of ours
    accuracy = read_json(run.path / "student" / "result.json")["test_accuracy"]
    assert int((found["logits"].argmax(1) == labels).sum()) == round(accuracy * len(labels))
    classes = (run.path / "export" / "labels.txt").read_text().splitlines()
    assert found["names"] == [classes[label] for label in found["logits"].argmax(1)]
    parity = read_json(run.path / "export" / f"{name.replace('student', 'parity')}.json")
    assert parity["passed"] and parity["off"]["differing"] == 0 and parity["images"] == len(labels)


def test_the_page_names_every_key() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [key for key in (*KEYS, "needs", "versions", "output") if f"`{key}`" not in text] == []


def test_every_file_of_the_run_says_it(run: RunFolder) -> None:
    folder = run.path / "export"
    facts = read_json(folder / "export.json")
    assert sorted(facts) == ["student", "student.uint8", "teacher"]
    for name, entry in facts.items():
        said = {one.key: one.value for one in onnx.load(folder / entry["path"]).metadata_props}
        assert set(KEYS) | {"needs", "versions", "output"} <= set(said), name
        assert json.loads(said["needs"]) == entry["needs"]
    assert facts["student"]["needs"] == "onnxruntime >= 1.24"
    assert facts["student.uint8"]["layers"] and facts["student.uint8"]["fall_backs"] == facts["student"]["fall_backs"]
    assert [one["kernel"] for one in facts["student.uint8"]["layers"]] == [
        one["kernel"] for one in facts["student"]["layers"]
    ]


def test_what_is_beside_the_files_needs_no_toolkit(run: RunFolder, data: Path, tmp_path: Path) -> None:
    folder = run.path / "export"
    classes = (folder / "labels.txt").read_text().splitlines()
    assert classes == json.loads((folder / "preprocess.json").read_text())["classes"] and len(classes) == 4
    tree = ast.parse((folder / "predict.py").read_text())
    used = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert used - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "PIL"}
    test = np.load(data / "test.npz")
    np.save(tmp_path / "batch.npy", test["images"])
    call = [sys.executable, "-I", "predict.py", str(tmp_path / "batch.npy"), "--json", "--top", "1"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    found = [entry["predictions"][0]["label"] for entry in json.loads(done.stdout)]
    model = Model(str(folder / "student.onnx"))
    assert found == model.scores(test["images"][..., None]).argmax(1).tolist()


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["predict", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["images"]


def test_predict_names_classes_of_images(
    run: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.load(data / "test.npz")["images"][0]
    Image.fromarray(image).save(tmp_path / "one.png")
    Image.fromarray(np.repeat(image[..., None], 3, 2)).save(tmp_path / "color.png")
    np.save(tmp_path / "one.npy", image)
    found = [predicted(capsys, str(run.path), str(tmp_path / name))[0] for name in ("one.png", "color.png", "one.npy")]
    assert found[0]["predictions"] == found[1]["predictions"] == found[2]["predictions"]
    chances = [one["probability"] for one in found[0]["predictions"]]
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)
    inside = predicted(capsys, str(run.path / "export" / "student.uint8.onnx"), str(tmp_path / "one.png"))[0]
    assert inside["predictions"] == found[0]["predictions"]
    assert (
        main(["predict", run.path.name, str(tmp_path / "one.png"), "--top", "2", "--runs-dir", str(run.path.parent)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "one.png") and len(lines) == 3 and " %  " in lines[1]


@pytest.mark.parametrize("rule", ["crop", "crop:11", "crop:12:bicubic", "stretch", "stretch:bicubic", "pad", "none"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (40, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_another_size_is_resized_as_in_training(
    tmp_path: Path, rule: str, size: tuple[int, int], channels: int
) -> None:
    from qkd.data.sets.fitting import Fit
    from qkd.data.sets.images import decode

    facts = {"input_mean": [0.5] * channels, "input_std": [0.5] * channels, "input_size": list(size), "resize": rule}
    for number, shape in enumerate([(37, 23), (23, 37), (8, 8), (200, 3)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 3), np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        fit = Fit.named("crop" if rule == "none" else rule)
        ours, theirs = (
            program.read_image(str(path), facts)[0],
            decode(path, channels=channels, image_size=size, fit=fit),
        )
        assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy()), shape


@pytest.mark.parametrize("rule", ["zoom", "crop:x", "pad:12", "stretch:bicubic:bicubic:7", ""])
def test_a_resize_rule_that_is_not_known_is_named(tmp_path: Path, rule: str) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    facts = {"input_mean": [0.5], "input_std": [0.5], "input_size": [8, 8], "resize": rule}
    with pytest.raises(InputError, match="resize rule .* is unknown to this version"):
        program.read_image(str(tmp_path / "a.png"), facts)


def test_a_folder_means_the_images_in_it(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "below.png").mkdir(parents=True)
    assert main(["predict", str(run.path), str(folder)]) == 2
    assert "photos: the folder has no image files directly in it (.bmp," in capsys.readouterr().err
    for name in ("b.PNG", "a.png", ".hidden.png", "notes.txt"):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / name, format="PNG")
    assert main(["predict", str(run.path), str(folder), "--json"]) == 0
    images = [entry["image"] for entry in json.loads(capsys.readouterr().out)["images"]]
    assert images == [str(folder / "a.png"), str(folder / "b.PNG")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.png", None, "no such file"),
        ("text.png", b"no image", "cannot be read as an image"),
        ("object.npy", b"\x93NUMPY nonsense", "not a NumPy array"),
    ],
)
def test_what_is_no_image_is_named(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["predict", str(run.path), str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


def test_color_arrays_are_gray_to_a_gray_model_as_color_files_are() -> None:
    facts = {"input_mean": [0.5], "input_std": [0.5], "input_size": [8, 8], "resize": "pad"}
    for size in ((8, 8), (12, 9)):
        images = np.random.default_rng(0).integers(0, 256, (40, *size, 3), dtype=np.uint8)
        found = program.from_array(images, facts)
        wanted = [program.fit_image(Image.fromarray(image), facts, "") for image in images]
        assert np.array_equal(found, np.stack(wanted))


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8), np.float32), np.zeros((2, 8, 8, 4), np.uint8), np.zeros(8, np.uint8)]
)
def test_arrays_of_another_kind_are_refused(run: RunFolder, array: np.ndarray) -> None:
    with pytest.raises(InputError, match="found"):
        program.from_array(array, Model(str(run.path / "export" / "student.onnx")).facts)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 40, 30), (8, 8, 4), (8, 8, 2)])
def test_arrays_that_may_be_one_image_or_several_are_refused(shape: tuple[int, ...]) -> None:
    """PyTorch's order would be three gray images, and transparency a stack of stripes."""
    facts = {"input_mean": [0.5] * 3, "input_std": [0.5] * 3, "input_size": [8, 8], "resize": "crop"}
    with pytest.raises(InputError, match="one image or several gray ones; give four axes"):
        program.from_array(np.zeros(shape, np.uint8), facts)
    one = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    assert np.array_equal(program.from_array(one[None], facts), program.from_array(one, facts)), "gray in any case"
    batch = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 3), np.uint8)
    turned = program.from_array(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)), facts)
    assert np.array_equal(turned, program.from_array(batch, facts)), "four axes leave no doubt, in any size"


@pytest.mark.parametrize("kind", ["png", "pgm", "tiff", "lab"])
def test_more_than_eight_bits_are_refused_as_in_training(run: RunFolder, tmp_path: Path, kind: str) -> None:
    """Pillow clips 16 bits to white, and the class of a white image would be the answer."""
    from qkd.data import DataError
    from qkd.data.sets import images as training

    pixels = np.random.default_rng(0).integers(0, 65536, (9, 9)).astype(np.uint16)
    path = tmp_path / f"a.{'tiff' if kind == 'lab' else kind}"
    if kind == "lab":
        Image.fromarray(np.zeros((9, 9, 3), np.uint8), mode="LAB").save(path)
    else:
        Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match="not 8 bits per channel; convert it"):
        program.read_image(str(path), Model(str(run.path / "export" / "student.onnx")).facts)
    with pytest.raises(DataError, match="not 8 bits per channel; convert it"):
        training.read_header(path)
    assert set(program.MODES) == training._GRAY_MODES | training._COLOR_MODES


def test_an_image_that_cannot_be_read_costs_no_other(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "c"):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert main(["predict", str(run.path), str(tmp_path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [Path(entry["image"]).name for entry in found["images"]] == ["a.png", "c.png"]
    assert len(found["unread"]) == 1 and "b.png: cannot be read as an image" in found["unread"][0]
    assert main(["predict", str(run.path), str(tmp_path)]) == 2
    assert "not read: " in capsys.readouterr().out
    words = [str(tmp_path), "--model", str(run.path / "export" / "student.onnx")]
    assert program.main(words) == 2
    printed = capsys.readouterr()
    assert "a.png" in printed.out and "c.png" in printed.out and "b.png: cannot be read" in printed.err


def test_a_file_that_does_not_say_how_it_is_fed_is_refused(run: RunFolder, tmp_path: Path) -> None:
    model = onnx.load(run.path / "export" / "student.onnx")
    write_properties(model, {"input_std": "[0]"})
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(InputError, match="not what the toolkit writes"):
        Model(str(tmp_path / "damaged.onnx"))
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "silent.onnx")
    with pytest.raises(InputError, match="does not say how images become its input"):
        Model(str(tmp_path / "silent.onnx"))


def scored(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["val", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_val_scores_folders_archives_and_configs_alike(
    run: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = np.load(data / "test.npz")
    classes = (run.path / "export" / "labels.txt").read_text().splitlines()
    for number, (image, label) in enumerate(zip(test["images"], test["labels"], strict=True)):
        folder = tmp_path / "set" / "test" / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    places = [data / "test.npz", data, tmp_path / "set", tmp_path / "set" / "test", tmp_path / "c.yaml", run.path]
    found = [scored(capsys, str(run.path), str(place)) for place in places]
    accuracy = read_json(run.path / "student" / "result.json")["test_accuracy"]
    assert {one["accuracy"] for one in found} == {accuracy}
    assert all(one["confusion"] == found[0]["confusion"] for one in found)
    assert sum(map(sum, found[0]["confusion"])) == 32
    assert all(one["notes"] == [] for one in found)
    larger = tmp_path / "larger.npz"
    np.savez(larger, images=test["images"].repeat(2, 1).repeat(2, 2), labels=test["labels"])
    (note,) = scored(capsys, str(run.path), str(larger))["notes"]
    assert re.fullmatch(r"the images are (\d+)x(\d+)x1 \(.*; they were converted to the model's (\d+)x(\d+)x1", note)
    assert main(["val", str(run.path), str(data)]) == 0
    text = capsys.readouterr().out
    assert f"({round(accuracy * 32)} of 32; 95 %" in text and "most often mistaken for" in text


def test_val_notes_images_that_the_student_was_trained_on(
    run: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = np.load(data / "test.npz")
    classes = (run.path / "export" / "labels.txt").read_text().splitlines()
    whole = tmp_path / "whole"
    for number, (image, label) in enumerate(zip(test["images"], test["labels"], strict=True)):
        (whole / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(whole / classes[label] / f"{number}.png")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "data.json").unlink()  # which would be of another set
    values = run.config.model_dump(mode="json")
    values["data"] |= {"name": "folder", "path": str(whole)}
    (copy / "config.yaml").write_text(yaml.safe_dump(values))
    (found,) = scored(capsys, str(copy), str(whole))["notes"]
    assert "was trained on some of these images (" in found
    values["data"]["split_seed"] = 7
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    assert scored(capsys, str(copy), str(tmp_path / "other.yaml"))["notes"]
    for place in (copy, data, data / "test.npz"):
        assert scored(capsys, str(copy), str(place))["notes"] == []
    (whole / "test").mkdir()
    assert scored(capsys, str(copy), str(data))["notes"] == []


def test_val_names_what_does_not_fit(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / "zebra").mkdir(parents=True)
    np.savez(tmp_path / "far.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 9]))
    np.savez(tmp_path / "bare.npz", images=np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "far.npz").read_bytes()[:-40])
    (tmp_path / "named").mkdir()
    np.savez(tmp_path / "named" / "test.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 1]))
    (tmp_path / "named" / "classes.json").write_text('["moth", "wasp"]')
    cases = {"named": "its classes are ['moth', 'wasp'], the model's",
             "set": "does not have class 'zebra'", "far.npz": "labels are 0 to 9", "bare.npz": "needs arrays",
             "cut.npz": "needs arrays"}  # fmt: skip
    for name, words in cases.items():
        assert main(["val", str(run.path), str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert main(["val", str(tmp_path / "nothing"), str(tmp_path)]) == 2
    assert "neither an ONNX file nor a run folder" in capsys.readouterr().err


def test_export_for_an_older_runtime_keeps_a_file_that_is_proven(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.path), "--for", "onnxruntime==1.17"]) == 0
    folder = run.path / "export"
    facts = read_json(folder / "export.json")
    for name in ("student.onnxruntime-1.17", "student.onnxruntime-1.17.uint8"):
        assert facts[name]["needs"] == "onnxruntime >= 1.14" and facts[name]["fitted_to"] == "1.17"
        assert read_json(folder / f"{name.replace('student', 'parity')}.json")["passed"]
        assert scored(capsys, str(folder / f"{name}.onnx"), str(run.path))["right"] > 0
    with RunFolder.reopen(run.path) as again:
        assert again.is_complete("export")
    assert main(["export", str(run.path), "--for", "onnxruntime==1.24"]) == 0
    assert "already runs on onnxruntime 1.24" in capsys.readouterr().err
    for wrong in ("tensorrt", "onnxruntime==1.2"):
        assert main(["export", str(run.path), "--for", wrong]) == 2


def test_an_accent_may_be_spelled_in_two_ways(run: RunFolder, tmp_path: Path) -> None:
    """macOS decomposes the names of folders; the error then listed the very class that it said was missing."""
    model = Model(str(run.path / "export" / "student.onnx"))
    model.facts["classes"] = ["blau", "gr\u00fcn"]
    assert _labels_of(["gru\u0308n", "blau"], model, tmp_path) == {"gru\u0308n": 1, "blau": 0}
    with pytest.raises(UsageError, match="does not have class 'grun'"):
        _labels_of(["grun"], model, tmp_path)
