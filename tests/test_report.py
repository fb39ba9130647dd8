"""The report of a test: its numbers against the data sets' scorers, its page in a parser."""

import csv
import json
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from conftest import write_voc
from voc_found import score

from data.coco import COCODetection
from data.detections import save_detections
from data.judge import ERRORS
from data.voc0712 import VOCDetection
from data.voc_comp4 import read_comp4
from data.voc_eval import METRICS
from inference.draw import GREEN, RED
from tools import figures, mistakes, report
from tools.results import Results, open_test, score_again
from tools.tables import MEAN, NOTHING, Table
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
NASTY = '<script>alert("x")</script>&'
NAMES = ["Zelle é", '&lt;script>alert("x")&lt;/script>&amp;', "bolt"]  # as in XML
VOID = {"meta", "img", "br", "input", "path", "use", "image"}
EMPTY = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}


class Page(HTMLParser):
    """Elements as [tag, attributes, text]; refuses tags that do not close each other."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.stack = [], []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.stack.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        for element in self.stack:
            element[2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


def write_results(folder, dataset, detections, kind, sets):
    """Leave in `folder` what a test leaves, without a network."""
    origin = {"checkpoint": {"file": "net.pth", "sha256": "0"}, "dataset": kind,
              "root": str(dataset.root), "sets": sets, "overfit": 0,
              "classes": list(dataset.classes), "thresholds": {"score": 0.01}}  # fmt: skip
    save_detections(folder / "detections.npz", dataset.ids, detections, origin)
    results = {**dataset.evaluate(detections, folder), **origin, "images": len(dataset)}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def scatter(dataset, seed=0):
    """Detections near the truth, some of them far off, of another class or of nothing."""
    rng, detections = np.random.default_rng(seed), []
    for i in range(len(dataset)):
        target = np.repeat(dataset.target(i), 3, axis=0)
        sides = target[:, 2:4] - target[:, :2]
        boxes = target[:, :4] + rng.normal(0, 0.12, (len(target), 4)) * np.tile(sides, 2)
        boxes = np.vstack([boxes, [(1, 1, 12, 12)]])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        other = rng.integers(1, len(dataset.classes) + 1, len(boxes))
        labels = np.where(rng.random(len(boxes)) < 0.8, [*target[:, 4], 1], other)
        detections.append({"boxes": boxes.astype(np.float32), "labels": labels.astype(np.int64),
                           "scores": rng.random(len(boxes)).astype(np.float32)})  # fmt: skip
    return detections


def random_samples(seed, images, names, difficult=0.0):
    """What `write_voc` takes: in each image an object of each name, some of them difficult."""
    rng, samples = np.random.default_rng(seed), {}
    for i in range(images):
        starts = rng.integers(1, (60, 36), (len(names), 2))
        ends = starts + rng.integers(15, 35, starts.shape)
        samples[f"p{i:02}"] = [(name, tuple(box), bool(rng.random() < difficult)) for name, box
                               in zip(names, np.hstack([starts, ends]).tolist(), strict=True)]
    return samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the results of a run's newest test, whose page is written at a score of 0.3, its data set).

    Three classes, one with an unpleasant name, and difficult objects; a log, and another test.
    """
    folder = tmp_path_factory.mktemp("report")
    samples = random_samples(1, 12, NAMES, 0.15)
    dataset = VOCDetection(write_voc(folder / "data", {"test": samples}), [(None, "test")])
    records = [{"epoch": e, "step": 5 * e, "lr": 0.1, "loss_loc": 1.0, "loss_conf": 3 / e}
               for e in (1, 2, 3)]  # fmt: skip
    for record, value in zip(records[1:], (0.25, 0.5), strict=True):
        record |= {"value": value, "per_class": dict.fromkeys(dataset.classes, value)}
    log = "".join(json.dumps(r) + "\n" for r in [*records, {"step": 16, "value": 0.7}])
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text(log)
    for age, name in enumerate(("Final", "epoch_1")):
        results = folder / "run" / "ss_predict" / name / "test"
        write_results(results, dataset, scatter(dataset, age), "VOC", "test")
        os.utime(results / "results.json", (1e9 - age, 1e9 - age))
    results = folder / "run" / "ss_predict" / "Final" / "test"
    path, notes = report.write_report(results, score=0.3)
    assert path == results / "report.html" and notes == ()
    return results, dataset


