"""COCO reader, on folders written here."""

import errno
import gc
import json
import multiprocessing
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from conftest import with_exif

from benchmarks import coco_load
from data.coco import COCODetection, clip_boxes, list_image_sets
from data.coco_eval import check_submission, evaluate_coco
from data.coco_json import read_annotations
from data.config import COCO_CLASSES
from data.curves import load_curves
from utils.errors import UserError

WIDTH, HEIGHT = 60, 40
CATEGORIES = [{"id": 7, "name": "kite"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "oar"}]


def annotation(id, image_id, bbox, category_id=3, **more):
    area = bbox[2] * bbox[3]
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": area,
            "iscrowd": 0, **more}  # fmt: skip


def write_set(root, file, folder, names, annotations=None, **document):
    """One annotation file and its pictures; names: {image id: file name}."""
    images = [
        {"id": id, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for id, name in names.items()
    ]
    document = {"images": images, "categories": CATEGORIES, **document}
    if annotations is not None:
        document["annotations"] = annotations
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / file).write_text(json.dumps(document))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for id, name in names.items():
        picture = np.full((HEIGHT, WIDTH, 3), id % 256, np.uint8)
        (root / folder / name).write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    return root


def val2017(root, annotations, ids=(42, 9), **document):
    names = {id: f"{id:012d}.jpg" for id in ids}
    return write_set(root, "instances_val2017.json", "val2017", names, annotations, **document)


def read(root):
    return COCODetection(root, [("2017", "val")])


def test_sample_is_a_bgr_picture_and_its_boxes_with_labels(tmp_path):
    boxes = [annotation(1, 42, [10, 5, 20, 10], 90), annotation(2, 42, [0.5, 1.25, 8, 4], 3)]
    dataset = read(val2017(tmp_path, boxes))
    assert len(dataset) == 2 and dataset.ids == [9, 42]
    image, target = dataset[1]
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8 and (image == 42).all()
    assert target.dtype == np.float32
    np.testing.assert_array_equal(target, [[10, 5, 29, 14, 3], [0.5, 1.25, 7.5, 4.25, 1]])
    assert dataset.image_size(1) == (WIDTH, HEIGHT)
    assert dataset.image_path(1) == tmp_path / "val2017" / "000000000042.jpg"
    assert dataset.skipped == {} and dataset.report() == []


def test_labels_are_contiguous_over_category_ids_with_gaps_both_ways(tmp_path):
    dataset = read(val2017(tmp_path, []))
    assert dataset.classes == ("dog", "kite", "oar")
    assert dataset.category_ids == {1: 3, 2: 7, 3: 90}
    assert dataset.category_labels == {3: 1, 7: 2, 90: 3}


def test_published_80_labels_and_ids_up_to_90_map_both_ways(tmp_path):
    # The ids of https://cocodataset.org's 80 categories: 1 to 90 without these ten.
    ids = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    known = np.load(Path(__file__).parent / "goldens" / "coco_eval_val2017.npz")["category_id"]
    assert ids == sorted(known.tolist())
    categories = [{"id": i, "name": n} for i, n in zip(ids, COCO_CLASSES, strict=True)]
    dataset = read(val2017(tmp_path, [], categories=categories[::-1]))
    assert dataset.classes == COCO_CLASSES
    assert list(dataset.category_ids) == list(range(1, 81))
    assert list(dataset.category_ids.values()) == ids
    assert dataset.category_ids[12] == 13 and dataset.category_ids[80] == 90
    assert all(dataset.category_labels[dataset.category_ids[k]] == k for k in range(1, 81))
    assert all(dataset.category_ids[dataset.category_labels[i]] == i for i in ids)


def test_chosen_classes_are_labelled_in_their_order_and_scored_alone(tmp_path):
    boxes = [
        annotation(1, 9, [10, 5, 20, 10], 90),
        annotation(2, 42, [1, 2, 8, 8], 3),
        annotation(3, 42, [2, 3, 9, 9], 7),
        annotation(4, 42, [20, 3, 9, 9], 90),
    ]
    val2017(tmp_path, boxes)
    dataset = COCODetection(tmp_path, [("2017", "val")], classes=["oar", "dog"])
    assert dataset.classes == ("oar", "dog") and dataset.category_ids == {1: 90, 2: 3}
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1]]
    assert dataset.target(1).tolist() == [[1, 2, 8, 9, 2], [20, 3, 28, 11, 1]]
    assert dataset.report() == [
        "set of which some classes are left out: 1, e.g. instances_val2017.json: 2 of 3 classes,"
        " 3 of 4 boxes"
    ]
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["per_class"] == pytest.approx({"dog": 1, "oar": 1})
    assert report["value"] == pytest.approx(1) and report["notes"] == []
    written = json.loads((tmp_path / "out" / report["results"]).read_text())
    assert [record["category_id"] for record in written] == [90, 3, 90]
    truth = tmp_path / "annotations" / "instances_val2017.json"
    scored = evaluate_coco(tmp_path / "out" / report["results"], truth, classes=["dog", "oar"])
    assert scored["stats"] == report["stats"]
    whole = COCODetection(tmp_path, [("2017", "val")], classes=["dog", "kite", "oar"])
    assert whole.report() == []
    with pytest.raises(UserError, match="val2017.json: has no category cat; it has dog, kite, oar"):
        COCODetection(tmp_path, [("2017", "val")], classes=["dog", "cat"])
    with pytest.raises(ValueError, match="classes must be unique, got dog, dog"):
        COCODetection(tmp_path, [("2017", "val")], classes=["dog", "dog"])


