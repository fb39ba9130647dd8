"""Parts that networks share: two feature maps, norms, initialisation, lean concatenation."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_PARTS: ContextVar[WeakTensorKeyDictionary | None] = ContextVar("_PARTS", default=None)
"""Live results of ``concatenate`` -> their parts; None outside of ``recompute_concatenations``."""


class BaseNetwork(nn.Sequential):
    """A row of layers: images [B, 3, S, S] -> (stride-8 map, stride-16 map).

    A subclass appends its layers and sets ``tap`` and ``out_channels``.
    """

    tap: int  # position of the layer that returns the stride-8 map
    out_channels: tuple[int, int]  # channels of the two maps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self):
            x = layer(x)
            if i == self.tap:
                stride8 = x
        return stride8, x


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that can train on one image and a 1x1 map.

    One value per channel has no variance; then the running statistics are used.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x[:, 0].numel() == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        return super().forward(x)


class NormedConv2d(nn.Conv2d):
    """Convolution without bias, then batch normalisation; ``deploy`` makes it one convolution."""

    def __init__(self, in_channels: int, out_channels: int, *args: int, **options: int) -> None:
        super().__init__(in_channels, out_channels, *args, **options, bias=False)
        self.norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def on_meta(net: nn.Module) -> nn.Module:
    """Return a copy of a module without data, on the meta device."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, memo={id(t): t.to("meta") for t in tensors})


def init_kaiming(module: nn.Module) -> None:
    """Initialise convolutions by Kaiming normal (fan-out) with zero bias, as HarDNet does."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and not m.weight.is_meta:  # there it is slow and has no effect
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors [B, C_k, H, W] to [B, sum of C_k, H, W]."""
    whole = torch.cat(parts, 1)
    made_of = _PARTS.get()
    if made_of is not None:
        made_of[whole] = [part.detach() for part in parts]
    return whole


@contextmanager
def recompute_concatenations() -> Iterator[None]:
    """Let autograd save the parts of a concatenation instead of its result (arXiv 1707.06990).

    A dense network saves the parts anyway, so concatenations cost no memory. The backward pass
    concatenates them again, with the same bits. No convolution is repeated.
    """
    made_of = WeakTensorKeyDictionary()
    token = _PARTS.set(made_of)
    try:
        # Detached, because an operation that saves its own result would never be freed.
        with saved_tensors_hooks(lambda saved: made_of.get(saved) or saved.detach(), _whole):
            yield
    finally:
        _PARTS.reset(token)


def _whole(saved: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(saved, 1) if isinstance(saved, list) else saved
