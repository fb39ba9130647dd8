"""Two tests on the same images: which is better, by how much, and where they differ."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from data import bootstrap
from data.judge import FOREGROUND, count
from inference.draw import draw_comparison
from inference.views import Views
from tools.results import Test
from tools.sheet import count_errors
from tools.tables import INTERVAL, IOUS, MEAN, Table, columns
from utils.errors import UserError

NO_EVIDENCE = "no evidence"


class Change(NamedTuple):
    """The scores of two tests, of a class or of `MEAN`, and the interval of `a` - `b`, or None."""

    name: str
    a: float
    b: float
    interval: list[float] | None

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if math.isnan(self.a) and math.isnan(self.b):
            return "no objects"
        if self.interval is None:
            return "too few images"
        low, high = self.interval
        return NO_EVIDENCE if low <= 0 <= high else "A is better" if low > 0 else "B is better"


class Moved(NamedTuple):
    """An image whose errors changed: its index, and right, wrong and missed of each test."""

    image: int
    a: tuple[int, int, int]
    b: tuple[int, int, int]

    @property
    def gain(self) -> int:
        """By how many errors `a` has fewer than `b`."""
        return sum(self.b[1:]) - sum(self.a[1:])


def check_same(a: Test, b: Test) -> None:
    """Raise UserError if the tests are not of the same images, objects, classes and metric."""
    for test in (a, b):
        if test.judged is None:
            raise UserError(f"{test.directory} cannot be compared: {test.notes[-1]}")
    truths = [test.judged.truth for test in (a, b)]
    pairs = {
        "metrics": (a.results.metric, b.results.metric),
        "classes": (a.results.classes, b.results.classes),
        "images": [[str(id) for id in test.dataset.ids] for test in (a, b)],
        "annotations": [tuple(column.tolist() for column in truth[:4]) for truth in truths],
    }
    for what, (first, second) in pairs.items():
        if first != second:
            shown, fix = "", "on the same data (--root says where they are)"
            if what == "metrics":
                shown = f" ({first} and {second})"
            elif what == "classes":
                alone = ", ".join(sorted({*first} ^ {*second}))
                shown = f" (only one has {alone:.200})" if alone else " (in another order)"
                fix = "with the same --classes"
            raise UserError(f"{a.directory} and {b.directory} are tests of other {what}{shown}; "
                            f"test both {fix}")


def notes_against(a: Test, b: Test) -> list[str]:
    """Return the notes of `b` that `a` lacks, and one for each setting that differs."""
    notes = [f"B: {note}" for note in b.notes if note not in a.notes]
    for part, defaults in (("thresholds", {}), ("suppression", {}), ("views", asdict(Views()))):
        of_a, of_b = (defaults | test.results.values[part] for test in (a, b))
        notes += [f"{part}: {key} is {of_a[key]} for A and {of_b[key]} for B; this alone changes "
                  "scores: test both with the same options"
                  for key in of_a if key in of_b and of_a[key] != of_b[key]]
    return notes


def compare(a: Test, b: Test) -> list[Change]:
    """Return what changes of the mean and of each class, for tests that `check_same` accepts.

    Every draw has the same images for both.
    """
    weights = bootstrap.draw(len(a.dataset))
    drawn = [_draws(test, weights) for test in (a, b)]
    means = [bootstrap.mean([*each.values()]) for each in drawn]
    changes = [Change(MEAN, a.results.value, b.results.value, _interval(*means))]
    for name in a.results.per_class:
        scores = [test.results.per_class.get(name, math.nan) for test in (a, b)]
        changes.append(Change(name, *scores, _interval(*(each.get(name) for each in drawn))))
    return changes


def _draws(test: Test, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the score of each draw by class, of those that have objects."""
    results, judged = test.results, test.judged
    ious = IOUS if results.average == "coco" else (FOREGROUND,)
    counted = count(judged.truth, judged.found, ious, len(results.classes), len(test.dataset))
    return {name: bootstrap.precisions(each, weights, (results.average,))[0].mean(0)
            for name, each in zip(results.classes, counted, strict=True)
            if name in results.per_class and each.objects.any()}


def _interval(a: np.ndarray | None, b: np.ndarray | None) -> list[float] | None:
    return None if a is None or b is None else bootstrap.interval(a - b)


def change_table(changes: Sequence[Change]) -> Table:
    """Return a row of each change; the mean comes last."""
    rows = [[c.name, c.a, c.b, c.a - c.b, *(c.interval or 2 * [math.nan]), c.verdict]
            for c in [*changes[1:], changes[0]]]  # fmt: skip
    return Table(("class", "A", "B", "A - B", *INTERVAL, "evidence"), rows)


def lines(a: Test, b: Test, changes: Sequence[Change]) -> list[str]:
    """Return the comparison as lines for the console."""
    rows = [["class", "A", "B", "A - B", "95 % interval", "evidence"]]
    for c in [*changes[1:], changes[0]]:
        numbers = ("" if math.isnan(n) else f"{n:.4f}" for n in (c.a, c.b, c.a - c.b))
        rows.append([c.name, *numbers, bootstrap.text(c.interval), c.verdict])
    return [f"A: {a.directory}", f"B: {b.directory}", f"{a.results.metric}, A against B",
            *columns(rows)]


def moved_images(a: Test, b: Test, score: float) -> list[Moved]:
    """Return the images with another number of errors, the largest changes first.

    An error is a wrong detection of at least `score`, or an object without a correct one.
    """
    counts = [count_errors(test.judged, score, len(test.dataset)) for test in (a, b)]
    moved = [Moved(i, *(tuple(each[i].tolist()) for each in counts)) for i in range(len(a.dataset))]
    return sorted((m for m in moved if m.gain), key=lambda m: -abs(m.gain))


def moved_table(moved: Sequence[Moved], ids: Sequence) -> Table:
    """Return a row of each image."""
    kinds = ("right", "wrong", "missed")
    head = ("image", *(f"{kind} {test}" for test in "AB" for kind in kinds), "fewer errors by A")
    return Table(head, [(str(ids[m.image]), *m.a, *m.b, m.gain) for m in moved])


def draw_moved(a: Test, b: Test, moved: Sequence[Moved], score: float,
               most: int) -> tuple[list[tuple[Moved, list[np.ndarray]]], list[str]]:
    """Draw the images that changed most, `most` where A is better and `most` where B is.

    Returns them with the detections of A and of B, BGR uint8, and notes for people.
    """
    drawn, notes = [], set()
    for m in [*[m for m in moved if m.gain > 0][:most], *[m for m in moved if m.gain < 0][:most]]:
        try:
            image = a.dataset.pull_image(m.image)
        except UserError as error:
            notes.add(str(error))
            continue
        drawn.append((m, [draw_comparison(image, test.judged, m.image, test.results.classes, score)
                          for test in (a, b)]))
    return drawn, sorted(notes)
