"""Read what a test has left: scores, detections, curves, the run's log; and its data set."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DATASETS, DetectionData, build_dataset, list_sets
from data.curves import CURVES_FILE, SIZES, Curves, load_curves
from data.detections import load_detections
from data.image_sets import ImageSet
from data.judge import FOREGROUND, Found, found_of
from data.voc_eval import METRICS
from utils.errors import UserError


@dataclass(frozen=True)
class Results:
    """What a results.json says. Scores are from 0 to 1, and NaN where there is nothing to score.

    dataset: a key of `data.DATASETS`. sets: names of image sets, joined by "+".
    per_class: score by class, maybe of some classes only. per_size: score by class and size, may be
    empty. ground_truths: number of objects by class, may be empty.
    overfit: the test was restricted to so many images; 0 for none. values: all that the file says.
    """

    dataset: str
    root: str
    sets: str
    metric: str
    classes: tuple[str, ...]
    value: float
    per_class: Mapping[str, float]
    per_size: Mapping[str, Mapping[str, float]]
    ground_truths: Mapping[str, int]
    overfit: int
    notes: tuple[str, ...]
    values: Mapping[str, object]

    @classmethod
    def of(cls, values: object, path: Path) -> Results:
        """Take the content of a results.json, ``path``; UserError names a value that is wrong."""
        defaults = {"overfit": 0, "notes": [], "per_class_per_size": {}, "ground_truths": {}}
        values = defaults | values if isinstance(values, dict) else {}
        for key, fits in FIELDS.items():
            try:
                good = fits(values[key], values)
            except (KeyError, TypeError, AttributeError):
                good = False
            if not good:
                said = f"is {values[key]!r:.60}" if key in values else "is missing"
                raise UserError(f'{path} is not a test\'s results ("{key}" {said}); run the test '
                                "again")  # fmt: skip
        return cls(
            **{key: values[key] for key in ("dataset", "root", "sets", "metric", "overfit")},
            classes=tuple(values["classes"]),
            value=_score(values["value"]),
            per_class={name: _score(ap) for name, ap in values["per_class"].items()},
            per_size={
                name: {size: _score(aps[size]) for size in SIZES}
                for name, aps in values["per_class_per_size"].items()
            },
            ground_truths=values["ground_truths"],
            notes=tuple(values["notes"]),
            values=values,
        )

    @property
    def average(self) -> str:
        """How the metric averages precision: a key of `METRICS`, or "coco" (101 recalls)."""
        return next((key for key, title in METRICS.items() if title == self.metric), "coco")

    def is_scored(self, name: str) -> bool:
        """Return whether the class has something to score."""
        known = not math.isnan(self.per_class.get(name, math.nan))
        return known and self.ground_truths.get(name) != 0


def _score(value: float | None) -> float:
    return math.nan if value is None or value < 0 else float(value)


def _are_scores(values: Iterable) -> bool:
    # -1: nothing to score. A perfect score may be rounded up.
    return all(type(value) in (int, float) and -1 <= value < 1.01 for value in values)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


FIELDS = {
    "dataset": lambda value, _: value in DATASETS,
    "root": lambda value, _: isinstance(value, str),
    "sets": lambda value, _: isinstance(value, str),
    "metric": lambda value, _: isinstance(value, str),
    "classes": lambda value, _: _are_texts(value) and len(set(value)) == len(value),
    "per_class": lambda value, all: (
        set(value) <= set(all["classes"]) and _are_scores(value.values())
    ),
    "per_class_per_size": lambda value, all: (
        set(value) <= set(all["classes"])
        and _are_scores(aps[size] for aps in value.values() for size in SIZES)
    ),
    "value": lambda value, all: value is None or (_are_scores([value]) and all["per_class"]),
    "ground_truths": lambda value, _: isinstance(value, dict),
    "overfit": lambda value, _: type(value) is int and value >= 0,
    "notes": lambda value, _: _are_texts(value),
}
"""Whether a value of results.json fits, given all values; it may raise what a wrong type raises."""


@dataclass(frozen=True)
class Test:
    """A test, and its data set where it can be read.

    run: the folder of the run, None for a test elsewhere. Without the data set, dataset and found
    are None and detections is empty. notes: lines for people.
    """

    directory: Path
    run: Path | None
    results: Results
    dataset: DetectionData | None = None
    detections: list[dict] = field(default_factory=list)
    found: Found | None = None
    notes: tuple[str, ...] = ()

    __test__ = False  # for pytest


def find_test(directory: Path) -> tuple[Path, Path | None, list[Path]]:
    """Return a test's folder, its run's folder or None, and the run's other tests, newest first.

    UserError: no test in ``directory``.
    """
    below = ("results.json", "*/results.json", "*/*/results.json", "ss_predict/*/*/results.json")
    found = sorted(
        (path for pattern in below for path in directory.glob(pattern)),
        key=lambda path: (path.stat().st_mtime_ns, str(path)),
        reverse=True,
    )
    if not found:
        raise UserError(
            f"{directory} holds no results.json, nor a test under ss_predict/; give the folder of "
            "a run or of a test's results (docs/reading_a_report.md)"
        )
    newest, *others = (path.parent for path in found)
    above = newest.absolute().parents
    inside = len(above) > 2 and above[1].name == "ss_predict"
    return newest, above[2] if inside else None, others


def open_test(directory: Path, root: str | None) -> Test:
    """Read a test (`find_test`) and its data set; notes say why a data set is missing.

    UserError: no test there, no results of one, or, with ``root``, no data set at it.
    """
    folder, run, others = find_test(directory)
    path = folder / "results.json"
    try:
        results = Results.of(json.loads(path.read_text("utf-8")), path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a test's results ({error}); run the test again") from error
    notes = list(results.notes)
    if others:
        names = ", ".join(str(other.relative_to(directory)) for other in others)
        notes.append(f"This is the newest test of the run, {folder.relative_to(directory)}; the "
                     f"others: {names}")  # fmt: skip
    if math.isnan(results.value):
        notes.append("These image sets have no ground truth: there is nothing to score")
        return Test(folder, run, results, notes=tuple(notes))
    try:
        dataset = _open_dataset(results, root or results.root)
        detections, found = _read_detections(folder, dataset)
    except UserError as error:
        if root:
            raise
        return Test(folder, run, results, notes=(*notes, str(error)))
    return Test(folder, run, results, dataset, detections, found, tuple(notes))


def _open_dataset(results: Results, root: str) -> DetectionData:
    try:
        existing = list_sets(results.dataset, root)
        sets = [ImageSet.parse(name, existing) for name in results.sets.split("+")]
        dataset = build_dataset(results.dataset, root, sets, results.classes)
        dataset.check_scorable()
        if results.overfit:
            dataset.keep_first(results.overfit)
    except UserError as error:
        raise UserError(f"{error} (--root says where the data set is)") from error
    return dataset


def _read_detections(folder: Path, dataset: DetectionData) -> tuple[list[dict], Found]:
    path = folder / "detections.npz"
    detections, _ = load_detections(path, dataset.ids, {})
    try:
        return detections, found_of(detections, dataset.ids, len(dataset.classes))
    except ValueError as error:
        raise UserError(
            f"{path} does not fit results.json beside it ({error}); run the test again"
        ) from error


def score_again(test: Test) -> tuple[Results, Curves | None, list[str]]:
    """Return the scores of the detections, their curves and notes.

    With a data set they are of the data as they are now, otherwise those that the test has kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, path = test.results, test.directory / CURVES_FILE
        if test.dataset is not None:
            now = test.dataset.evaluate(test.detections, folder)
            results = Results.of({**results.values, **now}, test.directory / "results.json")
            path = Path(folder) / CURVES_FILE
        notes, said = [], test.results.value
        if not math.isclose(said, results.value, abs_tol=1e-6) and not math.isnan(said):
            notes = [f"results.json says {said:.4f}, but its detections score {results.value:.4f} "
                     "on the data as they are now; this page is of now"]  # fmt: skip
        try:
            return results, _read_curves(path, results) if path.exists() else None, notes
        except UserError as error:
            return results, None, [*notes, f"No curves: {error}; run the test again"]


def _read_curves(path: Path, results: Results) -> Curves:
    curves = load_curves(path)
    of_results = set(results.per_class) <= set(curves.classes) <= set(results.classes)
    if not of_results or not np.isclose(curves.ious, FOREGROUND).any():
        raise UserError(f"{path} is not of results.json beside it")
    return curves


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
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [
            Epoch(int(r["epoch"]), float(r["loss_loc"]), float(r["loss_conf"]),
                  _score(r.get("value")),
                  {name: _score(ap) for name, ap in r.get("per_class", {}).items()})
            for r in records
            if "epoch" in r
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the log of a run ({error!r})") from error
