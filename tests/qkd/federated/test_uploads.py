"""Low-bit uploads: codes that come back as the weights that they mean, and how small they are."""

from __future__ import annotations

import pytest
import torch

from qkd.federated.messages import tensor_bytes
from qkd.federated.uploads import CodesUpload, FloatUpload, code_bits, pack, unpack
from qkd.testing.small import TinyNet
from quantizers import QuantSpec, Student, calibrate, prepare, quant_layers

pytestmark = pytest.mark.usefixtures("unfused")


def student(bits: int = 4, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    net = TinyNet()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a negative factor turns a channel's codes round
            module.weight.data.uniform_(-1, 1)
    made = prepare(net, QuantSpec(weight_bits=bits, act_bits=4), example_inputs=torch.zeros(2, 1, 8, 8))
    calibrate(made, [torch.randn(8, 1, 8, 8)])
    return made


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_and_come_back(bits: int) -> None:
    for count in (0, 1, 7, 8, 33):
        codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        assert torch.equal(unpack(packed, bits, count), codes)
    with pytest.raises(ValueError, match="9 codes of 4 bits take 5 bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)


def test_a_code_takes_the_bits_of_its_grid() -> None:
    assert [code_bits(*ends) for ends in ((-8, 7), (-64, 63), (-2, 1), (0, 0))] == [4, 7, 2, 1]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_server_gets_the_weights_that_the_codes_mean(bits: int) -> None:
    """Bit for bit what the client computes with; everything else of the state is the client's."""
    client, server = student(bits), student(bits, seed=1)
    upload = CodesUpload(server)
    tensors = upload.encode(client)
    state = upload.decode(tensors)
    assert {*state} == {*client.state_dict()}
    for name, layer in quant_layers(client).items():
        assert torch.equal(state[f"{name}.weight"], layer.low_bit_weight().detach())
        assert f"model/{name}.weight" not in tensors
    others = [name for name in state if name.removesuffix(".weight") not in quant_layers(client)]
    assert all(torch.equal(state[name], client.state_dict()[name]) for name in others) and len(others) > 20
    server.load_state_dict(state)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(server.eval()(images), client.eval()(images))


def test_what_is_lost_is_less_than_half_a_step_where_nothing_is_clipped() -> None:
    client = student(8)
    upload = CodesUpload(student(8, seed=1))
    state = upload.decode(upload.encode(client))
    for name, layer in quant_layers(client).items():
        lost = (state[f"{name}.weight"] - layer.weight).abs() / layer.quant.step
        sign = 1 if layer.bn is None else torch.where(layer.bn.weight < 0, -1, 1).reshape(-1, 1, 1, 1)
        codes = layer.weight * sign / layer.quant.step
        inside = (codes < layer.quant.high_code) & (codes > layer.quant.low_code)
        assert bool((lost[inside] <= 0.5 + 1e-4).all()) and bool((lost > 0).any())


def test_codes_are_smaller() -> None:
    client = student(4)
    whole = tensor_bytes(FloatUpload().encode(client))
    small = tensor_bytes(CodesUpload(student(4, seed=1)).encode(client))
    weights = sum(layer.weight.numel() for layer in quant_layers(client).values())
    assert whole - small == pytest.approx(4 * weights - weights / 2, rel=0.1)  # first and last layer have 8 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nets_on_a_gpu_send_codes() -> None:
    client = student().cuda()
    state = CodesUpload(student(seed=1).cuda()).decode(CodesUpload(client).encode(client))
    for name, layer in quant_layers(client).items():
        assert torch.equal(state[f"{name}.weight"], layer.low_bit_weight().detach().cpu())
