import json
import re
import time

import cv2
import numpy as np
import pytest
from conftest import VOC_IMAGE_SIZE, with_exif, write_annotation

from data.classes import parse_classes
from data.config import VOC_CLASSES
from data.curves import load_curves
from data.voc0712 import VOCDetection
from data.voc_xml import list_image_sets, read_annotation
from utils.errors import UserError

WIDTH, HEIGHT = VOC_IMAGE_SIZE


def dataset(make_voc, tmp_path, samples, **options):
    """A VOCDetection over one image set of `samples`."""
    classes = options.pop("classes", None)
    return VOCDetection(
        make_voc(tmp_path / "own", {"trainval": samples}, **options),
        [(None, "trainval")],
        classes=classes,
    )


def xml(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text, "utf-8")
    return path


# ---- one annotation


def test_annotation_is_read_with_boxes_counted_from_0(tmp_path):
    path = tmp_path / "a.xml"
    write_annotation(path, [("dog", (2, 3, 10, 20)), ("cat", (1, 1, 96, 72), True)])
    found = read_annotation(path)
    assert found.path == path and found.size == (96, 72) and found.names == ("dog", "cat")
    assert found.boxes.tolist() == [[1, 2, 9, 19], [0, 0, 95, 71]]
    assert found.difficult.tolist() == [False, True]


def test_annotation_without_objects_has_empty_arrays(tmp_path):
    found = read_annotation(xml(tmp_path, "<annotation/>"))
    assert found.boxes.shape == (0, 4) and found.difficult.shape == (0,) and found.names == ()


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>",
             "<size><width/><height>8</height></size>"]
)  # fmt: skip
def test_size_that_is_missing_or_0_is_none(tmp_path, size):
    assert read_annotation(xml(tmp_path, f"<annotation>{size}</annotation>")).size is None


def test_float_coordinates_are_kept_and_parts_of_an_object_ignored(tmp_path):
    text = """<annotation><object><name> person </name><difficult/>
      <bndbox><xmax>20.5</xmax><xmin> 1.25 </xmin><ymin>2</ymin><ymax>3e1</ymax></bndbox>
      <part><name>head</name><bndbox><xmin>x</xmin></bndbox></part></object></annotation>"""
    found = read_annotation(xml(tmp_path, text))
    assert found.names == ("person",) and not found.difficult[0]
    assert found.boxes.tolist() == [[0.25, 1, 19.5, 29]]


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
GOOD = f"<object><name>dog</name>{BOX}</object>"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (f"<object>{BOX}</object>", "object 2 has no <name>"),
        (f"<object><name> </name>{BOX}</object>", "object 2 has no <name>"),
        ("<object><name>dog</name></object>", 'object 2 ("dog") has no <bndbox>'),
        (GOOD.replace("<ymin>1</ymin>", ""), 'object 2 ("dog"): <bndbox> has no <ymin>'),
        (GOOD.replace("<xmax>5", "<xmax>nan"), '<xmax> is "nan", expected a number'),
        (GOOD.replace("<xmax>5", "<xmax>inf"), '<xmax> is "inf", expected a number'),
        (GOOD.replace("<xmax>5", "<xmax>five"), '<xmax> is "five", expected a number'),
        (GOOD.replace("<xmax>5", "<xmax>"), '<xmax> is "", expected a number'),
        (GOOD.replace("<bnd", "<difficult>2</difficult><bnd"), '<difficult> is "2"'),
    ],
)
def test_bad_object_is_refused_by_file_and_number(tmp_path, bad, message):
    path = xml(tmp_path, f"<annotation>{GOOD}{bad}</annotation>")
    with pytest.raises(
        UserError, match=re.escape(f"{path}: object 2") + ".*" + re.escape(message[8:])
    ):
        read_annotation(path)


@pytest.mark.parametrize(("text", "line"), [("<annotation>\n<object>\n</annotation>", 3), ("", 1)])
def test_malformed_xml_is_refused_by_file_and_line(tmp_path, text, line):
    with pytest.raises(UserError, match=rf"a\.xml:{line}: malformed XML"):
        read_annotation(xml(tmp_path, text))


def test_unknown_encoding_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.xml.*: malformed XML"):
        read_annotation(xml(tmp_path, '<?xml version="1.0" encoding="klingon"?><annotation/>'))


# ---- image sets and classes


