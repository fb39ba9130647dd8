"""One HTML page that tells what a test run got right and wrong, and where its errors come from.

    python -m tools.report RUN_DIR [--root DIR] [--score 0.4] [--examples 6] [--output PAGE.html]

RUN_DIR is a folder with the results.json and detections.npz of a test, or a run, of which the
newest test is taken. The page is one file, report.html, that needs neither a server nor a network;
beside it report/ has each figure as PNG and CSV. Without the data set the test was made on (its
--root) it has the scores and the curves alone.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import cv2
import numpy as np

from data.curves import CURVES_FILE, SIZE_RANGES, SIZES, Curves, load_curves
from data.judge import (
    BACKGROUND,
    CORRECT,
    ERRORS,
    FOREGROUND,
    IGNORED,
    KINDS,
    LOCALISATION,
    Found,
    Judged,
    judge,
)
from data.truth import Truth
from data.voc_comp4 import read_comp4, write_comp4
from data.voc_eval import METRICS, evaluate_voc, write_voc_curves
from docs.curves import read_log, series
from inference.draw import GREEN, RED, contact_sheet
from tools.analysis import (
    best_f1,
    calibration,
    confusion_matrix,
    error_counts,
    gains,
)
from tools.chart import Chart, draw_matrix, encode_png
from tools.results import Test, open_test
from utils.errors import UserError, command
from utils.files import atomic_write

PAGE = Path(__file__).with_name("report.html")
IOUS = np.linspace(0.5, 0.95, 10)
SIDE = 220  # of a picture in a gallery
PICTURES = 12 * 2**20  # most bytes of all of them, as they stand in the page
MEANING = {
    "localisation": f"the right class, but an IoU of {BACKGROUND} to {FOREGROUND} with its object",
    "class": f"the wrong class, and an IoU of {FOREGROUND} or more with an object",
    "duplicate": "the right class, but a better detection has found the object",
    "both": f"the wrong class, and an IoU of {BACKGROUND} to {FOREGROUND} with an object",
    "background": f"no object has an IoU of {BACKGROUND} or more with it",
    "missed": "an object that no detection is about",
}


@dataclass(frozen=True)
class Scores:
    """AP by class; NaN is "no ground truth".

    value: the test's metric, None without ground truth. main: {class: AP by it}. sizes: {class:
    {size: AP}}, may be empty. ious: float64 [T], by_iou: float64 [T, K]; T may be 0. curves: None
    where there are none.
    """

    value: float | None
    main: dict[str, float]
    sizes: dict[str, dict[str, float]]
    ious: np.ndarray
    by_iou: np.ndarray
    curves: Curves | None


@dataclass(frozen=True)
class Analysis:
    """Every detection judged, and what is left unfound at the page's score."""

    truth: Truth
    found: Found
    judged: Judged
    score: float
    lost: np.ndarray
    missed: np.ndarray

    def counted(self) -> np.ndarray:
        return (self.found.scores >= self.score) & (self.judged.kind != IGNORED)


@dataclass(frozen=True)
class Mistake:
    """An error to show: of a detection, or an object that was missed (score and box None)."""

    kind: str
    label: int
    image: int
    score: float | None
    box: np.ndarray | None
    object: int
    overlap: float


# ---------------------------------------------------------------- scores


def score(test: Test) -> Scores:
    """AP by class, size and IoU, computed by the project's evaluators where the data set is."""
    results, names = test.results, list(test.results["per_class"])
    main = {name: _known(ap) for name, ap in results["per_class"].items()}
    sizes = {
        name: {size: _known(ap) for size, ap in aps.items()}
        for name, aps in results.get("per_class_per_size", {}).items()
    }
    plain = Scores(results["value"], main, sizes, np.zeros(0), np.zeros((0, len(names))), None)
    if test.dataset is not None:
        return _score_voc(test, names) if results["dataset"] == "VOC" else _score_coco(test)
    curves = _kept_curves(test)
    if curves is None or results["dataset"] == "VOC":
        return replace(plain, curves=curves)
    return _with_coco_curves(plain, curves)


def _kept_curves(test: Test) -> Curves | None:
    path = test.directory / CURVES_FILE
    if not path.is_file():
        return None
    try:
        curves = load_curves(path)
        names = set(curves.classes)
        fits = (
            set(test.results["per_class"]) <= names <= set(test.classes)
            and curves.areas == tuple(SIZE_RANGES)
            and np.isclose(curves.ious, FOREGROUND).any()
            and ("counts" in curves.arrays) == (test.results["dataset"] == "VOC")
        )
        if not fits:
            raise UserError(f"{path} is not of results.json beside it")
    except UserError as error:
        test.notes.append(f"No curves: {error}; run the test again")
        return None
    return curves


