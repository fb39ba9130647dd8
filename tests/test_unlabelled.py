"""Objects that nobody annotated: by hand, and accepted ones through the readers of the formats."""

import json
import re
import shutil

import numpy as np
import pytest
from coco_files import annotation, write_val2017
from conftest import write_voc
from layouts import IMAGES, LAYOUTS
from test_report import Page, table, write_results

from data import build_dataset, list_sets
from data.coco import COCODetection
from data.voc0712 import VOCDetection
from tools import report, unlabelled
from tools.figures import Folder
from tools.results import open_test
from tools.unlabelled import list_omissions, merge, show_omissions
from utils.errors import UserError


def found(*rows):
    """Detections of rows (x1, y1, x2, y2, label, score), both ends inside the box."""
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].astype(int), "scores": rows[:, 5]}


@pytest.fixture
def voc(tmp_path):
    """The folders of two tests on two images; the difficult object is of class b."""
    objects = [("a", (11, 11, 40, 40), False), ("b", (61, 11, 90, 40), True)]
    root = write_voc(tmp_path / "data", {"test": {"one": objects, "two": []}})
    dataset = VOCDetection(root, [(None, "test")])
    one = found(
        (10, 10, 39, 39, 1, 0.9),  # correct
        (10, 10, 38, 38, 1, 0.8),  # a duplicate
        (10, 25, 39, 54, 1, 0.7),  # badly placed: IoU 1/3
        (10, 10, 39, 39, 2, 0.7),  # a confusion
        (62, 10, 91, 39, 1, 0.7),  # on the difficult object
        (10, 10, 14, 14, 2, 0.45),  # in an object, IoU 1/36
        (60, 44, 89, 58, 1, 0.5),  # nothing there
        (62, 44, 91, 58, 2, 0.4),  # the same, another class, IoU 28/32
        (40, 44, 49, 58, 1, 0.39),  # below the score
    )
    two = found((0, 0, 19, 19, 1, 0.41), (30, 30, 59, 59, 2, 0.5))
    other = found((61, 44, 90, 58, 1, 0.3), (10, 11, 14, 14, 2, 0.85), (40, 44, 49, 58, 1, 0.95))
    return [write_results(tmp_path / name, dataset, detections, "VOC", "test")
            for name, detections in (("A", [one, two]), ("B", [other, found()]))]


def listed(folders, score=0.4):
    """Rows of image, corners, label, score, tests."""
    tests = [open_test(folder, None) for folder in folders]
    return [(o.image, *(o.box - (0, 0, 1, 1)).astype(int).tolist(), o.label, round(o.score, 4),
             o.tests) for o in list_omissions(tests, score)]  # fmt: skip


def test_what_is_about_an_object_is_no_omission(voc):
    assert listed(voc[:1]) == [
        (1, 30, 30, 59, 59, 2, 0.5, 1), (1, 0, 0, 19, 19, 1, 0.41, 1),  # 0.91 times 0.91 / 0.91
        (0, 60, 44, 89, 58, 1, 0.5, 1), (0, 10, 10, 14, 14, 2, 0.45, 1),  # 0.95 times 0.95 / 2.95
    ]  # fmt: skip
    assert [each[0] for each in listed(voc[:1], 0.5)] == [1, 0] and listed(voc[:1], 0.95) == []


def test_tests_agree(voc):
    # A score below the least one counts in the mean. 1.72 times 1.72 / 3.72 is over 0.455.
    assert listed(voc) == [
        (0, 40, 44, 49, 58, 1, 0.67, 1),  # (0.95 + 0.39) / 2
        (0, 10, 11, 14, 14, 2, 0.65, 2),  # (0.85 + 0.45) / 2, the box of the better one
        (0, 60, 44, 89, 58, 1, 0.4, 1),  # (0.5 + 0.3) / 2
        (1, 30, 30, 59, 59, 2, 0.25, 1), (1, 0, 0, 19, 19, 1, 0.205, 1),
    ]  # fmt: skip
    assert {each[-1] for each in listed([voc[0]] * 3)} == {3}


