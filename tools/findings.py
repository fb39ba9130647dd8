"""What a data check finds: findings, counts of boxes, fits of prior boxes, and their text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DetectionData
from data.image_sets import sets_name
from engine.options import Options

LEVELS = ("error", "warning", "note")
BOTH = "train and test"
MATCHED = Options.jaccard_threshold
"""IoU from which a prior box is positive in training."""

Image = tuple[str, int]
"""A part, "train" or "test", and the index of an image in it."""


class Part(NamedTuple):
    """A data set with all its boxes as columns.

    sizes: int64 [N, 2], (width, height) of every image in pixels. images: int64 [M], ascending, the
    image of every box. boxes: float64 [M, 4], (x1, y1, x2, y2) in pixels counted from 0. labels:
    int64 [M], from 1.
    """

    dataset: DetectionData
    sizes: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, dataset: DetectionData) -> Part:
        targets = [dataset.target(i) for i in range(len(dataset))]
        sizes = [dataset.image_size(i) for i in range(len(dataset))]
        images = np.repeat(np.arange(len(dataset)), [len(target) for target in targets])
        rows = np.concatenate([np.zeros((0, 5)), *targets])
        labels = rows[:, 4].astype(np.int64)
        return cls(dataset, np.array(sizes).reshape(-1, 2), images, rows[:, :4], labels)


class Record(NamedTuple):
    """One thing found. box: (x1, y1, x2, y2) in pixels, in the first of the images."""

    text: str
    images: tuple[Image, ...] = ()
    box: tuple[float, ...] | None = None


class Finding(NamedTuple):
    """All records of one kind. level: one of `LEVELS`. part: "train", "test" or `BOTH`."""

    level: str
    part: str
    what: str
    records: list[Record]

    def title(self) -> str:
        return f"{self.level}, {self.part}: {self.what}: {len(self.records):,}"


class Count(NamedTuple):
    """Boxes of a class, and images that have one."""

    boxes: int = 0
    images: int = 0


class Fit(NamedTuple):
    """How well prior boxes fit the boxes of a class.

    share: of the boxes that reach the IoU `MATCHED` with a prior box. mean: of the best IoU.
    claimed: boxes below `MATCHED`; each only claims the prior box nearest to it.
    """

    name: str
    size: int
    priors: str
    boxes: int
    share: float
    mean: float
    claimed: int


@dataclass
class Report:
    """All that a check found.

    options: of the training to check for. sizes: inputs of the network to judge prior boxes at.
    parts: "train" and "test", without one that could not be opened. classes: class name -> part ->
    count. advice: lines on classes that the prior boxes fit badly.
    """

    options: Options
    sizes: tuple[int, ...]
    parts: dict[str, Part] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    classes: dict[str, dict[str, Count]] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, level: str, part: str, what: str, records: Iterable[Record]) -> None:
        """Add a finding and keep the order by level. Without records there is no finding."""
        if records := list(records):
            self.findings.append(Finding(level, part, what, records))
            self.findings.sort(key=lambda finding: LEVELS.index(finding.level))

    def counts(self) -> dict[str, int]:
        """Return level -> number of records."""
        return {
            level: sum(len(found.records) for found in self.findings if found.level == level)
            for level in LEVELS
        }

    def path(self, image: Image) -> Path:
        part, index = image
        return self.parts[part].dataset.image_path(index)

    def sets(self, part: str) -> str:
        """Return the names of the image sets of a part."""
        return sets_name({"train": self.options.train_sets, "test": self.options.test_sets}[part])

    def titles(self) -> list[str]:
        """Return a line on each part."""
        return [
            f"{name}: {self.sets(name)} of {self.options.root}, {len(part.sizes):,} images,"
            f" {len(part.boxes):,} boxes"
            for name, part in self.parts.items()
        ]

    def conclusion(self) -> str:
        """Return the tables of classes and of fits, the advice and the verdict."""
        lines = []
        if self.classes:
            heads = ["class", *(text for p in self.parts for text in (f"{p} boxes", "images"))]
            lines += _columns([heads, *map(self._counts_of, self.classes)])
        if self.fits:
            heads = dict.fromkeys(f"{fit.priors} {fit.size}" for fit in self.fits)
            rows: dict[str, list[str]] = {}
            for fit in self.fits:
                rows.setdefault(fit.name, [fit.name]).append(f"{fit.share:.1%}")
            lines += ["", f"boxes that reach an IoU of {MATCHED} with a prior box of"]
            lines += _columns([["class", *heads], *rows.values()])
        lines += ["", *self.advice, ""]
        lines += [", ".join(f"{n:,} {level}{'s' * (n != 1)}" for level, n in self.counts().items())]
        return "\n".join(lines)

    def _counts_of(self, name: str) -> list[str]:
        counts = [self.classes[name].get(part, Count()) for part in self.parts]
        return [name, *(f"{number:,}" for count in counts for number in count)]


def _columns(rows: list[list[str]]) -> list[str]:
    """Return rows as lines, the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{first:<{widths[0]}}"
        + "".join(f"{text:>{width + 3}}" for text, width in zip(others, widths[1:], strict=True))
        for first, *others in rows
    ]