def _with_coco_curves(scores: Scores, curves: Curves) -> Scores:
    means = curves.arrays["precision"].mean(1)  # [IoU, class, size]
    means = np.where(means < 0, np.nan, means)
    sizes = {
        name: dict(zip(SIZES, row[1:].tolist(), strict=True))
        for name, row in zip(curves.classes, means.mean(0), strict=True)
    }
    columns = [curves.classes.index(name) for name in scores.main]
    by_iou = means[:, columns, 0]
    return replace(scores, sizes=sizes, ious=curves.ious, by_iou=by_iou, curves=curves)


def _score_coco(test: Test) -> Scores:
    with tempfile.TemporaryDirectory() as folder:
        now = test.dataset.evaluate(test.detections, folder)
        curves = load_curves(Path(folder) / CURVES_FILE)
    _compare(test, now["value"])
    main = {name: _known(ap) for name, ap in now["per_class"].items()}
    plain = Scores(now["value"], main, {}, np.zeros(0), np.zeros((0, len(main))), None)
    return _with_coco_curves(plain, curves)


def _score_voc(test: Test, names: list[str]) -> Scores:
    dataset, metric = test.dataset, _voc_metric(test)
    with tempfile.TemporaryDirectory() as folder:
        write_comp4(folder, "test", dataset.classes, dataset.ids, test.detections)
        read, _ = read_comp4(folder, "test", names, dataset.ids)
        each = [evaluate_voc(read, dataset.annotations, names, iou) for iou in IOUS]
        write_voc_curves(Path(folder) / CURVES_FILE, each[0])
        curves = load_curves(Path(folder) / CURVES_FILE)
    _compare(test, each[0][metric]["mean"])
    rows = [[result[metric]["per_class"][name] for name in names] for result in each]
    sizes = each[0][metric]["per_class_per_size"]
    return Scores(
        each[0][metric]["mean"],
        each[0][metric]["per_class"],
        {name: {size: _known(ap) for size, ap in aps.items()} for name, aps in sizes.items()},
        IOUS,
        np.array(rows),
        curves,
    )


def _compare(test: Test, value: float) -> None:
    said = test.results["value"]
    if not math.isclose(value, said, abs_tol=1e-6):
        test.notes.append(
            f"results.json says {said:.4f}, but its detections score {value:.4f} on the data as "
            "they are now; what follows is of now"
        )


def _known(ap: float) -> float:
    return math.nan if ap < 0 else ap


def analyse(test: Test, least: float) -> Analysis:
    """Judge the detections of a test whose data set is there."""
    truth, found = test.dataset.truth(), test.found
    judged = judge(truth, found)
    return Analysis(truth, found, judged, least, judged.not_found(least), judged.missed(least))


# ---------------------------------------------------------------- figures


class Figures:
    """Writes each figure's files into a folder, and makes its part of the page."""

    def __init__(self, folder: Path):
        self.folder = folder

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence]) -> str:
        """Write a CSV; returns the link to it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        writer.writerows([_cell(value) for value in row] for row in rows)
        return self.write(f"{name}.csv", text.getvalue().encode())

    def write(self, name: str, content: bytes) -> str:
        with atomic_write(self.folder / name) as file:
            file.write(content)
        return f'<a href="{quote(self.folder.name)}/{name}">{name.rpartition(".")[2].upper()}</a>'

    def chart(self, name: str, chart: Chart, csv_link: str, only: str = "") -> str:
        """A <figure>; `only` as for the page's script: the value of the filter that shows it."""
        links = f"{csv_link} {self.write(f'{name}.png', chart.png())}"
        return f'<figure {only}>{chart.svg()}<p class="files">{links}</p></figure>'


def _cell(value):
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def curves_figure(figures: Figures, test: Test, scores: Scores) -> str:
    """Precision over recall at IoU 0.5."""
    if scores.curves is None:
        return ""
    chart = Chart("Precision over recall, IoU 0.5", (0, 1), (0, 1), ("recall", "precision"))
    rows = []
    for name in scores.curves.classes:
        curve = scores.curves.curve(name)
        columns = [curve[key] for key in ("recall", "precision", "scores")]
        rows += [(name, *map(float, point)) for point in zip(*columns, strict=True)]
        points = np.stack(columns[:2], 1)
        points = points[points[:, 1] > 0]  # recalls that are not reached
        if len(points) > 200:
            points = points[np.linspace(0, len(points) - 1, 200).astype(int)]
        number = test.classes.index(name)
        chart.line(points, number, name, f'data-class="{number}"')
    _legend(chart, test.classes)
    link = figures.table("precision_recall", ("class", "recall", "precision", "score"), rows)
    return figures.chart("precision_recall", chart, link)


