"""Prints the result tables of README and docs from the files in `results/`; a test keeps both in sync.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from install_size import table as size_table

RESULTS = Path(__file__).resolve().parent / "results"
LATENCY_FILES = ("export_latency_avx2.json", "export_latency_vnni.json")
LATENCY_NETS = {"resnet18": "ResNet-18, 224x224", "alexnet": "AlexNet", "mobilenet_v2": "MobileNetV2"}
BITS = ("w4a4", "w2a2")
RUNTIME_NETS = {"lenet5": "LeNet-5", "resnet18": "ResNet-18", "mobilenet_v2": "MobileNetV2"}
RUNTIME_TITLES = {"": "ONNX Runtime", ", low-bit provider": "with the low-bit provider", ", OpenVINO": "OpenVINO"}


def read(name: str) -> Any:
    """Return the content of a results file."""
    return json.loads((RESULTS / name).read_text())


def latency_rows() -> list[str]:
    """Return the table of latencies: W4A4 and W2A2 over full precision and over static int8, on two processors."""
    slow, fast = (read(name)["nets"] for name in LATENCY_FILES)
    rows = [
        "| batch 1, one thread; W4A4, W2A2 | / FP32, AVX2 | / FP32, VNNI | / static int8, AVX2 | / static int8, VNNI "
        "| FP32 file / ours |",
        "|---|---|---|---|---|---|",
    ]
    for net, title in LATENCY_NETS.items():
        cells = [_pair(nets[net]["variants"], key) for key in ("over_fp32", "over_int8") for nets in (slow, fast)]
        rows.append(f"| {' | '.join([title, *cells, _sizes(slow[net]['variants'])])} |")
    return rows


def _pair(variants: Any, key: str, digits: int = 2, ending: str = "") -> str:
    return ", ".join(f"{variants[bits + ending][key]:.{digits}f}" for bits in BITS)


def _sizes(variants: Any) -> str:
    text = _pair(variants, "fp32_size_over", 1)
    return (
        f"{text} (4-bit last layer: {_pair(variants, 'fp32_size_over', 1, '-last4')})"
        if "w4a4-last4" in variants
        else text
    )


def accuracy_rows() -> list[str]:
    """Return the table of last-epoch accuracies: mean and standard deviation over the seeds that passed parity."""
    rows = ["| what | teacher | W4A4 | W2A2 | W2A2, labels alone |", "|---|---|---|---|---|"]
    for title, name, folder in (
        ("digits, ResNet-20 (359 test images)", "accuracy_digits.json", "digits"),
        ("Fashion-MNIST, ResNet-20, 15,000 training images, 2 epochs of student", "accuracy_fashion_mnist.json",
         "fashion-mnist"),
    ):  # fmt: skip
        summary = read(name)["summary"]
        keys = ["teacher", *(f"configs/{folder}/{config}.yaml" for config in ("w4a4", "w2a2", "w2a2-plain"))]
        rows.append(f"| {' | '.join([title, *(_accuracy(summary.get(key)) for key in keys)])} |")
    return rows


def _accuracy(found: Any) -> str:
    if not found or not found["seeds"]:
        return ""
    if found["seeds"] == 1:
        return f"{100 * found['mean']:.1f} % (1 seed)"
    return f"{100 * found['mean']:.1f} ± {100 * found['stdev']:.1f} % ({found['seeds']} seeds)"


def runtime_rows() -> list[str]:
    """Return the table of runtimes: each form of a net in each runtime, as shares of FP32 in ONNX Runtime."""
    codes = [f"w{bits}a{bits}" for bits in read("runtimes.json")["settings"]["bits"]]
    heads = ["FP32", "int8", *(code.upper() for code in codes)]
    rows = [f"| batch 1, one thread | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for entry, found in read("runtimes.json")["nets"].items():
        net, size = entry.split(":")
        shares = {row["name"]: row["to_fp32"] for row in found}
        for ending, title in RUNTIME_TITLES.items():
            names = [f"{name}{ending}" for name in ("fp32", "int8")]
            names += [f"{code} for openvino{ending}" if "OpenVINO" in ending else f"{code}{ending}" for code in codes]
            cells = [f"{shares[name]:.2f}" if name in shares else "" for name in names]
            if any(cells):
                rows.append(f"| {RUNTIME_NETS[net]}, {size}x{size}: {title} | {' | '.join(cells)} |")
    return rows


def ladder_rows() -> list[str]:
    """Return the table of the nets trained on CIFAR-10 on a GPU, with every seed, even failed ones."""
    former, found = (read(name)["rungs"] for name in ("gpu_ladder.json", "gpu_ladder_cifar10.json"))
    titles = {"fp": "FP, labels alone", "large": "teacher: ResNet-18 at 0.75 of its width",
              "w4a4": "W4A4", "w2a2": "W2A2"}  # fmt: skip
    rows = {row["rung"]["name"]: row for row in [*found, former[0]]}
    lines = ["| CIFAR-10, ResNet-20 | epochs | test accuracy, one figure per seed |", "|---|---|---|"]
    for name, title in titles.items():
        scores = ", ".join(f"{100 * one:.1f} %" for one in rows[name]["test_accuracy"])
        lines.append(f"| {title} | {len(rows[name]['epochs'])} | {scores} |")
    return lines


def step_size_rows() -> list[str]:
    """Return the table of 2-bit trainings with free and with bounded step sizes."""
    lines = ["| data | peak rate | step sizes | largest change in one step | test accuracy |", "|---|---|---|---|---|"]
    for name, title in {"digits": "digits", "fashion-mnist": "Fashion-MNIST, 4,096 images"}.items():
        for row in read(f"step_sizes_{name}.json")["rows"]:
            bound = "unbounded" if row["bound"] is None else f"bounded by {row['bound']:g}"
            cells = [title, f"{row['lr']:g}", bound, _times(row["largest_change"]), _accuracy(row["test_accuracy"])]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _times(part: float) -> str:
    return f"{100 * part:.0f} %" if part < 1 else f"{part:,.0f}x"


def front_rows() -> list[str]:
    """Return the README's first table: one net in FP32, int8, W4A4 and W2A2, from the file of the picture above it."""
    rows = ["| ResNet-20, Fashion-MNIST | test accuracy | file | latency | against FP32 |", "|---|---|---|---|---|"]
    found = read("tradeoff.json")["rows"]
    whole = next(iter(found.values()))
    for name, row in found.items():
        size, time = whole["bytes"] / row["bytes"], whole["median_ms"] / row["median_ms"]
        gain = "" if row is whole else f"{size:.1f} times smaller, {time:.1f} times faster"
        cells = [name, f"{100 * row['accuracy']:.2f} %", f"{row['bytes'] / 1000:,.0f} kB", f"{row['median_ms']:.2f} ms"]
        rows.append(f"| {' | '.join([*cells, gain])} |")
    return rows


