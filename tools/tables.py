"""The numbers of a report as tables. NaN: there is nothing to count or to score."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data.curves import SIZES
from data.judge import BACKGROUND, CORRECT, ERRORS, FOREGROUND, Judged
from tools.analysis import ap_by_iou, best_f1, calibration, confusion_matrix, error_counts, gains
from tools.mistakes import Mistake
from tools.results import Epoch, Results, Test

IOUS = np.linspace(0.5, 0.95, 10)
NOTHING = "nothing to score"
MEAN, ALL = "(mean)", "(all)"
INTERVAL = ("95 % from", "to")
MEANING = {
    "localisation": f"right class, IoU {BACKGROUND} to {FOREGROUND} with its object",
    "class": f"wrong class, IoU {FOREGROUND} or more with an object",
    "duplicate": "right class, but a better detection has found the object",
    "both": f"wrong class, IoU {BACKGROUND} to {FOREGROUND} with an object",
    "background": f"no object with an IoU of {BACKGROUND} or more",
    "missed": "object that no detection is about",
}


class Table(NamedTuple):
    """Names of columns, and rows of values.

    A table of lines has a row a point: the name of its line, x, y, and more.
    """

    head: tuple[str, ...]
    rows: list[Sequence]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    line = f"{{:<{first}}}" + "".join(f"{{:>{width + 3}}}" for width in others)
    return [line.format(*row) for row in rows]


def score_tables(test: Test, score: float) -> dict[str, Table]:
    """Return the tables of scores that the test has numbers for.

    "precision_recall", "ap_by_iou", "ap_by_size" and "calibration" are of lines, one a class and
    `MEAN` or `ALL`. "classes" has a row a class and `MEAN`; it counts detections of at least
    `score`.
    """
    results, classes, tables = test.results, test.results.classes, {}
    if test.curves:
        rows = []
        for name in test.curves.classes:
            curve = test.curves.curve(name)
            points = zip(*(curve[key].tolist() for key in ("recall", "precision", "scores")),
                         strict=True)  # fmt: skip
            rows += [(name, *point) for point in points if point[1] > 0]  # reached recalls
        tables["precision_recall"] = Table(("class", "recall", "precision", "score"), rows)
    aps = [results.per_class.get(name, math.nan) for name in classes]
    columns = {results.metric: aps}
    for n, end in enumerate(INTERVAL):
        columns[end] = [results.intervals.get(name, (math.nan, math.nan))[n] for name in classes]
    if results.per_size:
        sizes = [[results.per_size.get(name, {}).get(size, math.nan) for name in classes]
                 for size in SIZES]  # fmt: skip
        tables["ap_by_size"] = _lines(("class", "size", "AP"), classes, SIZES, sizes)
        columns |= {f"AP {size}": row for size, row in zip(SIZES, sizes, strict=True)}
    if test.judged:
        by_iou = ap_by_iou(test.judged, IOUS, len(classes), results.average).tolist()
        tables["ap_by_iou"] = _lines(("class", "IoU", "AP"), classes, IOUS.tolist(), by_iou)
        columns |= {"AP at 0.5": by_iou[0], "AP at 0.75": by_iou[5]}
        tables["calibration"] = _calibration(test.judged, classes)
    if results.per_class:
        tables["classes"] = _classes(results, columns, test.judged, score)
    return tables


def _lines(head: tuple[str, ...], classes: Sequence[str], x: Sequence,
           values: Sequence[Sequence[float]]) -> Table:
    """Return the lines of the classes, and of their mean, over x [n]; values: [n, classes]."""
    rows = [(name, at, line[k]) for k, name in enumerate(classes)
            for at, line in zip(x, values, strict=True)]  # fmt: skip
    return Table(head, rows + [(MEAN, at, _mean(line)) for at, line in zip(x, values, strict=True)])


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _calibration(judged: Judged, classes: Sequence[str]) -> Table:
    found, right, rows = judged.found, judged.kind == CORRECT, []
    for label, name in enumerate((ALL, *classes)):
        chosen = judged.counted(-np.inf) & (not label or found.labels == label)
        bins = calibration(found.scores[chosen], right[chosen])
        columns = (bins.confidence.tolist(), bins.precision.tolist(), bins.counts.tolist())
        rows += [(name, *row) for row in zip(*columns, strict=True)]
    return Table(("class", "score", "correct", "detections"), rows)


def _classes(results: Results, columns: dict[str, list[float]], judged: Judged | None,
             score: float) -> Table:
    """Return a row a class of AP, counts, best F1 and calibration error, and the row `MEAN`."""
    rows = [[name, *aps] for name, *aps in zip(results.classes, *columns.values(), strict=True)]
    means = map(_mean, [*columns.values()][1 + len(INTERVAL) :])
    rows.append([MEAN, results.value, *results.interval, *means])
    head = ("class", *columns)
    if judged:
        head += ("objects", "correct", "wrong", "not found", "precision", "recall", "best F1",
                 "at score", "calibration error")  # fmt: skip
        for k, row in enumerate(rows, 1):
            row += _counts(judged, score, k if row[0] != MEAN else None)
    for row in rows[:-1]:
        if math.isnan(row[1]) or results.values["ground_truths"].get(row[0]) == 0:
            row[1] = NOTHING
    return Table(head, rows)


def _counts(judged: Judged, score: float, label: int | None) -> list[float]:
    """Return the last columns of `_classes` for one class, or for all together."""
    right, objects = judged.kind == CORRECT, ~judged.truth.ignored
    of_class = judged.counted(-np.inf)
    if label:
        of_class = of_class & (judged.found.labels == label)
        objects = objects & (judged.truth.labels == label)
    kept = of_class & judged.counted(score)
    total, count, correct = int(objects.sum()), int(kept.sum()), int((kept & right).sum())
    scores = judged.found.scores[of_class]
    f1, at = best_f1(scores, right[of_class], total)
    return [total, correct, count - correct, int((objects & judged.not_found(score)).sum()),
            correct / count if count else math.nan, correct / total if total else math.nan,
            f1 if total else math.nan, at, calibration(scores, right[of_class]).error]


def error_tables(judged: Judged, results: Results, ids: Sequence, mistakes: Iterable[Mistake],
                 score: float) -> dict[str, Table]:
    """Return the tables "errors", "errors_by_class", "confusion" and "mistakes".

    ids: of the images. mistakes: all of detections of at least `score`.
    """
    names, sides = results.classes, ("x1", "y1", "x2", "y2")
    counts = error_counts(judged, len(names), score)
    _, rises = gains(judged, len(names), results.average)
    matrix = confusion_matrix(judged, len(names), score).tolist()
    rows, truth = [], judged.truth
    for m in mistakes:
        box = [math.nan] * 4 if m.box is None else m.box.tolist()
        there = ["", *[math.nan] * 4]
        if m.object >= 0:
            there = [names[truth.labels[m.object] - 1], *truth.boxes[m.object].tolist()]
        rows.append((m.kind, names[m.label - 1], ids[m.image], m.score, m.overlap, *box, *there))
    errors = [(kind, MEANING[kind], total, rises[kind])
              for kind, total in zip(ERRORS, counts.sum(0).tolist(), strict=True)]
    head = ("type", "class", "image", "score", "IoU", *sides, "object",
            *(f"object_{side}" for side in sides))

    def by_name(names: Sequence[str], values: Sequence[Sequence]) -> list[Sequence]:
        return [(name, *row) for name, row in zip(names, values, strict=True)]

    return {
        "errors": Table(("type", "what it is", "errors", "rise of AP"), errors),
        "errors_by_class": Table(("class", *ERRORS), by_name(names, counts.tolist())),
        "confusion": Table(("annotated / detected", *names, "(not found)"),
                           by_name((*names, "(nothing)"), matrix)),
        "mistakes": Table(head, rows),
    }


def training_tables(log: Sequence[Epoch]) -> dict[str, Table]:
    """Return the lines "training_loss" and "training_score" of a run's log, of those it has."""
    losses = [(part, e.epoch, loss) for e in log for part, loss in (
        ("loss", e.loss_loc + e.loss_conf), ("of boxes", e.loss_loc), ("of classes", e.loss_conf)
    )]  # fmt: skip
    scores = [(name, e.epoch, ap) for e in log if not math.isnan(e.value)
              for name, ap in {**e.per_class, MEAN: e.value}.items()]  # fmt: skip
    tables = {"training_loss": Table(("part", "epoch", "loss"), losses),
              "training_score": Table(("class", "epoch", "AP"), scores)}  # fmt: skip
    return {name: table for name, table in tables.items() if table.rows}