@pytest.fixture
def results(made, tmp_path):
    """A copy of the results and their data, to change."""
    shutil.copytree(made[0].parents[3], tmp_path / "report")
    folder = tmp_path / "report" / "run" / "ss_predict" / "Final" / "test"
    change(folder, root=str(tmp_path / "report" / "data"))
    return folder


@pytest.fixture
def coco(tmp_path, coco_folder):
    dataset = COCODetection(coco_folder, [("2017", "val")])
    return write_results(tmp_path / "out", dataset, scatter(dataset, 3), "COCO", "2017_val")


def change(folder, **values):
    """Change values of results.json; returns what it was."""
    path = folder / "results.json"
    said, times = json.loads(path.read_text()), path.stat()
    path.write_text(json.dumps({**said, **values}))
    os.utime(path, (times.st_atime, times.st_mtime))
    return said


def table(folder, name):
    with open(folder / "report_files" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def read(folder, root=None):
    return score_again(open_test(folder, root))


# ---------------------------------------------------------------- the page


def test_the_page_is_whole_and_needs_nothing_from_outside(made):
    results, dataset = made
    page, text = Page(results / "report.html"), (results / "report.html").read_text("utf-8")
    assert NASTY in dataset.classes and len(page.all("script")) == 1  # the class name is text
    assert [text for _, text in page.all("option")][1:4] == list(dataset.classes)
    links = {attributes["href"] for attributes, _ in page.all("a")}
    outside = {"https://arxiv.org/abs/2008.08115"}
    written = {str(p.relative_to(results)) for p in (results / "report_files").iterdir()}
    charts = {"ap_by_iou", "ap_by_size", "calibration", "confusion", "precision_recall",
              "training_loss", "training_score"}  # fmt: skip
    tables = charts | {"classes", "errors", "errors_by_class", "mistakes", "unlabelled"}
    wanted = {f"report_files/{name}.png" for name in charts}
    assert wanted | {f"report_files/{name}.csv" for name in tables} == written == links - outside
    images = [attributes for attributes, _ in page.all("img")]
    assert images and all(a["src"].startswith("data:image/jpeg;base64,") for a in images)
    assert all(attributes["alt"] for attributes in images)
    assert not page.all("link") and not re.findall(r"url\((?!#)", text)
    (policy,) = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"\bnan\b", re.sub(r"base64,\S+", "", text), re.IGNORECASE)
    assert [a["data-kind"] for a, _ in page.all("section")] == list(ERRORS)


def test_every_chart_has_its_classes_an_image_and_a_table(made):
    results, dataset = made
    page = Page(results / "report.html")
    charts = [attributes["aria-label"] for attributes, _ in page.all("svg")]
    assert len(charts) == 7 and all(charts)
    for number, name in enumerate(dataset.classes):
        marked = [text for a, text in page.all("g") if a.get("data-class") == str(number)]
        # five charts have a line of the class, the matrix a row of texts
        assert sum(text.strip() == name for text in marked) >= 5
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for path in (results / "report_files").glob("*.png"):
        image = cv2.imread(str(path))
        assert min(image.shape[:2]) > 60 and image.std() > 5, path
    for name, line, y, values in (("training_loss", "loss", "loss", [4, 2.5, 2]),
                                  ("training_score", MEAN, "AP", [0.25, 0.5])):  # fmt: skip
        assert [float(r[y]) for r in table(results, name) if line in r.values()] == values


def test_charts_are_the_same_every_time_and_draw_any_name():
    names = ["$x_", "_a", "猫 <b>"]
    rows = [(name, x, x / 2) for name in [*names, MEAN] for x in (0.0, 1.0)]
    rows.append(("_a", 0.5, float("nan")))
    svg, png = [], []
    for _ in range(2):
        chart = figures.draw_lines("A & B", Table(("class", "x", "y"), rows), names)
        svg.append(figures.as_svg(chart, "name", names))
        png.append(figures.as_png(chart))
    assert svg[0] == svg[1] and png[0] == png[1]
    assert 'aria-label="A &amp; B"' in svg[0]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg[0])
    assert {"$x_", "_a", "猫 &lt;b&gt;", MEAN} <= set(texts)
    for number, name in enumerate(names):
        mark = f'<g data-class="{number}"><title>{escape(name)}</title>'
        assert svg[0].count(mark) == 1


