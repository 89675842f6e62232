"""Runs fast tests with the oldest versions that pyproject.toml allows: `make test-oldest`.

    python tests/oldest_versions.py [--keep FOLDER] [TEST...]

Makes an environment with the lower bound of each requirement (those without one come in their newest fitting version),
installs the toolkit without touching them, and runs the tests there. It downloads another PyTorch: minutes, gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/quantizers", "tests/export/test_parity.py", "tests/export/test_flavors.py", "tests/qkd/api",
         "tests/end_to_end/test_smoke.py")  # fmt: skip
# torchvision has no bound: each version fits one torch.
BESIDE = {"torch==2.11.0": "torchvision==0.26.0"}
# Not what the oldest versions can do, and why.
LEFT_OUT = {
    "tests/end_to_end/test_smoke.py::test_the_result_holds_what_was_asked_for": "weights are bytes before "
    "onnxruntime 1.23, so the file is larger than the test allows",
}
TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis")


def oldest() -> list[str]:
    """Return the requirements of the package with each lower bound as the version."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert found is not None
    pinned = []
    for words in re.findall(r'^\s*"([^"]+)"', found[1], re.M):
        name, bound, version = words.partition(">=")
        pinned.append(f"{name}=={version}{'' if version.count('.') > 1 else '.0' * (2 - version.count('.'))}"
                      if bound else name)  # fmt: skip
    return [BESIDE.get("torch==2.11.0", one) if one == "torchvision" and "torch==2.11.0" in pinned else one
            for one in pinned]  # fmt: skip


def main() -> None:
    """Make the environment, install, test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="make the environment here and keep it")
    parser.add_argument("--list", action="store_true", help="print the versions and do nothing")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    pins = oldest()
    print("\n".join(pins), flush=True)
    if options.list:
        return
    with tempfile.TemporaryDirectory() as place:
        folder = options.keep or Path(place)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *TOOLS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)], check=True)
        for test, reason in LEFT_OUT.items():
            print(f"left out: {test}: {reason}", flush=True)
        without = [word for test in LEFT_OUT for word in ("--deselect", test)]
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "0", *without, *options.tests], cwd=ROOT, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
