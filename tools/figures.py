"""Charts of a report by matplotlib: SVG inside the page, PNG and CSV in a folder beside it."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import ImageFont

from inference.draw import escape as escape_glyphs
from tools.tables import Table
from utils.errors import UserError
from utils.files import atomic_write, csv_bytes

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator
except ImportError:  # told by `check_matplotlib`
    matplotlib = None

INK = "#262626"  # of texts and axes; in a page it becomes the colour of the page's text
# Okabe and Ito's colours, which everybody can tell apart, without the yellow, too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LARGEST = 40  # inches of a side of a chart's cells
MARKED = 20  # values of x up to which points are marked
STYLE = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "ssd-hardnet",  # the same chart has the same bytes
    "text.parse_math": False,  # a class name may have dollar signs
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "figure.constrained_layout.use": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "grid.alpha": 0.15,
    "legend.frameon": False, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
}


def check_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    if matplotlib is None:
        raise UserError("charts need matplotlib: pip install matplotlib")


class Folder:
    """The folder of a report's figures; its methods write files and return HTML."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, content: bytes) -> str:
        """Write a file; return a link to it."""
        with atomic_write(self.path / name) as file:
            file.write(content)
        return f'<a href="{quote(self.path.name)}/{name}">{name.rpartition(".")[2].upper()}</a>'

    def table(self, name: str, table: Table) -> str:
        """Write a CSV, its cells empty where a value is NaN; return a link to it."""
        rows = [
            [(f"{value:.6g}" if value == value else "") if isinstance(value, float) else value
             for value in row]
            for row in (table.head, *table.rows)
        ]  # fmt: skip
        return self.write(f"{name}.csv", csv_bytes(rows))

    def chart(self, name: str, figure: Figure, table: Table, classes: Sequence[str] = ()) -> str:
        """Write a chart as PNG and its table as CSV; return a <figure> with it and the links."""
        svg = as_svg(figure, name, classes)  # before the PNG, which escapes texts
        links = f"{self.table(name, table)} {self.write(f'{name}.png', as_png(figure))}"
        return f'<figure>{svg}<p class="files">{links}</p></figure>'


def as_png(figure: Figure) -> bytes:
    """Return the chart as a PNG on white; what its font lacks becomes an escape in the figure."""
    font = ImageFont.truetype(findfont("DejaVu Sans"))
    for text in figure.findobj(Text):
        text.set_text(escape_glyphs(text.get_text(), font))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_locator(), FixedLocator):  # its labels are made when drawn
            names = [escape_glyphs(label.get_text(), font) for label in axis.get_ticklabels()]
            axis.set_ticks(axis.get_ticklocs(), names)
    with matplotlib.rc_context(STYLE):
        figure.savefig(file := io.BytesIO(), format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def as_svg(figure: Figure, name: str, classes: Sequence[str] = ()) -> str:
    """Return the chart as an <svg> for a page, with its title as label and no background.

    The line of class number n is a <g data-class="n"> whose title is the class's name. Every id
    starts with ``name`` because several charts share a page.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has more fonts
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    title = escape(figure.axes[0].get_title(loc="left"))
    text = text.replace("<svg", f'<svg class="chart" role="img" aria-label="{title}"', 1)
    for n, label in enumerate(classes):
        mark = f'<g data-class="{n}"><title>{escape(label)}</title>'
        text = text.replace(f'<g id="class-{n}">', mark)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def has_points(table: Table) -> bool:
    """Return whether a table of lines has a point to draw."""
    return not all(math.isnan(row[2]) for row in table.rows)


def draw_lines(title: str, table: Table, classes: Sequence[str] = ()) -> Figure:
    """Draw a table of lines.

    A point whose y is NaN is left out; x may be texts. Beside lines of classes, another one is in
    bold ink.
    """
    lines: dict[str, list[tuple]] = {}
    for name, x, y, *_ in table.rows:
        if not math.isnan(y):
            lines.setdefault(name, []).append((x, y))
    places, count = [row[1] for row in table.rows], len(classes) or len(lines)
    colours = COLOURS
    if count > len(COLOURS):
        colours = matplotlib.colormaps["turbo"](np.linspace(0, 1, count))
    with matplotlib.rc_context({**STYLE, "axes.grid": True}):
        axes = Figure(figsize=(5.6, 3.7)).add_subplot(
            title=title, xlabel=table.head[1], ylabel=table.head[2]
        )
        axes.xaxis.update_units(places)  # texts in the table's order
        for k, (name, points) in enumerate(lines.items()):
            number = classes.index(name) if name in classes else k
            bold = bool(classes) and name not in classes
            axes.plot(*zip(*points, strict=True), color=INK if bold else colours[number],
                      linewidth=2.8 if bold else 1.6,
                      marker="o" if len(set(places)) <= MARKED else None, markersize=4,
                      clip_on=False, gid=f"class-{number}" if name in classes else None)
        if lines and len(classes) <= len(COLOURS):
            axes.legend(axes.lines, list(lines), fontsize="small")  # also names like "_a"
        axes.set_ylim(0, max([1, *(y for points in lines.values() for _, y in points)]))
    return axes.figure


def draw_matrix(title: str, table: Table) -> Figure:
    """Draw counts as cells shaded by their share of the row.

    The head of a table starts with "rows / columns", a row with its name. Row n is of class n.
    """
    (axes_names, *columns), rows = table.head, [row[0] for row in table.rows]
    matrix = np.array([row[1:] for row in table.rows])
    cell, font = (0.5, 9) if len(rows) <= 25 else (0.25, 5)
    legible = cell * len(rows) <= LARGEST
    cell = cell if legible else LARGEST / len(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + cell * len(columns), 1.6 + cell * len(rows)))
        ylabel, xlabel = axes_names.split(" / ")
        axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
        shares = matrix / matrix.sum(1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        for n, label in enumerate(axes.get_yticklabels()):
            label.set_gid(f"class-{n}")
        for n, m in zip(*matrix.nonzero(), strict=True) if legible else ():
            axes.text(m, n, str(matrix[n, m]), ha="center", va="center", fontsize=font,
                      color="black", gid=f"class-{n}")  # fmt: skip
    return figure