def test_picture_without_annotations_stays_with_an_empty_target(tmp_path):
    dataset = read(val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10])]))
    assert dataset.target(0).shape == (0, 5) and dataset.target(0).dtype == np.float32
    assert dataset[0][0].shape == (HEIGHT, WIDTH, 3)
    assert dataset.target(-1).shape == (1, 5)
    with pytest.raises(IndexError):
        dataset.target(2)


def test_transform_gets_picture_and_a_target_of_its_own(tmp_path):
    def transform(image, target):
        target *= 2
        return image[:1], target

    root = val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10])])
    dataset = COCODetection(root, [("2017", "val")], transform)
    for _ in range(2):
        image, target = dataset[1]
        assert image.shape == (1, WIDTH, 3) and target.tolist() == [[20, 10, 58, 28, 2]]


def test_crowds_are_ordinary_boxes_or_left_out_and_counted(tmp_path):
    boxes = [annotation(1, 9, [10, 5, 20, 10], iscrowd=1), annotation(2, 9, [0, 0, 9, 9])]
    dataset = read(val2017(tmp_path, boxes))
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1], [0, 0, 8, 8, 1]]
    assert dataset.skipped == {}
    scores = dataset.evaluate(perfect(dataset), tmp_path / "a")["stats"]
    dataset = COCODetection(tmp_path, [("2017", "val")], crowds=False)
    assert dataset.target(0).tolist() == [[0, 0, 8, 8, 1]]
    [line] = dataset.report()
    assert line.startswith("crowd, left out: 1, e.g. instances_val2017.json: annotation 1 of image")
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


def test_boxes_without_area_are_dropped_and_clipped_ones_kept_and_both_counted(tmp_path):
    boxes = [
        annotation(1, 9, [10, 5, 0, 10]),
        annotation(2, 9, [10, 5, 20, -3]),
        annotation(3, 9, [WIDTH + 1, 5, 20, 10]),
        annotation(4, 9, [10, 5, 20, 10], area=0),
        annotation(5, 9, [50, -2, 20, 10]),
        annotation(6, 9, [50, 30, 10.004, 10]),  # touches the border but for COCO's rounding
        annotation(7, 9, [10, 5, 1, 10]),  # x2 = x1: no width that could be encoded
        annotation(8, 9, [-20, 5, 20, 10]),  # ends where the picture begins
        annotation(9, 9, [10, -30, 20, 10]),
        annotation(10, 9, [10, HEIGHT, 20, 10]),
    ]
    dataset = read(val2017(tmp_path, boxes))
    np.testing.assert_allclose(dataset.target(0), [[50, 0, 59, 9, 1], [50, 30, 59, 39, 1]])
    skipped = {reason: len(rows) for reason, rows in dataset.skipped.items()}
    assert skipped == {
        "box outside the picture, dropped": 4,
        "box without area in the picture, dropped": 3,
        "annotation of area 0 or less, dropped": 1,
        "box clipped to the picture": 1,
    }
    assert dataset.report()[3] == (
        "box clipped to the picture: 1, e.g. instances_val2017.json: annotation 5 of image 9,"
        " bbox [50.0, -2.0, 20.0, 10.0]"
    )


def test_annotations_need_neither_area_nor_iscrowd_nor_id(tmp_path):
    box = {"image_id": 9, "category_id": 3, "bbox": [10, 5, 20, 10]}
    assert len(read(val2017(tmp_path, [box])).target(0)) == 1