def test_devkit_sets_are_joined_in_order_with_the_published_classes(voc_devkit):
    data = VOCDetection(voc_devkit, [("2007", "trainval"), ("2012", "trainval")])
    assert data.ids == ["000001", "000002", "000003", "2008_000001", "2008_000002"]
    assert data.classes == VOC_CLASSES and len(VOC_CLASSES) == 20 and len(data) == 5
    image, target = data[0]
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert target.dtype == np.float32
    assert target.tolist() == [[9, 9, 59, 59, 12], [49, 4, 89, 69, 15]]
    assert data.image_path(3) == voc_devkit / "VOC2012/JPEGImages/2008_000001.jpg"
    assert data.image_size(0) == VOC_IMAGE_SIZE
    assert np.array_equal(data.pull_image(0), cv2.imread(str(data.image_path(0))))
    assert data.skipped == {} and data.report() == []


def test_difficult_objects_are_trained_on(voc_devkit):
    data = VOCDetection(voc_devkit, [("2007", "trainval")])
    assert data.target(1).tolist() == [[19, 9, 69, 59, 8]]
    assert data.annotations[1].difficult.tolist() == [True]


def test_difficult_flags_are_in_step_with_the_target(make_voc, tmp_path):
    objects = [
        ("dog", (1, 1, 9, 9), True),
        ("cat", (1, 1, 9, 9), True),  # of no known class
        ("dog", (5, 5, 5, 9), True),  # without area
        ("dog", (20, 20, 40, 40), False),
        ("dog", (50, 20, 70, 40), True),
    ]
    data = dataset(make_voc, tmp_path, {"a": objects}, classes=["dog"])
    assert data.target(0)[:, 0].tolist() == [0, 19, 49]
    assert data.difficult(0).tolist() == [True, False, True] and data.difficult(0).dtype == bool


def test_parent_of_the_devkit_and_a_year_folder_are_found(voc_devkit):
    for root in (voc_devkit.parent, voc_devkit / "VOC2007"):
        assert len(VOCDetection(root, [("2007", "test")])) == 3


@pytest.mark.parametrize("year", [None, ""])
def test_folder_in_voc_layout_has_the_classes_of_all_its_annotations(voc_folder, year):
    data = VOCDetection(voc_folder, [(year, "test")])
    assert data.classes == ("cell", "platelet", "rod")  # no platelet in this set
    assert [target[:, 4].tolist() for _, target in data] == [[1], [3, 1], [1, 1], [3]]


