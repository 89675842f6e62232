"""Run the training stages in child processes that the test kills; the imports are paid once.

Reads a line a child from stdin: JSON ``{"config", "runs_dir", "stages", "die_at"}``. Each child is forked before any
tensor was made, prints nothing, and runs those of the stages that are not complete. ``die_at`` is the number
of the file operation (write, flush, rename, delete) at which the child kills itself with SIGKILL; 0: it lives. Answers
with the child's id, and with its wait status once it has ended.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - every optimizer imports it: once here, not in each child
import yaml

from qkd.config import RunConfig
from qkd.pipeline import run_stages
from qkd.progress import Silent
from qkd.run.folder import RunFolder
from qkd.stages import STAGES


def die_at_file_operation(number: int) -> None:
    count = [0]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def child(order: dict[str, Any]) -> None:
    if order["die_at"]:
        die_at_file_operation(order["die_at"])
    config = RunConfig.model_validate(yaml.safe_load(Path(order["config"]).read_text("utf-8")))
    with RunFolder.open(config, Path(order["runs_dir"])) as run:
        run_stages(run, order["stages"], Silent(), STAGES)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(yaml.safe_load(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