@pytest.mark.parametrize(
    ("year", "name", "file", "folder"),
    [
        ("2014", "train", "instances_train2014", "images/train2014"),
        ("2014", "val", "instances_val2014", "images/val2014"),
        ("2014", "minival", "instances_minival2014", "images/val2014"),
        ("2014", "valminusminival", "instances_valminusminival2014", "images/val2014"),
        ("2014", "test", "image_info_test2014", "images/test2014"),
        ("2015", "test", "image_info_test2015", "images/test2015"),
        ("2015", "test-dev", "image_info_test-dev2015", "images/test2015"),
        ("2017", "train", "instances_train2017", "train2017"),
        ("2017", "val", "instances_val2017", "val2017"),
        ("2017", "test", "image_info_test2017", "test2017"),
        ("2017", "test-dev", "image_info_test-dev2017", "test2017"),
    ],
)
@pytest.mark.parametrize("with_file_name", [True, False])
def test_names_of_every_published_split(tmp_path, year, name, file, folder, with_file_name):
    picture = f"{42:012d}.jpg"
    if year != "2017":
        picture = f"COCO_{folder.split('/')[1]}_{picture}"
    test = name.startswith("test")
    boxes = None if test else [annotation(1, 42, [10, 5, 20, 10])]
    write_set(tmp_path, f"{file}.json", folder, {42: picture}, boxes)
    if not with_file_name:
        path = tmp_path / "annotations" / f"{file}.json"
        document = json.loads(path.read_text())
        del document["images"][0]["file_name"]
        path.write_text(json.dumps(document))
    for image_set in ((year, name), (None, f"{name}{year}")):
        dataset = COCODetection(tmp_path, [image_set])
        assert dataset.image_sets == [(year, name)] and dataset.report() == []
        assert dataset.image_path(0) == tmp_path / folder / picture
        image, target = dataset[0]
        assert image.shape == (HEIGHT, WIDTH, 3) and target.shape == (0 if test else 1, 5)
    # Where the published code looked, which counts if there is none in annotations/.
    (tmp_path / "annotations").rename(tmp_path / "original_annotations")
    (tmp_path / "annotations").mkdir()
    assert COCODetection(tmp_path, [(year, name)]).ids == [42]
    write_set(tmp_path, f"{file}.json", folder, {43: picture}, boxes and [])
    assert COCODetection(tmp_path, [(year, name)]).ids == [43]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_either_place_of_a_split_serves_every_year(tmp_path, year):
    usual, other = (f"images/val{year}", f"val{year}")[:: 1 if year == "2014" else -1]
    names = {42: f"COCO_val{year}_{42:012d}.jpg" if year == "2014" else f"{42:012d}.jpg"}
    write_set(tmp_path, f"instances_val{year}.json", other, names, [])
    dataset = COCODetection(tmp_path, [(year, "val")])
    assert dataset.image_path(0) == tmp_path / other / names[42]
    assert "pictures are in another folder" in dataset.report()[0]
    write_set(tmp_path, f"instances_val{year}.json", usual, names, [])
    dataset = COCODetection(tmp_path, [(year, "val")])
    assert dataset.image_path(0) == tmp_path / usual / names[42] and dataset.report() == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("train", "a b.png"),
        ("train", "cam 1/x/0001.JPG"),
        ("images/train", "0001.png"),
        ("images", "Ünï/0001.png"),
        (".", "train/0001.png"),
        (".", "images/train/0001.png"),
        (".", "pictures/0001.png"),
    ],
)
def test_own_data_need_no_year_and_name_their_pictures(tmp_path, folder, name):
    big = 7_000_000_000_000
    categories = [{"id": big, "name": "Löwe"}, {"id": 0, "name": "a, b"}, {"id": -5, "name": "z"}]
    picture = tmp_path / folder / name
    picture.parent.mkdir(parents=True)
    boxes = [annotation(1, big, [10, 5, 20, 10], big), annotation(2, big, [1, 1, 9, 9], 0)]
    write_set(tmp_path, "instances_train.json", folder, {big: name}, boxes, categories=categories)
    dataset = COCODetection(tmp_path, [(None, "train")])
    assert dataset.ids == [big] and dataset.image_sets == [(None, "train")]
    assert dataset.classes == ("z", "a, b", "Löwe")
    assert dataset.category_ids == {1: -5, 2: 0, 3: big}
    assert dataset.image_path(0).samefile(picture) and dataset.image_path(-1).samefile(picture)
    image, target = dataset[0]
    assert image.shape == (HEIGHT, WIDTH, 3) and target[:, 4].tolist() == [3, 2]
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["image_set"] == "train" and report["value"] == pytest.approx(1)
    assert report["results"] == "detections_train_results.json"


def test_loader_processes_get_arrays_and_no_records(tmp_path):
    outline = [[float(n) for n in range(1000)]]
    boxes = [annotation(n, 42, [10, 5, 20, 10], segmentation=outline) for n in range(100)]
    dataset = read(val2017(tmp_path, boxes, ids=range(1, 401)))
    assert len(ForkingPickler.dumps(dataset)) < 50_000  # what a spawned process is sent
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(dataset.image_path, 41).result() == dataset.image_path(41)
        again = pool.submit(dataset.__getitem__, 41).result()
    np.testing.assert_array_equal(again[1], dataset[41][1])
    found, seen = [dataset], set()
    while found:
        for item in gc.get_referents(found.pop()):
            if id(item) not in seen and not isinstance(item, type | ModuleType):
                seen.add(id(item))
                found.append(item)
                assert not (isinstance(item, dict) and "bbox" in item)


def test_picture_names_of_a_custom_set_are_the_files_own(tmp_path):
    names = {1: "a b.png", 2: "Ünï.jpeg"}
    write_set(tmp_path, "instances_mine2024.json", "mine2024", names, [])
    dataset = COCODetection(tmp_path, [("2024", "mine")])
    assert [dataset.image_path(i).name for i in range(2)] == list(names.values())
    assert dataset[1][0].shape == (HEIGHT, WIDTH, 3)


