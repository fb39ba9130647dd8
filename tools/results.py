"""Read what a test has left: scores, detections, curves, the run's log; and its data set."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DATASETS, DetectionData, build_dataset, list_sets
from data.classes import check_classes
from data.curves import CURVES_FILE, SIZES, Curves, load_curves
from data.detections import load_detections
from data.image_sets import parse_image_sets
from data.judge import FOREGROUND, Judged, found_of, judge
from data.voc_eval import METRICS
from engine.options import add_option
from utils.arguments import Parser, fraction
from utils.checkpoint import is_number, odd_part
from utils.errors import UserError
from utils.files import read_text

TYPES = {
    **dict.fromkeys(("dataset", "root", "sets", "metric"), str),
    **dict.fromkeys(("classes", "notes"), list),
    **dict.fromkeys(("per_class", "per_class_per_size", "ground_truths", "per_class_interval",
                     "thresholds", "suppression", "views"), dict), "overfit": int,
}
"""Types of the values of results.json that are read."""
MADE_BY = ("checkpoint", "class_map", "thresholds", "suppression", "amp", "views")
"""Values of results.json that must be those kept with the detections, beside the data."""


@dataclass(frozen=True)
class Results:
    """What a results.json says. Scores are from 0 to 1, and NaN where there is nothing to score.

    per_class: score by class, maybe of some classes only. per_size: score by class and size, may be
    empty. interval, intervals: low and high of the 95 % interval of the value, and by class, NaN or
    missing for none. values: all that the file says.
    """

    metric: str
    classes: tuple[str, ...]
    value: float
    per_class: Mapping[str, float]
    per_size: Mapping[str, Mapping[str, float]]
    interval: tuple[float, float]
    intervals: Mapping[str, tuple[float, float]]
    values: Mapping

    @classmethod
    def of(cls, values: object) -> Results:
        """Take the content of a results.json; an exception of many types says what is wrong."""
        defaults = {"overfit": 0, "notes": [], "per_class_per_size": {}, "ground_truths": {},
                    "per_class_interval": {}, "thresholds": {}, "suppression": {}, "views": {}}
        values = defaults | values if isinstance(values, dict) else {}
        for key, kind in TYPES.items():
            if key not in values or type(values[key]) is not kind:
                raise TypeError(f'"{key}" is {repr(values.get(key, "missing")):.60}')
        if values["dataset"] not in DATASETS or values["overfit"] < 0:
            raise ValueError('"dataset" is {dataset!r:.60}, "overfit" {overfit}'.format(**values))
        if not all(isinstance(text, str) for text in values["classes"] + values["notes"]):
            raise TypeError('"classes" and "notes" must be texts')
        if odd := odd_part(values):
            raise TypeError(f"it holds {odd}")
        parse_image_sets(values["sets"])
        sizes = values["per_class_per_size"].items()
        return cls(
            values["metric"], check_classes(values["classes"], "it"), _score(values["value"]),
            {name: _score(ap) for name, ap in values["per_class"].items()},
            {name: {size: _score(aps[size]) for size in SIZES} for name, aps in sizes},
            _bounds(values.get("interval")),
            {name: _bounds(each) for name, each in values["per_class_interval"].items()}, values,
        )

    @property
    def average(self) -> str:
        """How the metric averages precision: a key of `METRICS`, or "coco" (101 recalls)."""
        return next((key for key, title in METRICS.items() if title == self.metric), "coco")


def _score(value: object) -> float:
    """Return a score from 0 to 1; -1, NaN and None say that there is nothing to score."""
    if value is None or value == -1 or value != value:
        return math.nan
    return min(_number(value, 1 + 1e-9), 1.0)  # rounding can pass 1


def _number(value: object, most: float = 1e12) -> float:
    if not is_number(value, most):
        raise ValueError(f"a number is {value!r:.60}")
    return float(value)


def _bounds(value: object) -> tuple[float, float]:
    """Return the ends of an interval; None says that there is none."""
    low, high = (None, None) if value is None else value
    return _score(low), _score(high)


class Epoch(NamedTuple):
    """A line of a run's log. value and per_class: the test's scores, NaN and {} without a test."""

    epoch: int
    loss_loc: float
    loss_conf: float
    value: float
    per_class: Mapping[str, float]


def read_log(path: Path) -> list[Epoch]:
    """Return the epochs of a run's log.jsonl; UserError if it is something else."""
    try:
        records = [dict(json.loads(line)) for line in read_text(path).splitlines()]
        return [Epoch(*(_number(r[key]) for key in ("epoch", "loss_loc", "loss_conf")),
                      _score(r.get("value")),
                      {name: _score(ap) for name, ap in r.get("per_class", {}).items()})
                for r in records if "epoch" in r]  # fmt: skip
    except Exception as error:  # of any content
        raise UserError(f"{path} is not the log of a run ({error!r:.200})") from error


@dataclass(frozen=True)
class Test:
    """A test, and its data set where it can be read.

    Without the data set, dataset and judged are None and detections is empty. curves may be None.
    log: of the run, may be empty. notes: lines for people.
    """

    directory: Path
    results: Results
    notes: tuple[str, ...]
    log: list[Epoch] = field(default_factory=list)
    curves: Curves | None = None
    dataset: DetectionData | None = None
    detections: list[dict] = field(default_factory=list)
    judged: Judged | None = None

    __test__ = False  # for pytest


