"""FedGen: the last layer and its input quantizer, the generator, what server and clients learn from latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federations import federation_of, server_of, tiny_federated
from torch import Tensor, nn

from qkd.federated import Reply, Worker
from qkd.federated.generator import LatentGenerator
from qkd.federated.head import Head, NoHeadError, head_path
from qkd.federated.strategies import latents as latents_module
from qkd.federated.strategies.latents import Latents
from qkd.losses import fedgen_client_loss
from qkd.nets import build_net
from qkd.testing.small import TinyNet
from quantizers import QuantSpec, calibrate, prepare

pytestmark = pytest.mark.usefixtures("unfused")
IMAGES = torch.zeros(2, 1, 8, 8)


class Softmax(nn.Module):
    """A net that ends with probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class Convolutional(nn.Module):
    """A net without a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


def test_the_last_layer_is_found() -> None:
    assert head_path(TinyNet(), IMAGES) == "head"
    assert head_path(build_net("lenet5", classes=10, channels=1, image_size=8), IMAGES) == "fc2"
    assert head_path(build_net("resnet8", classes=10, channels=1, image_size=8), IMAGES) == "fc"


@pytest.mark.parametrize("net", [Softmax(), Convolutional()], ids=["softmax", "convolution"])
def test_a_net_without_a_last_linear_layer_is_refused(net: nn.Module) -> None:
    with pytest.raises(NoHeadError, match="linear layer that gives the logits, but this net has none"):
        head_path(net, IMAGES)


@pytest.mark.parametrize("name", ["lenet5", "resnet8"])
def test_latents_pass_through_the_input_quantizer(name: str) -> None:
    """A latent counts as what the last layer would read: on its grid, clipped at its ends."""
    torch.manual_seed(0)
    net = build_net(name, classes=10, channels=1, image_size=8)
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4, last_bits=4), example_inputs=IMAGES)
    calibrate(student, [torch.randn(8, 1, 8, 8)])
    head = Head.of(student.eval(), head_path(net, IMAGES))
    latents = 3 * torch.randn(16, head.features, generator=torch.Generator().manual_seed(1))
    step, quant = head.quantizer.quant.step.detach(), head.quantizer.quant
    on_grid = (latents / step).round().clamp(quant.low, quant.high) * step
    assert not torch.allclose(on_grid, latents, atol=1e-2)
    assert torch.equal(head(latents), head.layer(on_grid))
    assert torch.equal(head(latents), head(on_grid)), "a second pass changes nothing"
    seen: list[Tensor] = []
    handle = head.layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    head(latents)
    handle.remove()
    assert torch.equal(seen[0], on_grid)


def test_gradients_reach_latents_and_not_the_frozen_head() -> None:
    student = prepare(TinyNet(), QuantSpec(weight_bits=2, act_bits=2), example_inputs=IMAGES)
    calibrate(student, [torch.randn(8, 1, 8, 8)])
    head = Head.of(student, "head").frozen_copy().eval()
    latents = torch.rand(4, head.features, requires_grad=True)
    head(latents).square().sum().backward()
    assert latents.grad is not None and bool(latents.grad.isfinite().all()) and bool(latents.grad.any())
    assert all(parameter.grad is None for parameter in head.parameters())


def test_a_generator_makes_latents_of_classes() -> None:
    torch.manual_seed(0)
    generator = LatentGenerator(classes=3, features=5, noise=4).eval()
    noise = generator.draw(6, torch.Generator().manual_seed(0))
    assert noise.shape == (6, 4) and float(noise.min()) >= 0 and float(noise.max()) < 1
    latents = generator(noise, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert latents.shape == (6, 5)
    assert not torch.allclose(latents, generator(noise, torch.zeros(6).long()))


def test_the_server_learns_and_clients_get_it_from_the_second_round_on(data: Path) -> None:
    config = tiny_federated(data, "fedgen", precision="float", generator_steps=40, generator_lr=0.01)
    federation = federation_of(config)
    strategy, worker = Latents(federation), Worker(federation)
    before = {name: tensor.clone() for name, tensor in strategy.generator.state_dict().items()}
    assert strategy.sent(1) == {}
    orders = strategy.configure_train(1, federation.start)
    first = strategy.aggregate_train(1, [worker.answer(order) for order in orders]).metrics["generator_loss"]
    assert any(not torch.equal(before[name], tensor) for name, tensor in strategy.generator.state_dict().items())
    assert {*strategy.sent(2)} == {f"generator/{name}" for name in before}
    again = strategy.learn(2, *_sent_by(strategy, worker, orders))["generator_loss"]
    assert again < first, "the same clients' last layers find more of the classes"


def test_latents_weigh_less_from_round_to_round(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 times 0.98 to the power of the rounds that are done; in the first round there are none."""
    weights = []

    def told(*arguments: Tensor, weight: float) -> Tensor:
        weights.append(weight)
        return fedgen_client_loss(*arguments, weight=weight)

    monkeypatch.setattr(latents_module, "fedgen_client_loss", told)
    federation = federation_of(tiny_federated(data, "fedgen", precision="float", generator_steps=1, local_steps=1))
    strategy, worker = Latents(federation), Worker(federation)
    for server_round in (1, 2, 3):
        worker.answer(strategy.configure_train(server_round, federation.start)[0])
    assert weights == [pytest.approx(10 * 0.98), pytest.approx(10 * 0.98**2)]


def _sent_by(strategy: Latents, worker: Worker, orders: list) -> tuple[list[Reply], list]:  # type: ignore[type-arg]
    replies = [worker.answer(order) for order in orders]
    return replies, [strategy.upload.decode(reply.tensors) for reply in replies]


def test_a_class_that_no_client_has_is_not_asked_for(data: Path, tmp_path: Path) -> None:
    from qkd.federated.strategies.latents import _worth_asking

    assert _worth_asking(torch.tensor([[2, 1, 0], [0, 1, 0]])).tolist() == [0]
    assert _worth_asking(torch.tensor([[1, 1, 0]])).tolist() == [0, 1]
    server = server_of(tiny_federated(data, "fedgen", precision="float"), tmp_path)
    counts = server.federation.label_counts
    reply = Worker(server.federation).answer(server.strategy.configure_train(1, server.model)[0])
    assert torch.equal(reply.tensors["label_counts"], counts[0])
