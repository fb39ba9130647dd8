"""Draw curves of runs side by side: the training loss, and the test AP where it was measured.

python -m docs.curves OUT.png NAME=LOG.jsonl [NAME=LOG.jsonl ...]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import cv2
import numpy as np

from tools.figures import as_png, check_matplotlib, draw_lines
from tools.results import read_log
from tools.tables import Table
from utils.errors import command
from utils.files import atomic_write


@command
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m docs.curves", description=__doc__.splitlines()[0])
    p.add_argument("output", type=Path)
    p.add_argument("runs", nargs="+", metavar="NAME=LOG.jsonl")
    args = p.parse_args(argv)
    check_matplotlib()
    loss, score = [], []
    for run in args.runs:
        name, _, log = run.partition("=")
        for epoch in read_log(Path(log)):
            loss.append((name, epoch.epoch, epoch.loss_loc + epoch.loss_conf))
            if not math.isnan(epoch.value):
                score.append((name, epoch.epoch, epoch.value))
    charts = [
        draw_lines(title, Table(("run", "epoch", y), rows))
        for title, y, rows in (("Training loss", "loss", loss), ("Test AP", "AP", score))
    ]
    images = [cv2.imdecode(np.frombuffer(as_png(chart), np.uint8), 1) for chart in charts]
    with atomic_write(args.output) as file:
        file.write(cv2.imencode(".png", np.hstack(images))[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
