"""The whole path in a few minutes: draw a data set, train, evaluate, and look at the detections.

    python -m demo.run [--output DIR] [--epochs N]

It calls the command line that everybody calls (`train_test.py`) and prints those commands, so that
each can be repeated by hand. The last thing it writes is a contact sheet, `detections.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import webbrowser
from pathlib import Path

import torch

import train_test
from demo.shapes import make_dataset
from tools.sheet import draw_sheet
from utils.errors import command

# In so few steps a network from scratch learns best from small batches at a low rate.
OPTIONS = ["-v", "SSD_HarDNet68", "-s", "300", "-b", "8", "--lr", "1e-3"]


def bf16_pays() -> bool:
    """Whether this machine convolves in bfloat16 at least 1.2 times as fast as in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(2, 128, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) > 1.2 * seconds(torch.bfloat16)


def call(*options: str) -> None:
    """One call of train_test.py, shown as a user would type it."""
    print(f"\n$ python train_test.py {shlex.join(options)}", flush=True)
    status = train_test.main(list(options))
    if status:
        raise SystemExit(status)


@command
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path("demo/output"))
    p.add_argument("--epochs", type=int, default=14)
    p.add_argument("--trainval", type=int, default=300, help="pictures to train on")
    p.add_argument("--test", type=int, default=80, help="pictures to test on")
    args = p.parse_args(argv)
    start = time.monotonic()
    root = args.output / "shapes"
    made = make_dataset(root, args.trainval, args.test)
    print(f"data set: {made['trainval']} pictures to train on, {made['test']} to test, in {root}")

    run = time.strftime("%Y%m%d-%H%M%S")
    amp = "bf16" if bf16_pays() else "off"
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
    sheet = args.output / "detections.png"
    draw_sheet(results_dir, sheet)
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
    show(sheet)
    return 0


def show(picture: Path) -> None:
    """Open a picture in the desktop's viewer, where somebody sits before one."""
    desktop = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(
        os.environ
    )
    if desktop and sys.stdout.isatty():
        webbrowser.open(picture.absolute().as_uri())


if __name__ == "__main__":
    sys.exit(main())
