"""Weights change their storage and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import ExportError, repack, write_view
from export.conversion.repack import fit_storage
from export.runtime import open_session

SHAPE = [(1, 3, 15, 15)]


@pytest.fixture
def files(residual, tmp_path):
    """The same net, written with each storage."""
    kinds = {"int2": {"pack": "packed"}, "int4": {"pack": "packed", "opset": 21}, "int8": {"pack": "int8"}}
    return {name: write_view(residual, SHAPE, tmp_path / f"{name}.onnx", **how).path for name, how in kinds.items()}


ALLOWED = {"int2": ["int2", "int4", "int8"], "int4": ["int4", "int8"], "int8": ["int8"]}


@pytest.mark.parametrize("source", ALLOWED)
@pytest.mark.parametrize("target", ALLOWED)
def test_repacked_is_what_export_writes(files, source, target):
    content = repack(files[source], ALLOWED[target])
    assert content == files[target].read_bytes()
    assert repack(files[source].read_bytes(), ALLOWED[target]) == content


@pytest.mark.parametrize("optimize", [False, True])
def test_every_output_stays_the_same_bit_for_bit(files, optimize):
    images = np.random.default_rng(0).standard_normal((8, 3, 15, 15), dtype=np.float32)
    runs = [files["int2"], repack(files["int2"], "int8"), repack(files["int2"], "int4"), repack(files["int8"], "int2")]
    found = [open_session(model, optimize=optimize).run(None, {"images": images})[0] for model in runs]
    assert len(np.unique(found[0], axis=0)) == 8, "every image has its own logits"
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_int2_alone_leaves_wider_layers_in_int8(files):
    model = onnx.load_from_string(repack(files["int4"], "int2"))
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert TensorProto.INT2 in kinds and TensorProto.INT4 not in kinds and TensorProto.INT8 in kinds
    assert model.opset_import[0].version == 25


def test_fit_repacks_only_where_it_must(files):
    assert fit_storage(files["int2"], ["int2", "int4", "int8"]).content == files["int2"]
    fitted = fit_storage(files["int2"], ["int4", "int8"])
    assert fitted.content == files["int4"].read_bytes() and fitted.repacked == ("int4", "int8")
    fitted = fit_storage(files["int2"], ["int8"])
    assert fitted.content == files["int8"].read_bytes() and fitted.repacked == ("int8",)
    assert fit_storage(files["int8"], ["int8"]).repacked == ()
    with pytest.raises(ExportError, match="runtime is too old: it loads no weights in int2, int4, int8"):
        fit_storage(files["int2"], [])


def test_unknown_storage(files):
    with pytest.raises(ExportError, match="storage must be among int2, int4, int8, blocks of .*, got int3"):
        repack(files["int2"], ["int8", "int3"])


def foreign(tmp_path, tensor, **properties):
    """A file of another maker with one packed weight."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), helper.make_node("Mul", ["x", "c"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor]), ir_version=10)
    helper.set_model_props(model, properties)
    (tmp_path / "foreign.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "foreign.onnx"


def test_files_of_others_are_left_alone_or_refused(tmp_path):
    packed = helper.make_tensor("w", TensorProto.INT4, [2], bytes([0x21]), raw=True)
    path = foreign(tmp_path, packed)
    assert fit_storage(path, ["int4", "int8"]).content == path
    with pytest.raises(ExportError, match="only files that export_onnx wrote .*does not say who wrote it"):
        fit_storage(path, ["int8"])
    path = foreign(tmp_path, packed, flavor="qonnx", weight_bits="{}")
    with pytest.raises(ExportError, match="this one is of flavor qonnx"):
        repack(path, "int8")
    path = foreign(tmp_path, packed, flavor="ort", weight_bits='{"conv": 4}')
    with pytest.raises(ExportError, match="conv: the file has no weights named conv.weight.int8"):
        repack(path, "int8")


def test_weights_in_other_files_are_refused(tmp_path):
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(ExportError, match="keeps weights in other files"):
        fit_storage(foreign(tmp_path, tensor), ["int8"])


def test_no_onnx_file(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"x\.onnx: ONNX Runtime cannot load it: it is not an ONNX file"):
        repack(tmp_path / "x.onnx", "int8")
    with pytest.raises(ValueError, match="the content: "):
        repack(b"\xff" * 100, "int8")
