"""Samples of COCO data sets, and what their evaluation says."""

import errno
import gc
import json
import multiprocessing
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from coco_files import CATEGORIES, HEIGHT, WIDTH, annotation, perfect, write_set, write_val2017
from conftest import with_exif

from data.coco import COCODetection, clip_boxes
from data.coco_eval import BACKENDS, evaluate_coco
from data.coco_results import check_submission
from data.config import COCO_CLASSES
from data.curves import load_curves
from data.skips import SkipKind
from utils.errors import UserError


def read(root, **options):
    return COCODetection(root, [("2017", "val")], **options)


def test_published_80_labels_and_ids_up_to_90_map_both_ways(tmp_path):
    # The ids of https://cocodataset.org's 80 categories: 1 to 90 without these ten.
    ids = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    known = np.load(Path(__file__).parent / "goldens" / "coco_eval_val2017.npz")["category_id"]
    assert ids == sorted(known.tolist())
    categories = [{"id": i, "name": n} for i, n in zip(ids, COCO_CLASSES, strict=True)]
    dataset = read(write_val2017(tmp_path, [], categories=categories[::-1]))
    assert dataset.classes == COCO_CLASSES
    assert dataset.category_ids == dict(enumerate(ids, 1))
    assert dataset.category_ids[12] == 13 and dataset.category_ids[80] == 90


def test_chosen_classes_are_labelled_in_their_order_and_scored_alone(tmp_path):
    boxes = [annotation(1, 9, [10, 5, 20, 10], 90), annotation(2, 42, [1, 2, 8, 8], 3),
             annotation(3, 42, [2, 3, 9, 9], 7), annotation(4, 42, [20, 3, 9, 9], 90)]
    write_val2017(tmp_path, boxes)
    dataset = read(tmp_path, classes=["oar", "dog"])
    assert dataset.classes == ("oar", "dog") and dataset.category_ids == {1: 90, 2: 3}
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1]]
    assert dataset.target(1).tolist() == [[1, 2, 8, 9, 2], [20, 3, 28, 11, 1]]
    detail = "instances_val2017.json: 2 of 3 classes, 3 of 4 boxes"
    assert dataset.skipped == [(SkipKind.CLASSES_LEFT_OUT, None, None, detail)]
    assert dataset.truth().labels.tolist() == [1, 2, 1]
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["per_class"] == pytest.approx({"dog": 1, "oar": 1})
    assert report["value"] == pytest.approx(1) and report["notes"] == []
    written = json.loads((tmp_path / "out" / report["results"]).read_text())
    assert [record["category_id"] for record in written] == [90, 3, 90]
    truth = tmp_path / "annotations" / "instances_val2017.json"
    scored = evaluate_coco(tmp_path / "out" / report["results"], truth, classes=["dog", "oar"])
    assert scored["stats"] == report["stats"]
    assert read(tmp_path, classes=["dog", "kite", "oar"]).skipped == []
    with pytest.raises(UserError, match="val2017.json: has no category cat; it has dog, kite, oar"):
        read(tmp_path, classes=["dog", "cat"])
    with pytest.raises(UserError, match="unique, repeated: dog"):
        read(tmp_path, classes=["dog", "dog"])


def test_sets_are_joined_in_order(tmp_path):
    write_val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10])])
    boxes = [annotation(1, 5, [0, 0, 4, 4]), annotation(2, 4, [3, 0, 0, 4])]
    write_set(tmp_path, "instances_train2017.json", "train2017", {5: "5.jpg", 4: "4.jpg"}, boxes)
    dataset = COCODetection(tmp_path, [("2017", "val"), ("2017", "train")])
    assert dataset.ids == [9, 42, 4, 5]
    assert [len(dataset.target(i)) for i in range(4)] == [0, 1, 0, 1]
    assert dataset.image_path(2) == tmp_path / "train2017" / "4.jpg"
    kinds = SkipKind.BOX_WITHOUT_AREA, SkipKind.IMAGE_EMPTIED
    assert [skip[:2] for skip in dataset.skipped] == [(kind, 2) for kind in kinds]
    assert dataset.truth().images.tolist() == [1, 2, 3]
    for call in (dataset.check_scorable, lambda: dataset.evaluate([{}] * 4, tmp_path)):
        with pytest.raises(UserError, match=f"{tmp_path}: .* one .* not 2017_val, 2017_train"):
            call()
    read(tmp_path).check_scorable()
    other = [{"id": 1, "name": "dog"}]
    for name, categories, message in (
            (f"{9:012d}.jpg", CATEGORIES, "image id 9 is in more than one"),
            ("9.jpg", other, "train2017.json: its categories differ from instances_val")):
        write_set(tmp_path, "instances_train2017.json", "train2017", {9: name}, [],
                  categories=categories)
        with pytest.raises(UserError, match=message):
            COCODetection(tmp_path, [("2017", "val"), ("2017", "train")])