def test_sets_are_joined_in_order(tmp_path):
    val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10])])
    boxes = [annotation(1, 5, [0, 0, 4, 4])]
    write_set(tmp_path, "instances_train2017.json", "train2017", {5: "5.jpg", 4: "4.jpg"}, boxes)
    dataset = COCODetection(tmp_path, [("2017", "val"), ("2017", "train")])
    assert dataset.ids == [9, 42, 4, 5]
    assert [len(dataset.target(i)) for i in range(4)] == [0, 1, 0, 1]
    assert dataset.image_path(2) == tmp_path / "train2017" / "4.jpg"
    for call in (dataset.check_scorable, lambda: dataset.evaluate([{}] * 4, tmp_path)):
        with pytest.raises(UserError, match="one image set at a time"):
            call()
    read(tmp_path).check_scorable()


def test_subset_of_another_split_takes_its_pictures_from_there_and_says_so(tmp_path):
    val2017(tmp_path, [])
    images = [
        {"id": 42, "file_name": "000000000042.jpg", "width": WIDTH, "height": HEIGHT,
         "coco_url": "http://images.cocodataset.org/val2017/000000000042.jpg"}
    ]  # fmt: skip
    path = tmp_path / "annotations" / "image_info_test-dev2017.json"
    path.write_text(json.dumps({"images": images, "categories": CATEGORIES}))
    dataset = COCODetection(tmp_path, [("2017", "test-dev")])
    assert dataset.image_path(0) == tmp_path / "val2017" / "000000000042.jpg"
    [line] = dataset.report()
    assert f"{tmp_path / 'val2017'}, they are not in {tmp_path / 'test2017'}" in line


def perfect(dataset):
    return [
        {"boxes": t[:, :4], "scores": np.ones(len(t), np.float32), "labels": t[:, 4].astype(int)}
        for t in map(dataset.target, range(len(dataset)))
    ]


def test_ground_truth_as_detections_scores_one_and_is_written_back_unchanged(tmp_path):
    boxes = [annotation(1, 42, [10, 5, 20, 10], 90), annotation(2, 9, [0.5, 1.25, 8, 4], 3)]
    dataset = read(val2017(tmp_path, boxes))
    report = dataset.evaluate(perfect(dataset), tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / "detections_val2017_results.json"
    assert report["results"] == path.name
    assert json.loads(path.read_text()) == [
        {"image_id": 9, "category_id": 3, "bbox": [0.5, 1.25, 8, 4], "score": 1},
        {"image_id": 42, "category_id": 90, "bbox": [10, 5, 20, 10], "score": 1},
    ]
    assert report["value"] == pytest.approx(1) and report["stats"][0] == report["value"]
    assert report["per_class"] == pytest.approx({"dog": 1, "kite": -1, "oar": 1})
    assert report["notes"] == ["no ground truth (-1) for 1 classes: kite"]
    assert (report["metric"], report["iou"], report["image_set"]) == (
        "COCO AP", "0.50:0.95", "2017_val")  # fmt: skip


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco", "faster-coco-eval"])
def test_report_says_what_scoring_the_written_file_says(tmp_path, backend):
    pytest.importorskip(backend.replace("-", "_"))
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (8, 2)).tolist()
    boxes = [
        annotation(k, (9, 42)[k % 2], [*corner, 20, 15], (3, 7)[k % 3 // 2])
        for k, corner in enumerate(corners, 1)
    ]
    dataset = read(val2017(tmp_path, boxes))
    detections = perfect(dataset)
    for found in detections:
        found["boxes"] += rng.normal(0, 2, found["boxes"].shape).astype(np.float32)
        found["scores"] = rng.random(len(found["boxes"]), np.float32)
    dataset.eval_backend = backend
    report = dataset.evaluate(detections, tmp_path / "out")
    path = tmp_path / "out" / report["results"]
    written = np.array([r["bbox"] for r in json.loads(path.read_text())])
    assert np.array_equal(written, written.round(4)) and written.shape == (8, 4)
    truth = tmp_path / "annotations" / "instances_val2017.json"
    scored = evaluate_coco(path, truth, backend, tmp_path / "again.npz")
    assert 0 < report["value"] < 1 and report["value"] == scored["stats"][0]
    assert report["stats"] == scored["stats"] and report["per_class"] == scored["per_category"]
    assert report["per_size"] == scored["per_size"]
    assert report["per_class_per_size"] == scored["per_category_per_size"]
    assert report["backend"] == scored["backend"] and report["backend"].startswith(f"{backend} ")
    assert report["curves"] == "curves.npz"
    kept, again = (load_curves(tmp_path / name) for name in ("out/curves.npz", "again.npz"))
    assert kept.classes == dataset.classes
    assert all(np.array_equal(kept.arrays[key], again.arrays[key]) for key in again.arrays)
    json.dumps(report)


@pytest.mark.parametrize("change", [{"labels": [4]}, {"labels": [0]}, {"scores": [np.nan]},
                                    {"boxes": [[0, 0, np.inf, 1]]},
                                    {"boxes": [[0, 0, 1e160, 1e160]]}])  # fmt: skip
def test_wrong_detections_are_not_written(tmp_path, change):
    dataset = read(val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)], ids=(42,)))
    found = {"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [1]} | change
    with pytest.raises(ValueError, match="image 42: detection with label . of 3, score .*, box "):
        dataset.evaluate([found], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_detections_whose_arrays_differ_in_length_are_not_written(tmp_path):
    dataset = read(val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)], ids=(42,)))
    found = {"boxes": np.zeros((2, 4)), "scores": [0.5], "labels": [1]}
    with pytest.raises(ValueError, match="image 42: 1 scores, 1 labels and 2 boxes"):
        dataset.evaluate([found], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("test", [False, True])
def test_disk_that_is_full_is_told_with_the_file_and_leaves_none(tmp_path, monkeypatch, test):
    names = {42: "000000000042.jpg"}
    if test:
        write_set(tmp_path, "image_info_test2017.json", "test2017", names)
    else:
        write_set(tmp_path, "instances_val2017.json", "val2017", names, [])
    dataset = COCODetection(tmp_path, [("2017", "test" if test else "val")])
    nothing = {"boxes": np.zeros((0, 4)), "scores": [], "labels": []}
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []

    def fsync(file):
        calls.append(file)
        if len(calls) > 2 * test:  # of the results, or of the archive behind them
            raise full

    monkeypatch.setattr("utils.files.os.fsync", fsync)
    name = "test2017_SSD_results.zip" if test else "val2017_results.json"
    with pytest.raises(UserError, match=rf"out/detections_{name} could not .* No space left"):
        dataset.evaluate([nothing], tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == (["detections_test2017_SSD_results.json"] if test else [])


def test_no_detections_score_zero(tmp_path):
    dataset = read(val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)]))
    nothing = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}
    report = dataset.evaluate([nothing] * 2, tmp_path)
    assert report["value"] == 0 and report["per_class"] == {"dog": -1, "kite": -1, "oar": 0}
    assert "none of the 100 best detections" in report["notes"][0]
    with pytest.raises(ValueError, match="1 detections for 2 images"):
        dataset.evaluate([nothing], tmp_path)


