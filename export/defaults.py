"""Defaults and limits of latency measurements, shared by devices, configs and command-line options."""

from __future__ import annotations

THREADS = 1  # intra-op
BATCH_SIZE = 1
WARMUP = 20  # untimed inferences per model, after the first
ROUNDS = 200  # timed inferences per model
TIMEOUT_S = 600.0  # of one command on a device

MOST_THREADS = 1024  # the largest machines have 768; PyTorch crashes at about ten thousand
MOST_BATCH = 1_000_000
MOST_ROUNDS = 10_000_000  # each takes eight bytes on the device; at 10 us an inference, two minutes
RANGES = {"threads": (1, MOST_THREADS), "batch_size": (1, MOST_BATCH), "warmup": (0, MOST_ROUNDS),
          "rounds": (1, MOST_ROUNDS)}  # fmt: skip
