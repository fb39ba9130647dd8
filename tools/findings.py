"""The results of a data check: findings, counts of boxes, fits of prior boxes, and their text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DetectionData
from data.image_sets import sets_name
from engine.options import Options
from engine.priors import MATCHED
from tools.tables import columns

LEVELS = ("error", "warning", "note")
BOTH = "train and test"
Image = tuple[str, int]  # "train" or "test", and the index of an image


class Part(NamedTuple):
    """A data set with all its boxes as columns.

    sizes: int64 [N, 2], (width, height) of every image in pixels.
    images: int64 [M], ascending, the image of every box; M may be 0.
    boxes: float64 [M, 4], (x1, y1, x2, y2) in pixels counted from 0.
    labels: int64 [M], from 1.
    """

    dataset: DetectionData
    sizes: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, dataset: DetectionData) -> Part:
        images = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
        boxes, labels = dataset.rows[:, :4].astype(np.float64), dataset.rows[:, 4].astype(np.int64)
        return cls(dataset, dataset.sizes, images, boxes, labels)

    def of_class(self, name: str) -> np.ndarray:
        """Return which boxes are of the class, bool [M]."""
        # A class that the data set lacks gets the label behind the last one.
        return self.labels == [*self.dataset.classes, name].index(name) + 1

    def count(self, name: str) -> tuple[int, int]:
        """Return the number of boxes of a class and of images that have one."""
        images = self.images[self.of_class(name)]
        return len(images), len(np.unique(images))


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


class Fit(NamedTuple):
    """How well prior boxes fit the boxes of a class.

    share: boxes that reach the IoU `MATCHED` with a prior box, 0 to 1. mean: mean of the best IoU.
    claimed: number of the other boxes; each only claims the prior box that it overlaps most.
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
    """All results of a check.

    options: of the training that the data are for. sizes: input sizes to judge prior boxes at.
    parts: "train" and "test"; a part that could not be opened is left out. advice: lines on classes
    that the prior boxes fit badly.
    """

    options: Options
    sizes: tuple[int, ...]
    parts: dict[str, Part] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, level: str, part: str, what: str, records: Iterable[Record]) -> None:
        """Add a finding, sorted by level; do nothing without records."""
        if records := list(records):
            self.findings.append(Finding(level, part, what, records))
            self.findings.sort(key=lambda finding: LEVELS.index(finding.level))

    def counts(self) -> dict[str, int]:
        """Return level -> number of records."""
        return {level: sum(len(f.records) for f in self.findings if f.level == level)
                for level in LEVELS}

    def classes(self) -> list[str]:
        """Return the names of all classes."""
        return [*dict.fromkeys(n for part in self.parts.values() for n in part.dataset.classes)]

    def path(self, image: Image) -> Path:
        part, index = image
        return self.parts[part].dataset.image_path(index)

    def sets(self, part: str) -> str:
        """Return the names of the image sets of a part."""
        return sets_name(getattr(self.options, f"{part}_sets"))

    def titles(self) -> list[str]:
        """Return a line on each part."""
        return [f"{name}: {part.dataset.describe()}" for name, part in self.parts.items()]

    def conclusion(self) -> str:
        """Return the tables of classes and of fits, the advice and the verdict."""
        counts = [["class", *(text for name in self.parts for text in (f"{name} boxes", "images"))]]
        for key in self.classes():
            numbers = [number for part in self.parts.values() for number in part.count(key)]
            counts.append([key, *(f"{number:,}" for number in numbers)])
        lines = columns(counts)
        if self.fits:
            heads = dict.fromkeys(f"{fit.priors} {fit.size}" for fit in self.fits)
            rows: dict[str, list[str]] = {}
            for fit in self.fits:
                rows.setdefault(fit.name, [fit.name]).append(f"{fit.share:.1%}")
            lines += ["", f"boxes that reach an IoU of {MATCHED} with a prior box of"]
            lines += columns([["class", *heads], *rows.values()])
        verdict = ", ".join(f"{n:,} {level}{'s' * (n != 1)}" for level, n in self.counts().items())
        return "\n".join([*lines, "", *self.advice, "", verdict])
