"""What every base network is: layers in a row that yield two feature maps; concatenations whose
memory training can save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

_PARTS: ContextVar[WeakTensorKeyDictionary | None] = ContextVar("_PARTS", default=None)
"""The concatenations that are still referred to -> what they are made of."""


class BaseNetwork(nn.Sequential):
    """A classifier's layers: images [B, 3, S, S] -> (stride-8 map, stride-16 map).

    A subclass adds its layers and says ``tap``, the position of the layer that gives the
    stride-8 map, and ``out_channels`` of the two maps.
    """

    tap: int
    out_channels: tuple[int, int]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self):
            x = layer(x)
            if i == self.tap:
                stride8 = x
        return stride8, x


def init_kaiming(module: nn.Module) -> None:
    """Kaiming-normal (fan-out) convolutions with zero bias, as HarDNet's classifiers start."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [B, C_k, H, W] side by side: [B, sum of C_k, H, W]."""
    whole = torch.cat(parts, 1)
    made_of = _PARTS.get()
    if made_of is not None:
        made_of[whole] = [part.detach() for part in parts]
    return whole


@contextmanager
def recompute_concatenations() -> Iterator[None]:
    """What autograd saves inside of a result of ``concatenate`` is its parts (arXiv 1707.06990).

    A dense network's parts are saved anyway, so that the copies side by side cost no memory; they
    are made again in the backward pass, bit by bit the same. No convolution is repeated.
    """
    made_of = WeakTensorKeyDictionary()
    token = _PARTS.set(made_of)
    try:
        # Detached, as an operation that keeps its own result would never be freed.
        with saved_tensors_hooks(lambda saved: made_of.get(saved) or saved.detach(), _whole):
            yield
    finally:
        _PARTS.reset(token)


def _whole(saved: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(saved, 1) if isinstance(saved, list) else saved
