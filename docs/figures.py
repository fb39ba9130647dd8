"""Draw ReadmeImg/architecture.png, a HarD block and the detector: `python -m docs.figures`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from data.config import PRIORS
from models.hardnet import HARDNET_SPECS, HarDBlock
from models.ssd import ssd_extras
from utils.errors import command
from utils.files import atomic_write

WIDTH, HEIGHT = 1600, 1150
OUT = Path(__file__).resolve().parents[1] / "ReadmeImg" / "architecture.png"

INK, GREY, PALE, WHITE = "#28303c", "#78808c", "#eaeef2", "#ffffff"
BLUE, TEAL, ORANGE, RED = "#346eb2", "#268e8c", "#e88626", "#ce424c"
HOPS = (GREY, TEAL, ORANGE, RED)  # colour of a link over 2^0, 2^1, 2^2, 2^3 layers
KINDS = {"image": GREY, "base": BLUE, "extras": TEAL}

SPEC = HARDNET_SPECS[68]
PRIOR_BOXES = PRIORS["VOC", 512]


class Canvas:
    """A white image; coordinates and sizes are pixels, counted from the upper left corner.

    What is drawn later lies on top.
    """

    def __init__(self, width: int, height: int) -> None:
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        self.canvas = FigureCanvasAgg(figure)
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def line(self, points: Sequence, color: str, thickness: float = 2) -> None:
        self.axes.plot(*np.transpose(points), color=color, linewidth=0.72 * thickness,
                       solid_joinstyle="miter", zorder=1)  # fmt: skip

    def arrow(self, points: Sequence, color: str, thickness: float = 2) -> None:
        """Draw an arrow between two points, or along a Bezier curve of four."""
        codes = [Curve.MOVETO] + [Curve.CURVE4 if len(points) == 4 else Curve.LINETO] * (
            len(points) - 1)  # fmt: skip
        self.axes.add_patch(FancyArrowPatch(
            path=Curve(points, codes), arrowstyle="-|>", mutation_scale=9 + 1.6 * thickness,
            color=color, linewidth=0.72 * thickness, shrinkA=0, shrinkB=0, joinstyle="miter",
        ))  # fmt: skip

    def box(self, x1: float, y1: float, x2: float, y2: float, fill: str, edge: str | None = None,
            radius: float = 6) -> None:  # fmt: skip
        """Draw a filled rectangle with round corners."""
        self.axes.add_patch(FancyBboxPatch(
            (x1 + radius, y1 + radius), x2 - x1 - 2 * radius, y2 - y1 - 2 * radius,
            boxstyle=f"round,pad={radius}", facecolor=fill, edgecolor=edge or fill, linewidth=1.44,
            zorder=1,
        ))  # fmt: skip

    def text(
        self, x: float, y: float, text: str, size: float = 16, color: str = INK,
        bold: bool = False, align: str = "center", room: float = math.inf,
    ) -> None:  # fmt: skip
        """Write a line of `size` pixels, less where it is wider than `room`; y is its middle."""
        drawn = self.axes.text(x, y, text, fontsize=0.63 * size, color=color, ha=align,
                               va="center_baseline", weight="bold" if bold else "normal", zorder=1)
        width = drawn.get_window_extent(self.canvas.get_renderer()).width
        drawn.set_fontsize(0.63 * size * min(1, room / width))


def _light(color: str, share: float = 0.82) -> tuple[float, ...]:
    return tuple(channel + (1 - channel) * share for channel in to_rgb(color))


def draw_block(canvas: Canvas) -> None:
    """Draw HarDNet68's first block: high boxes and thick links carry many channels."""
    inputs, multiplier = SPEC.stem[1], SPEC.multiplier
    layers, growth = SPEC.layers[0], SPEC.growth[0]
    with torch.device("meta"):
        block = HarDBlock(inputs, growth, multiplier, layers)
    canvas.text(40, 42, f"HarD block, L = {layers} layers", 26, bold=True, align="left")
    about = (f"first block of HarDNet68: growth k = {growth}, multiplier m = {multiplier}; every "
             "layer is conv 3x3, batch norm, ReLU")  # fmt: skip
    canvas.text(40, 78, about, 16, GREY, align="left")
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
                x1, y1 = xs[source] + shift, tops[source]
                x2, y2 = xs[layer] - shift, tops[layer] - 2
                lift = 34 + 40 * 1.78**hop
                points = [(x1, y1), (x1, y1 - lift), (x2, y2 - lift), (x2, y2)]
            canvas.arrow(points, HOPS[hop], thick[source])

    canvas.arrow([(xs[block.outputs[0]], bus), (xs[-1] + 110, bus)], BLUE, 3)
    for n in block.outputs:
        canvas.line([(xs[n], row), (xs[n], bus)], BLUE, 3)
    for n, (x, top, width) in enumerate(zip(xs, tops, channels, strict=True)):
        edge = BLUE if n else GREY
        fill, color = (BLUE, WHITE) if n in block.outputs else (_light(edge), INK)
        canvas.box(x - half, top, x + half, 2 * row - top, fill, edge)
        canvas.text(x, row - 11, str(n) if n else "input", 20 if n else 17, color, bold=True)
        canvas.text(x, row + 14, f"{width} ch", 15, color)

    _draw_rule(canvas, xs[-1] + 112, bus, layers, block.out_channels)


