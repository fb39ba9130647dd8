"""`python -m tools.check` reports every fault at once, and the fit of prior boxes is right."""

import base64
import io
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import VOC_IMAGE_SIZE, with_exif, write_annotation, write_voc

from data import DATASETS
from data.coco import COCODetection
from data.config import MOBILE_300, PRIORS
from data.skips import SkipKind
from data.voc0712 import VOCDetection
from demo.shapes import draw_image
from engine.options import OPTIONS
from engine.priors import best_overlaps, read_priors
from engine.resolve import resolve
from layers import PriorBox
from layers.boxes import iou
from models import prior_config
from tools import check as module
from tools import image_check
from tools.box_check import _skewed
from tools.check import check, main
from tools.findings import BOTH, Part, Record, Report
from tools.image_check import near_pairs
from tools.page import check_page
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
DOG = [("dog", (11, 11, 60, 60))]
REFUSED = "record that training stops at"


def own(folder: Path, train: dict | None = None, test: dict | None = None, **how) -> Path:
    """Write a data set into a folder; without objects of its own, with one dog an image."""
    sets = {"trainval": train or {"a": DOG, "b": DOG}, "test": test or {"t": DOG}}
    return write_voc(folder / "own", sets, **how)


def report_of(root: Path, *words: str) -> Report:
    given = module.parse(["--root", str(root), "-s", "300", *words])
    return check(sizes=tuple(given.pop("size")), options=resolve(given))


def found(report: Report, *levels: str) -> dict[tuple[str, str], list[str]]:
    """Return the texts of findings by (part, what)."""
    return {(f.part, f.what): [record.text for record in f.records] for f in report.findings
            if not levels or f.level in levels}  # fmt: skip


def run(root: Path, tmp_path: Path, *words: str) -> tuple[int, dict]:
    """Return the exit status, and the JSON that the command wrote."""
    out = tmp_path / "report.json"
    return main(["--root", str(root), "--json", str(out), *words]), json.loads(out.read_text())


def test_sound_data_have_no_errors_and_are_counted(voc_folder, tmp_path, capsys):
    status, data = run(voc_folder, tmp_path)
    assert status == 0 and data["counts"]["error"] == 0
    assert data["sets"]["train"] == {"names": "trainval", "images": 6}
    assert data["classes"]["cell"] == {"train": [4, 4], "test": [4, 3]}
    assert data["classes"]["rod"]["train"] == [3, 2]
    what = {f["what"]: (f["level"], f["records"]) for f in data["findings"]}
    assert what["images without an object"] == ("note", ["1 of 6 images"])
    assert what["class without a box to test on"] == ("warning", ["platelet"])
    assert not [name for name in what if "image that" in name]
    fits = {(fit["class"], fit["priors"], fit["size"]) for fit in data["fits"]}
    assert fits == {(name, *key) for name in data["classes"] for key in PRIORS}
    out = capsys.readouterr().out
    assert re.search(r"^cell +4 +4 +4 +3$", out, re.MULTILINE)
    assert re.search(r"^0 errors, \d+ warnings?, 1 note$", out, re.MULTILINE)
    one_more = ["--root", str(voc_folder), "--classes", "cell,platelet,rod,none"]
    assert (main(one_more), main([*one_more, "--strict"])) == (0, 1)


def test_a_devkit_has_the_published_sets_and_classes(voc_devkit, monkeypatch):
    monkeypatch.setitem(DATASETS, "MINE", replace(DATASETS["VOC"], priors="COCO"))
    report = report_of(voc_devkit, "-d", "MINE")
    assert report.options.priors == "COCO" and report.fits and not found(report, "error")
    assert [len(report.parts[part].sizes) for part in ("train", "test")] == [5, 3]
    assert len(report.classes()) == 20
    assert "tvmonitor" in found(report)["train", "class without a box to train on"]
    shutil.copytree(voc_devkit / "VOC2007", voc_devkit / "VOC2009")
    report = report_of(voc_devkit, "--test_sets", "2007_test,2009_test")
    (text,) = found(report, "error")["test", "image sets that cannot be scored"]
    assert "same id" in text


