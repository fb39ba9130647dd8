"""Write one HTML page: what a test got right and wrong, and where its errors come from.

    python -m tools.report RUN_DIR [--root DIR] [--score 0.4] [--examples 6] [--output PAGE.html]

RUN_DIR is a folder with a test's results.json and detections.npz, or a run, whose newest test is
taken. The page is one file, report.html, that needs neither a server nor a network; beside it,
report/ has each figure as PNG and CSV. Without the data set (--root) the page has the scores and
the curves alone. The charts need matplotlib.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import cv2
import numpy as np

from data.judge import ERRORS, FOREGROUND
from data.voc_eval import METRICS
from inference.draw import contact_sheet
from tools.figures import Folder, check_matplotlib, draw_lines, draw_matrix
from tools.mistakes import SIDE, Gallery, Mistake, as_jpeg, make_gallery
from tools.results import Test
from tools.tables import (
    MEANING,
    NOTHING,
    Study,
    Table,
    error_tables,
    score_tables,
    study,
    training_tables,
)
from utils.arguments import Parser, count, fraction
from utils.errors import command
from utils.files import atomic_write

PAGE = Path(__file__).with_name("report.html")


class Curves(NamedTuple):
    """A chart of a tidy table: its title, the columns of x and y, and the ends of the x axis."""

    title: str
    x: str
    y: str
    ends: tuple[float, float] | None = (0, 1)
    diagonal: bool = False


CURVES = {
    "precision_recall": Curves(f"Precision over recall at IoU {FOREGROUND}", "recall", "precision"),
    "ap_by_iou": Curves("AP by the IoU that is needed", "IoU", "AP", (0.5, 0.95)),
    "ap_by_size": Curves("AP by the size of objects", "size", "AP", (-0.5, 2.5)),
    "calibration": Curves("Calibration", "score", "correct", diagonal=True),
    "training_loss": Curves("Training loss", "epoch", "loss", None),
    "training_score": Curves("Score on the test set while training", "epoch", "AP", None),
}


def draw_curves(folder: Folder, tables: Mapping[str, Table], classes: Sequence[str]) -> str:
    """Return the charts of the tables that `CURVES` has."""
    parts = []
    for name, (title, x, y, ends, diagonal) in CURVES.items():
        if table := tables.get(name):
            of = classes if table.head[0] == "class" else ()
            chart = draw_lines(title, table, x, y, of, ends, diagonal)
            parts.append(folder.chart(name, chart, table, of))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def scores_section(folder: Folder, of: Study) -> str:
    """Return the table of classes, and the curves."""
    tables, out = score_tables(of), ""
    if table := tables.get("classes"):
        about = ""
        if of.judged:
            about = (" Correct, wrong, not found, precision and recall are of detections with a "
                     f"score of {of.score:g} or more, at IoU {FOREGROUND}. The best F1 is at the "
                     "score beside it.")  # fmt: skip
        out = f"""<h2>Classes</h2>
<p>AP by class, by size of object, and by the IoU that a correct detection needs.{about} Empty:
{NOTHING}.</p>
<div class="scroll">{_table(table, of.classes)}</div>
<p class="files">{folder.table("classes", table)}</p>"""
    if charts := draw_curves(folder, tables, of.classes):
        out += f"""<h2>Curves</h2>
<p>Small objects have up to 32² pixels, large ones 96² or more. Calibration is of all detections of
the test at IoU {FOREGROUND}: of the detections with some score, that share should be correct (the
diagonal). The calibration error is the mean distance from it.</p>
{charts}"""
    return out


def errors_section(folder: Folder, of: Study, tables: Mapping[str, Table]) -> str:
    """Return the types of errors, and the confusion matrix."""
    errors, each, matrix = (tables[key] for key in ("errors", "errors_by_class", "confusion"))
    confusion = draw_matrix("Confusion matrix", matrix)
    rows = [row[0] for row in matrix.rows]
    return f"""<h2>Types of errors</h2>
