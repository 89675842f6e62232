"""Read the records of stages (results, parity, costs, measurements), each checked against the expected shape.

A record that was edited or swapped must give an error that names the file, the place in it and what was found there,
not an exception from its reader. The models list what is read; other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from export.moved import with_new_keys
from qkd.config.bind_faults import describe, place
from qkd.config.binding import read_config
from qkd.files import DamagedFileError, parse_json, read_json
from qkd.foreign.opening import read_text
from qkd.methods.table import result_shapes

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # exact as a float, too
Images = Annotated[int, Field(gt=0, le=2**53)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """A group of keys that is read; other keys are ignored."""

    model_config = ConfigDict(extra="allow", strict=True)


class Accuracies(Record):
    """The accuracies of a net."""

    test_accuracy: Share | None = None
    val_accuracy: Share | None = None


class _Row(Accuracies):
    """A net that a method reports."""

    role: str
    net: str = ""
    weight_bits: Count | None = None
    act_bits: Count | None = None
    teaches: bool = False


class Result(Accuracies):
    """A role's result; methods add keys, whose shapes are in their folders (``record`` of the table of methods)."""

    chance_accuracy: Share | None = None
    test_images: Images | None = None
    epochs: int | None = None
    net: str | None = None
    weight_bits: Count | None = None
    act_bits: Count | None = None
    rows: list[_Row] = []

    @model_validator(mode="after")
    def _bits_come_together(self) -> Result:
        if (self.weight_bits is None) != (self.act_bits is None):
            raise ValueError("weight_bits and act_bits must be set together")
        return self


class _Exported(Record):
    path: str = ""
    sha256: str | None = None
    flavor: str = "ort"
    size_bytes: Count | None = None
    packed_weight_bytes: Count | None = None
    theoretical_bytes: Count | None = None
    fall_backs: list[str] = []
    needs: str = ""
    takes_pixels: bool = False
    fitted_to: str | None = None


class _Side(Record):
    top1_agreement: Share | None = None
    differing: Count


class _ComparedLayer(Record):
    values: Count = 0
    differing: Count = 0
    differing_on: Count = 0


class _ProviderLayer(Record):
    values: Count = 0
    is_claimed: bool | None = None


class _Provider(Record):
    provider: str
    images: Count
    claimed_layers: Count | None = None
    layer_count: Count
    layers: list[_ProviderLayer] = []
    faults: list[str] = []


class _Parity(Record):
    passed: bool
    images: Images
    off: _Side
    on: _Side | None = None
    layers: list[_ComparedLayer] = []
    layer_images: Count | None = None
    notes: list[str] = []
    runtime_version: str | None = None
    provider: _Provider | None = None


class _StudentParity(_Parity):
    on: _Side
    runtime_version: str


class _Layer(Record):
    name: str
    kind: str
    weight_bits: Count
    act_bits: Count
    code_min: int
    code_max: int
    range_low: int
    range_high: int
    parameters: Count
    macs: Count
    parity_steps: float | None


class _Layers(Record):
    layers: list[_Layer] = []


class _Totals(Record):
    parameters: Count
    macs: Count
    bops: Count
    weight_bytes: Count
    parameter_bytes: Count
    peak_stored_bytes: Count
    peak_packed_bytes: Count


class _Cost(Record):
    student: _Totals
    float_twin: _Totals


class _Latency(Record):
    model: str = ""
    provider: str = ""
    sha256: str | None = None
    median_ms: Milliseconds
    p10_ms: Milliseconds | None = None
    p90_ms: Milliseconds | None = None
    p99_ms: Milliseconds | None = None
    size_bytes: Count | None = None
    peak_memory_bytes: Count | None = None
    accuracy: Share | None = None
    agreement: Share | None = None
    repacked: list[str] = []
    notes: list[str] = []


class _Machine(Record):
    cpu: str | None = None
    onnxruntime: str | None = None