def test_a_test_split_without_truth_is_no_fault(coco_folder):
    (coco_folder / "val2017").rename(coco_folder / "test2017")
    path = coco_folder / "annotations" / "instances_val2017.json"
    path.rename(path.with_name("image_info_test-dev2017.json"))
    report = report_of(coco_folder, "-d", "COCO", "--test_sets", "2017_test-dev")
    assert not found(report, "error")
    assert ("test", "class without a box to test on") not in found(report)


def break_voc(root: Path) -> dict[str, Path]:
    """Damage one image each, in every way; id -> the file that is at fault."""
    in_xml, in_image = "no_xml bad_xml bad_box other_size", "no_image empty cut turned unsized"
    faults = {name: root / "Annotations" / f"{name}.xml" for name in in_xml.split()}
    faults |= {name: root / "JPEGImages" / f"{name}.jpg" for name in in_image.split()}
    own(root.parent, dict.fromkeys(["fine", *faults], DOG), {"t1": DOG, "t2": DOG})
    faults["no_xml"].unlink()
    faults["bad_xml"].write_text("<annotation>\n<object>")
    faults["bad_box"].write_text(faults["bad_box"].read_text().replace("<xmin>11", "<xmin>nan"))
    faults["no_image"].unlink()
    faults["empty"].write_bytes(b"")
    faults["cut"].write_bytes(faults["cut"].read_bytes()[:-200])
    write_annotation(faults["other_size"], DOG, (200, 100))
    faults["turned"].write_bytes(with_exif(faults["turned"].read_bytes(), 6))
    faults["unsized"].write_bytes(b"no image")
    write_annotation(root / "Annotations" / "unsized.xml", DOG, None)
    return faults


def test_every_fault_of_a_folder_is_told_at_once_as_the_reader_tells_it(tmp_path):
    faults = break_voc(root := tmp_path / "own")
    status, data = run(root, tmp_path)
    (errors,) = (f for f in data["findings"] if f["level"] == "error")
    assert (status, errors["part"], data["counts"]["error"]) == (1, "train", len(faults))
    # The readable boxes of images with a known size.
    assert data["classes"]["dog"]["train"] == [6, 6]
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
    path = coco_folder / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    document["images"] += [{"id": 9, "file_name": "9.jpg", "width": 5, "height": 5}]
    path.write_text(json.dumps(document))
    cv2.imwrite(str(coco_folder / "val2017" / "9.jpg"), np.full((6, 7, 3), 90, np.uint8))
    with pytest.raises(UserError, match=r"images missing \(1\)"):
        COCODetection(coco_folder, [("2017", "train")])
    errors = found(report_of(coco_folder, "-d", "COCO"), "error")
    train, (test,) = errors["train", REFUSED], errors["test", REFUSED]
    assert [str(name) in text for name, text in zip(names, train, strict=True)] == [True, True]
    assert all(text in test for text in ("9.jpg", "7 x 6", "5 x 5"))


