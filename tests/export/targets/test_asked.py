"""What ``--for`` takes, and what to write instead of what it does not take."""

from __future__ import annotations

import pytest

from export import ExportError
from export.targets.asked import parse_runtime
from export.targets.table import TARGETS


@pytest.mark.parametrize("text", ["onnxruntime==1.17", "1.17", "onnxruntime 1.17.3", " 1.17 "])
def test_versions(text):
    assert parse_runtime(text) == (1, 17)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "onnxruntime"])
def test_a_target_s_name_is_told_what_writes_its_file(name):
    with pytest.raises(ExportError) as caught:
        parse_runtime(name)
    message = str(caught.value)
    assert message.startswith("--for must be a version such as onnxruntime==1.17, got")
    if TARGETS[name].refusal:
        assert f"target {name!r} is refused: {TARGETS[name].refusal}" in message
        return
    assert f"`qkd export RUN export.target={name}`" in message
    assert ("student.onnx itself" if TARGETS[name].is_onnxruntime else f"student.{name}.onnx is the file") in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("onnxruntime", "name the version that the device has"),
        ("onnxruntime>=1.17", "write onnxruntime==1.17, or 'export.target=onnxruntime>=1.17' for student.onnx itself"),
        ("mnn", "other runtimes are targets: qkd ls targets"),
    ],
)
def test_other_texts(text, words):
    with pytest.raises(ExportError) as caught:
        parse_runtime(text)
    assert words in str(caught.value)