def test_test_set_is_written_for_the_server_and_not_scored(tmp_path):
    names = {42: "000000000042.jpg"}
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", names)
    dataset = COCODetection(tmp_path, [("2017", "test-dev")])
    found = {"boxes": np.float32([[1, 2, 3, 4]]), "scores": np.float32([0.5]),
             "labels": np.array([2])}  # fmt: skip
    report = dataset.evaluate([found], tmp_path / "out", name="net")
    path = tmp_path / "out" / "detections_test-dev2017_net_results.json"
    assert json.loads(path.read_text()) == [
        {"image_id": 42, "category_id": 7, "bbox": [1, 2, 3, 3], "score": 0.5}
    ]
    assert report["value"] is None and report["per_class"] == {}
    assert "no ground truth" in report["notes"][0]
    assert "curves" not in report and not (tmp_path / "out" / "curves.npz").exists()
    archive = path.with_suffix(".zip")
    assert (report["results"], report["archive"]) == (path.name, archive.name)
    assert str(archive) in report["notes"][0]
    truth = tmp_path / "annotations" / "image_info_test-dev2017.json"
    assert check_submission(path.with_name(archive.name), truth) == 1
    with zipfile.ZipFile(archive) as archive:
        assert archive.namelist() == [path.name]
        assert archive.read(path.name) == path.read_bytes()
    for name in ("", "a/b", "../net", "a net", "Ünet"):
        with pytest.raises(ValueError, match="cannot be in the name of a submitted file"):
            dataset.evaluate([found], tmp_path / "out", name=name)


def test_test_set_with_ground_truth_is_an_ordinary_set(tmp_path):
    names, boxes = {42: "000000000042.jpg"}, [annotation(1, 42, [10, 5, 20, 10])]
    write_set(tmp_path, "image_info_test2024.json", "test2024", names)
    write_set(tmp_path, "instances_test2024.json", "test2024", names, boxes)
    dataset = COCODetection(tmp_path, [("2024", "test")])
    assert dataset.target(0).tolist() == [[10, 5, 29, 14, 1]]
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["value"] == pytest.approx(1) and "archive" not in report
    assert report["results"] == "detections_test2024_results.json"


def test_set_with_an_image_info_file_alone_has_no_ground_truth(tmp_path):
    write_set(tmp_path, "image_info_field2024.json", "field2024", {42: "a.png"})
    dataset = COCODetection(tmp_path, [("2024", "field")])
    assert dataset.target(0).shape == (0, 5)
    assert dataset.evaluate(perfect(dataset), tmp_path / "out")["value"] is None


def test_names_that_no_file_can_have_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such annotation file"):
        COCODetection(tmp_path, [("2017", "v" * 300)])
    with pytest.raises(UserError, match="~no such user.*no such annotation file"):
        COCODetection("~no such user/coco", [("2017", "val")])
    val2017(tmp_path, [], images=[{**IMAGE, "file_name": "n" * 300}], ids=())
    with pytest.raises(UserError, match="1 of the 1 pictures"):
        read(tmp_path)


