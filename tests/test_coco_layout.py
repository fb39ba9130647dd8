"""COCO data as tools export them: names of annotation files, of image sets and of images."""

import json
import os
import shutil
import unicodedata

import cv2
import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, annotation, perfect, write_set
from conftest import with_exif

from data.coco import COCODetection
from data.coco_layout import list_image_sets, recognise
from data.image_sets import ImageSet
from data.skips import SkipKind
from engine.options import Call, Options
from engine.run import open_dataset
from utils.errors import UserError


def write(root, file, folder, names, annotations=(), **document):
    """As write_set, with the annotation file anywhere under root."""
    write_set(root, "new.json", folder, names, list(annotations), **document)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / "annotations/new.json", root / file)
    if not any((root / "annotations").iterdir()):
        (root / "annotations").rmdir()


def edit(path, change):
    document = json.loads(path.read_text())
    for image in document["images"]:
        change(image)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(("files", "layout", "sets"), [
    ({"train/_annotations.coco.json": "train", "valid/_annotations.coco.json": "valid"},
     "Roboflow COCO", "train, valid"),
    ({"result.json": "images"}, "Label Studio COCO", "result"),
    ({"annotations/instances_default.json": "images/default"}, "COCO", "default"),
    ({"annotations/instances_Train.json": "images/Train"}, "COCO", "Train"),
    ({"annotations/train.json": "train", "annotations/my-val_2.json": "images"}, "COCO",
     "train, val"),
    ({"annotations/train2017.json": "train2017"}, "COCO", "2017_train"),
    ({"photos/labels.json": "photos", "more/labels.json": "more/images"}, "COCO", "more, photos"),
    ({"a/train.json": "a", "b/train.json": "b"}, "COCO", "b_train, train"),
    ({"annotations/mini_train.json": "images", "annotations/train.json": "images"}, "COCO",
     "annotations_mini_train, train"),
    ({"labels.json": "data"}, "COCO", "labels"),  # FiftyOne
    ({"annotations/train_val.json": "photos", "annotations/testing.json": "more"}, "COCO",
     "testing, train_val"),
    ({"labels.json": "."}, "COCO", "labels")])
def test_layouts_of_tools_are_found_and_read(tmp_path, files, layout, sets):
    for id, (file, folder) in enumerate(files.items(), 1):
        write(tmp_path, file, folder, {id: f"{id}.png"}, [annotation(1, id, [id, 5, 20, 10])])
    (tmp_path / "notes.json").write_text('{"images": 3, "shapes": [{"id": 1}]}')
    assert recognise(tmp_path) == layout
    found = list_image_sets(tmp_path)
    assert ", ".join(map(str, found)) == sets
    for image_set in found:
        dataset = COCODetection(tmp_path, [image_set])
        [id] = dataset.ids
        assert (dataset[0][0] == id).all()
        assert dataset.target(0).tolist() == [[id, 5, id + 19, 14, 1]]
        assert dataset.skipped == []


def test_images_of_lvis_lie_where_their_urls_end(tmp_path):
    write(tmp_path, "lvis_val.json", "val2017", {1: "000000000001.jpg"}, [])
    write_set(tmp_path, "more.json", "train2017", {2: "000000000002.jpg"})
    path, urls = tmp_path / "lvis_val.json", "http://images.cocodataset.org"
    images = [{"id": id, "width": WIDTH, "height": HEIGHT,
               "coco_url": f"{urls}/{folder}/{id:012d}.jpg"}
              for id, folder in ((1, "val2017"), (2, "train2017"))]
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": images}))
    dataset = COCODetection(tmp_path, [(None, "val")])
    assert [(dataset[i][0] == id).all() for i, id in enumerate(dataset.ids)] == [True, True]


def test_images_of_another_set_are_not_taken(tmp_path):
    for name in ("train", "val"):
        write(tmp_path, f"annotations/{name}.json", name, {1: "1.png"}, [])
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=f"{tmp_path / 'train'}: no such folder"):
        COCODetection(tmp_path, [(None, "train")])


def test_of_two_folders_with_the_images_none_is_taken(tmp_path):
    for folder in ("Visualization", "photos"):
        write(tmp_path, "all.json", folder, {1: "1.png"}, [])
    with pytest.raises(UserError) as error:
        COCODetection(tmp_path, [(None, "all")])
    places = (tmp_path / "Visualization", tmp_path / "photos", "all.json", "copy")
    assert all(str(word) in str(error.value) for word in places)


def test_set_whose_annotations_are_missing_is_told(tmp_path):
    for id, name in enumerate(("train", "test", "valid"), 1):
        write(tmp_path, f"{name}/_annotations.coco.json", name, {id: f"{id}.png"},
              [annotation(1, id, [id, 5, 20, 10])])
    (tmp_path / "valid/_annotations.coco.json").unlink()
    [skip] = COCODetection(tmp_path, [(None, "train")]).skipped
    assert skip.kind is SkipKind.SET_UNANNOTATED and skip.detail == f"{tmp_path}/valid has 1 images"


@pytest.mark.parametrize("content", ["", "[]", "{", "\0" * 9, '{"shapes": []}',
                                     '{"images": [{"id": 1}], "categories": []}',
                                     '[{"images": [1], "image_id": 1}]'])
