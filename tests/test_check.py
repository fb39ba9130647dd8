"""`python -m tools.check`: every fault is told at once, and the fit of the prior boxes is right."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import VOC_IMAGE_SIZE, with_exif, write_annotation, write_voc

import train_test
from data import config
from data.coco import COCODetection
from data.config import MOBILE_300, PRIORS
from data.voc0712 import VOCDetection
from demo.shapes import draw_image
from engine.options import parser
from engine.resolve import resolve
from layers import PriorBox
from tools import check as module
from tools import detect, weights
from tools import sheet as demo_sheet
from tools.check import best_overlaps, check, main, near_pairs, sheet
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
DOG = [("dog", (11, 11, 60, 60))]


def report_of(root, dataset="VOC", sizes=(300,), **given):
    options = resolve({"root": str(root), "dataset": dataset, **given}).plain()
    return check(options, sizes, workers=2)


def found(report, level=None):
    """what -> the texts of its records, of one level or of all."""
    return {
        (f.part, f.what): [r.text for r in f.records]
        for f in report.findings
        if level in (None, f.level)
    }


def run(root, tmp_path, *more):
    """(exit status, the JSON that the command wrote)."""
    out = tmp_path / "report.json"
    status = main(["--root", str(root), "--workers", "2", "--json", str(out), *more])
    return status, json.loads(out.read_text("utf-8"))


def add_coco(root, name, images=(), annotations=()):
    path = root / "annotations" / f"instances_{name}.json"
    document = json.loads(path.read_text())
    document["images"] += images
    document["annotations"] += [
        {"id": 100 + n, "iscrowd": 0, "category_id": 3, "area": 1, **a}
        for n, a in enumerate(annotations)
    ]
    path.write_text(json.dumps(document))


# ---------------------------------------------------------------- sound data


def test_sound_data_have_no_errors_and_are_counted(voc_folder, tmp_path, capsys):
    status, data = run(voc_folder, tmp_path)
    assert status == 0 and data["counts"]["error"] == 0
    assert data["sets"]["train"] == {"names": "trainval", "pictures": 6}
    assert data["classes"]["cell"] == {
        "train": {"boxes": 4, "pictures": 4},
        "test": {"boxes": 4, "pictures": 3},
    }
    assert data["classes"]["rod"]["train"] == {"boxes": 3, "pictures": 2}
    what = {f["what"]: (f["level"], f["records"]) for f in data["findings"]}
    assert what["pictures without an object"] == ("note", ["1 of 6 pictures"])
    assert what["class without a box to test on"] == ("note", ["platelet"])
    assert not [name for name in what if "picture that is" in name]
    out = capsys.readouterr().out
    assert re.search(r"^cell +4 +4 +4 +3$", out, re.MULTILINE)
    assert re.search(r"^0 errors, \d+ warnings?, 2 notes$", out, re.MULTILINE)


def test_the_number_of_threads_changes_nothing(voc_folder, tmp_path):
    first = run(voc_folder, tmp_path, "--workers", "1")
    assert run(voc_folder, tmp_path, "--workers", "5") == first


def test_a_devkit_has_the_published_sets_and_classes(voc_devkit):
    report = report_of(voc_devkit)
    assert len(report.parts["train"]) == 5 and len(report.parts["test"]) == 3
    assert len(report.classes) == 20
    assert "tvmonitor" in found(report)["train", "class without a box to train on"]


def test_a_test_split_without_truth_is_no_fault(coco_folder):
    (coco_folder / "val2017").rename(coco_folder / "test2017")
    path = coco_folder / "annotations" / "instances_val2017.json"
    path.rename(path.with_name("image_info_test-dev2017.json"))
    report = report_of(coco_folder, "COCO", test_sets="2017_test-dev")
    assert not found(report, "error")
    assert ("test", "class without a box to test on") not in found(report)


# ---------------------------------------------------------------- what a training stops at


def break_voc(root: Path) -> dict[str, Path]:
    """Damage one picture each, in every way; id -> the file that is at fault."""
    pictures, annotations = root / "JPEGImages", root / "Annotations"
    faults = {
        "no_xml": annotations / "no_xml.xml",
        "bad_xml": annotations / "bad_xml.xml",
        "bad_box": annotations / "bad_box.xml",
        "no_picture": pictures / "no_picture.jpg",
        "empty": pictures / "empty.jpg",
        "cut": pictures / "cut.jpg",
        "other_size": annotations / "other_size.xml",
        "turned": pictures / "turned.jpg",
        "unsized": pictures / "unsized.jpg",
    }
    samples = {name: DOG for name in ["fine", *faults]}
    write_voc(root, {"trainval": samples, "test": {"t1": DOG, "t2": DOG}})
    faults["no_xml"].unlink()
    faults["bad_xml"].write_text("<annotation>\n<object>")
    faults["bad_box"].write_text(faults["bad_box"].read_text().replace("<xmin>11", "<xmin>nan"))
    faults["no_picture"].unlink()
    faults["empty"].write_bytes(b"")
    faults["cut"].write_bytes(faults["cut"].read_bytes()[:-200])
    write_annotation(faults["other_size"], DOG, (200, 100))
    faults["turned"].write_bytes(with_exif(faults["turned"].read_bytes(), 6))
    faults["unsized"].write_bytes(b"no picture")
    write_annotation(annotations / "unsized.xml", DOG, None)
    return faults


def test_every_fault_of_a_folder_is_told_at_once(tmp_path):
    faults = break_voc(tmp_path / "own")
    status, data = run(tmp_path / "own", tmp_path)
    errors = [f for f in data["findings"] if f["level"] == "error"]
    assert status == 1
    assert [(f["part"], f["what"]) for f in errors] == [
        ("train", "record that a training stops at")
    ]
    texts = errors[0]["records"]
    assert len(texts) == data["counts"]["error"] == len(faults)
    for path in faults.values():
        assert sum(str(path) in text for text in texts) == 1, path
    # The boxes of six annotations can be read, and belong to a picture of a known size.
    assert data["classes"]["dog"]["train"]["boxes"] == 6
    assert len(data["classes"]) == 1


@pytest.mark.parametrize(
    "kept",
    [
        "no_xml",
        "bad_xml",
        "bad_box",
        "no_picture",
        "empty",
        "cut",
        "other_size",
        "turned",
        "unsized",
    ],
)
def test_a_fault_is_what_the_reader_refuses(tmp_path, kept):
    root = tmp_path / "own"
    faults = break_voc(root)
    (root / "ImageSets/Main/trainval.txt").write_text(f"fine\n{kept}\n")
    with pytest.raises(UserError) as error:
        data = VOCDetection(root, [(None, "trainval")])
        data.pull_image(1)
    (text,) = found(report_of(root), "error")["train", "record that a training stops at"]
    assert str(faults[kept].with_suffix("")) in text
    if not kept.startswith("no_"):  # these the reader counts for the whole set
        assert text == str(error.value)


def test_classes_that_are_left_out_unasked_are_worth_a_warning(coco_folder):
    """A test set may have a category that the training set does not know."""
    path = coco_folder / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["categories"] = document["categories"][:1]
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] == 3]
    path.write_text(json.dumps(document))
    what = ("test", "image set read without some of its classes")
    (text,) = found(report_of(coco_folder, "COCO"), "warning")[what]
    assert text == "instances_val2017.json: 1 of 2 classes, 1 of 2 boxes"
    assert what in found(report_of(coco_folder, "COCO", classes="thing"), "note")


def test_every_fault_of_a_coco_set_is_told_at_once(coco_folder, capsys):
    names = [coco_folder / "train2017" / f"{i:012d}.jpg" for i in (1, 2)]
    names[0].unlink()
    names[1].write_bytes(b"no picture")
    add_coco(coco_folder, "val2017", [{"id": 9, "file_name": "9.jpg", "width": 5, "height": 5}])
    cv2.imwrite(str(coco_folder / "val2017" / "9.jpg"), np.full((6, 7, 3), 90, np.uint8))
    with pytest.raises(UserError, match="1 of the 3 images"):
        COCODetection(coco_folder, [("2017", "train")])
    errors = found(report_of(coco_folder, "COCO"), "error")
    train = errors["train", "record that a training stops at"]
    assert [str(name) in text for name, text in zip(names, train, strict=True)] == [True, True]
    (test,) = errors["test", "record that a training stops at"]
    assert "9.jpg: the image is 7 x 6, but" in test


def test_an_image_set_that_is_missing_is_an_error_and_the_other_one_is_checked(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").unlink()
    report = report_of(voc_folder)
    (text,) = found(report, "error")["test", "image set that cannot be opened"]
    assert 'no image set "test"' in text and "image sets: trainval" in text
    assert list(report.parts) == ["train"] and report.fits


def test_data_without_an_object_or_a_picture_are_told(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": [], "b": []}, "test": {"c": []}})
    report = report_of(root)
    (text,) = found(report, "error")["train", "record that a training stops at"]
    assert "has no object of the classes (none)" in text
    assert report.fits == [] and main(["--root", str(root)]) == 1
    (root / "ImageSets/Main/trainval.txt").write_text("")
    assert "lists no image" in str(found(report_of(root), "error"))


def test_ids_in_two_years_cannot_be_scored(voc_devkit):
    shutil.copytree(voc_devkit / "VOC2007", voc_devkit / "VOC2009")
    report = report_of(voc_devkit, test_sets="2007_test,2009_test")
    (text,) = found(report, "error")["test", "image sets that cannot be scored"]
    assert "the same id" in text


# ---------------------------------------------------------------- orientation


def test_an_orientation_that_no_size_can_confirm_is_a_warning(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    paths = [root / "JPEGImages" / f"{name}.jpg" for name in "ab"]
    for path, orientation in zip(paths, (3, 1), strict=True):  # 3: upside down, 1: as it is
        path.write_bytes(with_exif(path.read_bytes(), orientation))
    turned = {k: v for k, v in found(report_of(root), "warning").items() if "EXIF" in k[1]}
    assert list(turned.values()) == [[str(paths[0])]]


def test_an_orientation_that_the_annotated_size_takes_part_in_is_none(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    path = root / "JPEGImages" / "a.jpg"
    path.write_bytes(with_exif(path.read_bytes(), 6))
    write_annotation(root / "Annotations" / "a.xml", DOG, VOC_IMAGE_SIZE[::-1])
    report = report_of(root)
    assert not found(report, "error") and "EXIF" not in str(found(report))


def test_a_coco_picture_that_is_read_as_stored_is_a_note(coco_folder, capfd):
    path = coco_folder / "train2017" / f"{1:012d}.jpg"
    path.write_bytes(with_exif(path.read_bytes(), 6))
    assert main(["--root", str(coco_folder), "-d", "COCO"]) == 0
    streams = capfd.readouterr()
    assert "note, train: picture that an EXIF orientation turns: read as stored" in streams.out
    assert streams.err == ""  # the reader's own warning is this finding


# ---------------------------------------------------------------- boxes and classes


def test_odd_boxes_and_names_are_told_by_reason(make_voc, tmp_path):
    objects = [
        ("dog", (11, 11, 60, 60)),
        ("dog", (20, 20, 20, 40)),  # without area
        ("dog", (200, 20, 220, 40)),  # outside
        ("dog", (60, 20, 99, 40)),  # clipped: the picture is 96 x 72
        ("cat", (5, 5, 30, 30)),  # unknown
    ]
    root = make_voc(tmp_path / "own", {"trainval": {"a": objects}, "test": {"c": DOG}})
    report = report_of(root, classes="dog,Dog")
    warnings, notes = found(report, "warning"), found(report, "note")
    for what, number in (
        ("box without area, dropped", 2),
        ("box outside the image, dropped", 3),
        ("object of an unknown class, dropped", 5),
    ):
        (text,) = warnings["train", what]
        assert f"a.xml: object {number}" in text
    assert "object 4" in notes["train", "box clipped to the image"][0]
    assert warnings["", "classes whose names differ in case or spaces alone"] == ["dog, Dog"]
    assert warnings["train", "class without a box to train on"] == ["Dog"]
    # The boxes of the sheet are those of the XML, counted from 0.
    boxes = [r.box for f in report.findings if f.what == "box without area, dropped"
             for r in f.records]  # fmt: skip
    assert boxes == [(19, 19, 19, 39)]


def test_a_box_is_tiny_if_augmentation_would_drop_it(make_voc, tmp_path):
    boxes = [(1, 1, 3.95, 50), (1, 1, 4, 50), (60, 1, 200, 4)]  # 2.95, 3 and 140 x 3 pixels
    objects = [("dog", box) for box in boxes]
    root = make_voc(
        tmp_path / "own", {"trainval": {"a": objects}, "test": {"c": DOG}}, size=(300, 300)
    )
    (text,) = found(report_of(root), "warning")[
        "train", "tiny box, a side under 1 % of the picture's (dropped unless a crop enlarges it)"
    ]
    assert text.endswith("a.jpg: dog, 2.95 x 49 in 300 x 300")


def test_tiny_boxes_of_a_test_are_not_dropped_and_no_fault(make_voc, tmp_path):
    parts = {"trainval": {"a": DOG}, "test": {"c": [("dog", (1, 1, 2, 50))]}}
    report = report_of(make_voc(tmp_path / "own", parts, size=(300, 300)))
    assert not [what for _, what in found(report) if "tiny" in what]


def test_odd_boxes_of_coco_are_told_with_their_place(coco_folder):
    add_coco(
        coco_folder,
        "train2017",
        annotations=[
            {"image_id": 2, "bbox": [300, 5, 10, 10]},
            {"image_id": 2, "bbox": [5, 5, 1, 10]},
            {"image_id": 3, "bbox": [90, 5, 20, 20]},
        ],
    )
    report = report_of(coco_folder, "COCO")
    records = {f.what: f.records for f in report.findings}
    (outside,) = records["box outside the image, dropped"]
    assert outside.pictures == (("train", 1),) and outside.box == (300, 5, 310, 15)
    assert len(records["box without area, dropped"]) == 1
    assert ("train", "box clipped to the image") in found(report, "note")


# ---------------------------------------------------------------- copies


def picture(seed: int, size=(320, 240)) -> np.ndarray:
    return draw_image(np.random.default_rng(seed), *size, 4)[0]


def copies_of(image: np.ndarray) -> dict[str, np.ndarray]:
    """What becomes of a picture that is exported again."""
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return {
        "compressed": cv2.imdecode(jpeg, cv2.IMREAD_COLOR),
        "halved": half,
        "square": cv2.resize(image, (416, 416)),
        "lighter": np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """24 drawn pictures to train on and 8 to test on, all different."""
    root = tmp_path_factory.mktemp("album")
    names = {"trainval": [f"a{i}" for i in range(24)], "test": [f"b{i}" for i in range(8)]}
    write_voc(root, {part: {name: DOG for name in of} for part, of in names.items()})
    for n, name in enumerate([*names["trainval"], *names["test"]]):
        put(root, name, picture(n))
    return root


def put(root, name, image, suffix=".jpg"):
    cv2.imwrite(str(root / "JPEGImages" / f"{name}{suffix}"), image)
    write_annotation(root / "Annotations" / f"{name}.xml", DOG, image.shape[1::-1])


def enlist(root, part, name):
    with open(root / "ImageSets/Main" / f"{part}.txt", "a") as file:
        file.write(f"{name}\n")


def copies(report):
    return {k: v for k, v in found(report).items() if "picture that is" in k[1]}


def test_different_pictures_are_no_copies(album):
    assert copies(report_of(album)) == {}


def test_equal_pixels_are_the_same_picture_whatever_the_file(album, tmp_path):
    root = Path(shutil.copytree(album, tmp_path / "own"))
    shutil.copy(root / "JPEGImages/a3.jpg", root / "JPEGImages/again.jpg")
    shutil.copy(root / "Annotations/a3.xml", root / "Annotations/again.xml")
    enlist(root, "trainval", "again")
    put(root, "leak", cv2.imread(str(root / "JPEGImages/a5.jpg")), ".png")  # other bytes
    enlist(root, "test", "leak")
    enlist(root, "test", "a7")  # the very file
    report = report_of(root)
    folder = root / "JPEGImages"
    assert copies(report) == {
        ("train", "picture that is there twice"): [f"{folder}/again.jpg = {folder}/a3.jpg"],
        ("", "test picture that is trained on"): [
            f"{folder}/leak.png = {folder}/a5.jpg",
            f"{folder}/a7.jpg = {folder}/a7.jpg",
        ],
    }
    assert ("", "test picture that is trained on") in found(report, "error")


@pytest.mark.parametrize("part", ["trainval", "test"])
def test_near_copies_are_found_and_only_they(album, tmp_path, part):
    root = Path(shutil.copytree(album, tmp_path / "own"))
    wanted = []
    for n, name in enumerate(copies_of(picture(4))):
        source = cv2.imread(str(root / f"JPEGImages/a{4 + n}.jpg"))
        put(root, name, copies_of(source)[name])
        enlist(root, part, name)
        wanted.append(f"{root}/JPEGImages/{name}.jpg ~ {root}/JPEGImages/a{4 + n}.jpg")
    key = ("train", "picture that is nearly another one")
    if part == "test":
        key = ("", "test picture that is nearly a training picture")
    report = report_of(root)
    (texts,) = copies(report).values()
    assert copies(report).keys() == {key} and key in found(report, "warning")
    assert sorted(texts) == sorted(wanted)


def test_plain_pictures_are_not_compared(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    for name, grey in (("a", 40), ("b", 200), ("c", 120)):
        put(root, name, np.full((72, 96, 3), grey, np.uint8), ".jpg")
    assert copies(report_of(root)) == {}


def slow_near_pairs(queries, keys, earlier=False):
    """Every query's nearest key at 16 x 16 among those at which all three measures are small."""

    def normalised(pictures):
        flat = pictures.reshape(len(pictures), -1).astype(float)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / np.maximum(flat.std(1, keepdims=True), 4.0)

    def views(pictures):
        cells = pictures.astype(float).reshape(-1, 16, 2, 16, 2).mean((2, 4))
        return normalised(cells), normalised(pictures)

    (coarse, fine), (key_coarse, key_fine) = views(queries), views(keys)
    pairs = []
    for i in range(len(queries)):
        distance = np.sqrt(((key_coarse - coarse[i]) ** 2).mean(1))
        apart = np.abs(key_fine - fine[i])
        near = (distance <= 0.2) & (np.sqrt((apart**2).mean(1)) <= 0.25) & (apart.max(1) <= 1.5)
        near[i if earlier else len(keys) :] = False
        if near.any():
            pairs.append((i, int(np.where(near, distance, np.inf).argmin())))
    return pairs


