"""What is common to all data sets: image sets by name, rows, records of what is left out."""

import importlib
import inspect
import itertools
import json
import shutil

import cv2
import numpy as np
import pytest
from coco_files import annotation, perfect, write_set
from conftest import VOC_IMAGE_SIZE

from data import (
    DATASETS,
    DetectionData,
    ImageSet,
    build_dataset,
    default_root,
    default_sets,
    find_layout,
    list_sets,
)
from data.image_sets import check_sets, one_folder, parse_image_sets, set_word, sets_name
from data.skips import Skip, SkipKind, report_lines
from utils.errors import UserError


@pytest.mark.parametrize(("text", "year", "name"), [
    ("2007_trainval", "2007", "trainval"), ("trainval", None, "trainval"),
    ("val2017", None, "val2017"), ("my_own_set", None, "my_own_set"),
    ("2012_my_set", "2012", "my_set"), ("2012_", None, "2012_"),
])
def test_image_set_is_parsed_and_written_back(text, year, name):
    found = ImageSet.parse(text)
    assert found == (year, name) and str(found) == text


def test_sets_are_parsed_by_those_that_exist(make_voc, tmp_path):
    make_voc(tmp_path, {"2024_train": {"a": [("dog", (1, 1, 9, 9))]}})
    existing = [*list_sets("VOC", tmp_path), ImageSet("2012", "val")]
    chosen = parse_image_sets("2024_train, ,2023_train,2012_val", existing)
    assert chosen == [(None, "2024_train"), ("2023", "train"), ("2012", "val")]
    assert build_dataset("VOC", tmp_path, chosen[:1]).ids == ["a"]
    several = [ImageSet("2007", "test"), ImageSet(None, "day+night")]
    assert parse_image_sets("2007_test,day+night", several[1:]) == several
    assert parse_image_sets("2007_test+day") == [("2007", "test"), (None, "day")]
    with pytest.raises(UserError, match="' , '.* give e.g. 2007_trainval,2012_trainval"):
        parse_image_sets(" , ")


def test_sets_have_one_name_that_is_fit_for_a_folder():
    assert sets_name([ImageSet("2007", "trainval"), (None, "a/b")]) == "2007_trainval+a_b"
    for name in ("..", "/etc/x", "a/../../b", "c:\\x", "a\0"):
        with pytest.raises(UserError, match="is no image set; give"):
            check_sets([ImageSet(None, name)])
    names = {"..": "_._", "CON": "_CON", "nul.x": "_nul.x", "a.": "a_", "a\0b": "a_b", "ü": "ü"}
    assert {name: one_folder(name) for name in names} == names
    assert len(one_folder("é" * 200).encode()) <= 120 and one_folder("\ud800a") == "_a"


def test_default_sets_follow_the_kind_of_root(voc_folder, voc_devkit):
    assert default_sets("VOC", voc_folder) == (((None, "trainval"),), ((None, "test"),))
    assert default_sets("VOC", voc_devkit) == (
        (("2007", "trainval"), ("2012", "trainval")), (("2007", "test"),),
    )  # fmt: skip
    assert default_sets("COCO", voc_devkit) == ((("2017", "train"),), (("2017", "val"),))
    assert default_root("COCO").parts[-2:] == ("data", "COCO")


def test_one_year_alone_is_a_data_set(voc_devkit):
    shutil.rmtree(voc_devkit / "VOC2012")
    assert default_sets("VOC", voc_devkit) == ((("2007", "trainval"),), (("2007", "test"),))
    (voc_devkit / "VOC2007/ImageSets/Main/trainval.txt").rename(voc_devkit / "trainval.txt")
    assert default_sets("VOC", voc_devkit)[1] == (("2007", "test"),)  # the whole published test
    (voc_devkit / "trainval.txt").rename(voc_devkit / "VOC2007/ImageSets/Main/trainval.txt")
    # Of VOC2007/ itself, each set is listed once, and may be named with its year.
    root = voc_devkit / "VOC2007"
    assert list_sets("VOC", root) == [(None, "test"), (None, "trainval")]
    assert default_sets("VOC", root) == (((None, "trainval"),), ((None, "test"),))
    assert build_dataset("VOC", root, [("2007", "test")]).ids == build_dataset(
        "VOC", root, [(None, "test")]).ids


def test_the_published_test_set_alone_is_tested_on_whole(tmp_path):
    write_set(tmp_path, "instances_val2017.json", "val2017", {1: "1.jpg"}, [])
    assert default_sets("COCO", tmp_path)[1] == (("2017", "val"),)


@pytest.mark.parametrize("word, names", [
    ("train", "train Training train_images trainset train-set train2017 train_1"),
    ("trainval", "trainval train_val Train-Val trainval2012"), ("test", "TEST testing test_images"),
    ("val", "val eval Evaluation val_set"), ("valid", "valid valid2"), ("my_train", "my_train")])
