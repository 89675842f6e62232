"""Nets with the provider give what they give without it, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export import lowbit

Session = Callable[..., Any]
Claimed = Callable[[], list[list[str]]]
Nets = Callable[[int], tuple[bytes, tuple[int, int]]]


def look_ups(kinds: list[str]) -> int:
    return kinds.count("lut_conv") + kinds.count("narrow_conv")


def has_tiles() -> bool:
    """Whether the kernels multiply all bit widths in the same way, so that nothing is looked up."""
    return lowbit.availability().kernels in ("amx", "amx_emulated")


def low_bit_layers(kinds: list[str]) -> int:
    """How many convolutions of a region may be those of few bits."""
    return kinds.count("dot_conv") if has_tiles() else look_ups(kinds)


def images(seed: int, batch: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    smooth = rng.random((batch, 3, *size), np.float32) * rng.random((batch, 3, 1, 1), np.float32)
    return smooth.astype(np.float32)


def check_nets(seeds: range, random_net: Nets, make_session: Session, claimed: Claimed) -> int:
    low_bit_nets = 0
    for seed in seeds:
        model, size = random_net(seed)
        plain, ours = make_session(model, provider=False), make_session(model, provider=True)
        for batch in (1, 3):
            x = {"images": images(seed, batch, size)}
            for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"net {seed}, batch {batch}")
        assert any(np.unique(y).size > 4 for y in plain.run(None, x)), (
            f"net {seed} is saturated: it would prove nothing"
        )
        del ours
        gc.collect()
        low_bit_nets += any(map(low_bit_layers, claimed()))
    return low_bit_nets


def test_random_nets_are_identical(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    assert check_nets(range(24), random_net, make_session, claimed) >= 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_nets_are_identical(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    assert check_nets(range(100, 320), random_net, make_session, claimed) >= 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("isa", ["amx_emulated", "avx512", "avx2", "portable"])
def test_many_random_nets_are_identical_with_other_kernels(isa: str) -> None:
    """The same 220 nets, in a separate process."""
    root = Path(__file__).resolve().parents[3]
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*words, "-k", "test_many_random_nets_are_identical and not other_kernels"],
        cwd=root, env={**os.environ, "LOWBIT_ISA": isa}, capture_output=True, text=True, timeout=3500, check=False,
    )  # fmt: skip
    if "is not one that this processor" in done.stdout:
        pytest.skip("this processor lacks that instruction set")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ["amx_emulated", "avx512", "avx2", "portable"])
def test_other_kernels_are_identical_too(
    isa: str, monkeypatch: pytest.MonkeyPatch, random_net: Nets, make_session: Session
) -> None:
    """In a separate process, for a library chooses its kernels when it is registered."""
    script = f"""
