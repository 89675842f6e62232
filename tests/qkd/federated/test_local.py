"""Rounds in one process: what is averaged and metered, failures, kill and resume, the same seed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federation_of, server_of, tiny_federated, trained

from qkd.federated import Order, Reply, Server, Worker
from qkd.federated.messages import MODEL, tensor_bytes
from qkd.federated.strategies import FederationError
from qkd.federated.strategies.class_logits import ClassLogits
from qkd.progress import Silent
from qkd.training.checkpoint import Checkpoint
from quantizers import quant_layers

pytestmark = pytest.mark.usefixtures("unfused")
STRATEGIES = ("fedavg", "fedprox", "feddistill", "fedgen")
FEW = {"fedgen": {"generator_steps": 2}}


class Killed(BaseException):
    """Ends a run like a kill: nothing catches it."""


class Warnings(Silent):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


def same(one: Server, other: Server) -> bool:
    states = [{**server.model, **server.strategy.state()} for server in (one, other)]
    return {*states[0]} == {*states[1]} and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("strategy", "precision"), [("fedgen", "low_bit"), *((strategy, "float") for strategy in STRATEGIES)]
)
def test_killed_in_a_round_it_resumes_bit_for_bit(strategy: str, precision: str, data: Path, tmp_path: Path) -> None:
    config = tiny_federated(data, strategy, precision=precision, clients_per_round=3, **FEW.get(strategy, {}))
    whole = trained(config, tmp_path / "whole")
    asked: list[Order] = []

    def killing(order: Order) -> None:
        asked.append(order)
        if order.server_round == 3 and order.task == "train" and len([o for o in asked if o.server_round == 3]) == 2:
            raise Killed

    with pytest.raises(Killed):
        trained(config, tmp_path / "killed", killing)
    resumed: list[Order] = []
    server = trained(config, tmp_path / "killed", resumed.append)
    assert {order.server_round for order in resumed} == {3}, "rounds that are done are not taken again"
    assert same(whole, server) and whole.rows == server.rows
    assert all(bool(tensor.isfinite().all()) for tensor in server.model.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.4}, "federated.lr: 0.4 then, 0.05 now"),
        ({"student": {"net": "resnet8"}}, "start: "),
        ({"strategy": "feddistill"}, "federated.strategy"),
        ({}, "seed: 7 then, 1 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    """It would be trained on, and exported as this run's student."""
    config = tiny_federated(data, **{"precision": "float", **changes})
    config = config if changes else config.model_copy(update={"seed": 7})
    other = server_of(config, tmp_path)
    other.aggregate_train(1, [Worker(other.federation).answer(order) for order in other.configure_train(1)])
    other.close_round(1)
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    with pytest.raises(ValueError, match=f"the checkpoint is of another run .*{words}"):
        server.resume()
    assert not server.rows and server.model.keys() == dict(server.federation.start).keys()


def test_a_checkpoint_of_another_net_is_refused_though_it_has_no_settings(data: Path, tmp_path: Path) -> None:
    other = server_of(tiny_federated(data, precision="float", student={"net": "resnet8"}), tmp_path)
    tensors = {f"{MODEL}{name}": tensor for name, tensor in other.model.items()}
    other.store.save(1, Checkpoint(tensors, {"rows": [{"round": 1}]}))
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is of another run .*not for this net: .*missing"):
        server.resume()


def test_a_checkpoint_without_settings_is_resumed(data: Path, tmp_path: Path) -> None:
    """Older versions did not write them."""
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    server.aggregate_train(1, [Worker(server.federation).answer(order) for order in server.configure_train(1)])
    server.close_round(1)
    checkpoint = server.store.load()
    assert checkpoint is not None
    server.store.save(2, replace(checkpoint, state={"rows": checkpoint.state["rows"]}))
    again = server_of(tiny_federated(data, precision="float"), tmp_path)
    again.resume()
    assert again.rows == server.rows and same(again, server)


def test_one_client_is_plain_training(data: Path, tmp_path: Path) -> None:
    """Averaging one client is the identity: its weight is 1, and the global net is what it uploaded."""
    config = tiny_federated(data, clients=1, precision="float", rounds=1)
    server = trained(config, tmp_path)
    order = server_of(config, tmp_path / "other").configure_train(1)[0]
    reply = Worker(server.federation).answer(order)
    assert server.rows[-1]["weights"] == {"0": 1.0}
    assert all(torch.equal(server.model[name], reply.tensors[f"model/{name}"]) for name in server.model)


