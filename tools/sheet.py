"""Draw a contact sheet of a test: its best and worst images with objects and detections.

    python -m tools.sheet RUN_DIR [--output PNG] [--root DIR] [--score 0.4] [--images 8]

RUN_DIR is a folder with a test's results.json and detections.npz, or a run, whose newest test is
taken.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from data.image import limit_pixels
from data.judge import CORRECT, Judged
from inference.draw import contact_sheet, draw_comparison
from tools.results import open_test, report_parser
from utils.arguments import positive
from utils.errors import UserError, command
from utils.files import atomic_write


def draw_sheet(directory: Path, path: Path | None = None, root: str | None = None,
               score: float = 0.4, images: int = 8) -> Path:
    """Write the contact sheet of a test, and return its path.

    directory: of a test, or of a run, whose newest test is taken. path: the PNG; None:
    detections.png in the test's folder. root: of the data set; None: where the test found it.
    score: least score of the detections that count. images: number of the best, and of the worst.

    UserError: no test there, no data set, no object in it, or ``path`` cannot be written.
    """
    test = open_test(directory, root)
    if test.dataset is None:
        raise UserError(test.notes[-1])
    dataset, judged, path = test.dataset, test.judged, path or test.directory / "detections.png"
    counts = count_errors(judged, score, len(dataset))
    order = np.lexsort((-counts[:, 0], counts[:, 1] + counts[:, 2]))
    # An image without objects and without detections is right, but shows nothing.
    shown = order[np.isin(order, judged.truth.images)]
    if not len(shown):
        raise UserError(f"{test.directory}: no image of the test has an object to draw")
    images = min(images, (len(shown) + 1) // 2)  # none is shown as good and as bad
    chosen = [*shown[:images], *shown[images:][::-1][:images]]
    drawn = [draw_comparison(dataset.pull_image(i), judged, i, dataset.classes, score)
             for i in chosen]  # fmt: skip
    captions = ["{}: {}  {} right, {} wrong, {} missed".format(
                    "good" if n < images else "bad", dataset.ids[i], *counts[i])
                for n, i in enumerate(chosen)]  # fmt: skip
    with atomic_write(path) as file:
        file.write(cv2.imencode(".png", contact_sheet(drawn, 4, (400, 400), captions))[1])
    return path


def count_errors(judged: Judged, score: float, images: int) -> np.ndarray:
    """Return the correct detections, the wrong ones and the missed objects of each image.

    int64 [images, 3], of detections of at least `score`.
    """
    counted, right = judged.counted(score), judged.kind == CORRECT
    columns = (judged.found.images[counted & right], judged.found.images[counted & ~right],
               judged.truth.images[judged.not_found(score)])  # fmt: skip
    return np.stack([np.bincount(column, minlength=images) for column in columns], 1)


@command
def main(argv: list[str] | None = None) -> int:
    p = report_parser("python -m tools.sheet", __doc__)
    p.add_argument("--output", type=Path, metavar="PNG",
                   help="the sheet (default: detections.png in the test's folder)")
    p.add_argument("--images", type=positive, default=8, metavar="N",
                   help="number of best and number of worst images (8)")
    args = p.parse_args(argv)
    limit_pixels(args.max_pixels)
    if args.output and args.output.suffix.lower() != ".png":
        p.error(f"--output {args.output}: the sheet's name must end in .png")
    path = draw_sheet(args.directory, args.output, args.root, args.score, args.images)
    print(f"{path}: green is found, red is wrong, dashed orange is missed, grey does not count")
    return 0


if __name__ == "__main__":
    sys.exit(main())