def iou_figure(figures: Figures, test: Test, scores: Scores) -> str:
    if not len(scores.ious):
        return ""
    names = list(scores.main)
    chart = Chart("AP by the IoU that is asked for", (0.5, 0.95), (0, 1), ("IoU", "AP"),
                  [(t, f"{t:.2f}") for t in IOUS[::3]])  # fmt: skip
    means = _mean_over_classes(scores.by_iou, 1)
    for name, aps in zip(names, scores.by_iou.T, strict=True):
        number = test.classes.index(name)
        if not np.isnan(aps).any():
            chart.line(np.stack([scores.ious, aps], 1), number, name, f'data-class="{number}"')
    chart.line(np.stack([scores.ious, means], 1), "ink", "mean", dots=True, width=3)
    _legend(chart, test.classes)
    rows = [(name, *aps.tolist()) for name, aps in zip(names, scores.by_iou.T, strict=True)]
    head = ("class", *(f"{t:.2f}" for t in scores.ious))
    link = figures.table("ap_by_iou", head, [*rows, ("mean", *means.tolist())])
    return figures.chart("ap_by_iou", chart, link)


def size_figure(figures: Figures, test: Test, scores: Scores) -> str:
    if not scores.sizes:
        return ""
    limits = {"small": "small, to 32²", "medium": "medium", "large": "large, from 96²"}
    ticks = [(n, limits[size]) for n, size in enumerate(SIZES)]
    chart = Chart("AP by the size of objects", (-0.5, 2.5), (0, 1), ("pixels", "AP"), ticks)
    table = np.array([[aps[size] for size in SIZES] for aps in scores.sizes.values()])
    means = _mean_over_classes(table, 0)
    for name, aps in zip(scores.sizes, table, strict=True):
        points = np.stack([np.arange(3), aps], 1)[~np.isnan(aps)]
        number = test.classes.index(name)
        chart.line(points, number, name, f'data-class="{number}"', dots=True)
    points = np.stack([np.arange(3), means], 1)[~np.isnan(means)]
    chart.line(points, "ink", "mean", dots=True, width=3)
    _legend(chart, test.classes)
    rows = [(name, *aps.tolist()) for name, aps in zip(scores.sizes, table, strict=True)]
    link = figures.table("ap_by_size", ("class", *SIZES), [*rows, ("mean", *means.tolist())])
    return figures.chart("ap_by_size", chart, link)


def calibration_figures(figures: Figures, test: Test, analysis: Analysis) -> tuple[str, list]:
    """A diagram for all classes and one for each, and the calibration errors, class by class."""
    found, judged = analysis.found, analysis.judged
    counted, right = judged.kind != IGNORED, judged.kind == CORRECT
    drawn, rows, errors = [], [], []
    for label, name in enumerate(["all classes", *test.classes]):
        chosen = counted & ((found.labels == label) | (label == 0))
        result = calibration(found.scores[chosen], right[chosen])
        chart = Chart(f"Calibration, {name}", (0, 1), (0, 1), ("score", "correct"))
        lines = zip(result.edges[:-1].tolist(), result.edges[1:].tolist(), result.counts.tolist(),
                    result.confidence.tolist(), result.precision.tolist(), strict=True)  # fmt: skip
        for low, high, count, confidence, precision in lines:
            rows.append((name, low, high, count, confidence, precision))
            if count:
                text = f"{precision:.0%} of {count}, mean score {confidence:.2f}"
                chart.bar(low, high, precision, text)
        chart.line([(0, 0), (1, 1)], "ink")
        error = "" if math.isnan(result.error) else f"calibration error {result.error:.3f}"
        chart.note(0.28, 0.94, error or "no detections")
        errors.append(result.error)
        hidden = " hidden" if label else ""
        only = f'data-only="{label - 1 if label else ""}"{hidden}'
        drawn.append((chart, only))
    head = ("class", "from", "to", "detections", "mean_score", "correct")
    link = figures.table("calibration", head, rows)
    (first, only), *others = drawn
    parts = [figures.chart("calibration", first, link, only)]
    parts += [f"<figure {only}>{chart.svg()}</figure>" for chart, only in others]
    return "".join(parts), errors[1:]


