"""Blocks of README and docs run, or say why not; commands are parsed, configs bound, Python compiled in any case."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_blocks import ROOT, Block, blocks_of, commands_of, pages_of_docs
from PIL import Image
from torch import nn

from qkd.bench.device_file import DevicesFile
from qkd.checking import name_faults
from qkd.cli import parse
from qkd.config.binding import bind, bind_section
from qkd.files.yaml_text import parse_yaml

PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *pages_of_docs()]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LANGUAGES = ("bash", "python", "yaml", "js", "html")
OF = {language: [block for block in BLOCKS if block.language == language] for language in LANGUAGES}
OTHERS = {"quickstart.md", "feeding.md"}  # test_quickstart.py and predicting/test_feeding.py run their blocks
RUN = {
    language: [one for one in blocks if not one.reason and one.page not in OTHERS] for language, blocks in OF.items()
}
NET = """
from torch import nn


def build(num_classes, in_channels=3):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_the_guards_see_the_pages() -> None:
    assert {block.language for block in BLOCKS} == set(OF)
    assert [len(OF[language]) >= count for language, count in (("bash", 8), ("python", 4), ("yaml", 2))] == [True] * 3
    assert all(len(block.reason.split()) >= 3 for block in BLOCKS if block.reason), "a reason is said in words"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_with_commands_say_their_language(page: Path) -> None:
    """A block without a language is a picture or output: no line of it is a command."""
    text = page.read_text(encoding="utf-8")
    plain = re.findall(r"^```\n(.*?)^```$", re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S), re.M | re.S)
    assert [line for block in plain for line in block.splitlines() if re.match(r"(qkd|pip|make|python3?) ", line)] == []


@pytest.mark.parametrize("block", OF["bash"], ids=name)
def test_commands_have_the_options_they_are_written_with(block: Block) -> None:
    for words in commands_of(block.text):
        words = [re.sub(r"^(\w+)(?: \| \w+)+$", r"\1", word) for word in words]
        if "|" in words:  # `qkd teacher | search | ... CONFIG` stands for each of them
            names = [word for word in words if word != "|"]
            for one in names[:-1]:
                parse([one, names[-1]])
            continue
        parse([word for word in words if word != ">" and not word.endswith(".json")])


@pytest.mark.parametrize("block", OF["python"], ids=name)
def test_python_compiles(block: Block) -> None:
    compile(block.text, name(block), "exec")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("block", OF["js"], ids=name)
def test_javascript_parses(block: Block, tmp_path: Path) -> None:
    (tmp_path / "block.mjs").write_text(block.text, encoding="utf-8")
    subprocess.run(["node", "--check", "block.mjs"], cwd=tmp_path, check=True)


def test_the_browser_page_feeds_as_the_metadata_say(tmp_path: Path) -> None:
    """`toInput` of the page, run by node with a stand-in for the canvas, gives what Python gives."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (block,) = (one for one in OF["js"] if one.page == "browser.md")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    rgba = np.concatenate([pixels, np.full((2, 3, 1), 255, np.uint8)], 2)
    facts = {"image_size": [2, 3], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    canvas = f"{{ drawImage() {{}}, getImageData: () => ({{ data: {rgba.ravel().tolist()} }}) }}"
    before = f"""
        const ort = {{ env: {{ wasm: {{}} }}, Tensor: class {{ constructor(t, v, d) {{ this.v = v; this.d = d; }} }} }};
        class OffscreenCanvas {{ getContext() {{ return {canvas}; }} }}
    """
    after = f"const made = toInput(0, {json.dumps(facts)}); console.log(JSON.stringify([Array.from(made.v), made.d]));"
    (tmp_path / "run.mjs").write_text(before + block.text + after, encoding="utf-8")
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True)
    values, shape = json.loads(done.stdout)
    expected = ((pixels / 255 - facts["mean"]) / facts["std"]).transpose(2, 0, 1)
    assert shape == [1, 3, 2, 3]
    np.testing.assert_allclose(np.reshape(values, expected.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("block", OF["yaml"], ids=name)
def test_configs_bind(block: Block) -> None:
    """A part of a config is bound within one that has the rest."""
    data = parse_yaml(block.text)
    if "devices" in data:
        assert bind_section(DevicesFile, data).devices
        return
    student = {"quant": {"weight_bits": 2, "act_bits": 2}}
    whole: dict[str, Any] = {"name": "part", "data": {"name": "digits"}, "teacher": {"net": "resnet20"}, **data}
    whole["student"] = {**student, **whole.get("student", {})}
    bind(whole, checks=(name_faults,))


@pytest.fixture
def images_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with what blocks take for granted: images, a net, weights for other classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(NET, encoding="utf-8")
    made: dict[str, Any] = {}
    exec(NET, made)  # noqa: S102
    torch.save(made["build"](7).state_dict(), tmp_path / "mine.pth")
    for kind in ("cat", "dog"):
        (tmp_path / "my-images" / kind).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my-images" / kind / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("block", RUN["bash"], ids=name)
def test_shell_blocks_run(block: Block, images_here: Path) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=images_here, env={**os.environ, **path},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN["python"], ids=name)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names that the text around them means: nets, one batch of images, batches with labels."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def net() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))

    images = torch.rand(16, 1, 8, 8)
    batches = [(images, torch.arange(16) % 3)]
    given = {"model": net(), "x": images[:2], "images": images, "batches": batches, "student_net": net(),
             "teacher_net": net()}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, name(block), "exec"), given)  # noqa: S102


def test_every_wish_has_a_command_that_is_one() -> None:
    text = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", text, re.M)
    assert len(rows) == 24
    for _, command in rows:
        words = shlex.split(command)
        words = words[3:] if words[:3] == ["python", "-m", "qkd"] else words[1:]
        parse(words)
