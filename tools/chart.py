"""Charts of a report: drawn once as lines, boxes and texts, written as SVG and as PNG."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np

from docs.figures import Canvas
from inference.draw import escape as escaped

# Okabe and Ito's, told apart by every kind of sight, but for the yellow, too pale for a line.
FIRST = ("0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "56b4e9")
NAMED = {"ink": (40, 40, 40), "grid": (222, 222, 222), "bar": (86, 130, 190)}
MARGINS = (58, 56, 16, 48)  # left, top, right, bottom


def colour(number: int) -> tuple[int, int, int]:
    """The colour of line `number`, RGB: six that everybody can tell apart, then other hues."""
    if number < len(FIRST):
        return tuple(bytes.fromhex(FIRST[number]))
    hue = number * 0.618034 % 1
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, (0.4, 0.5, 0.6)[number % 3], 0.6))


class Chart:
    """A titled diagram; x and y are (lowest, highest) of the axes, in the units of what is drawn.

    Colours are keys of `NAMED`, whose shade in the SVG is the page's, or numbers for `colour`.
    """

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: tuple[str, str],
        ticks: Sequence[tuple[float, str]] | None = None,
        size: tuple[int, int] = (520, 340),
    ):
        self.title, self.size, self.x, self.y = title, size, x, y
        self.items: list[tuple] = []
        left, top, right, bottom = MARGINS
        self.low = np.array([left, size[1] - bottom], float)
        self.high = np.array([size[0] - right, top], float)
        for value in np.linspace(*y, 6):
            self._line([(x[0], value), (x[1], value)], "grid", 1)
            _, height = self._place([(x[0], value)])[0]
            self._text(left - 6, height, f"{value:.6g}", 12, "right")
        for value, text in ticks or [(v, f"{v:.6g}") for v in np.linspace(*x, 6)]:
            place, _ = self._place([(value, y[0])])[0]
            self._text(place, size[1] - bottom + 14, text, 12, "centre")
        self._text(left, 16, title, 15, "left", bold=True)
        self._text(size[0] - right, size[1] - 12, labels[0], 12, "right")
        self._text(left - 46, 34, labels[1], 12, "left")

    def line(
        self, points, tone: str | int, name: str = "", mark: str = "", dots: bool = False, width=2.0
    ) -> None:
        """A line through points [n, 2]; `mark` is an attribute of its SVG element, as text."""
        points = np.asarray(points, float).reshape(-1, 2)
        if len(points) > 1:
            self._line(points, tone, width, name, mark)
        if dots or len(points) == 1:
            for place in self._place(points):
                low, high = place - 3, place + 3
                self.items.append(("box", low, high, tone, name, mark))

    def bar(self, x1: float, x2: float, height: float, name: str) -> None:
        """A bar from the lowest y to `height`; `name` is told where the pointer rests on it."""
        (left, top), (right, bottom) = self._place([(x1, height), (x2, self.y[0])])
        self.items.append(("box", np.array([left + 1, top]), np.array([right - 1, bottom]), "bar",
                           name, ""))  # fmt: skip

    def note(self, x: float, y: float, text: str) -> None:
        """A text with its middle at a point."""
        self._text(*self._place([(x, y)])[0], text, 12, "centre")

    def legend(self, names: Sequence[tuple[str, str | int]]) -> None:
        """Names in their colours, from right to left under the title."""
        right = self.size[0] - MARGINS[2]
        for name, tone in reversed(names):
            name = name if len(name) <= 16 else name[:15] + "…"
            self._text(right, 34, name, 12, "right", tone)
            right -= 7.2 * len(name) + 12

    def svg(self) -> str:
        """An <svg> element that says its title, every text of it escaped."""
        width, height = self.size
        parts = [f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" '
                 f'aria-label="{escape(self.title)}">']  # fmt: skip
        for kind, *what in self.items:
            if kind == "text":
                x, y, text, size, align, tone, bold = what
                anchor = {"left": "start", "centre": "middle", "right": "end"}[align]
                weight = ' font-weight="600"' if bold else ""
                parts.append(f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" font-size="{size}" '
                             f'text-anchor="{anchor}"{weight} {_paint("fill", tone)}>'
                             f"{escape(text)}</text>")  # fmt: skip
                continue
            first, second, tone, name, mark = what
            title = f"<title>{escape(name)}</title>" if name else ""
            if kind == "line":
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in first)
                parts.append(f'<polyline points="{path}" fill="none" stroke-width="{second:g}" '
                             f'{_paint("stroke", tone)} {mark}>{title}</polyline>')  # fmt: skip
            else:
                (x, y), (w, h) = first, np.maximum(second - first, 0)
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" '
                             f'{_paint("fill", tone)} {mark}>{title}</rect>')  # fmt: skip
        return "".join([*parts, "</svg>"])

    def png(self) -> bytes:
        """The chart on white; accents are dropped, and what is then not ASCII is "?"."""
        canvas = Canvas(*self.size)
        for kind, *what in self.items:
            if kind == "text":
                x, y, text, size, align, tone, bold = what
                canvas.text(x, y, escaped(text), size, _bgr(tone), bold, align)
            elif kind == "line":
                points, width, tone, *_ = what
                canvas.line(points, _bgr(tone), width)
            else:
                (x1, y1), (x2, y2), tone, *_ = what
                canvas.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], _bgr(tone))
        return encode_png(canvas.reduced())

    def _place(self, points) -> np.ndarray:
        low, high = (np.array(pair) for pair in zip(self.x, self.y, strict=True))
        share = (np.asarray(points, float).clip(low, high) - low) / (high - low)
        return self.low + share * (self.high - self.low)

    def _line(self, points, tone, width, name="", mark="") -> None:
        self.items.append(("line", self._place(points), width, tone, name, mark))

    def _text(self, x, y, text, size, align, tone="ink", bold=False) -> None:
        self.items.append(("text", x, y, text, size, align, tone, bold))


def draw_matrix(matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """A PNG of a table of counts [n, m], each shaded by its share of its row."""
    cell, margin = max(16, min(64, 1400 // matrix.shape[1])), 130
    steps = -(-66 // cell)  # names of columns stand in so many rows
    canvas = Canvas(margin + cell * matrix.shape[1] + 40, 40 + cell * len(matrix) + 22 * steps)
    totals = matrix.sum(1, keepdims=True).clip(1)
    size = min(15, cell * 0.7)
    for n, name in enumerate(rows):
        y = 36 + (n + 0.5) * cell
        canvas.text(margin - 6, y, escaped(name), size, align="right", room=120)
        for m, (count, share) in enumerate(zip(matrix[n], matrix[n] / totals[n], strict=True)):
            x, y = margin + m * cell, 36 + n * cell
            shade = tuple(round(255 - share * (255 - c)) for c in _bgr("bar"))
            canvas.box(x, y, x + cell, y + cell, shade, _bgr("grid"), radius=0, thickness=1)
            if count:
                canvas.text(x + cell / 2, y + cell / 2, str(count), size, room=cell - 3)
    for m, name in enumerate(columns):
        y = 36 + cell * len(matrix) + (0.5 + m % steps) * 22
        canvas.text(margin + (m + 0.5) * cell, y, escaped(name), size, room=cell * steps - 2)
    canvas.text(6, 16, "rows: what is there; columns: what was found", 14, align="left")
    return encode_png(canvas.reduced())


def encode_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def _paint(what: str, tone: str | int) -> str:
    if tone in NAMED:
        return f'class="{what}-{tone}"'
    return f'{what}="#{"".join(f"{c:02x}" for c in colour(tone))}"'


def _bgr(tone: str | int) -> tuple[int, int, int]:
    return (NAMED[tone] if tone in NAMED else colour(tone))[::-1]
