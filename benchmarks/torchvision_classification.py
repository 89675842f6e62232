"""Reports for each net in torchvision's classification list whether its student is exact, or why it is refused.

    python benchmarks/torchvision_classification.py                    # the whole list, about two hours on two cores
    python benchmarks/torchvision_classification.py --nets resnet18 vit_b_16 --bits 4
    python benchmarks/torchvision_classification.py --table            # only writes the table again

Untrained nets on small images. A net is `exact` if `prepare` accepts it, which includes a comparison with the float
net, and the exported file of the calibrated student passes parity: every code of every quantizer, with optimizations
off and on. Each row is written when it is done, with its commit and versions; existing rows are not redone without
--fresh, whatever the commit.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from qkd.cli.options.values import output_file
from qkd.files import write_text

RESULTS = Path(__file__).parent / "results" / "torchvision_classification.json"
CLASSES = 10
SMALLEST = 64  # pixels; what most nets take
# Nets whose windows or position embeddings need more.
SIZES = {"alexnet": 96, "inception_v3": 96, "maxvit_t": 224, "vit": 224}
LARGE_PARAMETERS = 100_000_000  # above this, use fewer images
IMAGES, IMAGES_OF_LARGE = 4, 2
# A net with auxiliary heads is another net in training; only its classifier is deployed.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
EXACT, REFUSED, DIFFERS, FAILED = "exact", "refused", "differs", "failed"


@dataclass(frozen=True)
class Row:
    """The outcome for a net.

    Args:
        net: Its name in torchvision.
        bits: Bits of weights and activations; first and last layer have 8.
        verdict: ``exact``, ``refused`` (by name, before training), ``differs`` (parity), ``failed`` (anything else).
        reason: The message if it is not exact.
        pixels: Side of an image.
        images: Images compared.
        parameters: Parameters of the float net, with ten classes.
        codes: Codes compared.
        seconds: Time from the float net to the comparison.
        commit: Commit of the packages that produced it.
        versions: Versions of torch and torchvision.
    """

    net: str
    bits: int
    verdict: str
    reason: str
    pixels: int
    images: int
    parameters: int
    codes: int
    seconds: float
    commit: str
    versions: str


def nets() -> list[str]:
    """Return torchvision's classification list."""
    return list(torchvision.models.list_models(module=torchvision.models))


def pixels_of(name: str) -> int:
    """Return the side of the images for a net."""
    return SIZES.get(name, SIZES.get(name.split("_")[0], SMALLEST))


def build(name: str) -> nn.Module:
    """Return an untrained net of ten classes, in training mode."""
    torch.manual_seed(0)
    options = dict(OPTIONS.get(name, {}))
    if name.startswith("vgg"):
        options["init_weights"] = False  # drawing them takes seconds and changes nothing
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def make_row(name: str, bits: int) -> Row:
    """Prepare, calibrate, export and compare one net; return the outcome."""
    started = time.perf_counter()
    model, pixels = build(name), pixels_of(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    images = IMAGES_OF_LARGE if parameters > LARGE_PARAMETERS else IMAGES
    batch = torch.randn(images, 3, pixels, pixels)
    verdict, reason, codes = _verdict(model, bits, batch)
    seconds = round(time.perf_counter() - started, 1)
    return Row(name, bits, verdict, reason, pixels, images, parameters, codes, seconds, commit(), versions())


def commit() -> str:
    """Return the short commit of this checkout, with a plus sign where files differ from it."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def versions() -> str:
    """Return the versions of torch and torchvision."""
    return f"torch {torch.__version__}, torchvision {torchvision.__version__}"


def _verdict(model: nn.Module, bits: int, batch: Tensor) -> tuple[str, str, int]:
    from quantizers import QuantSpec, RewriteError, prepare

    try:
        student = prepare(model, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=batch[:1])
    except RewriteError as error:
        return REFUSED, str(error), 0
    except Exception as error:  # also a row, so that the list is complete
        return FAILED, f"prepare: {type(error).__name__}: {error}", 0
    del model
    try:
        return _compared(student, batch)
    except Exception as error:
        return FAILED, f"after prepare: {type(error).__name__}: {error}", 0


def _compared(student: Any, batch: Tensor) -> tuple[str, str, int]:
    from export import check_parity, export_onnx
    from quantizers import calibrate

    calibrate(student, [batch])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        export_onnx(student.eval(), batch[:1], path)
        report = check_parity(student, path, [batch], layer_images=len(batch))
    codes = sum(layer.values for layer in report.layers)
    return (EXACT if report.passed else DIFFERS), "; ".join(report.faults), codes


# -- the file -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file; empty if it does not exist."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows and table, in the list's order."""
    order = {name: index for index, name in enumerate(nets())}
    rows = sorted(rows, key=lambda row: (order[row.net], -row.bits))
    write_text(path, json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    write_text(path.with_suffix(".md"), table(rows))


def table(rows: list[Row]) -> str:
    """Return the rows as a page with one line per net, including those that were not run."""
    names = nets()
    by = {(row.net, row.bits): row for row in rows}
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (EXACT, REFUSED, DIFFERS, FAILED)}
    lines = [
        "# Torchvision's classification nets as low-bit students", "",
        f"{len(names)} nets at two widths: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        + f", {2 * len(names) - len(rows)} not run.",
        f"{sum(row.codes for row in rows):,} codes were compared. Untrained nets, ten classes, small images; made by",
        "`python benchmarks/torchvision_classification.py`, whose first lines say what `exact` means.",
        f"Made with the packages of {', '.join(sorted({row.commit for row in rows}))}; each row's commit and versions",
        "are in the JSON file beside this page.", "",
        "| net | parameters | pixels | W4A4 | W2A2 | why not |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        pair = [by.get((name, bits)) for bits in (4, 2)]
        first = next((row for row in pair if row is not None), None)
        facts = "- | -" if first is None else f"{first.parameters / 1e6:.1f} M | {first.pixels}"
        verdicts = " | ".join("not run" if row is None else row.verdict for row in pair)
        reason = next((row.reason for row in pair if row is not None and row.reason), "")
        lines.append(f"| {name} | {facts} | {verdicts} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= 160 else f"{short[:157]}..."


def main() -> None:
    """Produce the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=nets(), choices=nets(), metavar="NET")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--json", type=output_file(".json"), default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="redo existing rows")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    chosen = parser.parse_args()
    import quantizers

    quantizers.set_fused(enabled=False)  # two batches per net: compiling would take longer
    rows = {(row.net, row.bits): row for row in read_rows(chosen.json)}
    for name in [] if chosen.table else chosen.nets:
        for bits in chosen.bits:
            if (name, bits) in rows and not chosen.fresh:
                continue
            row = rows[name, bits] = make_row(name, bits)
            write_rows(chosen.json, list(rows.values()))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{name} w{bits}a{bits}: {row.verdict} {row.reason[:200]} ({row.seconds} s, peak {peak:.1f} GB)",
                  file=sys.stderr, flush=True)  # fmt: skip
            gc.collect()
    write_rows(chosen.json, list(rows.values()))


if __name__ == "__main__":
    main()
