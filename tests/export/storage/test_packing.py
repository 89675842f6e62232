"""Sub-byte weights are in a file as ONNX wants them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from export.graph.builder import GraphBuilder, pack_codes
from export.storage.packing import INT2, INT4, INT8, choose_storage, ir_version, runtime_loads


@pytest.mark.parametrize("kind", [INT2, INT4], ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64])
def test_packed_codes_are_read_back_by_onnx(kind, size):
    limit = 2 ** (kind.bits - 1)
    codes = np.random.default_rng(size).integers(-limit, limit, size).astype(np.int8)
    content = pack_codes(codes, kind.bits)
    assert len(content) == -(-size * kind.bits // 8)
    tensor = helper.make_tensor("w", kind.code, [size], content, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_worked_number():
    assert pack_codes(np.array([1, -1, -8], np.int8), 4) == bytes([0xF1, 0x08])
    assert pack_codes(np.array([1, -1, -2, 0, 1], np.int8), 2) == bytes([0b00_10_11_01, 0b01])


@pytest.mark.parametrize("kind", [INT2, INT4, INT8], ids=lambda kind: kind.name)
def test_the_installed_runtime_loads_it(kind):
    if kind != INT8:
        assert runtime_loads(kind)
    assert ir_version(kind.opset) >= 8


def test_storage_is_the_narrowest_that_holds_the_width():
    storage = choose_storage([2, 3, 4, 8], "packed", None)
    assert [storage.of(bits).name for bits in range(2, 9)] == ["int2", "int4", "int4"] + ["int8"] * 4
    assert storage.opset == 25
    assert choose_storage([4, 8], "packed", None).opset == 21
    assert choose_storage([8], "packed", None).opset == choose_storage([], "auto", None).opset == 17
    assert choose_storage([2], "packed", 21).of(2) == INT4
    assert choose_storage([2], "packed", 20).of(2) == INT8


def test_names_are_unique_and_constants_shared():
    graph = GraphBuilder(reserved=("x",))
    assert graph.constant("scale", np.float32(1)) == graph.constant("scale", np.float32(1)) == "scale"
    assert graph.constant("scale", np.float32(2)) == "scale#2"
    assert graph.constant("scale", np.array([1.0], np.float32)) == "scale#3"
    assert graph.add("Relu", ["scale"], "x", name="n") == "x#2"
    graph.add("Relu", ["scale"], "y", name="n")
    assert [node.name for node in graph.nodes] == ["n", "n#2"]