@pytest.mark.filterwarnings("error")
def test_a_matrix_of_many_classes_stays_small_and_draws_any_name():
    names = ["猫", *(f"class {n}" for n in range(299))]
    rows = [(name, *range(300)) for name in names]
    chart = figures.draw_matrix("counts", Table(("object / detected", *names), rows))
    assert max(chart.get_size_inches()) < 50 and len(chart.axes[0].texts) == 0
    small = Table(("object / detected", *names[:2]), [("猫", 3, 1), ("b", 0, 2)])
    chart = figures.draw_matrix("counts", small)
    assert "猫" in figures.as_svg(chart, "counts") and len(chart.axes[0].texts) == 3
    figures.as_png(chart)
    labels = chart.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [r"\u732b", "class 0"]
    assert labels[0].get_rotation() == 90


def test_without_matplotlib_a_sentence_says_so(made, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.write_report(made[0], tmp_path / "page.html")


def test_no_earlier_page_stays_beside_new_figures(results, monkeypatch):
    page, write, pages = results / "report.html", figures.Folder.write, []

    def ended(folder, *arguments):
        pages.append(page.exists())
        write(folder, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.Folder, "write", ended)
    assert page.exists() and report.main([str(results)]) == 130
    assert pages == [False] and not page.exists()


def test_the_page_goes_where_asked(results, tmp_path, capsys):
    change(results, notes=["0 ground truths of class <x>"], root=str(tmp_path / "nowhere"))
    (results / "report.html").unlink()
    page = tmp_path / "blood#.html"
    assert report.main([str(results.parents[2]), "--output", str(page), "--examples", "0"]) == 0
    out = capsys.readouterr().out
    assert f"{results} is the newest of 2 tests" in out and str(page) in out
    assert "0 ground truths of class <x>" in out and "class &lt;x&gt;" in page.read_text()
    assert not (results / "report.html").exists() and not Page(page).all("img")
    links = [a["href"] for a, _ in Page(page).all("a") if not a["href"].startswith("http")]
    assert links[0].startswith("blood%23_files/")
    assert all((page.parent / unquote(link)).is_file() for link in links)


def test_page_of_the_documentation_names_every_option(capsys):
    text = (ROOT / "docs" / "reading_a_report.md").read_text("utf-8")
    with pytest.raises(SystemExit):
        report.main(["--help"])
    words = capsys.readouterr().out.split()
    options = {word for word in words if word.startswith("--")} - {"--help"}
    assert len(options) == 7 and all(f"`{option}" in text for option in options)
    assert all(f"| {kind} |" in text for kind in ERRORS)


# ---------------------------------------------------------------- numbers


def test_ap_is_that_of_the_evaluator(made):
    (results, dataset), said = made, json.loads((made[0] / "results.json").read_text())
    names = dataset.classes
    by_iou = {(row["class"], row["IoU"]): row["AP"] for row in table(results, "ap_by_iou")}
    assert len(by_iou) == 40
    read, _ = read_comp4(results, "test", names, dataset.ids)
    for iou in ("0.5", "0.75", "0.95"):
        result = score(read, dataset.annotations, names, float(iou))["area"]
        for name, ap in [*result["per_class"].items(), (MEAN, result["mean"])]:
            assert float(by_iou[name, iou]) == pytest.approx(ap, rel=1e-5)
    rows = {row["class"]: row for row in table(results, "classes")}
    title = METRICS["area"]
    assert float(rows[MEAN][title]) == pytest.approx(said["value"], rel=1e-5)
    for name in names:
        assert float(rows[name][title]) == pytest.approx(said["per_class"][name], rel=1e-5)
        for size, ap in said["per_class_per_size"][name].items():
            shown = rows[name][f"AP {size}"]
            assert shown == "" if ap < 0 else float(shown) == pytest.approx(ap, rel=1e-5)


def test_counts_of_all_tables_agree(made):
    folder, names = made[0], made[1].classes
    rows = {row["class"]: row for row in table(folder, "classes")}
    counts = [[int(rows[name][key]) for key in ("objects", "correct", "wrong", "not found")]
              for name in (*names, MEAN)]  # fmt: skip
    assert np.sum(counts[:3], 0).tolist() == counts[3] and np.min(counts[3]) > 0
    truth = made[1].truth()
    assert counts[3][0] == (~truth.ignored).sum() == counts[3][1] + counts[3][3]
    matrix = list(csv.reader(open(folder / "report_files" / "confusion.csv")))
    assert [int(matrix[n + 1][n + 1]) for n in range(3)] == [row[1] for row in counts[:3]]
    errors = {row["type"]: int(row["errors"]) for row in table(folder, "errors")}
    each = table(folder, "errors_by_class")
    assert errors == {kind: sum(int(row[kind]) for row in each) for kind in errors}
    assert sum(errors.values()) - errors["missed"] == counts[3][2]
    assert len(table(folder, "mistakes")) == sum(errors.values())


def test_coco_numbers_are_those_of_its_score(coco):
    said = json.loads((coco / "results.json").read_text())
    _, notes = report.write_report(coco, score=0.1, examples=0)
    assert notes == ()
    rows = {row["class"]: row for row in table(coco, "classes")}
    assert float(rows[MEAN]["COCO AP"]) == pytest.approx(said["value"], rel=1e-5)
    for key, stat in (("AP at 0.5", 1), ("AP at 0.75", 2), ("AP medium", 4)):
        assert float(rows[MEAN][key]) == pytest.approx(said["stats"][stat], rel=1e-5)
    assert rows[MEAN]["AP large"] == "" and said["stats"][5] == -1
    for name, ap in said["per_class"].items():
        assert float(rows[name]["COCO AP"]) == pytest.approx(ap, rel=1e-5)


def test_a_class_without_objects_has_nothing_to_score(tmp_path, make_voc):
    root = make_voc(tmp_path / "data", {"test": {"one": [("a", (11, 11, 40, 40))]}})
    dataset = VOCDetection(root, [(None, "test")], classes=("a", "b"))
    found = {"boxes": np.float32([(10, 10, 39, 39)]), "scores": [0.9], "labels": [1]}
    folder = write_results(tmp_path / "out", dataset, [found], "VOC", "test")
    path, notes = report.write_report(folder)
    assert len(notes) == 1 and notes[0].endswith(" b")
    rows = {row["class"]: row for row in table(folder, "classes")}
    assert [rows[name][METRICS["area"]] for name in ("a", "b", MEAN)] == ["1", NOTHING, "1"]
    assert rows[MEAN]["AP at 0.5"] == "1"
    assert f'<td data-value="">{NOTHING}</td>' in path.read_text()
    # The page is of the annotations as they are now, and so are its notes.
    make_voc(root, {"test": {"one": [("b", (11, 11, 40, 40))]}})
    _, notes = report.write_report(folder)
    assert notes[0] == "0 detections for class b: its AP is 0" and notes[1].endswith(" a")
    assert "as they are now" in notes[2] and len(notes) == 3


def test_no_detections_at_all_make_a_page(made, tmp_path):
    folder = write_results(tmp_path / "out", made[1], [EMPTY] * 12, "VOC", "test")
    path, notes = report.write_report(folder, examples=1)
    assert len(notes) == 3 and all("0 detections for class" in note for note in notes)
    assert [a["data-kind"] for a, _ in Page(path).all("section")] == ["missed"]


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_split_and_crowds_alone_have_nothing_to_score(name, tmp_path, coco_folder):
    path = coco_folder / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    if name == "test":
        document["annotations"] = []
        path = path.with_name("image_info_test2017.json")
        (coco_folder / "val2017").rename(coco_folder / "test2017")
    path.write_text(json.dumps(document))
    dataset = COCODetection(coco_folder, [("2017", name)])
    found = [EMPTY] * 2 if name == "test" else scatter(dataset)
    folder = write_results(tmp_path / "out", dataset, found, "COCO", f"2017_{name}")
    if name == "val":
        assert json.loads((folder / "results.json").read_text())["value"] == -1
    path, notes = report.write_report(folder)
    assert any("no ground truth" in note for note in notes)
    text = path.read_text()
    assert f'<span class="value">{NOTHING}</span>' in text and Page(path)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE) and "<svg" not in text


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_listed_and_shown(tmp_path, make_voc):
    root = make_voc(tmp_path / "data", {"test": {
        "one": [("a", (11, 11, 40, 40)), ("b", (60, 20, 90, 60))], "two": [("a", (1, 1, 80, 60))],
    }})  # fmt: skip
    dataset = VOCDetection(root, [(None, "test")])

    rows = [
        [(10, 10, 39, 39, 1, 0.9), (10, 10, 38, 38, 1, 0.8), (59, 19, 89, 59, 1, 0.7),
         (59, 19, 89, 59, 2, 0.3)],
        [(60, 50, 79, 70, 2, 0.6), (0, 66, 9, 71, 2, 0.5)],
    ]  # fmt: skip
    detections = [{"boxes": found[:, :4], "labels": found[:, 4], "scores": found[:, 5]}
                  for found in map(np.array, rows)]  # fmt: skip
    folder = write_results(tmp_path / "out", dataset, detections, "VOC", "test")
    path, _ = report.write_report(folder)
    rows = table(folder, "mistakes")
    seen = [(row["type"], row["class"], row["image"], row["object"]) for row in rows]
    assert seen == [
        ("duplicate", "a", "one", "a"),
        ("class", "a", "one", "b"),  # the object is missed, too, but this tells of it
        ("background", "b", "two", ""),  # 0.6: IoU 0.04 with the object
        ("background", "b", "two", ""), ("missed", "a", "two", "a"),
    ]
    assert [float(row["IoU"] or 0) for row in rows[:2]] == pytest.approx([29**2 / 30**2, 1])
    captions = [text for _, text in Page(path).all("figcaption")]
    assert "a 0.80, IoU 0.93 with aone" in captions and "a, missedtwo" in captions


