"""The quick start, run as it stands: from `qkd init` to `qkd predict`, its blocks and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks_of


@pytest.mark.slow
def test_every_block_of_the_quick_start_runs_in_an_empty_folder(tmp_path: Path) -> None:
    blocks = blocks_of(ROOT / "docs" / "quickstart.md")
    assert len(blocks) == 7 and all(not block.reason for block in blocks)
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    said = ""
    for block in blocks:
        words = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*words, block.text], cwd=tmp_path, env={**os.environ, **here}, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        said += done.stdout + done.stderr
    assert "120 images of 3 classes, color, 24x32 to 26x32 pixels" in said
    assert "new head `3` (7 classes in the file)" in said and "24 for the test (0.2 of each class" in said
    assert "copied from runs/flowers, not retrained" in said
    assert "compared with flowers:" in said and "not compared image by image" not in said
    assert (tmp_path / "runs" / "w4a4" / "report.html").is_file() and (tmp_path / "runs" / "flowers" / "nets").is_dir()
