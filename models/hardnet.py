"""HarDNet base networks (Chao et al., ICCV 2019, arXiv 1909.00948) for SSD detectors.

Attribute names and list positions (``base.8.layers.3.conv.weight``) are frozen by the published
checkpoints.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from models.base import BaseNetwork, concatenate, init_kaiming


@dataclass(frozen=True)
class HarDNetSpec:
    """One variant in numbers; ``growth``, ``layers`` and ``channels`` have an entry per block."""

    stem: tuple[int, int]  # output channels of the first two convolutions
    growth: tuple[int, ...]  # growth rate k
    layers: tuple[int, ...]  # layers of the block
    channels: tuple[int, ...]  # output channels of the 1x1 convolution after the block
    multiplier: float  # multiplier m of layer widths
    pool_after: dict[int, bool]
    """Index of a block whose output is halved -> whether a max pool there rounds its size up."""
    stride8_block: int  # index of the block whose 1x1 convolution returns the first source map
    dilated_bridge: bool
    """Whether the base ends with the dilated bridge, which is pretrained with it."""
    depthwise: bool = False
    """Whether a block's layers are pairs of a 1x1 and a depthwise convolution (``CombConvLayer``),
    strided depthwise convolutions replace max pools, the second convolution is 1x1 instead of 3x3,
    and activations are ReLU6 instead of ReLU."""


HARDNET_SPECS = {
    68: HarDNetSpec(stem=(32, 64), growth=(14, 16, 20, 40), layers=(8, 16, 16, 16),
                    channels=(128, 256, 320, 640), multiplier=1.7, pool_after={0: True, 2: False},
                    stride8_block=2, dilated_bridge=True),
    85: HarDNetSpec(stem=(48, 96), growth=(24, 24, 28, 36, 48), layers=(8, 16, 16, 16, 16),
                    channels=(192, 256, 320, 480, 720), multiplier=1.7,
                    pool_after={0: True, 2: False}, stride8_block=2, dilated_bridge=False),
    # The depthwise variants, without the last block of the classifiers.
    "68ds": HarDNetSpec(stem=(32, 64), growth=(14, 16, 20, 40), layers=(8, 16, 16, 16),
                        channels=(128, 256, 320, 640), multiplier=1.7,
                        pool_after={0: False, 2: False}, stride8_block=2, dilated_bridge=False,
                        depthwise=True),
    "39ds": HarDNetSpec(stem=(24, 48), growth=(16, 20, 64), layers=(4, 16, 8),
                        channels=(96, 320, 640), multiplier=1.6, pool_after={0: False, 1: False},
                        stride8_block=1, dilated_bridge=False, depthwise=True),
}


class ConvLayer(nn.Sequential):
    """Convolution without bias (padding ``kernel // 2``), batch normalisation, activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1,
                 activation: type[nn.Module] = nn.ReLU) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        norm, relu = nn.BatchNorm2d(out_channels), activation(inplace=True)
        super().__init__(OrderedDict(conv=conv, norm=norm, relu=relu))


class DWConvLayer(nn.Sequential):
    """Depthwise 3x3 convolution (padding ``dilation``) and batch normalisation, no activation."""

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1) -> None:
        conv = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, channels, bias=False)
        super().__init__(OrderedDict(dwconv=conv, norm=nn.BatchNorm2d(channels)))


