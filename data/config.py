"""Presets as plain data: prior boxes, input constants, constants of the published training.

Nothing is read or computed on import; every class below is a frozen record of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import inf, sqrt

INPUT_MEAN = (104.0, 117.0, 123.0)
"""Per-channel mean in BGR order, subtracted from pixel values in 0..255 (std is 1)."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior boxes of one detector (SSD, arXiv 1512.02325, section 2.2).

    Lengths are in pixels of the square network input. Every tuple has one entry per source map.
    The number of boxes follows from them.
    """

    size: int
    feature_maps: tuple[int, ...]
    steps: tuple[float, ...]
    min_sizes: tuple[float, ...]
    max_sizes: tuple[float, ...]
    aspect_ratios: tuple[tuple[float, ...], ...]
    variance: tuple[float, float] = (0.1, 0.2)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name))
                   for name in ("feature_maps", "steps", "min_sizes", "max_sizes", "aspect_ratios")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"each of these needs one entry per source map: {lengths}")

    @property
    def text(self) -> str:
        """The sizes, as ``with_sizes`` takes them."""
        sizes = [f"{side:g}" for side in (*self.min_sizes, self.max_sizes[-1])]
        for k, usual in enumerate(self.min_sizes[1:]):
            if self.max_sizes[k] != usual:
                sizes[k] += f"+{sqrt(self.min_sizes[k] * self.max_sizes[k]):g}"
        return ",".join(sizes)

    def with_sizes(self, text: str) -> PriorConfig:
        """Return the preset with other sizes.

        Args:
            text: "30,60,111,162,213,264,315" has the minimum size of each source map, and the
                maximum size of the last. Each other maximum size is the next minimum size; with
                "30+50" it is such that the second square box of this source map has 50 pixels.

        Raises:
            ValueError: another number of sizes, sizes that are not positive and ascending, no
                numbers, or a second square box that ``with_second`` refuses.
        """
        parts = [part.partition("+") for part in text.split(",")]
        sizes = [float(part[0]) for part in parts]
        if len(sizes) != len(self.min_sizes) + 1:
            raise ValueError(f"{len(sizes)} sizes, but {len(self.min_sizes) + 1} are needed")
        if not all(0 < a < b < inf for a, b in pairwise(sizes)):
            raise ValueError(f"the sizes {', '.join(f'{x:g}' for x in sizes)} do not rise from 0")
        config = replace(self, min_sizes=tuple(sizes[:-1]), max_sizes=tuple(sizes[1:]))
        for k, (_, second, side) in enumerate(parts):
            if second:
                config = config.with_second(k, float(side))
        return config

    def with_second(self, k: int, side: float) -> PriorConfig:
        """Return the preset with another second square box in a source map but the last.

        Raises:
            ValueError: the side is not positive, or a million pixels or more, or the source map is
                the last.
        """
        if not 0 < side < 1e6 or k >= len(self.min_sizes) - 1:
            raise ValueError(f"source map {k + 1} takes no second square box of {side:g} pixels")
        largest = list(self.max_sizes)
        largest[k] = side**2 / self.min_sizes[k]
        return replace(self, max_sizes=tuple(largest))

    def source_map(self, k: int, smallest: float, largest: float) -> PriorConfig:
        """Return the preset of one source map alone, with another minimum and maximum size."""
        return replace(self, feature_maps=(self.feature_maps[k],), steps=(self.steps[k],),
                       min_sizes=(smallest,), max_sizes=(largest,),
                       aspect_ratios=(self.aspect_ratios[k],))

    @property
    def boxes_per_cell(self) -> tuple[int, ...]:
        """Boxes per cell: two square ones, and an upright and a lying one for each aspect ratio."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)

    @property
    def priors_per_map(self) -> tuple[int, ...]:
        return tuple(side * side * boxes for side, boxes
                     in zip(self.feature_maps, self.boxes_per_cell, strict=True))

    @property
    def num_priors(self) -> int:
        return sum(self.priors_per_map)


def _ssd(size: int, maps: dict[int, float], min_sizes: tuple[float, ...],
         last: float) -> PriorConfig:
    """Return the prior boxes of SSD; ``maps``: the side of each source map and its step."""
    return PriorConfig(
        size=size,
        feature_maps=tuple(maps),
        steps=tuple(maps.values()),
        min_sizes=min_sizes,
        max_sizes=(*min_sizes[1:], last),
        # As published, the first map of SSD300 has ratio 3, too: 11,620 priors. The SSD paper has
        # 8,732.
        aspect_ratios=((2, 3),) * (len(maps) - 2) + ((2,),) * 2,
    )


_ssd300 = partial(_ssd, 300, {38: 8, 19: 16, 10: 32, 5: 64, 3: 100, 1: 300})
_ssd512 = partial(_ssd, 512, {64: 8, 32: 16, 16: 32, 8: 64, 4: 128, 2: 256, 1: 512})
VOC_300 = _ssd300((30, 60, 111, 162, 213, 264), 315)
COCO_300 = _ssd300((21, 45, 99, 153, 207, 261), 315)
VOC_512 = _ssd512((35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8), 537.6)
COCO_512 = _ssd512((20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8), 542.72)

PRIORS = {("VOC", 300): VOC_300, ("VOC", 512): VOC_512, ("COCO", 300): COCO_300,
          ("COCO", 512): COCO_512}

# Published as COCO_mobile_300, for networks with stride 16 at the first source map.
_MOBILE_MAPS = {19: 16, 10: 32, 5: 64, 3: 100, 2: 150, 1: 300}
MOBILE_300 = _ssd(300, _MOBILE_MAPS, (45, 90, 135, 180, 225, 270), 315)
MOBILE_PRIORS = {("VOC", 300): MOBILE_300, ("COCO", 300): MOBILE_300}

TRAINING_THRESHOLD = 0.01
"""Score threshold of the evaluations during training."""

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
               "sofa", "train", "tvmonitor")
COCO_CLASSES = ("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck",
                "boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench",
                "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
                "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
                "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
                "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife",
                "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot",
                "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
                "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
                "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
                "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")
"""The 80 classes of COCO by id: the order of labels in published detectors."""
