"""The report of a test: its numbers against other sources, its page in a parser and in Chromium."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import browser
import cv2
import numpy as np
import pytest

from data.coco import COCODetection
from data.detections import save_detections
from data.voc0712 import VOCDetection
from data.voc_comp4 import read_comp4
from data.voc_eval import METRICS, evaluate_voc
from tools import report
from tools.chart import Chart, colour
from tools.results import find_test

ROOT = Path(__file__).parent.parent
NASTY = '<script>alert("x")</script>&'
VOID = {"meta", "img", "br", "link", "input", "rect", "polyline"}
needs_chromium = pytest.mark.skipif(
    not (browser.DRIVER and browser.CHROMIUM), reason=browser.MISSING
)


class Page(HTMLParser):
    """Elements as (tag, attributes, text); refuses tags that do not close each other."""

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

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        for element in self.stack:
            element[2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


def write_results(folder, dataset, detections, kind, sets):
    """What a test leaves, without a network."""
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


@pytest.fixture
def nasty_voc(tmp_path, make_voc):
    """A data set in VOC layout: three classes, one of an unpleasant name, difficult objects."""
    rng, samples = np.random.default_rng(1), {}
    names = ["Zelle é", "&lt;script>alert(\"x\")&lt;/script>&amp;", "bolt"]  # as in XML
    for i in range(12):
        starts = rng.integers(1, (60, 36), (3, 2))
        sides = rng.integers(15, 35, (3, 2))
        samples[f"p{i:02}"] = [
            (names[k], (*map(int, start), *map(int, start + side)), bool(rng.random() < 0.15))
            for k, (start, side) in enumerate(zip(starts, sides, strict=True))
        ]
    root = make_voc(tmp_path / "data", {"test": samples})
    return VOCDetection(root, [(None, "test")])


@pytest.fixture
def results(nasty_voc, tmp_path):
    """A run with a log and two tests, of which the newer is bad."""
    run = tmp_path / "run"
    names = nasty_voc.classes
    records = [{"epoch": e, "step": 5 * e, "lr": 0.1, "loss_loc": 1.0, "loss_conf": 3 / e}
               for e in (1, 2, 3)]  # fmt: skip
    records[1] |= {"value": 0.25, "per_class": dict.fromkeys(names, 0.25)}
    records[2] |= {"value": 0.5, "per_class": dict.fromkeys(names, 0.5)}
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for age, name in enumerate(("Final", "epoch_1")):
        folder = run / "ss_predict" / name / "test"
        write_results(folder, nasty_voc, scatter(nasty_voc, age), "VOC", "test")
        os.utime(folder / "results.json", (1e9 - age, 1e9 - age))
    return run / "ss_predict" / "Final" / "test"


def table(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_is_whole_and_needs_nothing_from_outside(results, nasty_voc):
    assert NASTY in nasty_voc.classes
    path, notes = report.write_report(results)
    assert path == results / "report.html" and notes == []
    page = Page(path)
    assert len(page.all("script")) == 1  # the class name is text
    assert [text for _, text in page.all("option")][1:4] == list(nasty_voc.classes)
    links = [attributes["href"] for attributes, _ in page.all("a")]
    outside = [link for link in links if link.startswith("http")]
    assert outside == ["https://arxiv.org/abs/2008.08115"]
    files = {unquote(link) for link in links} - set(outside)
    written = {str(p.relative_to(results)) for p in (results / "report").iterdir()}
    assert files == written
    sources = [attributes["src"] for attributes, _ in page.all("img")]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not page.all("link") and "url(" not in path.read_text()
    (policy,) = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    assert all(attributes["aria-label"] for attributes, _ in page.all("svg"))


def test_every_figure_is_also_a_table_and_a_picture(results):
    report.write_report(results)
    names = {p.name for p in (results / "report").iterdir()}
    figures = {"ap_by_iou", "ap_by_size", "calibration", "confusion", "errors", "precision_recall",
               "training_loss", "training_score"}  # fmt: skip
    assert {f"{figure}.{kind}" for figure in figures for kind in ("csv", "png")} <= names
    assert {"classes.csv", "errors_by_class.csv", "mistakes.csv"} <= names
    for path in (results / "report").iterdir():
        if path.suffix == ".png":
            image = cv2.imread(str(path))
            assert min(image.shape[:2]) > 60 and image.std() > 5, path
    loss = table(results / "report", "training_loss")
    assert [float(row["loss"]) for row in loss] == [4, 2.5, 2]
    assert [row["value"] for row in table(results / "report", "training_score")] == ["0.25", "0.5"]


def test_ap_is_that_of_the_evaluator(results, nasty_voc):
    report.write_report(results)
    folder, names = results / "report", nasty_voc.classes
    said = json.loads((results / "results.json").read_text())
    by_iou = {row.pop("class"): row for row in table(folder, "ap_by_iou")}
    assert list(by_iou) == [*names, "mean"]
    read, _ = read_comp4(results, "test", names, nasty_voc.ids)
    for iou in ("0.50", "0.75", "0.95"):
        result = evaluate_voc(read, nasty_voc.annotations, names, float(iou))["area"]
        for name in names:
            assert float(by_iou[name][iou]) == pytest.approx(result["per_class"][name], rel=1e-5)
        assert float(by_iou["mean"][iou]) == pytest.approx(result["mean"], rel=1e-5)
    rows = {row["class"]: row for row in table(folder, "classes")}
    title = METRICS["area"]
    assert float(rows["mean"][title]) == pytest.approx(said["value"], rel=1e-5)
    for name in names:
        assert float(rows[name][title]) == pytest.approx(said["per_class"][name], rel=1e-5)
        for size, ap in said["per_class_per_size"][name].items():
            shown = rows[name][f"AP {size}"]
            assert shown == "" if ap < 0 else float(shown) == pytest.approx(ap, rel=1e-5)


def test_mistakes_are_listed_and_shown(tmp_path, make_voc):
    root = make_voc(tmp_path / "data", {"test": {
        "one": [("a", (11, 11, 40, 40)), ("b", (60, 20, 90, 60))],
        "two": [("a", (1, 1, 80, 60))],
    }})  # fmt: skip
    dataset = VOCDetection(root, [(None, "test")])

    def found(*rows):
        boxes, labels, scores = zip(*rows, strict=True)
        return {"boxes": np.array(boxes, np.float32), "labels": np.array(labels),
                "scores": np.array(scores, np.float32)}  # fmt: skip

    detections = [
        found(((10, 10, 39, 39), 1, 0.9), ((10, 10, 38, 38), 1, 0.8), ((59, 19, 89, 59), 1, 0.7),
              ((59, 19, 89, 59), 2, 0.3)),
        found(((60, 50, 79, 70), 2, 0.6), ((0, 66, 9, 71), 2, 0.5)),
    ]  # fmt: skip
    folder = write_results(tmp_path / "out", dataset, detections, "VOC", "test")
    path, _ = report.write_report(folder)
    rows = table(folder / "report", "mistakes")
    seen = [(row["type"], row["class"], row["picture"], row["object"]) for row in rows]
    assert seen == [
        ("duplicate", "a", "one", "a"),
        ("class", "a", "one", "b"),  # the object is missed, too, but this tells of it
        ("background", "b", "two", ""),  # 0.6: IoU 0.04 with the object
        ("background", "b", "two", ""),
        ("missed", "a", "two", "a"),
    ]
    assert [float(row["iou"] or 0) for row in rows[:2]] == pytest.approx([29**2 / 30**2, 1])
    page = Page(path)
    captions = [text for _, text in page.all("figcaption")]
    assert "a 0.80, IoU 0.93 with aone" in captions and "a, missedtwo" in captions
    assert len(captions) == 5
    kinds = [attributes["data-kind"] for attributes, _ in page.all("section")]
    assert kinds == ["class", "duplicate", "background", "missed"]


def test_a_mistake_is_drawn_around_its_boxes():
    image = np.full((300, 400, 3), 128, np.uint8)
    truth, box = np.array([(100, 100, 160, 160), (120, 90, 170, 150)], float)
    drawn = report.draw_mistake(image, truth, box)
    assert max(drawn.shape) == report.SIDE
    assert (drawn == report.GREEN).all(2).any() and (drawn == report.RED).all(2).any()
    # 70 pixels wide and 28 around: 126 pixels in all
    scale = report.SIDE / 126
    green = np.argwhere((drawn == report.GREEN).all(2))[:, 1]
    assert green.min() == pytest.approx(28 * scale, abs=4)
    for box in ((0, 0, 400, 300), (390, 290, 400, 300), (-20, -20, 3, 3)):
        drawn = report.draw_mistake(image, None, np.array(box, float))
        assert max(drawn.shape) == report.SIDE and (drawn == report.RED).all(2).any()
    assert (image == 128).all()


def test_a_run_means_its_newest_test(results, capsys):
    run = results.parents[2]
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    newest = os.path.join("ss_predict", "Final", "test")
    assert f"the newest test of the run, {newest}" in out and "epoch_1" in out
    assert (results / "report.html").is_file()
    assert "Training loss" in (results / "report.html").read_text()


def test_without_the_data_set_the_scores_are_left(results, capsys, tmp_path):
    data = tmp_path / "data"
    data.rename(tmp_path / "moved")
    assert report.main([str(results)]) == 0
    out = capsys.readouterr().out
    assert "Without the data set there is no analysis of errors, and no galleries" in out
    assert "--root" in out
    text = (results / "report.html").read_text()
    assert "no galleries" in text and "Precision over recall" in text
    assert not Page(results / "report.html").all("img")
    rows = table(results / "report", "classes")
    said = json.loads((results / "results.json").read_text())
    assert float(rows[-1][METRICS["area"]]) == pytest.approx(said["value"], rel=1e-5)
    assert report.main([str(results), "--root", str(tmp_path / "moved")]) == 0
    assert Page(results / "report.html").all("img")


def test_changed_data_are_told_of(results, capsys, tmp_path):
    (annotation, *_) = sorted((tmp_path / "data" / "Annotations").iterdir())
    shutil.copy(annotation.with_name("p05.xml"), annotation)
    assert report.main([str(results)]) == 0
    assert "on the data as they are now" in capsys.readouterr().out


def test_changed_coco_data_are_told_of_and_all_is_of_now(tmp_path, coco_folder):
    dataset = COCODetection(coco_folder, [("2017", "val")])
    folder = write_results(tmp_path / "out", dataset, scatter(dataset, 3), "COCO", "2017_val")
    said = json.loads((folder / "results.json").read_text())
    path = coco_folder / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0] |= {"bbox": [60, 30, 20, 20], "area": 400}
    path.write_text(json.dumps(document))
    changed = COCODetection(coco_folder, [("2017", "val")])
    now = changed.evaluate(scatter(dataset, 3), tmp_path / "now")
    assert abs(now["value"] - said["value"]) > 0.01
    _, notes = report.write_report(folder)
    assert notes == [f"results.json says {said['value']:.4f}, but its detections score "
                     f"{now['value']:.4f} on the data as they are now; what follows is of now"]
    rows = {row["class"]: row for row in table(folder / "report", "classes")}
    assert float(rows["mean"]["COCO AP"]) == pytest.approx(now["value"], rel=1e-5)
    assert float(rows["mean"]["AP at 0.5"]) == pytest.approx(now["stats"][1], rel=1e-5)
    for name, ap in now["per_class"].items():
        assert float(rows[name]["COCO AP"]) == pytest.approx(ap, rel=1e-5)


def test_detections_that_cannot_be_had_are_told_without_blaming_the_data(results, capsys):
    path = results / "detections.npz"
    whole = path.read_bytes()
    for content, message in ((None, "does not exist"), (whole[:-40], "is damaged")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert report.main([str(results)]) == 0
        note = capsys.readouterr().out.splitlines()[0]
        assert f"{path} {message}" in note and note.endswith("; run the test again")
        assert "--" not in note
        assert "Precision over recall" in (results / "report.html").read_text()
        path.write_bytes(b"")
    rows = json.loads((results / "results.json").read_text())
    rows["classes"] = rows["classes"][:2]
    for key in ("per_class", "per_class_per_size"):
        rows[key] = {name: rows[key][name] for name in rows["classes"]}
    (results / "results.json").write_text(json.dumps(rows))
    path.write_bytes(whole)
    assert report.main([str(results)]) == 0
    out = capsys.readouterr().out
    assert f"{path} does not fit results.json beside it (image p" in out and "of 2" in out
    assert f"No curves: {results / 'curves.npz'} is not of results.json beside it" in out


def test_damaged_curves_are_told_of_where_they_are_needed(results, capsys, tmp_path, coco_folder):
    dataset = COCODetection(coco_folder, [("2017", "val")])
    coco = write_results(tmp_path / "out", dataset, scatter(dataset, 3), "COCO", "2017_val")
    of_voc, of_coco = ((folder / "curves.npz").read_bytes() for folder in (results, coco))
    cases = (results, tmp_path / "data", of_coco), (coco, coco_folder, of_voc)
    for folder, data, wrong in cases:
        value = json.loads((folder / "results.json").read_text())["value"]
        for content, message in ((b"PK damaged", "not a file of curves"), (wrong, "is not of")):
            (folder / "curves.npz").write_bytes(content)
            assert report.main([str(folder)]) == 0
            assert "No curves" not in capsys.readouterr().out  # they are made anew
            data.rename(tmp_path / "away")
            assert report.main([str(folder)]) == 0
            (note,) = [s for s in capsys.readouterr().out.splitlines() if "No curves: " in s]
            assert message in note and note.endswith("; run the test again")
            text = (folder / "report.html").read_text()
            assert f"{value:.4f}" in text and "Precision over recall" not in text
            (tmp_path / "away").rename(data)


WRONG_VALUES = {
    "per_class": [None, [], {"bolt": None}, {"bolt": "0.5"}, {"bolt": 2}, {"nut": 0.5}, {}],
    "per_class_per_size": [None, {"bolt": None}, {"bolt": {"small": 0.5}}, {"nut": {}}],
    "value": ["0.5", True, [], float("nan"), 1e400],
    "sets": [["test"], None, 1],
    "root": [None, 1, ["a"]],
    "overfit": ["x", -1, 1.5, None, True],
    "classes": [None, "bolt", [1], [["bolt"]], {}, ["bolt", "bolt"]],
    "metric": [None, "mAP", ["a"]],
    "dataset": [None, "voc", ["VOC"]],
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_results_with_a_wrong_value_are_refused_in_one_line(results, capsys, key):
    path = results / "results.json"
    whole = json.loads(path.read_text())
    for value in WRONG_VALUES[key]:
        path.write_text(json.dumps({**whole, key: value}))
        assert report.main([str(results)]) == 2, value
        error = capsys.readouterr().err
        assert "is not a test's results" in error and error.count("\n") == 1, value
    assert not (results / "report.html").exists()


def test_a_perfect_score_may_be_rounded_up(results, nasty_voc):
    path = results / "results.json"
    said = json.loads(path.read_text())
    said["per_class"] = dict.fromkeys(nasty_voc.classes, 1 + 2**-52)
    path.write_text(json.dumps({**said, "value": 1 + 2**-52}))
    _, notes = report.write_report(results)
    assert len(notes) == 1 and "results.json says 1.0000" in notes[0]


def test_damaged_picture_is_told_of(results, capsys, tmp_path):
    for path in (tmp_path / "data" / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:-20] if path.stem == "p03" else path.read_bytes())
    assert report.main([str(results), "--score", "0"]) == 0
    assert "p03.jpg: the picture is cut off" in capsys.readouterr().out


def test_damaged_log_is_told_of(results, capsys):
    (results.parents[2] / "log.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert report.main([str(results)]) == 0
    assert "No training curves" in capsys.readouterr().out


def test_galleries_are_bounded(results, monkeypatch):
    path, _ = report.write_report(results, least=0)
    whole = len(Page(path).all("img"))
    monkeypatch.setattr(report, "PICTURES", 10_000)
    path, notes = report.write_report(results, least=0)
    shown = len(Page(path).all("img"))
    assert 0 < shown < whole
    assert f"{whole - shown} pictures of mistakes are left out" in notes[-1]
    path, _ = report.write_report(results, examples=0)
    assert not Page(path).all("img") and table(results / "report", "mistakes")


def test_the_page_goes_where_asked(results, tmp_path, capsys):
    page = tmp_path / "new folder" / "mine#1.html"
    assert report.main([str(results), "--output", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert not (results / "report.html").exists()
    links = [a["href"] for a, _ in Page(page).all("a") if not a["href"].startswith("http")]
    assert all((page.parent / unquote(link)).is_file() for link in links)
    assert links[0].startswith("mine%231_files/")


def test_figures_keep_out_of_folders_of_other_things(results, tmp_path):
    """The name of the page, plain, may be that of a folder that has nothing to do with it."""
    mine = tmp_path / "blood" / "classes.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert report.main([str(results), "--output", str(tmp_path / "blood.html")]) == 0
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1
    assert (tmp_path / "blood_files" / "classes.csv").is_file()


def test_what_the_score_noted_is_on_the_page(results, capsys):
    said = json.loads((results / "results.json").read_text())
    said["notes"] = ["0 ground truths of class <x>: its AP is 0"]
    (results / "results.json").write_text(json.dumps(said))
    assert report.main([str(results)]) == 0
    assert said["notes"][0] in capsys.readouterr().out
    assert "class &lt;x&gt;: its AP is 0" in (results / "report.html").read_text()


@pytest.mark.parametrize("above", [0, 1, 2, 3])
def test_a_test_is_found_from_any_folder_above_it(results, tmp_path, above):
    folder = tmp_path / "other" / "ss_predict" / "best" / "test"
    shutil.copytree(results, folder)
    given = [folder, *folder.parents][above]
    assert find_test(given) == (folder, tmp_path / "other", [])


def test_coco_numbers_are_those_of_its_score(tmp_path, coco_folder):
    dataset = COCODetection(coco_folder, [("2017", "val")])
    folder = write_results(tmp_path / "out", dataset, scatter(dataset, 3), "COCO", "2017_val")
    said = json.loads((folder / "results.json").read_text())
    for kept in (True, False):  # the curves of the test, or made anew
        if not kept:
            (folder / "curves.npz").unlink()
        path, notes = report.write_report(folder, least=0.1)
        assert notes == [] and Page(path).all("img")
        rows = {row["class"]: row for row in table(folder / "report", "classes")}
        assert float(rows["mean"]["COCO AP"]) == pytest.approx(said["value"], rel=1e-5)
        for key, stat in (("AP at 0.5", 1), ("AP at 0.75", 2), ("AP medium", 4)):
            assert float(rows["mean"][key]) == pytest.approx(said["stats"][stat], rel=1e-5)
        assert rows["mean"]["AP large"] == "" and said["stats"][5] == -1
        for name, ap in said["per_class"].items():
            assert float(rows[name]["COCO AP"]) == pytest.approx(ap, rel=1e-5)


def test_test_split_has_nothing_to_compare(tmp_path, coco_folder, capsys):
    names = coco_folder / "annotations"
    document = json.loads((names / "instances_val2017.json").read_text())
    (names / "image_info_test2017.json").write_text(json.dumps({**document, "annotations": []}))
    (coco_folder / "val2017").rename(coco_folder / "test2017")
    dataset = COCODetection(coco_folder, [("2017", "test")])
    nothing = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}
    folder = write_results(tmp_path / "out", dataset, [nothing] * 2, "COCO", "2017_test")
    assert report.main([str(folder)]) == 0
    assert "have no ground truth" in capsys.readouterr().out
    Page(folder / "report.html")


def test_no_detections_at_all_make_a_page(nasty_voc, tmp_path):
    nothing = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}
    folder = write_results(tmp_path / "out", nasty_voc, [nothing] * 12, "VOC", "test")
    path, notes = report.write_report(folder)
    assert len(notes) == 3 and all(note.startswith("0 detections for class") for note in notes)
    assert "no detections" in path.read_text()
    kinds = [attributes["data-kind"] for attributes, _ in Page(path).all("section")]
    assert kinds == ["missed"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "holds no results.json, nor a test under ss_predict/"),
        ("{", "is not a test's results"),
        ("[]", "is not a test's results"),
        ('{"dataset": "VOC"}', "is not a test's results"),
        ('{"dataset": "X", "sets": "a", "classes": [], "per_class": {}, "metric": "m", "value": 0,'
         ' "root": "r"}', "dataset 'X'"),
    ],
)  # fmt: skip
def test_folder_without_a_test_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] * (content is not None)


def test_wrong_root_and_options_are_refused(results, tmp_path, capsys, make_voc):
    assert report.main([str(results), "--root", str(tmp_path / "none")]) == 2
    assert "no such data set folder" in capsys.readouterr().err
    names = ("Zelle é", "&lt;script>alert(\"x\")&lt;/script>&amp;", "bolt")
    other = make_voc(tmp_path / "other", {"test": {"z": [(n, (1, 1, 9, 9)) for n in names]}})
    assert report.main([str(results), "--root", str(other)]) == 2
    assert "other pictures than the image set's" in capsys.readouterr().err
    for option in (["--score", "nan"], ["--examples", "-1"], ["--output", "page.pdf"]):
        with pytest.raises(SystemExit) as stopped:
            report.main([str(results), *option])
        assert stopped.value.code == 2
    assert not (results / "report.html").exists()


def test_chart_places_points_where_they_belong():
    chart = Chart("A & B", (0, 10), (0, 1), ("x", "y"), size=(500, 300))
    chart.line([(0, 0), (10, 1), (20, 2)], 0, "<line>", 'data-class="0"')
    svg = chart.svg()
    assert 'aria-label="A &amp; B"' in svg and "<title>&lt;line&gt;</title>" in svg
    assert 'points="58.0,252.0 484.0,56.0 484.0,56.0"' in svg and 'data-class="0"' in svg
    image = cv2.imdecode(np.frombuffer(chart.png(), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (300, 500, 3)
    assert np.abs(image[154, 271].astype(int) - colour(0)[::-1]).max() < 30  # its middle
    assert len({colour(n) for n in range(80)}) == 80


def test_page_of_the_documentation_names_every_option():
    text = (ROOT / "docs" / "reading_a_report.md").read_text("utf-8")
    done = subprocess.run([sys.executable, "-m", "tools.report", "--help"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    options = {word for word in done.stdout.split() if word.startswith("--")} - {"--help"}
    assert len(options) == 4 and all(f"`{option}" in text for option in options)
    for kind in report.ERRORS:
        assert f"| {kind} |" in text


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def window():
    if not (browser.DRIVER and browser.CHROMIUM):
        pytest.skip(browser.MISSING)
    with browser.chromium() as window:
        yield window


def choose(window, menu, value):
    window.run(
        "const menu = document.getElementById(arguments[0]); menu.value = arguments[1];"
        "menu.dispatchEvent(new Event('change'))", menu, value,
    )  # fmt: skip


def shown(window, selector):
    """Texts of the elements that take room on the page."""
    return window.run(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(e => e.getClientRects().length).map(e => e.textContent)", selector,
    )  # fmt: skip


@needs_chromium
def test_chromium_renders_sorts_and_filters(window, results, nasty_voc, tmp_path):
    path, _ = report.write_report(results, least=0.2)
    window.open(path)
    assert window.errors() == []  # no script failed, no request was refused
    assert window.run("return performance.getEntriesByType('resource')"
                      ".filter(e => !e.name.startsWith('data:')).length") == 0  # fmt: skip
    sizes = window.run("return [...document.querySelectorAll('svg')].map(e => "
                       "e.getBoundingClientRect().width)")  # fmt: skip
    assert sum(width > 300 for width in sizes) == 7 and len(sizes) == 7 + 3  # 3 wait for a class
    widths = window.run("return Promise.all([...document.images].map(i => i.decode().then("
                        "() => i.naturalWidth)))")  # fmt: skip
    assert widths and min(widths) > 20

    names = list(nasty_voc.classes)
    first, ap = "table.sortable tbody td:first-child", [
        float(row[METRICS["area"]]) for row in table(results / "report", "classes")
    ]
    assert shown(window, first)[:3] == names
    window.click("table.sortable th:nth-child(2) button")
    order = [names[n] for n in np.argsort(ap[:3])]
    assert shown(window, first)[:3] == order[::-1]
    window.click("table.sortable th:nth-child(2) button")
    assert shown(window, first)[:3] == order
    assert shown(window, "tfoot td")[0] == "mean"
    window.click("table.sortable th:first-child button")
    assert shown(window, first)[:3] == sorted(names, key=str.casefold)

    pictures = len(shown(window, ".gallery figure"))
    choose(window, "class", "1")
    assert shown(window, first)[0] == names[1] and names[0] not in shown(window, first)
    assert any(names[1] in text for text in shown(window, "svg text"))  # its calibration
    assert 0 < len(shown(window, ".gallery figure")) < pictures
    dimmed = window.run("return [...document.querySelectorAll('.dim')].every("
                        "e => getComputedStyle(e).opacity < 0.2) &&"
                        "document.querySelectorAll('.dim').length")  # fmt: skip
    assert dimmed
    choose(window, "class", "")
    choose(window, "kind", "missed")
    assert shown(window, "section h3") == ["missed"]
    choose(window, "kind", "")
    assert len(shown(window, ".gallery figure")) == pictures

    grounds = []
    for dark in (False, True):
        window.set_dark(dark)
        window.screenshot(tmp_path / "page.png")
        image = cv2.imread(str(tmp_path / "page.png"))
        assert image.shape[1] > 1000 and image.std() > 10
        grounds.append(np.median(image))
    window.set_dark(False)
    assert grounds[0] > 240 and grounds[1] < 60


@needs_chromium
def test_chromium_shows_everything_without_scripts(window, results):
    path, _ = report.write_report(results)
    window.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(path)
        assert window.errors() == []
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)
        assert shown(window, "table.sortable tbody td:first-child")
        assert len(shown(window, ".charts svg")) == 7 and shown(window, ".gallery figure")
        assert not shown(window, "#filters select") and not shown(window, "th button")
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)


@needs_chromium
def test_chromium_fits_a_narrow_window(window, results):
    path, _ = report.write_report(results)
    window.call("POST", "/window/rect", width=500, height=800)
    window.open(path)
    inner, page = window.run("return [innerWidth, document.documentElement.scrollWidth]")
    window.call("POST", "/window/rect", width=1200, height=900)
    assert page <= inner  # tables scroll by themselves
