"""A contact sheet of a test run: the pictures that went best and worst, truth and detections drawn.

    python -m demo.sheet RESULTS_DIR [--output PNG] [--score 0.4] [--pictures 8]

RESULTS_DIR is a folder with the results.json and detections.npz of a test on data in VOC layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2

from data.detections import load_detections
from data.voc0712 import VOCDetection
from utils.draw import contact_sheet, draw_comparison, rank_by_errors
from utils.errors import UserError
from utils.options import image_sets


def draw_sheet(directory: Path, path: Path, score: float = 0.4, pictures: int = 8) -> None:
    """Write the sheet of the results in ``directory`` to ``path``.

    Args:
        score: detections below it are left out of the pictures and of their ranking.
        pictures: how many of the best and how many of the worst are shown.

    Raises:
        UserError: no results there, of another data set kind, or ``path`` cannot be written.
    """
    try:
        results = json.loads((directory / "results.json").read_text("utf-8"))
        root, sets, classes = (results[key] for key in ("root", "sets", "classes"))
        dataset_kind = results["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no results.json of a test ({error!r})") from error
    if dataset_kind != "VOC":
        raise UserError(f"{directory} is of {dataset_kind} data; sheets are drawn of VOC layouts")
    pairs = [tuple(pair) for name in sets.split("+") for pair in image_sets(name)]
    dataset = VOCDetection(root, pairs, classes=classes)
    detections, _ = load_detections(directory / "detections.npz", dataset.ids, {})
    truths = [dataset.target(i) for i in range(len(dataset))]
    difficult = [dataset.difficult(i) for i in range(len(dataset))]
    order, counts = rank_by_errors(truths, detections, difficult, score_thresh=score)
    # A picture without objects that nothing was found in is right, but there is nothing to see.
    shown = [i for i in order if len(truths[i])]
    best, worst = shown[:pictures], shown[::-1][:pictures]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), contact_sheet(images, 4, (400, 400), captions)):
        raise UserError(f"{path} could not be written")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m demo.sheet", description=__doc__.splitlines()[0])
    p.add_argument("directory", type=Path, metavar="RESULTS_DIR")
    p.add_argument("--output", type=Path, help="the picture (default: RESULTS_DIR/detections.png)")
    p.add_argument("--score", type=float, default=0.4, help="least score of a detection (0.4)")
    p.add_argument("--pictures", type=int, default=8, help="best and worst pictures, each (8)")
    args = p.parse_args(argv)
    path = args.output or args.directory / "detections.png"
    try:
        draw_sheet(args.directory, path, args.score, args.pictures)
    except (UserError, cv2.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: green is found, red is wrong, dashed orange is missed, grey does not count")
    return 0


if __name__ == "__main__":
    sys.exit(main())
