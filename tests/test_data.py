"""What is common to all data sets: image sets by name, rows, records of what is left out."""

import inspect

import pytest

from data import (
    DATASETS,
    DetectionData,
    ImageSet,
    build_dataset,
    default_root,
    default_sets,
    list_sets,
)
from data.coco import COCODetection
from data.image_sets import parse_image_sets, sets_name
from data.skips import Skip, SkipKind, report_lines
from data.voc0712 import VOCDetection
from utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "year", "name"),
    [
        ("2007_trainval", "2007", "trainval"),
        ("trainval", None, "trainval"),
        ("val2017", None, "val2017"),
        ("my_own_set", None, "my_own_set"),
        ("2012_my_set", "2012", "my_set"),
        ("2012_", None, "2012_"),
    ],
)
def test_image_set_is_parsed_and_written_back(text, year, name):
    found = ImageSet.parse(text)
    assert found == (year, name) and str(found) == text


def test_set_that_exists_under_a_name_like_a_year_can_be_chosen():
    existing = [ImageSet(None, "2024_train"), ImageSet("2012", "val")]
    assert ImageSet.parse("2024_train", existing) == (None, "2024_train")
    assert ImageSet.parse("2012_val", existing) == ("2012", "val")
    assert parse_image_sets("2024_train, ,2023_train", existing) == [
        (None, "2024_train"), ("2023", "train"),
    ]  # fmt: skip


def test_text_without_an_image_set_is_refused():
    with pytest.raises(UserError, match="' , '.* give e.g. 2007_trainval,2012_trainval"):
        parse_image_sets(" , ")


def test_sets_have_one_name_that_is_fit_for_a_folder():
    assert sets_name([ImageSet("2007", "trainval"), (None, "a/b")]) == "2007_trainval+a_b"


def test_own_set_named_like_a_year_is_read(make_voc, tmp_path):
    make_voc(tmp_path, {"2024_train": {"a": [("dog", (1, 1, 9, 9))]}})
    chosen = parse_image_sets("2024_train", list_sets("VOC", tmp_path))
    assert build_dataset("VOC", tmp_path, chosen).ids == ["a"]


def test_default_sets_follow_the_kind_of_root(voc_folder, voc_devkit):
    assert default_sets("VOC", voc_folder) == (((None, "trainval"),), ((None, "test"),))
    assert default_sets("VOC", voc_devkit) == (
        (("2007", "trainval"), ("2012", "trainval")), (("2007", "test"),),
    )  # fmt: skip
    assert default_sets("COCO", voc_devkit) == ((("2017", "train"),), (("2017", "val"),))
    assert default_root("COCO").parts[-2:] == ("data", "COCO")


def test_existing_sets_are_listed_and_none_of_a_missing_root(voc_devkit, coco_folder, tmp_path):
    assert [*map(str, list_sets("VOC", str(voc_devkit)))] == [
        "2007_test", "2007_trainval", "2012_trainval",
    ]  # fmt: skip
    assert [*map(str, list_sets("COCO", str(coco_folder)))] == ["2017_train", "2017_val"]
    assert list_sets("VOC", tmp_path / "no") == list_sets("COCO", tmp_path / "no") == []


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'KITTI', choose from VOC, COCO"):
        build_dataset("KITTI", "/", [])


def test_readers_set_the_attributes_of_their_base_class(voc_folder, coco_folder):
    for name, root, sets in (("VOC", voc_folder, "test"), ("COCO", coco_folder, "val2017")):
        dataset = build_dataset(name, root, [(None, sets)])
        assert isinstance(dataset, DetectionData)
        assert all(hasattr(dataset, name) for name in DetectionData.__annotations__)
        for i in range(len(dataset)):
            image, target = dataset[i]
            assert image.shape == (*dataset.image_size(i)[::-1], 3)
            assert target.tolist() == dataset.target(i).tolist()


def test_row_names_the_options_that_its_reader_takes():
    readers = {"VOC": VOCDetection, "COCO": COCODetection}
    for name, row in DATASETS.items():
        assert row.reader.rpartition(":")[2] == readers[name].__name__
        assert row.options <= inspect.signature(readers[name]).parameters.keys()


def test_report_has_a_line_for_every_kind():
    clipped, crowd = SkipKind.BOX_CLIPPED, SkipKind.CROWD
    skipped = [
        Skip(clipped, 0, (0.0, 1.0, 2.0, 3.0), "a.xml: object 1"),
        Skip(crowd, 2, None, "b"),
        Skip(clipped, 1, None, "c.xml: object 2"),
    ]
    assert report_lines(skipped) == [
        f"{clipped.text}: 2, e.g. a.xml: object 1", f"{crowd.text}: 1, e.g. b",
    ]  # fmt: skip
    assert report_lines([]) == []
    assert {kind.level for kind in SkipKind} == {"note", "warning"}
