"""Counts the instructions that an inference takes on emulated Arm processors, with and without int8 dot products.

    python benchmarks/export_latency.py --nets resnet18 mobilenet_v2 --no-brevitas --work /tmp/files
    python benchmarks/arm_instructions.py --files /tmp/files --json benchmarks/results/arm_instructions.json
    python benchmarks/lowbit.py --nets resnet18 --rounds 1 --folder /tmp/lowbit
    python benchmarks/arm_instructions.py --files /tmp/lowbit --names "{net}-224{variant}.onnx" --nets resnet18 \\
        --cpus cortex-a53 cortex-a72 --variants fp32 int8 w2a2 lowbit --json benchmarks/results/lowbit_arm.json
    python benchmarks/lowbit.py --nets resnet20 --rounds 1 --folder /tmp/lowbit
    python benchmarks/arm_instructions.py --files /tmp/lowbit --names "{net}-32{variant}.onnx" --nets resnet20 \\
        --cpus cortex-a72 --variants fp32 int8 w2a2 lowbit --json benchmarks/results/lowbit_arm.json --update

An emulator says nothing about time, but it executes the same instructions as the processor: the aarch64 wheel of
onnxruntime picks its kernels by the features that the processor reports. A qemu plugin counts them between two system
calls with which a process marks the inferences to count (after warm-up, one thread). Variant `lowbit` is the file of
`w2a2` with the low-bit execution provider, cross-compiled here (extra `[cross]`); its logits must equal those of `w2a2`
without it.

Needs gcc, apt-get on Debian 12 (its qemu-user 7.2 loads plugins; later builds are static and do not), and the aarch64
user space that `pytest -m slow tests/export/devices/test_emulated_arm.py` leaves in ~/.cache/qkd-toolkit. It does not
change the system.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_runs import changed_setup

from qkd.cli.options.values import output_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkd-toolkit"
PACKAGES = ("qemu-user", "libcapstone4", "libnuma1", "liburing2", "libglib2.0-0", "libgnutls30", "libnettle8",
            "libhogweed6", "libp11-kit0", "libtasn1-6", "libidn2-0", "libunistring2", "libgmp10")  # fmt: skip
# has dot products; part number, which pytorch's cpuinfo looks for in /proc/cpuinfo
CPUS = {"cortex-a53": (False, "0xd03"), "cortex-a72": (False, "0xd08"), "cortex-a76": (True, "0xd0b"),
        "neoverse-n1": (True, "0xd0c")}  # fmt: skip
FEATURES = "fp asimd aes pmull sha1 sha2 crc32"
DOT_FEATURES = " atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
VARIANTS = ("fp32", "int8", "w4a4", "w2a2", "lowbit")
ENDINGS = {"fp32": "", "int8": "-int8", "w4a4": "-w4a4-ort", "w2a2": "-w2a2-ort"}  # of the files from `lowbit.py`
NAMES = "{net}.{variant}.onnx"
PROVIDER = "LowBitExecutionProvider"
WARM_UP, COUNTED = 1, 1  # every inference gives the same count; the first one allocates
# `sched_get_priority_max` is call 125 there; nothing else in an inference makes it.
PLUGIN = r"""
#include <inttypes.h>
#include <stdio.h>
#include <stddef.h>
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
EXPORT int qemu_plugin_version = 1;
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, void (*)(plugin_id, unsigned int, int64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
static uint64_t count;
static void translated(plugin_id id, struct qemu_plugin_tb *tb) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &count, qemu_plugin_tb_n_insns(tb));
}
static void called(plugin_id id, unsigned int cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id; (void)cpu; (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; (void)g; (void)h;
  if (number == 125) fprintf(stderr, "instructions %" PRIu64 "\n", count);
}
EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  (void)info; (void)argc; (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
"""
GUEST = """
import hashlib, os, sys
import numpy, onnxruntime
path, library, warm_up, counted = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
providers = ["CPUExecutionProvider"]
if library:
    onnxruntime.register_execution_provider_library("PROVIDER", library)
    providers.insert(0, "PROVIDER")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
assert session.get_providers() == providers, session.get_providers()
entry = session.get_inputs()[0]
image = numpy.random.default_rng(0).standard_normal((1, *entry.shape[1:])).astype(numpy.float32)
for number in range(warm_up):
    session.run(None, {entry.name: image})
os.sched_get_priority_max(os.SCHED_OTHER)
for number in range(counted):
    logits = session.run(None, {entry.name: image})[0]
os.sched_get_priority_max(os.SCHED_OTHER)
print(onnxruntime.__version__, hashlib.sha256(logits.tobytes()).hexdigest())
""".replace("PROVIDER", PROVIDER)


@dataclass(frozen=True)
class Counted:
    """The counts of a process.

    Args:
        instructions: Instructions of one warm inference.
        version: Version of its onnxruntime.
        logits: Hash of the net's output.
    """

    instructions: int
    version: str
    logits: str


def fetch_emulator(folder: Path) -> Path:
    """Unpack Debian's emulator and its libraries into a folder, and build the plugin there; return the folder."""
    if not (folder / "root" / "usr/bin/qemu-aarch64").exists():
        (folder / "debs").mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder / "debs", check=True, capture_output=True)
        for package in (folder / "debs").glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    source = folder / "count.c"
    source.write_text(PLUGIN)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(folder / "count.so")], check=True)
    return folder


