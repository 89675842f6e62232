"""The cache of compiled libraries."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantizers.native import building
from quantizers.native.building import cached_library, compiled_library, cpp_compiler


def library(text: str):
    def make(folder: Path) -> Path:
        (folder / "object.o").write_text("")
        (folder / "made.so").write_text(text)
        return folder / "made.so"

    return make


def test_a_library_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cached_library("a.so", library("first"))
    assert first == tmp_path / "qkd" / "a.so" == cached_library("a.so", library("second"))
    assert first.read_text() == "first" and list((tmp_path / "qkd").iterdir()) == [first]


@pytest.mark.parametrize("is_read_only", [False, True])
def test_what_does_not_compile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read_only: bool
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    home.write_text("no folder") if is_read_only else home.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def fail(folder: Path) -> Path:
        (folder / "object.o").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached_library("a.so", fail)
    assert list(elsewhere.iterdir()) == []
    assert is_read_only or list((home / "qkd").iterdir()) == []


def test_without_a_cache_it_is_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cached_library("a.so", library("made")).read_text() == "made"


def test_the_compiler_that_is_named_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine++"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert cpp_compiler() == str(mine)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    assert cpp_compiler() is None


@pytest.mark.parametrize(
    "unknown", [some for size in range(4) for some in itertools.combinations(building.OPTIONAL, size)], ids=str
)
def test_a_compiler_does_without_flags_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = tmp_path / "c++"  # writes its arguments to the library
    refusals = "".join(f'case "$*" in *{flag}*) exit 1;; esac\n' for flag in unknown)
    compiler.write_text(
        f'#!/bin/sh\n{refusals}echo "$*" >> {tmp_path}/calls\n'
        'while [ "$1" != -o ]; do shift; done\ntail -n 1 ' + f'{tmp_path}/calls > "$2"\n'
    )
    compiler.chmod(0o755)
    flags = ("-O3", "-march=native", building.WIDE)
    made = [compiled_library("a", "int x;", flags, str(compiler), parallel=True) for _ in range(2)]
    assert made[0] == made[1] and made[0].name.startswith("a-")
    used = made[0].read_text().split()
    assert set(used) & {"-O3", *building.OPTIONAL} == {"-O3", *building.OPTIONAL} - set(unknown)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1, "the second time it is in the cache"
    other = compiled_library("a", "int y;", flags, str(compiler))
    assert other != made[0] and "-fopenmp" not in other.read_text()


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(subprocess.CalledProcessError, match="false"):
        compiled_library("a", "int x;", (), str(shutil.which("false")))


def elf(machine: int = 62, size: int = 4096) -> bytes:
    """Return a library's header as far as it is looked at: its sections end the file."""
    head = bytearray(size)
    head[:6] = b"\x7fELF\x02\x01"
    head[18:20], head[40:48] = machine.to_bytes(2, "little"), (size - 64).to_bytes(8, "little")
    head[58:60], head[60:62] = (64).to_bytes(2, "little"), (1).to_bytes(2, "little")
    return bytes(head)


def test_a_library_that_would_end_the_process_is_seen(tmp_path: Path) -> None:
    library = tmp_path / "l.so"
    for content, machine, words in (
        (elf(), "x86_64", ""), (elf(), "AMD64", ""), (elf(183), "aarch64", ""), (b"junk", "x86_64", ""),
        (b"", "x86_64", "it is cut off"), (elf()[:32], "x86_64", "it is cut off"),
        (bytes(99), "x86_64", "it is cut off"),
        (elf()[:-1], "x86_64", "it is cut off"), (elf(183), "x86_64", "it is for aarch64, not for x86_64"),
        (elf(), "arm64", "it is for x86_64, not for aarch64"), (elf(), "sparc", ""),
    ):  # fmt: skip
        library.write_bytes(content)
        assert building.library_fault(library, machine) == words
    assert building.library_fault(Path(sys.executable).resolve()) == ""


def test_a_damaged_library_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(content: bytes) -> Any:
        def write(folder: Path) -> Path:
            (folder / "made.so").write_bytes(content)
            return folder / "made.so"

        return write

    path = building.cached_library("l.so", make(elf()), "x86_64")
    path.write_bytes(elf()[:1000])
    left = tmp_path / "qkd" / "tmpold"
    left.mkdir()
    os.utime(left, (0, 0))
    assert building.cached_library("l.so", make(elf()), "x86_64").read_bytes() == elf()
    assert [one.name for one in (tmp_path / "qkd").iterdir()] == ["l.so"], "and what a killed one left is gone"
    with pytest.raises(OSError, match="the compiler wrote a file that cannot be loaded: it is cut off"):
        building.cached_library("other.so", make(elf()[:1000]), "x86_64")
    assert [one.name for one in (tmp_path / "qkd").iterdir()] == ["l.so"]
