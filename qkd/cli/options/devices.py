"""The option `--devices`: one command that trains in several processes, each on its own device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from qkd.cli.options.values import positive
from qkd.engines.membership import is_member
from qkd.failures import UsageError

if TYPE_CHECKING:
    from qkd.config import RunConfig

HELP = (
    "train in N processes on this machine, each on its own GPU or on the CPU; they share every batch, so "
    "data.batch_size keeps its meaning and must be a multiple of N (for several machines: torchrun -m qkd run ...)"
)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument("--devices", type=positive, metavar="N", default=1, help=HELP)


def on_devices(args: argparse.Namespace, config: RunConfig, work: Callable[[], int]) -> int:
    """Run a command: here, as one of several processes, or by starting them and waiting.

    Args:
        args: With ``devices``, and the arguments as they were given (``argv``).
        config: Of the run.
        work: What every process runs; returns the exit code.

    Raises:
        UsageError: If torchrun has started another number of processes than ``--devices`` says.
        qkd.failures.ConfigError: If the config cannot be trained on so many devices, with every fault.
    """
    if is_member():
        from qkd.engines.joining import joined
        from qkd.pipeline.devices import require_devices

        with joined(config.device, synchronizes=config.sync_batch_norm) as engine:
            if args.devices not in (1, engine.size):
                raise UsageError(f"--devices {args.devices}: torchrun started {engine.size} processes; leave it out")
            require_devices(config, engine.size)
            return work()
    if args.devices == 1:
        return work()
    from qkd.engines.launching import launch
    from qkd.pipeline.devices import require_devices

    require_devices(config, args.devices)
    return launch(args.argv, args.devices)