def test_an_image_set_that_is_missing_is_an_error_and_the_other_one_is_checked(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").unlink()
    report = report_of(voc_folder, "--train_sets", "trainval", "--test_sets", "test")
    (text,) = found(report, "error")["test", "image set that cannot be opened"]
    assert '"test"' in text and "trainval" in text
    assert list(report.parts) == ["train"] and report.fits


def test_data_without_an_object_or_an_image_are_told(tmp_path):
    root = own(tmp_path, {"a": [], "b": []}, {"c": []})
    report = report_of(root)
    (text,) = found(report, "error")["train", REFUSED]
    assert str(root) in text and "no object" in text
    assert report.fits == [] and main(["--root", str(root)]) == 1
    (root / "ImageSets/Main/trainval.txt").write_text("")
    assert "lists no image" in str(found(report_of(root), "error"))


def test_an_orientation_that_no_size_confirms_is_a_warning(tmp_path):
    orientations = {"upside_down": 3, "as_it_is": 1, "as_annotated": 6}
    root = own(tmp_path, dict.fromkeys(orientations, DOG))
    paths = {name: root / f"JPEGImages/{name}.jpg" for name in orientations}
    for name, orientation in orientations.items():
        paths[name].write_bytes(with_exif(paths[name].read_bytes(), orientation))
    write_annotation(root / "Annotations/as_annotated.xml", DOG, VOC_IMAGE_SIZE[::-1])
    report = report_of(root)
    turned = [texts for (_, what), texts in found(report, "warning").items() if "EXIF" in what]
    assert turned == [[str(paths["upside_down"])]] and not found(report, "error")


def test_what_a_voc_reader_drops_is_told_with_its_place(tmp_path):
    dropped = [
        ("warning", SkipKind.BOX_WITHOUT_AREA, "dog", (20, 20, 20, 40)),
        ("warning", SkipKind.BOX_OUTSIDE, "dog", (200, 20, 220, 40)),
        ("note", SkipKind.BOX_CLIPPED, "dog", (60, 20, 99, 40)),  # the image is 96 x 72
        ("warning", SkipKind.UNKNOWN_CLASS, "cat", (5, 5, 30, 30))]
    root = own(tmp_path, {"a": [*DOG, *(row[2:] for row in dropped)]})
    report = report_of(root, "--classes", "dog,Dog")
    told = {f.what: (f.level, f.records) for f in report.findings if f.part == "train"}
    for number, (level, kind, _, box) in enumerate(dropped, 2):
        found_level, (record,) = told[kind.text]
        assert (found_level, record.images) == (level, (("train", 0),))
        assert record.box == tuple(side - 1 for side in box)
        assert "a.xml" in record.text and f"object {number}" in record.text
    warnings = found(report, "warning")
    assert warnings[BOTH, "classes whose names differ only in case or spaces"] == ["dog, Dog"]
    assert warnings["train", "class without a box to train on"] == ["Dog"]


def test_classes_that_are_left_out_unasked_are_worth_a_warning(coco_folder):
    """A test set may have a category that the training set does not know."""
    path = coco_folder / "annotations/instances_train2017.json"
    document = json.loads(path.read_text())
    document["categories"] = document["categories"][:1]
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] == 3]
    path.write_text(json.dumps(document))
    what = ("test", SkipKind.CLASSES_LEFT_OUT.text)
    (text,) = found(report_of(coco_folder, "-d", "COCO"), "warning")[what]
    assert "instances_val2017.json" in text and "1 of 2 classes" in text
    assert what in found(report_of(coco_folder, "-d", "COCO", "--classes", "thing"), "note")


def test_a_training_box_is_tiny_if_augmentation_would_drop_it(tmp_path):
    boxes = [(1, 1, 3.95, 50), (1, 1, 4, 50), (60, 1, 200, 4)]  # 2.95, 3 and 140 x 3 pixels
    objects = [("dog", box) for box in boxes]
    report = report_of(own(tmp_path, {"a": [*objects, *DOG]}, {"b": objects}, size=(300, 300)))
    tiny = [texts for (_, what), texts in found(report, "warning").items() if "tiny" in what]
    assert tiny == [[f"{tmp_path}/own/JPEGImages/a.jpg: dog, 2.95 x 49 in 300 x 300"]]


