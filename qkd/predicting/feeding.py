"""The preprocessing metadata of a run's exported files, and the files next to them that describe it."""

from __future__ import annotations

from pathlib import Path

from export import Preprocessing
from qkd.config import RunConfig
from qkd.data import Splits
from qkd.files import write_json, write_text

PIXELS = "uint8"  # last part of the name of a file that takes pixels: student.uint8.onnx
LABELS, FACTS, PROGRAM = "labels.txt", "preprocess.json", "predict.py"


def preprocessing_of(config: RunConfig, splits: Splits, name: str = "") -> Preprocessing:
    """Return how the images of a run are preprocessed for its nets.

    Args:
        config: The run's.
        splits: Its data set.
        name: Of the exported file, without its ending: one that takes pixels has its preprocessing inside.
    """
    _, height, width = splits.test.image_shape
    is_inside = name.rpartition(".")[2] == PIXELS
    return Preprocessing(
        mean=tuple(splits.mean),
        std=tuple(splits.std),
        image_size=(height, width),
        classes=tuple(splits.classes),
        resize=splits.resize,
        place="inside" if is_inside else "outside",
        layout=config.export.layout if is_inside else "nchw",
    )


def write_beside(folder: Path, preprocessing: Preprocessing) -> list[Path]:
    """Write ``labels.txt``, ``preprocess.json`` and ``predict.py`` next to a run's ONNX files.

    Args:
        folder: Of the exported files.
        preprocessing: Of the files that take normalized images.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written.
    """
    from qkd.predicting import predict

    write_text(folder / LABELS, "".join(f"{_one_line(name)}\n" for name in preprocessing.classes))
    write_json(folder / FACTS, preprocessing.to_json())
    write_text(folder / PROGRAM, Path(predict.__file__).read_text(encoding="utf-8"))
    return [folder / name for name in (LABELS, FACTS, PROGRAM)]


def _one_line(name: str) -> str:
    return " ".join(name.split())