def size_rows() -> list[str]:
    """Return the table of installation sizes."""
    return size_table(read("install_size.json"))


def figures() -> dict[str, str]:
    """Return the single figures in sentences of README and docs, with the exact words around them."""
    slow, fast = (read(name)["nets"]["resnet18"]["variants"] for name in LATENCY_FILES)
    step, augment = read("train_step_avx2.json")["results"], read("augment_throughput.json")
    bf16, amx, avx512 = (read(f"train_step{kind}.json")["results"] for kind in ("", "_amx", "_avx512"))
    ratios = [augment[key]["ratios"] for key in ("32x32, batch 256", "224x224, batch 32")]
    native = [row["torchvision_pil/ours_randaugment"] for row in ratios]
    avx2 = read("augment_throughput_avx2.json")["224x224, batch 32"]["ratios"]["torchvision_pil/ours_randaugment"]
    arm = read("arm_instructions.json")["nets"]["resnet18"]
    int8 = {cpu: row["variants"]["int8"]["over_fp32"] for cpu, row in arm.items()}
    ours = {cpu: row["variants"]["w4a4"]["over_fp32"] for cpu, row in arm.items()}
    return {
        "brevitas": f"slower than FP32 ({slow['brevitas']['over_fp32']:.2f} with AVX2); the same bits exported by this "
        f"toolkit take {slow['w4a4']['over_brevitas']:.2f} of its time",
        "vnni": f"int8 takes {fast['int8']['over_fp32']:.2f} of FP32's time with VNNI, "
        f"{slow['int8']['over_fp32']:.2f} without",
        "step": f"takes {step['ours_w4a4']['ratio_to_float']:.2f} times as long as a float step (stock Brevitas: "
        f"{step['stock_w4a4']['ratio_to_float']:.1f} times)",
        "step against plain PyTorch": f"takes {bf16['ours_w2a2']['ratio_to_plain']:.2f} of the time of plain PyTorch "
        f"in float32 at 2 bits and {bf16['ours_w4a4']['ratio_to_plain']:.2f} at 4 bits; with AVX2 "
        f"{step['ours_w2a2']['ratio_to_plain']:.2f} and {step['ours_w4a4']['ratio_to_plain']:.2f}",
        "step with AMX": f"{_both(amx, 'ratio_to_plain')}, and {_both(amx, 'ratio_to_float')} times as long as a float "
        "step in bfloat16",
        "step without AMX": f"so the toolkit chooses float32: {_both(avx512, 'ratio_to_plain')} of plain PyTorch",
        **_scaling(),
        "augment": f"Against torchvision's RandAugment on PIL images it is {native[0]:.0f} times as fast at 32x32 and "
        f"{native[1]:.1f} times at 224x224 ({avx2:.1f} times where it is compiled for AVX2)",
        "sizes": f"ResNet-18 is {slow['w4a4']['fp32_size_over']:.1f} times smaller than FP32 at 4 bits and "
        f"{slow['w2a2']['fp32_size_over']:.1f} times at 2 bits",
        "size against int8": f"{slow['w2a2']['size_bytes'] / slow['int8']['size_bytes']:.2f} times the size of "
        "static int8 for ResNet-18",
        "installation": f"{read('install_size.json')['megabytes']['GPU libraries'] / 1000:.1f} GB that a laptop",
        "arm": f"int8 executes {int8['cortex-a72']:.2f} of FP32's instructions on a Cortex-A72, which has no "
        f"dot products, and {int8['cortex-a76']:.2f} on a Cortex-A76, which has them; a W4A4 student executes "
        f"{ours['cortex-a72']:.2f} and {ours['cortex-a76']:.2f}",
        **_runtime_figures(),
        **_low_bit_figures(),
        **{f"data-free, {row.split(' | ')[0]}": row for row in data_free_rows()},
        **_sampling_figures(),
    }


