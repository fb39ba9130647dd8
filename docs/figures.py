"""Draw ReadmeImg/architecture.png, a HarD block and the detector: `python -m docs.figures`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from data.config import PRIORS
from models.hardnet import HARDNET_SPECS, HarDBlock
from models.ssd import ssd_extras

WIDTH, HEIGHT = 1600, 1150
SCALE = 3  # drawn at 3x and reduced by area: cv2's own anti-aliasing leaves steps in thick curves
OUT = Path(__file__).resolve().parents[1] / "ReadmeImg" / "architecture.png"

# BGR
INK, GREY, PALE = (60, 48, 40), (140, 128, 120), (242, 238, 234)
BLUE, TEAL, ORANGE, RED = (178, 110, 52), (140, 142, 38), (38, 134, 232), (76, 66, 206)
WHITE = (255, 255, 255)
HOPS = (GREY, TEAL, ORANGE, RED)  # colour of a link over 2^0, 2^1, 2^2, 2^3 layers
KINDS = {"image": GREY, "base": BLUE, "extras": TEAL}

SPEC = HARDNET_SPECS[68]
PRIOR_BOXES = PRIORS["VOC", 512]


class Canvas:
    """A white BGR picture; coordinates and thicknesses are in pixels of the final picture."""

    def __init__(self, width: int, height: int):
        self.pixels = np.full((height * SCALE, width * SCALE, 3), 255, np.uint8)

    def line(self, points, color, thickness=2.0):
        cv2.polylines(
            self.pixels, [_fixed(points)], False, color, round(thickness * SCALE), cv2.LINE_AA
        )

    def polygon(self, points, color):
        cv2.fillPoly(self.pixels, [_fixed(points)], color, cv2.LINE_AA)

    def arrow(self, points, color, thickness=2.0):
        """A line with a head at its last point."""
        points = np.asarray(points, float)
        tip = points[-1]
        ahead = (tip - points[-2]) / np.linalg.norm(tip - points[-2])
        head = 5 + 1.6 * thickness
        side = np.array([-ahead[1], ahead[0]]) * head * 0.55
        neck = tip - ahead * head
        self.line([*points[:-1], neck + ahead], color, thickness)
        self.polygon([tip, neck + side, neck - side], color)

    def box(self, x1, y1, x2, y2, fill, edge=None, radius=6.0, thickness=2.0):
        """A filled rectangle with round corners."""
        corners = [
            (x2 - radius, y2 - radius, 0),
            (x1 + radius, y2 - radius, 90),
            (x1 + radius, y1 + radius, 180),
            (x2 - radius, y1 + radius, 270),
        ]
        angles = np.radians(np.arange(0, 91, 5))
        points = np.concatenate(
            [
                np.stack([x + radius * np.cos(a), y + radius * np.sin(a)], 1)
                for x, y, start in corners
                for a in [angles + math.radians(start)]
            ]
        )
        self.polygon(points, fill)
        if edge:
            self.line([*points, points[0]], edge, thickness)

    def text(self, x, y, text, size=16, color=INK, bold=False, align="centre", room=math.inf):
        """A line of ASCII text of `size` pixels, less where it is wider than `room`.

        y is the middle of the capitals. OpenCV 5 has other letters than 4, hence other widths.
        """
        font = cv2.FONT_HERSHEY_DUPLEX if bold else cv2.FONT_HERSHEY_SIMPLEX
        scale, thickness = size * SCALE / 30, round(size * SCALE / (11 if bold else 15))
        (width, _), _ = cv2.getTextSize(text, font, scale, thickness)
        if width > room * SCALE:
            scale *= room * SCALE / width
            width = room * SCALE
        left = x * SCALE - width * {"left": 0, "centre": 0.5, "right": 1}[align]
        bottom = y * SCALE + 10.5 * scale  # capitals are 21 units high
        cv2.putText(
            self.pixels,
            text,
            (round(left), round(bottom)),
            font,
            scale,
            color,
            thickness,
            cv2.LINE_AA,
        )

    def reduced(self) -> np.ndarray:
        height, width = self.pixels.shape[:2]
        return cv2.resize(
            self.pixels, (width // SCALE, height // SCALE), interpolation=cv2.INTER_AREA
        )


def _fixed(points) -> np.ndarray:
    return np.rint(np.asarray(points, float) * SCALE).astype(np.int32)


def _light(color, share=0.82):
    return tuple(round(c + (255 - c) * share) for c in color)


def _bezier(start, end, lift) -> np.ndarray:
    """A curve that leaves `start` upwards and comes down on `end`."""
    points = np.array([start, (start[0], start[1] - lift), (end[0], end[1] - lift), end])
    t = np.linspace(0, 1, 80)[:, None]
    return (
        (1 - t) ** 3 * points[0]
        + 3 * (1 - t) ** 2 * t * points[1]
        + 3 * (1 - t) * t**2 * points[2]
        + t**3 * points[3]
    )


def draw_block(canvas: Canvas):
    """HarDNet68's first block: boxes as high and links as thick as the channels they carry."""
    inputs, multiplier = SPEC.stem[1], SPEC.multiplier
    layers, growth = SPEC.layers[0], SPEC.growth[0]
    with torch.device("meta"):
        block = HarDBlock(inputs, growth, multiplier, layers)
    canvas.text(40, 42, f"HarD block, L = {layers} layers", 26, bold=True, align="left")
    canvas.text(
        40,
        78,
        f"first block of HarDNet68: growth k = {growth}, multiplier m = "
        f"{multiplier}; every layer is conv 3x3, batch norm, ReLU",
        16,
        GREY,
        align="left",
    )
    channels = [inputs, *(layer.conv.out_channels for layer in block.layers)]
    row, bus, half = 364, 490, 38
    xs = [96 + 142 * n for n in range(layers + 1)]
    tops = [row - 28 - 0.5 * c for c in channels]
    thick = [1.4 + 0.07 * c for c in channels]

    for layer in range(layers, 0, -1):
        for source in reversed(block.links[layer - 1]):
            hop = (layer - source).bit_length() - 1
            if hop == 0:
                points = [(xs[source] + half, row), (xs[layer] - half - 2, row)]
            else:
                shift = 44 - 18 * hop  # out on the right, in on the left, long links outside
                points = _bezier(
                    (xs[source] + shift, tops[source]),
                    (xs[layer] - shift, tops[layer] - 2),
                    34 + 40 * 1.78**hop,
                )
            canvas.arrow(points, HOPS[hop], thick[source])

    canvas.arrow([(xs[block.outputs[0]], bus), (xs[-1] + 110, bus)], BLUE, 3)
    for n in block.outputs:
        canvas.line([(xs[n], row), (xs[n], bus)], BLUE, 3)
    for n, (x, top, width) in enumerate(zip(xs, tops, channels, strict=True)):
        solid = n in block.outputs
        canvas.box(
            x - half,
            top,
            x + half,
            2 * row - top,
            BLUE if solid else _light(GREY if n == 0 else BLUE),
            BLUE if n else GREY,
        )
        color = WHITE if solid else INK
        canvas.text(x, row - 11, str(n) if n else "input", 20 if n else 17, color, bold=True)
        canvas.text(x, row + 14, f"{width} ch", 15, color)

    x = xs[-1] + 112
    canvas.box(x, bus - 38, x + 196, bus + 38, BLUE)
    canvas.text(x + 98, bus - 13, f"output {block.out_channels} ch", 18, WHITE, bold=True)
    canvas.text(x + 98, bus + 14, "odd layers + last", 15, WHITE)

    canvas.text(x, 150, "Layer n reads layer n - 2^i", 16, bold=True, align="left", room=210)
    canvas.text(x, 174, "for every 2^i dividing n", 16, bold=True, align="left")
    for hop, color in enumerate(HOPS[: layers.bit_length()]):
        y = 206 + 26 * hop
        canvas.arrow([(x, y), (x + 42, y)], color, 3)
        canvas.text(x + 54, y, f"i = {hop}:  n - {2**hop}", 16, align="left")
    canvas.text(x, 322, "Width k, times m for", 16, bold=True, align="left")
    canvas.text(x, 346, "every link with i > 0", 16, bold=True, align="left")
    canvas.text(x, 374, "(drawn as thickness)", 16, GREY, align="left")


