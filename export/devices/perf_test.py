"""Measure with ``onnxruntime_perf_test`` on a device that has no Python, and read what it prints."""

from __future__ import annotations

import base64
import math
import re
import secrets
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx

from export.devices.connections.address import Device, DeviceError
from export.devices.connections.answer import between_marks, marked
from export.devices.connections.capture import Captured, printable
from export.devices.connections.shell import Content, Say, Shell
from export.devices.links import PROBE_S, work_folder
from export.devices.onboard import runner
from export.devices.probing import KINDS, Probe, probe_models

TURNS = 4  # calls per model; the tool takes one model per call, so models take turns in blocks of rounds
NAMES = {"CPUExecutionProvider": "cpu", "XnnpackExecutionProvider": "xnnpack", "NnapiExecutionProvider": "nnapi",
         "QNNExecutionProvider": "qnn", "ACLExecutionProvider": "acl", "CUDAExecutionProvider": "cuda"}  # fmt: skip
GRACE_S = 5  # seconds after the caller's limit, as the runner's own alarm
NO_PLUGIN = "onnxruntime_perf_test is not asked to take plugins"
WARM_UP = 1  # inference per call, which the tool makes by itself
NOTE = (
    "by onnxruntime_perf_test: one random image, classes not compared, rounds in blocks (p90: their median, p99: their "
    "largest), p10 not given"
)
FIGURES = {  # what it prints -> (our name, factor to our unit)
    r"P50 Latency(?::| is)\s*([\d.e+-]+)\s*s": ("median_ms", 1e3),
    r"P90 Latency(?::| is)\s*([\d.e+-]+)\s*s": ("p90_ms", 1e3),
    r"P99 Latency(?::| is)\s*([\d.e+-]+)\s*s": ("p99_ms", 1e3),
    r"Min Latency(?::| is)\s*([\d.e+-]+)\s*s": ("min_ms", 1e3),
    r"Session creation time cost:\s*([\d.e+-]+)\s*s": ("load_ms", 1e3),
}
OPTIONAL = {
    r"First inference time cost:\s*([\d.e+-]+)\s*ms": ("first_run_ms", 1.0),
    r"Peak working set size:\s*(\d+)\s*bytes": ("peak_memory_bytes", 1.0),
}
STATE = (
    "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq; echo ==; "
    "cat /sys/class/thermal/thermal_zone*/temp; echo ==; cat /proc/loadavg"
)
ALLOWED = "grep Cpus_allowed_list: /proc/self/status"
MOST_CPUS = 1 << 16  # a device's text must not fill the memory
FACTS = "uname -m; uname -sr; getprop ro.product.model; echo ==; cat /proc/meminfo; echo ==; cat /proc/cpuinfo"


def read_output(text: str) -> dict[str, float | None]:
    """Return the figures from one call, in milliseconds and bytes.

    Args:
        text: What the tool printed (``-m times -s``).

    Raises:
        DeviceError: If a figure that every version prints is missing.
    """
    figures: dict[str, float | None] = {}
    for patterns, required in ((FIGURES, True), (OPTIONAL, False)):
        for pattern, (name, factor) in patterns.items():
            found = re.search(pattern, text)
            try:
                figures[name] = None if found is None else float(found[1]) * factor
            except ValueError:
                figures[name] = None
            if figures[name] is None and required:
                raise DeviceError(f"onnxruntime_perf_test printed no {name} ({printable(text) or 'nothing at all'})")
    return figures