def report_parser(program: str, description: str) -> Parser:
    """Return a parser with the arguments of every command that shows a test."""
    p = Parser(prog=program, description=description.splitlines()[0])
    p.add_argument("directory", type=Path, metavar="RUN_DIR", help="a run, or a test's results")
    p.add_argument("--root", help="the data set, if it is no longer where the test found it")
    p.add_argument("--score", type=fraction, default=0.4, metavar="X",
                   help="least score of the detections that are counted (0.4)")
    add_option(p, "max_pixels")
    return p


def find_tests(directory: Path) -> list[Path]:
    """Return the folders of the tests in the folder of a test or of a run, newest first.

    UserError: none is there.
    """
    if not directory.exists():
        raise UserError(f"{directory} does not exist; give the folder of a run or of a test's "
                        "results")
    below = ("results.json", "*/results.json", "*/*/results.json", "ss_predict/*/*/results.json")
    found = [path for pattern in below for path in directory.glob(pattern) if path.is_file()]
    if not found:
        raise UserError(f"{directory} holds no results.json, nor a test under ss_predict/; give "
                        "the folder of a run or of a test's results (docs/reading_a_report.md)")
    found.sort(key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)
    return [path.parent for path in found]


def open_test(directory: Path, root: str | None) -> Test:
    """Read the newest test of a folder, and its data set; notes say what cannot be read.

    UserError: no test there, no results of one, or, with ``root``, no data set at it.
    """
    folder, *others = find_tests(directory)
    path = folder / "results.json"
    try:
        results = Results.of(json.loads(read_text(path)))
    except Exception as error:  # of any content
        raise UserError(f"{path} is not a test's results ({error!r:.200}); run the test "
                        "again") from error
    notes, log, found = list(results.values["notes"]), [], {}
    if others:
        notes.append(f"{folder} is the newest of {len(others) + 1} tests in {directory}")
    log_file = Path(os.path.normpath(folder.absolute() / "../../../log.jsonl"))
    try:
        log = read_log(log_file) if log_file.is_file() else []
    except UserError as error:
        notes.append(f"No training curves: {error}")
    if math.isnan(results.value):
        notes.append("These image sets have no ground truth: there is nothing to score")
    else:
        try:
            dataset = _open_dataset(results, root or results.values["root"])
            detections, judged = _judge(folder / "detections.npz", dataset, results)
            found = {"dataset": dataset, "detections": detections, "judged": judged}
        except UserError as error:
            if root:
                raise
            notes.append(f"No analysis of errors, and no images: {error}")
    return Test(folder, results, tuple(notes), log, **found)


def _open_dataset(results: Results, root: str) -> DetectionData:
    name, sets, overfit = (results.values[key] for key in ("dataset", "sets", "overfit"))
    try:
        image_sets, taken = parse_image_sets(sets, list_sets(name, root)), DATASETS[name].options
        dataset = build_dataset(name, root, image_sets, results.classes,
                                **{key: results.values[key] for key in taken & {*results.values}})
        dataset.check_scorable()
        if overfit:
            dataset.keep_first(overfit)
    except (UserError, OSError) as error:  # OSError: names that are too long
        raise UserError(f"{error} (--root says where the data set is)") from error
    return dataset


def _judge(path: Path, dataset: DetectionData, results: Results) -> tuple[list[dict], Judged]:
    # A test that was cut short leaves detections beside the scores of an earlier one.
    made_by = {key: results.values[key] for key in MADE_BY if results.values.get(key)}
    detections, _ = load_detections(path, dataset.ids, len(dataset.classes), made_by)
    found = found_of(detections, dataset.ids, len(dataset.classes))
    return detections, judge(dataset.truth(), found)


def score_again(test: Test) -> Test:
    """Return the test with the scores and curves of its detections on the data as they are now.

    Without a data set they are those that the test has kept.
    """
    results, path, notes, curves = test.results, test.directory / CURVES_FILE, [*test.notes], None
    with tempfile.TemporaryDirectory() as folder:
        if test.dataset is not None:
            now = test.dataset.evaluate(test.detections, folder)
            notes = [*now["notes"], *(n for n in notes if n not in results.values["notes"])]
            results = Results.of({**results.values, **now})
            path = Path(folder) / CURVES_FILE
        if path.exists():
            try:
                curves = _read_curves(path, results)
            except UserError as error:
                notes.append(f"No curves: {error}; run the test again")
    said, value = test.results.value, results.value
    if test.dataset is not None and not math.isclose(said, value, abs_tol=5e-5):
        notes.append(f"results.json says {said:.4f}, but its detections score {value:.4f} on the "
                     "data as they are now; this page is of now")  # fmt: skip
    return replace(test, results=results, curves=curves, notes=tuple(notes))


def _read_curves(path: Path, results: Results) -> Curves:
    curves = load_curves(path)
    of_results = set(results.per_class) <= set(curves.classes) <= set(results.classes)
    if not of_results or not np.isclose(curves.ious, FOREGROUND).any():
        raise UserError(f"{path} is not of results.json beside it")
    return curves
