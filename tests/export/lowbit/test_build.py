"""Where the library comes from, what is said where there is none, and its parts."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import sanitizers
import torch

from export import lowbit
from export.lowbit import build, provider
from quantizers.native.building import cached_library

NATIVE = build.SOURCES
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    provider.library_path.cache_clear()
    yield
    provider.library_path.cache_clear()


def test_without_a_compiler_one_line_says_so_and_the_cpu_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_lowbit", None)
    provider._say_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert lowbit.providers() == lowbit.providers() == ["CPUExecutionProvider"]
    assert [record.message for record in caplog.records] == [
        "low-bit execution provider: no C++ compiler: install g++ or clang++ to build the low-bit execution provider; "
        "the CPU provider computes everything"
    ]
    with pytest.raises(lowbit.LowBitUnavailableError, match="no C"):
        lowbit.register()


def test_a_compiler_that_fails_gives_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(lowbit.LowBitUnavailableError, match="does not compile: x.cc:1: error: no such thing"):
        build.built_library(build.host_toolchain())
    assert list((tmp_path / "cache" / "qkd").iterdir()) == []  # nothing half-made stays
    compiler.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(lowbit.LowBitUnavailableError, match=r"g\+\+ ended with exit code 3 and said nothing"):
        build.compile_library(build.host_toolchain(), tmp_path)
    caplog.records.pop()
    (said,) = (record.message for record in caplog.records)  # whoever waits knows what for
    assert re.fullmatch(r"compiling the low-bit execution provider for \w+, once: about half a minute", said)


def test_without_a_home_folder_it_is_compiled_in_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(_: Any = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def make(folder: Path) -> Path:
        (folder / "made.so").write_bytes(b"x")
        return folder / "made.so"

    found = cached_library("named.so", make)
    assert found.read_bytes() == b"x" and tmp_path in found.parents


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_library(toolchain: build.Toolchain, folder: Path) -> Path:
        calls.append(toolchain)
        (folder / "liblowbit.so").write_bytes(b"library")
        return folder / "liblowbit.so"

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    toolchain = build.Toolchain(("true",), "x86_64")
    first, second = build.built_library(toolchain), build.built_library(toolchain)
    other = build.built_library(build.Toolchain(("true",), "x86_64", ("-g",)))
    assert first == second != other and len(calls) == 2
    assert [path.name for path in sorted((tmp_path / "qkd").iterdir())] == sorted({first.name, other.name})


def test_switched_off_old_runtime_named_library(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    with monkeypatch.context() as changed:
        changed.setattr(onnxruntime, "__version__", "1.22.1")
        assert lowbit.availability() == lowbit.Availability("", "needs onnxruntime 1.23 or newer, this is 1.22.1")
    with monkeypatch.context() as changed:
        changed.setenv("QKD_LOWBIT_LIBRARY", "/nowhere/lib.so")
        assert lowbit.availability().reason == "QKD_LOWBIT_LIBRARY names no file: /nowhere/lib.so"
    with monkeypatch.context() as changed:
        other_library = Path(torch.__file__).parent / "lib" / "libc10.so"
        changed.setenv("QKD_LOWBIT_LIBRARY", str(other_library))
        assert lowbit.availability().reason.startswith(f"{other_library} is not the library of this provider")
    monkeypatch.setenv("QKD_LOWBIT", "0")
    assert not lowbit.availability().is_offered and lowbit.providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("machine", "cut", "words"), [(183, 0, "it is for aarch64, not for"), (62, 1, "it is cut off")]
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="written for x86-64")
def test_a_library_that_cannot_be_loaded_is_named_with_its_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: int, cut: int, words: str
) -> None:
    """Loading one that is cut off would end the process; one of another processor is called missing by the system."""
    head = bytearray(4096)
    head[:6], head[18:20] = b"\x7fELF\x02\x01", machine.to_bytes(2, "little")
    head[40:48], head[58:62] = (4032).to_bytes(8, "little"), b"\x40\x00\x01\x00"
    (tmp_path / "l.so").write_bytes(bytes(head[: 4096 - cut]))
    monkeypatch.setenv("QKD_LOWBIT_LIBRARY", str(tmp_path / "l.so"))
    assert lowbit.availability().reason.startswith(f"{tmp_path / 'l.so'}: {words}")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\nsleep 60\n", "does not answer: .* --version` took more than"),
        ("#!/no/sh\n", "cannot be started: No such"),
    ],
)
def test_a_compiler_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "ANSWER_S", 0.2)
    with pytest.raises(lowbit.LowBitUnavailableError, match=words):
        build._version((str(compiler),))


def test_an_instruction_set_that_is_not_there_offers_nothing() -> None:
    script = "from export import lowbit; print(lowbit.availability().reason); print(*lowbit.providers())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "LOWBIT_ISA": "neon"}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "CPUExecutionProvider", done.stderr
    assert "is not one that this processor and library have" in done.stdout or "compil" in done.stdout


def test_registering_twice_changes_nothing() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if not lowbit.availability().is_offered:
        pytest.skip(lowbit.availability().reason)
    assert lowbit.register() == lowbit.register() == "LowBitExecutionProvider"
    assert [device.ep_name for device in onnxruntime.get_ep_devices()].count(lowbit.PROVIDER) == 1


def test_only_files_of_an_instruction_set_are_compiled_for_it() -> None:
    toolchain = build.Toolchain(("g++",), "x86_64")
    sources = sorted(NATIVE.rglob("*.cc"))
    special = {path.stem for path in sources if any("-mavx" in flag for flag in build._command(toolchain, path))}
    assert special == {path.stem for path in sources if path.stem.startswith(("amx", "avx"))} and special
    intrinsics = {path.stem for path in sources if "_mm" in path.read_text()}
    assert intrinsics == special


@pytest.mark.slow
def test_instruction_sets_leak_no_functions(tmp_path: Path) -> None:
    """A function that two files emit is kept once: an AVX-512 copy of a shared one would crash older processors."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    build.compile_library(build.host_toolchain(), tmp_path)
    objects = sorted([*tmp_path.glob("amx*.o"), *tmp_path.glob("avx*.o")])
    assert len(objects) > 5
    for path in objects:
        symbols = subprocess.run(
            [nm, "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        shared = [name for name in re.findall(r"^\S+ [WVu] (.*)$", symbols, re.M) if not name.startswith("DW.ref.")]
        assert not shared, (path.name, shared)  # DW.ref.: pointers, not code


DESCRIBE = """#include <cstdio>
#include <dlfcn.h>
int main(int, char** words) {
    void* const library = dlopen(words[1], RTLD_NOW);
    std::puts(reinterpret_cast<const char* (*)()>(dlsym(library, "lowbit_describe"))());
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "kernels"), [("Haswell", "avx2"), ("Nehalem", "")])
def test_older_processors_load_the_library(processor: str, kernels: str, tmp_path: Path) -> None:
    """Nothing that is compiled for newer ones may run before the processor is asked."""
    if build.host_toolchain().machine != "x86_64":
        pytest.skip("for x86-64")
    emulator = "usr/bin/qemu-x86_64-static"
    root = emulation.fetch().debian("qemu-x86_64", "amd64", "bookworm", ("qemu-user-static",), only=emulator)
    library = build.built_library(build.host_toolchain())
    (tmp_path / "describe.cc").write_text(DESCRIBE)
    (compiler,) = build.host_toolchain().command
    program = str(tmp_path / "describe")
    subprocess.run([compiler, str(tmp_path / "describe.cc"), "-o", program, "-ldl"], check=True, timeout=60)
    words = [str(root / emulator), "-cpu", processor, program, str(library)]
    environment = {key: value for key, value in os.environ.items() if key != "LOWBIT_ISA"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.startswith(kernels), (done.returncode, done.stdout, done.stderr)
    assert "amx" not in done.stdout and "avx512" not in done.stdout


# Which kernels nets run on (all of them where single operations choose), and which tests: hundreds of layers of every
# instruction set, hundreds of nets, spoiled files.
WATCHED = {
    "": "not student and not portable and not emulated and not other_kernels",
    "avx512": "random_nets_are_identical",
    "avx2": "random_nets_are_identical or spoiled_files_are",
    "portable": "test_random_nets_are_identical",
}


@pytest.fixture(scope="module")
def watched_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with addresses and undefined behavior watched."""
    toolchain = build.Toolchain((sanitizers.compiler(),), build.host_toolchain().machine, sanitizers.FLAGS)
    return build.compile_library(toolchain, tmp_path_factory.mktemp("watched"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("isa", WATCHED)
def test_sanitizers_find_nothing(isa: str, watched_library: Path) -> None:
    """The tests of single operations, random nets and spoiled files, the slow ones too."""
    files = (
        ["test_provider.py"] if isa else ["test_kernels.py", "test_widths.py", "test_provider.py", "test_sessions.py"]
    )
    tests = [f"tests/export/lowbit/{name}" for name in files]
    environment = {"QKD_LOWBIT_LIBRARY": str(watched_library), "LOWBIT_ISA": isa}
    sanitizers.require_clean(["-m", "slow or not slow", *tests, "-k", WATCHED[isa]], environment, 7000)


def official_headers() -> Path:
    """The folder of onnxruntime's own headers: named, or out of Debian's package (testing has 1.23 or newer)."""
    if named := os.environ.get("LOWBIT_ORT_HEADERS"):
        return Path(named)
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    root = emulation.fetch().debian("onnxruntime-headers", "amd64", "testing", ("libonnxruntime-dev",))
    return Path(next(root.rglob("onnxruntime_c_api.h")).parent)


@pytest.mark.slow
def test_declarations_are_those_of_the_official_header(tmp_path: Path) -> None:
    """Places of functions, their types word by word, members of structs, values of enumerations."""
    headers = official_headers()
    text = (NATIVE / "runtime" / "ort_abi.h").read_text()
    functions = re.findall(r"F\((\w+), (\d+),\s*([^,]+), *\\?\s*\((.*?)\)\) *(?:\\|$)", text, re.M)
    table = {name: int(place) for name, place, _, _ in functions}
    assert len(table) > 35
    ep_names = {"CreateEpDevice", "EpGraphSupportInfo_AddNodesToFuse"}
    lines = ['#include "onnxruntime_c_api.h"', "#include <cstddef>", "#include <type_traits>"]
    for name, place in table.items():
        owner = "OrtEpApi" if name in ep_names else "OrtApi"
        lines.append(f'static_assert(offsetof({owner}, {name}) == {place} * sizeof(void*), "{name}");')
    for struct, members in STRUCTS.items():
        for number, member in enumerate(members):
            lines.append(
                f'static_assert(offsetof({struct}, {member}) == {number} * sizeof(void*), "{struct}::{member}");'
            )
    for name, value in VALUES.items():
        lines.append(f'static_assert({name} == {value}, "{name}");')
    lines.append("static_assert(ORT_API_VERSION >= 23);")
    source = tmp_path / "places.cc"
    source.write_text("\n".join([*lines, "int main() {}"]))
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{headers}", str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    check_arguments(
        functions, (headers / "onnxruntime_c_api.h").read_text(), (headers / "onnxruntime_ep_c_api.h").read_text()
    )


STRUCTS = {
    "OrtNodeComputeInfo": ["ort_version_supported", "CreateState", "Compute", "ReleaseState"],
    "OrtEp": ["ort_version_supported", "GetName", "GetCapability", "Compile", "ReleaseNodeComputeInfos"],
    "OrtEpFactory": [
        *(
            "ort_version_supported",
            "GetName",
            "GetVendor",
            "GetSupportedDevices",
            "CreateEp",
            "ReleaseEp",
            "GetVendorId",
        ),
        *("GetVersion", "ValidateCompiledModelCompatibilityInfo", "CreateAllocator", "ReleaseAllocator"),
        *("CreateDataTransfer", "IsStreamAware", "CreateSyncStreamForDevice"),
    ],
}
VALUES = {
    **{"ORT_FAIL": 1, "ORT_INVALID_ARGUMENT": 2, "ORT_EP_FAIL": 11, "OrtHardwareDeviceType_CPU": 0},
    **{
        f"ONNX_TENSOR_ELEMENT_DATA_TYPE_{name}": value
        for name, value in (("FLOAT", 1), ("UINT8", 2), ("INT8", 3), ("INT32", 6))
    },
    **{"ORT_OP_ATTR_INT": 1, "ORT_OP_ATTR_INTS": 2, "ORT_OP_ATTR_STRING": 5},
}


def check_arguments(functions: list[tuple[Any, ...]], *headers: str) -> None:
    """As many arguments, and as many stars, as the official declaration has."""
    checked = 0
    for name, _, _, arguments in functions:
        for header in headers:
            found = re.search(rf"(?:ORT_API2_STATUS\({name},|ORT_API_T\([\w* ]+, {name},)(.*?)\);", header, re.S)
            if not found:
                continue
            official = re.sub(r"_\w+_(?:\([^)]*\))?\s", " ", found.group(1))
            ours = re.sub(r"\(\*\)\(.*?\)", "", arguments.replace("\\", ""))
            official = re.sub(r"\(\*\w+\)\(.*?\)", "", official)
            assert ours.count(",") == official.count(","), (name, ours, official)
            assert ours.count("*") == official.count("*"), (name, ours, official)
            checked += 1
    assert checked > 25


@pytest.fixture
def benchmark() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import lowbit as module
    finally:
        sys.path.pop(0)
    return module


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2"])
def test_the_tables_of_the_page_are_those_of_the_results(benchmark: Any, isa: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"lowbit_{isa}.json").read_text())
    assert all(row["identical"] for row in results["rows"]) and results["kernels"] == isa
    assert benchmark.table_of(results["rows"]) in (ROOT / "docs" / "lowbit.md").read_text()


def test_more_rows_go_only_to_a_file_of_the_same_kind(benchmark: Any, tmp_path: Path) -> None:
    about = {"processor": {}, "versions": {}, "kernels": "avx2", "runtime_restricted_to": "avx2", "flavor": "ort"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**about, "commands": ["a"], "rows": [1, 2]}))
    found = benchmark.with_earlier(path, {**about, "commands": ["b"], "rows": [3]})
    assert found == {**about, "commands": ["a", "b"], "rows": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"results.json: kernels was avx2 but is now avx512; give another file"):
        benchmark.with_earlier(path, {**about, "kernels": "avx512", "commands": ["b"], "rows": [3]})


def test_benchmark_reports_what_it_measured(benchmark: Any) -> None:
    times = benchmark.in_turns([lambda: None, lambda: np.ones(3)], 4, iter(range(1000)).__next__)
    assert times.shape == (2, 4) and (times == 1000).all()
    row = {"net": "n", "bits": (2, 4), "threads": 1, "ms": {"provider": 1.0}, "ratios": {"int8": [0.5, 0.6]}}
    line = benchmark.line_of(row | {"creation": 1.2, "identical": False})
    assert line.endswith("/int8 0.500 (0.600)  creation 1.20  DIFFERENT") and "w2a4 x1" in line
    assert benchmark.processor()["onnxruntime"]