def errors_figure(figures: Figures, test: Test, analysis: Analysis) -> str:
    """Counts and gains by type, and the counts of each class."""
    counts = error_counts(analysis.judged, len(test.classes), analysis.score
    )
    metric = "coco" if test.results["dataset"] == "COCO" else _voc_metric(test)
    base, rises = gains(analysis.judged, len(test.classes), metric
    )
    totals = counts.sum(0)
    top = _above(totals.max())
    chart = Chart(f"Errors at a score of {analysis.score:g}", (0, len(ERRORS)), (0, top),
                  ("", "errors"), [(n + 0.5, name) for n, name in enumerate(ERRORS)])  # fmt: skip
    for n, (name, total) in enumerate(zip(ERRORS, totals.tolist(), strict=True)):
        chart.bar(n + 0.15, n + 0.85, total, f"{name}: {total}")
        chart.note(n + 0.5, total + top / 25, str(total))
    rows = [(name, MEANING[name], int(total), rises[name])
            for name, total in zip(ERRORS, totals, strict=True)]  # fmt: skip
    gain = f"AP of the classes with objects rises by, from {base:.3f}"
    link = figures.table("errors", ("type", "meaning", "errors", "ap_gain"), rows)
    per_class = [(name, *row) for name, row in zip(test.classes, counts.tolist(), strict=True)]
    per_class_link = figures.table("errors_by_class", ("class", *ERRORS), per_class)
    table = _table(("type", "what it is", "errors", gain),
                   [(row, "") for row in rows], text=2)  # fmt: skip
    each = _table(("class", *ERRORS), [(row, f'data-class="{n}"')
                                       for n, row in enumerate(per_class)])  # fmt: skip
    return f"""<h2>Types of errors</h2>
<p>A detection is correct from IoU {FOREGROUND} on, in VOC layout over it. The others are sorted by
<a href="https://arxiv.org/abs/2008.08115">TIDE's definitions</a>; if two fit, the first of
localisation, class, duplicate, both. The counts are of detections with a score of
{analysis.score:g} or more, for the class that they claim. The rise of AP at IoU {FOREGROUND}
is that of all detections, whatever their score, if the errors of this type alone were put right: it
says what is worth working on.</p>
<div class="charts">{figures.chart("errors", chart, link)}<div class="scroll">{table}</div></div>
<div class="scroll">{each}</div><p class="files">{per_class_link}</p>"""


def confusion_figure(figures: Figures, test: Test, analysis: Analysis) -> str:
    matrix = confusion_matrix(analysis.judged, len(test.classes), analysis.score
    )
    rows, columns = [*test.classes, "(nothing)"], [*test.classes, "(missed)"]
    table = [(name, *row) for name, row in zip(rows, matrix.tolist(), strict=True)]
    links = figures.table("confusion", ("there / found", *columns), table)
    links += " " + figures.write("confusion.png", draw_matrix(matrix, rows, columns))
    many = ' class="many"' if len(columns) > 12 else ""
    parts = [f'<table id="confusion"{many}><thead><tr><th scope="col">there \\ found</th>',
             *(f'<th scope="col">{escape(name)}</th>' for name in columns),
             "</tr></thead><tbody>"]  # fmt: skip
    for n, (name, *counts) in enumerate(table):
        total = max(sum(counts), 1)
        of_class = f' data-class="{n}"' if n < len(test.classes) else ""
        parts.append(f'<tr{of_class}><th scope="row">{escape(name)}</th>')
        parts += [f'<td style="--share:{0.85 * count / total:.3f}">{count or ""}</td>'
                  for count in counts]  # fmt: skip
        parts.append("</tr>")
    return f"""<h2>Confusion matrix</h2>
<p>Of detections with a score of {analysis.score:g} or more, at IoU {FOREGROUND}. The diagonal are
the correct ones; then each other detection, best first, takes the object of another class that it
overlaps most and that is left. Rows are what is there, columns what was found; the shade is the
share of the row.</p>
<div class="scroll">{"".join(parts)}</tbody></table></div><p class="files">{links}</p>"""


