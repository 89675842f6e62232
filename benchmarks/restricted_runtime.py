"""Makes a copy of ONNX Runtime that uses no instructions newer than AVX2, for measurements only.

The runtime picks its kernels by CPUID and has no switch for it. In a copy of the package, in a temporary folder, every
CPUID instruction becomes UD2, which has the same length and always traps; a small library that is loaded first catches
the trap, queries the processor, and removes AVX-512, AMX and VNNI from the answer. The installed package is not
changed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
TRAP = r"""
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

namespace {

// Bits of leaf 7: AVX-512 and its extensions, AMX; of its second part: VNNI in 256 bits, AVX-512 and AMX data types.
constexpr uint32_t kEbx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
constexpr uint32_t kEcx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
constexpr uint32_t kEdx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
constexpr uint32_t kSecondEax = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;
constexpr uint32_t kSecondEdx = 1u << 4 | 1u << 5 | 1u << 10 | 1u << 19;

void answer(int, siginfo_t*, void* context) {
    greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const uint8_t* const at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    if (at[0] != 0x0F || at[1] != 0x0B) {
        std::signal(SIGILL, SIG_DFL);
        return;
    }
    const uint32_t leaf = static_cast<uint32_t>(registers[REG_RAX]), part = static_cast<uint32_t>(registers[REG_RCX]);
    uint32_t a = leaf, b = 0, c = part, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (leaf == 7 && part == 0) b &= ~kEbx, c &= ~kEcx, d &= ~kEdx;
    if (leaf == 7 && part == 1) a &= ~kSecondEax, d &= ~kSecondEdx;
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) void install() {
    struct sigaction action;
    std::memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace
"""


def restricted_environment(folder: Path) -> dict[str, str]:
    """Copy the runtime and return the environment in which Python finds the copy.

    Args:
        folder: Folder for the package and the trap.

    Returns:
        A modified copy of this process's environment.

    Raises:
        RuntimeError: If no CPUID instruction is found in the runtime.
        subprocess.CalledProcessError: If objdump or the compiler fails.
    """
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise RuntimeError("onnxruntime is not installed")
    package = folder / "onnxruntime"
    shutil.copytree(Path(found.origin).parent, package)
    for library in package.glob("capi/onnxruntime_pybind11_state*.so"):
        forget_cpuid(library)
    source, trap = folder / "trap.cc", folder / "trap.so"
    source.write_text(TRAP, encoding="utf-8")
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", str(trap), str(source)], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_PRELOAD": str(trap)}


def forget_cpuid(library: Path) -> None:
    """Replace each CPUID instruction of a shared library, only at its disassembled address."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-j", ".text", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    addresses = [int(found, 16) for found in re.findall(r"^\s*([0-9a-f]+):\s+cpuid\s*$", text, re.MULTILINE)]
    if not addresses:
        raise RuntimeError(f"{library.name} has no CPUID instruction")
    shift = file_shift(library)
    content = bytearray(library.read_bytes())
    for address in addresses:
        place = address - shift
        if content[place : place + 2] != CPUID:
            raise RuntimeError(f"{library.name}: no CPUID at {place:#x}, although the disassembly has one there")
        content[place : place + 2] = UD2
    library.unlink()  # the copy may share storage with the original
    library.write_bytes(content)


def file_shift(library: Path) -> int:
    """Return the offset from positions in the file to addresses in .text."""
    text = subprocess.run(["objdump", "-h", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\.text\s+[0-9a-f]+\s+([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)", text)
    if found is None:
        raise RuntimeError(f"{library.name} has no .text section")
    return int(found[1], 16) - int(found[2], 16)