def test_a_box_in_a_crowd_is_no_omission(tmp_path):
    crowd = [annotation(1, 9, [0, 0, 40, 40], iscrowd=1), annotation(2, 42, [0, 0, 9, 9])]
    dataset = COCODetection(write_val2017(tmp_path, crowd), [("2017", "val")])
    small = found((0, 0, 9, 9, 1, 0.9), (38, 0, 47, 9, 1, 0.8))  # IoU 1/16; a share of 1 and of 0.2
    folder = write_results(tmp_path / "out", dataset, [small, found()], "COCO", "2017_val")
    assert [each[1:5] for each in listed([folder])] == [(38, 0, 47, 9)]
    for box, files in (([0, 0, 10, 10], 0), ([38, 0, 10, 10], 1)):
        record = {"image": "9", "class": "dog", "score": 1, "bbox": box}
        (tmp_path / "a.json").write_text(json.dumps([record]))
        merge(open_test(folder, None), tmp_path / "a.json", tmp_path / "fixed")
        assert len([*tmp_path.glob("fixed/*/*.json")]) == files


@pytest.mark.parametrize("layout", ["voc", "cvat", "yolo-list", "coco"])
def test_objects_of_classes_left_out_are_annotated(layout, tmp_path):
    LAYOUTS[layout].write(tmp_path / "data")
    kind = LAYOUTS[layout].dataset
    sets = list_sets(kind, tmp_path / "data")[:1] or [(None, "split_train")]
    dataset = build_dataset(kind, tmp_path / "data", sets, ("zebra",))
    objects = [IMAGES[dataset.image_path(i).name][2] for i in range(len(dataset))]
    detections = [found(*((*box, 1, 0.9) for _, *box in each)) for each in objects]
    folder = write_results(tmp_path / "out", dataset, detections, kind, str(dataset.image_sets[0]))
    shown, notes = show_omissions(Folder(tmp_path), [open_test(folder, None)], 0.4, 99)
    if layout == "coco":  # its reader does not keep them
        assert "checkbox" in shown and len(notes) == 1 and "1 of 3 classes" in notes[0]
    else:
        assert (shown, notes) == ("", [])


def test_the_page_shows_them_in_order_and_ticks_hold_them(voc, tmp_path, monkeypatch):
    path, _ = report.write_report(voc[0], tmp_path / "page" / "report.html", against=voc[1:])
    page = Page(path)
    ticks = [json.loads(a["value"]) for a, _ in page.all("input") if a["autocomplete"] == "off"]
    assert [(t["image"], t["class"]) for t in ticks] == [
        ("one", "a"), ("one", "b"), ("one", "a"), ("two", "b"), ("two", "a")]  # fmt: skip
    assert ticks[0]["bbox"] == [40, 44, 10, 15] and ticks[0]["score"] == pytest.approx(0.67)
    texts = [text for _, text in page.all("label")]
    assert any("b 0.65, found by 2 of 2" in text for text in texts)
    assert [text for _, text in page.all("article")][1].startswith("two0 annotated")
    rows = table(path.parent, "unlabelled")
    assert [row["image"] for row in rows] == [t["image"] for t in ticks]
    assert float(rows[0]["x2"]) == 50 and rows[1]["tests"] == "2"
    tests = [open_test(folder, None) for folder in voc]
    shown, (note,) = show_omissions(Folder(tmp_path), tests, 0.4, 1)
    assert "4 objects" in note and shown.count("checkbox") == shown.count('id="save"') == 1
    assert all(str(folder) in shown for folder in voc)
    assert 'id="save"' not in show_omissions(Folder(tmp_path), tests, 0.4, 0)[0]
    monkeypatch.setattr(unlabelled, "MOST", 2)
    path, _ = report.write_report(voc[0], tmp_path / "page" / "report.html")
    assert len(Page(path).all("input")) == 2


