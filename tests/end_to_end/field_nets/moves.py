"""Values that only move: chunks, slices, flips, shuffles, stacks, permutes, reshapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "moves"


@net(KIND, is_fast=True)
def cat_of_a_chunk(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(torch.cat(y.chunk(2, 1), 1)))


@net(KIND)
def chunk_with_one_half_convolved(self: Any, x: Tensor) -> Tensor:
    a, b = torch.chunk(self.relu(self.conv(x)), 2, dim=1)
    return self.head(torch.cat([a, self.narrow(b)[:, :4]], 1))


@net(KIND)
def split_by_sizes(self: Any, x: Tensor) -> Tensor:
    a, b, c = torch.split(self.conv(x), [4, 2, 2], dim=1)
    return self.head(torch.cat([F.relu(a), b, c], 1))


@net(KIND)
def split_by_size(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.cat(self.conv(x).split(4, 1)[::-1], 1))


@net(KIND)
def tensor_split(self: Any, x: Tensor) -> Tensor:
    a, b = self.conv(x).tensor_split(2, dim=1)
    return self.head(torch.cat([b, a], 1))


@net(KIND)
def unbind_rows(self: Any, x: Tensor) -> Tensor:
    rows = self.relu(self.conv(x)).unbind(2)
    return self.head(torch.stack(rows[::-1], 2))


@net(KIND)
def unbind_and_add(self: Any, x: Tensor) -> Tensor:
    rows = torch.unbind(self.relu(self.conv(x)), dim=3)
    return self.fc((rows[0] + rows[3]).mean(2))


@net(KIND, is_fast=True)
def slice_of_channels(self: Any, x: Tensor) -> Tensor:
    return self.head(self.narrow(self.relu(self.conv(x))[:, 2:6]))


@net(KIND)
def slice_of_space(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.relu(self.conv(x))[:, :, 1:-1, 2:]))


@net(KIND)
def slice_with_a_step(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.relu(self.conv(x))[..., ::2, 1::2]))


@net(KIND, focus=lambda: nn.Conv2d(12, 8, 3, padding=1))
def slices_to_depth(self: Any, x: Tensor) -> Tensor:
    y = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    return self.head(self.relu(self.focus(y)))


@net(KIND)
def signed_slice_of_space(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(y[:, :, 2:, 2:] + F.relu(y[:, :, :-2, :-2]))


@net(KIND)
def one_place(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x))[:, :, 0, 0])


@net(KIND)
def one_row_by_negative_index(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x))[:, :, -1].amax(-1))


@net(KIND)
def narrow_method(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.cat([y.narrow(1, 4, 4), torch.narrow(y, 1, 0, 4)], 1))


@net(KIND)
def select_method(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).select(3, 2).select(2, 1))


@net(KIND)
def flip_of_columns(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(torch.flip(y, [3])) + y.flip(2, 3))


@net(KIND)
def flip_of_the_image(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)) + self.relu(self.side(torch.flip(x, dims=(3,)))))


@net(KIND)
def roll(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(torch.roll(y, shifts=(1, -2), dims=(2, 3))))


@net(KIND, order=lambda: torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
def index_select(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.relu(self.conv(x)).index_select(1, self.order)))


@net(KIND, order=lambda: torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
def index_by_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.relu(self.conv(x))[:, self.order]))


@net(KIND, is_fast=True)
def stack_and_sum(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu(torch.stack([self.conv(x), self.side(x)]).sum(0)))


@net(KIND)
def stack_and_mean(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.stack([self.relu(self.conv(x)), self.side(x)], dim=0).mean(dim=0))


@net(KIND)
def stack_behind_the_batch(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.stack([self.conv(x), self.relu(self.side(x))], dim=1).sum(dim=1))


@net(KIND)
def stack_and_flatten(self: Any, x: Tensor) -> Tensor:
    y = torch.stack([self.conv(x), self.relu(self.side(x))], 2).flatten(1, 2)
    return self.head(self.wide(y))


@net(KIND, verdict=REFUSED, says="max")
def stack_and_max(self: Any, x: Tensor) -> Tensor:
    y = torch.stack([self.conv(x), self.side(x)], 2)
    return self.head(torch.maximum(y[:, :, 0], y[:, :, 1]))


@net(KIND)
def permute_by_keyword(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).permute(dims=(0, 3, 1, 2))
    return self.head(y.permute(0, 2, 3, 1))


@net(KIND)
def permute_function(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(torch.permute(self.relu(self.conv(x)), dims=[0, 1, 3, 2])))


@net(KIND)
def movedim_and_swapaxes(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).movedim(1, -1).swapaxes(1, 2)
    return self.head(torch.moveaxis(y, 3, 1))


@net(KIND)
def transpose_of_signed_values(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(y + y.transpose(-1, -2))


@net(KIND)
def capital_mt(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.relu(self.conv(x)).mT))


@net(KIND, is_fast=True, shuffle=lambda: nn.ChannelShuffle(2))
def channel_shuffle(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.shuffle(self.relu(self.conv(x)))))


@net(KIND)
def channel_shuffle_function(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.channel_shuffle(self.relu(self.conv(x)), 4)))


@net(KIND, up=lambda: nn.PixelShuffle(2), few=lambda: nn.Conv2d(2, 8, 3, padding=1))
def pixel_shuffle(self: Any, x: Tensor) -> Tensor:
    return self.head(self.few(self.up(self.relu(self.conv(x)))))


@net(KIND, many=lambda: nn.Conv2d(32, 8, 1), many2=lambda: nn.Conv2d(32, 8, 1), down2=lambda: nn.PixelUnshuffle(2))
def pixel_unshuffle(self: Any, x: Tensor) -> Tensor:
    return self.head(self.many(self.down2(self.relu(self.conv(x)))) + self.many2(F.pixel_unshuffle(self.side(x), 2)))


@net(KIND, split=lambda: nn.Unflatten(1, (2, 4)))
def unflatten(self: Any, x: Tensor) -> Tensor:
    y = self.split(self.relu(self.conv(x)))
    return self.head(y.transpose(1, 2).flatten(1, 2))


@net(KIND)
def unflatten_method(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).unflatten(1, (4, 2))
    return self.head(y.sum(2).repeat_interleave(2, 1))


@net(KIND)
def repeat_of_channels(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(self.conv(x).repeat(1, 2, 1, 1)))


@net(KIND)
def tile_of_channels(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(torch.tile(self.relu(self.conv(x)), (1, 2, 1, 1))))


@net(KIND)
def gray_image_expanded(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x[:, :1].expand(-1, 3, -1, -1))))


@net(KIND)
def flatten_unflatten_view(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y.flatten(1).view(-1, 8, 8, 8).reshape(y.size(0), 8, 4, 16))


@net(KIND)
def view_as_another(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y.flatten(2).view_as(self.side(x)) + y.reshape_as(y))


@net(KIND)
def mixed_signs_in_one_cat(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(torch.cat([F.relu(self.conv(x)), self.side(x)], 1)))


@net(KIND)
def rectified_slice_beside_signed_slice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(torch.cat([F.relu(y[:, :4]), y[:, 4:]], 1))


@net(KIND)
def relu_then_slice_then_cat_with_signed(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.conv(x))
    return self.head(self.conv2(torch.cat([y[:, :4], self.side(x)[:, :4]], 1)))


@net(KIND, is_fast=True, cheap=lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8))
def ghost_module(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.bn(self.conv(x)))
    b = self.relu(self.cheap(a))
    return self.head(torch.cat([a, b], 1)[:, :8, :, :])


@net(KIND)
def even_and_odd_channels(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(F.relu(y[:, ::2]).repeat(1, 2, 1, 1) + torch.cat([y[:, 1::2], y[:, 1::2]], 1))


@net(KIND)
def diff_of_neighbors(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y[:, :, 1:] - y[:, :, :-1])
