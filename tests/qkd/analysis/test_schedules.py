"""``qkd policy``: import, show and sample, from the command line to the files they write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from qkd.agents import Op, Policy, Schedule, Segment, read_schedule_file, save_schedule
from qkd.cli import main
from qkd.report.stacks import COLORS, schedule_picture

ZEROS = [0] * 60
ROTATE = [3, 4, *ZEROS[2:]]
SCHEDULE = Schedule(
    ((2, Policy()), (4, Policy((Op("Invert", 0.5, 2), Op("Rotate", 1.0, 9), Op("Invert", 0.25, 4), Op("Color", 0, 9)))))  # type: ignore[arg-type]
)


def schedule_file(folder: Path) -> Path:
    save_schedule(SCHEDULE, folder / "s.yaml", role="student", provenance={"from": "a test"})
    return folder / "s.yaml"


def test_import_writes_a_schedule_that_shows_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "pbt_policy_3.txt"
    log.write_text(json.dumps(["3", "1", 4, 3, {"hp_policy": ZEROS}, {"hp_policy": ROTATE}]) + "\n")
    out = tmp_path / "made.yaml"
    words = ["policy", "import", str(log), "--epochs", "12", "--op-order", "py2", "--out", str(out)]
    assert main([*words, "--role", "teacher"]) == 0
    made = read_schedule_file(out)
    assert made.schedule == Schedule((Segment(3, Policy()), Segment(9, Policy((Op("Rotate", 0.3, 4),)))))
    assert made.role == "teacher"
    assert made.provenance["op_order"] == "py2" and made.provenance["lineage"] == ["1", "3"]
    assert "epochs 4-12: Rotate 0.3/4" in capsys.readouterr().out


def test_a_log_that_cannot_be_read_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text("print('hello')\n")
    words = ["policy", "import", str(log), "--epochs", "9", "--op-order", "py2", "--out", str(tmp_path / "o.yaml")]
    assert main(words) == 2
    assert "line 1: neither JSON nor a plain Python literal" in capsys.readouterr().err
    assert not (tmp_path / "o.yaml").exists()


def test_show_tells_a_schedule_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = schedule_file(tmp_path)
    for ending in ("svg", "png"):
        assert main(["policy", "show", str(file), "--out", str(tmp_path / f"p.{ending}")]) == 0
    out = capsys.readouterr().out
    assert "6 epochs" in out and "epochs 1-2: no operation" in out and "from: a test" in out
    assert "epochs 3-6: Rotate 1/9, Invert 0.5/2, Invert 0.25/4\n" in out
    svg = (tmp_path / "p.svg").read_text()
    assert svg.startswith("<svg") and "Invert, epochs 3 to 6: probability 0.75" in svg
    assert COLORS["Color"] not in svg  # it can never fire
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.array(image.convert("RGB"))
    rotate = tuple(int(COLORS["Rotate"][place : place + 2], 16) for place in (1, 3, 5))
    assert (pixels == rotate).all(-1).sum() > 1000


def test_show_stretches_and_answers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show", str(schedule_file(tmp_path)), "--epochs", "3", "--json"]) == 0
    assert [one["epochs"] for one in json.loads(capsys.readouterr().out)["segments"]] == [1, 2]
    assert main(["policy", "show", "pba"]) == 0
    assert "epochs 1-66: " in capsys.readouterr().out


def test_bars_are_as_high_and_wide_as_what_they_stand_for() -> None:
    above, below = schedule_picture("t", SCHEDULE).figure.axes
    bars = {bar.get_gid(): bar for axes in (above, below) for bar in axes.patches if isinstance(bar, Rectangle)}
    rotate = bars["note: Rotate, epochs 3 to 6: probability 1"]
    invert = bars["note: Invert, epochs 3 to 6: probability 0.75"]
    assert above.get_ylim() == (0, 1.75) and above.get_xlim() == (0, 6)
    assert (rotate.get_height(), invert.get_height()) == (1, 0.75)
    assert (rotate.get_x(), rotate.get_width()) == (2, 4) == (invert.get_x(), invert.get_width())
    assert {rotate.get_y(), rotate.get_y() + 1} & {invert.get_y(), invert.get_y() + 0.75}  # stacked
    assert below.get_ylim() == (0, 15) and bars["note: Invert, epochs 3 to 6: magnitude 6"].get_height() == 6


def test_an_empty_schedule_says_so() -> None:
    assert "no operation in any epoch" in schedule_picture("t", Schedule((Segment(3, Policy()),))).to_svg()


def test_sample_takes_pictures_of_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, name, side in (("train", "a", 12), ("train", "b", 20), ("test", "a", 12)):
        folder = tmp_path / "set" / part / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((side, side), 90, np.uint8)).save(folder / "0.png")
    words = ["policy", "sample", "crop_flip", "--data", "folder", "--data-path", str(tmp_path / "set"), "--epochs", "0"]
    words += ["--out", str(tmp_path / "grid.png")]
    assert main(words) == 2 and "image_size" in capsys.readouterr().err
    assert main([*words, "--image-size", "16"]) == 0 and (tmp_path / "grid.png").is_file()


def test_sample_draws_a_row_an_epoch(tmp_path: Path) -> None:
    save_schedule(
        Schedule((Segment(1, Policy()), Segment(1, Policy((Op("Invert", 1.0, 0),))))), tmp_path / "invert.yaml"
    )
    words = ["policy", "sample", str(tmp_path / "invert.yaml"), "--data", "digits", "--epochs", "0,1"]
    for name in ("a.png", "b.png"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (10 * 68, 3 * 68)
        rows = np.array(image).reshape(3, 68, 10, 68)[:, 2:-2, :, 2:-2].mean(axis=(1, 3))
    assert rows[0].max() < 128 and rows[1].max() < 128  # digits are mostly dark
    assert (rows[2] > 128).sum() >= 5  # and bright once inverted, which 4 in 5 are


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "pbaa"], "neither a schedule file nor a policy; did you mean `pba`"),
        (["show", "absent.yaml"], "absent.yaml: cannot be read"),
        (["show", "trivial", "--out", "x.svg"], "no schedule to draw"),
        (["sample", "pba", "--data", "digit", "--epochs", "0", "--out", "x.png"], "unknown data set 'digit'"),
        (["sample", "pba", "--data", "digits", "--epochs", "200", "--out", "x.png"], "200 is not within 200 epochs"),
    ],
)
def test_wrong_input_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("epochs", ["x", "1,,2", "-1"])
def test_epochs_must_be_numbers(epochs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["policy", "sample", "pba", "--data", "digits", f"--epochs={epochs}", "--out", "x.png"])
    assert caught.value.code == 2
    assert "must be epochs such as 0,10,20" in capsys.readouterr().err