def test_split_file_may_stand_in_image_sets_itself(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").rename(voc_folder / "ImageSets/mine.txt")
    assert len(VOCDetection(voc_folder, [(None, "mine")])) == 4


def test_image_without_objects_is_kept_with_an_empty_target(voc_folder):
    data = VOCDetection(voc_folder, [(None, "trainval")])
    assert data.target(2).shape == (0, 5) and data.target(2).dtype == np.float32 and len(data) == 6


def test_split_file_may_have_columns_blank_lines_and_a_byte_order_mark(voc_folder):
    (voc_folder / "ImageSets/Main/cell_test.txt").write_text("\ufefft1  1\r\n\nt4 -1\n\n", "utf-8")
    assert VOCDetection(voc_folder, [(None, "cell_test")]).ids == ["t1", "t4"]


def test_image_listed_twice_is_taken_once_and_counted(voc_folder):
    (voc_folder / "ImageSets/Main/twice.txt").write_text("t1\nt2\nt1\n")
    data = VOCDetection(voc_folder, [(None, "twice"), (None, "test")])
    assert data.ids == ["t1", "t2", "t3", "t4"]
    assert [line.rpartition(": ")[2] for line in data.skipped["image listed twice"]] == [
        "t1",
        "t1",
        "t2",
    ]
    assert data.report()[0].startswith("image listed twice: 3, e.g. ")


def rename(voc_folder, old, new, line):
    """The test set of one picture, its files called `new`, its split file holding `line`."""
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        path = voc_folder / folder / f"{new}{suffix}"
        path.parent.mkdir(exist_ok=True)
        (voc_folder / folder / f"{old}{suffix}").rename(path)
    (voc_folder / "ImageSets/Main/test.txt").write_text(f"{line}\n")


@pytest.mark.parametrize(
    ("image_id", "line"),
    [
        ("my img", "my img"),
        ("my img 1", " my img 1 "),  # no flag: there is an annotation of that name
        ("my img", "my img -1"),
        ("x/b1", "x/b1"),
        ("x/y z", "x/y z  1"),
        ("b1", "b1.jpg"),
        ("b1", "b1.PNG 1"),
        ("b.1", "b.1"),
    ],
)
def test_id_is_the_line_without_flag_and_picture_suffix(voc_folder, tmp_path, image_id, line):
    (voc_folder / "Annotations/b1.xml").unlink()
    (voc_folder / "JPEGImages/b1.jpg").unlink()
    (voc_folder / "ImageSets/Main/trainval.txt").unlink()
    rename(voc_folder, "t1", image_id, line)
    data = VOCDetection(voc_folder, [(None, "test")])
    assert data.ids == [image_id]
    assert data.image_path(0) == voc_folder / f"JPEGImages/{image_id}.jpg"
    assert data.evaluate(as_detections(data), tmp_path / "out")["value"] == 1


def test_id_without_an_annotation_is_refused_with_all_that_was_looked_for(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").write_text("no/b9.jpg 1\n")
    with pytest.raises(UserError, match=r"^1 annotation .*/no/b9\.jpg 1 or .* or no/b9\.xml"):
        VOCDetection(voc_folder, [(None, "test")])


def test_suffix_of_an_annotation_may_have_any_case(voc_folder):
    path = voc_folder / "Annotations/t1.xml"
    path.rename(path.with_suffix(".XML"))
    assert len(VOCDetection(voc_folder, [(None, "test")])) == 4


def test_given_classes_set_the_order_of_labels(voc_folder):
    data = VOCDetection(voc_folder, [(None, "test")], classes=["rod", "cell"])
    assert data.classes == ("rod", "cell") and data.target(1)[:, 4].tolist() == [1, 2]


def test_declared_classes_come_before_discovered_ones(voc_folder):
    (voc_folder / "classes.txt").write_text("rod\n\ncell\nplatelet\n")
    assert VOCDetection(voc_folder, [(None, "test")]).classes == ("rod", "cell", "platelet")


def test_devkit_without_voc_names_has_the_classes_of_its_annotations(make_voc, tmp_path):
    make_voc(tmp_path / "VOC2007", {"test": {"a": [("screw", (1, 1, 9, 9))]}})
    assert VOCDetection(tmp_path, [("2007", "test")]).classes == ("screw",)


def test_devkit_that_shares_a_name_with_voc_keeps_its_other_classes(make_voc, tmp_path):
    objects = [("person", (1, 1, 9, 9)), ("helmet", (20, 1, 40, 9))]
    make_voc(tmp_path / "VOC2007", {"test": {"a": objects}})
    data = VOCDetection(tmp_path, [("2007", "test")])
    assert data.classes == ("helmet", "person") and data.target(0)[:, 4].tolist() == [2, 1]


def test_discovery_reads_the_annotations_of_image_sets_alone(voc_folder):
    (voc_folder / "Annotations/._t1.xml").write_bytes(b"\0\5\x16\7")
    (voc_folder / "ImageSets/Main/._test.txt").write_bytes(b"\0\5\x16\xff")
    (voc_folder / "Annotations/stray.xml").write_text("<annotation>")
    (voc_folder / "ImageSets/Main/later.txt").write_text("not labelled yet\nno/folder\n")
    assert VOCDetection(voc_folder, [(None, "test")]).classes == ("cell", "platelet", "rod")


def test_objects_of_unknown_classes_are_skipped_counted_and_reported(voc_folder):
    data = VOCDetection(voc_folder, [(None, "trainval")], classes=["cell"])
    assert [len(data.target(i)) for i in range(6)] == [1, 1, 0, 1, 0, 1]
    assert {reason: len(found) for reason, found in data.skipped.items()} == {
        'object of unknown class "rod" skipped': 3,
        'object of unknown class "platelet" skipped': 2,
    }
    example = voc_folder / "Annotations/b1.xml"
    assert data.report()[0] == f'object of unknown class "rod" skipped: 3, e.g. {example}: object 2'


def test_set_without_an_object_of_the_classes_is_refused_with_the_names_found(voc_folder):
    with pytest.raises(UserError, match=r"no object of the classes nut, bolt; .*name: cell, rod$"):
        VOCDetection(voc_folder, [(None, "test")], classes=["nut", "bolt"])


def test_set_without_any_object_is_refused(make_voc, tmp_path):
    with pytest.raises(UserError, match="no object of the classes .*no object at all"):
        dataset(make_voc, tmp_path, {"a": []})


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cell", "rod", "cell"], "must be unique, repeated: cell"),
        (["cell", " "], "a class name is empty"),
        ([], "a class name is empty"),
        (["background", "cell"], 'leave "background" out'),
    ],
)
def test_bad_class_names_are_refused(voc_folder, classes, message):
    with pytest.raises(UserError, match=message):
        VOCDetection(voc_folder, [(None, "test")], classes=classes)


