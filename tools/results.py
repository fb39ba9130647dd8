"""A test run as it is on the disk: its results, its detections and, if there, its data set."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from data import build_dataset, list_sets
from data.curves import SIZES
from data.detections import load_detections
from data.image_sets import ImageSet
from data.judge import Found, found_of
from data.voc_eval import METRICS
from utils.errors import UserError


@dataclass
class Test:
    """A test as it is on the disk, and its data set where that could be read."""

    directory: Path
    results: dict
    run: Path | None
    dataset: object | None = None
    detections: list[dict] = field(default_factory=list)
    found: Found | None = None
    notes: list[str] = field(default_factory=list)

    __test__ = False  # for pytest

    @property
    def classes(self) -> list[str]:
        return self.results["classes"]


def find_test(directory: Path) -> tuple[Path, Path | None, list[Path]]:
    """(the test's folder, its run's or None, the run's other tests, newest first).

    UserError where there is no test.
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
    """Read a test (``find_test``) and, if it can be had, its data set; the notes say what cannot.

    UserError: no test there, no results of one, or, with ``root``, no analysis by it.
    """
    folder, run, others = find_test(directory)
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text("utf-8"))
        _check_results(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a test's results ({error!r}); run the test again") from None
    test = Test(folder, results, run, notes=list(results.get("notes", [])))
    if others:
        names = ", ".join(str(other.relative_to(directory)) for other in others)
        test.notes.append(f"This is the newest test of the run, {folder.relative_to(directory)}; "
                          f"the others: {names}")  # fmt: skip
    if results["value"] is None:
        test.notes.append("These image sets have no ground truth: there is nothing to compare the "
                          "detections with")  # fmt: skip
        return test
    advice = ". --root says where the data set is"
    try:
        place = root or results["root"]
        existing = list_sets(results["dataset"], place)
        sets = [ImageSet.parse(name, existing) for name in results["sets"].split("+")]
        dataset = build_dataset(results["dataset"], place, sets, test.classes)
        dataset.check_scorable()
        if results.get("overfit"):
            dataset.keep_first(results["overfit"])
        advice = ""
        test.detections, test.found = _read_detections(test, dataset)
    except UserError as error:
        if root:
            raise
        test.notes.append(f"{error}{advice}")
        return test
    test.dataset = dataset
    return test


def _check_results(results: dict) -> None:
    """Raise what reading a results.json that is not a test's raises, ValueError for a value."""
    kind, classes, value, main = (results[k] for k in ("dataset", "classes", "value", "per_class"))
    sizes, overfit = results.get("per_class_per_size", {}), results.get("overfit", 0)
    notes = results.get("notes", [])
    metrics = [*METRICS.values()] if kind == "VOC" else ["COCO AP"]

    def are_scores(values) -> bool:
        return all(type(v) in (int, float) and -1 <= v < 1.01 for v in values)  # 1 is rounded

    fits = {
        "dataset": kind in ("VOC", "COCO"),
        "sets": isinstance(results["sets"], str),
        "root": isinstance(results["root"], str),
        "metric": results["metric"] in metrics,
        "classes": isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and len(set(classes)) == len(classes),
        "value": value is None or (are_scores([value]) and main),
        "per_class": set(main) <= set(classes) and are_scores(main.values()),
        "per_class_per_size": set(sizes) <= set(classes)
        and are_scores(aps[size] for aps in sizes.values() for size in SIZES),
        "overfit": type(overfit) is int and overfit >= 0,
        "notes": isinstance(notes, list) and all(isinstance(note, str) for note in notes),
    }
    for key, fit in fits.items():
        if not fit:
            raise ValueError(f"{key} {results[key]!r:.60}")


def _read_detections(test: Test, dataset) -> tuple[list[dict], Found]:
    path = test.directory / "detections.npz"
    try:
        detections, _ = load_detections(path, dataset.ids, {})
        return detections, found_of(detections, dataset.ids, len(test.classes))
    except UserError as error:  # its advice is for a test's --retest
        raise UserError(f"{str(error).rpartition(';')[0]}; run the test again") from error
    except ValueError as error:
        raise UserError(
            f"{path} does not fit results.json beside it ({error}); run the test again"
        ) from error