@pytest.mark.parametrize(("content", "value"), [
    ("{}", "{}"), ("[3]", "3"), ('[{"image": "one", "class": "a"}]', "{'image': 'one'"),
    ('[{"image": "one", "class": "a", "score": 1, "bbox": [1, 1, 2, NaN]}]', "{'image': 'one'"),
])  # fmt: skip
def test_a_file_of_other_things_is_refused_in_a_sentence(content, value, voc, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert report.main([str(voc[0]), "--accept", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'a.json'}: {value}" in error
    assert "save the file again" in error


@pytest.mark.parametrize("option", ["--against=B", "--score=0.4", "--examples=6"])
def test_options_of_the_page_are_refused_beside_accept(option, voc, capsys):
    with pytest.raises(SystemExit):
        report.main([str(voc[0]), "--accept", "a.json", option])
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "store"), [
    *((each, "data") for each in ("voc", "cvat-voc", "labelimg", "coco", "roboflow-coco",
                                  "label-studio-coco", "yolo-list", "yolo-polygons", "darknet")),
    ("yolo-list", ".store"),
])  # fmt: skip
def test_accepted_objects_are_read_again_beside_the_old_ones(layout, store, tmp_path, capsys):
    root, out, store = tmp_path / "data", tmp_path / "fixed", tmp_path / store
    LAYOUTS[layout].write(store)
    for path in (path for path in store.rglob("*.txt") if not path.stat().st_size):
        path.unlink()  # a YOLO image without a label file
    if store != root:
        root.mkdir()
        (root / "data.yaml").write_text(f"path: {store}\n{(store / 'data.yaml').read_text()}")
        (store / "data.yaml").unlink()
        for path in store.rglob("*.txt"):
            path.write_text(path.read_text(), "utf-16")
    kind = LAYOUTS[layout].dataset
    sets = list_sets(kind, root)[:1] or [(None, "split_train")]
    dataset = build_dataset(kind, root, sets, ("red box", "zebra", "cell"))
    results = write_results(tmp_path / "out", dataset, [found()] * len(dataset), kind,
                            str(dataset.image_sets[0]))  # fmt: skip
    before = [dataset.target(i) for i in range(len(dataset))]
    accepted = [{"image": str(id), "class": "cell", "bbox": [1, 2, 9, 7], "score": 0.5}
                for id in dataset.ids[1:]]  # fmt: skip
    again = [accepted[0], {**accepted[0], "bbox": [-500, 2, 510.5, 7]}]  # the same when clipped
    outside = [{**accepted[0], "image": str(dataset.ids[0]), "bbox": box}
               for box in ([300, 2, 9, 9], [1, 1, 9, 0], [9, 9, -5, -5])]  # fmt: skip
    (tmp_path / "accepted.json").write_text(json.dumps(accepted + again + outside))
    call = [str(results), "--accept", str(tmp_path / "accepted.json"), "--output"]
    content = [path.read_bytes() for path in sorted(store.rglob("*.*"))]
    assert report.main([*call, str(out)]) == 0, capsys.readouterr().err
    said = re.findall(r"\d+(?= files| new| were| have)|(?<=in )/.+(?=\.)", capsys.readouterr().out)
    written = [path for path in out.rglob("*") if path.is_file()]
    assert said[:4] == [str(n) for n in (len(written), len(accepted), 2, 3)]
    assert len(written) == (1 if kind == "COCO" else len(accepted))
    assert content == [path.read_bytes() for path in sorted(store.rglob("*.*"))]
    assert report.main([*call, str(out)]) == 2 and str(out) in capsys.readouterr().err
    shutil.copytree(out, said[4], dirs_exist_ok=True)
    again = build_dataset(kind, root, sets, dataset.classes)
    assert again.ids == dataset.ids
    for i, old in enumerate(before):
        wanted = np.vstack([old, *[(1, 2, 9, 8, 3)] * (i > 0)])
        np.testing.assert_allclose(again.target(i), wanted, atol=0.01)
        if "polygons" in layout and i:
            lines = dataset.annotations[i].path.read_text().splitlines()
            assert len(lines) == len(wanted) and min(len(line.split()) for line in lines) > 6
    assert report.main([*call, str(tmp_path / "none")]) == 0
    assert str(tmp_path / "accepted.json") in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_labels_with_keypoints_are_refused(tmp_path):
    LAYOUTS["yolo-list"].write(tmp_path)
    with open(tmp_path / "data.yaml", "a") as file:
        file.write("kpt_shape: [2, 3]\n")
    dataset = build_dataset("YOLO", tmp_path, [(None, "val")])
    folder = write_results(tmp_path / "out", dataset, [found()] * len(dataset), "YOLO", "val")
    record = {"image": dataset.ids[0], "class": "cell", "bbox": [1, 2, 9, 7], "score": 0.5}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match="kpt_shape.* by hand") as caught:
        merge(open_test(folder, None), tmp_path / "a.json", tmp_path / "fixed")
    assert str(tmp_path) in str(caught.value)