def test_names_of_image_sets_have_a_word(word, names):
    assert {set_word(name) for name in names.split()} == {word}


def test_a_set_is_found_by_the_name_it_is_listed_with():
    existing = [ImageSet("2012_train_val", "val"), ImageSet(None, "2024_train")]
    for each in existing:
        assert parse_image_sets(str(each), existing) == [each]


def test_existing_sets_are_listed_and_none_of_a_missing_root(voc_devkit, coco_folder, tmp_path):
    assert [*map(str, list_sets("VOC", str(voc_devkit)))] == [
        "2007_test", "2007_trainval", "2012_trainval",
    ]  # fmt: skip
    assert [*map(str, list_sets("COCO", str(coco_folder)))] == ["2017_train", "2017_val"]
    for name, root in itertools.product(DATASETS, (tmp_path / "no", "a\0b", "\ud800", "x" * 6000)):
        assert list_sets(name, root) == []
        with pytest.raises(UserError, match="no such data set folder; give the right one"):
            find_layout(root)


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'KITTI', choose from VOC, COCO"):
        build_dataset("KITTI", "/", [])


def test_readers_set_the_attributes_of_their_base_class(voc_folder, coco_folder):
    for name, root, sets in (("VOC", voc_folder, "test"), ("COCO", coco_folder, "val2017")):
        dataset = build_dataset(name, root, [(None, sets)])
        assert isinstance(dataset, DetectionData)
        assert all(hasattr(dataset, name) for name in DetectionData.__annotations__)


def test_row_names_the_options_that_its_reader_takes():
    for row in DATASETS.values():
        module, _, name = row.reader.partition(":")
        reader = getattr(importlib.import_module(module), name)
        assert row.options <= inspect.signature(reader).parameters.keys()


SAMPLES = {
    "1": [("cell", (5, 5, 40, 40)), ("rod", (50, 10, 90, 30))],
    "2": [], "3": [("cell", (20, 20, 70, 60))],
    "4": [("rod", (60, 40, 500, 60))],  # leaves the image
    "5": [("cell", (1, 1, 96, 72)), ("disc", (30, 30, 30, 30))],  # VOC: without area
}


def write_coco(root, samples):
    """The samples of `write_voc` as a COCO set; a difficult object becomes a crowd."""
    names = sorted({name for objects in samples.values() for name, *_ in objects})
    boxes = [
        annotation(0, int(id), [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], 1 + names.index(name),
                   iscrowd=int(*flag))
        for id, objects in samples.items() for name, (x1, y1, x2, y2), *flag in objects
    ]  # fmt: skip
    write_set(root, "instances_train.json", "train", {int(id): f"{id}.jpg" for id in samples},
              [{**box, "id": i} for i, box in enumerate(boxes)], VOC_IMAGE_SIZE,
              categories=[{"id": i, "name": name} for i, name in enumerate(names, 1)])  # fmt: skip


@pytest.fixture(params=["VOC", "COCO"])
def make(request, tmp_path, make_voc):
    """make(samples): a new data set each time, of the classes of all samples."""
    count = itertools.count()

    def make(samples, **options):
        root = tmp_path / str(next(count))
        if request.param == "COCO":
            write_coco(root, samples)
        else:
            make_voc(root, {"train": samples})
        return build_dataset(request.param, root, [(None, "train")], **options)

    make.voc = request.param == "VOC"
    return make


def test_sample_is_a_bgr_image_and_a_target_of_its_own(make):
    dataset = make(SAMPLES)
    assert len(list(dataset)) == 5 and [*map(str, dataset.ids)] == list(SAMPLES)
    image, target = dataset[0]
    assert np.array_equal(image, cv2.imread(str(dataset.image_path(0))))
    assert image.dtype == np.uint8 and image.shape == (*dataset.image_size(0)[::-1], 3)
    assert target.tolist() == [[4, 4, 39, 39, 1], [49, 9, 89, 29, 3]]  # cell, disc, rod
    assert target.dtype == dataset.target(1).dtype == np.float32
    assert dataset.target(1).shape == (0, 5) and dataset.target(-2)[0, 2] == VOC_IMAGE_SIZE[0] - 1
    dataset.transform = lambda image, target: (image[:1], np.multiply(target, 2, out=target))
    for _ in range(2):
        assert dataset[0][0].shape[0] == 1 and dataset[0][1][0].tolist() == [8, 8, 78, 78, 2]
    with pytest.raises(IndexError):
        dataset.target(5)