def test_other_json_files_are_no_layout(tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.json").write_text(content)
    os.mkfifo(tmp_path / "b.json")
    assert recognise(tmp_path) is None and list_image_sets(tmp_path) == []
    assert recognise(tmp_path / "none") is None


def test_training_set_without_a_box_is_refused(tmp_path):
    write(tmp_path, "annotations/instances_train.json", "train", {1: "1.png"})
    options = Options(dataset="COCO", root=str(tmp_path), train_sets=(ImageSet(None, "train"),))
    with pytest.raises(UserError, match=f"{tmp_path}: the 1 training images have no box .*--train"):
        open_dataset(options, Call(), "train_sets")


@pytest.mark.parametrize(("name", "file"), [
    ("JPEGImages\\1.png", "1.png"), ("sub\\1.png", "sub/1.png"),
    ("/home/me/train/1.png", "1.png"), ("C:\\data\\1.png", "1.png"),
    ("https://host/a/b%20c.png?token=x/y", "b c.png"),
    ("/data/local-files/?d=set%20a/1.png", "1.png"), ("/data/upload/7/ab-1.png", "ab-1.png"),
    (unicodedata.normalize("NFC", "été.png"), unicodedata.normalize("NFD", "été.png"))])
def test_names_of_other_systems_are_found(tmp_path, name, file):
    (tmp_path / "train" / file).parent.mkdir(parents=True)
    write(tmp_path, "annotations/instances_train.json", "train", {7: file})
    edit(tmp_path / "annotations/instances_train.json", lambda image: image.update(file_name=name))
    dataset = COCODetection(tmp_path, [(None, "train")])
    assert dataset.image_path(0).samefile(tmp_path / "train" / file) and (dataset[0][0] == 7).all()


def test_two_images_of_one_file_are_refused_and_places_outside_the_root_are_told(tmp_path):
    write(tmp_path / "d", "annotations/instances_train.json", "../out", {1: "1.png", 2: "2.png"})
    path = tmp_path / "d/annotations/instances_train.json"
    edit(path, lambda image: image.update(file_name=f"../out/{image['id']}.png"))
    dataset = COCODetection(tmp_path / "d", [(None, "train")])
    assert (dataset[1][0] == 2).all()
    assert [skip[:2] for skip in dataset.skipped] == [(SkipKind.OUTSIDE_ROOT, n) for n in (0, 1)]
    edit(path, lambda image: image.update(file_name="../out/1.png"))
    with pytest.raises(UserError, match=f"{path}: image ids 1 and 2 .*out/1.png"):
        COCODetection(tmp_path / "d", [(None, "train")])
    faults: list[str] = []
    assert len(COCODetection(tmp_path / "d", [(None, "train")], faults=faults)) == 2
    assert len(faults) == 1


def test_size_that_is_not_stated_is_that_of_the_turned_image(tmp_path):
    boxes = [annotation(n, n, [10, 35, 20, 10]) for n in (1, 2)]
    write(tmp_path, "annotations/instances_train.json", "train", {1: "1.jpg", 2: "2.jpg"}, boxes)
    edit(tmp_path / "annotations/instances_train.json", lambda image: image.pop("width"))
    jpeg = cv2.imencode(".jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()
    (tmp_path / "train/2.jpg").write_bytes(with_exif(jpeg, orientation=6))
    dataset = COCODetection(tmp_path, [(None, "train")])
    assert dataset.sizes.tolist() == [[WIDTH, HEIGHT], [HEIGHT, WIDTH]]
    assert dataset[1][0].shape == (WIDTH, HEIGHT, 3)
    assert dataset.rows.tolist() == [[10, 35, 29, 39, 1], [10, 35, 29, 44, 1]]
    (tmp_path / "train/2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="2.jpg: not an image"):
        COCODetection(tmp_path, [(None, "train")])


def test_files_without_a_set_to_test_on_are_divided_and_scored(tmp_path):
    for k, name in enumerate("ab"):
        names = {n: f"{name}{n}.png" for n in range(10)}
        boxes = [annotation(n, n, [k, n, 20, 10], 3 + 4 * k) for n in range(10)]
        write(tmp_path, f"annotations/{name}.json", name, names, boxes)
    train, val, grouped = (
        COCODetection(tmp_path, [(None, name)], val_share=0.3, split_by=by)
        for name, by in (("split_train", None), ("split_val", None), ("split_val", "(a|b)")))
    names = [[each.image_path(i).name for i in range(len(each))] for each in (train, val, grouped)]
    assert [len(each) for each in names] == [14, 6, 10] and len({*names[0], *names[1]}) == 20
    assert {name[0] for name in names[1]} == {"a", "b"} and len({n[0] for n in names[2]}) == 1
    assert val.ids == [*range(6)] and val.truth().images.tolist() == [*range(6)]
    for i, name in enumerate(names[1]):
        n, k = int(name[1]), "ab".index(name[0])
        assert (val[i][0] == n).all() and val.target(i).tolist() == [[k, n, k + 19, n + 9, 1 + k]]
    report = val.evaluate(perfect(val), tmp_path / "out")
    assert report["value"] == pytest.approx(1) and report["image_set"] == "split_val"
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "mine.txt").write_text("b3\na/a9.png\n")
    mine = COCODetection(tmp_path, [(None, "mine")])
    assert [mine.image_path(i).name for i in range(2)] == ["a9.png", "b3.png"]
    assert "mine" in map(str, list_image_sets(tmp_path))
    both = COCODetection(tmp_path, [(None, "b"), (None, "a")])  # of other images with the same ids
    assert both.ids == [*range(20)] and both.image_path(0).name == "b0.png"
    val.keep_first(1)
    assert (val.truth().boxes[:, :2] == val.target(0)[0, :2]).all()