def lay_out(root: Path, emulator: Path, cpu: str) -> Path:
    """Return a copy of the user space (hard links) that has this processor's /proc/cpuinfo.

    This emulator shows the host's, which onnxruntime on aarch64 cannot read.
    """
    place = emulator / f"root-{cpu}"
    if not place.exists():
        shutil.copytree(root, place, symlinks=True, copy_function=os.link)
    has_dot_product, part = CPUS[cpu]
    lines = {"processor": "0", "BogoMIPS": "100.00", "Features": FEATURES + DOT_FEATURES * has_dot_product,
             "CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x0", "CPU part": part,
             "CPU revision": "1"}  # fmt: skip
    (place / "proc").mkdir(exist_ok=True)
    (place / "proc" / "cpuinfo").write_text("".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n")
    return place


def count(path: Path, library: str, cpu: str, emulator: Path, root: Path, site: Path) -> Counted:
    """Count the instructions of one warm inference of a file; ``library`` is that of a provider, or empty."""
    python = root / "usr/bin/python3.11"
    command = [str(emulator / "root/usr/bin/qemu-aarch64"), "-cpu", cpu, "-plugin", str(emulator / "count.so")]
    command += ["-E", f"PYTHONPATH={site}", "-E", "PYTHONDONTWRITEBYTECODE=1", "-L", str(root), str(python)]
    words = ["-c", GUEST, str(path), library, str(WARM_UP), str(COUNTED)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=_environment(emulator))
    counts = [int(value) for value in re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)]
    if done.returncode or len(counts) != 2:
        raise RuntimeError(f"{path.name} on {cpu}: exit code {done.returncode}: {done.stderr[-500:]}")
    version, logits = done.stdout.split()
    return Counted((counts[1] - counts[0]) // COUNTED, version, logits)


def emulator_version(emulator: Path) -> str:
    """Return the first line of the emulator's version output."""
    command = [str(emulator / "root/usr/bin/qemu-aarch64"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment(emulator))
    return done.stdout.splitlines()[0]


def _environment(emulator: Path) -> dict[str, str]:
    libraries = ":".join(str(emulator / "root" / part) for part in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
    return {**os.environ, "LD_LIBRARY_PATH": libraries}


def file_of(args: argparse.Namespace, net: str, variant: str) -> Path:
    """Return the file of a variant; the provider uses that of `w2a2`."""
    known = "w2a2" if variant == "lowbit" else variant
    ending = known if ".{variant}" in args.names else ENDINGS[known]
    return Path(args.files / args.names.format(net=net, variant=ending))


def measure(net: str, args: argparse.Namespace, emulator: Path) -> dict[str, Any]:
    """Return the counts of every variant of a net on every processor, and their ratios to full precision."""
    rows: dict[str, Any] = {}
    library = str(cross_library()) if "lowbit" in args.variants else ""
    for cpu in args.cpus:
        counted: dict[str, Counted] = {}
        root = lay_out(args.root, emulator, cpu)
        for variant in args.variants:
            place = library if variant == "lowbit" else ""
            counted[variant] = count(file_of(args, net, variant), place, cpu, emulator, root, args.site)
            print(f"{net} {variant} on {cpu}: {counted[variant].instructions / 1e6:.0f} M", file=sys.stderr, flush=True)
        rows[cpu] = row_of(cpu, counted)
    return rows


def row_of(cpu: str, counted: dict[str, Counted]) -> dict[str, Any]:
    """Return a processor's row: counts and ratios, and whether the provider changed the logits."""
    least = counted["fp32"]
    variants = {
        name: {"instructions": one.instructions, "over_fp32": round(one.instructions / least.instructions, 3)}
        for name, one in counted.items()
    }
    row = {"has_dot_product": CPUS[cpu][0], "onnxruntime": least.version, "variants": variants}
    if "lowbit" in counted:
        row["lowbit"] = {
            "identical": counted["lowbit"].logits == counted["w2a2"].logits,
            **{
                f"over_{other}": round(counted["lowbit"].instructions / counted[other].instructions, 3)
                for other in ("w2a2", "int8")
                if other in counted
            },
        }
    return row


def cross_library() -> Path:
    """Return the provider's library for aarch64, compiled here."""
    from export.lowbit.build import built_library
    from export.lowbit.cross import cross_toolchain

    return built_library(cross_toolchain("aarch64-linux"))


def main() -> None:
    """Parse the command line, count, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder that export_latency.py wrote (its --work)")
    parser.add_argument("--names", default=NAMES, help="pattern of its file names")
    parser.add_argument("--nets", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--cpus", nargs="+", default=list(CPUS), choices=list(CPUS))
    parser.add_argument("--root", type=Path, default=CACHE / "aarch64-python" / "root", help="aarch64 user space")
    parser.add_argument("--site", type=Path, default=CACHE / "aarch64-site-new" / "site", help="its packages")
    parser.add_argument("--emulator", type=Path, default=CACHE / "qemu-plugins", help="folder of the emulator")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="fp32 comes first")
    parser.add_argument("--json", type=output_file(".json"))
    parser.add_argument("--update", action="store_true", help="keep the JSON file's entries for other processors")
    args = parser.parse_args()
    if args.variants[0] != "fp32":
        parser.error("--variants must start with fp32, which the ratios are relative to")
    if "lowbit" in args.variants and "w2a2" not in args.variants:
        parser.error("lowbit is compared with w2a2: add w2a2 to --variants")
    emulator = fetch_emulator(args.emulator)
    updates = args.update and args.json and args.json.exists()
    earlier = json.loads(args.json.read_text()) if updates else {}
    setup = {"emulator": emulator_version(emulator)}
    if updates and (why := changed_setup(earlier, setup, setup)):
        parser.error(f"--update: {args.json}: {why}; give another --json")
    nets = {net: measure(net, args, emulator) for net in args.nets}
    command = shlex.join(["python", "benchmarks/arm_instructions.py", *sys.argv[1:]])
    if updates:
        known, command = earlier["nets"], f"{earlier['command']}; {command}"
        nets = {net: {**known.get(net, {}), **nets.get(net, {})} for net in {**known, **nets}}
    record = {
        "what": "instructions of one warm inference, batch 1, one thread, on emulated Arm processors",
        "command": command,
        "date": time.strftime("%Y-%m-%d"), **setup, "nets": nets,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
