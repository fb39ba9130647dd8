"""`python -m tools.check`: it tells every fault at once, and the fit of prior boxes is right."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import VOC_IMAGE_SIZE, with_exif, write_annotation, write_voc
from tiny import TINY

import train_test
from data import DATASETS, config
from data.coco import COCODetection
from data.config import MOBILE_300, PRIORS
from data.skips import SkipKind
from data.voc0712 import VOCDetection
from demo.shapes import draw_image
from engine.options import OPTIONS
from engine.resolve import resolve
from layers import PriorBox
from layers.boxes import iou
from models import BACKBONES
from tools import check as module
from tools import detect, image_check, weights
from tools import sheet as sheet_command
from tools.check import check, main
from tools.findings import BOTH, Report
from tools.image_check import near_pairs
from tools.page import check_page
from tools.prior_fit import best_overlaps
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
DOG = [("dog", (11, 11, 60, 60))]


def report_of(root: Path, *words: str) -> Report:
    given = module.parse(["--root", str(root), "-s", "300", *words])
    sizes = tuple(given.pop("size"))
    return check(resolve(given), sizes)


def found(report: Report, level: str | None = None) -> dict:
    """(part, what) -> the texts of its records, of one level or of all."""
    return {
        (f.part, f.what): [record.text for record in f.records]
        for f in report.findings
        if level in (None, f.level)
    }


def errors_of(report: Report, part: str) -> list[str]:
    return found(report, "error")[part, "record that training stops at"]


def run(root: Path, tmp_path: Path, *words: str) -> tuple[int, dict]:
    """(exit status, the JSON that the command wrote)."""
    out = tmp_path / "report.json"
    return main(["--root", str(root), "--json", str(out), *words]), json.loads(out.read_text())


def rewrite_coco(root: Path, name: str, change) -> None:
    path = root / "annotations" / f"instances_{name}.json"
    document = json.loads(path.read_text())
    change(document)
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
    assert what["images without an object"] == ("note", ["1 of 6 images"])
    assert what["class without a box to test on"] == ("note", ["platelet"])
    assert not [name for name in what if "image that is" in name]
    assert {(fit["class"], fit["priors"], fit["size"]) for fit in data["fits"]} == {
        (name, *key) for name in data["classes"] for key in PRIORS
    }
    out = capsys.readouterr().out
    assert re.search(r"^cell +4 +4 +4 +3$", out, re.MULTILINE)
    assert re.search(r"^0 errors, \d+ warnings?, 2 notes$", out, re.MULTILINE)


def test_a_devkit_has_the_published_sets_and_classes(voc_devkit):
    report = report_of(voc_devkit)
    assert [len(report.parts[part].sizes) for part in ("train", "test")] == [5, 3]
    assert len(report.classes) == 20
    assert "tvmonitor" in found(report)["train", "class without a box to train on"]


def test_a_data_set_with_a_row_of_its_own_is_checked(voc_folder, monkeypatch):
    monkeypatch.setitem(DATASETS, "MINE", replace(DATASETS["VOC"], priors="COCO"))
    report = report_of(voc_folder, "-d", "MINE")
    assert report.options.priors == "COCO" and report.fits and not found(report, "error")


def test_a_test_split_without_truth_is_no_fault(coco_folder):
    (coco_folder / "val2017").rename(coco_folder / "test2017")
    path = coco_folder / "annotations" / "instances_val2017.json"
    path.rename(path.with_name("image_info_test-dev2017.json"))
    report = report_of(coco_folder, "-d", "COCO", "--test_sets", "2017_test-dev")
    assert not found(report, "error")
    assert ("test", "class without a box to test on") not in found(report)


# ---------------------------------------------------------------- what training stops at


def break_voc(root: Path) -> dict[str, Path]:
    """Damage one image each, in every way; id -> the file that is at fault."""
    annotations, images = root / "Annotations", root / "JPEGImages"
    in_xml = ("no_xml", "bad_xml", "bad_box", "other_size")
    in_image = ("no_image", "empty", "cut", "turned", "unsized")
    faults = {name: annotations / f"{name}.xml" for name in in_xml}
    faults |= {name: images / f"{name}.jpg" for name in in_image}
    samples = {name: DOG for name in ["fine", *faults]}
    write_voc(root, {"trainval": samples, "test": {"t1": DOG, "t2": DOG}})
    faults["no_xml"].unlink()
    faults["bad_xml"].write_text("<annotation>\n<object>")
    faults["bad_box"].write_text(faults["bad_box"].read_text().replace("<xmin>11", "<xmin>nan"))
    faults["no_image"].unlink()
    faults["empty"].write_bytes(b"")
    faults["cut"].write_bytes(faults["cut"].read_bytes()[:-200])
    write_annotation(faults["other_size"], DOG, (200, 100))
    faults["turned"].write_bytes(with_exif(faults["turned"].read_bytes(), 6))
    faults["unsized"].write_bytes(b"no image")
    write_annotation(annotations / "unsized.xml", DOG, None)
    return faults


def test_every_fault_of_a_folder_is_told_at_once_as_the_reader_tells_it(tmp_path):
    root = tmp_path / "own"
    faults = break_voc(root)
    status, data = run(root, tmp_path)
    (errors,) = (f for f in data["findings"] if f["level"] == "error")
    assert (status, errors["part"], data["counts"]["error"]) == (1, "train", len(faults))
    # The boxes of six annotations can be read, and belong to an image of a known size.
    assert data["classes"] == {
        "dog": {"train": {"boxes": 6, "pictures": 6}, "test": {"boxes": 2, "pictures": 2}}
    }
    for name, path in faults.items():
        (text,) = (text for text in errors["records"] if str(path) in text)
        (root / "ImageSets/Main/trainval.txt").write_text(f"fine\n{name}\n")
        with pytest.raises(UserError) as error:
            VOCDetection(root, [(None, "trainval")]).pull_image(1)
        # The reader counts missing files for the whole set.
        assert text == str(error.value) or name.startswith("no_")


def test_every_fault_of_a_coco_set_is_told_at_once(coco_folder):
    names = [coco_folder / "train2017" / f"{i:012d}.jpg" for i in (1, 2)]
    names[0].unlink()
    names[1].write_bytes(b"no image")
    larger = {"id": 9, "file_name": "9.jpg", "width": 5, "height": 5}
    rewrite_coco(coco_folder, "val2017", lambda document: document["images"].append(larger))
    cv2.imwrite(str(coco_folder / "val2017" / "9.jpg"), np.full((6, 7, 3), 90, np.uint8))
    with pytest.raises(UserError, match="1 of the 3 "):
        COCODetection(coco_folder, [("2017", "train")])
    report = report_of(coco_folder, "-d", "COCO")
    train, (test,) = errors_of(report, "train"), errors_of(report, "test")
    assert [str(name) in text for name, text in zip(names, train, strict=True)] == [True, True]
    assert "9.jpg" in test and "7 x 6" in test and "5 x 5" in test


def test_an_image_set_that_is_missing_is_an_error_and_the_other_one_is_checked(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").unlink()
    report = report_of(voc_folder)
    (text,) = found(report, "error")["test", "image set that cannot be opened"]
    assert '"test"' in text and "trainval" in text
    assert list(report.parts) == ["train"] and report.fits


def test_data_without_an_object_or_an_image_are_told(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": [], "b": []}, "test": {"c": []}})
    report = report_of(root)
    (text,) = errors_of(report, "train")
    assert str(root) in text and "no object" in text
    assert report.fits == [] and main(["--root", str(root)]) == 1
    (root / "ImageSets/Main/trainval.txt").write_text("")
    assert "lists no image" in str(found(report_of(root), "error"))


def test_ids_in_two_years_cannot_be_scored(voc_devkit):
    shutil.copytree(voc_devkit / "VOC2007", voc_devkit / "VOC2009")
    report = report_of(voc_devkit, "--test_sets", "2007_test,2009_test")
    (text,) = found(report, "error")["test", "image sets that cannot be scored"]
    assert "same id" in text


@pytest.mark.parametrize(
    ("orientation", "size", "doubtful"),
    [(3, VOC_IMAGE_SIZE, True), (1, VOC_IMAGE_SIZE, False), (6, VOC_IMAGE_SIZE[::-1], False)],
    ids=["upside down", "as it is", "turned as annotated"],
)
def test_an_orientation_that_no_size_can_confirm_is_a_warning(
    make_voc, tmp_path, orientation, size, doubtful
):
    root = make_voc(tmp_path / "own", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    path = root / "JPEGImages" / "a.jpg"
    path.write_bytes(with_exif(path.read_bytes(), orientation))
    write_annotation(root / "Annotations" / "a.xml", DOG, size)
    report = report_of(root)
    turned = [texts for (_, what), texts in found(report, "warning").items() if "EXIF" in what]
    assert turned == ([[str(path)]] if doubtful else []) and not found(report, "error")


# ---------------------------------------------------------------- boxes and classes


def test_what_a_voc_reader_drops_is_told_with_its_place(make_voc, tmp_path):
    objects = [
        ("dog", (11, 11, 60, 60)),
        ("dog", (20, 20, 20, 40)),  # without area
        ("dog", (200, 20, 220, 40)),  # outside
        ("dog", (60, 20, 99, 40)),  # clipped: the image is 96 x 72
        ("cat", (5, 5, 30, 30)),  # unknown
    ]
    root = make_voc(tmp_path / "own", {"trainval": {"a": objects}, "test": {"c": DOG}})
    report = report_of(root, "--classes", "dog,Dog")
    told = {f.what: (f.level, f.records) for f in report.findings if f.part == "train"}
    for kind, level, number, box in (
        (SkipKind.BOX_WITHOUT_AREA, "warning", 2, (19, 19, 19, 39)),
        (SkipKind.BOX_OUTSIDE, "warning", 3, (199, 19, 219, 39)),
        (SkipKind.BOX_CLIPPED, "note", 4, (59, 19, 98, 39)),
        (SkipKind.UNKNOWN_CLASS, "warning", 5, (4, 4, 29, 29)),
    ):
        found_level, (record,) = told[kind.text]
        assert (found_level, record.images, record.box) == (level, (("train", 0),), box)
        assert "a.xml" in record.text and f"object {number}" in record.text
    warnings = found(report, "warning")
    assert warnings[BOTH, "classes whose names differ in case or spaces alone"] == ["dog, Dog"]
    assert warnings["train", "class without a box to train on"] == ["Dog"]


def test_classes_that_are_left_out_unasked_are_worth_a_warning(coco_folder):
    """A test set may have a category that the training set does not know."""

    def forget(document):
        document["categories"] = document["categories"][:1]
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] == 3]

    rewrite_coco(coco_folder, "train2017", forget)
    what = ("test", SkipKind.CLASSES_LEFT_OUT.text)
    (text,) = found(report_of(coco_folder, "-d", "COCO"), "warning")[what]
    assert "instances_val2017.json" in text and "1 of 2 classes" in text
    assert what in found(report_of(coco_folder, "-d", "COCO", "--classes", "thing"), "note")


def test_a_training_box_is_tiny_if_augmentation_would_drop_it(make_voc, tmp_path):
    boxes = [(1, 1, 3.95, 50), (1, 1, 4, 50), (60, 1, 200, 4)]  # 2.95, 3 and 140 x 3 pixels
    objects = [("dog", box) for box in boxes]
    sets = {"trainval": {"a": [*objects, *DOG]}, "test": {"b": objects}}
    report = report_of(make_voc(tmp_path / "own", sets, size=(300, 300)))
    tiny = [texts for (_, what), texts in found(report, "warning").items() if "tiny" in what]
    assert tiny == [[f"{tmp_path}/own/JPEGImages/a.jpg: dog, 2.95 x 49 in 300 x 300"]]


# ---------------------------------------------------------------- copies


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """8 drawn images to train on and 3 to test on, all different."""
    root = tmp_path_factory.mktemp("album")
    names = {"trainval": [f"a{i}" for i in range(8)], "test": [f"b{i}" for i in range(3)]}
    write_voc(root, {part: {name: DOG for name in of} for part, of in names.items()})
    for n, name in enumerate([*names["trainval"], *names["test"]]):
        put(root, name, draw_image(np.random.default_rng(n), 320, 240, 4)[0])
    return root


def put(root, name, image, suffix=".jpg"):
    cv2.imwrite(str(root / "JPEGImages" / f"{name}{suffix}"), image)
    write_annotation(root / "Annotations" / f"{name}.xml", DOG, image.shape[1::-1])


def enlist(root, part, name):
    with open(root / "ImageSets/Main" / f"{part}.txt", "a") as file:
        file.write(f"{name}\n")


def copies(report):
    return {k: v for k, v in found(report).items() if "image that is" in k[1]}


def test_equal_pixels_are_the_same_image_whatever_the_file(album, tmp_path):
    root = Path(shutil.copytree(album, tmp_path / "own"))
    shutil.copy(root / "JPEGImages/a3.jpg", root / "JPEGImages/again.jpg")
    shutil.copy(root / "Annotations/a3.xml", root / "Annotations/again.xml")
    enlist(root, "trainval", "again")
    put(root, "leak", cv2.imread(str(root / "JPEGImages/a5.jpg")), ".png")  # other bytes
    enlist(root, "test", "leak")
    enlist(root, "test", "a7")  # the very file
    report = report_of(root)
    folder = root / "JPEGImages"
    leaks = [f"{folder}/leak.png = {folder}/a5.jpg", f"{folder}/a7.jpg = {folder}/a7.jpg"]
    assert copies(report) == {
        ("train", "image that is there twice"): [f"{folder}/again.jpg = {folder}/a3.jpg"],
        (BOTH, "test image that is trained on"): leaks,
    }
    assert found(report, "error") == {(BOTH, "test image that is trained on"): leaks}


@pytest.mark.parametrize("part", ["trainval", "test"])
def test_near_copies_are_found_and_only_they(album, tmp_path, part):
    root = Path(shutil.copytree(album, tmp_path / "own"))
    changes = {
        "compressed": lambda image: cv2.imdecode(
            cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR
        ),
        "halved": lambda image: cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA),
        "square": lambda image: cv2.resize(image, (416, 416)),
        "lighter": lambda image: np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8),
    }
    for n, (name, change) in enumerate(changes.items()):
        put(root, name, change(cv2.imread(str(root / f"JPEGImages/a{n}.jpg"))))
        enlist(root, part, name)
    folder = root / "JPEGImages"
    texts = [f"{folder}/{name}.jpg ~ {folder}/a{n}.jpg" for n, name in enumerate(changes)]
    report, key = report_of(root), ("train", "image that is nearly another one")
    if part == "test":
        key = (BOTH, "test image that is nearly a training image")
    assert copies(report) == {key: texts} and key in found(report, "warning")


def test_plain_images_are_not_compared(make_voc, tmp_path):
    root = make_voc(tmp_path / "own", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    for name, grey in (("a", 40), ("b", 200), ("c", 120)):
        put(root, name, np.full((72, 96, 3), grey, np.uint8))
    assert copies(report_of(root)) == {}


def slow_near_pairs(queries, keys, earlier=False):
    """Every query's nearest key at 16 x 16 among those at which all three measures are small."""

    def normalised(images):
        flat = images.reshape(len(images), -1).astype(float)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / np.maximum(flat.std(1, keepdims=True), 4.0)

    def views(images):
        cells = images.astype(float).reshape(-1, 16, 2, 16, 2).mean((2, 4))
        return normalised(cells), normalised(images)

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


