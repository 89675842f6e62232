"""Measure ONNX files on the machine this one file is copied to; prints JSON between two marks.

It needs only the standard library, numpy and onnxruntime, runs from Python 3.8 and onnxruntime 1.14 on, and imports
nothing from the toolkit. The toolkit's own measurements on this machine run it, too, so there is one timing loop.

    python runner.py probe TOKEN FOLDER '{"int4": "<base64 of a tiny model>"}'
    python runner.py run JOB.json           result on stdout, talk on stderr
    python runner.py memory JOB.json INDEX  peak memory of one model, in a separate process
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import glob
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

NS_PER_MS = 1e6
# y = -x: the first session of a process also starts the runtime, which is no model's time to load
FIRST = "CAc6MgoLCgF4EgF5IgNOZWcSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
CPU = "CPUExecutionProvider"
LOW_BIT = "LowBitExecutionProvider"
LOW_BIT_PACKAGE = "onnxruntime_ep_lowbit"
TAKES_PLUGINS = (1, 23)  # the first onnxruntime whose plugins compile nodes
CPU_INFO = "/proc/cpuinfo"
CPUFREQ = "/sys/devices/system/cpu/cpu%s/cpufreq"
THERMAL = "/sys/class/thermal/thermal_zone*"
# The instructions that decide how fast (and on x86 how exactly) int8 products run.
TELLING_FLAGS = frozenset(
    ("ssse3", "sse4_1", "avx", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8")
    + ("amx_int8", "amx_tile", "asimd", "asimddp", "i8mm", "sve", "sve2", "bf16")
)
# "CPU part" of Arm's own cores, as Linux names them (arch/arm64/include/asm/cputype.h)
ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710", "0xd48": "Cortex-X2",
}  # fmt: skip
SCORED_BATCH = 16  # images per run while the sample is scored, where the model's batch is free
NOISY = 1.25  # p90 over median above which a note is made; quiet machines stay below 1.05
SLOWED = 1.10  # last quarter over first quarter of the rounds
COOLED = 0.9  # frequency after over before
WARMED_C = 10.0  # rise in degrees Celsius
HOT_C = 80.0  # boards begin to throttle at 80 to 85 degrees Celsius
CALLER_GONE = 3  # exit code; nobody is left to read it
MOST_VALUES = 2**28  # of an input: 1 GiB of float32
RACE_RUNS = 20
MANY_TIMES = 3.0  # a kernel that unpacks its weights first takes a hundred times as long, one that need not, half
BUSY = 0.5  # load average over cores at the start


class Refused(ValueError):
    """The request does not fit the model or the runtime."""


def probe(models: dict[str, Any], folder: str = ".") -> dict[str, Any]:
    """Return what this machine is, and which of the tiny models its runtime loads; ``folder`` is where files would go.

    A model is the base64 of one that must load, or the arguments of ``wins_race``, models as base64.
    """
    found: dict[str, Any] = {
        "executable": sys.executable or "",
        "machine": machine(),
        "memory_available_bytes": memory_bytes("MemAvailable"),
        "free_disk_bytes": shutil.disk_usage(folder).free if os.path.isdir(folder) else None,
        "providers": [],
        "loads": {},
        "runtime_error": None,
    }
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises whatever it likes
        found["runtime_error"] = f"{type(error).__name__}: {error}"
        return found
    found["providers"] = list(onnxruntime.get_available_providers())
    for name, text in models.items():
        if not isinstance(text, str):
            special, plain, difference = text
            pair = base64.b64decode(special), base64.b64decode(plain)
            found["loads"][name] = wins_race(onnxruntime, *pair, difference)
            continue
        try:
            onnxruntime.InferenceSession(base64.b64decode(text), quiet_options(onnxruntime), providers=[CPU])
            found["loads"][name] = True
        except Exception:  # onnxruntime's exceptions share no public base; any of them means "no"
            found["loads"][name] = False
    return found


def wins_race(onnxruntime: Any, special: bytes, plain: bytes, difference: int) -> bool:
    """Return whether a special kernel gives a plain one's outputs plus ``difference``, and is not many times slower."""
    import numpy

    outputs, best = [], []
    try:
        for model in (special, plain):
            session = onnxruntime.InferenceSession(model, quiet_options(onnxruntime), providers=[CPU])
            entry = session.get_inputs()[0]
            codes = numpy.arange(math.prod(entry.shape), dtype=numpy.uint8).reshape(entry.shape) % 16
            times = []
            for _ in range(RACE_RUNS):
                start = time.perf_counter()
                found = session.run(None, {entry.name: codes})[0]
                times.append(time.perf_counter() - start)
            outputs.append(found)
            best.append(min(times))
    except Exception:  # onnxruntime's exceptions share no public base; any of them means "no"
        return False
    return bool((outputs[0] - outputs[1] == difference).all()) and best[0] < MANY_TIMES * best[1]


