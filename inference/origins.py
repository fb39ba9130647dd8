"""Which prior box a detection was decoded from."""

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from data.config import PriorConfig
from layers.boxes import iou, to_corners


class Origin(NamedTuple):
    """The prior box that a detection was decoded from. Numbers count from 0."""

    index: int  # of the prior box, among all
    map: int  # number of the source map
    side: int  # of the source map, in cells
    stride: float  # of the source map, in pixels of the network's input
    row: int  # of the cell
    column: int  # of the cell
    size: float  # root of the prior box's area, in pixels of the network's input
    aspect: float  # width / height of the prior box in the network's input
    iou: float  # of the prior box and the detection, as training matches boxes
    box: list[float]  # the prior box: x1, y1, x2, y2 in pixels of the image
    cell: list[float]  # the cell's part of the image, as `box`


def find_origins(found: dict[str, Tensor], size: tuple[int, int], priors: Tensor,
                 config: PriorConfig) -> list[Origin]:
    """Return the origin of each detection of an image.

    Args:
        found: "boxes" float32 [n, 4] and "priors" int64 [n], on the CPU, as ``layers.Detect``
            returns them; n may be 0.
        size: (width, height) of the image in pixels.
        priors: [P, 4], of ``layers.PriorBox(config)``.
    """
    chosen, scale = priors.cpu()[found["priors"]], torch.tensor([*size, *size])
    boxes = to_corners(chosen) * scale
    overlaps = iou(boxes[:, None], found["boxes"][:, None]).flatten()
    starts = [0, *accumulate(config.priors_per_map)]
    origins = []
    for index, (_, _, w, h), box, overlap in zip(
            *(each.tolist() for each in (found["priors"], chosen, boxes, overlaps)), strict=True):
        k = bisect_right(starts, index) - 1
        side, step = config.feature_maps[k], config.steps[k]
        row, column = divmod((index - starts[k]) // config.boxes_per_cell[k], side)
        corners = torch.tensor([column, row, column + 1, row + 1]) * (step / config.size)
        origins.append(Origin(index, k, side, step, row, column, (w * h) ** 0.5 * config.size,
                              w / h, overlap, box, (corners * scale).tolist()))
    return origins