@pytest.mark.parametrize("products", [image_check.PRODUCTS, 1000])
def test_near_pairs_are_those_of_a_slow_search(monkeypatch, products):
    monkeypatch.setattr(image_check, "PRODUCTS", products)
    rng = np.random.default_rng(0)
    rough = rng.integers(40, 216, (80, 6, 6), np.uint8)
    keys = np.stack([cv2.resize(p, (32, 32), interpolation=cv2.INTER_CUBIC) for p in rough])
    noise = rng.normal(0, rng.uniform(2, 30, (60, 1, 1)), (60, 32, 32))
    queries = np.clip(keys[rng.integers(1, 80, 60)] + noise, 0, 255).astype(np.uint8)
    # Equal to the first key at 16 x 16, and more of them than are compared at once.
    checks = np.where(np.indices((32, 32)).sum(0) % 2, 30, -30)
    decoys = np.repeat(keys[:1] + checks, 70, axis=0).clip(0, 255).astype(np.uint8)
    keys, queries = np.concatenate([decoys, keys]), np.concatenate([keys[:1] + 1, queries])
    wanted = slow_near_pairs(queries, keys)
    assert wanted[0] == (0, 70) and 15 < len(wanted) < 55
    assert list(near_pairs(queries, keys)) == wanted
    both = np.concatenate([keys[70:], queries])
    assert list(near_pairs(both, both, earlier=True)) == slow_near_pairs(both, both, True)
    assert list(near_pairs(keys[:0], keys)) == list(near_pairs(keys, keys[:0])) == []