def test_classes_of_the_command_line_are_names_or_a_file(tmp_path):
    assert parse_classes("cell, rod") == ("cell", "rod")
    (tmp_path / "names.txt").write_text("cell\nblood cell\n")
    assert parse_classes(str(tmp_path / "names.txt")) == ("cell", "blood cell")
    (tmp_path / "names.txt").write_text("cell\ncell\n")
    with pytest.raises(UserError, match=r"names\.txt: class names must be unique"):
        parse_classes(str(tmp_path / "names.txt"))


def test_classes_that_no_path_can_be_are_names():
    names = [f"class {i}" for i in range(80)]
    assert parse_classes(",".join(names)) == tuple(names)
    assert parse_classes("~no such user,bar") == ("~no such user", "bar")
    assert parse_classes("a\0,b") == ("a\0", "b")


@pytest.mark.parametrize("root", ["nowhere", "n" * 300, "~no such user/nowhere"])
def test_missing_root_is_refused(tmp_path, root):
    with pytest.raises(UserError, match=f"{root}: no such data set folder"):
        VOCDetection(root if root[0] == "~" else tmp_path / root, [("2007", "test")])


def test_missing_set_is_refused_with_the_paths_tried_and_the_sets_there(voc_devkit, voc_folder):
    (voc_devkit / "VOC2007/ImageSets/Main/dog_test.txt").touch()  # a class's file is not listed
    with pytest.raises(UserError) as error:
        VOCDetection(voc_devkit, [("2012", "test")])
    text = str(error.value)
    assert text.startswith(f'no image set "2012_test" in {voc_devkit}: looked for ')
    for path in ("VOC2012/ImageSets/Main/test.txt", "VOC2012/ImageSets/test.txt"):
        assert str(voc_devkit / path) in text
    assert text.endswith("image sets there: 2007_test, 2007_trainval, 2012_trainval")
    with pytest.raises(UserError, match='"2007_test" in .* image sets there: test, trainval$'):
        VOCDetection(voc_folder, [("2007", "test")])
    assert list_image_sets(voc_folder) == [(None, "test"), (None, "trainval")]
    with pytest.raises(UserError, match='no image set "sss.*there: test, trainval$'):
        VOCDetection(voc_folder, [(None, "s" * 300)])


def test_empty_set_is_refused(voc_folder):
    (voc_folder / "ImageSets/Main/test.txt").write_text("\n")
    with pytest.raises(UserError, match="the image set test lists no image"):
        VOCDetection(voc_folder, [(None, "test")])


# ---- missing files


def test_missing_annotations_are_refused_all_at_once(voc_folder):
    names = [f"x{i}" for i in range(12)]
    (voc_folder / "ImageSets/Main/test.txt").write_text("\n".join(["t1", *names]))
    with pytest.raises(
        UserError, match=r"^12 annotation file.* missing: .*x0\.xml.*x9\.xml, \.\.\.$"
    ):
        VOCDetection(voc_folder, [(None, "test")])


def test_missing_pictures_are_refused_all_at_once(voc_folder):
    (voc_folder / "JPEGImages/t2.jpg").unlink()
    (voc_folder / "JPEGImages/t4.jpg").rename(voc_folder / "JPEGImages/t4.txt")
    with pytest.raises(UserError, match=r"^2 picture \(\.jpg/.*missing: .*t2, .*t4$"):
        VOCDetection(voc_folder, [(None, "test")])


def test_missing_picture_folder_is_refused(voc_folder):
    (voc_folder / "JPEGImages").rename(voc_folder / "images")
    with pytest.raises(UserError, match=r"^4 picture .*missing: .*JPEGImages/t1, "):
        VOCDetection(voc_folder, [(None, "test")])
    (voc_folder / "JPEGImages").touch()
    with pytest.raises(UserError, match="JPEGImages: the folder cannot be read"):
        VOCDetection(voc_folder, [(None, "test")])


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".BMP"])
def test_pictures_of_other_suffixes_are_found(make_voc, tmp_path, suffix):
    data = dataset(make_voc, tmp_path, {"a.b": [("dog", (1, 1, 9, 9))]}, suffix=suffix)
    assert data.image_path(0).name == f"a.b{suffix}" and data[0][0].shape == (HEIGHT, WIDTH, 3)


def test_jpeg_is_preferred_to_other_pictures_of_the_same_id(voc_folder):
    (voc_folder / "JPEGImages/t1.png").touch()
    assert VOCDetection(voc_folder, [(None, "test")]).image_path(0).name == "t1.jpg"


# ---- boxes as in life