def test_reading_writes_nothing_under_the_root(tmp_path):
    before = sorted(val2017(tmp_path, []).rglob("*"))
    read(tmp_path)[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_annotation_file_names_the_sets_that_exist(tmp_path):
    val2017(tmp_path, [])
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", {})
    write_set(tmp_path, "instances_mine.json", "mine", {})
    write_set(tmp_path, "captions_train2017.json", "train2017", {})
    (tmp_path / "original_annotations").mkdir()
    (tmp_path / "original_annotations" / "instances_minival2014.json").touch()
    assert list_image_sets(tmp_path) == [
        (None, "mine"), ("2014", "minival"), ("2017", "test-dev"), ("2017", "val")]  # fmt: skip
    there = "mine, 2014_minival, 2017_test-dev, 2017_val"
    with pytest.raises(UserError, match=f"instances_train2017.json: no such.*: {there} "):
        COCODetection(tmp_path, [("2017", "train")])
    with pytest.raises(UserError, match="image sets in .*nowhere: none; .* none .--root"):
        read(tmp_path / "nowhere")
    for name in ("annotations/train.json", "val/_annotations.coco.json"):
        (tmp_path / "other" / name).parent.mkdir(parents=True)
        (tmp_path / "other" / name).touch()
    there = "none; JSON files there: annotations/train.json, val/_annotations.coco.json"
    with pytest.raises(UserError, match=f"image sets in .*other: {there} .--root"):
        read(tmp_path / "other")


def test_missing_pictures_are_counted_and_the_first_ten_named(tmp_path):
    val2017(tmp_path, [], ids=range(1, 16))
    for id in range(1, 13):
        (tmp_path / "val2017" / f"{id:012d}.jpg").unlink()
    with pytest.raises(UserError, match=r"12 of the 15 pictures.* 000000000001.jpg, ") as error:
        read(tmp_path)
    assert "000000000010.jpg ..." in str(error.value) and "011.jpg" not in str(error.value)


def test_missing_picture_folder(tmp_path):
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", {1: "1.jpg"})
    (tmp_path / "test2017").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError,
        match="test2017: no such folder.*image_info_test-dev2017.json, such as 1.jpg; nor",
    ):
        COCODetection(tmp_path, [("2017", "test-dev")])


def test_picture_of_another_size_than_annotated(tmp_path):
    dataset = read(val2017(tmp_path, []))
    small = cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    dataset.image_path(0).write_bytes(small)
    with pytest.raises(
        UserError,
        match="0009.jpg: the picture is 30 x 20, but .*instances_val2017.json says 60 x 40",
    ):
        dataset[0]


def test_picture_turned_by_exif_is_read_as_annotated_and_told_once(tmp_path, caplog):
    dataset = read(val2017(tmp_path, []))
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, WIDTH // 2 :] = 255  # white on the right
    picture = cv2.imencode(".jpg", pixels)[1].tobytes()
    dataset.image_path(0).write_bytes(with_exif(picture, orientation=6))
    for _ in range(2):
        image = dataset[0][0]
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert image[5, 5].max() < 9 < 246 < image[5, -5].min()
    (record,) = caplog.records
    assert "09.jpg: an EXIF orientation tag turns the picture to 40 x 60" in record.getMessage()
    assert "instances_val2017.json says 60 x 40; it is read as stored" in record.getMessage()
    # A turned picture that is annotated as such is right, and so is a tag that turns nothing.
    turned = cv2.imencode(".jpg", np.zeros((WIDTH, HEIGHT, 3), np.uint8))[1].tobytes()
    dataset.image_path(0).write_bytes(with_exif(turned, orientation=6))
    dataset.image_path(1).write_bytes(with_exif(picture))
    assert dataset[0][0].shape == dataset[1][0].shape == (HEIGHT, WIDTH, 3)