class Step(NamedTuple):
    """A map of the detector; `boxes` per cell is 0 where the heads do not read it."""

    lines: tuple[str, str]  # above the box
    side: int
    channels: int
    kind: str  # of KINDS
    boxes: int


def detector_steps() -> list[Step]:
    """SSD512-HarDNet68 from the image to the last source map."""
    boxes = iter(PRIOR_BOXES.boxes_per_cell)
    side, (first, second) = PRIOR_BOXES.size // 2, SPEC.stem
    steps = [
        Step(("image", "BGR - mean"), PRIOR_BOXES.size, 3, "image", 0),
        Step((f"3x3 /2, {first}", f"3x3, {second}"), side, second, "base", 0),
    ]
    blocks = zip(SPEC.layers, SPEC.growth, SPEC.channels, strict=True)
    for i, (layers, growth, channels) in enumerate(blocks):
        side //= 2 if i == 0 or i - 1 in SPEC.pool_after else 1
        lines = ("HarD block", f"L {layers}, k {growth}")
        steps.append(
            Step(lines, side, channels, "base", next(boxes) if i == SPEC.stride8_block else 0)
        )
    steps.append(Step(("bridge 3x3", "dilation 4"), side, channels, "base", next(boxes)))
    with torch.device("meta"):
        extras = ssd_extras(channels, PRIOR_BOXES.size)
    sides = PRIOR_BOXES.feature_maps[2:]
    for narrow, shrink, side in zip(extras[::2], extras[1::2], sides, strict=True):
        (k, _), (stride, _), channels = shrink.kernel_size, shrink.stride, shrink.out_channels
        lines = (f"1x1, {narrow.out_channels}", f"{k}x{k}{' /2' * (stride == 2)}, {channels}")
        steps.append(Step(lines, side, channels, "extras", next(boxes)))
    return steps