@pytest.mark.parametrize("box", [(30, 30, 30, 30), (30, 30, 50, 30), (40, 20, 30, 50)])
def test_box_without_area_is_dropped_from_training_but_not_from_evaluation(make_voc, tmp_path, box):
    data = dataset(make_voc, tmp_path, {"a": [("dog", (5, 5, 60, 60)), ("dog", box)]})
    assert data.target(0).tolist() == [[4, 4, 59, 59, 1]]
    (line,) = data.skipped["box without area dropped"]
    values = ", ".join(map(str, box))
    path = tmp_path / "own/Annotations/a.xml"
    assert line == f'{path}: object 2 ("dog") ({values}) in {WIDTH} x {HEIGHT}'
    assert data.annotations[0].boxes[1].tolist() == [value - 1 for value in box]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 50, 50), (0, 0, 49, 49)),  # written by a tool that counts from 0
        ((10, 10, WIDTH + 30, HEIGHT + 1), (9, 9, WIDTH - 1, HEIGHT - 1)),
        ((-20, 5, 10.5, 20), (0, 4, 9.5, 19)),
    ],
)
def test_box_that_leaves_the_picture_is_clipped_and_counted(make_voc, tmp_path, box, expected):
    data = dataset(make_voc, tmp_path, {"a": [("dog", box)]})
    assert data.target(0)[0, :4].tolist() == list(expected)
    assert len(data.skipped["box clipped to the picture"]) == len(data.skipped) == 1


@pytest.mark.parametrize("box", [(WIDTH + 5, 5, WIDTH + 20, 20), (5, -20, 20, 0)])
def test_box_outside_the_picture_is_dropped_and_counted(make_voc, tmp_path, box):
    data = dataset(make_voc, tmp_path, {"a": [("dog", box), ("dog", (1, 1, 9, 9))]})
    assert len(data.target(0)) == 1
    assert len(data.skipped["box outside the picture dropped"]) == len(data.skipped) == 1


def test_box_up_to_the_last_pixel_is_not_altered(make_voc, tmp_path):
    data = dataset(make_voc, tmp_path, {"a": [("dog", (1, 1, WIDTH, HEIGHT))]})
    assert data.target(0).tolist() == [[0, 0, WIDTH - 1, HEIGHT - 1, 1]] and not data.skipped


# ---- pictures that are not what the annotation says


def restate_size(data_root, size, objects):
    write_annotation(data_root / "Annotations/a.xml", objects, size)
    return VOCDetection(data_root, [(None, "trainval")])


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_size_that_is_not_given_is_the_pictures(make_voc, tmp_path, size):
    objects = [("dog", (5, 5, 500, 50))]
    root = make_voc(tmp_path, {"trainval": {"a": objects}})
    data = restate_size(root, size, objects)
    assert data.image_size(0) == VOC_IMAGE_SIZE
    assert data.target(0).tolist() == [[4, 4, WIDTH - 1, 49, 1]]


def test_size_with_sides_swapped_is_accepted_if_all_boxes_fit_the_picture(make_voc, tmp_path):
    objects = [("dog", (5, 5, WIDTH, 40))]
    root = make_voc(tmp_path, {"trainval": {"a": objects}})
    data = restate_size(root, (HEIGHT, WIDTH), objects)
    assert data.target(0).tolist() == [[4, 4, WIDTH - 1, 39, 1]]
    assert data.image_size(0) == VOC_IMAGE_SIZE
    assert data.report()[0].startswith("<size> with width and height swapped: 1, e.g. ")
    data[0]
    restate_size(root, (HEIGHT, WIDTH), [("dog", (5, 5, 40, 40))])[0]
    data = restate_size(root, (HEIGHT, WIDTH), [("dog", (5, 5, 40, 90))])
    with pytest.raises(UserError, match=r"<size> says 72 x 96, but the picture a\.jpg is 96 x 72"):
        data[0]


@pytest.mark.parametrize("size", [(2 * WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 2), (40, 60)])
def test_size_of_another_picture_is_refused_when_it_is_read(make_voc, tmp_path, size):
    objects = [("dog", (5, 5, 40, 40))]
    root = make_voc(tmp_path, {"trainval": {"a": objects}})
    data = restate_size(root, size, objects)
    message = f"a.xml: <size> says {size[0]} x {size[1]}, but the picture a.jpg is 96 x 72; restore"
    with pytest.raises(UserError, match=re.escape(message)):
        data[0]
    with pytest.raises(UserError, match=re.escape(message.replace(*map(str, (size[0], 30)), 1))):
        restate_size(root, (30, size[1]), objects)  # a box leaves it: the picture is read at once