def classes_table(
    figures: Figures, test: Test, scores: Scores, analysis: Analysis | None, errors: list
) -> str:
    """A row a class: AP of every kind, counts at the page's score, best F1, calibration error."""
    main = test.results["metric"]
    head = ["class", main, *(f"AP {size}" for size in SIZES)]
    chosen = [n for n, iou in enumerate(scores.ious) if np.isclose(iou, (0.5, 0.75)).any()]
    head += [f"AP at {scores.ious[n]:g}" for n in chosen]
    if analysis:
        head += ["objects", "correct", "wrong", "not found", "precision", "recall", "best F1",
                 "at score", "calibration error"]  # fmt: skip
    rows, names = [], list(scores.main)
    for number, name in enumerate(test.classes):
        known = name in scores.main
        row = [name, scores.main.get(name, math.nan)]
        row += [scores.sizes.get(name, {}).get(size, math.nan) for size in SIZES]
        row += [scores.by_iou[n, names.index(name)] if known else math.nan for n in chosen]
        if analysis:
            row += [*_counts(analysis, number + 1), errors[number]]
        rows.append(row)
    columns = np.array([[_number(v) for v in row[1:]] for row in rows], float)
    aps = 4 + len(chosen)
    mean = ["mean", *_mean_over_classes(columns[:, :aps], 0).tolist()]
    mean[1] = scores.value
    if analysis:
        objects, right, wrong, lost = (int(v) for v in columns[:, aps : aps + 4].sum(0))
        mean += [objects, right, wrong, lost, _ratio(right, right + wrong),
                 _ratio(right, objects), math.nan, math.nan, math.nan]  # fmt: skip
    link = figures.table("classes", head, [*rows, mean])
    marked = [(row, f'data-class="{n}"') for n, row in enumerate(rows)]
    about = ""
    if analysis:
        about = (f" Correct, wrong and not found, precision and recall are of detections with a "
                 f"score of {analysis.score:g} or more at IoU {FOREGROUND}; the best F1 is that of "
                 "the score beside it.")  # fmt: skip
    return f"""<h2>Classes</h2>
<p>AP by class, by size of object, and by the IoU that is asked for.{about} Empty: there is no such
object.</p>
<div class="scroll">{_table(head, marked, mean)}</div><p class="files">{link}</p>"""


def _counts(analysis: Analysis, label: int) -> list:
    truth, found, judged = analysis.truth, analysis.found, analysis.judged
    of_class = found.labels == label
    right = of_class & (judged.kind == CORRECT)
    here = analysis.counted() & of_class
    hits = int((here & right).sum())
    objects = int(((truth.labels == label) & ~truth.ignored).sum())
    lost = int((analysis.lost & (truth.labels == label)).sum())
    everything = of_class & (judged.kind != IGNORED)
    f1, at = best_f1(found.scores[everything], right[everything], objects)
    f1 = f1 if objects else math.nan
    wrong = int(here.sum()) - hits
    return [objects, hits, wrong, lost, _ratio(hits, hits + wrong), _ratio(hits, objects), f1, at]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def training_figures(figures: Figures, test: Test) -> str:
    """Loss and test score by epoch, from the run's log."""
    log = test.run / "log.jsonl" if test.run else None
    if log is None or not log.is_file():
        return ""
    try:
        records = read_log(log)
        loss, value = series(records, "loss"), series(records, "AP")
        parts = {key: np.array([(r["epoch"], r[f"loss_{key}"]) for r in records], float)
                 for key in ("loc", "conf")}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        test.notes.append(f"No training curves: {log} cannot be read ({error!r})")
        return ""
    if not len(loss):
        return ""
    span = (0, float(max(loss[-1, 0], 1)))
    top = float(np.ceil(np.nanmax(loss[np.isfinite(loss[:, 1]), 1], initial=1)))
    chart = Chart("Training loss", span, (0, top), ("epoch", "loss"))
    lines = {"loss": loss, "of boxes": parts["loc"], "of classes": parts["conf"]}
    for number, (name, points) in enumerate(lines.items()):
        chart.line(points[np.isfinite(points[:, 1])], number, name)
    chart.legend([(name, number) for number, name in enumerate(lines)])
    head = ("epoch", "loss", "loss_loc", "loss_conf", "lr")
    rows = [(int(epoch), total, record["loss_loc"], record["loss_conf"], record.get("lr", ""))
            for (epoch, total), record in zip(loss.tolist(), records, strict=True)]  # fmt: skip
    out = figures.chart("training_loss", chart, figures.table("training_loss", head, rows))
    if len(value):
        chart = Chart("Score on the test set while training", span, (0, 1), ("epoch", "AP"))
        tested = [r for r in records if r.get("value") is not None]
        for number, name in enumerate(test.classes):
            points = [(r["epoch"], r.get("per_class", {}).get(name, math.nan)) for r in tested]
            points = np.array(points, float)
            chart.line(points[points[:, 1] >= 0], number, name, f'data-class="{number}"')
        chart.line(value, "ink", "mean", dots=True, width=3)
        _legend(chart, test.classes)
        rows = [(r["epoch"], r["value"], *(r.get("per_class", {}).get(name, "")
                                           for name in test.classes)) for r in tested]  # fmt: skip
        link = figures.table("training_score", ("epoch", "value", *test.classes), rows)
        out += figures.chart("training_score", chart, link)
    return f'<h2>Training</h2><div class="charts">{out}</div>'