def test_a_mistake_is_drawn_around_its_boxes():
    image = np.full((300, 400, 3), 128, np.uint8)
    truth, box = np.array([(100, 100, 160, 160), (120, 90, 170, 150)], float)
    # 70 pixels wide and 28 around: 126 pixels in all
    green = np.argwhere((mistakes.draw_mistake(image, truth, box) == GREEN).all(2))[:, 1]
    assert green.min() == pytest.approx(28 * mistakes.SIDE / 126, abs=4)
    for corners in (box, (0, 0, 400, 300), (390, 290, 400, 300), (-20, -20, 3, 3)):
        drawn = mistakes.draw_mistake(image, None, np.array(corners, float))
        assert max(drawn.shape) == mistakes.SIDE and (drawn == RED).all(2).any()
    assert (image == 128).all()


def test_images_are_bounded_and_damaged_ones_told(results, monkeypatch):
    for path in (results.parents[3] / "data" / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:-20] if path.stem == "p03" else path.read_bytes())
    test = open_test(results, None)
    found = mistakes.list_mistakes(test.judged, 0)
    whole, (note,) = mistakes.draw_worst(found, test.judged, test.dataset, 6)
    assert "p03.jpg" in note and 3 < len(whole) < len(found)
    monkeypatch.setattr(mistakes, "MOST", 3)
    part, notes = mistakes.draw_worst(found, test.judged, test.dataset, 6)
    assert 0 < len(part) <= 3 and any("left out" in note for note in notes)


