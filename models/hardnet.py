"""HarDNet base networks (Chao et al., ICCV 2019, arXiv 1909.00948) for SSD detectors.

Attribute names and list positions (``base.8.layers.3.conv.weight``) are frozen by the published
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import BaseNetwork, init_kaiming


@dataclass(frozen=True)
class HarDNetSpec:
    """One row of numbers per variant; ``growth``, ``layers`` and ``channels`` go block by block."""

    stem: tuple[int, int]
    growth: tuple[int, ...]
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    """Outputs of the 1x1 convolution that follows each block."""
    multiplier: float
    pool_after: dict[int, bool]
    """Blocks followed by a 2x2 max pool, and whether that pool rounds its output size up."""
    stride8_block: int
    """The block whose 1x1 convolution gives the first source map."""
    dilated_bridge: bool
    """Whether the base ends with the dilated bridge (pretrained with it)."""


HARDNET_SPECS = {
    68: HarDNetSpec(
        stem=(32, 64),
        growth=(14, 16, 20, 40),
        layers=(8, 16, 16, 16),
        channels=(128, 256, 320, 640),
        multiplier=1.7,
        pool_after={0: True, 2: False},
        stride8_block=2,
        dilated_bridge=True,
    ),
    85: HarDNetSpec(
        stem=(48, 96),
        growth=(24, 24, 28, 36, 48),
        layers=(8, 16, 16, 16, 16),
        channels=(192, 256, 320, 480, 720),
        multiplier=1.7,
        pool_after={0: True, 2: False},
        stride8_block=2,
        dilated_bridge=False,
    ),
}


class ConvLayer(nn.Sequential):
    """Convolution without bias (padding ``kernel // 2``), batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.add_module(
            "conv",
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        )
        self.add_module("norm", nn.BatchNorm2d(out_channels))
        self.add_module("relu", nn.ReLU(inplace=True))


def harmonic_links(layer: int) -> list[int]:
    """Inputs of layer ``layer`` (1-based; 0 is the block's input), nearest layer first.

    Layer l takes layer l - 2^i for every i >= 0 such that 2^i divides l (section 3.1).
    """
    return [layer - 2**i for i in range(layer.bit_length()) if layer % 2**i == 0]


def layer_width(layer: int, growth: int, multiplier: float) -> int:
    """Output channels of layer ``layer``: growth x multiplier per link beyond the first, even."""
    width = float(growth)
    for _ in harmonic_links(layer)[1:]:
        width *= multiplier
    return int(int(width + 1) / 2) * 2


class HarDBlock(nn.Module):
    """Harmonic dense block: [B, in_channels, H, W] -> [B, out_channels, H, W].

    The output concatenates every odd layer and the last one, in layer order; the block's input
    is not kept.
    """

    def __init__(self, in_channels: int, growth: int, multiplier: float, n_layers: int):
        super().__init__()
        widths = [in_channels]
        widths += [layer_width(i, growth, multiplier) for i in range(1, n_layers + 1)]
        self.links = [harmonic_links(i) for i in range(1, n_layers + 1)]
        self.outputs = [i for i in range(1, n_layers + 1) if i % 2 == 1 or i == n_layers]
        self.out_channels = sum(widths[i] for i in self.outputs)
        self.layers = nn.ModuleList(
            ConvLayer(sum(widths[j] for j in links), widths[i])
            for i, links in enumerate(self.links, start=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for links, layer in zip(self.links, self.layers, strict=True):
            inputs = [values[i] for i in links]
            values.append(layer(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)))
        return torch.cat([values[i] for i in self.outputs], 1)


class HarDNetBase(BaseNetwork):
    """A variant's base network: stem, then blocks, each with the 1x1 convolution behind it."""

    def __init__(self, spec: HarDNetSpec):
        super().__init__()
        stem1, stem2 = spec.stem
        self.append(ConvLayer(3, stem1, stride=2))
        self.append(ConvLayer(stem1, stem2))
        self.append(nn.MaxPool2d(3, stride=2, padding=1))
        channels = stem2
        for i, out_channels in enumerate(spec.channels):
            block = HarDBlock(channels, spec.growth[i], spec.multiplier, spec.layers[i])
            self.append(block)
            self.append(ConvLayer(block.out_channels, out_channels, kernel=1))
            channels = out_channels
            if i == spec.stride8_block:
                self.tap = len(self) - 1
            if i in spec.pool_after:
                self.append(nn.MaxPool2d(2, ceil_mode=spec.pool_after[i]))
        if spec.dilated_bridge:
            self.append(
                nn.Sequential(
                    nn.MaxPool2d(3, stride=1, padding=1),
                    nn.Conv2d(channels, channels, 3, padding=4, dilation=4, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    ConvLayer(channels, channels, kernel=1),
                )
            )
        self.out_channels = (spec.channels[spec.stride8_block], channels)
        init_kaiming(self)


class Bridge(nn.Sequential):
    """HarDNet85's step from the base's end to source 2: [B, C, H, W] -> [B, C, H, W].

    Not pretrained; a member of the detector (``bridge``), not of ``base``.
    """

    def __init__(self, channels: int, hidden: int = 960):
        super().__init__(
            nn.MaxPool2d(3, stride=1, padding=1),
            ConvLayer(channels, hidden),
            ConvLayer(hidden, channels, kernel=1),
        )
        init_kaiming(self)
