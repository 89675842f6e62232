"""Collect the figures of a run folder into one value, so that nothing is computed while printing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from export.moved import OldFields
from qkd.methods.report_row import row_of
from qkd.methods.table import report_rows
from qkd.report.caveats import (
    BASELINE,
    accuracy_caveats,
    float_layers,
    interval_text,
    latency_caveats,
    left_out_caveats,
    parity_caveats,
    wilson,
)
from qkd.report.findings.measurements import label, sort_out
from qkd.report.findings.verdict import verdict
from qkd.report.records import read_record, recorded_test_set
from qkd.report.table import align
from qkd.run.folder import why_outdated
from qkd.units import megabytes, milliseconds, percent

TAUGHT = Path("student") / "teacher"  # in a run: the final teacher, if it learned along with the student
ROLES = {"teacher": "teacher", "float": "FP32 twin", "student": "student"}  # name of the ONNX file -> its description
IS_TWIN = f"(= {ROLES['float']})"  # after a teacher that is the student's net in FP32


@dataclass(frozen=True)
class ModelRow(OldFields):
    """A line of the closing table.

    Args:
        role: ``teacher``, ``FP32 twin`` or ``student`` with its code.
        net: Name of the network.
        test_accuracy: Accuracy on the test split as a fraction 0..1; None if it was not measured.
        interval: Its 95 % interval (Wilson's), fractions; None if the number of test images is unknown.
        agreement: Fraction of test images with the same top class in PyTorch and ONNX Runtime (optimizations off).
        agreement_optimized: The same with ONNX Runtime's optimizations on.
        size_bytes: Size of the ONNX file.
        packed_weight_bytes: Size of the weights in it.
        theoretical_bytes: Weights at their bit width, four bytes for each bias and weight scale.
        median_ms, p10_ms, p90_ms: Latency of one inference.
        needs: What runs the file: ``onnxruntime >= 1.24``; empty if unknown.
        is_measured_only: Whether the line only shows latency: a file under another execution provider, or int8.
        teaches: Whether it is what the student learned from in place of the teacher, such as an ensemble.
    """

    role: str
    net: str
    test_accuracy: float | None = None
    agreement: float | None = None
    agreement_optimized: float | None = None
    size_bytes: int | None = None
    packed_weight_bytes: int | None = None
    theoretical_bytes: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    interval: tuple[float, float] | None = None
    is_measured_only: bool = False
    needs: str = ""
    teaches: bool = False


@dataclass(frozen=True)
class LayerRow:
    """A convolution or linear layer of the student.

    Args:
        name, kind: Module path and its kind.
        weight_bits, act_bits: Bit widths of weights and of input activations.
        used: Smallest and largest weight code that occurs.
        allowed: Smallest and largest code of the grid.
        parameters, macs: Number of weights, and multiply-accumulates per image.
        parity_steps: Largest difference between PyTorch and ONNX Runtime on the layer's output, in output steps.
    """

    name: str
    kind: str
    weight_bits: int
    act_bits: int
    used: tuple[int, int]
    allowed: tuple[int, int]
    parameters: int
    macs: int
    parity_steps: float | None


@dataclass(frozen=True)
class RunSummary(OldFields):
    """The results of a run, as far as it got.

    Args:
        name, folder: The run.
        models, layers: Lines of the tables.
        parity, cost: What the export stage wrote about the comparison and the student's cost.
        flavors: The student's files for other runtimes: name -> size and comparison.
        bench: The measurement in the closing table: that of the first device of ``bench.on`` that the config's bench
            section still makes; empty if there is none.
        devices: Every device's measurement, those of ``bench.on`` first; for a device that failed, its ``failure``.
        test_images: Number of test images; None if unknown.
        test_set: What the run recorded of its classes and test images; empty if it recorded nothing.
        batch_statistics: Images per batch whose statistics batch norm used for accuracies; None: running statistics.
        caveats: What a reader of these figures must know, one sentence each.
        report: Path of the page; None before it is written.
        outdated: Which file has changed since the report was written; empty if none has.
        fall_backs: One sentence for each layer or function of the student that stays in float, with the reason.
        predictions: What the export stage wrote about the classes that the files predict for the test images.
        verdict: Everything in one sentence; empty before there is a student.
    """

    name: str
    folder: str
    models: tuple[ModelRow, ...]
    layers: tuple[LayerRow, ...] = ()
    parity: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    flavors: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[Mapping[str, Any], ...] = ()
    test_images: int | None = None
    test_set: Mapping[str, Any] = field(default_factory=dict)
    batch_statistics: int | None = None
    caveats: tuple[str, ...] = ()
    report: str | None = None
    outdated: str = ""
    fall_backs: tuple[str, ...] = ()
    predictions: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""

    @property
    def student(self) -> ModelRow | None:
        """The student's line; None before there is one."""
        return self._first(ROLES["student"])

    @property
    def teacher(self) -> ModelRow | None:
        """The line of the teacher whose file is exported: as it was taught along, or an ensemble's first member."""
        return self._first(ROLES["teacher"])

    @property
    def teacher_role(self) -> str:
        """What the exported teacher is in the run, in words."""
        return self.teacher.role.partition(" (")[0] if self.teacher else "teacher"

    @property
    def followed(self) -> ModelRow | None:
        """The line of what the student learned from: an ensemble or an auxiliary, or else the teacher."""
        return next((row for row in self.models if row.teaches), self.teacher)

    @property
    def twin(self) -> ModelRow | None:
        """The line of the student's net in FP32: the teacher's, if both have the same net."""
        teacher = self.teacher
        return teacher if teacher and IS_TWIN in teacher.role else self._first(ROLES["float"])

    def _first(self, start: str) -> ModelRow | None:
        return next((row for row in self.models if row.role.startswith(start)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data; accuracies are fractions."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the closing table as text."""
        if not self.models:
            return f"{self.folder}: nothing has been trained yet"
        lines = [*([self.verdict] if self.verdict else []), align(model_table(self))]
        lines += [f"note: {caveat}" for caveat in self.caveats]
        return "\n".join([*lines, self._report_line()])

    def _report_line(self) -> str:
        if self.report is None:
            return f"run folder: {self.folder} (no report yet)"
        older = f" (older than the run: {self.outdated}; `qkd run {shlex.quote(self.folder)}` rewrites it)"
        return f"report: {self.report}{older if self.outdated else ''}"


def model_table(summary: RunSummary) -> list[list[str]]:
    """Return the heading and lines of the table of models, as text."""
    where = label(summary.bench)
    latency = f"latency (median{f', {where}' if where else ''})"
    head = ["model", "net", "test accuracy (95 %)", "parity (optimized)", "ONNX file", latency]
    rows = [head, *([row.role, row.net, _accuracy(row), _parity(row), megabytes(row.size_bytes),
                     milliseconds(row.median_ms)] for row in summary.models)]  # fmt: skip
    if not any(row.needs for row in summary.models):
        return rows
    return [[*cells, needs] for cells, needs in zip(rows, ["needs", *(row.needs or "-" for row in summary.models)],
                                                    strict=True)]  # fmt: skip


def summarize(path: Path) -> RunSummary:
    """Return the contents of a run folder so far.

    Args:
        path: The run folder; stages that have not run leave gaps.

    Returns:
        The figures, with gaps.

    Raises:
        DamagedFileError: If a record is not JSON, or not what the toolkit writes under that name.
        ImportError: If the run used a method of another package that is not installed.
        OSError: If a record cannot be read, or is too large.
    """
    export = read_json(path / "export" / "export.json")
    found = sort_out(_records(path / "bench"), path, {name: facts.get("sha256") for name, facts in export.items()})
    devices, bench = (*found.own, *found.others), found.leading
    parity = read_json(path / "export" / "parity.json")
    report, results, taught = path / "report.html", _results(path), read_json(path / TAUGHT / "result.json")
    count = _test_images(results, parity)
    models = tuple(_with_interval(row, count) for row in _models(path, results, export, parity, bench))
    summary = RunSummary(
        name=path.name,
        folder=str(path),
        models=models,
        layers=tuple(_layer(row) for row in read_json(path / "export" / "layers.json").get("layers", [])),
        parity=parity,
        bench=bench,
        cost=read_json(path / "export" / "cost.json"),
        flavors=_flavors(path, export),
        devices=devices,
        test_images=count,
        test_set=recorded_test_set(path),
        batch_statistics=results["student"].get("batch_statistics"),
        caveats=(*_caveats(results, count, export, parity, devices, taught), *left_out_caveats(found.outdated, path)),
        report=str(report) if report.is_file() else None,
        outdated=why_outdated(path, "report") if report.is_file() else "",
        fall_backs=tuple(export.get("student", {}).get("fall_backs", ())),
        predictions=read_json(path / "export" / "predictions.json"),
    )
    return replace(summary, verdict=_verdict(summary))


def _verdict(summary: RunSummary) -> str:
    student = summary.student
    mark = f"{student.role}, " if student else ""
    under = {row.role.removeprefix(mark): row for row in summary.models if student and row.role.startswith(mark)}
    # the predictions are those of the exported teacher
    known = summary.predictions if summary.followed is summary.teacher else {}
    return verdict(student, summary.twin, summary.followed, predictions=known, parity=summary.parity,
                   under=under, where=label(summary.bench))  # fmt: skip


def size_table(summary: RunSummary) -> list[list[str]]:
    """Return the heading and lines of the table of sizes, as text; only the heading if nothing has been exported."""
    head = ["model", "net", "file", "weights in it", "theoretical"]
    return [head, *([row.role, row.net, *map(megabytes, (row.size_bytes, row.packed_weight_bytes,
                     row.theoretical_bytes))] for row in summary.models
                     if row.size_bytes is not None and not row.is_measured_only)]  # fmt: skip


def _flavors(path: Path, export: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size and comparison of the student's files for other runtimes."""
    found = {}
    for name, facts in export.items():
        if name.startswith("student."):
            parity = read_json(path / "export" / f"{name.replace('student', 'parity')}.json")
            told = {key: facts.get(key) for key in ("size_bytes", "flavor", "target")}
            found[name] = {**told, "parity": parity}
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: A record of a run folder.

    Returns:
        Key -> value; empty if the file is missing.

    Raises:
        DamagedFileError: If the file is not JSON, or not what the toolkit writes under this name.
        OSError: If the file cannot be read, or is too large.
    """
    return read_record(path) if path.is_file() else {}


def _records(folder: Path) -> list[dict[str, Any]]:
    """Return the devices' records, this machine's first."""
    files = sorted(folder.glob("*.json"), key=lambda file: (file.name != "local.json", file.name))
    return [{"device": file.stem, **value} for file in files if (value := read_json(file))]


def _results(path: Path) -> dict[str, dict[str, Any]]:
    return {
        "teacher": read_json(path / "teacher" / "result.json"),
        "float": read_json(path / "student" / "float" / "result.json"),
        "student": read_json(path / "student" / "result.json"),
    }


def _test_images(results: Mapping[str, Mapping[str, Any]], parity: Mapping[str, Any]) -> int | None:
    """Return the number of test images; for runs that do not record it, the number checked for parity, which is all."""
    said = (result.get("test_images") for result in results.values())
    return next((count for count in said if count), None) or parity.get("images")


def _with_interval(row: ModelRow, count: int | None) -> ModelRow:
    if count is None or row.test_accuracy is None:
        return row
    return replace(row, interval=wilson(row.test_accuracy, count))


def _caveats(
    results: Mapping[str, Mapping[str, Any]], count: int | None, export: Mapping[str, Any], parity: Mapping[str, Any],
    devices: Sequence[Mapping[str, Any]], taught: Mapping[str, Any],
) -> Iterator[str]:  # fmt: skip
    student = export.get("student", {})
    yield from parity_caveats(parity)
    followed = {**taught, "epochs": None} if taught else results["teacher"]  # its own record counts no epochs
    yield from accuracy_caveats({**results, "teacher": followed}, count)
    yield from float_layers(student)
    twin = "teacher" if _nets_agree(results) else "float"
    for bench in devices:
        yield from latency_caveats(bench, student, twin)


def _models(
    path: Path, results: Mapping[str, Mapping[str, Any]], export: Mapping[str, Any], parity: Mapping[str, Any],
    bench: Mapping[str, Any],
) -> list[ModelRow]:  # fmt: skip
    taught = read_json(path / TAUGHT / "result.json")
    rows = []
    for key, found in results.items():
        is_taught = key == "teacher" and bool(taught)
        result = taught if is_taught else found  # its final state, which is exported
        if result:
            is_twin = key == "teacher" and _nets_agree(results)
            compared = parity if key == "student" else {}
            row = _model(key, result, export.get(key, {}), compared, bench.get("models", {}), is_twin=is_twin)
            if members := result.get("members"):
                row = replace(row, role=row.role.replace("teacher", f"teacher 1 of {len(members)}", 1))
            rows.append(replace(row, role=f"{row.role}, taught along") if is_taught else row)
            rows += _under_providers(row, bench, parity) if key == "student" else []
    rows += _baseline(bench, rows)
    return rows + _company(path, results, is_taught=bool(taught))


def _under_providers(student: ModelRow, bench: Mapping[str, Any], parity: Mapping[str, Any]) -> list[ModelRow]:
    """Return a line for each provider besides the CPU's that the student's file was measured under."""
    compared = parity.get("provider") or {}
    rows = []
    for name, row in bench.get("models", {}).items():
        if row.get("model") == "student" and name != "student":
            is_same = compared.get("provider") == row.get("provider") and not compared.get("faults")
            rows.append(replace(
                _measured(f"{student.role}{name.removeprefix('student')}", student.net, row),
                test_accuracy=student.test_accuracy if is_same else None,
            ))  # fmt: skip
    return rows


def _baseline(bench: Mapping[str, Any], models: Sequence[ModelRow]) -> list[ModelRow]:
    """Return the line of onnxruntime's static int8, if it was measured."""
    row = bench.get("models", {}).get(BASELINE)
    floats = [model for model in models if not model.role.startswith(ROLES["student"])]
    # made of the student's own twin before its teacher (`Targets.float_names`)
    net = next((model.net for model in sorted(floats, key=lambda model: model.role != ROLES["float"])), "")
    return [] if row is None else [_measured("static int8 of the float net", net, row)]


def _measured(role: str, net: str, row: Mapping[str, Any]) -> ModelRow:
    times: dict[str, Any] = {key: row.get(key) for key in ("median_ms", "p10_ms", "p90_ms", "size_bytes")}
    return ModelRow(role, net, is_measured_only=True, **times)


def _company(path: Path, results: Mapping[str, Mapping[str, Any]], *, is_taught: bool) -> list[ModelRow]:
    """Return lines of the discarded nets that the student learned from or with: only their accuracies."""
    rows = [row for rows_of in report_rows() for row in rows_of(path, results)]
    told = [row for result in results.values() for row in result.get("rows", [])]  # e.g. by methods outside the table
    rows += [row_of(row["role"], row, teaches=row.get("teaches", False)) for row in told]
    before = [row_of("teacher, before it was taught", results["teacher"])] if is_taught else []
    rows = [*(row for row in rows if row.teaches), *before, *(row for row in rows if not row.teaches)]
    return [ModelRow(row.role, row.net, row.test_accuracy, teaches=row.teaches) for row in rows]


def _nets_agree(results: Mapping[str, Mapping[str, Any]]) -> bool:
    return not results["float"] and results["teacher"].get("net") == results["student"].get("net")


def _model(
    key: str, result: Mapping[str, Any], exported: Mapping[str, Any], parity: Mapping[str, Any],
    latencies: Mapping[str, Mapping[str, Any]], *, is_twin: bool,
) -> ModelRow:  # fmt: skip
    role = ROLES[key]
    if key == "student":
        is_float = result.get("weight_bits") is None  # a federated one can be
        role += " float" if is_float else f" w{result['weight_bits']}a{result['act_bits']}"
    latency = latencies.get(key, {})
    return ModelRow(
        role=f"{role} {IS_TWIN}" if is_twin else role,
        net=str(result.get("net", "")),
        test_accuracy=result.get("test_accuracy"),
        agreement=parity.get("off", {}).get("top1_agreement"),
        agreement_optimized=parity.get("on", {}).get("top1_agreement"),
        size_bytes=exported.get("size_bytes"),
        packed_weight_bytes=exported.get("packed_weight_bytes"),
        theoretical_bytes=exported.get("theoretical_bytes"),
        needs=exported.get("needs", ""),
        median_ms=latency.get("median_ms"),
        p10_ms=latency.get("p10_ms"),
        p90_ms=latency.get("p90_ms"),
    )


def _layer(row: Mapping[str, Any]) -> LayerRow:
    return LayerRow(
        name=row["name"],
        kind=row["kind"],
        weight_bits=row["weight_bits"],
        act_bits=row["act_bits"],
        used=(row["code_min"], row["code_max"]),
        allowed=(row["range_low"], row["range_high"]),
        parameters=row["parameters"],
        macs=row["macs"],
        parity_steps=row["parity_steps"],
    )


def _accuracy(row: ModelRow) -> str:
    if row.interval is None:
        return percent(row.test_accuracy)
    return f"{percent(row.test_accuracy)} ({interval_text(row.interval)})"


def _parity(row: ModelRow) -> str:
    if row.agreement is None:
        return "-"
    return f"{percent(row.agreement)} ({percent(row.agreement_optimized)})"
