"""The twelve COCO detection metrics of a results JSON, by pycocotools or a faster equal of it.

    python -m data.coco_eval RESULTS.json ANNOTATIONS.json [--eval-backend NAME] [--json OUT]
    python -m data.coco_eval detections_test-dev2017_NAME_results.zip image_info_test-dev2017.json

The second checks a file for the evaluation server; only the server can score it.
Metrics and results format: https://cocodataset.org/#detection-eval, #format-results.
"""

import argparse
import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data import bootstrap
from data.classes import parse_classes
from data.coco_json import COCOAnnotations, extents, read_annotations, read_json
from data.coco_results import COCO_FIELDS, COCOResults, check_submission
from data.curves import SIZES, write_curves
from data.detections import undetected
from data.judge import Found, count
from data.truth import Truth
from utils.arguments import Parser
from utils.errors import UserError, command
from utils.files import check_writable, write_json

BACKENDS = ("pycocotools", "hotcoco", "faster-coco-eval")
"""What can compute the metrics. The first is the reference and the default."""
STATS = (("AP", "0.50:0.95", "all", 100), ("AP", "0.50", "all", 100), ("AP", "0.75", "all", 100),
         *(("AP", "0.50:0.95", size, 100) for size in SIZES),
         *(("AR", "0.50:0.95", "all", count) for count in (1, 10, 100)),
         *(("AR", "0.50:0.95", size, 100) for size in SIZES))
"""(metric, IoU, area, detections an image) of each number, in the order of pycocotools' stats."""


def evaluate_coco(results: str | Path | list[dict] | COCOResults,
                  annotations: str | Path | COCOAnnotations, backend: str = "pycocotools",
                  curves: str | Path | None = None, classes: Sequence[str] | None = None,
                  intervals: bool = True) -> dict:
    """Score detections over all images of an annotation file, with pycocotools' defaults.

    hotcoco gives every number of pycocotools bit by bit, arrays included. faster-coco-eval does
    so for AR and the scores; its precision of a lone correct detection is 1 instead of
    1 / (1 + 2**-52), so that precisions may differ by 2.2e-16 and AP by 1e-15.

    Args:
        results: a results JSON, its parsed content, or columns.
        annotations: an annotation file, or its content.
        backend: one of `BACKENDS`.
        curves: where to write the precision-recall arrays, see `data.curves`.
        classes: score these categories, as if the file had no others.
        intervals: whether to compute them; they take seconds for thousands of images.

    Returns:
        {"stats": the 12 numbers of `STATS`, "per_category": {name: AP at [.5:.95]}, "interval",
        "per_category_interval", "per_size": {"small", "medium", "large": AP},
        "per_category_per_size": {name: {size: AP}}, "at_50": {"mean", "interval", "per_class",
        "per_class_interval"} of the AP at .50, "images": how many have a detection of any category,
        and all, "backend": name and version}. -1 means no ground truth; no detections at all score
        0. An interval is [low, high] of 95 % by `data.bootstrap`, None where too few images have
        objects; {} and None without ``intervals``.

    Raises:
        UserError: a file that cannot be read or is malformed, results of an image or a category
            that the annotation file does not list, a backend that is missing, too old or broken.
        ValueError: no such backend.
    """
    evaluate, version = load_backend(backend)
    is_read = isinstance(annotations, COCOAnnotations)
    truth = annotations if is_read else read_annotations(annotations)
    source = results if isinstance(results, str | Path) else "results"
    if not isinstance(results, COCOResults):
        content = results if isinstance(results, list) else read_json(results)
        results = COCOResults.read(source, content)
    detected = len(np.unique(results.image_ids))
    if classes is not None:
        truth, results = _of_classes(truth, results, classes, source)
    # Ids by position, from 1: exact in any number format, and in the order of the file's own.
    image, category = (1 + each for each in results.positions_in(truth, source))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluate(truth, COCOResults(image, category, results.boxes, results.scores))
    precision, scores = (
        np.ascontiguousarray(evaluation.eval[key][..., -1])  # of 1, 10 and 100 detections
        for key in ("precision", "scores")  # [IoU, recall, category, area range], -1 for no truth
    )
    ious = np.array(evaluation.params.iouThrs)
    if curves is not None:
        write_curves(curves, truth.classes, ious, recall=np.array(evaluation.params.recThrs),
                     precision=precision, scores=scores)
    report = _report(truth, evaluation.stats, precision)
    report |= {"backend": version, "images": [detected, len(truth.image_ids)]}
    if intervals:
        found = Found(image - 1, extents(results.boxes), category, results.scores)
        _add_intervals(report, truth, found, ious)
    return report