def test_size_may_be_wrong_by_one_pixel(make_voc, tmp_path):
    objects = [("dog", (5, 5, WIDTH + 1, HEIGHT - 1))]
    root = make_voc(tmp_path, {"trainval": {"a": objects}})
    data = restate_size(root, (WIDTH + 1, HEIGHT - 1), objects)
    assert data[0][0].shape == (HEIGHT, WIDTH, 3) and not data.skipped


def test_picture_turned_by_exif_is_refused_with_the_fix(make_voc, tmp_path):
    root = make_voc(tmp_path, {"trainval": {"a": [("dog", (5, 5, 40, 40))]}})
    data = VOCDetection(root, [(None, "trainval")])
    path = data.image_path(0)
    path.write_bytes(with_exif(path.read_bytes(), orientation=6))
    with pytest.raises(
        UserError, match=r"a\.jpg: an EXIF orientation tag turns .* 72 x 96.*exiftool"
    ):
        data[0]


def test_exif_is_noticed_without_a_size_where_a_box_fits_only_the_raw_picture(make_voc, tmp_path):
    objects = [("dog", (5, 5, WIDTH, 40))]
    root = make_voc(tmp_path, {"trainval": {"a": objects}})
    path = root / "JPEGImages/a.jpg"
    path.write_bytes(with_exif(path.read_bytes(), orientation=6))
    with pytest.raises(UserError, match=r"EXIF .* 72 x 96, .* are for 96 x 72; remove the tag"):
        restate_size(root, None, objects)
    data = restate_size(root, None, [("dog", (5, 5, 40, 90))])
    assert data.image_size(0) == (HEIGHT, WIDTH) and data[0][1].shape == (1, 5)


def test_picture_cut_off_is_refused_when_read(voc_folder):
    data = VOCDetection(voc_folder, [(None, "test")])
    path = data.image_path(0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"t1\.jpg: the picture is cut off"):
        data[0]


# ---- protocol


def test_transform_gets_image_and_target(voc_folder):
    def transform(image, target):
        return image[::-1], target * 2

    plain, data = (VOCDetection(voc_folder, [(None, "test")], t) for t in (None, transform))
    assert np.array_equal(data[1][0], plain[1][0][::-1])
    assert np.array_equal(data[1][1], plain[1][1] * 2)


def test_target_can_be_changed_without_harm(voc_folder):
    data = VOCDetection(voc_folder, [(None, "test")])
    data.target(0)[:] = 0
    data[0][1][:] = 0
    assert data.target(0).any()


def test_iteration_ends(voc_folder):
    assert len(list(VOCDetection(voc_folder, [(None, "test")]))) == 4


def test_nothing_is_written_under_the_root(voc_folder):
    before = {path: path.stat().st_mtime_ns for path in voc_folder.rglob("*")}
    data = VOCDetection(voc_folder, [(None, "test")])
    list(data)
    assert {path: path.stat().st_mtime_ns for path in voc_folder.rglob("*")} == before


def test_pictures_are_not_opened_in_the_constructor(voc_folder):
    for path in (voc_folder / "JPEGImages").iterdir():
        path.write_bytes(b"")
    assert len(VOCDetection(voc_folder, [(None, "test")])) == 4


def test_thousands_of_annotations_are_read_in_seconds(make_voc, tmp_path):
    root = make_voc(tmp_path, {"trainval": {"a": [("dog", (1, 1, 50, 50))] * 3}})
    text = (root / "Annotations/a.xml").read_text()
    names = [f"n{i}" for i in range(2000)]
    for name in names:
        (root / f"Annotations/{name}.xml").write_text(text)
        (root / f"JPEGImages/{name}.jpg").touch()
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names))
    start = time.perf_counter()
    assert len(VOCDetection(root, [(None, "trainval")])) == 2000
    assert time.perf_counter() - start < 10  # 0.3 s where it was written


# ---- evaluation


def as_detections(data, drop=(), keep=slice(None)):
    """The ground truth as detections, without the images `drop` and of each the objects `keep`."""
    found = []
    for index in range(len(data)):
        target = data.target(index)[keep] if index not in drop else np.empty((0, 5), np.float32)
        found.append(
            {
                "boxes": target[:, :4],
                "scores": np.linspace(0.9, 0.5, len(target), dtype=np.float32),
                "labels": target[:, 4].astype(np.int64),
            }
        )
    return found