import numpy as np, onnxruntime
from export import lowbit
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
x = {{"images": np.random.default_rng(0).random((2, 3, *{random_net(5)[1]}), np.float32)}}
model = open("net.onnx", "rb").read()
providers = [lowbit.register(), "CPUExecutionProvider"]
ours = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
plain = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
assert lowbit.availability().kernels == "{isa}"
assert all(np.array_equal(a, b) for a, b in zip(ours.run(None, x), plain.run(None, x)))
print("same")
"""
    run_script(script, random_net(5)[0], {"LOWBIT_ISA": isa})


def run_script(script: str, model: bytes, environment: dict[str, str], expected: str = "same") -> None:
    """Run Python in an empty folder with a model in it."""
    root = Path(__file__).resolve().parents[3]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "net.onnx").write_bytes(model)
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(root), **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if "is not one that this processor" in done.stderr:
        pytest.skip("this processor lacks that instruction set")
    assert done.stdout.strip() == expected, done.stderr[-2000:]


def test_threads_and_concurrent_runs_are_identical(random_net: Nets, make_session: Session) -> None:
    """Two threads of the runtime, and one session run from eight threads at once."""
    model, size = random_net(7)
    inputs = [{"images": images(seed, 1 + seed % 3, size)} for seed in range(8)]
    plain, ours = make_session(model, provider=False), make_session(model, provider=True, threads=2)
    expected = [plain.run(None, x) for x in inputs]

    def is_right(place: int) -> bool:
        found = [ours.run(None, inputs[place]) for _ in range(3)]
        return all(np.array_equal(a, b) for one in found for a, b in zip(one, expected[place], strict=True))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert list(pool.map(is_right, range(len(inputs)))) == [True] * 8


def student_of(net: Any, image: Any, path: Path, flavor: str, **spec: Any) -> Path:
    from export import export_onnx
    from quantizers import QuantSpec, calibrate, prepare, settle

    student = prepare(net.eval(), QuantSpec(**spec), example_inputs=image[:1])
    calibrate(student, [image])
    settle(student)
    export_onnx(student.eval(), image[:1], path, flavor=flavor)
    return path


@pytest.mark.parametrize("flavor", ["ort", "qcdq"])
def test_a_student_is_one_region_and_identical(
    flavor: str, tmp_path: Path, make_session: Session, claimed: Claimed
) -> None:
    """The toolkit's own export: first layer, sums, changes of grid and low-bit layers, all in one node."""
    import torch

    from qkd.nets import build_net

    torch.manual_seed(0)
    net = build_net("resnet8", classes=10, channels=3, image_size=16).train()
    image = torch.randn(16, 3, 16, 16)
    net(image)
    path = student_of(net, image, tmp_path / "student.onnx", flavor, weight_bits=2, act_bits=2)
    plain, ours = make_session(path, provider=False), make_session(path, provider=True)
    for batch in (1, 5):
        x = {plain.get_inputs()[0].name: image[:batch].numpy()}
        np.testing.assert_array_equal(plain.run(None, x)[0], ours.run(None, x)[0])
    del ours
    gc.collect()
    (kinds,) = claimed()
    convolutions = (9, 0) if has_tiles() else (1, 8)
    assert (kinds.count("dot_conv"), look_ups(kinds)) == convolutions and kinds.count("add") == 3


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
def test_wider_students_are_left_alone(
    bits: tuple[int, int], tmp_path: Path, make_session: Session, claimed: Claimed
) -> None:
    if has_tiles() and bits == (4, 4):
        pytest.skip("these kernels take up to four bits")
    import torch

    from qkd.nets import build_net

    image = torch.randn(8, 3, 16, 16)
    net = build_net("resnet8", classes=10, channels=3, image_size=16)
    path = student_of(net, image, tmp_path / "s.onnx", "ort", weight_bits=bits[0], act_bits=bits[1])
    ours = make_session(path, provider=True)
    ours.run(None, {ours.get_inputs()[0].name: image[:1].numpy()})
    del ours
    gc.collect()
    assert claimed() == []


def weakened(model: onnx.ModelProto, change: str) -> None:
    """Change one thing about the first 2-bit convolution that makes it another function, or one not understood."""
    convs = [node for node in model.graph.node if node.op_type == "Conv"][1:]
    conv = next(node for node in convs if all(one.i == 1 for one in node.attribute if one.name == "group"))
    attributes = {one.name: one for one in conv.attribute}
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {one.name: one for one in model.graph.initializer}
    weights = constants[makers[conv.input[1]].input[0]]
    codes = onnx.numpy_helper.to_array(weights).copy()
    if change == "auto_pad":
        conv.attribute.remove(attributes["pads"])
        conv.attribute.append(onnx.helper.make_attribute("auto_pad", "SAME_UPPER"))
    elif change == "weight":
        codes.flat[0] = 4  # three bits hold -4 ... 3
        weights.CopyFrom(onnx.numpy_helper.from_array(codes, weights.name))
    elif change == "weight_zero":
        zeros = constants[makers[conv.input[1]].input[2]]
        zeros.CopyFrom(onnx.numpy_helper.from_array(np.full(zeros.dims, 1, np.int8), zeros.name))
    elif change == "bias_scale":  # 0 times NaN is NaN
        maker = makers[conv.input[2]]
        for name, kind, value in ((maker.input[0], np.int32, 0), (maker.input[1], np.float32, np.nan)):
            values = onnx.numpy_helper.to_array(constants[name]).astype(kind).copy()
            values[0] = value
            constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    elif change == "clip":
        reader = next(node for node in model.graph.node if node.op_type == "Clip")
        constants[reader.input[2]].CopyFrom(onnx.numpy_helper.from_array(np.uint8(16), reader.input[2]))