def test_the_order_of_answers_changes_nothing(data: Path, tmp_path: Path) -> None:
    config = tiny_federated(data, "fedgen", precision="float", generator_steps=2)
    federation = federation_of(config)
    worker, made = Worker(federation), []
    for turned in (False, True):
        server = server_of(config, tmp_path / str(turned))
        replies = [worker.answer(order) for order in server.configure_train(1)]
        server.aggregate_train(1, replies[::-1] if turned else replies)
        made.append(server)
    assert same(*made)


def test_weights_are_the_clients_shares_of_the_images(data: Path, tmp_path: Path) -> None:
    server = trained(tiny_federated(data, precision="float", rounds=1), tmp_path)
    counts = [len(part) for part in server.federation.parts]
    expected = {str(client): count / sum(counts) for client, count in enumerate(counts)}
    assert server.rows[-1]["weights"] == expected and len(set(counts)) > 1


def test_clients_are_drawn_for_each_round(data: Path, tmp_path: Path) -> None:
    config = tiny_federated(data, precision="float", rounds=8, clients=6, clients_per_round=2, evaluate_every=8)
    server = trained(config, tmp_path)
    drawn = [tuple(row["clients"]) for row in server.rows]
    assert all(len(set(pair)) == 2 for pair in drawn) and len(set(drawn)) > 2
    assert ["test_accuracy" in row for row in server.rows] == [False] * 7 + [True]


# failures


def test_a_client_that_fails_is_left_out_and_the_weights_say_so(data: Path, tmp_path: Path) -> None:
    def fails(order: Order) -> None:
        if order.client == 1 and order.server_round == 2 and order.task == "train":
            raise OSError("no route\nto host")

    progress = Warnings()
    server = trained(tiny_federated(data, precision="float"), tmp_path, fails, progress)
    row = server.rows[1]
    assert progress.lines == ["round 2: client 1 is left out: OSError: no route to host"]
    assert row["dropped"] == {"1": "OSError: no route to host"} and set(row["weights"]) == {"0", "2", "3"}
    assert sum(row["weights"].values()) == pytest.approx(1)
    assert all(not other["dropped"] for other in (server.rows[0], server.rows[2]))


def test_an_update_that_is_not_finite_is_left_out(data: Path, tmp_path: Path) -> None:
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    worker = Worker(server.federation)
    replies = [worker.answer(order) for order in server.configure_train(1)]
    name = next(iter(replies[2].tensors))
    replies[2].tensors[name].view(-1)[0] = float("nan")
    server.aggregate_train(1, replies)
    assert server._row["dropped"] == {"2": "its update holds NaN or an infinity"}
    assert all(bool(tensor.isfinite().all()) for tensor in server.model.values())


@pytest.mark.parametrize(
    ("figures", "words"), [({"loss": float("nan")}, "NaN or an infinity"), ({"images": 0.0}, "how many images")]
)
def test_figures_that_cannot_be_averaged_leave_a_client_out(
    data: Path, tmp_path: Path, figures: dict[str, float], words: str
) -> None:
    """They would end the run when the round is written."""
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    worker = Worker(server.federation)
    replies = [worker.answer(order) for order in server.configure_train(1)]
    replies[2] = replace(replies[2], metrics={**replies[2].metrics, **figures})
    server.aggregate_train(1, replies)
    assert words in server._row["dropped"]["2"] and len(server._row["weights"]) == 3
    server.close_round(1)