def test_perfect_detections_score_1_and_a_class_without_objects_is_named(voc_folder, tmp_path):
    data = VOCDetection(voc_folder, [(None, "test")])
    result = data.evaluate(as_detections(data), tmp_path / "out")
    assert result["metric"] == "VOC area AP@.5" and result["iou"] == 0.5
    assert result["per_class"] == {"cell": 1, "platelet": 0, "rod": 1}
    assert result["value"] == result["area"]["mean"] == pytest.approx(2 / 3)
    assert result["voc07_11point"]["mean"] == pytest.approx(2 / 3)
    assert result["ground_truths"] == {"cell": 3, "platelet": 0, "rod": 2}  # one cell is difficult
    assert result["detections"] == {"cell": 4, "platelet": 0, "rod": 2}
    (note,) = result["notes"]
    assert note.startswith("0 ground truths for class platelet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"comp4_det_test_{name}.txt" for name in data.classes),
        "curves.npz",
    ]
    assert result["curves"] == "curves.npz"
    assert load_curves(tmp_path / "out/curves.npz").curve("rod")["recall"].tolist() == [0.5, 1]
    for key in ("per_size", "per_class_per_size"):
        assert result[key] == result["area"][key]
    assert result["per_class_per_size"]["platelet"] == {"small": -1, "medium": -1, "large": -1}


def test_result_can_be_written_as_json(voc_folder, tmp_path):
    data = VOCDetection(voc_folder, [(None, "test")])
    json.dumps(data.evaluate(as_detections(data, drop=[0]), tmp_path / "out"))


@pytest.mark.parametrize(
    ("sets", "metric", "name"),
    [
        ([("2007", "test")], "VOC07 11-point AP@.5", "test"),
        ([("2012", "trainval")], "VOC area AP@.5", "trainval"),
        ([("2007", "test"), ("2012", "trainval")], "VOC area AP@.5", "2007_test+2012_trainval"),
    ],
)
def test_metric_follows_the_year(voc_devkit, tmp_path, sets, metric, name):
    data = VOCDetection(voc_devkit, sets)
    result = data.evaluate(as_detections(data), tmp_path / "out")
    assert result["metric"] == metric and result["image_set"] == name
    assert (tmp_path / f"out/comp4_det_{name}_dog.txt").is_file()
    assert result["per_class"]["dog"] == pytest.approx(1)


@pytest.mark.parametrize(("year", "metric"), [("2007", "voc07_11point"), ("2012", "area")])
def test_sizes_are_scored_by_the_metric_of_the_year(make_voc, tmp_path, year, metric):
    objects = [("dog", (1, 1, 100, 100)), ("dog", (200, 1, 300, 100)), ("cat", (1, 1, 20, 20))]
    make_voc(tmp_path / f"VOC{year}", {"test": {"a": objects}}, size=(400, 300))
    data = VOCDetection(tmp_path, [(year, "test")])
    result = data.evaluate(as_detections(data, keep=[0, 2]), tmp_path / "out")
    # One of two dogs: at 6 of 11 recalls, on half of the area.
    ap = {"voc07_11point": 6 / 11, "area": 0.5}[metric]
    assert result["per_size"] == pytest.approx({"small": 1, "medium": -1, "large": ap})
    assert result["per_class_per_size"]["dog"]["large"] == pytest.approx(ap)
    assert result["per_class"]["dog"] == pytest.approx(ap)
    for key in ("per_class", "per_size", "per_class_per_size"):
        assert result[key] == result[metric][key]


def test_number_of_detections_must_be_that_of_images(voc_folder, tmp_path):
    data = VOCDetection(voc_folder, [(None, "test")])
    with pytest.raises(ValueError, match="3 detections for 4 images"):
        data.evaluate(as_detections(data)[:3], tmp_path)


def test_same_id_in_two_years_can_be_trained_on_but_not_scored(make_voc, tmp_path):
    for year in ("2007", "2012"):
        make_voc(tmp_path / f"VOC{year}", {"trainval": {"a": [("dog", (1, 1, 9, 9))]}})
    data = VOCDetection(tmp_path, [("2007", "trainval"), ("2012", "trainval")])
    assert len(data) == 2
    for call in (data.check_scorable, lambda: data.evaluate(as_detections(data), tmp_path / "out")):
        with pytest.raises(UserError, match="have the same image id"):
            call()
    VOCDetection(tmp_path, [("2007", "trainval")]).check_scorable()


# ---- the first pictures alone