@pytest.mark.parametrize("change", ["auto_pad", "weight", "weight_zero", "clip", "bias_scale"])
def test_what_is_not_two_bits_is_not_taken_for_it(
    change: str, random_net: Nets, make_session: Session, claimed: Claimed
) -> None:
    seed = 12
    content, size = random_net(seed)
    model = onnx.load_from_string(content)
    weakened(model, change)
    x = {"images": images(1, 2, size)}
    counts = []
    for one in (content, model.SerializeToString()):
        try:
            plain = make_session(one, provider=False)
            expected = plain.run(None, x)
        except Exception:  # the change can make the file invalid (shapes): then it is refused with and without
            with pytest.raises(Exception):  # noqa: B017
                make_session(one, provider=True).run(None, x)
            return
        ours = make_session(one, provider=True)
        for a, b in zip(expected, ours.run(None, x), strict=True):
            np.testing.assert_array_equal(a, b)
        del ours
        gc.collect()
        counts.append(sum(map(low_bit_layers, claimed())))
    if has_tiles() and change not in ("auto_pad", "bias_scale"):  # they take what is left, too
        assert counts[1] == counts[0]
    else:
        assert counts[1] < counts[0] or change == "weight_zero"


def of_mixed_widths(content: bytes, rng: np.random.Generator) -> bytes:
    """Every other layer gets a weight of three bits, so that layers of one tensor look up in different ways."""
    model = onnx.load_from_string(content)
    for constant in model.graph.initializer:
        weights = onnx.numpy_helper.to_array(constant).copy() if len(constant.dims) == 4 else np.zeros(0)
        if weights.size and weights.min() >= -2 and weights.max() <= 1 and rng.random() < 0.5:
            weights.flat[int(rng.integers(weights.size))] = 2
            constant.CopyFrom(onnx.numpy_helper.from_array(weights, constant.name))
    return bytes(model.SerializeToString())


def check_mixed_widths(seeds: Sequence[int], random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    rng, low_bit_nets = np.random.default_rng(11), 0
    for seed in seeds:
        content, size = random_net(seed)
        model = of_mixed_widths(content, rng)
        plain, ours = make_session(model, provider=False), make_session(model, provider=True)
        x = {"images": images(seed, 2, size)}
        for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"net {seed}")
        del ours
        gc.collect()
        low_bit_nets += any(map(low_bit_layers, claimed()))
    assert low_bit_nets >= 0.8 * len(seeds)