# ---------------------------------------------------------------- reading a test


def test_without_the_data_set_the_scores_are_left(results, tmp_path, capsys):
    (results.parents[3] / "data").rename(tmp_path / "moved")
    assert report.main([str(results)]) == 0
    out = capsys.readouterr().out
    assert "No analysis of errors" in out and "--root" in out
    page = Page(results / "report.html")
    charts = [attributes["aria-label"] for attributes, _ in page.all("svg")]
    assert any("Precision" in chart for chart in charts) and not page.all("img")
    said = json.loads((results / "results.json").read_text())
    rows = table(results, "classes")
    assert float(rows[-1][METRICS["area"]]) == pytest.approx(said["value"], rel=1e-5)
    assert read(results, str(tmp_path / "moved")).judged


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_changed_data_are_told_of_and_all_is_of_now(kind, request):
    folder = request.getfixturevalue("results" if kind == "voc" else "coco")
    said = json.loads((folder / "results.json").read_text())
    root = Path(said["root"])
    if kind == "voc":
        shutil.copy(root / "Annotations" / "p05.xml", root / "Annotations" / "p00.xml")
        changed = VOCDetection(root, [(None, "test")])
    else:
        path = root / "annotations" / "instances_val2017.json"
        document = json.loads(path.read_text())
        document["annotations"][0] |= {"bbox": [60, 30, 20, 20], "area": 400}
        path.write_text(json.dumps(document))
        changed = COCODetection(root, [("2017", "val")])
    test = read(folder)
    now = changed.evaluate(test.detections, folder.parent / "now")
    assert abs(now["value"] - said["value"]) > 0.001
    (note,) = (note for note in test.notes if "results.json" in note)
    assert f"{said['value']:.4f}" in note and f"{now['value']:.4f}" in note
    assert test.results.value == pytest.approx(now["value"])
    assert test.results.per_class == pytest.approx(now["per_class"])


