"""`qkd bench`: the stage of a config; or models (ONNX files, run folders) here and on devices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import defaults
from qkd.cli.options.command import add_command, load, new_progress, print_result, require_config, run_stages_of
from qkd.cli.options.values import cpus, finite, output_file, whole
from qkd.failures import BAD_INPUT, DONE, FAILED
from qkd.files.user_paths import user_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def add(commands: Any) -> None:
    """Declare the command."""
    means = ("CONFIG|MODEL", "a config; or one or more ONNX files or run folders")
    text = "measure the latency of ONNX files, here and on devices"
    _add_options(add_command(commands, "bench", bench, text, config=means, has_runs=True))


def bench(args: argparse.Namespace) -> int:
    """Run the stage of a config, or measure models on devices; return 1 if a device failed."""
    from qkd.bench.measuring import bench_models, names_models, refuse_options

    if not names_models([args.config]):
        require_config(args)
        refuse_options(args)
        return run_stages_of(load(args), (args.name,), args)
    table = bench_models(args, new_progress(), calibration=_training_images)
    print_result(args, table)
    if table.failures:
        return BAD_INPUT if table.is_input_fault else FAILED
    return DONE


def _training_images(folder: Path) -> npt.NDArray[np.float32]:
    """Return a run folder's images for calibrating an int8 baseline."""
    from qkd.roles.sample import calibration_images
    from qkd.roles.stored import stored_config

    return calibration_images(stored_config(folder), folder=folder)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s CONFIG [key=value ...]\n       %(prog)s MODEL [MODEL ...] [--on DEVICE] [options]"
    parser.description = "Measure a config's run, or models (ONNX files, run folders), here and on devices."
    group = parser.add_argument_group("for models (a config has a bench section instead)")
    for words in (
        ("--on", "append", None, "DEVICE", "local, ssh://[user@]host[:port], adb://SERIAL or a name; may be repeated"),
        ("--devices", None, user_path, "FILE", "file of named devices (~/.config/qkd/devices.yaml)"),
        (
            "--python",
            None,
            None,
            "PATH",
            "Python on the devices, with onnxruntime; relative paths start in the home folder there (python3)",
        ),
        ("--threads", None, whole, "N", f"intra-op threads ({defaults.THREADS})"),
        ("--rounds", None, whole, "N", f"timed inferences per model, interleaved ({defaults.ROUNDS})"),
        ("--warmup", None, whole, "N", f"inferences before the clock starts ({defaults.WARMUP})"),
        ("--batch-size", None, whole, "N", f"images per inference ({defaults.BATCH_SIZE})"),
        (
            "--provider",
            "append",
            str,
            "NAME",
            "auto, cpu, lowbit or a name of onnxruntime; for several, separate by commas or repeat (auto)",
        ),
        (
            "--runtime",
            "append",
            str,
            "NAME",
            "onnxruntime, openvino, or both with a comma; a student runs only in its file's runtime",
        ),
        ("--affinity", None, cpus, "CPUS", "pin to these CPUs, e.g. 0,1 or 4-7"),
        (
            "--sample",
            None,
            user_path,
            "FILE",
            "npz of images (float32, normalized) and labels to score the models on there",
        ),
        ("--timeout", None, finite, "SECONDS", f"longest duration of one command on a device ({defaults.TIMEOUT_S:g})"),
        ("--output", None, output_file(".json"), "FILE.json", "also write the result to FILE as JSON"),
    ):
        option, action, kind, meta, text = words
        more = {"dest": f"{option[2:]}s"} if option in ("--provider", "--runtime") else {}
        names = (option, "--out") if option == "--output" else (option,)  # as other commands call it
        group.add_argument(*names, action=action, type=kind, metavar=meta, help=text, **more)  # type: ignore[arg-type]
    group.add_argument(
        "--int8-baseline", action="store_true", help="also measure onnxruntime's static int8 of the float model"
    )