def _both(results: dict[str, Any], ratio: str) -> str:
    """Return a ratio of the students of two and four bits."""
    return f"{results['ours_w2a2'][ratio]:.2f} and {results['ours_w4a4'][ratio]:.2f}"


def _scaling() -> dict[str, str]:
    """Return how many times the steps of one process two processes make: rows of a table, and a sentence."""

    def times(file: str, variant: str, key: str = "efficiency") -> str:
        return f"{2 * read(file)['results'][variant][key]:.2f}"

    keys, variants = ("efficiency", "efficiency_own_statistics", "efficiency_apart"), ("float", "ours_w2a2")
    rows = {}
    for name, title in (("amx", "with AMX, bfloat16"), ("avx512", "without AMX, float32")):
        for variant, head in zip(variants, (f"| Intel Xeon {title} | float |", "| | 2 bits |"), strict=True):
            cells = " | ".join(times(f"train_step_devices_{name}.json", variant, key) for key in keys)
            rows[f"two processes, {name}, {variant}"] = f"{head} {cells} |"
    before = [times("train_step_devices.json", variant) for variant in variants]
    sentence = f"On an AMD machine, an earlier version took {before[0]} and {before[1]} times as many steps"
    return {**rows, "two processes, before": sentence}


def _runtime_figures() -> dict[str, str]:
    web = {
        net: {row["name"]: f"{row['to_fp32']:.2f}" for row in rows}
        for net, rows in read("web_latency.json")["nets"].items()
    }
    deep, wide = web["resnet18:96"], web["mobilenet_v2:96"]
    size = {
        (row["student"], row["tool"]): f"{row['bytes'] / 1000:.1f} kB" for row in read("rewritten_files.json")["rows"]
    }
    two, four = ([size[code, tool] for tool in ("export", "ORT format", "onnxslim")] for code in ("w2a2", "w4a4"))
    rows = {row["name"]: row["to_fp32"] for row in read("runtimes_compilers.json")["nets"]["lenet5:28"]}
    compiled = [f"{rows[name]:.1f}" for name in ("w4a4 for iree, IREE", "w4a4 for tvm, TVM")]
    return {
        "compilers": f"take {compiled[0]} and {compiled[1]} times FP32's time in ONNX Runtime for LeNet-5 W4A4",
        "web": f"W4A4 and W2A2 take {deep['w4a4']} and {deep['w2a2']} of FP32's time (static int8 {deep['int8']}), but "
        f"for MobileNetV2 {wide['w4a4']} and {wide['w2a2']} (static int8 {wide['int8']})",
        "rewritten": f"A W2A2 student of {two[0]} becomes {two[1]} in the ORT format and {two[2]} with onnxslim, a "
        f"W4A4 student of {four[0]} {four[1]} and {four[2]}",
    }


