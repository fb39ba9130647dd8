"""Write one HTML page: what a test got right and wrong, and where its errors come from.

    python -m tools.report RUN_DIR [--against RUN_DIR] [--root DIR] [--score 0.4] [--examples 6]
                           [--output PAGE.html]
    python -m tools.report RUN_DIR --accept accepted.json [--output DIR]

RUN_DIR is a folder with a test's results.json and detections.npz, or a run, whose newest test is
taken. With another test on the same images, the page says which one is better. The page is one
file, report.html, that needs neither a server nor a network; beside it, report_files/ has each
figure as PNG and CSV. Without the data set (--root) the page has the scores and the curves alone.
The charts need matplotlib. The second command adds objects accepted on the page to annotations.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from data.bootstrap import DRAWS
from data.image import limit_pixels
from data.judge import ERRORS, FOREGROUND
from inference.draw import resize
from tools.against import (
    Change,
    Moved,
    change_table,
    check_same,
    compare,
    draw_moved,
    lines,
    moved_images,
    moved_table,
    notes_against,
)
from tools.figures import INK, Folder, check_matplotlib, draw_lines, draw_matrix, has_points
from tools.mistakes import Mistake, data_url, draw_worst, list_mistakes
from tools.results import Results, Test, open_test, report_parser, score_again
from tools.tables import MEANING, NOTHING, Table, error_tables, score_tables, training_tables
from tools.unlabelled import merge, show_omissions
from utils.arguments import count
from utils.errors import command
from utils.files import atomic_write, write_errors_named

PAGE = Path(__file__).with_name("report.html")
CURVES = {
    "precision_recall": f"Precision over recall at IoU {FOREGROUND}",
    "ap_by_iou": "AP by the IoU that is needed", "ap_by_size": "AP by the size of objects",
    "calibration": "Calibration", "training_loss": "Training loss",
    "training_score": "Score on the test set while training",
}
"""Titles of the charts of tables of lines."""


def write_report(directory: Path, path: Path | None = None, root: str | None = None,
                 score: float = 0.4, examples: int = 6,
                 against: Sequence[Path] = ()) -> tuple[Path, tuple[str, ...]]:
    """Write the page of a test; return its path and the notes on it.

    directory: of a test, or of a run, whose newest test is taken. path: of the page; None:
    report.html in the test's folder; the figures go into ``figures_of(path)``. root: of the data
    set; None: where the test found it. score: least score of detections that count. examples:
    images of mistakes of each type and class. against: other tests on the same images; the first is
    compared, all add objects without annotation (at most 50 times `examples` are shown).

    UserError: no test there, no data set at ``root``, no matplotlib, or a file cannot be written.
    """
    check_matplotlib()
    test, others = open_test(directory, root), [open_test(each, root) for each in against]
    for each in others:
        check_same(test, each)
    test, other = score_again(test), score_again(others[0]) if others else None
    changes, notes = compare(test, other) if other else [], list(test.notes)
    path, results = path or test.directory / "report.html", test.results
    tables = score_tables(test, score) | training_tables(test.log)
    folder, names = _new_figures(path), results.classes
    parts = dict.fromkeys("classes against errors confusion gallery list omissions".split(), "")
    if "classes" in tables:
        parts["classes"] = _table(folder, "classes", tables["classes"], names)
    if test.judged:
        mistakes = list_mistakes(test.judged, score)
        tables |= error_tables(test.judged, results, test.dataset.ids, mistakes, score)
        drawn, more = draw_worst(mistakes, test.judged, test.dataset, examples)
        notes += more
        matrix = tables["confusion"]
        parts["errors"] = _table(folder, "errors", tables["errors"], text=2)
        parts["errors"] += _table(folder, "errors_by_class", tables["errors_by_class"], names)
        parts["confusion"] = folder.chart("confusion", draw_matrix("Confusion matrix", matrix),
                                          matrix, [row[0] for row in matrix.rows])  # fmt: skip
        parts["list"] = folder.table("mistakes", tables["mistakes"])
        parts["gallery"] = _gallery(test, mistakes, drawn)
        parts["omissions"], more = show_omissions(folder, [test, *others], score, 50 * examples)
        notes += more
    if other:
        moved = moved_images(test, other, score)
        pairs, more = draw_moved(test, other, moved, score, examples)
        notes += [*notes_against(test, other), *more]
        parts["against"] = _against(folder, test, other, changes, moved, pairs)
    curves, notes = _curves(folder, tables, names), [*dict.fromkeys(notes)]
    page = Template(PAGE.read_text("utf-8")).substitute(
        parts, heading=escape(_heading(test)),
        value=NOTHING if math.isnan(results.value) else f"{results.value:.4f}",
        metric=escape(_titled(results)),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
        options="".join(f'<option value="{n}">{escape(c)}</option>' for n, c in enumerate(names)),
        kinds="".join(f"<option>{kind}</option>" for kind in ERRORS), score=f"{score:g}",
        examples=examples, draws=DRAWS,
        curves="".join(chart for name, chart in curves.items() if "training" not in name),
        training="".join(chart for name, chart in curves.items() if "training" in name),
        facts=escape(json.dumps(results.values, indent=1, ensure_ascii=False)),
    )  # fmt: skip
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path, (*notes, *(lines(test, other, changes) if other else ()))


def figures_of(page: Path) -> Path:
    """Return the folder of a page's figures; one of the plain NAME may hold other things."""
    return page.with_name(f"{page.stem}_files")


