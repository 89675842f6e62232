"""Turn named ONNX files and run folders into models to measure, and a sample to score them on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from export import Sample, expect, export_int8_baseline
from export.runtime import load_model
from export.storage.preprocessing import require_prepared_alike
from export.targets.table import ONNXRUNTIME
from qkd.bench.samples import given_sample, own_sample
from qkd.failures import UsageError
from qkd.files import inside, sha256_of
from qkd.report.records import read_record

CALIBRATION_IMAGES = 128
BASELINE = "int8-static"
MEASURED = ("ort", "float")  # flavors that ONNX Runtime is to run
NO_FLOAT = "the int8 baseline is made of a float model, but all of these are quantized: name one, too"


@dataclass(frozen=True)
class Targets:
    """Models and the images that they are scored on.

    Args:
        paths: Name -> file.
        sample: With expected logits for each model; None: not scored.
        runs: Run folders among what was named, by the prefix of their models' names (empty for a single one).
        computed: Models of which the sample holds no expected logits: they were computed from the files here.
    """

    paths: Mapping[str, Path]
    sample: Sample | None = None
    runs: Mapping[str, Path] = field(default_factory=dict)
    computed: tuple[str, ...] = ()

    @property
    def float_names(self) -> list[str]:
        """Names of the files without quantizers; a student's own twin before its teacher."""
        names = [name for name, path in self.paths.items() if is_float(path)]
        return sorted(names, key=lambda name: name.rpartition("/")[2] != "float")

    @property
    def reference(self) -> str | None:
        """The model that ratios are to: the first float one."""
        return next(iter(self.float_names), None)


def find_targets(names: Sequence[str], sample_file: Path | None = None, runtimes: Sequence[str] = ()) -> Targets:
    """Return the models to measure.

    Args:
        names: ONNX files and run folders; a folder means its exported files and its sample.
        sample_file: An npz file of ``images`` and perhaps ``labels``; default: the run folder's own.
        runtimes: Runtimes besides ONNX Runtime whose files of a run are included.

    Raises:
        UsageError: If something is neither, or run folders have different samples and none is given.
        ValueError: If a sample is damaged or does not fit a model.
    """
    runs = run_prefixes([Path(name) for name in names if is_run(Path(name))])
    paths: dict[str, Path] = {}
    for prefix, folder in runs.items():
        paths |= {prefix + name: path for name, path in run_files(folder, runtimes).items()}
    for name in names:
        if not is_run(Path(name)):
            paths[_free_name(Path(name), paths)] = _model_file(Path(name))
    sample = given_sample(sample_file, paths) if sample_file else own_sample(runs)
    if sample is None:
        return Targets(paths, None, runs)
    require_prepared_alike(sample.prepared, {name: load_model(path) for name, path in paths.items()})
    unknown = tuple(name for name in paths if name not in sample.logits)
    return Targets(paths, expect(sample, paths), runs, unknown)


def run_prefixes(folders: Sequence[Path]) -> dict[str, Path]:
    """Return run folders by the prefix of their models' names: as much of the path's end as tells them apart.

    Args:
        folders: Of runs; a single one has an empty prefix.

    Raises:
        UsageError: If one is named twice.
    """
    if len(folders) == 1:
        return {"": folders[0]}
    parts = {folder: folder.resolve().parts for folder in folders}
    if len(set(parts.values())) < len(folders):
        twice = next(one for at, one in enumerate(folders) if one.resolve() in [two.resolve() for two in folders[:at]])
        raise UsageError(f"{twice} is named twice; name each run folder once")
    found = {}
    for folder, own in parts.items():
        others = [other for other in parts.values() if other != own]
        count = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        found[f"{Path(*own[-count:]).as_posix()}/"] = folder
    return found


def is_run(path: Path) -> bool:
    """Return whether a path is a run folder whose export stage has run."""
    return (path / "export" / "export.json").is_file()


def run_files(folder: Path, runtimes: Sequence[str] = ()) -> dict[str, Path]:
    """Return the ONNX files of a run folder: ``student``, ``teacher`` and perhaps ``float``.

    A student for other runtimes, by flavor or target, is left out unless requested: a latency in another runtime would
    say nothing about it. So is one that takes pixels, since the sample has normalized images. One that was repacked for
    an older runtime is what a device that needs it would get anyway.

    Args:
        folder: Of the run.
        runtimes: Runtimes besides ONNX Runtime whose files are included.

    Raises:
        DamagedFileError: If ``export.json`` does not hold what the export stage writes.
        ValueError: If a path in it leads out of the folder, or a file has changed since it was exported and proven.
    """
    facts = read_record(folder / "export" / "export.json")
    found = {
        name: inside(folder / "export", model.get("path") or f"{name}.onnx")
        for name, model in facts.items()
        if model.get("flavor", "ort") in MEASURED and not (model.get("takes_pixels") or model.get("fitted_to"))
        and _is_for(model.get("target") or ONNXRUNTIME, runtimes)
    }  # fmt: skip
    for name, path in found.items():
        then = facts[name].get("sha256")  # older exports recorded none
        if then is not None and path.is_file() and sha256_of(path) != then:
            raise ValueError(
                f"{path} has changed since it was exported; run `qkd export {shlex.quote(str(folder))}` again, or name "
                "the file itself to measure it without recording it in the run"
            )
    return found


def _is_for(target: str, runtimes: Sequence[str]) -> bool:
    return target.startswith(ONNXRUNTIME) or target in runtimes


def is_float(path: Path) -> bool:
    """Return whether a file has no quantizer.

    Raises:
        ValueError: If it is not an ONNX file.
    """
    try:
        operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    except Exception as error:  # protobuf's error; its package is not ours to import
        raise ValueError(f"{path}: it is not an ONNX file ({error}); export it again") from error
    return not operators & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "Quant"}


def with_baseline(targets: Targets, folder: Path, images: npt.NDArray[np.float32]) -> Targets:
    """Return the targets with onnxruntime's static int8 of the float model.

    On the sample, the logits expected of it are those of the float net that it was made of: nothing else was trained.

    Args:
        targets: With a float model.
        folder: Where the file goes.
        images: Calibration images, normalized, float32 ``[images, channels, height, width]``.

    Raises:
        UsageError: If there is no float model.
        export.ExportError: If onnxruntime refuses it.
    """
    name = targets.reference
    if name is None:
        raise UsageError(NO_FLOAT)
    path = export_int8_baseline(targets.paths[name], images, folder / f"{BASELINE}.onnx")
    sample = targets.sample
    if sample is not None:
        sample = replace(sample, logits={**sample.logits, BASELINE: sample.logits[name]})
    return replace(targets, paths={**targets.paths, BASELINE: path}, sample=sample)


def _model_file(path: Path) -> Path:
    if path.is_dir():
        raise UsageError(f"{path}: a folder, but no run whose export stage has run (export/export.json is missing)")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name ONNX files, run folders, or one config")
    return path


def _free_name(path: Path, taken: Mapping[str, Path]) -> str:
    for name in (path.stem, path.name, str(path)):
        if name not in taken:
            return name
    raise UsageError(f"{path} is named twice")
