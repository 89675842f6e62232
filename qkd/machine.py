"""Report what this machine offers and whether another distribution uses our import names."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkd.units import counted

DISTRIBUTION = "qkd-toolkit"
NAMES = ("qkd", "quantizers", "export")
LIBRARIES = ("torch", "torchvision", "brevitas", "onnx", "onnxruntime", "numpy")
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
COMPILERS = ("c++", "g++", "clang++", "cl")


def usable_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Clash:
    """An import name that is not (only) ours.

    Args:
        name: ``qkd``, ``quantizers`` or ``export``.
        what: What was found and what to do about it.
    """

    name: str
    what: str


@dataclass(frozen=True)
class DoctorReport:
    """What ``qkd doctor`` prints."""

    versions: dict[str, str]
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    cuda_devices: tuple[str, ...]
    compiler: str | None
    providers: tuple[str, ...]
    low_bit: str
    resolves_to: dict[str, str]
    clashes: tuple[Clash, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether the three names are ours."""
        return not self.clashes

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "is_healthy": self.is_healthy}

    def to_text(self) -> str:
        """Return the report as lines for a person."""
        memory = "unknown" if self.memory_bytes is None else f"{self.memory_bytes / 2**30:.1f} GiB"
        rows = [
            *self.versions.items(),
            ("cpu", f"{self.cpu}, {self.cores} cores, memory {memory}"),
            ("cpu flags", ", ".join(self.cpu_flags) or "none of those that matter"),
            ("cuda", ", ".join(self.cuda_devices) or "no device"),
            ("compiler", self.compiler or "none: the quantizers run without their fused kernels"),
            ("onnxruntime", ", ".join(self.providers) or "no execution provider"),
            ("low-bit", self.low_bit),
            *((f"import {name}", where) for name, where in self.resolves_to.items()),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        if note := _arithmetic_note(self.versions.get("onnxruntime"), self.cpu_flags):
            lines.append(f"note: {note}")
        lines += [f"CLASH {clash.name}: {clash.what}" for clash in self.clashes]
        return "\n".join([*lines, "all is well" if self.is_healthy else counted(len(self.clashes), "clash", "clashes")])


def examine() -> DoctorReport:
    """Look at this machine and at the installed distributions."""
    return DoctorReport(
        versions={"python": platform.python_version(), DISTRIBUTION: own_version(), **_library_versions()},
        cpu=cpu_model(),
        cpu_flags=cpu_flags(),
        cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        cuda_devices=_cuda_devices(),
        compiler=next((path for name in COMPILERS if (path := shutil.which(name))), None),
        providers=_providers(),
        low_bit=_low_bit(),
        resolves_to={name: str(_resolve(name) or "not found") for name in NAMES},
        clashes=tuple(find_clashes()),
    )


def _arithmetic_note(version: str | None, flags: tuple[str, ...]) -> str:
    try:
        from export.versions import arithmetic_note
    except ImportError:  # `export` is another distribution's, which is reported as a clash
        return ""
    return arithmetic_note(version, flags)


def own_version() -> str:
    """Return the version of this distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def find_clashes(distributions: Iterable[importlib.metadata.Distribution] | None = None) -> list[Clash]:
    """Return what is wrong with our three import names; empty if nothing is.

    Args:
        distributions: Those to check; default: the installed ones.
    """
    clashes = [clash for name in NAMES if (clash := _wrong_home(name))]
    for distribution in importlib.metadata.distributions() if distributions is None else distributions:
        title = distribution.metadata["Name"] or "an unnamed distribution"
        if _normal(title) == DISTRIBUTION:
            clashes += _altered(distribution)
            continue
        for name in sorted(_top_level(distribution) & set(NAMES)):
            advice = f"uninstall it and reinstall {DISTRIBUTION}, or use a fresh environment"
            clashes.append(Clash(name, f"{title} {distribution.version} installs `{name}` too; {advice}"))
    return list(dict.fromkeys(clashes))


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    for line in _cpuinfo().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _wrong_home(name: str) -> Clash | None:
    found, ours = _resolve(name), Path(__file__).resolve().parent.parent / name
    if found == ours:
        return None
    where = f"resolves to {found}" if found else "cannot be imported"
    return Clash(name, f"{where}, ours is {ours}; reinstall {DISTRIBUTION} in a fresh environment")


def _resolve(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve().parent
    return next((Path(place).resolve() for place in spec.submodule_search_locations or ()), None)


def _top_level(distribution: importlib.metadata.Distribution) -> set[str]:
    """Return the import names of a distribution from its record: names of top-level folders and modules."""
    names = set((distribution.read_text("top_level.txt") or "").split())
    record = distribution.read_text("RECORD")
    for row in csv.reader((record or "").splitlines()):
        parts = Path(row[0]).parts if row else ()
        if len(parts) > 1 or (parts and parts[0].endswith(".py")):
            names.add(parts[0].removesuffix(".py"))
    return names


def _altered(distribution: importlib.metadata.Distribution) -> list[Clash]:
    """Return a clash for each of our names with files that differ from the installed ones."""
    wrong: dict[str, list[str]] = {}
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        if len(row) < 2 or not row[1].startswith("sha256=") or Path(row[0]).parts[0] not in NAMES:
            continue
        path = Path(str(distribution.locate_file(row[0])))
        if not path.is_file() or _record_hash(path) != row[1]:
            wrong.setdefault(path.relative_to(str(distribution.locate_file(""))).parts[0], []).append(row[0])
    return [
        Clash(
            name,
            f"{counted(len(files), 'file differs', 'files differ')} from what was installed (first: {files[0]}); "
            f"reinstall {DISTRIBUTION}",
        )
        for name, files in wrong.items()
    ]


def _record_hash(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _normal(title: str) -> str:
    return title.lower().replace("_", "-").replace(".", "-")


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_flags() -> tuple[str, ...]:
    """Return the processor's instruction sets that affect speed here, by the kernel's names."""
    words = _cpu_words()
    return tuple(flag for flag in FLAGS if flag in words)


def _cpu_words() -> set[str]:
    return {word for line in _cpuinfo().splitlines() if line.lower().startswith(("flags", "features"))
            for word in line.partition(":")[2].split()}  # fmt: skip


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cuda_devices() -> tuple[str, ...]:
    try:
        import torch
    except ImportError:
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.cuda.get_device_name(index) for index in range(count))


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def _low_bit() -> str:
    """Return which kernels the low-bit execution provider has here, or why it offers none; this compiles it."""
    from export.lowbit import availability

    found = availability()
    return f"{found.kernels} kernels ({found.reason})" if found.is_offered else f"not offered: {found.reason}"