def broken(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an update of another program's client; ``tensors`` are a good one's."""
    first = next(name for name, tensor in tensors.items() if name.startswith(MODEL) and tensor.is_floating_point())
    wrong = {
        "missing": {name: tensor for name, tensor in tensors.items() if name != first},
        "shape": {**tensors, first: tensors[first][None]},
        "type": {**tensors, first: tensors[first].double()},
        "more": {**tensors, f"{MODEL}other.weight": torch.ones(2)},
        "report": {name: tensor for name, tensor in tensors.items() if name.startswith(MODEL)},
        "classes": {name: tensor if name.startswith(MODEL) else tensor[:1] for name, tensor in tensors.items()},
    }
    return wrong[kind]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {"precision": "float"}) for kind in ("missing", "shape", "type", "more")),
        *((kind, {"upload": "codes"}) for kind in ("missing", "shape", "more")),
        *((kind, {"strategy": strategy}) for kind in ("report", "classes") for strategy in ("feddistill", "fedgen")),
    ],
)
def test_an_update_of_another_student_is_left_out(
    data: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    server = server_of(tiny_federated(data, **FEW.get(settings.get("strategy", ""), {}), **settings), tmp_path)
    worker = Worker(server.federation)
    strategy_has_more = kind in ("report", "classes")  # which it sends after a training only
    for server_round in range(server.federation.first_round, 2):
        replies = [worker.answer(order) for order in server.configure_train(server_round)]
        is_wrong = server_round == 1 or not strategy_has_more
        if is_wrong:
            replies[2] = replace(replies[2], tensors=broken(kind, dict(replies[2].tensors)))
        server.aggregate_train(server_round, replies)
        assert set(server._row["dropped"]) == ({"2"} if is_wrong else set())
        assert len(server._row["weights"]) == 4 - is_wrong
    assert server._row["dropped"]["2"].startswith("its update is not of this run's student")


@pytest.mark.parametrize("figures", [{"right": float("nan")}, {"right": -1.0}, {"right": 1e9}, {"images": 0.0}])
def test_scores_that_cannot_be_true_are_left_out(data: Path, tmp_path: Path, figures: dict[str, float]) -> None:
    server = server_of(tiny_federated(data, precision="float", evaluate_every=1), tmp_path)
    worker = Worker(server.federation)
    server.aggregate_train(1, [worker.answer(order) for order in server.configure_train(1)])
    replies = [worker.answer(order) for order in server.configure_evaluate(1)]
    assert len(replies) > 1
    want = server.strategy.aggregate_evaluate(1, replies[1:])
    replies[0] = replace(replies[0], metrics={**replies[0].metrics, **figures})
    assert server.strategy.aggregate_evaluate(1, replies) == want and "val_accuracy" in want


def test_a_client_that_diverges_is_left_out(data: Path, tmp_path: Path) -> None:
    config = tiny_federated(data, precision="float", lr=1e6, rounds=1, clients=2, local_steps=12)
    with pytest.raises(
        FederationError, match=r"round 1: no client is left \(client 0: ClientError: the loss is .*lower"
    ):
        trained(config, tmp_path)


def test_no_client_left_is_an_error(data: Path, tmp_path: Path) -> None:
    def fails(order: Order) -> None:
        raise RuntimeError("off")

    with pytest.raises(FederationError, match="round 1: no client is left .*client 3: RuntimeError: off"):
        trained(tiny_federated(data, precision="float"), tmp_path, fails)


def test_who_does_not_answer_is_left_out(data: Path, tmp_path: Path) -> None:
    server = server_of(tiny_federated(data, precision="float"), tmp_path)
    worker = Worker(server.federation)
    server.aggregate_train(1, [worker.answer(order) for order in server.configure_train(1)][:3])
    assert server._row["dropped"] == {"3": "it did not answer"}


# bytes


@pytest.mark.parametrize("upload", ["float", "codes"])
def test_bytes_are_those_of_the_messages(upload: str, data: Path, tmp_path: Path) -> None:
    sent: list[Order] = []
    server = trained(tiny_federated(data, "fedavg", upload=upload, rounds=1), tmp_path, sent.append)
    down = sum(tensor_bytes(order.tensors) for order in sent if order.server_round == 1 and order.task == "train")
    state = sum(tensor.numel() * tensor.element_size() for tensor in server.model.values())
    assert server.rows[-1]["bytes_down"] == down == 4 * state
    up = server.rows[-1]["bytes_up"]
    assert up == down if upload == "float" else up < 0.25 * down


@pytest.mark.parametrize("upload", ["float", "codes"])
def test_calibration_rounds_no_weights(upload: str, data: Path, tmp_path: Path) -> None:
    """Sent as codes, they would be rounded before the first step, also those of a run with `student.weights`.

    Settling multiplies weights and their steps by a factor near 1, so that their codes stay the same.
    """
    server = server_of(tiny_federated(data, "fedavg", upload=upload), tmp_path)
    worker = Worker(server.federation)
    before = {name: tensor.clone() for name, tensor in server.model.items()}
    replies = [worker.answer(order) for order in server.configure_train(0)]
    server.aggregate_train(0, replies)
    layers = quant_layers(server.federation.net())
    for name in layers:
        step = f"{name}.weight_quant.tensor_quant.scale"
        factor = server.model[step] / before[step]
        assert bool(((factor - 1).abs() < 0.01).all())
        torch.testing.assert_close(server.model[f"{name}.weight"], before[f"{name}.weight"] * factor, rtol=3e-7, atol=0)
    if upload == "codes":
        assert not any(name == f"{MODEL}{layer}.weight" for layer in layers for name in replies[0].tensors)


def test_what_a_strategy_sends_besides_is_metered(data: Path, tmp_path: Path) -> None:
    plain, latents, logits = (
        trained(
            tiny_federated(data, strategy, precision="float", rounds=2, **FEW.get(strategy, {})), tmp_path / strategy
        )
        for strategy in ("fedavg", "fedgen", "feddistill")
    )
    classes, base = 4, plain.rows[1]
    generator = sum(tensor_bytes({"": one}) for one in latents.strategy.generator.state_dict().values())  # type: ignore[attr-defined]
    assert latents.rows[0]["bytes_down"] == base["bytes_down"]
    assert latents.rows[1]["bytes_down"] - base["bytes_down"] == 4 * generator
    assert latents.rows[1]["bytes_up"] - base["bytes_up"] == 4 * classes * 8
    assert logits.rows[1]["bytes_down"] - base["bytes_down"] == 4 * (4 * classes**2 + classes)
    assert logits.rows[1]["bytes_up"] - base["bytes_up"] == 4 * (4 * classes**2 + 8 * classes)


# strategies


def test_without_their_terms_all_strategies_are_fedavg(data: Path, tmp_path: Path) -> None:
    plain = trained(tiny_federated(data, precision="float", rounds=2), tmp_path / "plain")
    for strategy, off in (("fedprox", {"proximal": 0}), ("feddistill", {"class_weight": 0})):
        other = trained(tiny_federated(data, strategy, precision="float", rounds=2, **off), tmp_path / strategy)
        assert all(torch.allclose(plain.model[name], other.model[name], atol=1e-6) for name in plain.model)


def test_a_large_mu_keeps_clients_where_they_are(data: Path, tmp_path: Path) -> None:
    moved = {}
    for mu in (0.0, 10.0):
        config = tiny_federated(data, "fedprox", precision="float", rounds=1, proximal=mu, local_steps=8, momentum=0.0)
        server = trained(config, tmp_path / str(mu))
        start = server.federation.start
        moved[mu] = sum(float((server.model[name] - start[name]).square().sum()) for name in start)
    assert 0 < moved[10.0] < 0.5 * moved[0.0]


def test_mean_logits_are_of_those_who_have_the_class(data: Path) -> None:
    strategy = ClassLogits(federation_of(tiny_federated(data, "feddistill", precision="float")))
    rows = [torch.full((4, 4), value) for value in (1.0, 3.0)]
    counts = [torch.tensor([2, 0, 1, 0]), torch.tensor([5, 1, 0, 0])]
    replies = [
        Reply(client, {"class_logits": row, "class_counts": count})
        for client, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]
    strategy.learn(1, replies, [])
    assert strategy.logits[:, 0].tolist() == [2, 3, 1, 0] and strategy.known.tolist() == [True, True, True, False]
    strategy.learn(2, [Reply(0, {"class_logits": 9 * rows[0], "class_counts": torch.tensor([0, 0, 0, 1])})], [])
    assert strategy.logits[:, 0].tolist() == [2, 3, 1, 9] and bool(strategy.known.all()), "what is known stays"


def test_a_checkpoint_of_another_strategy_is_refused(data: Path, tmp_path: Path) -> None:
    trained(tiny_federated(data, "feddistill", precision="float", rounds=1), tmp_path)
    server = server_of(tiny_federated(data, "fedavg", precision="float", rounds=2), tmp_path)
    with pytest.raises(ValueError, match="federated.strategy: 'feddistill' then, 'fedavg' now"):
        server.resume()


def test_clients_calibrate_and_the_server_averages_their_scales(data: Path, tmp_path: Path) -> None:
    server = server_of(tiny_federated(data), tmp_path)
    worker = Worker(server.federation)
    replies = [worker.answer(order) for order in server.configure_train(0)]
    server.aggregate_train(0, copy.deepcopy(replies))
    name = "relu4.act_quant.fused_activation_quant_proxy.tensor_quant.scale"
    scales: list[Any] = [float(reply.tensors[f"model/{name}"]) for reply in replies]
    expected = sum(scale * share for scale, share in zip(scales, server._row["weights"].values(), strict=True))
    assert len(set(scales)) == 4 and float(server.model[name]) == pytest.approx(expected, rel=1e-6)