def _draw_rule(canvas: Canvas, x: float, bus: float, layers: int, out_channels: int) -> None:
    """Draw a block's output, and the rule of its links over it."""
    canvas.box(x, bus - 38, x + 196, bus + 38, BLUE)
    canvas.text(x + 98, bus - 13, f"output {out_channels} ch", 18, WHITE, bold=True)
    canvas.text(x + 98, bus + 14, "odd layers + last", 15, WHITE)

    for y, text in ((150, "Layer n reads layer n - 2ⁱ"), (174, "for every 2ⁱ dividing n"),
                    (322, "Width k, times m for"), (346, "every link with i > 0")):  # fmt: skip
        canvas.text(x, y, text, bold=True, align="left", room=210)
    canvas.text(x, 374, "(drawn as thickness)", 16, GREY, align="left")
    for hop, color in enumerate(HOPS[: layers.bit_length()]):
        y = 206 + 26 * hop
        canvas.arrow([(x, y), (x + 42, y)], color, 3)
        canvas.text(x + 54, y, f"i = {hop}:  n - {2**hop}", align="left")


class Step(NamedTuple):
    """A map of the detector; `boxes` per cell is 0 where the heads do not read it."""

    lines: tuple[str, str]  # above the box
    side: int
    channels: int
    kind: str  # of KINDS
    boxes: int


def detector_steps() -> list[Step]:
    """Return SSD512-HarDNet68 from the image to the last source map."""
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


def draw_detector(canvas: Canvas, top: float) -> None:
    """Draw SSD512-HarDNet68 from the image to its prior boxes, and where the heads read."""
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
    for kind, title in (("base", "HarDNet68 base network (every HarD block ends in a 1x1 conv)"),
                        ("extras", "SSD extra layers")):
        first, last = kinds.index(kind), len(kinds) - 1 - kinds[::-1].index(kind)
        left, right = xs[first] - half - 12, xs[last] + half + 12
        canvas.box(left, top + 76, right, row + 104, _light(KINDS[kind], 0.93), radius=12)
        canvas.text((left + right) / 2, top + 98, title, 17, KINDS[kind], bold=True)
    for n, (x, step) in enumerate(zip(xs, steps, strict=True)):
        color, high = KINDS[step.kind], 26 + 6 * math.log2(step.side)
        if n:
            canvas.arrow([(xs[n - 1] + half, row), (x - half - 2, row)], INK)
            if step.kind == "base" and n > 1 and step.side < steps[n - 1].side:  # not the stem
                middle = (xs[n - 1] + x) / 2 - 4
                canvas.box(middle - 5, row - 30, middle + 5, row + 30, RED, radius=3)
        if step.boxes:
            _draw_head(canvas, x, half, (row, heads, bus), step)
        fill, ink = (color, WHITE) if step.boxes else (_light(color), INK)
        canvas.box(x - half, row - high, x + half, row + high, fill, color)
        size = f"{step.side} x {step.side}"
        canvas.text(x, row - 10, size, 16, ink, bold=True, room=2 * half - 14)
        canvas.text(x, row + 13, f"{step.channels} ch", 15, ink)
        for y, line in zip((row - 116, row - 97), step.lines, strict=True):
            canvas.text(x, y, line, 15, room=2 * half + 14)
    x = xs[next(n for n, step in enumerate(steps) if step.boxes)]
    canvas.box(x - 38, row + 118, x + 38, row + 148, WHITE, ORANGE)
    canvas.text(x, row + 133, "L2Norm", 15)
    right = xs[3] + half
    canvas.arrow([(xs[-1], bus), (right + 2, bus)], ORANGE, 3)
    _draw_priors(canvas, (xs[0] - half, heads - 24, right, bus + 20), steps)


def _draw_head(canvas: Canvas, x: float, half: float, heights: tuple[float, float, float],
               step: Step) -> None:
    """Draw what is read at a source map; heights: of the map, the head and the prior boxes."""
    row, heads, bus = heights
    canvas.arrow([(x, row), (x, heads - 2)], ORANGE, 3)
    canvas.line([(x, heads), (x, bus)], ORANGE, 3)
    for y, text in ((heads, f"loc {step.boxes} x 4"), (heads + 36, f"conf {step.boxes} x C")):
        canvas.box(x - half, y, x + half, y + 30, _light(ORANGE), ORANGE)
        canvas.text(x, y + 15, text, 15, room=2 * half - 12)
    canvas.box(x - half, heads + 76, x + half, heads + 102, WHITE, radius=3)
    canvas.text(x, heads + 89, f"{step.boxes * step.side**2:,}", 16, bold=True)


def _draw_priors(canvas: Canvas, box: tuple[float, float, float, float],
                 steps: Sequence[Step]) -> None:
    """Draw the number of prior boxes and what becomes of them into a box (x1, y1, x2, y2)."""
    x1, y1, x2, _ = box
    terms = [f"{boxes} ({' + '.join(f'{s.side}²' for s in steps if s.boxes == boxes)})"
             for boxes in (6, 4)]  # fmt: skip
    canvas.box(*box, ORANGE)
    for y, size, text in (
        (36, 25, f"{PRIOR_BOXES.num_priors:,} prior boxes"), (76, 16, f"P = {' + '.join(terms)}"),
        (106, 16, "loc [B, P, 4]      conf [B, P, C classes]"),
        (144, 18, "softmax, decode, NMS per class"),
    ):
        canvas.text((x1 + x2) / 2, y1 + y, text, size, WHITE, size > 16, room=x2 - x1 - 40)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="PNG to write (%(default)s)")
    out = parser.parse_args(argv).out
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}), atomic_write(out) as file:
        canvas = Canvas(WIDTH, HEIGHT)
        draw_block(canvas)
        canvas.line([(40, 550), (WIDTH - 40, 550)], PALE)
        draw_detector(canvas, 550)
        canvas.canvas.print_png(file, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    main()