@pytest.mark.parametrize("block", [module.PRODUCTS, 1000])
def test_near_pairs_are_those_of_a_slow_search(monkeypatch, block):
    monkeypatch.setattr(module, "PRODUCTS", block)
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (80, 6, 6), np.uint8)
    keys = np.stack([cv2.resize(p, (32, 32), interpolation=cv2.INTER_CUBIC) for p in rough])
    noise = rng.normal(0, rng.uniform(2, 30, (60, 1, 1)), (60, 32, 32))
    queries = np.clip(keys[rng.integers(0, 80, 60)] + noise, 0, 255).astype(np.uint8)
    wanted = slow_near_pairs(queries, keys)
    assert 15 < len(wanted) < 55
    assert list(near_pairs(queries, keys)) == wanted
    both = np.concatenate([keys, queries])
    assert list(near_pairs(both, both, earlier=True)) == slow_near_pairs(both, both, True)


def test_a_key_that_is_near_at_16_x_16_alone_hides_none_behind_it():
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    query = (127 + 60 * np.sin(x / 5) * np.cos(y / 7)).astype(np.uint8)
    fine = np.where((x + y) % 2, 30, -30)  # a mean of 0 over 2 x 2
    other = (query + fine).astype(np.uint8)
    copy = np.clip(query + rng.normal(0, 3, query.shape), 0, 255).astype(np.uint8)
    keys = np.stack([*[other] * 70, copy])  # more than are compared at once
    assert list(near_pairs(query[None], keys[:70])) == []
    assert list(near_pairs(query[None], keys)) == [(0, 70)]


