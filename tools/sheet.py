"""A contact sheet of a test run: the pictures that went best and worst, truth and detections drawn.

    python -m tools.sheet RUN_DIR [--output PNG] [--root DIR] [--score 0.4] [--pictures 8]

RUN_DIR is a folder with the results.json and detections.npz of a test on data in VOC layout, or a
run, of which the newest test is taken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inference.draw import contact_sheet, draw_comparison, rank_by_errors
from tools.chart import encode_png
from tools.results import open_test
from utils.arguments import fraction, positive
from utils.errors import UserError, command
from utils.files import atomic_write


def draw_sheet(
    directory: Path,
    path: Path | None = None,
    root: str | None = None,
    score: float = 0.4,
    pictures: int = 8,
) -> Path:
    """Write the sheet of a test's results, and return its path.

    Args:
        directory: of the results, or of a run, whose newest test is taken.
        path: of the picture; None: detections.png beside the results.
        root: of the data set; None: where the test found it.
        score: detections below it are left out of the pictures and of their ranking.
        pictures: how many of the best and how many of the worst are shown.

    Raises:
        UserError: no test there, not of a VOC layout, no data set, or ``path`` cannot be written.
    """
    test = open_test(directory, root)
    if test.results["dataset"] != "VOC":
        raise UserError(f"{test.directory} is of COCO data; sheets are drawn of VOC layouts")
    if test.dataset is None:
        raise UserError(test.notes[-1])
    dataset, detections = test.dataset, test.detections
    path = path or test.directory / "detections.png"
    truths = [dataset.target(i) for i in range(len(dataset))]
    difficult = [dataset.difficult(i) for i in range(len(dataset))]
    order, counts = rank_by_errors(truths, detections, difficult, score_thresh=score)
    # A picture without objects that nothing was found in is right, but there is nothing to see.
    shown = [i for i in order if len(truths[i])]
    if not shown:
        raise UserError(f"{test.directory}: no picture of the test has an object to draw")
    pictures = min(pictures, (len(shown) + 1) // 2)  # none is shown as good and as bad
    best, worst = shown[:pictures], shown[pictures:][::-1][:pictures]
    images, captions = [], []
    for kind, chosen in (("good", best), ("bad", worst)):
        for i in chosen:
            images.append(
                draw_comparison(
                    dataset.pull_image(i), truths[i], detections[i], dataset.classes, difficult[i],
                    score_thresh=score,
                )
            )  # fmt: skip
            correct, wrong, missed = counts[i]
            captions.append(f"{kind}: {dataset.ids[i]}  {correct} right, {wrong} wrong, "
                            f"{missed} missed")  # fmt: skip
    with atomic_write(path) as file:
        file.write(encode_png(contact_sheet(images, 4, (400, 400), captions)))
    return path


@command
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.sheet", description=__doc__.splitlines()[0])
    p.add_argument("directory", type=Path, metavar="RUN_DIR", help="a run, or a test's results")
    p.add_argument("--output", type=Path, metavar="PNG",
                   help="the picture (default: detections.png in the test's folder)")  # fmt: skip
    p.add_argument("--root", help="the data set, if it is no longer where the test found it")
    p.add_argument("--score", type=fraction, default=0.4, metavar="X",
                   help="least score of a detection (0.4)")  # fmt: skip
    p.add_argument("--pictures", type=positive, default=8, metavar="N",
                   help="best and worst pictures, each (8)")  # fmt: skip
    args = p.parse_args(argv)
    if args.output and args.output.suffix.lower() != ".png":
        p.error(f"--output {args.output}: the picture's name must end in .png")
    path = draw_sheet(args.directory, args.output, args.root, args.score, args.pictures)
    print(f"{path}: green is found, red is wrong, dashed orange is missed, grey does not count")
    return 0


if __name__ == "__main__":
    sys.exit(main())