def test_layers_of_one_tensor_may_have_weights_of_other_widths(
    random_net: Nets, make_session: Session, claimed: Claimed
) -> None:
    check_mixed_widths([*range(10), 52, 52, 52], random_net, make_session, claimed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_layers_of_many_widths(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    check_mixed_widths(range(400, 520), random_net, make_session, claimed)


def spoiled(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with something wrong: cut off, bytes changed, or attributes and shapes that nobody means."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(1, len(content))]
    if kind == 1:
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 8):
            changed[place] = rng.integers(256)
        return bytes(changed)
    model = onnx.load_from_string(content)
    absurd = [-1, 0, 7, 1000, 2**31, 2**62, -(2**62)]
    nodes = [node for node in model.graph.node if node.attribute]
    node = nodes[rng.integers(len(nodes))]
    if kind == 2:
        attribute = node.attribute[rng.integers(len(node.attribute))]
        if attribute.ints:
            attribute.ints[int(rng.integers(len(attribute.ints)))] = int(rng.choice(absurd))
            if rng.random() < 0.3:
                attribute.ints.extend([1] * int(rng.choice([1, 100])))
        else:
            attribute.i = int(rng.choice(absurd))
    else:
        constant = model.graph.initializer[rng.integers(len(model.graph.initializer))]
        if constant.dims:
            constant.dims[int(rng.integers(len(constant.dims)))] = int(rng.choice(absurd))
        else:
            constant.CopyFrom(
                onnx.numpy_helper.from_array(np.float32(rng.choice([0, -1, np.inf, np.nan])), constant.name)
            )
    return bytes(model.SerializeToString())


FUZZ = """
import glob, numpy as np, onnxruntime
from export import lowbit
name = lowbit.register()
for path in sorted(glob.glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    answers = []
    for providers in (["CPUExecutionProvider"], [name, "CPUExecutionProvider"]):
        try:
            session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
            shape = [side if isinstance(side, int) else 1 for side in session.get_inputs()[0].shape]
            answers.append(session.run(None, {"images": np.random.default_rng(0).random(shape, np.float32)}))
        except Exception as error:
            answers.append(None)
    a, b = answers
    assert (a is None) == (b is None), path
    assert a is None or all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b)), path
print("same")
"""


def check_spoiled_files(nets: range, each: int, tmp_path: Path, random_net: Nets, environment: dict[str, str]) -> None:
    rng = np.random.default_rng(3)
    for seed in nets:
        content, _ = random_net(seed)
        for number in range(each):
            (tmp_path / f"{seed}-{number}.onnx").write_bytes(spoiled(content, rng))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", FUZZ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    if "LowBitUnavailableError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout.strip().endswith("same"), (done.returncode, done.stderr[-2000:])


def test_spoiled_files_are_refused_or_left_alone(tmp_path: Path, random_net: Nets) -> None:
    """Truncated, changed bytes, absurd attributes and shapes: the same answer as without the provider, no crash."""
    check_spoiled_files(range(3), 20, tmp_path, random_net, {})


def test_a_branch_that_nobody_reads_is_left_alone(make_session: Session) -> None:
    """Two branches of low bits, and only one of them leads to the output."""
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    codes = np.random.default_rng(0).integers(-1, 2, (32, 32, 3, 3)).astype(np.int8)
    constants = {
        "step": np.float32(0.5), "other": np.float32(0.25), "zero": np.uint8(0), "top": np.uint8(3), "w": codes,
        "w_step": np.float32(0.1), "w_zero": np.int8(0),
    }  # fmt: skip

    def branch(name: str, step: str) -> list[onnx.NodeProto]:
        return [
            make("QuantizeLinear", ["images", step, "zero"], [name + "_q"]),
            make("Clip", [name + "_q", "zero", "top"], [name + "_c"]),
            make("DequantizeLinear", [name + "_c", step, "zero"], [name + "_x"]),
            make("DequantizeLinear", ["w", "w_step", "w_zero"], [name + "_w"]),
            make("Conv", [name + "_x", name + "_w"], [name + "_y"], pads=[1] * 4),
            make("QuantizeLinear", [name + "_y", "step", "zero"], [name + "_codes"]),
        ]

    nodes = [*branch("read", "step"), make("DequantizeLinear", ["read_codes", "step", "zero"], ["out"])]
    port = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*nodes, *branch("unread", "other")], "branches", [port("images", onnx.TensorProto.FLOAT, ["n", 32, 8, 8])],
        [port("out", onnx.TensorProto.FLOAT, None)], [tensor(np.asarray(one), key) for key, one in constants.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x = {"images": np.random.default_rng(1).random((2, 32, 8, 8), np.float32) * 2}
    plain, ours = (make_session(model.SerializeToString(), provider=used).run(None, x)[0] for used in (False, True))
    assert plain.any() and np.array_equal(plain, ours)


@pytest.mark.slow
def test_many_spoiled_files(tmp_path: Path, random_net: Nets) -> None:
    check_spoiled_files(range(50, 80), 30, tmp_path, random_net, {})


def test_a_session_that_never_ran_has_no_times(
    tmp_path: Path, random_net: Nets, make_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.jsonl"
    monkeypatch.setenv("LOWBIT_PROFILE", str(path))
    session = make_session(random_net(5)[0], provider=True)
    del session
    gc.collect()
    times = [op["nanoseconds"] for line in path.read_text().splitlines() for op in json.loads(line)["operations"]]
    assert times and set(times) == {None}


def test_a_profile_is_json_whatever_the_names(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    for seed in range(30):
        model, size = onnx.load_model_from_string((net := random_net(seed))[0]), net[1]
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if name == "images" else f'layer"{name}\\\t' for name in names]
        for entry in (*model.graph.initializer, *model.graph.output):
            entry.name = f'layer"{entry.name}\\\t'
        session = make_session(model.SerializeToString(), provider=True)
        session.run(None, {"images": images(seed, 1, size)})
        del session
        gc.collect()
        if any(map(low_bit_layers, claimed())):
            return
    pytest.fail("no net had a low-bit layer")