def draw_detector(canvas: Canvas, top: int):
    """SSD512-HarDNet68 from the image to its prior boxes, and where the heads read."""
    canvas.text(40, top + 42, "SSD512-HarDNet68", 26, bold=True, align="left")
    canvas.box(1130, top + 27, 1140, top + 57, RED, radius=3)
    canvas.text(1152, top + 42, "max pool /2", 16, align="left")
    canvas.box(1290, top + 30, 1302, top + 54, BLUE, radius=3)
    canvas.box(1307, top + 30, 1319, top + 54, TEAL, radius=3)
    canvas.text(1331, top + 42, "source map, read by heads", 16, align="left", room=225)
    row, heads, bus, half = top + 250, top + 420, top + 550, 43
    steps = detector_steps()
    xs = [83 + 129.2 * n for n in range(len(steps))]
    kinds = [step.kind for step in steps]
    for kind, title in (
        ("base", "HarDNet68 base network (every HarD block ends in a 1x1 conv)"),
        ("extras", "SSD extra layers"),
    ):
        first, last = kinds.index(kind), len(kinds) - 1 - kinds[::-1].index(kind)
        canvas.box(
            xs[first] - half - 12,
            top + 76,
            xs[last] + half + 12,
            row + 104,
            _light(KINDS[kind], 0.93),
            radius=12,
        )
        canvas.text((xs[first] + xs[last]) / 2, top + 98, title, 17, KINDS[kind], bold=True)

    for n, (x, (lines, side, channels, kind, boxes)) in enumerate(zip(xs, steps, strict=True)):
        color, high = KINDS[kind], 26 + 6 * math.log2(side)
        if n:
            canvas.arrow([(xs[n - 1] + half, row), (x - half - 2, row)], INK, 2)
            if kind == "base" and n > 1 and side < steps[n - 1].side:  # the stem strides by itself
                middle = (xs[n - 1] + x) / 2 - 4
                canvas.box(middle - 5, row - 30, middle + 5, row + 30, RED, radius=3)
        if boxes:
            canvas.arrow([(x, row), (x, heads - 2)], ORANGE, 3)
            canvas.line([(x, heads), (x, bus)], ORANGE, 3)
        canvas.box(
            x - half, row - high, x + half, row + high, color if boxes else _light(color), color
        )
        ink = WHITE if boxes else INK
        canvas.text(x, row - 10, f"{side} x {side}", 16, ink, bold=True, room=2 * half - 14)
        canvas.text(x, row + 13, f"{channels} ch", 15, ink)
        for y, line in zip((row - 116, row - 97), lines, strict=True):
            canvas.text(x, y, line, 15, room=2 * half + 14)
        if boxes:
            canvas.box(x - half, heads, x + half, heads + 30, _light(ORANGE), ORANGE)
            canvas.text(x, heads + 15, f"loc {boxes} x 4", 15, room=2 * half - 12)
            canvas.box(x - half, heads + 36, x + half, heads + 66, _light(ORANGE), ORANGE)
            canvas.text(x, heads + 51, f"conf {boxes} x C", 15, room=2 * half - 12)
            canvas.box(x - half, heads + 76, x + half, heads + 102, WHITE, radius=3)
            canvas.text(x, heads + 89, f"{boxes * side**2:,}", 16, bold=True)

    x = xs[next(n for n, step in enumerate(steps) if step.boxes)]
    canvas.box(x - 38, row + 118, x + 38, row + 148, WHITE, ORANGE)
    canvas.text(x, row + 133, "L2Norm", 15)
    left, right, high = xs[0] - half, xs[3] + half, heads - 24
    canvas.arrow([(xs[-1], bus), (right + 2, bus)], ORANGE, 3)
    canvas.box(left, high, right, bus + 20, ORANGE)
    middle = (left + right) / 2
    canvas.text(middle, high + 36, f"{PRIOR_BOXES.num_priors:,} prior boxes", 25, WHITE, bold=True)
    terms = []
    for boxes in (6, 4):
        sides = [f"{step.side}^2" for step in steps if step.boxes == boxes]
        terms.append(f"{boxes} ({' + '.join(sides)})")
    canvas.text(middle, high + 76, f"P = {' + '.join(terms)}", 16, WHITE, room=right - left - 40)
    canvas.text(middle, high + 106, "loc [B, P, 4]      conf [B, P, C classes]", 16, WHITE)
    canvas.text(middle, high + 144, "softmax, decode, NMS per class", 18, WHITE, bold=True)


def architecture() -> np.ndarray:
    """The picture, BGR uint8 [HEIGHT, WIDTH, 3]."""
    canvas = Canvas(WIDTH, HEIGHT)
    draw_block(canvas)
    canvas.line([(40, 550), (WIDTH - 40, 550)], PALE, 2)
    draw_detector(canvas, 550)
    return canvas.reduced()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="PNG to write (%(default)s)")
    out = parser.parse_args(argv).out
    _, png = cv2.imencode(".png", architecture(), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png)


if __name__ == "__main__":
    main()