def test_damaged_picture_is_named_when_it_is_read(tmp_path):
    dataset = read(val2017(tmp_path, []))
    dataset.image_path(0).write_bytes(b"")
    dataset.image_path(1).write_bytes(b"no picture")
    for i, said in enumerate(("0009.jpg: the picture file is empty", "0042.jpg: not a picture")):
        with pytest.raises(UserError, match=said):
            dataset[i]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a COCO annotation file"),
        ("{}", "has no list of images"),
        ("[" * 100_000, "not a JSON file"),
        ('{"images": [{"id": 1}]}', r"images\[0\] \(id 1\) needs a whole number as 'width'"),
    ],
)
def test_malformed_file(tmp_path, text, message):
    val2017(tmp_path, [])
    (tmp_path / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(UserError, match=f"instances_val2017.json: {message}"):
        read(tmp_path)


BOX = annotation(17, 9, [10, 5, 20, 10])
IMAGE = {"id": 9, "width": WIDTH, "height": HEIGHT}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"annotations": None}, "has no list of annotations"),
        ({"annotations": [5]}, r"annotations\[0\] needs 4 finite numbers as 'bbox'"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 3]}]}, r"\(id 17\).*'bbox', found \[1, 2, 3\]"),
        ({"annotations": [BOX, {**BOX, "bbox": [1, 2, 3, np.nan]}]}, r"annotations\[1\].*nan"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 3, "4"]}]}, "4 finite numbers"),
        ({"annotations": [BOX, {**BOX, "bbox": [0, 0, 1e160, 1e160]}]},
         r"annotations\[1\] \(id 17\) needs 4 numbers up to 1e\+100 as 'bbox', found \[0, 0, 1e"),
        ({"annotations": [{**BOX, "area": "big"}]}, "a finite number as 'area', found 'big'"),
        ({"annotations": [{**BOX, "image_id": "9"}]}, "a whole number as 'image_id', found '9'"),
        ({"annotations": [{**BOX, "image_id": 10**30}]}, "a whole number as 'image_id'"),
        ({"annotations": [BOX, {**BOX, "image_id": 8}]}, r"annotations\[1\] has the image_id 8"),
        ({"annotations": [{**BOX, "category_id": 5}]}, "has the category_id 5, .* 3 to 90"),
        ({"images": []}, "lists no images"),
        ({"images": [IMAGE, IMAGE]}, "images id 9 occurs twice"),
        ({"images": [{**IMAGE, "width": 0}]}, r"image id 9 has the size \[0, 40\]"),
        ({"images": [{**IMAGE, "width": 60.5}]}, "a whole number as 'width', found 60.5"),
        ({"images": [{**IMAGE, "width": 1e300}]}, "a whole number as 'width'"),
        ({"annotations": [{**BOX, "iscrowd": "0"}]}, r"annotations\[0\] \(id 17\) needs 0 or 1 as"
         " 'iscrowd', found '0'"),
        ({"annotations": [{**BOX, "iscrowd": 2}]}, "0 or 1 as 'iscrowd', found 2"),
        ({"annotations": [{**BOX, "iscrowd": None}]}, "0 or 1 as 'iscrowd', found None"),
        ({"categories": []}, "lists no categories"),
        ({"categories": [{"id": 3}]}, "category id 3 has no name of its own"),
        ({"categories": [{"id": 3, "name": 5}]}, "category id 3 has no name of its own: 5"),
        ({"categories": [{"id": 3, "name": " "}]}, "category id 3 has no name of its own: ' '"),
        ({"categories": [{"id": i, "name": "dog"} for i in (1, 2)]}, "category id 2 has no name"),
    ],
)  # fmt: skip
def test_malformed_records_are_named(tmp_path, document, message):
    path = val2017(tmp_path, []) / "annotations" / "instances_val2017.json"
    valid = {"images": [IMAGE], "categories": CATEGORIES, "annotations": [BOX]}
    path.write_text(json.dumps(valid | document))
    with pytest.raises(UserError, match=f"instances_val2017.json: .*{message}"):
        read(tmp_path)


def test_whole_floats_and_an_area_of_null_and_booleans_are_accepted(tmp_path):
    boxes = [BOX, {**BOX, "id": 18, "area": None, "iscrowd": True, "image_id": 9.0}]
    images = [{**IMAGE, "width": float(WIDTH)}]
    file = read_annotations(
        val2017(tmp_path, boxes, images=images) / "annotations/instances_val2017.json"
    )
    assert file.sizes.tolist() == [[WIDTH, HEIGHT]] and file.sizes.dtype == np.int64
    assert file.crowds.tolist() == [False, True] and file.areas.tolist() == [200, 200]


def test_sets_that_do_not_fit_together(tmp_path):
    val2017(tmp_path, [])
    names = {9: "9.jpg"}
    write_set(tmp_path, "instances_train2017.json", "train2017", names, [])
    sets = [("2017", "val"), ("2017", "train")]
    with pytest.raises(UserError, match="image id 9 is in more than one"):
        COCODetection(tmp_path, sets)
    other = [{"id": 1, "name": "dog"}]
    write_set(tmp_path, "instances_train2017.json", "train2017", names, [], categories=other)
    with pytest.raises(UserError, match="train2017.json: its categories differ from instances_val"):
        COCODetection(tmp_path, sets)


