"""Train a 2-bit student without a single real image: a generator invents images that the teacher recognizes.

    python examples/data_free.py                     # minutes: teacher, generator, student on scikit-learn's digits

To use your own teacher, set `teacher.weights=FILE` and `teacher.net=FILE.py:FUNCTION`, and `teacher.train=null` so
that it is not trained further; see docs/data_free.md for what else belongs to it.
"""

from __future__ import annotations

import argparse

import yaml

import qkd


def main() -> None:
    """Run the shipped config and print what the student learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits/data-free/rdskd", help="`qkd ls configs` lists others")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    options = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in options.overrides)}
    run = qkd.run(options.config, overrides, runs_dir=options.runs_dir)
    print(run)
    print("The student saw no training image; its data set raises an error if it is asked for one.")
    print(f"Look at what it saw instead: qkd generate {run.path} --out grid.png")


if __name__ == "__main__":
    main()