def _legend(chart: Chart, classes: Sequence[str]) -> None:
    if len(classes) <= 6:
        chart.legend([(name, number) for number, name in enumerate(classes)])


def _above(count: float) -> float:
    """The end of an axis with room above `count`: 1, 2 or 5 times a power of ten."""
    ends = (step * 10**power for power in range(1, 12) for step in (1, 2, 5))
    return float(next(end for end in ends if end >= 1.1 * count))


def _voc_metric(test: Test) -> str:
    return next(key for key, title in METRICS.items() if title == test.results["metric"])


def _mean_over_classes(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def _number(value) -> float:
    return math.nan if value == "" else float(value)


def _table(head: Sequence[str], rows: Sequence[tuple], foot: Sequence | None = None, text=1) -> str:
    """A sortable table; rows: (values, attributes); the first `text` columns are not numbers."""

    def cells(row):
        for n, value in enumerate(row):
            if n < text:
                yield f'<td class="text">{escape(str(value))}</td>'
            elif isinstance(value, float):
                exact, shown = ("", "") if math.isnan(value) else (f"{value:.9g}", f"{value:.3f}")
                yield f'<td data-value="{exact}">{shown}</td>'
            else:
                yield f'<td data-value="{value}">{value}</td>'

    titles = "".join(
        f'<th scope="col"{" class=text" if n < text else ""}>{escape(name)}</th>'
        for n, name in enumerate(head)
    )
    parts = [f'<table class="sortable"><thead><tr>{titles}</tr></thead><tbody>']
    parts += [f"<tr {mark}>{''.join(cells(row))}</tr>" for row, mark in rows]
    parts.append("</tbody>")
    if foot:
        parts.append(f"<tfoot><tr>{''.join(cells(foot))}</tr></tfoot>")
    return "".join([*parts, "</table>"])


# ---------------------------------------------------------------- galleries


def list_mistakes(analysis: Analysis) -> list[Mistake]:
    """All errors at the page's score, the worst first: by score, missed objects by area."""
    truth, found, judged = analysis.truth, analysis.found, analysis.judged
    wrong = np.flatnonzero(analysis.counted() & (judged.kind >= LOCALISATION))
    wrong = wrong[np.argsort(-found.scores[wrong], kind="stable")]
    mistakes = [
        Mistake(KINDS[judged.kind[n]], int(found.labels[n]), int(found.images[n]),
                float(found.scores[n]), found.boxes[n], int(judged.objects[n]),
                float(judged.overlaps[n]))
        for n in wrong
    ]  # fmt: skip
    missed = np.flatnonzero(analysis.missed)
    areas = (truth.boxes[missed, 2:] - truth.boxes[missed, :2]).prod(1)
    return mistakes + [
        Mistake("missed", int(truth.labels[n]), int(truth.images[n]), None, None, int(n), math.nan)
        for n in missed[np.argsort(-areas, kind="stable")]
    ]


def choose(mistakes: Sequence[Mistake], most: int) -> Iterator[Mistake]:
    """The worst of every type and class, then the second worst, and so on, `most` of each."""
    groups: dict[tuple[str, int], list[Mistake]] = {}
    for mistake in mistakes:
        groups.setdefault((mistake.kind, mistake.label), []).append(mistake)
    for rank in range(most):
        yield from (group[rank] for group in groups.values() if rank < len(group))


def draw_mistake(image: np.ndarray, truth: np.ndarray | None, box: np.ndarray | None) -> np.ndarray:
    """The part of a picture around an error, BGR uint8, its longer side `SIDE` pixels.

    truth, box: extents in the picture, None for none. The object is green, the detection red and
    thinner, so that both are seen where they coincide.
    """
    boxes = np.array([b for b in (truth, box) if b is not None])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    limit = np.array(image.shape[1::-1])
    reach = np.maximum(0.4 * (high - low).max(), 24)
    low = np.clip(np.floor(low - reach), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(high + reach), low + 1, limit).astype(int)
    part = image[low[1] : high[1], low[0] : high[0]]
    scale = SIDE / max(part.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in part.shape[1::-1])
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for corners, tone, width in ((truth, GREEN, 4), (box, RED, 2)):
        if corners is not None:
            x1, y1, x2, y2 = ((corners - np.tile(low, 2)) * scale).clip(-9, SIDE + 9).round()
            start, end = (int(x1), int(y1)), (int(x2) - 1, int(y2) - 1)
            cv2.rectangle(part, start, end, (0, 0, 0), width + 2)
            cv2.rectangle(part, start, end, tone, width)
    return part


def galleries(figures: Figures, test: Test, analysis: Analysis, most: int) -> str:
    """The worst mistakes of each type and class, as many as the page has room for."""
    truth, dataset, names = analysis.truth, test.dataset, test.classes
    mistakes = list_mistakes(analysis)
    rows = []
    for m in mistakes:
        there = ["", *[""] * 4] if m.object < 0 else \
            [names[truth.labels[m.object] - 1], *truth.boxes[m.object].tolist()]  # fmt: skip
        box = [""] * 4 if m.box is None else m.box.tolist()
        score = "" if m.score is None else m.score
        rows.append((m.kind, names[m.label - 1], dataset.ids[m.image], score, m.overlap, *box,
                     *there))  # fmt: skip
    head = ("type", "class", "picture", "score", "iou", "x1", "y1", "x2", "y2", "object",
            "object_x1", "object_y1", "object_x2", "object_y2")  # fmt: skip
    link = figures.table("mistakes", head, rows)
    shown: dict[str, list[tuple[Mistake, str]]] = {kind: [] for kind in ERRORS}
    sheets: dict[str, list[np.ndarray]] = {kind: [] for kind in ERRORS}
    unread, room, left_out = set(), PICTURES, 0
    for mistake in choose(mistakes, most):
        if room < 0:
            left_out += 1
            continue
        try:
            image = dataset.pull_image(mistake.image)
        except UserError as error:
            unread.add(str(error))
            continue
        there = truth.boxes[mistake.object] if mistake.object >= 0 else None
        drawn = draw_mistake(image, there, mistake.box)
        _, data = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 80])
        encoded = base64.b64encode(data).decode()
        room -= len(encoded)
        shown[mistake.kind].append((mistake, encoded))
        if len(sheets[mistake.kind]) < 24:
            sheets[mistake.kind].append(drawn)
    test.notes.extend(sorted(unread))
    if left_out:
        test.notes.append(f"{left_out} pictures of mistakes are left out to keep the page small")
    parts = []
    for kind, chosen in shown.items():
        if not chosen:
            continue
        sheet = encode_png(contact_sheet(sheets[kind], 6, (SIDE, SIDE)))
        png = figures.write(f"mistakes_{kind}.png", sheet)
        pictures = "".join(
            _picture(m, data, names, truth, dataset)
            for m, data in sorted(chosen, key=lambda pair: pair[0].label)
        )
        total = sum(m.kind == kind for m in mistakes)
        parts.append(f'<section data-kind="{kind}"><h3>{kind}</h3><p class="soft">'
                     f"{escape(MEANING[kind])}; {total} of all classes. {png}</p>"
                     f'<div class="gallery">{pictures}</div></section>')  # fmt: skip
    return f"""<h2>The worst mistakes</h2>
<p>At most {most} of each type and class: those of the highest score, of missed objects the largest.
<span class="true">Green</span> is what is there, <span class="wrong">red</span>, thinner, what was
found. All of them, with a score of {analysis.score:g} or more: {link}.</p>
{"".join(parts)}"""