def test_first_pictures_with_objects_are_kept_as_they_are(voc_folder):
    whole, data = (VOCDetection(voc_folder, [(None, "trainval")]) for _ in range(2))
    data.keep_first(3)
    assert len(data) == 3 and data.ids == ["b1", "b2", "b4"] and data.classes == whole.classes
    for index, before in enumerate([0, 1, 3]):
        assert np.array_equal(data[index][0], whole[before][0])
        assert data[index][1].tolist() == data.target(index).tolist() == whole[before][1].tolist()
        assert data.difficult(index).tolist() == whole.difficult(before).tolist()
        assert data.image_path(index) == whole.image_path(before)
        assert data.image_size(index) == whole.image_size(before)
        assert np.array_equal(data.pull_image(index), whole.pull_image(before))
        assert data.annotations[index].path == whole.annotations[before].path
    assert len(list(data)) == 3 and data.report() == whole.report() == []
    data.keep_first(1)
    assert data.ids == ["b1"]


def test_first_pictures_are_scored_as_a_set_of_only_them(voc_folder, make_voc, tmp_path):
    data = VOCDetection(voc_folder, [(None, "trainval")])
    data.keep_first(2)
    samples = {
        "b1": [("cell", (5, 5, 40, 40)), ("rod", (50, 10, 90, 30))],
        "b2": [("cell", (20, 20, 70, 60))],
    }
    only = dataset(make_voc, tmp_path, samples)
    assert data.ids == only.ids and data.classes == ("cell", "platelet", "rod")
    for drop, value in (((), 1), ((1,), 0.75)):
        result, expected = (d.evaluate(as_detections(d, drop), tmp_path / "out")
                            for d in (data, only))  # fmt: skip
        (note,) = result.pop("notes")
        assert note.endswith("2 pictures kept, so not scored, for 1 classes: platelet")
        assert expected.pop("notes") == [] and result == expected
        assert result["value"] == result["area"]["mean"] == pytest.approx(value)
        assert list(result["per_class"]) == ["cell", "rod"]


def test_detection_of_a_class_without_ground_truth_kept_is_written_but_not_scored(
    voc_folder, tmp_path
):
    data = VOCDetection(voc_folder, [(None, "trainval")])
    data.keep_first(2)
    found = as_detections(data)
    found[1] = {"boxes": np.ones((1, 4), np.float32), "scores": [0.5], "labels": [2]}
    assert data.evaluate(found, tmp_path / "out")["per_class"] == {"cell": 0.5, "rod": 1}
    assert (tmp_path / "out/comp4_det_trainval_platelet.txt").read_text().startswith("b2 0.5")


def test_picture_of_difficult_objects_alone_is_kept(voc_devkit, tmp_path):
    data = VOCDetection(voc_devkit, [("2007", "trainval")])
    data.keep_first(2)
    assert data.ids == ["000001", "000002"] and data.difficult(1).tolist() == [True]
    result = data.evaluate(as_detections(data), tmp_path / "out")
    assert result["per_class"] == pytest.approx({"dog": 1, "person": 1})
    assert result["value"] == pytest.approx(1)


def test_difficult_objects_alone_score_0_and_say_why(make_voc, tmp_path):
    data = dataset(make_voc, tmp_path, {"a": [("dog", (1, 1, 9, 9), True)], "b": []})
    data.keep_first(1)
    result = data.evaluate(as_detections(data), tmp_path / "out")
    assert result["value"] == 0 and result["notes"][0].startswith("0 ground truths for class dog")


def test_same_id_in_two_years_can_be_scored_once_one_of_them_is_kept(make_voc, tmp_path):
    for year in ("2007", "2012"):
        make_voc(tmp_path / f"VOC{year}", {"trainval": {"a": [("dog", (1, 1, 9, 9))]}})
    data = VOCDetection(tmp_path, [("2007", "trainval"), ("2012", "trainval")])
    data.keep_first(1)
    data.check_scorable()
    assert data.evaluate(as_detections(data), tmp_path / "out")["area"]["mean"] == pytest.approx(1)


def test_more_pictures_than_have_objects_cannot_be_kept(voc_folder):
    data = VOCDetection(voc_folder, [(None, "trainval")])
    message = f"{voc_folder}: trainval: 5 of 6 pictures have objects, too few to keep 6; ask for"
    with pytest.raises(UserError, match="^" + re.escape(message)):
        data.keep_first(6)
    with pytest.raises(ValueError, match="cannot keep 0 pictures, wanted 1 or more"):
        data.keep_first(0)
    assert len(data) == 6


def test_pictures_and_annotations_in_one_folder_are_sent_to_the_page(tmp_path):
    write_annotation(tmp_path / "a.xml", [("dog", (1, 1, 5, 5))])
    with pytest.raises(UserError, match="neither Annotations/ and JPEGImages/ .*own_data.md"):
        VOCDetection(tmp_path, [("2007", "trainval")])
