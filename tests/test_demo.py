"""The contact sheet of a test run, and the curves of its log."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.detections import save_detections
from data.voc0712 import VOCDetection
from data.voc_eval import METRICS
from docs import curves
from tools import sheet


@pytest.fixture
def results(voc_folder, tmp_path):
    """A folder of results in which t1 is all right and every other picture finds nothing."""
    dataset = VOCDetection(voc_folder, [(None, "test")])
    empty = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}
    detections = [empty] * len(dataset)
    target = dataset.target(0)
    detections[0] = {"boxes": target[:, :4], "scores": np.full(len(target), 0.9),
                     "labels": target[:, 4].astype(int)}  # fmt: skip
    folder = tmp_path / "results"
    save_detections(folder / "detections.npz", dataset.ids, detections, {})
    content = {"root": str(voc_folder), "sets": "test", "classes": list(dataset.classes),
               "dataset": "VOC", "metric": METRICS["area"], "value": 0.5,
               "per_class": dict.fromkeys(dataset.classes, 0.5)}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_sheet_shows_the_best_and_the_worst(results, tmp_path, monkeypatch, capsys):
    captions = []
    real = sheet.contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet", lambda *a: captions.extend(a[3]) or real(*a))
    out = tmp_path / "new" / "sheet.png"
    assert sheet.main([str(results), "--output", str(out), "--pictures", "1"]) == 0
    assert captions == ["good: t1  1 right, 0 wrong, 0 missed",
                        "bad: t2  0 right, 0 wrong, 2 missed"]  # fmt: skip
    assert cv2.imread(str(out)) is not None
    assert str(out) in capsys.readouterr().out


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


def test_no_picture_is_shown_as_good_and_as_bad(results, monkeypatch):
    captions = []
    real = sheet.contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet", lambda *a: captions.extend(a[3]) or real(*a))
    assert sheet.main([str(results)]) == 0
    names = [caption.split()[1] for caption in captions]
    assert len(names) == len(set(names)) > 1


def test_sheet_is_a_png(results, capsys):
    with pytest.raises(SystemExit, match="2"):
        sheet.main([str(results), "--output", "sheet.jpg"])
    assert "must end in .png" in capsys.readouterr().err


def test_folder_without_results_is_refused(tmp_path, capsys):
    assert sheet.main([str(tmp_path)]) == 2
    assert "no results.json" in capsys.readouterr().err


def test_curves_are_read_from_the_log_and_drawn(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"epoch": e, "loss_loc": 1.0, "loss_conf": 4.0 / e} for e in (1, 2, 3)]
    records[1]["value"] = 0.5
    log.write_text("\n".join(map(json.dumps, [*records, {"step": 9, "value": 0.7}])))
    read = curves.read_log(log)
    assert curves.series(read, "loss").tolist() == [[1, 5], [2, 3], [3, 1 + 4 / 3]]
    assert curves.series(read, "AP").tolist() == [[2, 0.5]]
    out = tmp_path / "c.png"
    assert curves.main([str(out), f"a={log}", f"b={log}"]) == 0
    image = cv2.imread(str(out))
    assert image.shape == (curves.HEIGHT, 2 * curves.WIDTH, 3)
    assert (image == curves.COLOURS[1]).all(2).any()
