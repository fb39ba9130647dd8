"""The single-shot detector (Liu et al., ECCV 2016, arXiv 1512.02325) on any base network."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.l2norm import L2Norm
from models.base import NormedConv2d, recompute_concatenations


class Detector(nn.Module):
    """Source maps of a network, with a location and a confidence head on each of them.

    ``forward`` maps images [B, 3, S, S] (BGR, 0..255 minus the mean) to ``loc`` [B, P, 4], the box
    offsets encoded against the prior boxes, and ``conf`` [B, P, num_classes], logits with class
    0 = background. It returns the same pair in training and evaluation mode.

    Member names and positions are frozen by the published checkpoints.
    """

    recompute = False
    """Whether training saves the parts of concatenations in HarD blocks: less memory, slightly more
    time, the same gradients. It has no effect on other bases and under torch.compile."""

    def _add_heads(self, channels: Sequence[int], boxes_per_cell: Sequence[int],
                   num_classes: int, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        """Add the heads on source maps of ``channels``; call it last, for the order of keys."""
        if len(channels) != len(boxes_per_cell):
            raise ValueError(f"the network has {len(channels)} source maps, the prior boxes are "
                             f"given for {len(boxes_per_cell)}")
        self.num_classes = num_classes
        self.loc = _heads(channels, [a * 4 for a in boxes_per_cell], conv)
        self.conf = _heads(channels, [a * num_classes for a in boxes_per_cell], conv)
        if conv is NormedConv2d:
            # A norm's shift alone moves the mean of a logit. Start where hard negative mining
            # leaves one positive in four.
            for head in self.conf:
                nn.init.constant_(head.norm.bias[::num_classes], log(3 * (num_classes - 1)))

    def sources(self, images: Tensor) -> list[Tensor]:
        """Return the source maps [B, C_k, H_k, W_k], largest first."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        recompute = self.recompute and not torch.compiler.is_compiling()
        with recompute_concatenations() if recompute else nullcontext():
            sources = self.sources(images)
        loc = [_rows(head(x), 4) for head, x in zip(self.loc, sources, strict=True)]
        conf = [_rows(head(x), self.num_classes)
                for head, x in zip(self.conf, sources, strict=True)]
        return torch.cat(loc, 1), torch.cat(conf, 1)


class SSD(Detector):
    """A base network and extra layers; every second extra layer returns a source map.

    Args of the constructor:
        base: returns two maps, sources 1 and 2, and has their ``out_channels``.
        extras: convolutions; each is followed by ReLU.
        boxes_per_cell: prior boxes per cell, by source map.
        num_classes: with background.
        bridge: stands between the base and source 2.
        conv: of the heads, ``nn.Conv2d`` or ``models.base.NormedConv2d``.
    """

    def __init__(self, base: nn.Module, extras: nn.ModuleList, boxes_per_cell: Sequence[int],
                 num_classes: int, bridge: nn.Module | None = None,
                 conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.bridge = bridge if bridge is not None else nn.Identity()
        self.extras = extras
        self.L2Norm = L2Norm(base.out_channels[0])
        channels = [*base.out_channels, *(layer.out_channels for layer in extras[1::2])]
        self._add_heads(channels, boxes_per_cell, num_classes, conv)

    def sources(self, images: Tensor) -> list[Tensor]:
        first, x = self.base(images)
        x = self.bridge(x)
        sources = [self.L2Norm(first), x]
        for i, layer in enumerate(self.extras):
            x = F.relu(layer(x))
            if i % 2 == 1:
                sources.append(x)
        return sources


_HALVE = {"kernel_size": 3, "stride": 2, "padding": 1}
_SHRINK = {"kernel_size": 3}
_LAST = {"kernel_size": 4, "padding": 1}
STRIDE16 = {
    300: ((256, 512, _HALVE), (128, 256, _HALVE), (128, 256, _SHRINK), (128, 256, _SHRINK)),
    512: ((256, 512, _HALVE), *((128, 256, _HALVE),) * 3, (128, 256, _LAST)),
}
"""Size of the input -> steps of the extra layers after a stride-16 map: width of a 1x1 convolution,
outputs and options of the convolution that then shrinks the map."""
STRIDE32 = {300: ((256, 512, _HALVE), *((128, 256, _HALVE),) * 3)}
"""The same after a stride-32 map, of 10 cells at 300: 5, 3, 2 and 1 cells."""


def ssd_extras(in_channels: int, size: int, conv: type[nn.Conv2d] = nn.Conv2d,
               steps: Mapping[int, Sequence[tuple[int, int, dict]]] = STRIDE16) -> nn.ModuleList:
    """Build the extra layers that shrink the second map to 1x1, two convolutions a step."""
    layers: list[nn.Module] = []
    for width, out, options in steps[size]:
        layers += [conv(in_channels, width, 1), conv(width, out, **options)]
        in_channels = out
    _zero_biases(layers)
    return nn.ModuleList(layers)


def _heads(in_channels: Sequence[int], out_channels: Sequence[int],
           conv: type[nn.Conv2d]) -> nn.ModuleList:
    heads = [conv(i, o, 3, padding=1) for i, o in zip(in_channels, out_channels, strict=True)]
    _zero_biases(heads)
    return nn.ModuleList(heads)


def _zero_biases(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _rows(x: Tensor, columns: int) -> Tensor:
    """[B, A * columns, H, W] -> [B, H * W * A, columns], in the order of the prior boxes."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns)
