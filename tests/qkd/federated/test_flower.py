"""Flower drives the same server and clients: the rounds are those of the local engine, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HAS_FLOWER = all(importlib.util.find_spec(name) is not None for name in ("flwr", "ray"))

# A script, since Ray sends functions of a test module to its workers by name, where they are not found.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qkd.config.binding import bind
from qkd.data import load_splits
from qkd.federated import Federation, Order, Reply, Server, Worker
from qkd.federated.engines import run_local
from qkd.federated.engines.flower import run_flower
from qkd.progress import Silent
from qkd.training.checkpoint import CheckpointStore

def broken(order):
    if order.client == 1 and order.server_round == 2 and order.task == "train":
        raise RuntimeError("the battery is empty")

def at_flower(config: str, order: Order) -> Reply:
    from qkd.federated.engines.flower_apps import answer_order
    broken(order)
    return answer_order(config, order)

config = bind(json.loads(sys.argv[1]))
federation = Federation(config, load_splits(config.data, seed=config.seed), torch.device("cpu"))

def server(name):
    return Server(federation, CheckpointStore(Path(sys.argv[2]) / name, print), Silent())

local, flower = server("local"), server("flower")
worker = Worker(federation)
def here(order):
    broken(order)
    return worker.answer(order)
run_local(local, here, Silent())
run_flower(flower, Silent(), at_flower)
same = {name: torch.equal(tensor, flower.model[name]) for name, tensor in local.model.items()}
print(json.dumps({"same": same, "local": local.rows, "flower": flower.rows}))
"""


def config(strategy: str, **changes: Any) -> dict[str, Any]:
    federated = {"strategy": strategy, "clients": 4, "rounds": 3, "alpha": 1.0, "local_steps": 2, "lr": 0.05, **changes}
    return {
        "name": "flower", "seed": 3, "threads": 1,
        "data": {"name": "digits", "train_limit": 200, "batch_size": 16, "val_fraction": 0.2},
        "student": {"net": "lenet5", "quant": {"weight_bits": 4, "act_bits": 4}, "calibration_batches": 1},
        "federated": federated,
    }  # fmt: skip


def outcome(script: str, settings: dict[str, Any], folder: Path) -> Any:
    """Return what a script prints at its end."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    command = [sys.executable, "-c", script, json.dumps(settings), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLOWER, reason="Flower and Ray are not installed (extra [flower])")
@pytest.mark.parametrize(("strategy", "changes"), [("fedgen", {"generator_steps": 3}), ("fedavg", {"upload": "codes"})])
def test_both_engines_take_the_same_rounds(strategy: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Four clients, one of which fails in the second round: weights, scores and bytes are equal, bit for bit."""
    found = outcome(SCRIPT, config(strategy, **changes), tmp_path)
    assert all(found["same"].values()) and len(found["same"]) > 20
    for ours, theirs in zip(found["local"], found["flower"], strict=True):
        reasons = [list(row.pop("dropped").items()) for row in (ours, theirs)]
        assert ours == theirs
        assert [client for client, _ in reasons[0]] == [client for client, _ in reasons[1]]
        assert all("the battery is empty" in why for side in reasons for _, why in side)
    second = found["flower"][2]
    assert second["round"] == 2 and set(second["weights"]) == {"0", "2", "3"}
    assert sum(second["weights"].values()) == pytest.approx(1)


LOST = """
class Lost(Exception):
    pass

def at_flower(config: str, order: Order) -> Reply:
    import os
    from qkd.federated.engines.flower_apps import answer_order
    if order.client == 1 and order.server_round == 2 and not os.path.exists(sys.argv[2] + "/died"):
        open(sys.argv[2] + "/died", "w").close()
        os._exit(1)  # as a process that the system kills for want of memory
    return answer_order(config, order)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLOWER, reason="Flower and Ray are not installed (extra [flower])")
def test_a_lost_process_ends_the_run_and_a_resumed_one_takes_the_same_rounds(tmp_path: Path) -> None:
    """Flower keeps a dead process: each client that it got was left out, in every later round, and none knew."""
    head, tail = SCRIPT.split("def broken(order):")
    parts = tail[tail.index("config = bind") :].split("run_flower(flower, Silent(), at_flower)")
    parts[0] = parts[0].replace("    broken(order)\n", "")
    dies = LOST.replace("sys.argv[2]", repr(str(tmp_path)))
    resumes = """
try:
    run_flower(flower, Silent(), at_flower)
except RuntimeError as error:
    # that of client 1, or of one whose order went to the dead process before Flower noticed
    assert "was lost with the order of client" in str(error) and "the same command resumes" in str(error), error
else:
    raise AssertionError("nothing was said")
print(json.dumps([row["round"] for row in flower.rows]), file=sys.stderr)
flower = server("flower")
flower.resume()
run_flower(flower, Silent(), at_flower)"""
    found = outcome(head + dies + parts[0] + resumes + parts[1], config("fedavg", workers=2), tmp_path)
    assert all(found["same"].values()) and found["local"] == found["flower"]
    assert all(row["dropped"] == {} for row in found["flower"])


@pytest.mark.skipif(HAS_FLOWER, reason="Flower is installed")
def test_without_flower_it_is_said_what_to_install(tmp_path: Path) -> None:
    from qkd.federated.engines.flower import run_flower

    with pytest.raises(ImportError, match=r"pip install 'qkd-toolkit\[flower\]', or use federated.engine=local"):
        run_flower(None, None)  # type: ignore[arg-type]