def test_probable_mistakes_are_warned_of_with_their_place(tmp_path):
    many = [("ant", (4 * k + 1, 1, 4 * k + 20, 40)) for k in range(51)]
    root = own(tmp_path, {"twice": [*DOG, ("dog", (11, 11, 60.2, 60)), ("cat", (11, 11, 60, 60))],
                          "thin": [("dog", (1, 1, 90, 5))], "whole": [("dog", (1, 2, 300, 200))],
                          "many": many, "flat": DOG, "deep": DOG},
               {"t": [("dog", (11, 11, 60, 60), True)]}, size=(300, 200))  # fmt: skip
    folder = root / "JPEGImages"
    cv2.imwrite(str(folder / "flat.jpg"), np.full((200, 300, 3), (9, 200, 80), np.uint8))
    deep = np.random.default_rng(0).integers(0, 4096, (200, 300, 3), np.uint16)
    (folder / "deep.jpg").unlink()
    cv2.imwrite(str(folder / "deep.png"), deep)
    cv2.imwrite(str(folder / "stray.jpg"), deep[:90] >> 4)
    cv2.imwrite(str(folder / "spare.jpg"), deep[90:] >> 4)
    write_annotation(root / "Annotations" / "spare.xml", DOG)
    write_annotation(root / "Annotations" / "lone.xml", DOG)
    lists = root / "ImageSets/Main"
    (root / "Annotations/whole.xml").rename(root / "Annotations/whole.jpg.xml")  # detection's name
    (lists / "trainval.txt").write_text("twice\nthin\nwhole.jpg\nmany\nflat\ndeep\n")
    (tmp_path / "elsewhere.jpg").write_bytes((folder / "thin.jpg").read_bytes())
    (folder / "thin.jpg").unlink()
    (folder / "thin.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    texts = {key: [text.replace(f"{folder}/", "") for text in texts]
             for key, texts in found(report_of(root), "warning").items()}  # fmt: skip
    for part, begins, *wanted in (
            ("train", "box that occurs twice", "twice.jpg: dog, 49.2 x 49 in 300 x 200"),
            ("train", "sliver, over 20 times as long as", "thin.jpg: dog, 89 x 4 in 300 x 200"),
            ("train", "box over the whole image", "whole.jpg: dog, 299 x 198 in 300 x 200"),
            ("train", "image with more objects of a class than a test keeps", "many.jpg: 51 ant"),
            ("train", "image of one colour", "flat.jpg: grey levels 142 to 142 of 0 to 255",
             "deep.png: grey levels 0 to 15 of 0 to 255"),
            ("train", "class with fewer than 10 boxes to train on", "cat: 1", "dog: 6"),
            ("test", "class with fewer than 10 boxes to test on", "dog: 1"),
            ("test", "class without a box to test on", "ant", "cat"),
            ("test", "nothing to score: no object of a class that is not difficult", "test"),
            ("train", "image outside the folder", f"thin.jpg is {tmp_path}/elsewhere.jpg"),
            (BOTH, "image in these", "spare.jpg", "stray.jpg, without an annotation file"),
            (BOTH, "annotation file without an image", f"{root}/Annotations/lone.xml")):
        (found_here,) = (each for key, each in texts.items() if key[0] == part
                         and key[1].startswith(begins))
        assert found_here == wanted
    (lists / "more.txt").write_text("spare\n")
    assert (BOTH, "image in these folders, but in neither part") in found(report_of(root), "note")


def test_an_uneven_split_is_told_where_chance_does_not_explain_it():
    def part(counts: dict[str, int], total: int) -> Part:
        classes = SimpleNamespace(classes=list(counts))
        images = np.concatenate([np.arange(n) for n in counts.values()])
        labels = np.repeat(np.arange(1, len(counts) + 1), list(counts.values()))
        sizes = np.ones((total, 2), int)
        return Part(classes, sizes, images, np.zeros((len(images), 4)), labels)

    names = ["rare", "even", "common", "strong", "absent"]
    train = part(dict(zip(names, (9, 50, 60, 100, 5), strict=True)), 200)
    test = part(dict(zip(names, (1, 25, 18, 10, 0), strict=True)), 100)
    (record,) = _skewed(train, test, names)
    assert record.text == "strong: in 50.0% of the training images, 10.0% of the test images"


@pytest.fixture
def album(tmp_path):
    """8 drawn images to train on and 3 to test on, all different."""
    root = own(tmp_path)
    for path in (root / "ImageSets/Main").iterdir():
        path.write_text("")
    for n in range(11):
        image, _ = draw_image(np.random.default_rng(n), 160, 120, 4)[:2]
        put(root, "trainval" if n < 8 else "test", f"a{n}", image)
    return root


def put(root, part, name, image, suffix=".jpg"):
    cv2.imwrite(str(root / "JPEGImages" / f"{name}{suffix}"), image)
    write_annotation(root / "Annotations" / f"{name}.xml", DOG, image.shape[1::-1])
    with open(root / "ImageSets/Main" / f"{part}.txt", "a") as file:
        file.write(f"{name}\n")


def copies(report):
    return {key: texts for key, texts in found(report).items()
            if "image that" in key[1] and "EXIF" not in key[1]}  # fmt: skip


def test_equal_pixels_are_the_same_image_whatever_the_file(album):
    folder = album / "JPEGImages"
    read = {n: cv2.imread(str(folder / f"a{n}.jpg")) for n in (3, 5)}
    put(album, "trainval", "c3", read[3], ".png")
    put(album, "trainval", "d3", read[3], ".png")
    put(album, "test", "leak", read[5], ".png")
    with open(album / "ImageSets/Main/test.txt", "a") as file:
        file.write("a7\n")
    report, what = report_of(album), (BOTH, "test image that is a training image")
    leaks = [f"{folder}/leak.png = {folder}/a5.jpg", f"{folder}/a7.jpg = {folder}/a7.jpg"]
    twice = [f"{folder}/{name}.png = {folder}/a3.jpg" for name in ("c3", "d3")]
    assert copies(report) == {("train", "image that occurs twice"): twice, what: leaks}
    assert found(report, "error") == {what: leaks}


