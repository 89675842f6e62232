"""What a net gives: probabilities, tuples, dictionaries, feature maps, the same value twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "outputs"


@net(KIND, is_fast=True, same_in_training=False)
def log_softmax_at_the_end(self: Any, x: Tensor) -> Tensor:
    return F.log_softmax(self.head(self.relu(self.conv(x))), dim=1)


@net(KIND, same_in_training=False)
def softmax_at_the_end(self: Any, x: Tensor) -> Tensor:
    return F.softmax(self.head(self.relu(self.conv(x))), dim=-1)


@net(KIND, same_in_training=False, last=lambda: nn.Softmax(dim=1))
def softmax_module(self: Any, x: Tensor) -> Tensor:
    return self.last(self.head(self.relu(self.conv(x))))


@net(KIND, same_in_training=False, last=lambda: nn.LogSoftmax(dim=1))
def log_softmax_module(self: Any, x: Tensor) -> Tensor:
    return self.last(self.head(self.relu(self.conv(x))))


@net(KIND, same_in_training=False)
def softmax_methods(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x))).log_softmax(1)


@net(KIND, same_in_training=False, seg=lambda: nn.Conv2d(8, 4, 1))
def softmax_over_channels(self: Any, x: Tensor) -> Tensor:
    return torch.softmax(self.seg(self.relu(self.conv(x))), 1)


@net(KIND, same_in_training=False)
def softmax_of_scaled_logits(self: Any, x: Tensor) -> Tensor:
    return F.softmax(self.head(self.relu(self.conv(x))) / 4.0, 1)


@net(KIND, verdict=REFUSED, says="softmax")
def softmax_inside(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * F.softmax(self.side(x), dim=1))


@net(KIND, same_in_training=False)
def logits_and_probabilities(self: Any, x: Tensor) -> Any:
    logits = self.head(self.relu(self.conv(x)))
    return logits, F.softmax(logits, 1)


@net(KIND, is_fast=True)
def dictionary(self: Any, x: Tensor) -> Any:
    y = self.relu(self.conv(x))
    return {"out": self.head(y), "features": self.conv2(y)}


@net(KIND)
def dictionary_of_one(self: Any, x: Tensor) -> Any:
    return {"logits": self.head(self.relu(self.conv(x)))}


@net(KIND, b=lambda: nn.Linear(8, 3))
def tuple_of_two(self: Any, x: Tensor) -> Any:
    y = self.pool(self.relu(self.conv(x))).flatten(1)
    return self.fc(y), self.b(y)


@net(KIND)
def list_of_features(self: Any, x: Tensor) -> Any:
    y = self.relu(self.conv(x))
    z = self.relu(self.conv2(y))
    return [self.head(z), y, z]


@net(KIND, verdict=REFUSED, says="output|dict|nested")
def nested_outputs(self: Any, x: Tensor) -> Any:
    y = self.relu(self.conv(x))
    return {"out": self.head(y), "taps": [y, self.conv2(y)]}


@net(KIND)
def one_value_twice(self: Any, x: Tensor) -> Any:
    out = self.head(self.relu(self.conv(x)))
    return out, out


@net(KIND)
def the_image_comes_back(self: Any, x: Tensor) -> Any:
    return self.head(self.relu(self.conv(x))), x


@net(KIND, is_fast=True, seg=lambda: nn.Conv2d(8, 2, 1))
def feature_map(self: Any, x: Tensor) -> Tensor:
    return self.seg(self.relu(self.conv(x)))


@net(KIND)
def feature_map_rectified(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.conv(x)))


@net(KIND)
def features_of_a_mean(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.conv(x)).mean((2, 3))


@net(KIND, seg=lambda: nn.Conv2d(8, 5, 1))
def mean_of_class_maps(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.seg(self.relu(self.conv(x)))).flatten(1)


@net(KIND, seg=lambda: nn.Conv2d(8, 5, 1))
def rectified_class_maps_averaged(self: Any, x: Tensor) -> Tensor:
    return torch.flatten(self.pool(self.relu(self.seg(self.relu(self.conv(x))))), 1)


@net(KIND)
def sum_at_the_end(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.conv2(y) + y


@net(KIND)
def concatenation_at_the_end(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return torch.cat([self.conv2(y), y], 1)


@net(KIND)
def slice_at_the_end(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)))[:, :3]


@net(KIND)
def relu_map_beside_raw_map(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.head(F.relu(y)), y


@net(KIND, verdict=REFUSED, says="norm")
def embedding_of_unit_length(self: Any, x: Tensor) -> Tensor:
    return F.normalize(self.head(self.relu(self.conv(x))), dim=1)


@net(KIND, verdict=REFUSED, says="argmax|max")
def classes_instead_of_logits(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x))).argmax(1)
