"""The contact sheet of a test."""

import json
import os
import shutil
from pathlib import Path

import cv2
import pytest
from coco_files import perfect
from test_analysis import found as detected
from test_analysis import truth as objects
from test_report import EMPTY, write_results

from data.judge import judge
from data.voc0712 import VOCDetection
from inference.draw import ORANGE
from tools import sheet


@pytest.fixture
def results(voc_folder, tmp_path):
    """A folder of results in which t1 is all right and nothing is found in any other image."""
    dataset = VOCDetection(voc_folder, [(None, "test")])
    detections = [perfect(dataset)[0], *[EMPTY] * (len(dataset) - 1)]
    return write_results(tmp_path / "results", dataset, detections, "VOC", "test")


@pytest.mark.parametrize("options, shown", [
    (["--images", "1"], ["good: t1  1 right, 0 wrong, 0 missed",
                         "bad: t2  0 right, 0 wrong, 2 missed"]),
    ([], ["good: t1", "good: t3", "bad: t2", "bad: t4"]),  # none is shown as good and as bad
])  # fmt: skip
def test_sheet_shows_the_best_and_the_worst(options, shown, results, tmp_path, monkeypatch, capsys):
    captions, real, out = [], sheet.contact_sheet, tmp_path / "new" / "sheet.png"
    monkeypatch.setattr(sheet, "contact_sheet", lambda *a: captions.extend(a[3]) or real(*a))
    assert sheet.main([str(results), "--output", str(out), *options]) == 0
    assert [text[: len(wanted)] for text, wanted in zip(captions, shown, strict=True)] == shown
    assert (cv2.imread(str(out)) == ORANGE).all(2).any() and str(out) in capsys.readouterr().out


def test_sheet_of_a_run_is_of_its_newest_test(results, tmp_path, capsys):
    for number, name in enumerate(("early", "late")):
        folder = tmp_path / "run" / "ss_predict" / name / "test"
        shutil.copytree(results, folder)
        os.utime(folder / "results.json", (number, number))
    assert sheet.main([str(tmp_path / "run")]) == 0
    assert [p.parent.parent.name for p in tmp_path.glob("run/**/*.png")] == ["late"]
    assert capsys.readouterr().out.startswith(f"{folder / 'detections.png'}: ")


def test_sheet_needs_the_data_set(results, tmp_path, capsys):
    moved = Path(json.loads((results / "results.json").read_text())["root"])
    moved.rename(tmp_path / "elsewhere")
    assert sheet.main([str(results)]) == 2
    assert "--root says where the data set is" in capsys.readouterr().err
    assert sheet.main([str(results), "--root", str(tmp_path / "elsewhere")]) == 0


def test_sheet_is_a_png(results, capsys):
    with pytest.raises(SystemExit, match="2"):
        sheet.main([str(results), "--output", "sheet.jpg"])
    assert ".png" in capsys.readouterr().err


def test_errors_of_each_image_are_counted():
    one, other, far = (10, 10, 30, 30), (50, 50, 70, 70), (80, 80, 90, 90)
    truth = [(0, one, 1), (0, other, 2), (2, one, 1), (2, other, 2), (3, one, 1), (4, one, 1),
             (5, one, 1, True), (5, other, 2, True)]  # fmt: skip
    found = [
        (0, one, 1, 0.9),  # image 0: the other one is missed; image 1 is empty
        (2, other, 2, 0.9), (2, one, 1, 0.5),
        (3, one, 2, 0.9),  # another class: wrong, and the object is missed
        (4, one, 1, 0.9), (4, one, 1, 0.8), (4, far, 1, 0.49),  # a duplicate; the last is below 0.5
        (5, one, 1, 0.9), (5, one, 1, 0.8),  # ignored objects
    ]  # fmt: skip
    for rule in ("voc", "coco"):
        counts = sheet.count_errors(judge(objects(truth, rule), detected(found)), 0.5, 7)
        assert counts.tolist() == [[1, 0, 1], [0, 0, 0], [2, 0, 0], [0, 1, 1], [1, 1, 0],
                                   [0, 0, 0], [0, 0, 0]]  # fmt: skip