def test_loader_processes_get_arrays_and_no_records(tmp_path):
    outline = [[float(n) for n in range(1000)]]
    boxes = [annotation(n, 42, [10, 5, 20, 10], segmentation=outline) for n in range(100)]
    boxes += [annotation(n, n, [10, 5, 20, 10]) for n in range(50, 401)]
    dataset = read(write_val2017(tmp_path, boxes, ids=range(1, 401)))
    before = len(ForkingPickler.dumps(dataset))  # what a spawned process is sent
    assert before < 60_000
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        again = pool.submit(dataset.__getitem__, 41).result()
    np.testing.assert_array_equal(again[1], dataset[41][1])
    found, seen = [dataset], set()
    while found:
        for item in gc.get_referents(found.pop()):
            if id(item) not in seen and not isinstance(item, type | ModuleType):
                seen.add(id(item))
                found.append(item)
                assert not (isinstance(item, dict) and "bbox" in item)
    dataset.keep_first(4)
    assert len(ForkingPickler.dumps(dataset)) < before / 10
    assert dataset.offsets[-1] == 103 and dataset.rows.base is None


def test_crowds_are_ordinary_boxes_or_left_out_and_recorded(tmp_path):
    boxes = [annotation(1, 9, [10, 5, 20, 10], iscrowd=1), annotation(2, 9, [0, 0, 9, 9])]
    dataset = read(write_val2017(tmp_path, boxes))
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1], [0, 0, 8, 8, 1]]
    assert dataset.skipped == []
    scores = dataset.evaluate(perfect(dataset), tmp_path / "a")["stats"]
    dataset = read(tmp_path, crowds=False)
    assert dataset.target(0).tolist() == [[0, 0, 8, 8, 1]]
    [(kind, image, box, detail)] = dataset.skipped
    assert (kind, image, box) == (SkipKind.CROWD, 0, (10, 5, 30, 15))
    assert detail.startswith("instances_val2017.json: annotation 1 of image 9")
    truth = dataset.truth()
    assert truth.ignored.tolist() == [True, False] and truth.boxes[0].tolist() == [10, 5, 30, 15]
    # They count as ever in a score: a detection of a crowd is neither right nor wrong.
    again = dataset.evaluate(perfect(dataset), tmp_path / "b")["stats"]
    assert again[:6] == scores[:6] and again[0] == pytest.approx(1)


def test_boxes_are_clipped_as_published():
    rng = np.random.default_rng(0)
    boxes = np.hstack([rng.uniform(-10, 50, (500, 2)), rng.uniform(-2, 40, (500, 2))])
    expected = []
    for x, y, w, h in boxes:
        x1, y1 = max(0, x), max(0, y)
        x2, y2 = min(WIDTH - 1, x1 + max(0, w - 1)), min(HEIGHT - 1, y1 + max(0, h - 1))
        expected.append([x1, y1, x2, y2])
    np.testing.assert_array_equal(clip_boxes(boxes, np.full((500, 2), [WIDTH, HEIGHT])), expected)