class _Bench(Record):
    device: str = ""
    address: str | None = None
    settings: dict[str, Any] | None = None
    entry: dict[str, Any] | None = None
    stage: bool = False
    affinity: list[Count] | None = None
    failure: str | None = None
    models: dict[str, _Latency] = {}
    reference: str | None = None
    images: Count | None = None
    machine: _Machine | None = None
    threads: Count | None = None
    batch_size: Count | None = None
    rounds: Count | None = None
    warmup: Count | None = None


class _Counted(Record):
    trained_images: Count
    validated_images: Count


class _SearchCost(Record):
    run: _Counted
    published: _Counted | dict[str, Any]
    seconds: float
    run_validates_less_by: float
    published_validates_more_by: float


class _Environment(Record):
    packages: dict[str, str | None] = {}


class _Epoch(Record):
    epoch: Count
    terms: dict[str, float | None] = {}


class _Answers(Record):
    right: Count
    correct: str | None = None
    confusion: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]


class _Difference(Record):
    value: Annotated[float, Field(ge=-1, le=1)]
    half_width: Share


class _Predictions(Record):
    images: Images
    classes: list[str]
    models: dict[str, _Answers]
    difference: _Difference


class _Images(Record):
    images: Images
    labels: str | None = None
    pixels: str | None = None


class _DataSet(Record):
    classes: list[str] | None = None
    test: _Images | None = None


_SHAPES: Mapping[str, Any] = {
    "predictions.json": _Predictions,
    "result.json": Result,
    "export.json": dict[str, _Exported],
    "layers.json": _Layers,
    "cost.json": _Cost,
    "environment.json": _Environment,
    "data.json": _DataSet,
}


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a record of a run folder.

    Args:
        path: A file whose name (and folder) identifies it.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If it is not JSON, or does not have the expected content; names the place.
    """
    value = read_json(path)
    _check(str(path), value, _shape_of(path))
    if path.name == "result.json":
        for shape in result_shapes():
            _check(str(path), value, shape)
    is_export = path.name == "export.json"
    return {key: with_new_keys(part) if is_export else part for key, part in value.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``.

    Raises:
        DamagedFileError: If a line is not JSON, or not as the training writes it; names the line.
    """
    rows = []
    try:
        lines = read_text(path).splitlines()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path}: not UTF-8 ({error}); delete it and run its stage again") from error
    for number, text in enumerate(lines, 1):
        row = parse_json(f"{path}, line {number}", text)
        _check(f"{path}, line {number}", row, _Epoch)
        rows.append(row)
    return rows


def _shape_of(path: Path) -> Any:
    name, folder = path.name, path.parent.name
    if folder == "bench":
        return _Bench
    if folder == "search":
        return _SearchCost if name.endswith(".cost.json") else dict[str, Any]
    if name.startswith("parity"):
        return _StudentParity if name == "parity.json" else _Parity
    return Result if (folder, name) == ("student", "result.json") else _SHAPES.get(name, dict[str, Any])


def _check(where: str, value: object, shape: Any) -> None:
    try:
        TypeAdapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        spot = place("", first["loc"]).lstrip(".") or "the whole"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        found = "missing" if first["type"] == "missing" else f"{first['msg']}, got {describe(first['input'])}"
        raise DamagedFileError(
            f"{where}: {spot}: {found}{more}; this is not what the toolkit wrote: restore it, or delete it and run its "
            f"stage again"
        ) from error


def recorded_test_set(path: Path) -> Mapping[str, Any]:
    """Return what a run recorded of its classes and test images; empty if it recorded nothing.

    Args:
        path: The run folder.

    Raises:
        DamagedFileError: If the record is not what the toolkit writes.
        OSError: If it cannot be read.
    """
    file = path / "data.json"
    facts = read_record(file) if file.is_file() else {}
    if "test" not in facts:
        return {}
    data = _data_settings(path)
    domains = {key: data[key] for key in ("domains", "unseen_domain") if data.get(key) is not None}  # change images
    return {**{key: facts.get(key) for key in ("classes", "test")}, **domains}


def _data_settings(path: Path) -> Mapping[str, Any]:
    try:
        config = read_config(path / "config.yaml")
    except (OSError, ValueError):  # what lists runs says what is wrong with it
        return {}
    data = config.get("data")
    return data if isinstance(data, Mapping) else {}