def test_images_are_not_opened_by_the_constructor_and_nothing_is_written(make):
    dataset = make({key: SAMPLES[key] for key in ("1", "3")})
    dataset.image_path(0).write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")}
    again = type(dataset)(dataset.root, dataset.image_sets)
    assert {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")} == before
    with pytest.raises(UserError, match=f"^{again.image_path(0)}: .*empty"):
        again[0]


def test_truth_is_as_annotated(make):
    truth = make(SAMPLES | {"1": [("cell", (5, 5, 40, 40), True)]}).truth()
    assert truth.images.tolist() == [0, 2, 3, 4, 4]
    assert truth.boxes[:3].tolist() == [[4, 4, 40, 40], [19, 19, 70, 60], [59, 39, 500, 60]]
    assert truth.labels.tolist() == [1, 1, 3, 1, 2]
    assert truth.ignored.tolist() == [True, False, False, False, False]


def test_perfect_detections_score_one(make, tmp_path):
    dataset = make({key: SAMPLES[key] for key in "123"})
    result = dataset.evaluate(perfect(dataset), tmp_path / "out", name="net")
    assert result["value"] == pytest.approx(1) and result["notes"] == []
    assert result["per_class"] == pytest.approx({"cell": 1, "rod": 1})
    assert (tmp_path / "out" / result["curves"]).is_file() and json.dumps(result)
    with pytest.raises(ValueError, match="2 detections for 3 images"):
        dataset.evaluate(perfect(dataset)[:2], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_first_images_are_kept_as_they_are_and_scored_alone(make, tmp_path):
    whole, dataset = make(SAMPLES), make(SAMPLES)
    kept = [0, 2, 3]
    dataset.keep_first(3)
    assert dataset.ids == [whole.ids[i] for i in kept] and dataset.classes == whole.classes
    for i, before in enumerate(kept):
        for one, other in zip(dataset[i], whole[before], strict=True):
            assert np.array_equal(one, other)
        assert dataset.image_path(i).name == whole.image_path(before).name
    # What is left out of other images is of no more interest.
    of_images = [skip[:2] for skip in dataset.skipped if skip.image is not None]
    assert of_images == [(SkipKind.BOX_CLIPPED, 2)]
    assert {skip.image for skip in whole.skipped} == {None, 3, 4}
    assert dataset.truth().images.tolist() == [0, 0, 1, 2]
    only = make({whole_id: SAMPLES[whole_id] for whole_id in "134"})
    for move in (0, 9):
        result, expected = (
            d.evaluate(perfect(d, move), tmp_path / "out") for d in (dataset, only)
        )
        assert result["value"] == expected["value"] and "disc" in result.pop("notes")[-1]
    dataset.keep_first(1)
    assert [*map(str, dataset.ids)] == ["1"]


def test_more_images_than_have_objects_cannot_be_kept(make):
    dataset = make({key: SAMPLES[key] for key in "123"})
    with pytest.raises(UserError, match=f"{dataset.root}: train: 2 of 3 .* keep 3; .*--overfit"):
        dataset.keep_first(3)
    with pytest.raises(ValueError, match="cannot keep 0 "):
        dataset.keep_first(0)
    assert len(dataset) == 3


def test_fingerprint_follows_ids_annotations_and_options_and_not_the_place(make):
    first, box = make(SAMPLES), ("cell", (20, 20, 70, 60))
    assert make(SAMPLES).fingerprint() == first.fingerprint()
    assert json.loads(json.dumps(first.fingerprint()))["images"] == 5
    changed = [
        make(SAMPLES | {"3": [("cell", (20, 20, 70, 61))]}),
        make(SAMPLES | {"3": [("rod", box[1])]}),
        make(SAMPLES | {"3": [(*box, True)]}),  # difficult, or a crowd
        make(SAMPLES | {"3": []}),
        make({key if key != "3" else "9": SAMPLES[key] for key in SAMPLES}),
        make(SAMPLES, classes=["rod", "disc", "cell"]), make(SAMPLES, classes=["cell"]),
        *([] if make.voc else [make(SAMPLES, crowds=False)]),
    ]
    first.keep_first(2)
    found = [json.dumps(dataset.fingerprint()) for dataset in [make(SAMPLES), first, *changed]]
    assert len(set(found)) == len(found)


def test_report_has_a_line_for_every_kind():
    clipped, crowd = SkipKind.BOX_CLIPPED, SkipKind.CROWD
    skipped = [
        Skip(clipped, 0, (0.0, 1.0, 2.0, 3.0), "a.xml: object 1"), Skip(crowd, 2, None, "b"),
        Skip(clipped, 1, None, "c.xml: object 2"),
    ]
    assert report_lines(skipped) == [
        f"{clipped.text}: 2, e.g. a.xml: object 1", f"{crowd.text}: 1, e.g. b",
    ]  # fmt: skip
    assert report_lines([]) == []
    assert {kind.level for kind in SkipKind} == {"note", "warning"}
