"""The whole path in a few minutes: draw a data set, train, evaluate, and look at the detections.

    python -m demo.run [--output DIR] [--epochs N]

It calls the command line that everybody calls (`train_test.py`) and prints those commands, so that
each can be repeated by hand. The last thing it writes is a contact sheet, `detections.png`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import cv2
import torch

import train_test
from data.detections import load_detections
from data.voc0712 import VOCDetection
from demo.shapes import make_dataset
from utils.draw import contact_sheet, draw_comparison, rank_by_errors
from utils.errors import UserError

# From-scratch training in this few steps wants small batches and a gentle start.
OPTIONS = ["-v", "SSD_HarDNet68", "-s", "300", "-b", "8", "--lr", "2e-3", "-we", "2"]
SCORE = 0.4
"""Least score of a detection in the pictures."""


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def call(*options: str) -> None:
    """One call of train_test.py, shown as a user would type it."""
    print(f"\n$ python train_test.py {shlex.join(options)}", flush=True)
    status = train_test.main(list(options))
    if status:
        raise SystemExit(status)


def draw_sheet(dataset: VOCDetection, detections: list[dict], path: Path) -> None:
    """The pictures that went best and worst, eight each, truth and detections drawn."""
    truths = [dataset.target(i) for i in range(len(dataset))]
    difficult = [annotation.difficult for annotation in dataset.annotations]
    order, counts = rank_by_errors(truths, detections, difficult, score_thresh=SCORE)
    images, captions = [], []
    for kind, chosen in (("good", order[:8]), ("bad", order[::-1][:8])):
        for i in chosen:
            images.append(
                draw_comparison(
                    dataset.pull_image(i),
                    truths[i],
                    detections[i],
                    dataset.classes,
                    difficult[i],
                    score_thresh=SCORE,
                )
            )
            correct, wrong, missed = counts[i]
            captions.append(
                f"{kind}: {dataset.ids[i]}  {correct} right, {wrong} wrong, {missed} missed"
            )
    cv2.imwrite(str(path), contact_sheet(images, 4, (400, 400), captions))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path("demo/output"))
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--trainval", type=int, default=300, help="pictures to train on")
    p.add_argument("--test", type=int, default=80, help="pictures to test on")
    args = p.parse_args(argv)
    start = time.monotonic()
    root = args.output / "shapes"
    try:
        made = make_dataset(root, args.trainval, args.test)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"data set: {made['trainval']} pictures to train on, {made['test']} to test, in {root}")

    run = time.strftime("%Y%m%d-%H%M%S")
    amp = "bf16" if has_bf16() else "off"
    folder = args.output / "runs"
    call("-d", "VOC", "--root", str(root), *OPTIONS, "-max", str(args.epochs), "--amp", amp,
         "--num_workers", "2", "--save_folder", str(folder), "--date", run,
         "--test_frequency", "0", "--save_frequency", "0")  # fmt: skip
    run_dir = folder / "SSD_HarDNet68_300" / run
    checkpoint = run_dir / "Final_SSD_HarDNet68_VOC.pth"
    call("--test", str(checkpoint), "--save_folder", str(folder), "--num_workers", "2",
         "--score_threshold", "0.01")  # fmt: skip

    results_dir = run_dir / "ss_predict" / checkpoint.stem / "test"
    results = json.loads((results_dir / "results.json").read_text())
    dataset = VOCDetection(root, [(None, "test")])
    detections = load_detections(results_dir / "detections.npz", dataset.ids, {})
    sheet = args.output / "detections.png"
    draw_sheet(dataset, detections, sheet)
    print(f"\n{'class':12}  AP@.5 (11-point)  AP@.5 (area)")
    for name in results["classes"]:
        points, area = (results[m]["per_class"][name] for m in ("voc07_11point", "area"))
        print(f"{name:12}  {points:16.3f}  {area:12.3f}")
    points, area = results["voc07_11point"]["mean"], results["area"]["mean"]
    print(f"{'mean':12}  {points:16.3f}  {area:12.3f}")
    print(
        f"\n{(time.monotonic() - start) / 60:.1f} minutes in all. Look at {sheet}: green is found,"
    )
    print("red is wrong, dashed orange is missed; the first eight pictures went best, the last "
          "eight worst.")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