def _low_bit_figures() -> dict[str, str]:
    ratios = {
        (name, row["net"], *row["bits"]): row["ms"]["provider"] / row["ms"]["int8"]  # of minima
        for name in ("amx", "avx512", "avx2")
        for row in read(f"lowbit_{name}.json")["rows"]
        if row["threads"] == 1
    }
    vbmi = [ratios["avx512", net, 2, 2] for net in ("resnet18", "resnet50", "mobilenet_v2")]
    avx2 = [ratios["avx2", "resnet18", bits, bits] for bits in (2, 4)]
    amx = [ratios["amx", "resnet18", bits, bits] for bits in (2, 4)] + [ratios["amx", "resnet50", 2, 2]]
    nets = read("lowbit_arm.json")["nets"]
    arm = [nets[net]["cortex-a72"]["lowbit"]["over_int8"] for net in ("resnet18", "resnet20")]
    return {
        "low-bit": f"ResNet-18 W2A2 takes {vbmi[0]:.2f} of static int8's time, ResNet-50 {vbmi[1]:.2f}, MobileNetV2 "
        f"{vbmi[2]:.2f}; with AVX2 alone, ResNet-18 W2A2 takes {avx2[0]:.2f} and W4A4 {avx2[1]:.2f}",
        "low-bit with AMX": f"ResNet-18 takes {amx[0]:.2f} of static int8's time at W2A2 and {amx[1]:.2f} at W4A4, "
        f"ResNet-50 W2A2 {amx[2]:.2f}",
        "low-bit on Arm": f"executes {arm[0]:.2f} of int8's instructions for ResNet-18 W2A2, {arm[1]:.2f} for "
        "ResNet-20",
    }


def data_free_rows() -> list[str]:
    """Return the lines of the table of data-free methods, without its heading."""
    titles = {"real": "real images", "noise": "images of noise", "rdskd": "RDSKD", "dafl": "DAFL"}
    rows = [(titles[row["method"]], row) for row in read("data_free.json")["rows"]]
    frozen = {"noise": "ResNet-8 -> ResNet-8, statistics frozen, noise", "gdfq": "the same, GDFQ"}
    rows += [(frozen[row["method"]], {**row, "float": None}) for row in read("data_free_statistics.json")["rows"]]
    return [f"| {title} | {' | '.join(_mean(row[key]) for key in ('float', 'w4a4', 'w2a2'))} |" for title, row in rows]


def _mean(found: Any) -> str:
    if found is None:
        return ""
    return f"{100 * found['mean']:.1f} %" if found["seeds"] else "not run"


def _sampling_figures() -> dict[str, str]:
    many = next(row for row in read("class_sampling.json")["rows"] if row["classes"] == 100_000)
    return {
        "class sampling": f"At 100,000 classes, with {many['drawn']:,} of them drawn, a step takes "
        f"{many['time_ratio']:.2f} of the full one's time and {many['memory_ratio']:.2f} of its memory; drawing by "
        f"the nets' difference has {many['difference_over_uniform']:.3f} of the variance of drawing uniformly",
    }


def main() -> None:
    """Print the tables and the sentences."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for part in (front_rows, latency_rows, runtime_rows, accuracy_rows, ladder_rows, step_size_rows, size_rows):
        print("\n".join(part()), end="\n\n")
    print("\n".join(f"{name}: {text}" for name, text in figures().items()))


if __name__ == "__main__":
    main()