def combine(blocks: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the figures of a model over its blocks: medians of medians and p90, the extremes of the rest."""
    values = {name: [block[name] for block in blocks if block[name] is not None] for name in blocks[0]}
    ways = {"min_ms": min, "p99_ms": max, "peak_memory_bytes": max, "first_run_ms": lambda found: found[0]}
    merged: dict[str, float | None] = {}
    for name, found in values.items():
        merged[name] = float(ways.get(name, statistics.median)(found)) if found else None  # type: ignore[operator]
    return {**merged, "p10_ms": None}


class PerfTestLink:
    """A device whose measuring tool is ``onnxruntime_perf_test``.

    Args:
        device: One with ``perf_test``.
        shell: Its shell.
    """

    def __init__(self, device: Device, shell: Shell) -> None:
        self.device, self.shell = device, shell
        self.tool = shlex.quote(device.perf_test or "")

    def probe(self) -> Probe:
        """Run the tool on the tiny models: if it exits with 0, its runtime loads the model."""
        token, loads = secrets.token_hex(8), []
        models = {f"{name}.onnx": base64.b64decode(text) for name, text in probe_models().items()}
        with work_folder(self.device, self.shell, token) as folder:
            self.shell.put(folder, models, timeout_s=min(PROBE_S, self.device.timeout_s))
            calls = {kind.name: self._call(folder, f"{kind.name}.onnx", 1, 1, "cpu", (), PROBE_S) for kind in KINDS}
        loads = [name for name, done in calls.items() if done.code == 0]
        if all(done.code in (126, 127) for done in calls.values()):
            raise DeviceError(f"{self.device.perf_test} cannot be run there: {_words(calls[KINDS[-1].name])}")
        machine = self._machine()
        return Probe(machine, tuple(loads), tuple(NAMES), None, None, None, str(self.device.perf_test))

    def run(self, job: Mapping[str, Any], files: Mapping[str, Content], say: Say | None) -> dict[str, Any]:
        """Copy the models, let them take turns in blocks, and return an answer like the runner's.

        Raises:
            ValueError: If the tool cannot do what the job requests.
            DeviceError: If it fails.
        """
        if job["batch_size"] != 1:
            raise ValueError(f"onnxruntime_perf_test takes free axes as 1, but batch_size is {job['batch_size']}")
        entries = [entry for entry in job["models"] if not entry["optional"]]
        for entry in entries:
            if entry["provider"] not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"onnxruntime_perf_test: provider {entry['provider']!r} is not one of {known}")
        self._check_affinity(job["affinity"])
        shapes = {entry["key"]: _input_shape(entry["name"], files[entry["file"]]) for entry in entries}
        models = {entry["title"]: entry for entry in entries}
        wanted = {entry["file"]: files[entry["file"]] for entry in entries}
        with work_folder(self.device, self.shell, secrets.token_hex(8)) as folder:
            self.shell.put(folder, wanted, timeout_s=self.device.timeout_s)
            before = self._conditions()
            blocks = self._take_turns(folder, models, job, say)
            after = self._conditions()
        machine, threads = self._machine(), job["threads"]
        cores = machine["cores"] or max(threads, 1)
        usable = len(set(job["affinity"])) or cores
        rows = {
            entry["key"]: {"notes": [], "input_shape": shapes[entry["key"]], "images": 0, **combine(blocks[title])}
            for title, entry in models.items()
        }
        return {
            "models": rows,
            "left_out": {entry["key"]: NO_PLUGIN for entry in job["models"] if entry["optional"]},
            "machine": machine,
            "before": before,
            "after": after,
            "done": {"warmup": TURNS * WARM_UP, "rounds": TURNS * _block(job["rounds"]), "spinning": threads > 1},
            "notes": [NOTE, *runner.condition_notes(before, after, threads, cores, usable)],
        }

    def _take_turns(
        self, folder: str, models: Mapping[str, Mapping[str, str]], job: Mapping[str, Any], say: Say | None
    ) -> dict[str, list[dict[str, float | None]]]:
        rounds = _block(job["rounds"])
        blocks: dict[str, list[dict[str, float | None]]] = {name: [] for name in models}
        order = list(models)
        for number in range(TURNS):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                provider = NAMES[models[name]["provider"]]
                settings = (rounds, job["threads"], provider, job["affinity"], self.device.timeout_s)
                done = self._call(folder, models[name]["file"], *settings)
                if done.code:
                    raise DeviceError(f"onnxruntime_perf_test failed on {name} (exit code {done.code}): {_words(done)}")
                blocks[name].append(read_output(done.stdout.decode("utf-8", "replace")))
                if say:
                    say(f"{name}: block {number + 1} of {TURNS}, median {blocks[name][-1]['median_ms']:.3f} ms")
        return blocks

    def _call(
        self, folder: str, file: str, rounds: int, threads: int, provider: str, affinity: Sequence[int], limit_s: float
    ) -> Captured:
        # -I: random input, free axes are 1; -o 99: all optimizations; -s: print percentiles
        options = f"-I -m times -r {rounds} -x {threads} -e {provider} -o 99 -s"
        pinned = f"taskset {_mask(affinity)} " if affinity else ""
        limit_s = min(limit_s, self.device.timeout_s)
        # the device ends it, too, where it can: nothing else would, once the caller is gone
        bound = f"timeout {math.ceil(limit_s) + GRACE_S}"
        script = (
            f"cd {shlex.quote(folder)} && bound= && "
            f"if command -v {self.tool} >/dev/null 2>&1 && {bound} true 2>/dev/null; then bound='{bound}'; fi; "
            f"$bound {pinned}{self.tool} {options} {shlex.quote(file)}"
        )
        return self._marked(script, limit_s)

    def _machine(self) -> dict[str, Any]:
        text = self._ask(FACTS)
        names, memory, cpu = (text.split("==") + ["", "", ""])[:3]
        architecture, kernel, model = ([*names.strip().splitlines(), "", "", ""])[:3]
        fields: dict[str, str] = {}
        for line in cpu.splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
        core = fields.get("model name") or runner.ARM_PARTS.get(fields.get("cpu part", "")) or fields.get("hardware")
        flags = set(fields.get("flags", fields.get("features", "")).split())
        total = re.search(r"MemTotal:\s*(\d+) kB", memory)
        return {
            "cpu": printable(", ".join(filter(None, (core, model))) or "unknown"),
            "cpu_flags": sorted(flags & runner.TELLING_FLAGS),
            "cores": len(re.findall(r"^processor\s*:", cpu, re.MULTILINE)) or None,
            "architecture": printable(architecture),
            "kernel": printable(kernel),
            "memory_bytes": int(total[1]) * 1024 if total else None,
            "governor": None,
            "python": None,
            "onnxruntime": "that of onnxruntime_perf_test",
            "numpy": "not needed",
        }

    def _conditions(self) -> dict[str, float | None]:
        parts = [part.split() for part in (self._ask(STATE).split("==") + ["", "", ""])[:3]]
        kilohertz, millidegrees = ([int(word) for word in part if word.isdigit()] for part in parts[:2])
        plausible = [value / 1000 for value in millidegrees if 0 < value < 150_000]
        load = parts[2][0] if parts[2] else ""
        return {
            "frequency_mhz": max(kilohertz) / 1000 if kilohertz else None,
            "temperature_c": max(plausible) if plausible else None,
            "load": float(load) if re.fullmatch(r"\d{1,6}\.\d\d", load) else None,
        }

    def _ask(self, script: str) -> str:
        done = self._marked(f"{{ {script}; }} 2>/dev/null", min(PROBE_S, self.device.timeout_s))
        return done.stdout.decode("utf-8", "replace")

    def _marked(self, script: str, limit_s: float) -> Captured:
        """Run a script; keep what it prints itself, not the greeting of a login."""
        token = secrets.token_hex(8)
        done = self.shell.call(marked(script, token), timeout_s=limit_s)
        body = between_marks(done.stdout, token)
        if body is None and done.code == 0:
            words = printable(done.stdout.decode("utf-8", "replace")) or "nothing"
            raise DeviceError(f"the device's output is cut off: it printed {words}; is its shell one of POSIX?")
        return done if body is None else replace(done, stdout=body)

    def _check_affinity(self, cpus: Sequence[int]) -> None:
        """Raise unless ``taskset`` gives exactly these CPUs: Linux leaves out absent ones without an error."""
        if not cpus:
            return
        text = self._ask(f"taskset {_mask(cpus)} grep Cpus_allowed_list: /proc/self/status; echo ==; {ALLOWED}")
        given, has = ([*map(_cpu_list, text.split("=="))] + [None, None])[:2]
        if given is None and (has is None or has.issuperset(cpus)):
            return  # no taskset, or another one: measuring will say what is wrong
        if given != set(cpus):
            known = "unknown" if has is None else str(sorted(has))
            absent = sorted(set(cpus) - (given or has or set()))
            raise ValueError(f"affinity {list(cpus)}: CPUs {absent} are not there; the device's CPUs: {known}")


def _words(done: Captured) -> str:
    return printable(done.stderr) or printable(done.stdout.decode("utf-8", "replace")) or "no reason given"


def _mask(cpus: Sequence[int]) -> str:
    return f"{sum(1 << cpu for cpu in set(cpus)):x}"


def _cpu_list(text: str) -> set[int] | None:
    """Return the CPUs of a line like ``Cpus_allowed_list: 0-3,6``; None if there is none."""
    found = re.search(r"Cpus_allowed_list:\s*(\d[\d,-]*)", text)
    if found is None:
        return None
    ends = [[int(end) for end in part.split("-") if end] for part in found[1].split(",") if part]
    return {cpu for end in ends if end[-1] <= MOST_CPUS for cpu in range(end[0], end[-1] + 1)}


def _block(rounds: int) -> int:
    """Return the rounds of one block, rounded up."""
    return -(-rounds // TURNS)


def _input_shape(name: str, content: Content) -> list[int]:
    """Return the shape of the image that the tool makes: free axes are 1.

    Raises:
        ValueError: If the batch is fixed at another number, whose time would pass for that of one image.
    """
    model = (
        onnx.load_from_string(content) if isinstance(content, bytes) else onnx.load(content, load_external_data=False)
    )
    constants = {tensor.name for tensor in model.graph.initializer}  # old files list them among the inputs
    image = next((entry for entry in model.graph.input if entry.name not in constants), None)
    sizes = [] if image is None else [size.dim_value or 1 for size in image.type.tensor_type.shape.dim]
    if sizes and sizes[0] != 1:
        raise ValueError(f"{name}: its batch is fixed at {sizes[0]}, but onnxruntime_perf_test is to measure one image")
    return sizes
