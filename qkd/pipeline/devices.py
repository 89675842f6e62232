"""Check whether an experiment can be trained on several devices, before any of them trains."""

from __future__ import annotations

from collections.abc import Iterator

from qkd.config import RunConfig
from qkd.engines.engine import shared_rows
from qkd.failures import ConfigError
from qkd.methods.table import methods_of


def require_devices(config: RunConfig, devices: int) -> None:
    """Raise unless every training of an experiment can be divided among this many devices.

    Args:
        config: The experiment.
        devices: Number of devices.

    Raises:
        ConfigError: If not; lists every fault.
    """
    if faults := list(device_faults(config, devices)):
        raise ConfigError(faults)


def device_faults(config: RunConfig, devices: int) -> Iterator[str]:
    """Yield the reasons why an experiment cannot be trained on several devices, one line each with its config key.

    Args:
        config: The experiment.
        devices: How many; one can do everything.
    """
    if devices == 1:
        return
    try:
        shared_rows(config.data.batch_size, 0, devices)
    except ValueError as error:
        yield f"config.data.batch_size: {error}"
    for method in methods_of(config):
        if why := method.why_one_device:
            yield f"config.student: {why}; train it on one device (without --devices or torchrun)"