class CombConvLayer(nn.Sequential):
    """A layer of HarDNet-DS: a 1x1 convolution, then a depthwise one on its fewer channels."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        conv = ConvLayer(in_channels, out_channels, 1, activation=nn.ReLU6)
        depthwise = DWConvLayer(out_channels, dilation=dilation)
        super().__init__(OrderedDict(layer1=conv, layer2=depthwise))


def harmonic_links(layer: int) -> list[int]:
    """Return the inputs of layer ``layer`` (from 1; 0 is the block's input), nearest layer first.

    Layer l takes the outputs of layers l - 2^i for every i >= 0 such that 2^i divides l
    (section 3.1).
    """
    return [layer - 2**i for i in range(layer.bit_length()) if layer % 2**i == 0]


def layer_width(layer: int, growth: int, multiplier: float) -> int:
    """Return the output channels of a layer: growth x multiplier per link after the first, even."""
    width = float(growth)
    for _ in harmonic_links(layer)[1:]:
        width *= multiplier
    return int(int(width + 1) / 2) * 2


class HarDBlock(nn.Module):
    """Harmonic dense block: [B, in_channels, H, W] -> [B, out_channels, H, W].

    The output concatenates every odd layer and the last one, in layer order. It does not contain
    the block's input. ``layer(inputs, outputs)`` builds a layer.
    """

    def __init__(self, in_channels: int, growth: int, multiplier: float, n_layers: int,
                 layer: Callable[[int, int], nn.Module] = ConvLayer) -> None:
        super().__init__()
        widths = [in_channels]
        widths += [layer_width(i, growth, multiplier) for i in range(1, n_layers + 1)]
        self.links = [harmonic_links(i) for i in range(1, n_layers + 1)]
        self.outputs = [i for i in range(1, n_layers + 1) if i % 2 == 1 or i == n_layers]
        self.out_channels = sum(widths[i] for i in self.outputs)
        self.layers = nn.ModuleList(layer(sum(widths[j] for j in links), widths[i])
                                    for i, links in enumerate(self.links, start=1))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for links, layer in zip(self.links, self.layers, strict=True):
            inputs = [values[i] for i in links]
            values.append(layer(inputs[0] if len(inputs) == 1 else concatenate(inputs)))
        return concatenate([values[i] for i in self.outputs])


class HarDNetBase(BaseNetwork):
    """A variant's base network: a stem, then blocks, each followed by a 1x1 convolution."""

    def __init__(self, spec: HarDNetSpec) -> None:
        super().__init__()
        conv = partial(ConvLayer, activation=nn.ReLU6 if spec.depthwise else nn.ReLU)

        def halve(channels: int, pool: nn.Module) -> None:
            self.append(DWConvLayer(channels, stride=2) if spec.depthwise else pool)

        stem1, channels = spec.stem
        self.append(conv(3, stem1, stride=2))
        self.append(conv(stem1, channels, kernel=1 if spec.depthwise else 3))
        halve(channels, nn.MaxPool2d(3, stride=2, padding=1))
        for i, out_channels in enumerate(spec.channels):
            block = HarDBlock(channels, spec.growth[i], spec.multiplier, spec.layers[i],
                              CombConvLayer if spec.depthwise else conv)
            self.append(block)
            self.append(conv(block.out_channels, out_channels, kernel=1))
            channels = out_channels
            if i == spec.stride8_block:
                self.tap = len(self) - 1
            if i in spec.pool_after:
                halve(channels, nn.MaxPool2d(2, ceil_mode=spec.pool_after[i]))
        if spec.dilated_bridge:
            self.append(nn.Sequential(
                nn.MaxPool2d(3, stride=1, padding=1),
                nn.Conv2d(channels, channels, 3, padding=4, dilation=4, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                ConvLayer(channels, channels, kernel=1),
            ))
        self.out_channels = (spec.channels[spec.stride8_block], channels)
        init_kaiming(self)


class Bridge(nn.Sequential):
    """What HarDNet85 has between base and source 2: [B, C, H, W] -> [B, C, H, W].

    It is not pretrained, and a member of the detector (``bridge``), not of ``base``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.MaxPool2d(3, stride=1, padding=1), ConvLayer(channels, 960),
                         ConvLayer(960, channels, kernel=1))
        init_kaiming(self)


class DepthwiseBridge(nn.Sequential):
    """What the depthwise variants have between base and source 2: [B, C, H, W] -> [B, C, H, W].

    No such detector was published. This bridge is HarDNet68's (max pool, 3x3 convolution of
    dilation 4, 1x1 convolution) with a pair of a 1x1 and a depthwise convolution in place of the
    3x3 convolution, as in the blocks: the same receptive field with a fifth of the weights. It is
    not pretrained, and a member of the detector (``bridge``), not of ``base``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.MaxPool2d(3, stride=1, padding=1),
                         CombConvLayer(channels, channels, dilation=4),
                         ConvLayer(channels, channels, kernel=1, activation=nn.ReLU6))
        init_kaiming(self)
