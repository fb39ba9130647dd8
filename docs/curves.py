"""Training curves of runs, side by side: the loss, and the AP where it was measured.

python -m docs.curves OUT.png NAME=LOG.jsonl [NAME=LOG.jsonl ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT, MARGIN = 620, 420, 60
INK, GRID = (60, 50, 40), (225, 225, 225)
COLOURS = [(180, 105, 50), (40, 130, 235), (70, 140, 40), (60, 60, 200)]


def read_log(path: Path) -> list[dict]:
    """The records of a run's log.jsonl that are of an epoch."""
    lines = path.read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "epoch" in record]


def series(records: list[dict], quantity: str) -> np.ndarray:
    """float64 [n, 2]: epoch and "loss" or "AP" of the records that have it."""
    if quantity == "loss":
        pairs = [(r["epoch"], r["loss_loc"] + r["loss_conf"]) for r in records]
    else:
        pairs = [(r["epoch"], r["value"]) for r in records if r.get("value") is not None]
    return np.array(pairs, np.float64).reshape(-1, 2)


def panel(title: str, curves: dict[str, np.ndarray], top: float) -> np.ndarray:
    """One diagram, BGR uint8 [HEIGHT, WIDTH, 3]; y runs from 0 to ``top``."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    last = max((curve[-1, 0] for curve in curves.values() if len(curve)), default=1)
    low, high = np.array([MARGIN, HEIGHT - MARGIN]), np.array([WIDTH - 20, 40])

    def place(points: np.ndarray) -> np.ndarray:
        return np.rint(low + points / (last, top) * (high - low)).astype(np.int32)

    def write(text: str, x: int, y: int, scale: float = 0.45, colour=INK) -> None:
        cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)

    for share in np.linspace(0, 1, 6):
        (x, y) = place(np.array([share * last, share * top]))
        cv2.line(image, (low[0], y), (high[0], y), GRID, 1)
        write(f"{share * top:.3g}", 14, y + 5)
        write(f"{share * last:.0f}", x - 8, low[1] + 20)
    write(title, MARGIN, 24, 0.6)
    write("epoch", WIDTH - 70, HEIGHT - 16)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        points = place(curve.clip(max=[last, top]))
        cv2.polylines(image, [points], False, colour, 2, cv2.LINE_AA)
        for point in points if len(points) < 20 else []:
            cv2.circle(image, point.tolist(), 4, colour, -1, cv2.LINE_AA)
        row = list(curves).index(name)
        write(name, MARGIN + 150 * (row % 3), HEIGHT - 16 - 18 * (row // 3), 0.5, colour)
    return image


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m docs.curves", description=__doc__.splitlines()[0])
    p.add_argument("output", type=Path)
    p.add_argument("runs", nargs="+", metavar="NAME=LOG.jsonl")
    args = p.parse_args(argv)
    runs = dict(run.split("=", 1) for run in args.runs)
    logs = {name: read_log(Path(path)) for name, path in runs.items()}
    losses = {name: series(log, "loss") for name, log in logs.items()}
    scores = {name: series(log, "AP") for name, log in logs.items()}
    top = float(np.ceil(max(curve[:, 1].max() for curve in losses.values())))
    image = np.hstack([panel("training loss", losses, top), panel("test AP@.5", scores, 1.0)])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    return 0 if cv2.imwrite(str(args.output), image) else 1


if __name__ == "__main__":
    sys.exit(main())