def run(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Measure the models of a job, interleaved.

    Args:
        job: ``models`` (each ``name``, ``title``, ``key``, its place; ``file``, ``provider``, ``optional`` and
            ``where_nothing``), ``threads``, ``batch_size``, ``warmup``, ``rounds``, ``affinity``, ``seed``,
            ``spinning`` (if one model is left), ``memory``, ``sample`` (npz, or null), ``low_bit`` (library, or null)
            and ``why_no_low_bit``.
        folder: Where its files are.
    """
    import onnxruntime

    pin(job["affinity"])
    failed: dict[str, str] = {}
    entries, left_out = choose(onnxruntime, job, folder, failed)
    job = dict(job, spinning=job["spinning"] and len(entries) == 1)
    memory = {entry["key"]: peak_memory(job, folder, int(entry["key"])) if job["memory"] else {} for entry in entries}
    before = conditions(job["affinity"])
    models = open_all(onnxruntime, job, entries, folder, failed)
    for model in models:
        say(f"{model.title}: loaded in {model.load_ms:.0f} ms, first run {model.first_run_ms:.1f} ms; warming up")
        for _ in range(job["warmup"]):
            model.run()
    say("{} rounds of {}".format(job["rounds"], "; ".join(model.title for model in models)))
    times = take_turns(models, job["rounds"])
    after = conditions(job["affinity"])
    results = {}
    for model, taken in zip(models, times):  # noqa: B905 - `strict` is younger than Python 3.8
        peak = memory[model.key]
        say("{}: median {:.3f} ms".format(model.title, statistics(taken)["median_ms"]))
        results[model.key] = dict(model.facts(), **statistics(taken), **peak, **score(model, job, folder))
        results[model.key]["notes"] = peak.get("notes", []) + timing_notes(taken)
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # pinned by then
    notes = condition_notes(before, after, job["threads"], cores, usable)
    answer = {"models": results, "left_out": left_out, "not_measured": failed, "machine": machine(), "notes": notes}
    return dict(answer, before=before, after=after, done={key: job[key] for key in ("warmup", "rounds", "spinning")})


def open_all(ort: Any, job: dict[str, Any], entries: list[Any], folder: str, failed: dict[str, str]) -> list[Timed]:
    """Load the models; what fails besides the CPU provider goes into ``failed`` (key -> why), if another one loads."""
    models, errors = [], []
    with contextlib.suppress(Exception):  # the models' own sessions say what is wrong
        ort.InferenceSession(base64.b64decode(FIRST), quiet_options(ort), providers=[CPU])
    for entry in entries:
        try:
            models.append(Timed(ort, job, entry, folder))
        except Exception as error:  # a runtime or provider raises whatever it likes
            if entry["provider"] == CPU:
                raise
            errors.append(error)
            failed[entry["key"]] = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
    if not models:
        raise errors[0] if errors else Refused(next(iter(failed.values())))
    return models


def choose(ort: Any, job: dict[str, Any], folder: str, failed: dict[str, str]) -> tuple[list[Any], dict[str, str]]:
    """Return the entries to measure, and why others need not be: the low-bit provider may have nothing to do.

    Its entries go into ``failed`` if it is requested by name and not offered here.
    """
    kept: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    why = register_low_bit(ort, job, folder) if LOW_BIT in [entry["provider"] for entry in job["models"]] else ""
    for entry in job["models"]:
        if entry["provider"] != LOW_BIT:
            kept.append(entry)
            continue
        if why:
            reason = f"{entry['name']}: the low-bit provider is not offered here: {why}"
            (left_out if entry["optional"] else failed)[entry["key"]] = reason
            continue
        try:
            taken = compare_low_bit(ort, job, entry, folder)
        except Exception as error:  # a runtime or provider raises whatever it likes; the others are measured
            failed[entry["key"]] = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            continue
        if taken != 0:  # None: onnxruntime does not tell
            kept.append(dict(entry, taken=taken))
        elif entry["where_nothing"] == "leave out":
            left_out[entry["key"]] = "it takes nothing of this file"
        else:
            kept.append(dict(entry, taken=0, provider=CPU, title=entry["name"]))
    if why:
        say(f"low-bit provider: {why}; the CPU provider runs everything")
    return kept, left_out


def register_low_bit(ort: Any, job: dict[str, Any], folder: str) -> str:
    """Make the low-bit provider known to onnxruntime; return why it is not offered here, or nothing."""
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < TAKES_PLUGINS:
        return f"needs onnxruntime {TAKES_PLUGINS[0]}.{TAKES_PLUGINS[1]} or newer, this is {ort.__version__}"
    try:
        library = str(importlib.import_module(LOW_BIT_PACKAGE).get_library_path())
    except ImportError:  # it came with the job, or not at all
        if not job["low_bit"]:
            return str(job["why_no_low_bit"])
        library = os.path.join(folder, job["low_bit"])
    try:
        describe = ctypes.CDLL(library).lowbit_describe
        describe.restype = ctypes.c_char_p
        kernels, reason = describe().decode().split("\n", 1)
        if kernels:
            ort.register_execution_provider_library(LOW_BIT, library)
        return "" if kernels else str(reason)
    except Exception as error:  # made for another system, or what onnxruntime raises
        return f"its library cannot be loaded: {error}"


def compare_low_bit(ort: Any, job: dict[str, Any], entry: dict[str, Any], folder: str) -> int | None:
    """Return how many nodes of a file the low-bit provider takes; None if onnxruntime does not say.

    Its outputs are compared with those of the CPU provider first, on random images and on the sample: a file whose
    outputs differ in one bit is refused.
    """
    plain, ours = (Timed(ort, job, dict(entry, provider=name), folder) for name in (CPU, LOW_BIT))
    tell = getattr(ours.session, "get_provider_graph_assignment_info", None)
    taken = None if tell is None else sum(len(part.get_nodes()) for part in tell() if part.ep_name == LOW_BIT)
    if taken == 0:
        return 0
    pairs = [[value.numpy() for value in model.outputs_now()] for model in (plain, ours)]
    if job["sample"]:
        images = sample_of(job, folder)["images"]
        pairs = [values + [run_in_batches(model, images)] for values, model in zip(pairs, (plain, ours))]  # noqa: B905
    if any(one.tobytes() != other.tobytes() for one, other in zip(*pairs)):  # noqa: B905
        raise Refused(f"{entry['title']}: its outputs are not those of the CPU provider, so it is not measured")
    return taken


def take_turns(models: list[Timed], rounds: int) -> list[list[int]]:
    """Run every model once per round, in rotating order, and return each inference's time in nanoseconds."""
    times: list[list[int]] = [[] for _ in models]
    order = list(range(len(models)))
    for number in range(rounds):
        turn = number % len(order)
        for index in order[turn:] + order[:turn]:
            times[index].append(models[index].run())
    return times


class Timed:
    """A loaded model with its input prepared; its first inference is done."""

    def __init__(self, ort: Any, job: dict[str, Any], entry: dict[str, Any], folder: str) -> None:
        import numpy

        self.name, self.path = entry["name"], os.path.join(folder, entry["file"])
        self.title, self.taken = entry["title"], entry.get("taken")  # taken: nodes, by the low-bit provider
        self.key = entry["key"]  # the answer's; the caller cleans its texts
        start = time.perf_counter_ns()
        self.session = open_session(ort, self.path, job, entry)
        self.input, self.shape = input_of(self.session, self.name, job["batch_size"])
        if hasattr(self.session, "compile_for"):  # not onnxruntime, which has done so
            self.session.compile_for({self.input: self.shape})
        self.load_ms = (time.perf_counter_ns() - start) / NS_PER_MS
        images = numpy.random.default_rng(job["seed"]).standard_normal(self.shape, dtype=numpy.float32)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.feeds = {self.input: ort.OrtValue.ortvalue_from_numpy(images)}
        self.first_run_ms = self.run() / NS_PER_MS

    def run(self) -> int:
        """Run one inference; return its time in nanoseconds. The clock is around the call alone."""
        start = time.perf_counter_ns()
        self.session.run_with_ort_values(self.outputs, self.feeds)
        return time.perf_counter_ns() - start

    def outputs_now(self) -> list[Any]:
        """Return the outputs of the prepared images."""
        return list(self.session.run_with_ort_values(self.outputs, self.feeds))

    def facts(self) -> dict[str, Any]:
        """Return the facts known before the rounds."""
        known = {"load_ms": self.load_ms, "first_run_ms": self.first_run_ms, "input_shape": list(self.shape)}
        return dict(known, taken=self.taken)


def quiet_options(ort: Any) -> Any:
    """Return session options that print nothing: failures are raised anyway."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def open_session(ort: Any, path: str, job: dict[str, Any], entry: dict[str, Any]) -> Any:
    """Return a session with all optimizations, its settings those of the job."""
    if entry["provider"] in job.get("runtimes", {}):  # not onnxruntime; what opens it came with the job
        return open_elsewhere(os.path.join(os.path.dirname(path), job["runtimes"][entry["provider"]]), path, job, entry)
    name, provider, has = entry["name"], entry["provider"], ort.get_available_providers()
    devices = [] if provider in has or not hasattr(ort, "get_ep_devices") else ort.get_ep_devices()
    devices = [device for device in devices if device.ep_name == provider]  # a plugin that has no name there yet
    if provider not in has and not devices:
        raise Refused(f"provider {provider!r} is not in this onnxruntime ({ort.__version__}); it has {has}")
    options = quiet_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if job["spinning"] else "0")
    settings: dict[str, str] = {}
    if provider == LOW_BIT:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "XnnpackExecutionProvider":  # it has its own thread pool
        settings["intra_op_num_threads"] = str(job["threads"])
    chosen: dict[str, Any] = {"providers": [provider] if provider == CPU else [(provider, settings), CPU]}
    if devices:
        options.add_provider_for_devices(devices, settings)
        chosen = {}
    try:
        # with its fallback, a provider that fails would be replaced by the CPU's, which would be measured
        session = ort.InferenceSession(path, options, enable_fallback=0, **chosen)
    except Exception as error:  # onnxruntime's exceptions share no public base
        text = f"{name}: onnxruntime {ort.__version__} cannot load it ({error}); export it again"
        raise Refused(text) from error
    if session.get_providers()[0] != provider:
        raise Refused(f"{name}: provider {provider!r} did not start; onnxruntime took {session.get_providers()}")
    return session


def open_elsewhere(program: str, path: str, job: dict[str, Any], entry: dict[str, Any]) -> Any:
    """Return a session of another runtime, opened by a program that came with the job."""
    spec = importlib.util.spec_from_file_location("elsewhere", program)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    try:
        return module.Session(path, job["threads"])
    except ImportError as error:
        name = entry["provider"]
        raise Refused(f"{name} is missing for {sys.executable} ({error}): pip install {name}") from error


def input_of(session: Any, name: str, batch_size: int) -> tuple[str, tuple[int, ...]]:
    """Return the input's name and the shape to fill it with."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{entry.name}: {entry.type}" for entry in inputs)
        raise Refused(f"{name}: latency is measured for one float32 input, found {found}")
    shape = inputs[0].shape
    if not shape or not all(isinstance(size, int) for size in shape[1:]):
        raise Refused(f"{name}: only the batch may be free, its input is {shape}")
    if isinstance(shape[0], int) and shape[0] != batch_size:
        raise Refused(f"{name}: its batch is fixed at {shape[0]}, but batch_size is {batch_size}")
    sizes = (batch_size,) + tuple(shape[1:])
    if not 0 < math.prod(sizes) <= MOST_VALUES:
        raise Refused(
            f"{name}: its input is {list(sizes)}, {math.prod(sizes):,} values; 1 to {MOST_VALUES:,} can be measured: "
            "export it for images of a real size, or give a smaller batch_size"
        )
    return inputs[0].name, sizes


def statistics(times_ns: list[int]) -> dict[str, float]:
    """Return percentiles of inference times, in milliseconds."""
    import numpy

    values = numpy.percentile(numpy.asarray(times_ns) / NS_PER_MS, (50, 10, 90, 99, 0))
    names = ("median_ms", "p10_ms", "p90_ms", "p99_ms", "min_ms")
    return {name: float(value) for name, value in zip(names, values)}  # noqa: B905


def score(model: Timed, job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run the sample; return how far logits and classes are from the expected ones, and the accuracy."""
    if not job["sample"]:
        return {}
    import numpy

    sample = sample_of(job, folder)
    images, logits = sample["images"].astype(numpy.float32), run_in_batches(model, sample["images"])
    result: dict[str, Any] = {"images": len(images)}
    if "labels" in sample:
        result["accuracy"] = float((logits.argmax(1) == sample["labels"]).mean())
    expected = sample.get("logits." + model.name)
    if expected is not None:
        if expected.shape != logits.shape:
            raise Refused(f"{model.name}: expected logits are {expected.shape}, found {logits.shape}")
        difference = numpy.abs(logits.astype(numpy.float64) - expected)
        result["agreement"] = float((logits.argmax(1) == expected.argmax(1)).mean())
        result["max_difference"] = float(difference.max()) if numpy.isfinite(difference).all() else None
    return result


def sample_of(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the arrays of the sample."""
    import numpy

    with numpy.load(os.path.join(folder, job["sample"]), allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def run_in_batches(model: Timed, images: Any) -> Any:
    """Return the first output for all images; if the batch is fixed, the last one is padded and cut."""
    import numpy

    fixed = model.session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else SCORED_BATCH
    if tuple(images.shape[1:]) != model.shape[1:]:
        raise Refused(f"{model.name}: takes images {model.shape}, those of the sample are {images.shape}")
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        short = size - len(part) if isinstance(fixed, int) else 0
        filled = numpy.concatenate([part, numpy.repeat(part[-1:], short, 0)]).astype(numpy.float32)
        parts.append(model.session.run(model.outputs[:1], {model.input: filled})[0][: len(part)])
    return numpy.concatenate(parts)


def peak_memory(job: dict[str, Any], folder: str, index: int) -> dict[str, Any]:
    """Load and run one model in a separate process; return its peak memory and what Python and runtime take."""
    words = ["memory", os.path.join(folder, "job.json"), str(index), "child"]  # its stdin is this process: it ends, too
    command = [sys.executable, os.path.abspath(__file__), *words]
    say("{}: measuring peak memory in a separate process".format(job["models"][index]["title"]))
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            try:
                text = child.stdout.read() if child.stdout else b""  # its own alarm ends it; stdin stays open
            finally:
                child.kill()
        return dict(json.loads(text.decode("utf-8")))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"notes": ["peak memory is not known: %s" % (str(error) or type(error).__name__)]}


def child_memory(job: dict[str, Any], folder: str, index: int) -> dict[str, Any]:
    """Return this process's peak memory after one inference, and before the model was loaded, in bytes."""
    import onnxruntime

    pin(job["affinity"])
    base = peak_bytes()
    entry = job["models"][index]
    if entry["provider"] == LOW_BIT:
        register_low_bit(onnxruntime, job, folder)
    Timed(onnxruntime, job, entry, folder)
    return {"peak_memory_bytes": peak_bytes(), "runtime_memory_bytes": base}


def peak_bytes() -> int:
    """Return the peak resident memory of this process: VmHWM, or else ru_maxrss, which also remembers the parent."""
    for line in (read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pin(cpus: list[int]) -> None:
    """Keep this process and its threads on these CPUs; none: leave it where it is."""
    if not cpus:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise Refused(f"affinity {cpus}: this system cannot pin a process to CPUs")
    has = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise Refused(f"affinity {cpus}: {error.strerror}; this process may use CPUs {has}") from error
    absent = sorted(set(cpus) - os.sched_getaffinity(0))
    if absent:  # Linux leaves them out without an error
        raise Refused(f"affinity {cpus}: CPUs {absent} are not there; this process may use CPUs {has}")


def machine() -> dict[str, Any]:
    """Return the CPU, its telling flags, governor (None where unreadable), memory, kernel and versions."""
    fields = cpu_fields()
    flags = set(fields.get("flags", fields.get("features", "")).split())  # x86 says flags, Arm says Features
    return {
        "cpu": cpu_name(fields),
        "cpu_flags": sorted(flags & TELLING_FLAGS),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "kernel": f"{platform.system()} {platform.release()}",
        "governor": read(CPUFREQ % 0 + "/scaling_governor"),
        "memory_bytes": memory_bytes("MemTotal"),
        "python": sys.version.split()[0],
        "onnxruntime": version_of("onnxruntime"),
        "numpy": version_of("numpy"),
    }


def cpu_fields() -> dict[str, str]:
    """Return the first value of each field of /proc/cpuinfo, names in lower case."""
    fields: dict[str, str] = {}
    for line in (read(CPU_INFO) or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields


def cpu_name(fields: dict[str, str]) -> str:
    """Return the processor's name; on Arm, where cpuinfo has a number for it, core and board."""
    board = (read("/proc/device-tree/model") or fields.get("hardware") or "").strip("\0 ")
    core = ARM_PARTS.get(fields.get("cpu part", "")) if fields.get("cpu implementer") == "0x41" else None
    names = [name for name in (core or fields.get("model name"), board) if name]
    return ", ".join(names) or platform.processor() or platform.machine() or "unknown"


def version_of(package: str) -> str | None:
    """Return a package's version, or None if it cannot be imported."""
    try:
        return str(__import__(package).__version__)
    except Exception:  # a broken installation raises whatever it likes
        return None


def memory_bytes(field: str) -> int | None:
    """Return a figure of /proc/meminfo, or None if unknown."""
    for line in (read("/proc/meminfo") or "").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def conditions(cpus: list[int]) -> dict[str, Any]:
    """Return frequency, temperature and load now; None if the system does not say."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"frequency_mhz": frequency_mhz(cpus), "temperature_c": temperature_c(), "load": load}


def frequency_mhz(cpus: list[int]) -> float | None:
    """Return the highest present frequency of these CPUs (none: all) in MHz."""
    paths = [CPUFREQ % cpu for cpu in cpus] or glob.glob(CPUFREQ % "*")
    texts = [read(path + "/scaling_cur_freq") for path in paths]
    found = [int(text) / 1000 for text in texts if text is not None and text.isdigit()]
    lines = [line for line in (read(CPU_INFO) or "").splitlines() if line.lower().startswith("cpu mhz")]
    found = found or [float(line.split(":")[1]) for line in lines]
    return max(found) if found else None


def temperature_c() -> float | None:
    """Return the temperature of the hottest thermal zone in degrees Celsius."""
    texts = [read(path + "/temp") for path in glob.glob(THERMAL)]
    found = [int(text) / 1000 for text in texts if text is not None and text.lstrip("-").isdigit()]
    plausible = [value for value in found if 0 < value < 150]  # absent sensors read -273 or 0
    return max(plausible) if plausible else None


def timing_notes(times_ns: list[int]) -> list[str]:
    """Return what makes the rounds of a model doubtful: noise, and rounds that became slower."""
    notes, figures = [], statistics(times_ns)
    if figures["p90_ms"] > NOISY * figures["median_ms"]:
        notes.append("noisy: p90 is %.2f x the median" % (figures["p90_ms"] / figures["median_ms"]))
    quarter = len(times_ns) // 4
    if quarter >= 5:  # fewer say nothing
        early, late = (statistics(part)["median_ms"] for part in (times_ns[:quarter], times_ns[-quarter:]))
        if late > SLOWED * early:
            notes.append("slowing: the last quarter of the rounds took %.2f x the first" % (late / early))
    return notes


def condition_notes(before: dict[str, Any], after: dict[str, Any], threads: int, cores: int, usable: int) -> list[str]:
    """Return what makes the whole run doubtful: throttling, heat, other work, more threads than usable cores."""
    notes = []
    if before["frequency_mhz"] and after["frequency_mhz"] and after["frequency_mhz"] < COOLED * before["frequency_mhz"]:
        notes.append("throttled: from {:.0f} to {:.0f} MHz".format(before["frequency_mhz"], after["frequency_mhz"]))
    if after["temperature_c"] is not None:
        rise = after["temperature_c"] - (before["temperature_c"] or after["temperature_c"])
        if rise >= WARMED_C or after["temperature_c"] >= HOT_C:
            notes.append("hot: {:.0f} degrees Celsius, {:.0f} more than before".format(after["temperature_c"], rise))
    if before["load"] is not None and before["load"] > BUSY * cores:
        notes.append("busy: load average {:.1f} on {} cores at the start".format(before["load"], cores))
    if threads > usable:
        notes.append("{} threads on {} core{}".format(threads, usable, "s" * (usable > 1)))
    return notes


def read(path: str) -> str | None:
    """Return a file's text, or None if it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None


def say(text: str) -> None:
    """Report progress on stderr; nobody has to listen."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def end_with_caller() -> None:
    """End this process once stdin is closed: the caller holds the other end, and is gone."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(CALLER_GONE)


def answer(token: str, value: dict[str, Any]) -> None:
    """Print a result between two marks that hold the token, so that greetings of a shell cannot be taken for it."""
    sys.stdout.write(f"\n<<<qkd {token}\n{json.dumps(value)}\nqkd {token}>>>\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Do what the first argument says; return 0 also if the answer is an expected error."""
    if arguments[0] == "probe":
        answer(arguments[1], probe(json.loads(arguments[3]), arguments[2]))
        return 0
    path = os.path.abspath(arguments[1])
    with open(path) as file:
        job = json.load(file)
    if hasattr(signal, "alarm"):  # ends a run whose caller is gone
        signal.alarm(int(math.ceil(job["timeout_s"])) + 5)
    if arguments[-1] == "child" or job.get("watched"):
        threading.Thread(target=end_with_caller, daemon=True).start()
    if arguments[0] == "memory":
        print(json.dumps(child_memory(job, os.path.dirname(path), int(arguments[2]))))
        return 0
    try:
        answer(job["token"], run(job, os.path.dirname(path)))
    except Refused as error:
        answer(job["token"], {"refused": str(error)})
    except Exception as error:  # reported to the caller, who has no other way to see it
        answer(job["token"], {"failed": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    if sys.path[:1] in ([""], [os.path.dirname(os.path.abspath(globals().get("__file__", "")))]):
        del sys.path[0]  # what is next to this file, or where it is piped to, must not hide modules
    sys.exit(main(sys.argv[1:]))
