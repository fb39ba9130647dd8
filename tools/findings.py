"""What a data check is asked, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DetectionData
from data.image_sets import ImageSet, sets_name

LEVELS = ("error", "warning", "note")
BOTH = "train and test"


Image = tuple[str, int]
"""A part, "train" or "test", and the index of an image in it."""


@dataclass(frozen=True)
class Request:
    """What to check; the values mean what the options of train_test.py mean.

    sets: image sets of "train" and "test". classes: None: those that the data set declares or
    holds. priors: whose prior boxes to judge, see `data.config.PRIORS`. sizes: of the input.
    """

    dataset: str
    root: Path
    sets: dict[str, tuple[ImageSet, ...]]
    classes: tuple[str, ...] | None
    priors: str
    sizes: tuple[int, ...]


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


class Count(NamedTuple):
    """Boxes of a class, and images that have one."""

    boxes: int = 0
    images: int = 0


class Fit(NamedTuple):
    """How well prior boxes fit the boxes of a class.

    share: of the boxes that reach the IoU `tools.prior_fit.MATCHED` with a prior box. mean: of the
    best IoU. claimed: boxes below that IoU; each claims the one prior box nearest to it.
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

    parts: "train" and "test", without one that could not be opened. classes: class name -> part ->
    count. advice: lines on classes that the prior boxes fit badly.
    """

    request: Request
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

    def titles(self) -> list[str]:
        """Return a line on each part."""
        return [
            f"{name}: {sets_name(self.request.sets[name])} of {self.request.root},"
            f" {len(part.sizes):,} images, {len(part.boxes):,} boxes"
            for name, part in self.parts.items()
        ]

    def verdict(self) -> str:
        counts = self.counts().items()
        return ", ".join(f"{n:,} {level}{'' if n == 1 else 's'}" for level, n in counts)

    def class_table(self) -> list[list[str]]:
        """Return the counts of every class as rows of text, the heads first."""
        rows = [["class", *(text for part in self.parts for text in (f"{part} boxes", "images"))]]
        for name, counts in self.classes.items():
            row = [counts.get(part, Count()) for part in self.parts]
            rows.append([name, *(f"{number:,}" for count in row for number in count)])
        return rows

    def fit_table(self) -> list[list[str]]:
        """Return the shares of `fits` as rows of text, the heads first."""
        heads = dict.fromkeys(f"{fit.priors} {fit.size}" for fit in self.fits)
        rows: dict[str, list[str]] = {}
        for fit in self.fits:
            rows.setdefault(fit.name, [fit.name]).append(f"{fit.share:.1%}")
        return [["class", *heads], *rows.values()]
