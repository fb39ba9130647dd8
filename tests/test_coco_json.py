"""COCO's annotation files: what is malformed, where files and images lie, files for the server."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from coco_files import CATEGORIES, HEIGHT, WIDTH, annotation, write_set, write_val2017

from data.coco import COCODetection
from data.coco_json import read_annotations
from data.coco_layout import list_image_sets
from data.coco_results import check_submission
from data.skips import SkipKind
from utils.errors import UserError

FILE = "annotations/instances_val2017.json"
IMAGE = {"id": 9, "width": WIDTH, "height": HEIGHT}
BOX = annotation(17, 9, [10, 5, 20, 10])


@pytest.mark.parametrize(("document", "message"), [
    ("{", "not a JSON file"),
    ("[" * 100_000, "not a JSON file"),
    ("{}\n{}", "not a JSON file .Extra data.* as one document"),
    ('{"a": "\xe9"}'.encode("latin-1"), "not a JSON file .*0xe9.* in UTF-8"),
    ("[]", "not a COCO annotation file"),
    ("{}", "no list of images"),
    ({"annotations": None}, "no list of annotations"),
    ({"annotations": [5]}, r"annotations\[0\] needs 4 finite numbers as 'bbox'"),
    ({"annotations": [{**BOX, "bbox": [1, 2, 3]}]}, r"\(id 17\).*'bbox', found \[1, 2, 3\]"),
    ({"annotations": [BOX, {**BOX, "bbox": [1, 2, 3, np.nan]}]}, r"annotations\[1\].*nan"),
    ({"annotations": [{**BOX, "bbox": [1, 2, 3, "4"]}]}, "4 finite numbers"),
    ({"annotations": [BOX, {**BOX, "bbox": [0, 0, 1e160, 1e160]}]},
     r"annotations\[1\] \(id 17\) needs 4 numbers up to 1e\+100 as 'bbox', found \[0, 0, 1e"),
    ({"annotations": [{**BOX, "bbox": []}]}, r"4 finite numbers as 'bbox', found \[\]"),
    ({"annotations": [{**BOX, "image_id": "9a"}]}, "a whole number as 'image_id', found '9a'"),
    ({"annotations": [{**BOX, "image_id": 10**30}]}, "a whole number as 'image_id'"),
    ({"annotations": [BOX, {**BOX, "image_id": 8}]}, r"annotations\[1\] has the image_id 8"),
    ({"annotations": [{**BOX, "category_id": 5}]}, "has the category_id 5, .* 3 to 90"),
    ({"images": []}, "lists no images"),
    ({"images": [IMAGE, IMAGE]}, "images id 9 occurs twice"),
    ({"images": [{**IMAGE, "width": -1}]}, r"image id 9 has the size \[-1, 40\]"),
    ({"images": [{**IMAGE, "width": [[9]]}]}, r"images\[0\] \(id 9\) .* 'width', found \[\[9\]\]"),
    ({"images": [{**IMAGE, "width": 60.5}]}, "a whole number as 'width', found 60.5"),
    ({"annotations": [{**BOX, "iscrowd": "0"}]},
     r"annotations\[0\] \(id 17\) needs 0 or 1 as 'iscrowd', found '0'"),
    ({"annotations": [{**BOX, "iscrowd": None}]}, "0 or 1 as 'iscrowd', found None"),
    ({"categories": []}, "lists no categories"),
    ({"categories": [{"id": 3}]}, r"categories\[0\] \(id 3\) needs a text as 'name', found None"),
    ({"categories": [{"id": 3, "name": " "}]}, "needs a text as 'name', found ' '"),
    ({"categories": [{"id": 3, "name": "a\ud83d"}]}, r"class name 'a\\ud83d' .*rename"),
    ({"categories": [{"id": 3, "name": "a\0"}]}, r"class name 'a\\x00' .*rename"),
    ({"categories": [{"id": 3, "name": "background"}]}, 'leave "background" out'),
    ({"categories": [{"id": i, "name": "dog"} for i in (1, 3)],
      "annotations": [BOX, {**BOX, "category_id": 1}]}, "ids 1 and 3 have the same name 'dog'")])
def test_malformed_file_is_refused_by_record_and_value(tmp_path, document, message):
    path = write_val2017(tmp_path, []) / FILE
    if isinstance(document, dict):
        valid = {"images": [IMAGE], "categories": CATEGORIES, "annotations": [BOX]}
        document = json.dumps(valid | document)
    path.write_bytes(document if isinstance(document, bytes) else document.encode())
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        read_annotations(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_whole_floats_and_booleans_and_missing_fields_are_accepted(tmp_path, encoding):
    least = {"image_id": "9", "category_id": 3, "bbox": [10, 5, 20, 10]}
    boxes = [BOX, {**BOX, "id": 18, "area": None, "iscrowd": True, "image_id": 9.0}, least]
    images = [{**IMAGE, "id": "9", "width": float(WIDTH)}, {"id": 10.0},
              {**IMAGE, "id": 11, "height": 0}]  # fmt: skip
    path = write_val2017(tmp_path, boxes, images=images) / FILE
    path.write_text(path.read_text(), encoding)
    file = read_annotations(path)
    assert file.sizes.tolist() == [[WIDTH, HEIGHT], [0, 0], [0, 0]] and file.sizes.dtype == np.int64
    assert file.crowds.tolist() == [False, True, False]
    assert file.areas.tolist() == [200, 200, 200] and file.annotation_ids == [17, 18, None]


@pytest.mark.parametrize("outline", [[[2, 3, 7, 3, 7, 8.5], [4, 1, 5, 1, 5, 2]],
                                     {"size": [10, 20], "counts": [21, 9, 1, 9, 160]},
                                     {"size": [10, 20], "counts": "e0910o4"}])
def test_annotation_without_a_box_gets_the_one_around_its_outline(tmp_path, outline):
    box = {"id": 1, "image_id": 9, "category_id": 3, "segmentation": outline}
    found = read_annotations(write_val2017(tmp_path, [box, {**box, "bbox": []}]) / FILE).boxes
    expected = [2, 1, 5, 7.5] if isinstance(outline, list) else [2, 1, 2, 9]
    assert found.tolist() == [expected, expected]


def test_cvats_rotated_box_becomes_the_one_around_it(tmp_path):
    turned = {**BOX, "bbox": [30, 30, 40, 10], "attributes": {"occluded": False, "rotation": 90.0}}
    found = read_annotations(write_val2017(tmp_path, [turned]) / FILE).boxes
    np.testing.assert_allclose(found, [[45, 15, 10, 40]])
    outline = {**turned, "segmentation": [[30, 30, 70, 30, 70, 40]]}
    other = {**turned, "attributes": {"rotation": "left"}}
    for record in (outline, other):
        found = read_annotations(write_val2017(tmp_path, [record]) / FILE).boxes
        np.testing.assert_allclose(found, [[30, 30, 40, 10]])


@pytest.mark.parametrize(("categories", "classes", "left_out"), [
    ([(0, "car", "none"), (1, "car", "car")], {"car": 1}, ["id 0"]),
    ([(1, "car", ""), (4, "car ", "")], {"car": 1}, ["id 4"]),
    ([(0, "all", "none"), (1, "car", "all"), (2, "van", "all")], {"car": 1, "van": 2}, ["all"]),
    ([(0, "all", "all"), (1, "car", "all"), (2, "van", "all")], {"car": 1, "van": 2}, ["all"]),
    ([(0, "background", None), (1, "car", None)], {"car": 1}, ["id 0"]),
    ([(1, "car", "vehicle")], {"car": 1}, []),
    ([(1, "car", "none"), (2, "van", "car")], {"car": 1, "van": 2}, []),
    ([(1, "car", "car"), (2, "van", "car")], {"car": 1, "van": 2}, [])])
def test_root_and_empty_duplicate_are_left_out(tmp_path, categories, classes, left_out):
    records = [dict(zip(("id", "name", "supercategory"), each, strict=True)) for each in categories]
    write_val2017(tmp_path, [annotation(1, 9, [10, 5, 20, 10], 1)], categories=records)
    write_set(tmp_path, "instances_no.json", "no", {1: "1.jpg"}, [], categories=records)
    dataset = COCODetection(tmp_path, [("2017", "val")])
    assert COCODetection(tmp_path, [(None, "no")], classes=["car"]).classes == ("car",)
    assert dict(zip(dataset.classes, dataset.category_ids.values(), strict=True)) == classes
    assert dataset.target(0)[:, 4].tolist() == [1]
    assert [skip.kind for skip in dataset.skipped] == [SkipKind.CATEGORY_SURPLUS] * len(left_out)
    assert all(name in skip.detail for skip, name in zip(dataset.skipped, left_out, strict=True))


@pytest.mark.parametrize(("year", "name", "file", "folder"), [
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
    ("2017", "test-dev", "image_info_test-dev2017", "test2017")])
@pytest.mark.parametrize("with_file_name", [True, False])
def test_names_of_every_published_split(tmp_path, year, name, file, folder, with_file_name):
    image_name = f"{42:012d}.jpg"
    if year != "2017":
        image_name = f"COCO_{folder.split('/')[1]}_{image_name}"
    test = name.startswith("test")
    boxes = None if test else [annotation(1, 42, [10, 5, 20, 10])]
    write_set(tmp_path, f"{file}.json", folder, {42: image_name}, boxes)
    if not with_file_name:
        path = tmp_path / "annotations" / f"{file}.json"
        document = json.loads(path.read_text())
        del document["images"][0]["file_name"]
        path.write_text(json.dumps(document))
    for image_set in ((year, name), (None, f"{name}{year}")):
        dataset = COCODetection(tmp_path, [image_set])
        assert dataset.image_sets == [(year, name)] and dataset.report() == []
        assert dataset.image_path(0) == tmp_path / folder / image_name
        image, target = dataset[0]
        assert image.shape == (HEIGHT, WIDTH, 3) and target.shape == (0 if test else 1, 5)
    # Where the published code looked; annotations/ comes first.
    (tmp_path / "annotations").rename(tmp_path / "original_annotations")
    (tmp_path / "annotations").mkdir()
    assert COCODetection(tmp_path, [(year, name)]).ids == [42]
    write_set(tmp_path, f"{file}.json", folder, {43: image_name}, boxes and [])
    assert COCODetection(tmp_path, [(year, name)]).ids == [43]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_either_place_of_a_split_serves_every_year(tmp_path, year):
    usual, other = (f"images/val{year}", f"val{year}")[:: 1 if year == "2014" else -1]
    names = {42: f"COCO_val{year}_{42:012d}.jpg" if year == "2014" else f"{42:012d}.jpg"}
    write_set(tmp_path, f"instances_val{year}.json", other, names, [])
    dataset = COCODetection(tmp_path, [(year, "val")])
    assert dataset.image_path(0) == tmp_path / other / names[42]
    assert [skip.kind for skip in dataset.skipped] == [SkipKind.OTHER_FOLDER]
    write_set(tmp_path, f"instances_val{year}.json", usual, names, [])
    dataset = COCODetection(tmp_path, [(year, "val")])
    assert dataset.image_path(0) == tmp_path / usual / names[42] and dataset.skipped == []


def test_subset_of_another_split_takes_its_images_from_there_and_says_so(tmp_path):
    write_val2017(tmp_path, [])
    url = "http://images.cocodataset.org/val2017/000000000042.jpg"
    images = [{**IMAGE, "id": 42, "file_name": "000000000042.jpg", "coco_url": url}]
    path = tmp_path / "annotations" / "image_info_test-dev2017.json"
    path.write_text(json.dumps({"images": images, "categories": CATEGORIES}))
    dataset = COCODetection(tmp_path, [("2017", "test-dev")])
    assert dataset.image_path(0) == tmp_path / "val2017" / "000000000042.jpg"
    [(kind, image, box, detail)] = dataset.skipped
    assert (kind, image, box) == (SkipKind.OTHER_FOLDER, None, None)
    assert str(tmp_path / "val2017") in detail and str(tmp_path / "test2017") in detail


@pytest.mark.parametrize(("folder", "name"), [
    ("train", "a b.png"), ("train", "cam 1/x/0001.JPG"), ("images/train", "0001.png"),
    ("images", "Ünï/0001.png"), (".", "train/0001.png"), (".", "images/train/0001.png"),
    (".", "pictures/0001.png")])
def test_own_data_need_no_year_and_name_their_images(tmp_path, folder, name):
    big = 7_000_000_000_000
    categories = [{"id": big, "name": "Löwe"}, {"id": 0, "name": "a, b"}, {"id": -5, "name": "z"}]
    (path := tmp_path / folder / name).parent.mkdir(parents=True)
    boxes = [annotation(1, big, [10, 5, 20, 10], big), annotation(2, big, [1, 1, 9, 9], 0)]
    write_set(tmp_path, "instances_train.json", folder, {big: name}, boxes, categories=categories)
    dataset = COCODetection(tmp_path, [(None, "train")])
    assert dataset.ids == [big] and dataset.image_sets == [(None, "train")]
    assert dataset.classes == ("z", "a, b", "Löwe")
    assert dataset.category_ids == {1: -5, 2: 0, 3: big}
    assert dataset.image_path(0).samefile(path) and dataset.image_path(-1).samefile(path)
    image, target = dataset[0]
    assert image.shape == (HEIGHT, WIDTH, 3) and target[:, 4].tolist() == [3, 2]


def test_missing_annotation_file_names_the_sets_that_exist(tmp_path):
    write_val2017(tmp_path, [])
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", {})
    write_set(tmp_path, "instances_mine.json", "mine", {})
    write_set(tmp_path, "captions_train2017.json", "train2017", {})
    (tmp_path / "original_annotations").mkdir()
    (tmp_path / "original_annotations" / "instances_minival2014.json").touch()
    there = "mine, 2014_minival, 2017_test-dev, 2017_val"
    assert ", ".join(map(str, list_image_sets(tmp_path))) == there
    for root, name, message in (
            (tmp_path, "train", f"instances_train2017.json: .*: {there} .--root"),
            (tmp_path, "v" * 300, f": {there} .--root"),
            (tmp_path / "nowhere", "val", "image sets in .*nowhere: none .--root"),
            ("~no such user/coco", "val", "~no such user.*no such annotation file")):
        with pytest.raises(UserError, match=message):
            COCODetection(root, [("2017", name)])


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    write_val2017(tmp_path, [], ids=range(3, 13))
    for id in range(3, 10):
        (tmp_path / "val2017" / f"{id:012d}.jpg").unlink()
    said = r" missing \(7\): .*/val2017/0*3.jpg \(.*instances_val2017.json\), .*07.jpg .*; copy"
    with pytest.raises(UserError, match=said):
        COCODetection(tmp_path, [("2017", "val")])
    faults: list[str] = []  # for the check of a data set: told when they are read
    dataset = COCODetection(tmp_path, [("2017", "val")], faults=faults)
    with pytest.raises(UserError, match="000000000003.jpg"):
        dataset.pull_image(0)
    write_val2017(tmp_path, [], images=[{**IMAGE, "file_name": "n" * 300}], ids=())
    with pytest.raises(UserError, match=r"images missing \(1\): .*/nnn"):
        COCODetection(tmp_path, [("2017", "val")])
    write_set(tmp_path, "image_info_test-dev2017.json", "test2017", {1: "1.jpg"})
    shutil.rmtree(tmp_path / "test2017")
    message = "test2017: no such folder.*image_info_test-dev2017.json, such as 1.jpg; nor"
    with pytest.raises(UserError, match=message):
        COCODetection(tmp_path, [("2017", "test-dev")])


FIT = {"image_id": 1, "category_id": 3, "bbox": [1, 2.5, 3, 4], "score": 0.5}
NAME = "detections_test-dev2017_SSD512-HarDNet68_results.json"


def submission(folder, records, *names):
    """(zip with the records under these names, image_info file of 2 images and 2 categories)"""
    truth = folder / "image_info_test-dev2017.json"
    images = [{"id": id, "width": 100, "height": 100} for id in (1, 2)]
    categories = [{"id": id, "name": name} for id, name in ((3, "dog"), (7, "cat"))]
    truth.write_text(json.dumps({"images": images, "categories": categories}))
    archive = folder / "submission.zip"
    with zipfile.ZipFile(archive, "w") as members:
        for name in names:
            members.writestr(name, records if isinstance(records, str) else json.dumps(records))
    return archive, truth


def test_submission_that_the_server_takes(tmp_path):
    more = [FIT | {"image_id": 2, "category_id": 7, "score": 1}, FIT | {"score": -2.5}]
    assert check_submission(*submission(tmp_path, [FIT, *more], NAME)) == 3
    assert check_submission(*submission(tmp_path, [], NAME)) == 0


@pytest.mark.parametrize(("records", "names", "message"), [
    ([FIT], [], "holds nothing, .* detections_test-dev2017_<name>_results"),
    ([FIT], [f"out/{NAME}"], "holds out/detections_.* in no folder"),
    ([FIT], [NAME, "more.txt"], f"holds {NAME}, more.txt, "),
    ([FIT], ["detections_val2017_net_results.json"], "holds detections_val2017_net_re"),
    ([FIT], ["detections_test-dev2017_results.json"], "holds detections_test-dev2017_res"),
    ("[", [NAME], f"{NAME} is not a JSON file"),
    ({"a": FIT}, [NAME], f"{NAME}: has no list of results"),
    ([FIT, 5], [NAME], r"results\[1\] needs a whole number as 'image_id'"),
    ([FIT | {"id": 5}], [NAME], r"results\[0\] has the fields .*, id, .* image_id"),
    ([FIT | {"image_id": 1.0}], [NAME], r"results\[0\] .* integer"),
    ([FIT | {"image_id": 5}], [NAME], r"results\[0\] has the image_id 5, which"),
    ([FIT | {"category_id": 4}], [NAME], r"results\[0\] has the category_id 4, which"),
    ([FIT, FIT | {"bbox": [1, 2, 3]}], [NAME], r"results\[1\] needs 4 finite num.* 'bbox'"),
    ([FIT | {"score": float("nan")}], [NAME], "a finite number as 'score', found nan"),
    ([{k: FIT[k] for k in ("image_id", "category_id", "bbox")}], [NAME], "as 'score', found N")])
def test_submission_that_the_server_would_refuse(tmp_path, records, names, message):
    with pytest.raises(UserError, match=f"submission.zip: .*{message}"):
        check_submission(*submission(tmp_path, records, *names))


def test_submission_that_is_no_zip(tmp_path):
    archive, truth = submission(tmp_path, [FIT], NAME)
    data = archive.read_bytes()
    for damaged in (b"", b"[]", data[:50], data.replace(b'"score"', b'"scare"')):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="submission.zip: not a zip that can be read"):
            check_submission(archive, truth)
    with pytest.raises(UserError, match="none.zip: cannot read"):
        check_submission(tmp_path / "none.zip", truth)