<p>A detection is correct from an IoU of {FOREGROUND} on (in VOC layout: over it). The others are
sorted by <a href="https://arxiv.org/abs/2008.08115">TIDE's definitions</a>; if two fit, the first
of localisation, class, duplicate, both. Counts are of detections with a score of {of.score:g} or
more, for the class that they claim. The rise is that of AP at IoU {FOREGROUND}, mean over the
classes with objects, if the errors of this type alone were put right, whatever their score: it
tells what is worth working on.</p>
<div class="scroll">{_table(errors, text=2)}</div>
<p class="files">{folder.table("errors", errors)}</p>
<div class="scroll">{_table(each, of.classes)}</div>
<p class="files">{folder.table("errors_by_class", each)}</p>
<h2>Confusion matrix</h2>
<p>Of detections with a score of {of.score:g} or more, at IoU {FOREGROUND}. The diagonal counts the
correct ones. Each other detection, best first, takes the object of another class that it overlaps
most and that is left. Rows are annotated classes, columns detected ones; the shade is the share of
the row.</p>
<div class="scroll">{folder.chart("confusion", confusion, matrix, rows)}</div>"""


def gallery_section(
    folder: Folder, of: Study, gallery: Gallery, table: Table, examples: int
) -> str:
    """Return the mistakes that are shown, by type."""
    parts = [f"""<h2>The worst mistakes</h2>