def _new_figures(page: Path) -> Folder:
    """Return the folder of a page's figures; delete an earlier page, which shows other figures."""
    with write_errors_named(page):
        page.unlink(missing_ok=True)
    return Folder(figures_of(page))


def _heading(test: Test) -> str:
    checkpoint = test.results.values.get("checkpoint")
    file = checkpoint.get("file") if isinstance(checkpoint, dict) else None
    return f"{file or test.directory.parent.name} on {test.results.values['sets']}"


def _titled(results: Results) -> str:
    low, high = results.interval
    return results.metric + (f", 95 % interval {low:.4f} to {high:.4f}" if low == low else "")


def _table(folder: Folder, name: str, table: Table, classes: Sequence[str] = (),
           text: int = 1) -> str:
    """Return a table that can be sorted, its first `text` columns texts, and a link to its CSV.

    A row that is named as a class is marked for the filter, another one stays at the foot.
    """

    def cell(n: int, value: object) -> str:
        if n < text:
            return f'<td class="text">{escape(str(value))}</td>'
        if isinstance(value, str) or math.isnan(value):  # sorted last
            return f'<td data-value="">{escape(value) if isinstance(value, str) else ""}</td>'
        shown = f"{value:.3f}" if isinstance(value, float) else value
        return f'<td data-value="{value:.9g}">{shown}</td>'

    body, foot = "", ""
    for row in table.rows:
        cells = "".join(cell(n, value) for n, value in enumerate(row))
        if classes and row[0] not in classes:
            foot += f"<tr>{cells}</tr>"
        else:
            body += f'<tr data-class="{classes.index(row[0])}">' if classes else "<tr>"
            body += f"{cells}</tr>"
    head = "".join(f"<th><button>{escape(name)}</button></th>" for name in table.head)
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            f'<tfoot>{foot}</tfoot></table></div><p class="files">{folder.table(name, table)}</p>')


def _curves(folder: Folder, tables: Mapping[str, Table], classes: Sequence[str]) -> dict[str, str]:
    charts = {}
    for name in [name for name in CURVES if name in tables and has_points(tables[name])]:
        of = classes if tables[name].head[0] == "class" else ()
        chart = draw_lines(CURVES[name], tables[name], of)
        if name in ("precision_recall", "calibration"):
            chart.axes[0].set_xlim(0, 1)
        if name == "calibration":
            chart.axes[0].axline((0, 0), slope=1, linestyle=":", color=INK, linewidth=1)
        charts[name] = folder.chart(name, chart, tables[name], of)
    return charts