def test_boxes_without_area_are_dropped_and_clipped_ones_kept_and_both_recorded(tmp_path):
    boxes = [
        annotation(1, 9, [10, 5, 0, 10]),
        annotation(2, 9, [10, 5, 20, -3]),
        annotation(3, 9, [WIDTH + 1, 5, 20, 10]),
        annotation(5, 9, [50, -2, 20, 10]),
        annotation(6, 9, [50, 30, 10.004, 10]),  # touches the border but for COCO's rounding
        annotation(7, 9, [10, 5, 1, 10]),  # x2 = x1: no width that could be encoded
        annotation(8, 9, [-20, 5, 20, 10]),  # ends where the image begins
        annotation(9, 9, [10, -30, 20, 10]),
        annotation(10, 9, [10, HEIGHT, 20, 10])]
    dataset = read(write_val2017(tmp_path, boxes))
    np.testing.assert_allclose(dataset.target(0), [[50, 0, 59, 9, 1], [50, 30, 59, 39, 1]])
    assert Counter(skip.kind for skip in dataset.skipped) == {
        SkipKind.BOX_OUTSIDE: 4, SkipKind.BOX_WITHOUT_AREA: 3, SkipKind.BOX_CLIPPED: 1}
    detail = "instances_val2017.json: annotation 5 of image 9, bbox [50.0, -2.0, 20.0, 10.0]"
    assert dataset.skipped[-1][1:] == (0, (50, -2, 70, 8), detail)
    assert len(dataset.truth().boxes) == 9


@pytest.mark.parametrize("area", [0, -5, None, float("nan"), "big", [1]])
def test_area_is_no_reason_to_drop_a_box(tmp_path, area):
    boxes = [annotation(1, 9, [10, 5, 20, 10], area=area), annotation(2, 9, [5, 5, 9, 30])]
    dataset = read(write_val2017(tmp_path, boxes))
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1], [5, 5, 13, 34, 1]]
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["value"] == pytest.approx(1) and dataset.skipped == []
    assert len(dataset.truth().boxes) == 2 and report["per_size"]["small"] == pytest.approx(1)


@pytest.mark.parametrize(("bbox", "options", "cause"), [
    ([0.1, 0.2, 0.5, 0.5], {}, "in shares of the image instead of pixels.*: 3"),
    ([30, 20, -10, -5], {}, "without area.*: 3"), ([90, 20, 10, 5], {}, "outside.*: 3"),
    ([10, 5, 20, 10], {"classes": ["kite", "oar"]}, "no box of kite, oar .* from dog")])
def test_set_with_none_of_its_boxes_left_is_refused_by_cause(tmp_path, bbox, options, cause):
    write_val2017(tmp_path, [annotation(n, 9, bbox) for n in range(3)])
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{cause}"):
        read(tmp_path, **options)
    faults: list[str] = []
    assert len(read(tmp_path, faults=faults, **options)) == 2 and len(faults) == 1


def test_class_and_image_with_none_of_their_boxes_left_are_counted(tmp_path):
    boxes = [annotation(n, id, [90, 5, 9, 9], 7) for n, id in ((1, 9), (2, 42))]
    dataset = read(write_val2017(tmp_path, [*boxes, annotation(3, 9, [1, 1, 9, 9])]))
    lost = [skip[:2] for skip in dataset.skipped if skip.kind is not SkipKind.BOX_OUTSIDE]
    assert lost == [(SkipKind.IMAGE_EMPTIED, 1), (SkipKind.CLASS_EMPTIED, None)]
    assert "kite" in dataset.skipped[-1].detail


def test_boxes_that_look_like_corners_are_told(tmp_path):
    boxes = [annotation(1, 9, [30, 20, 55, 38]), annotation(2, 9, [5, 5, 20, 20])]
    kinds = [skip.kind for skip in read(write_val2017(tmp_path, boxes)).skipped]
    assert kinds == [SkipKind.BOX_CLIPPED, SkipKind.BOX_FORMAT]


def test_image_that_cannot_be_used_is_named_when_it_is_read(tmp_path):
    dataset = read(write_val2017(tmp_path, [], ids=(7, 9, 42)))
    small = cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    sizes = "0042.jpg: the image is 30 x 20, but .*instances_val2017.json says 60 x 40"
    for i, (data, said) in enumerate([(b"", "7.jpg: .*empty"), (b"a", "9.jpg: "), (small, sizes)]):
        dataset.image_path(i).write_bytes(data)
        with pytest.raises(UserError, match=said):
            dataset[i]


def test_image_turned_by_exif_is_read_as_annotated_and_told_once(tmp_path, caplog):
    dataset = read(write_val2017(tmp_path, []))
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, WIDTH // 2 :] = 255  # white on the right
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    dataset.image_path(0).write_bytes(with_exif(jpeg, orientation=6))
    for _ in range(2):
        image = dataset[0][0]
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert image[5, 5].max() < 9 < 246 < image[5, -5].min()
    (record,) = caplog.records
    for part in ("09.jpg: an EXIF", "40 x 60", "instances_val2017.json says 60 x 40"):
        assert part in record.getMessage()
    # A turned image that is annotated as such is right, and so is a tag that turns nothing.
    turned = cv2.imencode(".jpg", np.zeros((WIDTH, HEIGHT, 3), np.uint8))[1].tobytes()
    dataset.image_path(0).write_bytes(with_exif(turned, orientation=6))
    dataset.image_path(1).write_bytes(with_exif(jpeg))
    assert dataset[0][0].shape == dataset[1][0].shape == (HEIGHT, WIDTH, 3)


