"""The numbers of a report as tables. NaN: there is nothing to count or to score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.curves import SIZES, Curves
from data.judge import BACKGROUND, CORRECT, ERRORS, FOREGROUND, Judged, judge
from tools.analysis import (
    ap_by_iou,
    best_f1,
    calibration,
    confusion_matrix,
    error_counts,
    gains,
)
from tools.mistakes import Mistake
from tools.results import Epoch, Results, Test, open_test, read_log, score_again
from utils.errors import UserError

IOUS = np.linspace(0.5, 0.95, 10)
NOTHING = "nothing to score"
MEAN, ALL = "(mean)", "(all)"
MEANING = {
    "localisation": f"right class, IoU {BACKGROUND} to {FOREGROUND} with its object",
    "class": f"wrong class, IoU {FOREGROUND} or more with an object",
    "duplicate": "right class, but a better detection has found the object",
    "both": f"wrong class, IoU {BACKGROUND} to {FOREGROUND} with an object",
    "background": f"no object with an IoU of {BACKGROUND} or more",
    "missed": "object that no detection is about",
}


class Table(NamedTuple):
    """Names of columns, and rows of values."""

    head: tuple[str, ...]
    rows: list[Sequence]


@dataclass(frozen=True)
class Study:
    """All that a report is about; `judged` is None without the data set.

    results, curves: of the data as they are now; curves may be None. score: least score of the
    detections that are counted. log: of the run, may be empty. notes: for people.
    """

    test: Test
    results: Results
    curves: Curves | None
    judged: Judged | None
    score: float
    log: list[Epoch]
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.results.classes


def study(directory: Path, root: str | None, score: float) -> Study:
    """Read a test, score it again and judge its detections; UserError as `open_test`."""
    test = open_test(directory, root)
    results, curves, notes = score_again(test)
    notes, log, judged = [*test.notes, *notes], [], None
    if test.dataset is not None:
        judged = judge(test.dataset.truth(), test.found)
    elif not math.isnan(test.results.value):
        notes.append("Without the data set the page has no analysis of errors, and no images")
    if test.run and (test.run / "log.jsonl").is_file():
        try:
            log = read_log(test.run / "log.jsonl")
        except UserError as error:
            notes.append(f"No training curves: {error}")
    return Study(test, results, curves, judged, score, log, tuple(notes))


def score_tables(of: Study) -> dict[str, Table]:
    """Return the tables of scores, of those that there are numbers for.

    "precision_recall", "ap_by_iou", "ap_by_size" and "calibration" are tidy: a row a point of a
    class's curve, the last class being `MEAN` or `ALL`. "classes" has a row a class and `MEAN`.
    """
    results, tables = of.results, {}
    if of.curves:
        tables["precision_recall"] = _precision_recall(of)
    columns = {results.metric: [results.per_class.get(name, math.nan) for name in of.classes]}
    if results.per_size:
        aps = [[results.per_size.get(name, {}).get(size, math.nan) for name in of.classes]
               for size in SIZES]  # fmt: skip
        tables["ap_by_size"] = _tidy(("class", "size", "AP"), of.classes, SIZES, aps)
        columns |= {f"AP {size}": row for size, row in zip(SIZES, aps, strict=True)}
    if of.judged:
        aps = ap_by_iou(of.judged, IOUS, len(of.classes), results.average)
        # The mean counts a class without objects as the data set's own score does.
        aps = np.where(np.isnan(aps), columns[results.metric], aps).tolist()
        tables["ap_by_iou"] = _tidy(("class", "IoU", "AP"), of.classes, IOUS.tolist(), aps)
        columns |= {"AP at 0.5": aps[0], "AP at 0.75": aps[5]}
        tables["calibration"] = _calibration(of)
    if results.per_class:
        tables["classes"] = _classes(of, columns)
    return tables


def _precision_recall(of: Study) -> Table:
    keys, rows = ("recall", "precision", "scores"), []
    for name in of.curves.classes:
        curve = of.curves.curve(name)
        points = np.stack([curve[key] for key in keys], 1)
        points = points[points[:, 1] > 0]  # without recalls that are not reached
        rows += [(name, *point) for point in points.tolist()]
    return Table(("class", "recall", "precision", "score"), rows)


def _calibration(of: Study) -> Table:
    found, right, rows = of.judged.found, of.judged.kind == CORRECT, []
    for label, name in [*enumerate(of.classes, 1), (None, ALL)]:
        chosen = of.judged.counted(-np.inf)
        if label:
            chosen &= found.labels == label
        bins = calibration(found.scores[chosen], right[chosen])
        columns = (bins.edges[:-1], bins.edges[1:], bins.counts, bins.confidence, bins.precision)
        rows += [(name, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    return Table(("class", "from", "to", "detections", "score", "correct"), rows)


def _classes(of: Study, columns: dict[str, list[float]]) -> Table:
    """Return a row a class of AP, counts, best F1 and calibration error, and the row `MEAN`."""
    results = of.results
    rows = [[name, *aps] for name, *aps in zip(of.classes, *columns.values(), strict=True)]
    rows.append([MEAN, results.value, *map(_mean, [*columns.values()][1:])])
    head = ("class", *columns)
    if of.judged:
        head += ("objects", "correct", "wrong", "not found", "precision", "recall", "best F1",
                 "at score", "calibration error")  # fmt: skip
        for label, row in zip([*range(1, len(rows)), None], rows, strict=True):
            row += _counts(of, label)
    for row in rows[:-1]:
        row[1] = row[1] if results.is_scored(row[0]) else NOTHING
    return Table(head, rows)


def _counts(of: Study, label: int | None) -> list[float]:
    """Return the last columns of `_classes` for one class, or for all together."""
    judged, right = of.judged, of.judged.kind == CORRECT
    of_class, objects = judged.counted(-np.inf), ~judged.truth.ignored
    if label:
        of_class, objects = of_class & (judged.found.labels == label), objects & (
            judged.truth.labels == label)  # fmt: skip
    total, counted = int(objects.sum()), of_class & judged.counted(of.score)
    correct, kept = int((counted & right).sum()), int(counted.sum())
    scores = judged.found.scores[of_class]
    f1, at = best_f1(scores, right[of_class], total)
    return [
        total, correct, kept - correct, int((objects & judged.not_found(of.score)).sum()),
        correct / kept if kept else math.nan, correct / total if total else math.nan,
        f1 if total else math.nan, at, calibration(scores, right[of_class]).error,
    ]  # fmt: skip


def error_tables(of: Study, mistakes: Iterable[Mistake]) -> dict[str, Table]:
    """Return the tables "errors", "errors_by_class", "confusion" and "mistakes"."""
    counts = error_counts(of.judged, len(of.classes), of.score)
    _, rises = gains(of.judged, len(of.classes), of.results.average)
    kinds = [(name, MEANING[name], total, rises[name])
             for name, total in zip(ERRORS, counts.sum(0).tolist(), strict=True)]  # fmt: skip
    each = [(name, *row) for name, row in zip(of.classes, counts.tolist(), strict=True)]
    matrix = confusion_matrix(of.judged, len(of.classes), of.score).tolist()
    rows = [(name, *row) for name, row in zip([*of.classes, "(nothing)"], matrix, strict=True)]
    return {
        "errors": Table(("type", "what it is", "errors", "rise of AP"), kinds),
        "errors_by_class": Table(("class", *ERRORS), each),
        "confusion": Table(("annotated / detected", *of.classes, "(not found)"), rows),
        "mistakes": _mistakes(of, mistakes),
    }


def _mistakes(of: Study, mistakes: Iterable[Mistake]) -> Table:
    truth, ids, rows = of.judged.truth, of.test.dataset.ids, []
    for m in mistakes:
        box = [math.nan] * 4 if m.box is None else m.box.tolist()
        there = ["", *[math.nan] * 4]
        if m.object >= 0:
            there = [of.classes[truth.labels[m.object] - 1], *truth.boxes[m.object].tolist()]
        name = of.classes[m.label - 1]
        rows.append((m.kind, name, ids[m.image], m.score, m.overlap, *box, *there))
    sides = ("x1", "y1", "x2", "y2")
    head = ("type", "class", "image", "score", "IoU", *sides, "object")
    return Table((*head, *(f"object_{side}" for side in sides)), rows)


def training_tables(of: Study) -> dict[str, Table]:
    """Return the tidy tables "training_loss" and "training_score" of the run's log, if any."""
    losses = {
        "loss": [e.loss_loc + e.loss_conf for e in of.log],
        "of boxes": [e.loss_loc for e in of.log],
        "of classes": [e.loss_conf for e in of.log],
    }
    epochs = [e.epoch for e in of.log]
    loss = [(part, *point) for part, values in losses.items()
            for point in zip(epochs, values, strict=True)]  # fmt: skip
    tested = [e for e in of.log if not math.isnan(e.value)]
    aps = [[e.per_class.get(name, math.nan) for name in of.classes] for e in tested]
    score = _tidy(("class", "epoch", "AP"), of.classes, [e.epoch for e in tested], aps,
                  [e.value for e in tested])  # fmt: skip
    tables = {"training_loss": Table(("part", "epoch", "loss"), loss), "training_score": score}
    return {name: table for name, table in tables.items() if table.rows}


def _tidy(
    head: tuple[str, ...], classes: Sequence[str], x: Sequence, aps: Sequence[Sequence[float]],
    means: Sequence[float] | None = None,
) -> Table:  # fmt: skip
    """Return a row for each class, and for their mean, at each of x [n]; aps: [n, classes]."""
    means = [_mean(row) for row in aps] if means is None else means
    lines = {**dict(zip(classes, zip(*aps, strict=True), strict=bool(aps))), MEAN: means}
    rows = [(name, *point) for name, line in lines.items() for point in zip(x, line, strict=True)]
    return Table(head, rows)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