def _of_classes(truth: COCOAnnotations, results: COCOResults, classes: Sequence[str],
                source: object) -> tuple[COCOAnnotations, COCOResults]:
    """Return the annotations and the results of some categories; raises as `evaluate_coco`."""
    _, categories = results.positions_in(truth, source)
    part = truth.of_classes(classes)
    kept = np.isin(truth.classes, part.classes)[categories]
    return part, COCOResults(*(each[kept] for each in results))


def _report(truth: COCOAnnotations, stats: np.ndarray, precision: np.ndarray) -> dict:
    stats = np.asarray(stats).tolist()
    means = precision.mean(axis=(0, 1)).tolist()  # [category][area]
    by_name = dict(zip(truth.classes, means, strict=True))
    at_50 = dict(zip(truth.classes, precision[0, :, :, 0].mean(0).tolist(), strict=True))
    return {
        "stats": stats,
        "per_category": {name: aps[0] for name, aps in by_name.items()},
        "interval": None, "per_category_interval": {},
        "at_50": {"mean": stats[1], "interval": None, "per_class": at_50,
                  "per_class_interval": {}},
        "per_size": dict(zip(SIZES, stats[3:6], strict=True)),
        "per_category_per_size": {name: dict(zip(SIZES, aps[1:], strict=True)) for name,
                                  aps in by_name.items()}}


def _add_intervals(report: dict, truth: COCOAnnotations, found: Found, ious: np.ndarray) -> None:
    objects = Truth(truth.owners(), extents(truth.boxes), truth.labels, truth.crowds, "coco")
    found = Found(*(each[np.argsort(found.images, kind="stable")] for each in found))
    images = len(truth.image_ids)
    weights, drawn = bootstrap.draw(images), {}
    counted = count(objects, found, ious, len(truth.classes), images)
    for name, each in zip(truth.classes, counted, strict=True):
        if each.objects.any():
            (aps,) = bootstrap.precisions(each, weights, ("coco",))
            drawn[name] = np.stack([aps.mean(0), aps[0]])
    for n, (part, key) in enumerate([(report, "per_category"), (report["at_50"], "per_class")]):
        aps = {name: each[n] for name, each in drawn.items()}
        part["interval"] = bootstrap.interval(bootstrap.mean([*aps.values()]))
        part[f"{key}_interval"] = {name: bootstrap.interval(aps.get(name))
                                   for name in truth.classes}


def _classes(report: dict) -> list[str]:
    """Return a line a class with both AP and their intervals."""
    width, at_50 = max(map(len, ("class", *report["per_category"]))), report["at_50"]
    head = [f"{title:>10}  {'95 % interval':16}" for title in ("AP", "AP at .50")]
    lines = [f"{'class':{width}}  {'  '.join(head)}"]
    for name, ap in report["per_category"].items():
        cells = [(ap, report["per_category_interval"][name]),
                 (at_50["per_class"][name], at_50["per_class_interval"][name])]
        shown = [f"{value:10.4f}  {bootstrap.text(bounds):16}" for value, bounds in cells]
        lines.append(f"{name:{width}}  {'  '.join(shown)}")
    return [line.rstrip() for line in lines]


def notes(report: dict) -> list[str]:
    """Return what zeros and -1 in a report of `evaluate_coco` mean, as lines for the log."""
    lines = []
    if report["stats"][8] == 0:
        lines += ["none of the 100 best detections of a class in an image overlaps an object of"
                  " that class by IoU 0.50 or more"]
    absent = [name for name, ap in report["per_category"].items() if ap == -1]
    if absent:
        lines += [f"no ground truth (-1) for {len(absent)} classes: {', '.join(absent)}"]
    return lines


