"""Prior boxes (SSD's default boxes, arXiv 1512.02325, section 2.2)."""

from collections.abc import Sequence
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor, nn


class Preset(Protocol):
    """Where prior boxes lie: a ``data.config.PriorConfig``, whose documentation has the fields."""

    size: int
    feature_maps: Sequence[int]
    steps: Sequence[float]
    min_sizes: Sequence[float]
    max_sizes: Sequence[float]
    aspect_ratios: Sequence[Sequence[float]]


class PriorBox(nn.Module):
    """The prior boxes of a preset, as a buffer that follows ``.to(device)``.

    ``PriorBox(config)()`` returns float32 [P, 4], (cx, cy, w, h) relative to the image, clipped to
    [0, 1]. They are ordered by source map, row and column. A cell has the square box of the minimum
    size, the square box between minimum and maximum size, and for every aspect ratio the wide and
    the tall box.
    """

    def __init__(self, config: Preset) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("boxes", _prior_boxes(config), persistent=False)

    def forward(self) -> Tensor:
        return self.boxes


def _prior_boxes(config: Preset) -> Tensor:
    maps = []
    for k, side in enumerate(config.feature_maps):
        # The published boxes were computed in double precision, then rounded to float32.
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) * config.steps[k] / config.size
        cy, cx = torch.meshgrid(centres, centres, indexing="ij")
        small = config.min_sizes[k] / config.size
        between = sqrt(small * config.max_sizes[k] / config.size)
        shapes = [(small, small), (between, between)]
        for ratio in config.aspect_ratios[k]:
            long, short = small * sqrt(ratio), small / sqrt(ratio)
            shapes += [(long, short), (short, long)]
        cells = torch.stack([cx, cy], -1).reshape(-1, 1, 2)
        sizes = torch.tensor(shapes, dtype=torch.float64).expand(len(cells), -1, 2)
        maps.append(torch.cat([cells.expand_as(sizes), sizes], -1).reshape(-1, 4))
    return torch.cat(maps).clamp(0, 1).float()