def test_near_pairs_of_nothing_are_none():
    none, one = np.zeros((0, 32, 32), np.uint8), np.arange(1024, dtype=np.uint8).reshape(1, 32, 32)
    assert list(near_pairs(none, one)) == list(near_pairs(one, none)) == []
    assert list(near_pairs(one, one, earlier=True)) == []


# ---------------------------------------------------------------- prior boxes


def literal_best(config, box):
    """The best IoU over all prior boxes, one by one in plain numbers."""
    x1, y1, x2, y2 = box
    best = 0.0
    for cx, cy, w, h in PriorBox(config)().tolist():
        left, top, right, bottom = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        width, height = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
        if width > 0 and height > 0:
            shared = width * height
            best = max(best, shared / ((x2 - x1) * (y2 - y1) + w * h - shared))
    return best


@pytest.mark.parametrize(
    "config", [*PRIORS.values(), MOBILE_300], ids=lambda c: f"{c.min_sizes[0]}"
)
def test_best_overlaps_are_those_of_a_literal_loop(config):
    rng = np.random.default_rng(config.size)
    sides = np.exp(rng.uniform(np.log(0.005), 0, (12, 2)))
    low = rng.uniform(0, 1 - sides)
    edges = [[0, 0, 0.01, 0.01], [0.98, 0.97, 1, 1], [0, 0, 1, 1], [0.5, 0, 0.5, 1]]
    boxes = np.concatenate([np.hstack([low, low + sides]), edges])
    literal = [literal_best(config, box) for box in boxes]
    np.testing.assert_allclose(best_overlaps(config, boxes), literal, atol=1e-6)