@pytest.mark.parametrize(("part", "key"), [
    ("trainval", ("train", "image that is nearly another one")),
    ("test", (BOTH, "test image that is nearly a training image"))])
def test_near_copies_are_found_and_only_they(album, part, key):
    quality = [cv2.IMWRITE_JPEG_QUALITY, 40]
    changes = {"compressed": lambda image: cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], 1),
               "halved": lambda image: cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA),
               "square": lambda image: cv2.resize(image, (416, 416)),
               "lighter": lambda image: np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8)}
    folder = album / "JPEGImages"
    for n, (name, change) in enumerate(changes.items()):
        put(album, part, name, change(cv2.imread(str(folder / f"a{n}.jpg"))))
    report = report_of(album)
    texts = [f"{folder}/{name}.jpg ~ {folder}/a{n}.jpg" for n, name in enumerate(changes)]
    assert copies(report) == {key: texts} and key in found(report, "warning")


def slow_near_pairs(queries, keys, earlier=False):
    """Return every query's nearest key among those at which both measures are small."""

    def normalised(images):
        flat = images.reshape(len(images), -1).astype(float)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.maximum(flat.std(1, keepdims=True), 4.0)

    pairs = []
    for i, query in enumerate(normalised(queries)):
        apart = np.abs(normalised(keys) - query)
        distance = np.sqrt((apart**2).mean(1))
        near = (distance <= 0.25) & (apart.max(1) <= 1.5) & (keys.std((1, 2)) >= 2)
        near[i if earlier else len(keys) :] = False
        if near.any() and queries[i].std() >= 2:
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
    plain = np.full((1, 32, 32), 90, np.uint8)
    copy = keys[:1] + np.where(np.indices((32, 32)).sum(0) % 2, 6, -6).astype(np.uint8)
    decoy = copy.copy()
    decoy[0, 3, 3] += 128  # nearer than the original but for one pixel
    keys = np.concatenate([decoy, plain, keys])
    queries = np.concatenate([copy, plain, queries])
    wanted = slow_near_pairs(queries, keys)
    assert wanted[0] == (0, 2) and 15 < len(wanted) < 55 and 1 not in dict(wanted)
    assert list(near_pairs(queries, keys)) == wanted
    both = np.concatenate([keys, queries])
    assert list(near_pairs(both, both, earlier=True)) == slow_near_pairs(both, both, True)
    assert list(near_pairs(keys[:0], keys)) == list(near_pairs(keys, keys[:0])) == []


def slow_best(config, boxes):
    """Return the best IoU over all prior boxes, by the IoU that training matches with."""
    centre, size = PriorBox(config)().double().split(2, 1)
    priors = torch.cat([centre - size / 2, centre + size / 2], 1)
    return iou(torch.from_numpy(boxes), priors).amax(1).numpy()


@pytest.mark.parametrize("config", [*PRIORS.values(), MOBILE_300], ids=lambda c: c.min_sizes[0])
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
    rng, samples = np.random.default_rng(0), {}
    for n in range(12):
        corners = rng.integers(1, 200, (6, 2)).tolist()
        samples[f"s{n}"] = [("grain", (x, y, x + 16, y + 16)) for x, y in corners[:5]]
        samples[f"s{n}"] += [("stone", (x, y, x + 80, y + 80)) for x, y in corners[5:]]
    root = own(tmp_path_factory.mktemp("small"), samples, size=(300, 300))
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
    # COCO's prior boxes are smaller.
    words = ("--priors", "COCO", "--classes", "grain,stone,dog")
    assert "grain: 0% of 60" not in str(report_of(small_objects.options.root, *words).findings)