# ---------------------------------------------------------------- prior boxes


def slow_best(config, boxes):
    """The best IoU over all prior boxes, by the IoU that training matches with."""
    centre, size = PriorBox(config)().double().split(2, 1)
    priors = torch.cat([centre - size / 2, centre + size / 2], 1)
    return iou(torch.from_numpy(boxes), priors).amax(1).numpy()


@pytest.mark.parametrize(
    "config", [*PRIORS.values(), MOBILE_300], ids=lambda c: f"{c.min_sizes[0]}"
)
def test_best_overlaps_are_those_of_all_prior_boxes(config):
    rng = np.random.default_rng(config.size)
    sides = np.exp(rng.uniform(np.log(0.005), 0, (50, 2)))
    low = rng.uniform(0, 1 - sides)
    edges = [[0, 0, 0.01, 0.01], [0.98, 0.97, 1, 1], [0, 0, 1, 1], [0.5, 0, 0.5, 1]]
    boxes = np.concatenate([np.hstack([low, low + sides]), edges])
    np.testing.assert_allclose(best_overlaps(config, boxes), slow_best(config, boxes), atol=1e-6)
    assert best_overlaps(config, boxes[:0]).shape == (0,)


@pytest.fixture(scope="module")
def small_objects(tmp_path_factory):
    """A report on 16 x 16 pixel grains and 80 x 80 pixel stones in images of 300 x 300."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    samples = {}
    for n in range(12):
        corners = rng.integers(1, 200, (6, 2))
        objects = [("grain", (x, y, x + 16, y + 16)) for x, y in corners[:5].tolist()]
        x, y = corners[5].tolist()
        samples[f"s{n}"] = [*objects, ("stone", (x, y, x + 80, y + 80))]
    write_voc(root, {"trainval": samples, "test": {"t": DOG}}, size=(300, 300))
    return report_of(root, "--classes", "grain,stone,dog", "-s", "300", "512")


def test_the_share_of_boxes_is_that_of_a_slow_count(small_objects):
    part = small_objects.parts["train"]
    for fit in small_objects.fits:
        own = part.boxes[part.labels == ("grain", "stone").index(fit.name) + 1] / 300
        best = slow_best(PRIORS[fit.priors, fit.size], own)
        assert fit.boxes == len(own) and fit.claimed == (best < 0.5).sum()
        assert fit.share == (best >= 0.5).mean() and fit.mean == pytest.approx(best.mean())
    shares = {(f.name, f.priors, f.size): f.share for f in small_objects.fits}
    assert shares["grain", "VOC", 300] == 0  # at best 256 / 900 of the smallest prior box
    assert shares["stone", "VOC", 300] == 1
    warnings = found(small_objects, "warning")
    (text,) = warnings["train", "class that fits the prior boxes badly at 300 (IoU 0.5)"]
    assert text.startswith("grain: 0% of 60 boxes")


def test_advice_reaches_what_it_says(small_objects):
    part, (first, *changes) = small_objects.parts["train"], small_objects.advice
    assert first.startswith("At 300, 0.0% of the 60 boxes of grain reach an IoU of 0.5")
    assert "16 to 16 px large" in first
    grains, shares = part.boxes[part.labels == 1] / 300, []
    for line in changes:
        change, share = re.fullmatch(r"  (.*): ([\d.]+)% \([\d.]+% of all boxes\)", line).groups()
        if change == "-s 512":
            preset = PRIORS["VOC", 512]
        else:
            name, code = re.fullmatch(r"(VOC_300) = (.*) in data/config.py", change).groups()
            preset = eval(code, dict(vars(config)))
            assert name == "VOC_300" and preset.feature_maps == PRIORS["VOC", 300].feature_maps
        shares.append(float(share))
        reached = 100 * (slow_best(preset, grains) >= 0.5).mean()
        assert reached == pytest.approx(shares[-1], abs=0.06)
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and shares[0] > 90


def test_whose_prior_boxes_are_judged_can_be_chosen(small_objects):
    root = small_objects.options.root
    report = report_of(root, "--priors", "COCO", "--classes", "grain,stone,dog")
    assert "grain: 0% of 60" in str(small_objects.findings)
    assert "grain: 0% of 60" not in str(report.findings)


# ---------------------------------------------------------------- the page


def test_the_page_is_one_file_with_the_images_and_names_are_escaped(make_voc, tmp_path):
    name = "<b>&amp;"
    objects = [(name.replace("&", "&amp;").replace("<", "&lt;"), (20, 20, 20, 40)), *DOG]
    root = make_voc(
        tmp_path / "own", {"trainval": {"a": objects, "b": DOG, "c": DOG}, "test": {"d": DOG}}
    )
    (root / "JPEGImages/b.jpg").write_bytes(b"no image")
    shutil.copy(root / "JPEGImages/c.jpg", root / "JPEGImages/d.jpg")
    text = check_page(report_of(root))
    elements = [*ElementTree.fromstring(text).iter()]
    assert any(name in (element.text or "") for element in elements)
    # The box without area, the leak (two images); the unreadable image is not shown.
    images = [element.attrib["src"] for element in elements if element.tag == "img"]
    assert len(images) >= 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not {"script", "link", "a"} & {element.tag for element in elements}
    assert "color-scheme: light dark" in text and "http" not in text


def test_the_page_marks_the_odd_box(tmp_path, make_voc):
    objects = [("dog", (60, 20, 140, 60)), *DOG]  # clipped at 96
    root = make_voc(tmp_path / "own", {"trainval": {"a": objects}, "test": {"c": DOG}})
    report = report_of(root)
    report.findings = [f for f in report.findings if f.what == SkipKind.BOX_CLIPPED.text]
    (data,) = re.findall(r"base64,([^\"]+)", check_page(report))
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (72, 96, 3)
    blue, green, red = image[:, 57:61].astype(int).mean(1).mean(0)
    assert red > green + 20  # the left side of the box, x = 59


def test_a_page_says_how_much_it_leaves_out(voc_folder):
    report = report_of(voc_folder)
    report.findings = report.findings[:0]
    report.add("note", "train", "thing", [module.Record(f"line {n}") for n in range(5)])
    text = check_page(report, shown=2)
    assert "line 1" in text and "line 2" not in text and "3 more places" in text


# ---------------------------------------------------------------- the command


def test_warnings_count_if_strict(voc_folder):
    path = voc_folder / "Annotations" / "b2.xml"
    write_annotation(path, [("cell", (20, 20, 20, 40)), ("cell", (5, 5, 60, 60))])
    assert main(["--root", str(voc_folder)]) == 0
    assert main(["--root", str(voc_folder), "--strict"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "nowhere"], "nowhere: no such data set folder"),
        (["--train_sets", ","], "',' names no image set"),
        (["--classes", "a,a"], "unique, repeated: a"),
        (["--json", "/proc/none/x.json"], "/proc/none/x.json"),
        (["--html", "/proc/none/x.html"], "/proc/none/x.html"),
    ],
)
def test_bad_usage_ends_with_2_and_a_sentence(voc_folder, words, message, capsys):
    assert main(["--root", str(voc_folder), *words]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and message in streams.err


@pytest.mark.parametrize("words", [["--size", "301"], ["-d", "KITTI"], ["--x"]])
def test_an_unknown_value_ends_with_2(words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


def test_an_interrupt_ends_with_130(voc_folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_check, "scan_image", interrupt)
    assert main(["--root", str(voc_folder)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["é漢", os.fsdecode(b"own\xff")], ids=["letters", "no text"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_beyond_the_encoding_of_the_output_are_told(
    make_voc, tmp_path, monkeypatch, name, encoding
):
    root = make_voc(tmp_path / "plain", {"trainval": {"a": DOG, "b": DOG}, "test": {"c": DOG}})
    (root / "JPEGImages/a.jpg").write_bytes(b"no image")
    try:
        root = root.rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    made = tmp_path / "out.html"
    status, data = run(root, tmp_path, "--html", str(made))
    assert status == 1 and data["root"] == str(root) and made.stat().st_size
    shown = str(root / "JPEGImages/a.jpg").encode(encoding, "backslashreplace")
    assert shown in output.buffer.getvalue()


def test_options_are_those_of_training():
    words = ["--root", "R", "-d", "COCO", "--train-sets", "a", "--test_sets", "b", "--classes", "c"]
    given = module.parse(words)
    assert given.pop("size") == [300, 512] and given.keys() <= OPTIONS.keys()
    options = resolve(given)
    assert (options.dataset, options.train_sets, options.classes) == (
        "COCO",
        ((None, "a"),),
        ("c",),
    )


# ---------------------------------------------------------------- docs/own_data.md


PAGE = (ROOT / "docs" / "own_data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line) for b in BLOCKS for line in b.splitlines() if line.startswith("python ")
]
SMALL = ["--max_iters", "1", "-b", "2", "--num_workers", "0", "--device", "cpu", "--amp", "off"]


def test_lists_are_made_as_described(tmp_path):
    (block,) = (b for b in BLOCKS if b.startswith("mkdir"))
    names = [f"p{i}" for i in range(11)]
    (tmp_path / "FOLDER" / "Annotations").mkdir(parents=True)
    for name in names:
        (tmp_path / "FOLDER" / "Annotations" / f"{name}.xml").touch()
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    sets = tmp_path / "FOLDER" / "ImageSets" / "Main"
    train, test = ((sets / f"{name}.txt").read_text().split() for name in ("trainval", "test"))
    assert len(test) == 2 and sorted(train + test) == sorted(names)


def test_the_page_runs_as_written(voc_folder, coco_folder, tmp_path, monkeypatch):
    """Every command, on a small network in place of the one it names."""
    monkeypatch.setitem(BACKBONES, "SSD_HarDNet68", TINY)
    monkeypatch.chdir(tmp_path)
    check_voc, check_coco, train_voc, train_coco, learn, test, draw, slim, use = COMMANDS
    voc_folder.rename("FOLDER")
    assert check_voc[1:3] == check_coco[1:3] == ["-m", "tools.check"]
    assert main(check_voc[3:]) == 0 and Path("check.html").stat().st_size > 1000
    assert {train_voc[1], train_coco[1], learn[1], test[1]} == {"train_test.py"}
    assert train_test.main([*train_voc[2:], *SMALL]) == 0
    (directory,) = Path("weights/SSD_HarDNet68_300").iterdir()
    test, draw, slim, use = (
        [word.replace("/RUN", f"/{directory.name}") for word in words[2:]]
        for words in (test, draw, slim, use)
    )
    assert train_test.main([*test, "--num_workers", "0", "--device", "cpu"]) == 0
    for command, (name, *words) in ((sheet_command, draw), (weights, slim)):
        assert command.__name__ == name and command.main(words) == 0
    assert (Path(draw[1]) / "ss_predict/Final_SSD_HarDNet68_VOC/test/detections.png").exists()
    Path("FOLDER/JPEGImages").rename(use[-1])
    assert use[0] == "tools.detect" and detect.main([*use[1:], "--device", "cpu"]) == 0
    Path(use[-1]).rename("FOLDER/JPEGImages")
    learn[learn.index("--overfit") + 1] = "2"  # there are no eight
    assert train_test.main([*learn[2:], *SMALL]) == 0

    shutil.rmtree("FOLDER")
    coco_folder.rename("FOLDER")
    for name in ("train", "val"):
        Path(f"FOLDER/{name}2017").rename(f"FOLDER/{name}")
        path = Path(f"FOLDER/annotations/instances_{name}2017.json")
        path.rename(path.with_name(f"instances_{name}.json"))
    assert main(check_coco[3:]) == 0
    assert train_test.main([*train_coco[2:], *SMALL]) == 0