def test_ground_truth_as_detections_scores_one_and_is_written_back_unchanged(tmp_path):
    boxes = [annotation(1, 42, [10, 5, 20, 10], 90), annotation(2, 9, [0.5, 1.25, 8, 4], 3)]
    dataset = read(write_val2017(tmp_path, boxes))
    report = dataset.evaluate(perfect(dataset), tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / "detections_val2017_results.json"
    assert report["results"] == path.name
    assert json.loads(path.read_text()) == [
        {"image_id": 9, "category_id": 3, "bbox": [0.5, 1.25, 8, 4], "score": 1},
        {"image_id": 42, "category_id": 90, "bbox": [10, 5, 20, 10], "score": 1}]
    assert report["value"] == pytest.approx(1) and report["stats"][0] == report["value"]
    assert report["per_class"] == pytest.approx({"dog": 1, "kite": -1, "oar": 1})
    assert report["notes"] == ["no ground truth (-1) for 1 classes: kite"]
    assert [report[key] for key in ("metric", "iou", "image_set")] == [
        "COCO AP", "0.50:0.95", "2017_val"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_report_says_what_scoring_the_written_file_says(tmp_path, backend):
    pytest.importorskip(backend.replace("-", "_"))
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (8, 2)).tolist()
    boxes = [annotation(k, (9, 42)[k % 2], [*corner, 20, 15], (3, 7)[k % 3 // 2])
             for k, corner in enumerate(corners, 1)]
    dataset = read(write_val2017(tmp_path, boxes), eval_backend=backend)
    detections = perfect(dataset)
    for found in detections:
        found["boxes"] += rng.normal(0, 2, found["boxes"].shape).astype(np.float32)
        found["scores"] = rng.random(len(found["boxes"]), np.float32)
    report = dataset.evaluate(detections, tmp_path / "out")
    path = tmp_path / "out" / report["results"]
    written = np.array([r["bbox"] for r in json.loads(path.read_text())])
    assert np.array_equal(written, written.round(4)) and written.shape == (8, 4)
    truth = tmp_path / "annotations" / "instances_val2017.json"
    scored = evaluate_coco(path, truth, backend, tmp_path / "again.npz")
    assert 0 < report["value"] < 1 and report["value"] == scored["stats"][0]
    for ours, theirs in (("stats", "stats"), ("per_class", "per_category"), ("backend", "backend"),
                         ("per_size", "per_size"), ("per_class_per_size", "per_category_per_size")):
        assert report[ours] == scored[theirs]
    assert report["backend"].startswith(f"{backend} ")
    kept, again = (load_curves(tmp_path / name) for name in ("out/curves.npz", "again.npz"))
    assert kept.classes == dataset.classes and report["curves"] == "curves.npz"
    assert all(np.array_equal(kept.arrays[key], again.arrays[key]) for key in again.arrays)
    json.dumps(report)


def test_disk_that_is_full_is_told_with_the_file_and_leaves_none(tmp_path, monkeypatch):
    write_set(tmp_path, "image_info_test2017.json", "test2017", {42: "000000000042.jpg"})
    dataset = COCODetection(tmp_path, [("2017", "test")])
    written = iter(["results", "their folder"])

    def fsync(file):
        if not next(written, None):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.files.os.fsync", fsync)
    name = "detections_test2017_SSD_results"
    with pytest.raises(UserError, match=rf"out/{name}.zip.*No space left"):
        dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.json"]


def test_no_detections_score_zero_and_wrong_ones_are_not_written(tmp_path):
    dataset = read(write_val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)]))
    nothing = {"boxes": np.zeros((0, 4)), "scores": [], "labels": []}
    report = dataset.evaluate([nothing] * 2, tmp_path / "out")
    assert report["value"] == 0 and report["per_class"] == {"dog": -1, "kite": -1, "oar": 0}
    assert "none of the 100 best detections" in report["notes"][0]
    wrong = {"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [4]}
    for found, message in (([nothing], "1 det.* 2 images"), ([wrong] * 2, "image 9: .*label 4")):
        with pytest.raises(ValueError, match=message):
            dataset.evaluate(found, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_test_set_is_written_for_the_server_and_not_scored(tmp_path):
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", {42: "000000000042.jpg"})
    dataset = COCODetection(tmp_path, [("2017", "test-dev")])
    found = {"boxes": np.float32([[1, 2, 3, 4]]), "scores": np.float32([0.5]),
             "labels": np.array([2])}  # fmt: skip
    report = dataset.evaluate([found], tmp_path / "out", name="net")
    path = tmp_path / "out" / "detections_test-dev2017_net_results.json"
    assert json.loads(path.read_text()) == [
        {"image_id": 42, "category_id": 7, "bbox": [1, 2, 3, 3], "score": 0.5}]
    assert report["value"] is None and report["per_class"] == {}
    assert "no ground truth" in report["notes"][0]
    assert "curves" not in report and not (tmp_path / "out" / "curves.npz").exists()
    archive = path.with_suffix(".zip")
    assert (report["results"], report["archive"]) == (path.name, archive.name)
    assert str(archive) in report["notes"][0]
    assert len(dataset.truth().boxes) == 0
    truth = tmp_path / "annotations" / "image_info_test-dev2017.json"
    assert check_submission(archive, truth) == 1
    with zipfile.ZipFile(archive) as archive:
        assert archive.read(path.name) == path.read_bytes()
    for name in ("", "a/b", "../net", "a net", "Ünet"):
        with pytest.raises(ValueError, match="cannot be in the name of a submitted file"):
            dataset.evaluate([found], tmp_path / "out", name=name)


def test_set_is_a_test_split_if_it_has_an_image_info_file_alone(tmp_path):
    names, boxes = {42: "000000000042.jpg"}, [annotation(1, 42, [10, 5, 20, 10])]
    for file, scored in (("image_info", None), ("instances", 1)):
        write_set(tmp_path, f"{file}_test2024.json", "test2024", names, boxes if scored else None)
        dataset = COCODetection(tmp_path, [("2024", "test")])
        assert dataset.target(0).tolist() == ([[10, 5, 29, 14, 1]] if scored else [])
        report = dataset.evaluate(perfect(dataset), tmp_path / "out")
        assert report["value"] == pytest.approx(scored) and ("archive" in report) != bool(scored)
    assert report["results"] == "detections_test2024_results.json"


def test_backend_that_is_missing_is_told_before_there_are_detections(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hotcoco", None)
    dataset = read(write_val2017(tmp_path, []), eval_backend="hotcoco")
    with pytest.raises(UserError, match=r"hotcoco .*pip install hotcoco"):
        dataset.check_scorable()
    write_set(tmp_path, "image_info_test2024.json", "test2024", {42: "a.png"})
    COCODetection(tmp_path, [("2024", "test")], eval_backend="hotcoco").check_scorable()


def test_image_sets_without_an_image_kept_are_gone(tmp_path):
    write_val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)])
    boxes = [annotation(1, 5, [0, 0, 4, 4]), annotation(2, 4, [3, 0, 4, 4])]
    write_set(tmp_path, "instances_train2017.json", "train2017", {5: "5.jpg", 4: "4.jpg"}, boxes)
    write_set(tmp_path, "instances_own.json", "own", {1: "1.jpg"}, [])
    sets = [("2017", "val"), (None, "own"), ("2017", "train")]
    dataset = COCODetection(tmp_path, sets)
    dataset.keep_first(2)
    assert dataset.ids == [42, 4] and dataset.image_sets == [("2017", "val"), ("2017", "train")]
    assert dataset.image_path(1) == tmp_path / "train2017" / "4.jpg"
    assert (dataset[1][0] == 4).all() and dataset.target(1).tolist() == [[3, 0, 6, 3, 1]]
    with pytest.raises(UserError, match="one image set at a time"):
        dataset.check_scorable()
    dataset = COCODetection(tmp_path, sets[::-1])
    dataset.keep_first(2)
    dataset.check_scorable()
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["image_set"] == "2017_train" and report["value"] == pytest.approx(1)