def test_a_damaged_log_is_told(results):
    log = results.parents[2] / "log.jsonl"
    value = '{"epoch": 1, "loss_loc": 1, "loss_conf": 1, "value": 2}'
    for content in ('{"epoch": 1}', '{"epo', "[" * 9999, value):
        log.write_text(content)
        test = open_test(results, None)
        assert not test.log and f"No training curves: {log}" in test.notes[0]


def test_detections_of_another_test_than_the_scores_are_told(results):
    change(results, thresholds={"score": 0.5})
    test = read(results)
    assert test.dataset is None and test.curves is not None
    assert re.search(f"{results / 'detections.npz'} .*score 0.01, not 0.5", test.notes[0])
    assert "run the test again" in test.notes[0]


def test_damaged_detections_are_told_and_the_curves_are_left(results):
    path = results / "detections.npz"
    whole = path.read_bytes()
    path.unlink()
    for content, message in ((None, "does not exist"), (whole[:-40], "is damaged")):
        if content is not None:
            path.write_bytes(content)
        test = read(results)
        assert test.dataset is None and f"{path} {message}" in test.notes[0]
        assert "run the test" in test.notes[0] and "--root" not in test.notes[0]
        assert test.curves is not None
    said = change(results)
    keys = ("per_class", "per_class_per_size", "ground_truths")
    names = said["classes"][:2]
    change(results, classes=names, **{key: {n: said[key][n] for n in names} for key in keys})
    path.write_bytes(whole)
    test = read(results)
    assert f"{path} does not fit the test" in test.notes[0]
    assert test.curves is None and str(results / "curves.npz") in test.notes[1]


@pytest.mark.parametrize("wrong", [b"PK damaged", "coco"])
def test_damaged_curves_are_told_of_where_they_are_needed(wrong, results, coco, tmp_path):
    path = results / "curves.npz"
    path.write_bytes((coco / "curves.npz").read_bytes() if wrong == "coco" else wrong)
    assert read(results).curves is not None  # they are made anew
    (results.parents[3] / "data").rename(tmp_path / "away")
    test = read(results)
    (note,) = (note for note in test.notes if "No curves" in note)
    assert test.curves is None and str(path) in note and "run the test again" in note


def test_a_bound_that_rounding_has_put_over_one_is_read(made):
    values = json.loads((made[0] / "results.json").read_text())
    assert Results.of({**values, "interval": [0.5, 1 + 2**-52]}).interval == (0.5, 1)


def test_results_with_a_wrong_value_are_refused_in_a_sentence(made, tmp_path):
    whole, path = json.loads((made[0] / "results.json").read_text()), tmp_path / "results.json"
    for key, value in (
        ("per_class", None), ("per_class", {"bolt": 2}), ("interval", [0.1]), ("value", 10**400),
        ("per_class_per_size", {"bolt": {"small": 0.5}}), ("per_class_interval", {"bolt": 0.1}),
        ("sets", "../../x"), ("root", "a\0"), ("overfit", -1), ("overfit", True),
        ("classes", ["a", "a"]), ("classes", [1]), ("dataset", "voc"), ("notes", [1]),
        ("stats", 10**30),
    ):  # fmt: skip
        path.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(UserError, match="run the test again") as refused:
            open_test(tmp_path, None)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("above", [0, 1, 2, 3])
def test_a_test_is_found_from_any_folder_above_it(made, above):
    assert open_test([made[0], *made[0].parents][above], None).directory == made[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"dataset": "VOC"}', "\udcff"])
def test_folder_without_a_test_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content, errors="surrogateescape")
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "results.json" in error and error.count("\n") == 1
    assert report.main([str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} does not exist; give" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] * (content is not None)


def test_wrong_root_is_refused(results, tmp_path, capsys, make_voc):
    objects = [(name, (1, 1, 9, 9)) for name in NAMES]
    other = make_voc(tmp_path / "other", {"test": {"z": objects}})
    for root, message in ((tmp_path / "none", str(tmp_path / "none")), (other, "other images")):
        assert report.main([str(results), "--root", str(root)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--score=nan", "--score=1.1", "--examples=-1",
                                    "--output=page.pdf"])  # fmt: skip
def test_wrong_options_are_refused(made, option):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(made[0]), option])