def load_backend(name: str) -> tuple[Callable[..., object], str]:
    """Import a backend; return evaluate(truth, results) and "name version".

    The ids of these results are positions from 1. What ``evaluate`` returns has pycocotools'
    ``stats``, ``eval`` and ``params``. Raises UserError for a package that is not installed, too
    old or broken, ValueError for a ``name`` that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    module = name.replace("-", "_")
    try:
        evaluate = _import_backend(name)
    except (ImportError, ValueError) as error:  # ValueError: compiled for another NumPy
        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == module:
            problem = f"need it installed (pip install {name})"
        else:
            problem = f"cannot be computed, its import fails: {error} (pip install -U {name})"
        raise UserError(f"COCO scores by {name} {problem}") from error
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a module without a package's metadata
        version = getattr(sys.modules[module], "__version__", "of unknown version")
    if name == "hotcoco" and not hasattr(sys.modules[module].COCO, "from_arrays"):
        raise UserError(
            f"COCO scores by hotcoco need hotcoco>=1.2, found {version} (pip install -U hotcoco)")
    return evaluate, f"{name} {version}"


def _import_backend(name: str) -> Callable[..., object]:
    if name == "hotcoco":
        import hotcoco

        return partial(_evaluate_arrays, hotcoco)
    if name == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return partial(_evaluate_dicts, COCO, COCOeval_faster)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return partial(_evaluate_dicts, COCO, COCOeval)


def _evaluate_dicts(COCO: type, COCOeval: type, truth: COCOAnnotations,
                    results: COCOResults) -> object:
    columns = {"image_id": 1 + truth.owners(), "category_id": truth.labels, "bbox": truth.boxes}
    objects = _index(COCO, truth, columns | {"area": truth.areas, "iscrowd": truth.crowds})
    columns = dict(zip(COCO_FIELDS, results, strict=True))
    found = _index(COCO, truth, columns | {"area": results.boxes[:, 2:].prod(1)})
    evaluation = COCOeval(objects, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _index(COCO: type, truth: COCOAnnotations, columns: dict[str, np.ndarray]) -> object:
    """Return a COCO object with one annotation a row of the columns."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    # Own ids from 1: pycocotools takes a match with id 0 for none, and joins equal ids.
    annotations = [{"id": id, **dict(zip(columns, row, strict=True))}
                   for id, row in enumerate(rows, 1)]
    coco = COCO()
    coco.dataset = {**_lists(truth), "annotations": annotations}
    coco.createIndex()
    return coco


def _evaluate_arrays(hotcoco: object, truth: COCOAnnotations, results: COCOResults) -> object:
    objects = hotcoco.COCO.from_arrays(*_lists(truth).values(), 1 + truth.owners(), truth.labels,
                                       truth.boxes, area=truth.areas, iscrowd=truth.crowds)
    image, category, boxes, scores = results
    found = objects.load_res(np.column_stack([image, boxes, scores, category]))
    evaluation = hotcoco.COCOeval(objects, found, "bbox")
    evaluation.run()
    return evaluation


def _lists(truth: COCOAnnotations) -> dict:
    """Return the records of images and categories, with positions from 1 as ids."""
    return {"images": [{"id": id} for id in range(1, len(truth.image_ids) + 1)],
            "categories": [{"id": id, "name": name} for id, name in enumerate(truth.classes, 1)]}


def _parser() -> Parser:
    parser = Parser(prog="python -m data.coco_eval", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="results JSON, or the .zip of a test split")
    parser.add_argument("annotations", help="annotation JSON, e.g. instances_val2017.json")
    parser.add_argument(
        "--eval-backend", choices=BACKENDS, default=BACKENDS[0],
        help="what computes the numbers (%(default)s); hotcoco gives the same bits, much faster")
    parser.add_argument("--classes", metavar="NAMES",
                        help="score only these: a,b,c or a file with one name a line")
    parser.add_argument("--json", metavar="OUT", help="write stats, per_category, ... to this file")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    if args.results.endswith(".zip"):
        count = check_submission(args.results, args.annotations)
        print(f"{args.results}: {count} detections, as the evaluation server takes them")
        return 0
    classes = parse_classes(args.classes) if args.classes else None
    report = evaluate_coco(args.results, args.annotations, args.eval_backend, classes=classes)
    if args.json:
        write_json(args.json, report)
    shown = [report["interval"], report["at_50"]["interval"], *[None] * (len(STATS) - 2)]
    rows = zip(STATS, report["stats"], shown, strict=True)
    for (metric, iou, area, most), value, bounds in rows:
        long = {"AP": "Average Precision", "AR": "Average Recall"}[metric]
        where = f"IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d}"
        interval = f" ({bootstrap.text(bounds)})" if bounds else ""
        print(f" {long:<18} ({metric}) @[ {where} ] = {value:0.4f}{interval}")
    print(*notes(report), *_classes(report), *undetected(*report["images"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