def test_advice_reaches_what_it_says(small_objects):
    part, (first, *changes) = small_objects.parts["train"], small_objects.advice
    assert first.startswith("At 300, 0.0% of the 60 boxes of grain reach an IoU of 0.5")
    assert "16 to 16 px large" in first
    grains, shares = part.boxes[part.labels == 1] / 300, []
    for line in changes:
        change, share = re.fullmatch(r"  (.*): ([\d.]+)% \([\d.]+% of all boxes\)", line).groups()
        preset = PRIORS["VOC", 512]
        if change != "-s 512":
            name, sizes = re.fullmatch(r"--priors (\w+)(?: \((.*)\))?", change).groups()
            preset = prior_config("SSD_HarDNet68", name if name == "COCO" else sizes, 300)
        shares.append(float(share))
        reached = 100 * (slow_best(preset, grains) >= 0.5).mean()
        assert reached == pytest.approx(shares[-1], abs=0.06)
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and shares[0] > 90


def test_sizes_that_fit_are_written_for_training(small_objects, tmp_path, capsys):
    out = tmp_path / "priors.json"
    main(["--root", str(small_objects.options.root), "--fit_priors", str(out)])
    (advised,) = re.findall(r"--priors fit \((.*)\):", "\n".join(small_objects.advice))
    assert read_priors(str(out), 300) == advised
    assert len(read_priors(str(out), 512).split(",")) == 8


def test_the_page_is_one_file_with_the_images_and_names_are_escaped(tmp_path):
    name = "<b>&amp;"
    objects = [(name.replace("&", "&amp;").replace("<", "&lt;"), (20, 20, 20, 40)), *DOG]
    root = own(tmp_path, {"a": objects, "b": DOG, "c": DOG})
    (root / "JPEGImages/b.jpg").write_bytes(b"no image")
    shutil.copy(root / "JPEGImages/c.jpg", root / "JPEGImages/t.jpg")
    report = report_of(root)
    text = check_page(report)
    elements = [*ElementTree.fromstring(text).iter()]
    assert any(name in (element.text or "") for element in elements)
    images = [element.attrib["src"] for element in elements if element.tag == "img"]
    assert len(images) >= 3  # the box without area, and the leak (two images)
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not {"script", "link", "a"} & {element.tag for element in elements}
    assert "color-scheme: light dark" in text and "http" not in text
    report.add("note", "train", "thing", [Record(f"line {n}") for n in range(5)])
    text = check_page(report, shown=2)
    assert "line 1" in text and "line 2" not in text and "3 more places" in text


def test_the_page_marks_the_odd_box(tmp_path):
    report = report_of(own(tmp_path, {"a": [("dog", (60, 20, 140, 60)), *DOG]}))  # clipped at 96
    report.findings = [f for f in report.findings if f.what == SkipKind.BOX_CLIPPED.text]
    (data,) = re.findall(r"base64,([^\"]+)", check_page(report))
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (72, 96, 3)
    blue, green, red = image[:, 57:61].astype(int).mean(1).mean(0)
    assert red > green + 20  # the left side of the box, x = 59


@pytest.mark.parametrize("option", ["--root", "--json", "--html"])
def test_bad_usage_ends_with_2_and_a_sentence(voc_folder, option, capsys):
    assert main(["--root", str(voc_folder), option, "/proc/none/x"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and "/proc/none/x" in error


def test_names_beyond_the_encoding_of_the_output_are_told(tmp_path, monkeypatch):
    root = own(tmp_path)
    (root / "JPEGImages/a.jpg").write_bytes(b"no image")
    try:
        root = root.rename(tmp_path / os.fsdecode("é漢".encode() + b"\xff"))
    except OSError:
        pytest.skip("this file system has no such names")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    status, data = run(root, tmp_path, "--html", str(made := tmp_path / "out.html"))
    assert status == 1 and data["root"] == str(root) and made.stat().st_size
    shown = str(root / "JPEGImages/a.jpg").encode("ascii", "backslashreplace")
    assert shown in sys.stdout.buffer.getvalue()


def test_options_are_those_of_training():
    given = module.parse("--root R -d COCO --train-sets a --test_sets b --classes c".split())
    assert given.pop("size") == [300, 512] and given.keys() <= OPTIONS.keys()
    options = resolve(given)
    assert (options.dataset, options.train_sets) == ("COCO", ((None, "a"),))
    with pytest.raises(SystemExit, match="2"):
        module.parse(["--size", "301"])