def _picture(m: Mistake, data: str, names: Sequence[str], truth: Truth, dataset) -> str:
    name, picture = names[m.label - 1], str(dataset.ids[m.image])
    text = f"{name}, {m.kind}" if m.score is None else f"{name} {m.score:.2f}"
    if m.score is not None and m.object >= 0:
        text += f", IoU {m.overlap:.2f} with {names[truth.labels[m.object] - 1]}"
    return (f'<figure data-class="{m.label - 1}"><img alt="{escape(f"{m.kind}: {text}")}" '
            f'decoding="async" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{escape(text)}<br>{escape(picture)}</figcaption></figure>")  # fmt: skip


# ---------------------------------------------------------------- the page


def write_report(
    directory: Path,
    path: Path | None = None,
    root: str | None = None,
    least: float = 0.4,
    examples: int = 6,
) -> tuple[Path, list[str]]:
    """Write the page of a test; returns its path and the notes on it.

    directory: of a test or a run. path: of the page, default report.html in the test's folder; the
    figures go into ``figures_of(path)``. root: where the data set is, default
    where it was. least: score of the detections that are counted and shown as mistakes. examples:
    pictures of mistakes of each type and class.

    UserError: no test there, no analysis by ``root``, or a file that cannot be written.
    """
    test = open_test(directory, root)
    if test.dataset is None and test.results["value"] is not None:
        test.notes.append("Without the data set there is no analysis of errors, and no galleries")
    path = path or test.directory / "report.html"
    figures = Figures(figures_of(path))
    scores = score(test)
    analysis = analyse(test, least) if test.dataset is not None else None
    calibrated, errors = calibration_figures(figures, test, analysis) if analysis else ("", [])
    charts = [
        draw(figures, test, scores) for draw in (curves_figure, iou_figure, size_figure)
    ]
    sections = [classes_table(figures, test, scores, analysis, errors)] if scores.main else []
    if any([*charts, calibrated]):
        sections.append(
            "<h2>Curves</h2><p>Calibration is of all detections of the test, IoU "
            f"{FOREGROUND}: a score should be the share of detections of that score that are "
            "correct (the line). The calibration error is the mean distance from it.</p>"
            f'<div class="charts">{"".join(charts)}{calibrated}</div>'
        )
    if analysis:
        sections.append(errors_figure(figures, test, analysis))
        sections.append(confusion_figure(figures, test, analysis))
        sections.append(galleries(figures, test, analysis, examples))
    sections.append(training_figures(figures, test))
    sections.append(_facts(test))
    notes = "".join(f"<li>{escape(note)}</li>" for note in test.notes)
    page = Template(PAGE.read_text("utf-8")).substitute(
        title=escape(f"{_heading(test)}: {test.results['metric']}"),
        heading=escape(_heading(test)),
        value="" if scores.value is None else f"{scores.value:.4f}",
        metric=escape(str(test.results["metric"])),
        notes=f'<ul class="notes">{notes}</ul>' if notes else "",
        options="".join(f'<option value="{n}">{escape(name)}</option>'
                        for n, name in enumerate(test.classes)),
        kinds="".join(f"<option>{kind}</option>" for kind in ERRORS),
        body="\n".join(sections),
    )  # fmt: skip
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path, test.notes


def figures_of(page: Path) -> Path:
    """The folder of a page's figures: report/ of report.html, NAME_files/ of another, whose plain
    name may be that of a folder with other things."""
    return page.with_name(page.stem if page.name == "report.html" else f"{page.stem}_files")


def _heading(test: Test) -> str:
    checkpoint = test.results.get("checkpoint")
    file = checkpoint.get("file") if isinstance(checkpoint, dict) else None
    return f"{file or test.directory.parent.name} on {test.results['sets']}"


def _facts(test: Test) -> str:
    """What results.json says besides the scores."""
    left_out = {"per_class", "per_class_per_size", "per_size", "notes", "classes", "ground_truths",
                "detections", "stats", *METRICS}  # fmt: skip
    facts = {"folder": str(test.directory)} | {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        for key, value in test.results.items()
        if key not in left_out
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in facts.items()
    )
    return f'<h2>The test</h2><div class="scroll"><table id="facts">{rows}</table></div>'


@command
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.splitlines()[0])
    p.add_argument("directory", type=Path, metavar="RUN_DIR", help="a run, or a test's results")
    p.add_argument("--root", help="the data set, if it is no longer where the test found it")
    p.add_argument("--score", type=float, default=0.4, help="least score of what is counted (0.4)")
    p.add_argument("--examples", type=int, default=6, metavar="N",
                   help="pictures of mistakes of each type and class (6)")  # fmt: skip
    p.add_argument("--output", type=Path, metavar="PAGE.html",
                   help="the page (default: report.html in the test's folder)")  # fmt: skip
    args = p.parse_args(argv)
    if args.output and not re.fullmatch(r"\.html?", args.output.suffix):
        p.error(f"--output {args.output}: the page's name must end in .html")
    if not 0 <= args.score <= 1 or args.examples < 0:
        p.error("--score is from 0 to 1, --examples not below 0")
    path, notes = write_report(
        args.directory, args.output, args.root, args.score, args.examples
    )
    for note in notes:
        print(note)
    print(f"{path}, and the figures in {figures_of(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