def test_no_boxes_have_no_overlaps():
    assert best_overlaps(PRIORS["VOC", 300], np.zeros((0, 4))).shape == (0,)


@pytest.fixture(scope="module")
def small_objects(tmp_path_factory):
    """16 x 16 pixel grains and 80 x 80 pixel stones in pictures of 300 x 300."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    samples = {}
    for n in range(12):
        corners = rng.integers(1, 200, (6, 2))
        objects = [("grain", (x, y, x + 16, y + 16)) for x, y in corners[:5].tolist()]
        x, y = corners[5].tolist()
        samples[f"s{n}"] = [*objects, ("stone", (x, y, x + 80, y + 80))]
    parts = {"trainval": samples, "test": {f"t{n}": DOG for n in range(2)}}
    write_voc(root, parts, size=(300, 300))
    return root


def test_the_share_of_boxes_is_that_of_a_literal_count(small_objects):
    report = report_of(small_objects, classes="grain,stone,dog")
    data = VOCDetection(small_objects, [(None, "trainval")], classes=["grain", "stone"])
    targets = np.concatenate([data.target(i) for i in range(len(data))])
    priors = PRIORS["VOC", 300]
    fits = {(f["class"], f["priors"]): f for f in report.fits}
    for label, name in enumerate(data.classes, 1):
        boxes = targets[targets[:, 4] == label, :4] / 300
        literal = np.array([literal_best(priors, box) for box in boxes[:12]])
        # the same for all: the fast routine has its own test
        np.testing.assert_allclose(best_overlaps(priors, boxes[:12]), literal, atol=1e-6)
        best = best_overlaps(priors, boxes)
        fit = fits[name, "VOC"]
        assert fit["boxes"] == len(boxes) and fit["claimed"] == int((best < 0.5).sum())
        assert fit["share"] == (best >= 0.5).mean() and fit["mean"] == pytest.approx(best.mean())
    assert fits["grain", "VOC"]["share"] == 0  # at best 256 / 900 of the smallest prior box
    assert fits["stone", "VOC"]["share"] == 1
    warnings = found(report, "warning")
    (text,) = warnings["train", "class that fits the prior boxes badly at 300 (IoU 0.5)"]
    assert text.startswith("grain: 0% of 60 boxes")


def test_advice_reaches_what_it_says(small_objects):
    report = report_of(small_objects, sizes=(300, 512), classes="grain,stone,dog")
    assert report.advice[0].startswith("At 300, of the 60 boxes of grain, 0.0% reach an IoU of 0.5")
    assert "16 to 16 px large" in report.advice[0]
    data = report.parts["train"]
    targets = np.concatenate([data.target(i) for i in range(len(data))])
    grains = targets[targets[:, 4] == 1, :4] / 300
    shares = []
    for line in report.advice[1:]:
        change, share = re.fullmatch(r"  (.*): ([\d.]+)% \([\d.]+% of all boxes\)", line).groups()
        if change == "-s 512":
            preset = PRIORS["VOC", 512]
        else:
            name, code = re.fullmatch(r"(VOC_300) = (.*) in data/config.py", change).groups()
            preset = eval(code, dict(vars(config)))
            assert name == "VOC_300" and preset.feature_maps == PRIORS["VOC", 300].feature_maps
        shares.append(float(share))
        assert 100 * (best_overlaps(preset, grains) >= 0.5).mean() == pytest.approx(
            shares[-1], abs=0.06
        )
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and shares[0] > 90


def test_whose_prior_boxes_are_judged_can_be_chosen(small_objects):
    texts = {
        name: str(found(report_of(small_objects, priors=name, classes="grain,stone,dog")))
        for name in ("VOC", "COCO")
    }
    assert "grain: 0% of 60" in texts["VOC"] and "grain: 0% of 60" not in texts["COCO"]


# ---------------------------------------------------------------- the sheet


class Page(html.parser.HTMLParser):
    """Which tags there are, that they are closed, and all text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_sheet_is_one_file_with_the_pictures_and_names_are_escaped(make_voc, tmp_path):
    name = "<b>&amp;"
    objects = [(name.replace("&", "&amp;").replace("<", "&lt;"), (20, 20, 20, 40)), *DOG]
    root = make_voc(
        tmp_path / "own", {"trainval": {"a": objects, "b": DOG, "c": DOG}, "test": {"d": DOG}}
    )
    (root / "JPEGImages/b.jpg").write_bytes(b"no picture")
    shutil.copy(root / "JPEGImages/c.jpg", root / "JPEGImages/d.jpg")
    page = Page(sheet(report_of(root)))
    assert page.open == [] and "script" not in page.tags and page.tags.count("b") == 1
    assert any(name in text for text in page.texts)
    sources = [value for key, value in page.attributes if key in ("src", "href")]
    # The box without area, the leak (two pictures); the unreadable one has none.
    assert len(sources) >= 3
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    text = sheet(report_of(root))
    assert "prefers-color-scheme: dark" in text and "http" not in text


