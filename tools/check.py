"""Check a data set before training: its faults, and how well the prior boxes fit it.

    python -m tools.check --root FOLDER -d VOC|COCO [--train_sets SETS] [--test_sets SETS]
        [--classes NAMES] [--size 300 512] [--priors VOC|COCO] [--json OUT] [--html OUT] [--strict]

An error stops training (a missing, damaged or wrongly sized image, a malformed annotation) or makes
the score worthless (a test image that is a training image). A warning is a loss that training does
not report: boxes that the reader drops, near copies of images, boxes that few prior boxes fit.
Exit status: 0 no errors, 1 errors (with --strict: or warnings), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import build_dataset, split_options
from data.config import PRIORS
from data.skips import SkipKind
from engine.options import Options, add_option
from engine.resolve import resolve
from tools.findings import BOTH, Fit, Part, Record, Report
from tools.image_check import Scan, check_copies, scan_images
from tools.page import check_page
from tools.prior_fit import check_priors
from utils.arguments import Parser
from utils.errors import UserError, command
from utils.files import atomic_write, check_writable, write_json
from utils.logger import close_logging, setup_logging


def check(options: Options, sizes: tuple[int, ...] = (300, 512)) -> Report:
    """Read everything that training would read; report every fault, not only the first.

    sizes: input sizes to judge prior boxes at. Raises UserError if the root is no folder.
    """
    if not Path(options.root).is_dir():
        raise UserError(f"{options.root}: no such data set folder; give its place with --root")
    report = Report(options, sizes)
    classes, scans = options.classes, {}
    for name, sets in (("train", options.train_sets), ("test", options.test_sets)):
        faults: list[str] = []
        try:
            split = split_options(options.dataset, vars(options))
            dataset = build_dataset(options.dataset, options.root, sets, classes, faults=faults,
                                    **split)
        except UserError as error:
            report.add("error", name, "image set that cannot be opened", [Record(str(error))])
            continue
        classes = classes or tuple(dataset.classes) or None  # training's classes are tested
        report.parts[name] = Part.of(dataset)
        scans[name] = scan_images(dataset, name)
        _check_images(report, name, faults, scans[name])
        _check_boxes(report, name)
    if "test" in report.parts:
        try:
            report.parts["test"].dataset.check_scorable()
        except UserError as error:
            report.add("error", "test", "image sets that cannot be scored", [Record(str(error))])
    _check_classes(report)
    check_copies(report, scans)
    check_priors(report)
    return report


def _check_images(report: Report, name: str, faults: list[str], scans: list[Scan]) -> None:
    images = {scan.fault: ((name, i),) for i, scan in enumerate(scans) if scan.fault}
    records = [Record(text, images.get(text, ())) for text in dict.fromkeys([*faults, *images])]
    report.add("error", name, "record that training stops at", records)
    turned = [(name, i) for i, scan in enumerate(scans) if scan.turned]
    what = "image that an EXIF orientation turns: its boxes may be for the image before or after it"
    report.add("warning", name, what, [Record(str(report.path(x)), (x,)) for x in turned])


def _check_boxes(report: Report, name: str) -> None:
    part = report.parts[name]
    kinds: dict[SkipKind, list[Record]] = defaultdict(list)
    for skip in part.dataset.skipped:
        images = () if skip.image is None else ((name, skip.image),)
        kinds[skip.kind].append(Record(skip.detail, images, skip.box))
    for kind, records in kinds.items():
        asked = kind is SkipKind.CLASSES_LEFT_OUT and report.options.classes
        report.add("note" if asked else kind.level, name, kind.text, records)
    sides, sizes = part.boxes[:, 2:] - part.boxes[:, :2], part.sizes[part.images]
    tiny = []
    for k in np.flatnonzero((100 * sides < sizes).any(1)):  # the rule of SSDAugmentation
        image = (name, int(part.images[k]))
        label, (width, height) = part.dataset.classes[part.labels[k] - 1], sides[k]
        text = (f"{report.path(image)}: {label}, {width:.4g} x {height:.4g}"
                f" in {sizes[k, 0]} x {sizes[k, 1]}")
        tiny.append(Record(text, (image,), tuple(part.boxes[k].tolist())))
    if name == "train":  # a test drops no box
        what = "tiny box, a side under 1 % of the image's (dropped unless a crop enlarges it)"
        report.add("warning", name, what, tiny)
    if without := len(part.sizes) - len(np.unique(part.images)):
        text = f"{without} of {len(part.sizes)} images"
        report.add("note", name, "images without an object", [Record(text)])


def _check_classes(report: Report) -> None:
    classes = report.classes()
    for name, part in report.parts.items():
        missing = [key for key in classes if not part.of_class(key).any()]
        if name == "train" or len(missing) < len(classes):  # a test split of COCO has no boxes
            level = "warning" if name == "train" else "note"
            report.add(level, name, f"class without a box to {name} on", map(Record, missing))
    alike = defaultdict(list)
    for key in classes:
        alike[re.sub(r"[\s_-]", "", key).casefold()].append(key)
    groups = [Record(", ".join(names)) for names in alike.values() if len(names) > 1]
    report.add("warning", BOTH, "classes whose names differ only in case or spaces", groups)


def summary(report: Report, shown: int = 5) -> str:
    """Return the report as text, with the first `shown` records of every finding."""
    lines = report.titles()
    for finding in report.findings:
        lines += ["", finding.title()]
        lines += [f"    {record.text}" for record in finding.records[:shown]]
        if (more := len(finding.records) - shown) > 0:
            lines.append(f"    ... and {more:,} more")
    return "\n".join([*lines, "", report.conclusion()])


def as_json(report: Report) -> dict:
    """Return the whole report as plain data."""
    parts = report.parts.items()
    return {name: getattr(report.options, name) for name in ("root", "dataset", "priors")} | {
        "sets": {name: {"names": report.sets(name), "pictures": len(part.sizes)}
                 for name, part in parts},
        "counts": report.counts(),
        "findings": [finding._asdict() | {"records": [record.text for record in finding.records]}
                     for finding in report.findings],
        "classes": {key: {name: dict(zip(("boxes", "pictures"), part.count(key), strict=True))
                          for name, part in parts} for key in report.classes()},
        "fits": [dict(zip(("class", *Fit._fields[1:]), fit, strict=True)) for fit in report.fits],
        "advice": report.advice,
    }


def parse(argv: Sequence[str] | None) -> dict:
    """Return the given options by name."""
    priors, sizes = (list(dict.fromkeys(values)) for values in zip(*PRIORS, strict=True))
    p = Parser(prog="python -m tools.check", argument_default=argparse.SUPPRESS, allow_abbrev=False,
               description="Check a data set before training, with the options of train_test.py.",
               epilog="Exit status: 0 no errors, 1 errors (--strict: or warnings), 2 bad usage.")
    for name in ("dataset", "root", "classes", "train_sets", "test_sets", "val_share", "split_by"):
        add_option(p, name)
    p.add_argument("-s", "--size", type=int, nargs="+", choices=sizes, default=sizes,
                   help="input sizes to judge prior boxes at (default: all)")
    p.add_argument("--priors", choices=priors, help="whose prior boxes (default: --dataset's)")
    p.add_argument("--json", metavar="OUT", help="write every record to this file")
    p.add_argument("--html", metavar="OUT", help="write a page with the images that are at fault")
    p.add_argument("--strict", action="store_true", help="exit with status 1 also for warnings")
    return vars(p.parse_args(argv))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = parse(argv)
    data, html = given.pop("json", None), given.pop("html", None)
    sizes, strict = tuple(dict.fromkeys(given.pop("size"))), given.pop("strict", False)
    options = resolve(given)
    for path in filter(None, (data, html)):
        check_writable(path)
    setup_logging(quiet=True)  # the readers' warnings are findings
    try:
        report = check(options, sizes)
    finally:
        close_logging()
    if data:
        write_json(data, as_json(report))
    print(summary(report))
    if html:
        with atomic_write(html) as file:
            file.write(check_page(report).encode("utf-8", "replace"))
        print(f"\nThe page with images is {html}")
    counts = report.counts()
    return int(counts["error"] > 0 or (strict and counts["warning"] > 0))


if __name__ == "__main__":
    sys.exit(main())