<p>At most {examples} of each type and class: the detections with the highest scores, the largest
missed objects. <span class="true">Green</span>: the object. <span class="wrong">Red</span>,
thinner: the detection. All mistakes with a score of {of.score:g} or more:
{folder.table("mistakes", table)}</p>"""]
    for kind, meaning in MEANING.items():
        chosen = [pair for pair in gallery.shown if pair[0].kind == kind]
        if not chosen:
            continue
        sheet = contact_sheet([image for _, image in chosen[:24]], 6, (SIDE, SIDE))
        png = folder.write(f"mistakes_{kind}.png", cv2.imencode(".png", sheet)[1].tobytes())
        total = sum(mistake.kind == kind for mistake in gallery.mistakes)
        chosen = sorted(chosen, key=lambda pair: pair[0].label)
        images = "".join(_shown(of, mistake, image) for mistake, image in chosen)
        parts.append(f'<section data-kind="{kind}"><h3>{kind}</h3><p class="soft">{escape(meaning)}'
                     f'; {total} of all classes. {png}</p><div class="gallery">{images}</div>'
                     "</section>")  # fmt: skip
    return "".join(parts)


def _shown(of: Study, m: Mistake, image: np.ndarray) -> str:
    name, where = of.classes[m.label - 1], str(of.test.dataset.ids[m.image])
    text = f"{name}, {m.kind}" if m.score is None else f"{name} {m.score:.2f}"
    if m.score is not None and m.object >= 0:
        label = of.judged.truth.labels[m.object]
        text += f", IoU {m.overlap:.2f} with {of.classes[label - 1]}"
    return (f'<figure data-class="{m.label - 1}"><img alt="{escape(f"{m.kind}: {text}")}" '
            f'decoding="async" src="data:image/jpeg;base64,{as_jpeg(image)}">'
            f"<figcaption>{escape(text)}<br>{escape(where)}</figcaption></figure>")  # fmt: skip


# ---------------------------------------------------------------- the page


def write_report(
    directory: Path,
    path: Path | None = None,
    root: str | None = None,
    score: float = 0.4,
    examples: int = 6,
) -> tuple[Path, tuple[str, ...]]:
    """Write the page of a test; return its path and the notes on it.

    Args:
        directory: of a test, or of a run, whose newest test is taken.
        path: of the page; None: report.html in the test's folder. The figures go into
            ``figures_of(path)``.
        root: of the data set; None: where the test found it.
        score: least score of the detections that are counted and shown as mistakes.
        examples: number of images of mistakes of each type and class.

    Raises:
        UserError: no test there, no data set at ``root``, no matplotlib, or a file that cannot be
            written.
    """
    check_matplotlib()
    of = study(directory, root, score)
    path = path or of.test.directory / "report.html"
    folder, notes = Folder(figures_of(path)), of.notes
    sections = [scores_section(folder, of)]
    if of.judged:
        gallery = make_gallery(of.judged, of.test.dataset, score, examples)
        notes += gallery.notes
        tables = error_tables(of, gallery.mistakes)
        sections.append(errors_section(folder, of, tables))
        sections.append(gallery_section(folder, of, gallery, tables["mistakes"], examples))
    if charts := draw_curves(folder, training_tables(of), of.classes):
        sections.append(f"<h2>Training</h2>{charts}")
    sections.append(_facts(of.test))
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    page = Template(PAGE.read_text("utf-8")).substitute(
        title=escape(f"{_heading(of.test)}: {of.results.metric}"),
        heading=escape(_heading(of.test)),
        value=NOTHING if math.isnan(of.results.value) else f"{of.results.value:.4f}",
        metric=escape(of.results.metric),
        notes=f'<ul class="notes">{items}</ul>' if notes else "",
        options="".join(f'<option value="{n}">{escape(name)}</option>'
                        for n, name in enumerate(of.classes)),
        kinds="".join(f"<option>{kind}</option>" for kind in ERRORS),
        body="\n".join(sections),
    )  # fmt: skip
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path, notes


def figures_of(page: Path) -> Path:
    """Return the folder of a page's figures: report/ of report.html, NAME_files/ of NAME.html.

    A folder of the plain NAME may hold other things.
    """
    return page.with_name(page.stem if page.name == "report.html" else f"{page.stem}_files")


def _heading(test: Test) -> str:
    checkpoint = test.results.values.get("checkpoint")
    file = checkpoint.get("file") if isinstance(checkpoint, dict) else None
    return f"{file or test.directory.parent.name} on {test.results.sets}"


def _facts(test: Test) -> str:
    """Return what results.json says besides the scores."""
    left_out = {"per_class", "per_class_per_size", "per_size", "notes", "classes", "ground_truths",
                "detections", "stats", *METRICS}  # fmt: skip
    facts = {key: value for key, value in test.results.values.items() if key not in left_out}
    text = json.dumps({"folder": str(test.directory), **facts}, indent=1, ensure_ascii=False)
    return f"<h2>The test</h2><pre>{escape(text)}</pre>"


def _table(table: Table, classes: Sequence[str] = (), text: int = 1) -> str:
    """Return a sortable table; its first `text` columns are texts.

    A row that is named as a class is marked for the filter, another one stays at the foot.
    """

    def cell(n: int, value: object) -> str:
        if n < text:
            return f'<td class="text">{escape(str(value))}</td>'
        if isinstance(value, str) or math.isnan(value):  # sorted last
            return f'<td data-value="">{escape(value) if isinstance(value, str) else ""}</td>'
        shown = f"{value:.3f}" if isinstance(value, float) else value
        return f'<td data-value="{value:.9g}">{shown}</td>'

    body, foot = [], []
    for row in table.rows:
        cells = "".join(cell(n, value) for n, value in enumerate(row))
        if classes and row[0] not in classes:
            foot.append(f"<tr>{cells}</tr>")
        else:
            of = f' data-class="{classes.index(row[0])}"' if classes else ""
            body.append(f"<tr{of}>{cells}</tr>")
    head = "".join(f'<th scope="col"{" class=text" if n < text else ""}>{escape(name)}</th>'
                   for n, name in enumerate(table.head))  # fmt: skip
    return (f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
            f'<tfoot>{"".join(foot)}</tfoot></table>')  # fmt: skip


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m tools.report", description=__doc__.splitlines()[0])
    p.add_argument("directory", type=Path, metavar="RUN_DIR", help="a run, or a test's results")
    p.add_argument("--root", help="the data set, if it is no longer where the test found it")
    p.add_argument("--score", type=fraction, default=0.4, metavar="X",
                   help="least score of the detections that are counted (0.4)")  # fmt: skip
    p.add_argument("--examples", type=count, default=6, metavar="N",
                   help="images of mistakes of each type and class (6)")  # fmt: skip
    p.add_argument("--output", type=Path, metavar="PAGE.html",
                   help="the page (default: report.html in the test's folder)")  # fmt: skip
    args = p.parse_args(argv)
    if args.output and not re.fullmatch(r"\.html?", args.output.suffix):
        p.error(f"--output {args.output}: the page's name must end in .html")
    path, notes = write_report(args.directory, args.output, args.root, args.score, args.examples)
    for note in notes:
        print(note)
    print(f"{path}, and the figures in {figures_of(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