def test_benchmark_of_loading_says_seconds_and_memory(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--images", "300", "--boxes", "2000", "--rounds", "1", "--json", str(out)]
    assert coco_load.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("300 pictures, 2000 boxes, a file of 1 MB")
    assert [line.split()[0] for line in lines[2:]] == ["json.load", "pycocotools", "reader"]
    found = json.loads(out.read_text())["medians"]
    assert found["reader"]["worker"] < found["pycocotools"]["worker"]
    assert found["reader"]["sent"] < 0.2
    coco_load.make_root(tmp_path, 300, 2000)
    dataset = COCODetection(tmp_path, [("2017", "train")])
    assert len(dataset) == 300 and sum(len(dataset.target(i)) for i in range(300)) == 2000


def some_boxes():
    """Objects of four of the pictures 1 to 6; 2 has none, and that of 4 has no area."""
    return [
        annotation(1, 5, [3, 3, 20, 20], 7),
        annotation(2, 1, [10, 5, 20, 10], 90),
        annotation(3, 4, [10, 5, 1, 10], 3),
        annotation(4, 3, [0.5, 1.25, 8, 4], 3),
        annotation(5, 1, [30, 5, 20, 12], 3),
        annotation(6, 6, [1, 1, 9, 9], 7),
    ]


def test_first_pictures_with_objects_are_kept_as_they_are(tmp_path):
    whole = read(val2017(tmp_path, some_boxes(), ids=(6, 5, 4, 3, 2, 1)))
    dataset = read(tmp_path)
    dataset.keep_first(3)
    assert len(dataset) == 3 and dataset.ids == [1, 3, 5] and dataset.classes == whole.classes
    for i, before in enumerate([0, 2, 4]):
        image, target = dataset[i]
        assert np.array_equal(image, whole[before][0])
        assert target.tolist() == dataset.target(i).tolist() == whole.target(before).tolist()
        assert dataset.image_path(i) == whole.image_path(before)
        assert dataset.image_size(i) == whole.image_size(before)
        assert np.array_equal(dataset.pull_image(i), whole.pull_image(before))
    assert dataset.target(-1).tolist() == [[3, 3, 22, 22, 2]] and dataset.report()
    with pytest.raises(IndexError):
        dataset.target(3)
    dataset.keep_first(1)
    assert dataset.ids == [1] and len(dataset.target(0)) == 2


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco", "faster-coco-eval"])
def test_first_pictures_are_scored_as_a_set_of_only_them(tmp_path, backend):
    pytest.importorskip(backend.replace("-", "_"))
    boxes = some_boxes()
    dataset = read(val2017(tmp_path / "all", boxes, ids=range(1, 7)))
    dataset.keep_first(2)
    of_them = [box for box in boxes if box["image_id"] in (1, 3)]
    only = read(val2017(tmp_path / "only", of_them, ids=(1, 3)))
    dataset.eval_backend = only.eval_backend = backend
    detections = perfect(dataset)
    report = dataset.evaluate(detections, tmp_path / "out")
    assert report["value"] == pytest.approx(1)
    assert report["per_class"] == pytest.approx({"dog": 1, "kite": -1, "oar": 1})
    assert report == only.evaluate(perfect(only), tmp_path / "out")
    detections[0]["boxes"] += np.float32(2)
    report = dataset.evaluate(detections, tmp_path / "out")
    assert 0 < report["value"] < 1
    assert report == only.evaluate(detections, tmp_path / "out")


def test_loader_processes_get_the_first_pictures_alone(tmp_path):
    boxes = [annotation(n, n, [10, 5, 20, 10]) for n in range(1, 401)]
    dataset = read(val2017(tmp_path, boxes, ids=range(1, 401)))
    before = len(ForkingPickler.dumps(dataset))
    dataset.keep_first(4)
    assert len(ForkingPickler.dumps(dataset)) < before / 10
    assert dataset._offsets.tolist() == [0, 1, 2, 3, 4] and dataset._boxes.base is None


def test_image_sets_without_a_picture_kept_are_gone(tmp_path):
    val2017(tmp_path, [annotation(1, 42, [10, 5, 20, 10], 90)])
    boxes = [annotation(1, 5, [0, 0, 4, 4]), annotation(2, 4, [3, 0, 4, 4])]
    write_set(tmp_path, "instances_train2017.json", "train2017", {5: "5.jpg", 4: "4.jpg"}, boxes)
    write_set(tmp_path, "instances_own.json", "own", {1: "1.jpg"}, [])
    sets = [("2017", "val"), (None, "own"), ("2017", "train")]
    dataset = COCODetection(tmp_path, sets)
    dataset.keep_first(2)
    assert dataset.ids == [42, 4] and dataset.image_sets == [("2017", "val"), ("2017", "train")]
    assert dataset.image_path(1) == tmp_path / "train2017" / "4.jpg"
    assert (dataset[1][0] == 4).all() and dataset.target(1).tolist() == [[3, 0, 6, 3, 1]]
    for call in (dataset.check_scorable, lambda: dataset.evaluate(perfect(dataset), tmp_path)):
        with pytest.raises(UserError, match="one image set at a time"):
            call()
    dataset = COCODetection(tmp_path, sets[::-1])
    dataset.keep_first(2)
    dataset.check_scorable()
    report = dataset.evaluate(perfect(dataset), tmp_path / "out")
    assert report["image_set"] == "2017_train" and report["value"] == pytest.approx(1)


def test_more_pictures_than_have_objects_cannot_be_kept(tmp_path):
    dataset = read(val2017(tmp_path, some_boxes(), ids=range(1, 7)))
    message = "2017_val: 4 of 6 pictures have objects, too few to keep 5; ask for fewer"
    with pytest.raises(UserError, match=f"^{tmp_path}: {message}"):
        dataset.keep_first(5)
    with pytest.raises(ValueError, match="cannot keep -1 pictures"):
        dataset.keep_first(-1)
    assert len(dataset) == 6
    write_set(tmp_path, "image_info_test2017.json", "test2017", {42: f"{42:012d}.jpg"})
    dataset = COCODetection(tmp_path, [("2017", "test")])
    with pytest.raises(UserError, match=r"2017_test: 0 of 1 pictures .* or take another image set"):
        dataset.keep_first(1)