def _gallery(test: Test, mistakes: Sequence[Mistake],
             drawn: Sequence[tuple[Mistake, np.ndarray]]) -> str:
    parts = []
    for kind, meaning in MEANING.items():
        chosen = sorted((pair for pair in drawn if pair[0].kind == kind), key=lambda p: p[0].label)
        if chosen:
            images = "".join(_figure(test, mistake, image) for mistake, image in chosen)
            total = sum(mistake.kind == kind for mistake in mistakes)
            parts.append(f'<section data-kind="{kind}"><h3>{kind}</h3><p class="soft">{meaning}; '
                         f'{total} of all classes</p><div class="gallery">{images}</div></section>')
    return "".join(parts)


def _figure(test: Test, m: Mistake, image: np.ndarray) -> str:
    names = test.results.classes
    text = f"{names[m.label - 1]}, {m.kind}"
    if m.score is not None:
        text = f"{names[m.label - 1]} {m.score:.2f}"
        if m.object >= 0:
            other = names[test.judged.truth.labels[m.object] - 1]
            text += f", IoU {m.overlap:.2f} with {other}"
    return (f'<figure data-class="{m.label - 1}"><img alt="{escape(f"{m.kind}: {text}")}" '
            f'src="{data_url(image)}"><figcaption>{escape(text)}<br>'
            f"{escape(str(test.dataset.ids[m.image]))}</figcaption></figure>")  # fmt: skip


def _against(folder: Folder, a: Test, b: Test, changes: Sequence[Change], moved: Sequence[Moved],
             drawn: Sequence[tuple[Moved, list[np.ndarray]]]) -> str:
    """Return the comparison of two tests: their scores, and images with the detections of both."""
    table = _table(folder, "against", change_table(changes), a.results.classes)
    names = "".join(f"<li>{name}: {escape(f'{_heading(test)} ({test.directory})')}</li>"
                    for name, test in (("A", a), ("B", b)))  # fmt: skip
    ids, figures = a.dataset.ids, ""
    for m, images in drawn:
        name = str(ids[m.image])
        said = ["{}: {} right, {} wrong, {} missed".format(test, *counts)
                for test, counts in (("A", m.a), ("B", m.b))]  # fmt: skip
        pixels = "".join(f'<img alt="{escape(f"{name}, {text}")}" '
                         f'src="{data_url(resize(image, min(1, 440 / max(image.shape))))}">'
                         for text, image in zip(said, images, strict=True))  # fmt: skip
        text = "<br>".join(map(escape, (name, *said)))
        figures += f'<figure class="pair">{pixels}<figcaption>{text}</figcaption></figure>'
    files = folder.table("against_images", moved_table(moved, ids))
    return (f"<ul>{names}</ul>{table}<p>{len(moved)} of {len(ids)} images have another number of "
            f'errors: {files}</p><div class="gallery">{figures}</div>')


@command
def main(argv: list[str] | None = None) -> int:
    p = report_parser("python -m tools.report", __doc__)
    p.add_argument("--against", type=Path, metavar="RUN_DIR", action="append",
                   help="another test on the same images, to compare with; further ones only add "
                   "objects without annotation")
    p.add_argument("--accept", type=Path, metavar="JSON",
                   help="write no page, but annotations with the objects that a page has saved")
    p.add_argument("--examples", type=count, metavar="N",
                   help="images of mistakes of each type and class (6); the page shows up to 50 N "
                   "objects without annotation")
    p.add_argument("--output", type=Path, metavar="PAGE.html",
                   help="the page (default: report.html in the test's folder), or the folder of "
                   "--accept (default: annotations in the test's folder)")
    p.set_defaults(score=None)  # as of write_report
    args = p.parse_args(argv)
    limit_pixels(args.max_pixels)
    given = {name: value for name in ("score", "examples", "against")
             if (value := getattr(args, name)) is not None}  # fmt: skip
    if args.accept:
        if given:
            p.error(f"--{min(given)} is for a page; leave it out, or leave out --accept")
        test = open_test(args.directory, args.root)
        print(merge(test, args.accept, args.output or test.directory / "annotations"))
        return 0
    if args.output and not re.fullmatch(r"\.html?", args.output.suffix):
        p.error(f"--output {args.output}: the page's name must end in .html")
    path, notes = write_report(args.directory, args.output, args.root, **given)
    print(*notes, f"{path}, and the figures in {figures_of(path)}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