def test_the_sheet_marks_the_odd_box(tmp_path, make_voc):
    import base64

    objects = [("dog", (60, 20, 140, 60)), *DOG]  # clipped at 96
    root = make_voc(tmp_path / "own", {"trainval": {"a": objects}, "test": {"c": DOG}})
    report = report_of(root)
    report.findings = [f for f in report.findings if f.what == "box clipped to the image"]
    (data,) = re.findall(r"base64,([^\"]+)", sheet(report))
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (72, 96, 3)
    blue, green, red = image[:, 57:61].astype(int).mean(1).mean(0)
    assert red > green + 20  # the left side of the box, x = 59


# ---------------------------------------------------------------- the command


def test_warnings_count_if_strict(voc_folder, tmp_path):
    path = voc_folder / "Annotations" / "b2.xml"
    write_annotation(path, [("cell", (20, 20, 20, 40)), ("cell", (5, 5, 60, 60))])
    assert run(voc_folder, tmp_path)[0] == 0
    assert run(voc_folder, tmp_path, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "nowhere"], "no such data set folder"),
        (["--train_sets", ","], "names no image set"),
        (["--classes", "a,a"], "class names must be unique"),
        (["--json", "/proc/none/x.json"], "cannot be written"),
        (["--html", "/proc/none/x.html"], "cannot be written"),
    ],
)
def test_bad_usage_ends_with_2_and_a_sentence(voc_folder, words, message, capsys):
    assert main(["--root", str(voc_folder), *words]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and message in streams.err


@pytest.mark.parametrize("words", [["--size", "301"], ["-d", "KITTI"], ["--workers", "0"], ["--x"]])
def test_an_unknown_value_ends_with_2(words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


def test_an_interrupt_ends_with_130(voc_folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_look_at", interrupt)
    assert main(["--root", str(voc_folder)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def run_apart(root, *more, encoding="ascii"):
    words = [sys.executable, "-m", "tools.check", "--root", root, "--size", "300", *more]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True)


def test_names_beyond_the_encoding_of_the_output_are_told(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"é漢": DOG}, "test": {"c": DOG}})
    (root / "JPEGImages/é漢.jpg").write_bytes(b"no picture")
    done = run_apart(root)
    assert done.returncode == 1 and done.stderr == b""
    assert rb"\xe9\u6f22.jpg" in done.stdout and b"\n1 error, " in done.stdout
    assert "é漢.jpg" in run_apart(root, encoding="utf-8").stdout.decode("utf-8")


def test_a_folder_whose_name_is_no_text_is_checked(make_voc, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/own\xff")
    root = make_voc(tmp_path / "plain", {"trainval": {"a": DOG}, "test": {"c": DOG}})
    try:
        root = root.rename(name)
    except OSError:
        pytest.skip("this file system has no such names")
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    done = run_apart(root, "--json", out, "--html", page, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == b"" and rb"own\udcff" in done.stdout
    assert json.loads(out.read_text("utf-8"))["root"] == name and page.stat().st_size


def test_options_are_spelt_as_those_of_training():
    training = parser()
    words = ["--root", "R", "-d", "COCO", "--train_sets", "a", "--test_sets", "b", "--classes", "c"]
    ours = vars(module.parse(words))
    theirs = vars(training.parse_args(words))
    assert {key: ours[key] for key in theirs} == theirs


# ---------------------------------------------------------------- the page


PAGE = (ROOT / "docs" / "own_data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line) for b in BLOCKS for line in b.splitlines() if line.startswith("python ")
]
SMALL = ["--max_iters", "1", "-b", "2", "--num_workers", "0", "--device", "cpu", "--amp", "off"]


def test_lists_are_made_as_described(voc_folder, tmp_path):
    (block,) = (b for b in BLOCKS if b.startswith("mkdir"))
    names = [f"p{i}" for i in range(11)]
    (tmp_path / "FOLDER" / "Annotations").mkdir(parents=True)
    for name in names:
        (tmp_path / "FOLDER" / "Annotations" / f"{name}.xml").touch()
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    sets = tmp_path / "FOLDER" / "ImageSets" / "Main"
    train, test = ((sets / f"{name}.txt").read_text().split() for name in ("trainval", "test"))
    assert len(test) == 2 and sorted(train + test) == sorted(names)


def test_the_commands_of_the_page_are_known():
    """A command that is added to the page must be added here, too."""
    assert [c[1:4] for c in COMMANDS] == [
        ["-m", "tools.check", "--root"],
        ["-m", "tools.check", "-d"],
        ["train_test.py", "-d", "VOC"],
        ["train_test.py", "-d", "COCO"],
        ["train_test.py", "-d", "VOC"],
        ["train_test.py", "--test", "weights/SSD_HarDNet68_300/RUN/Final_SSD_HarDNet68_VOC.pth"],
        ["-m", "tools.sheet", "weights/SSD_HarDNet68_300/RUN"],
        ["-m", "tools.weights", "convert"],
        ["-m", "tools.detect", "detector.safetensors"],
    ]


def test_the_page_runs_as_written(voc_folder, coco_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_voc, check_coco, train_voc, train_coco, learn, *after = (c[2:] for c in COMMANDS)
    voc_folder.rename("FOLDER")
    assert main(check_voc[1:]) == 0 and Path("check.html").stat().st_size > 1000
    assert train_test.main([*train_voc, *SMALL]) == 0
    (directory,) = Path("weights/SSD_HarDNet68_300").iterdir()
    test, draw, slim, use = (
        [word.replace("/RUN", f"/{directory.name}") for word in words] for words in after
    )
    assert train_test.main([*test, "--num_workers", "0", "--device", "cpu"]) == 0
    assert demo_sheet.main(draw[1:]) == 0
    assert (Path(draw[1]) / "ss_predict/Final_SSD_HarDNet68_VOC/test/detections.png").exists()
    assert weights.main(slim[1:]) == 0
    Path("FOLDER/JPEGImages").rename(use[-1])
    assert detect.main(use[1:]) == 0
    Path(use[-1]).rename("FOLDER/JPEGImages")
    learn[learn.index("--overfit") + 1] = "2"  # there are no eight
    assert train_test.main([*learn, *SMALL]) == 0

    shutil.rmtree("FOLDER")
    coco_folder.rename("FOLDER")
    for name in ("train", "val"):
        Path(f"FOLDER/{name}2017").rename(f"FOLDER/{name}")
        path = Path(f"FOLDER/annotations/instances_{name}2017.json")
        path.rename(path.with_name(f"instances_{name}.json"))
    assert main(check_coco[1:]) == 0
    assert train_test.main([*train_coco, *SMALL]) == 0


def test_links_of_the_page_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
