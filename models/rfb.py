"""Receptive-field blocks instead of plain extra layers (RFBNet, arXiv 1711.07767)."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import BatchNorm, init_kaiming
from models.ssd import Detector


class BasicConv(nn.Sequential):
    """Convolution without bias, batch normalisation and, unless ``linear``, ReLU.

    The default ``padding`` keeps the size at stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int] = 1,
                 stride: int = 1, dilation: int = 1, padding: int | None = None,
                 linear: bool = False) -> None:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = tuple(dilation * (side // 2) for side in kernel)
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)
        layers = OrderedDict(conv=conv, bn=BatchNorm(out_channels, momentum=0.01))
        super().__init__(layers if linear else layers | {"relu": nn.ReLU(inplace=True)})
        self.out_channels = out_channels


class ReceptiveField(nn.Module):
    """Parallel branches of different receptive fields, mixed and added to a shortcut, then ReLU.

    [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride], rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, branches: Sequence[Sequence[BasicConv]],
                 stride: int = 1) -> None:
        super().__init__()
        self.n_branches = len(branches)
        for i, layers in enumerate(branches):
            self.add_module(f"branch{i}", nn.Sequential(*layers))
        mixed = sum(layers[-1].out_channels for layers in branches)
        self.ConvLinear = BasicConv(mixed, out_channels, linear=True)
        self.shortcut = BasicConv(in_channels, out_channels, stride=stride, linear=True)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        branches = [getattr(self, f"branch{i}")(x) for i in range(self.n_branches)]
        return F.relu(self.ConvLinear(torch.cat(branches, 1)) + self.shortcut(x))


def source_field(in_channels: int) -> ReceptiveField:
    """Build the block of 512 channels on source 1 (RFB-s: more branches, 3x1 and 1x3 kernels)."""
    t, tall, wide = in_channels // 4, (3, 1), (1, 3)
    branches = [[BasicConv(in_channels, t), BasicConv(t, t, 3, linear=True)],
                *([BasicConv(in_channels, t), BasicConv(t, t, kernel),
                   BasicConv(t, t, 3, dilation=3, linear=True)] for kernel in (tall, wide)),
                [BasicConv(in_channels, t // 2), BasicConv(t // 2, 3 * t // 4, wide),
                 BasicConv(3 * t // 4, t, tall), BasicConv(t, t, 3, dilation=5, linear=True)]]
    return ReceptiveField(in_channels, 512, branches)


def extra_field(in_channels: int, out_channels: int, stride: int, visual: int) -> ReceptiveField:
    """Build a block of the extras; ``visual`` sets the dilation of its convolutions."""
    t = in_channels // 8
    near, far = visual + 1, 2 * visual + 1
    branches = [[BasicConv(in_channels, t), BasicConv(t, 2 * t, 3, stride),
                 BasicConv(2 * t, 2 * t, 3, dilation=near, linear=True)],
                [BasicConv(in_channels, t), BasicConv(t, t // 2 * 3, 3),
                 BasicConv(t // 2 * 3, 2 * t, 3, stride),
                 BasicConv(2 * t, 2 * t, 3, dilation=far, linear=True)]]
    return ReceptiveField(in_channels, out_channels, branches, stride)


# size -> (outputs, stride, visual) of the blocks, options of the convolutions after them
_EXTRAS = {300: (((1024, 1, 2), (512, 2, 2), (256, 2, 2)), ({"kernel": 3, "padding": 0},) * 2),
           512: (((1024, 1, 2), (512, 2, 2), (256, 2, 2), (256, 2, 1), (256, 2, 1)),
                 ({"kernel": 4, "padding": 1},))}


def rfb_extras(in_channels: int, size: int) -> nn.ModuleList:
    """Build the extra layers after the stride-16 map: blocks, then pairs of convolutions to 1x1."""
    fields, shrinking = _EXTRAS[size]
    layers: list[nn.Module] = []
    for out, stride, visual in fields:
        layers.append(extra_field(in_channels, out, stride, visual))
        in_channels = out
    for options in shrinking:
        layers += [BasicConv(in_channels, 128), BasicConv(128, 256, **options)]
        in_channels = 256
    extras = nn.ModuleList(layers)
    init_kaiming(extras)
    return extras


class RFBNet(Detector):
    """A base network, a receptive-field block on source 1, and ``rfb_extras``.

    The base's second map is no source. Every block of the extras returns a source map, and every
    second convolution after them.
    """

    def __init__(self, base: nn.Module, extras: nn.ModuleList, boxes_per_cell: Sequence[int],
                 num_classes: int) -> None:
        super().__init__()
        self.base = base
        self.Norm = source_field(base.out_channels[0])
        init_kaiming(self.Norm)
        self.extras = extras
        fields = sum(isinstance(layer, ReceptiveField) for layer in extras)
        self.source_layers = [*range(fields), *range(fields + 1, len(extras), 2)]
        channels = [self.Norm.out_channels, *(extras[i].out_channels for i in self.source_layers)]
        self._add_heads(channels, boxes_per_cell, num_classes)

    def sources(self, images: Tensor) -> list[Tensor]:
        first, x = self.base(images)
        sources = [self.Norm(first)]
        for i, layer in enumerate(self.extras):
            x = layer(x)
            if i in self.source_layers:
                sources.append(x)
        return sources
