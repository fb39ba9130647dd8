"""The whole path in minutes: draw a data set, train, evaluate, and look at the detections.

    python -m demo.run [--output DIR] [--epochs N]

It prints every call of train_test.py, so that each can be repeated by hand. The last file it writes
is a contact sheet, ``detections.png``.
"""

import json
import shlex
import sys
import time
import timeit
import webbrowser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import train_test
from demo.shapes import make_dataset
from tools.detect import has_display
from tools.sheet import draw_sheet
from utils.arguments import Parser, positive
from utils.errors import command

VERSION = "SSD_HarDNet68"
# In so few steps, a network from scratch learns best with small batches and a short warm-up.
OPTIONS = ["-s", "300", "-b", "8", "--recipe", "modern", "-we", "1"]


def bf16_pays() -> bool:
    """Return whether convolutions are at least 1.2 times as fast in bfloat16 as in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return _seconds(torch.float32) > 1.2 * _seconds(torch.bfloat16)


def _seconds(dtype: torch.dtype) -> float:
    x = torch.randn(2, 128, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, dtype=dtype)
    return min(timeit.repeat(partial(torch.conv2d, x, weight, padding=1), number=1, repeat=8))


def call(*options: str) -> None:
    """Call train_test.py, and print the call as a user would type it."""
    print(f"\n$ python train_test.py {shlex.join(options)}", flush=True)
    status = train_test.main(list(options))
    if status:
        raise SystemExit(status)


def train_and_test(root: Path, folder: Path, epochs: int) -> Path:
    """Train and test on a data set, and return the folder of the test's results."""
    run = time.strftime("%Y%m%d-%H%M%S")
    common = ["--save_folder", str(folder), "--num_workers", "2"]
    amp = "bf16" if bf16_pays() else "off"
    call("-d", "VOC", "--root", str(root), "-v", VERSION, "--basenet", "none", *OPTIONS,
         "-max", str(epochs), "--amp", amp, *common, "--date", run, "--test_frequency", "0",
         "--save_frequency", "0")
    run_dir = folder / f"{VERSION}_300" / run
    checkpoint = run_dir / f"Final_{VERSION}_VOC.pth"
    call("--test", str(checkpoint), *common, "--score_threshold", "0.01")
    return run_dir / "ss_predict" / checkpoint.stem / "test"


def print_results(results: dict) -> None:
    """Print both average precisions of every class, and their means."""
    metrics = [results["voc07_11point"], results["area"]]
    print(f"\n{'class':12}  AP@.5 (11-point)  AP@.5 (area)")
    for name in results["classes"]:
        points, area = (metric["per_class"][name] for metric in metrics)
        print(f"{name:12}  {points:16.3f}  {area:12.3f}")
    points, area = (metric["mean"] for metric in metrics)
    print(f"{'mean':12}  {points:16.3f}  {area:12.3f}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path("demo/output"), help="(demo/output)")
    p.add_argument("--epochs", type=positive, default=8, help="(8)")
    p.add_argument("--trainval", type=positive, default=200, help="images to train on (200)")
    p.add_argument("--test", type=positive, default=80, help="images to test on (80)")
    args = p.parse_args(argv)
    start = time.monotonic()
    root = args.output / f"shapes_{args.trainval}_{args.test}"
    if not root.exists():
        make_dataset(root, args.trainval, args.test)
    print(f"data set: {args.trainval} images to train on, {args.test} to test on, in {root}")
    results = train_and_test(root, args.output / "runs", args.epochs)
    sheet = args.output / "detections.png"
    draw_sheet(results, sheet)
    print_results(json.loads((results / "results.json").read_text()))
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes in all. Look at {sheet}: green is "
          "found, red is wrong,\ndashed orange is missed; the first eight images went best, the "
          "last eight worst.")
    if has_display() and sys.stdout.isatty():
        webbrowser.open(sheet.absolute().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
