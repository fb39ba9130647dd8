"""Check a data set before training: its faults, and how well the prior boxes fit it.

    python -m tools.check --root FOLDER [--train_sets SETS] [--test_sets SETS] [--classes NAMES]
        [--size 300 512] [--priors VOC|COCO] [--json OUT] [--html OUT] [--fit_priors OUT]
        [--strict]

An error stops training (a missing, damaged or wrongly sized image, a malformed annotation) or makes
the score worthless (a test image that is a training image). A warning is a loss that training does
not report, or a probable mistake: boxes that the reader drops or that occur twice, near copies of
images, images of one colour, rare classes, uneven splits, boxes that few prior boxes fit.
Exit status: 0 no errors, 1 errors (with --strict: or warnings), 2 bad usage, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data import build_dataset, split_options
from data.annotation import check_folder
from data.config import PRIORS
from data.image import limit_pixels
from engine.options import Options, add_option
from engine.resolve import resolve
from tools.box_check import check_boxes, check_classes
from tools.findings import Fit, Part, Record, Report
from tools.image_check import check_copies, check_images, check_places, scan_images
from tools.page import check_page
from tools.prior_fit import check_priors, fitted_sizes
from utils.arguments import Parser
from utils.errors import UserError, command
from utils.files import atomic_write, check_writable, write_json
from utils.logger import close_logging, setup_logging


def check(options: Options, sizes: tuple[int, ...] = (300, 512)) -> Report:
    """Read everything that training would read; report every fault, not only the first.

    sizes: input sizes to judge prior boxes at. Raises UserError if the root is no folder.
    """
    check_folder(Path(options.root))
    limit_pixels(options.max_pixels)
    report = Report(options, sizes)
    classes, scans = options.classes, {}
    for name, sets in (("train", options.train_sets), ("test", options.test_sets)):
        faults: list[str] = []
        try:
            more = split_options(options.dataset, vars(options)) | {"faults": faults}
            dataset = build_dataset(options.dataset, options.root, sets, classes, **more)
        except UserError as error:
            report.add("error", name, "image set that cannot be opened", [Record(str(error))])
            continue
        classes = classes or tuple(dataset.classes) or None  # training's classes are tested
        report.parts[name] = Part.of(dataset)
        scans[name] = scan_images(dataset, name)
        check_images(report, name, faults, scans[name])
        check_boxes(report, name)
    if "test" in report.parts:
        try:
            report.parts["test"].dataset.check_scorable()
        except UserError as error:
            report.add("error", "test", "image sets that cannot be scored", [Record(str(error))])
    check_classes(report)
    check_places(report)
    check_copies(report, scans)
    check_priors(report)
    return report


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
    parts, root = report.parts.items(), report.options.root
    return {name: getattr(report.options, name) for name in ("root", "dataset", "priors")} | {
        "layout": next((part.dataset.recognise(root) for _, part in parts), None),
        "sets": {name: {"names": report.sets(name), "images": len(part.sizes)}
                 for name, part in parts},
        "counts": report.counts(),
        "findings": [finding._asdict() | {"records": [record.text for record in finding.records]}
                     for finding in report.findings],
        "classes": {key: {name: list(part.count(key)) for name, part in parts}
                    for key in report.classes()},
        "fits": [dict(zip(("class", *Fit._fields[1:]), fit, strict=True)) for fit in report.fits],
        "advice": report.advice}


def parse(argv: Sequence[str] | None) -> dict:
    """Return the given options by name."""
    priors, sizes = (list(dict.fromkeys(values)) for values in zip(*PRIORS, strict=True))
    p = Parser(prog="python -m tools.check", argument_default=argparse.SUPPRESS, allow_abbrev=False,
               description="Check a data set before training, with the options of train_test.py.",
               epilog="Exit status: 0 no errors, 1 errors (--strict: or warnings), 2 bad usage.")
    for name in ("dataset", "root", "classes", "train_sets", "test_sets", "val_share", "split_by",
                 "max_pixels"):
        add_option(p, name)
    p.add_argument("-s", "--size", type=int, nargs="+", choices=sizes, default=sizes,
                   help="input sizes to judge prior boxes at (default: all)")
    p.add_argument("--priors", choices=priors, help="whose prior boxes (default: --dataset's)")
    p.add_argument("--json", metavar="OUT", help="write every record to this file")
    p.add_argument("--html", metavar="OUT", help="write a page with the images that are at fault")
    p.add_argument("--fit_priors", metavar="OUT",
                   help="write sizes of prior boxes that fit the data best, for --priors OUT")
    p.add_argument("--strict", action="store_true", help="exit with status 1 also for warnings")
    return vars(p.parse_args(argv))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = parse(argv)
    data, html, fit = (given.pop(name, None) for name in ("json", "html", "fit_priors"))
    sizes, strict = tuple(dict.fromkeys(given.pop("size"))), given.pop("strict", False)
    options = resolve(given)
    for path in filter(None, (data, html, fit)):
        check_writable(path)
    setup_logging(quiet=True)  # the readers' warnings are findings
    try:
        report = check(options, sizes)
    finally:
        close_logging()
    if data:
        write_json(data, as_json(report))
    if fit and "train" in report.parts:
        write_json(fit, fitted_sizes(report))
    print(summary(report))
    if html:
        with atomic_write(html) as file:
            file.write(check_page(report).encode("utf-8", "replace"))
        print(f"\nThe page with images is {html}")
    counts = report.counts()
    return int(counts["error"] > 0 or (strict and counts["warning"] > 0))


if __name__ == "__main__":
    sys.exit(main())
