"""Reading logits and features of a split: what comes out is what the net computes, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkd.analysis.outputs import LastInput, last_linear, read_outputs, some_images
from qkd.config import DataConfig
from qkd.data import normalize
from qkd.progress import Tracker
from qkd.testing import TinyNet, synthetic_splits

CPU = torch.device("cpu")
DATA = DataConfig(name="npz", eval_batch_size=7)


class TwoHeads(nn.Module):
    """The linear layer that is listed last runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(5, 4)
        self.flatten = nn.Flatten()
        self.inner = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.inner(self.flatten(x)).relu())  # type: ignore[no-any-return]


def test_logits_and_features_are_what_the_net_computes() -> None:
    splits = synthetic_splits(train=20)
    net = TinyNet().train()

    class Count(Tracker):
        images = 0

        def update(self, n: int = 1, **values: object) -> None:
            self.images += n

    tracker = Count()
    places = torch.tensor([3, 0, 19, 7, 8, 9, 10, 11])
    found = read_outputs(net, splits.train, splits, DATA, CPU, indices=places, tracker=tracker)
    assert net.training and all(module.training for module in net.modules()) and tracker.images == 8
    assert not any(module._forward_hooks for module in net.modules())
    images, labels = splits.train.batch(places, CPU)
    with torch.no_grad():
        expected = net.eval()(normalize(images, splits.mean, splits.std))
    assert torch.allclose(found.logits, expected, atol=1e-6) and torch.equal(found.labels, labels)
    assert found.features is not None and found.features.shape == (8, 6)
    assert torch.allclose(found.features @ net.head.weight.T + net.head.bias, expected, atol=1e-6)
    tapped = read_outputs(net, splits.train, splits, DATA, CPU, tap="stem")
    assert tapped.features is not None and tapped.features.shape == (20, 6, 8, 8)


def test_the_last_linear_layer_is_the_one_that_runs_last() -> None:
    splits, net = synthetic_splits(), TwoHeads()
    assert last_linear(net, torch.zeros(1, 1, 8, 8)) is net.classifier
    found = read_outputs(net, splits.test, splits, DATA, CPU)
    assert found.features is not None and found.features.shape == (32, 5)


def test_a_net_without_linear_layer_has_logits_only() -> None:
    splits = synthetic_splits()
    net = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    found = read_outputs(net, splits.test, splits, DATA, CPU)
    assert found.features is None and found.logits.shape == (32, 4)
    assert read_outputs(net, splits.test, splits, DATA, CPU, tap="0").features is not None
    with pytest.raises(ValueError, match="the teacher has no linear layer"):
        LastInput(net, role="teacher")


def test_what_is_refused() -> None:
    splits = synthetic_splits(val=0)
    with pytest.raises(ValueError, match="no module 'steam'; did you mean `stem`"):
        read_outputs(TinyNet(), splits.test, splits, DATA, CPU, tap="steam")
    with pytest.raises(ValueError, match="the split is empty"):
        read_outputs(TinyNet(), splits.val, splits, DATA, CPU)
    with pytest.raises(RuntimeError, match="no linear layer of the student ran"):
        LastInput(TinyNet(), role="student").take(None)


def test_some_images_are_of_all_classes_and_seeded() -> None:
    train = synthetic_splits(train=64).train
    first, again = (some_images(train, 20, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and torch.bincount(train.labels[first]).tolist() == [5, 5, 5, 5]
    for limit in (None, 64, 1000):
        assert torch.equal(some_images(train, limit, torch.Generator()), torch.arange(64))


def test_a_net_that_diverged_is_refused() -> None:
    splits = synthetic_splits(train=20)
    net = TinyNet()
    with torch.no_grad():
        next(net.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="of the student are not all finite"):
        read_outputs(net, splits.train, splits, DATA, CPU, role="student")
