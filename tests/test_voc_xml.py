"""VOC's annotations: XML files, image sets, class names."""

import re

import numpy as np
import pytest
from conftest import write_annotation

from data.classes import parse_classes
from data.config import VOC_CLASSES
from data.skips import SkipKind
from data.voc_xml import list_image_sets, load_annotations, read_annotation
from utils.errors import UserError


def xml(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text, "utf-8")
    return path


def load(root, name="test", year=None, **options):
    return load_annotations(root, [(year, name)], **options)


def test_annotation_is_read_with_boxes_counted_from_0(tmp_path):
    path = tmp_path / "a.xml"
    write_annotation(path, [("dog", (2, 3, 10, 20)), ("cat", (1, 1, 96, 72), True)])
    found = read_annotation(path)
    assert found.path == path and found.size == (96, 72) and found.names == ("dog", "cat")
    assert found.boxes.tolist() == [[1, 2, 9, 19], [0, 0, 95, 71]]
    assert found.difficult.tolist() == [False, True]


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>",
             "<size><width/><height>8</height></size>"]
)  # fmt: skip
def test_annotation_without_size_and_objects_is_empty(tmp_path, size):
    found = read_annotation(xml(tmp_path, f"<annotation>{size}</annotation>"))
    assert found.boxes.shape == (0, 4) and found.difficult.shape == (0,)
    assert found.names == () and found.size is None


def test_float_coordinates_are_kept_and_parts_of_an_object_ignored(tmp_path):
    text = """<annotation><object><name> person </name><difficult/>
      <bndbox><xmax>20.5</xmax><xmin> 1.25 </xmin><ymin>2</ymin><ymax>3e1</ymax></bndbox>
      <part><name>head</name><bndbox><xmin>x</xmin></bndbox></part></object></annotation>"""
    found = read_annotation(xml(tmp_path, text))
    assert found.names == ("person",) and not found.difficult[0]
    assert found.boxes.tolist() == [[0.25, 1, 19.5, 29]]


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
GOOD = f"<object><name>dog</name>{BOX}</object>"


@pytest.mark.parametrize(("text", "message"), [
    (f"<object>{BOX}</object>", "a.xml: object 2 .*<name>"),
    (f"<object><name> </name>{BOX}</object>", "a.xml: object 2 .*<name>"),
    ("<object><name>dog</name></object>", r'object 2 \("dog"\) .*<bndbox>'),
    (GOOD.replace("<ymin>1</ymin>", ""), r'object 2 \("dog"\): .*<ymin>'),
    (GOOD.replace("<xmax>5", "<xmax>nan"), 'object 2.*<xmax> is "nan", .*number'),
    (GOOD.replace("<xmax>5", "<xmax>inf"), 'object 2.*<xmax> is "inf", .*number'),
    (GOOD.replace("<xmax>5", "<xmax>five"), 'object 2.*<xmax> is "five", .*number'),
    (GOOD.replace("<xmax>5", "<xmax>"), 'object 2.*<xmax> is "", .*number'),
    (GOOD.replace("<bnd", "<difficult>2</difficult><bnd"), 'object 2.*<difficult> is "2", .*1'),
    ("\n<object>\n", r"a\.xml:3: malformed XML"),
])
def test_malformed_annotation_is_refused_by_file_and_place(tmp_path, text, message):
    path = xml(tmp_path, f"<annotation>{GOOD}{text}</annotation>")
    with pytest.raises(UserError, match=message):
        read_annotation(path)


def test_file_that_is_no_xml_is_refused(tmp_path):
    for text in ("", '<?xml version="1.0" encoding="klingon"?><annotation/>'):
        with pytest.raises(UserError, match=r"a\.xml.*: malformed XML"):
            read_annotation(xml(tmp_path, text))


def test_image_sets_are_found_and_read_in_every_usual_form(voc_folder, voc_devkit):
    for root in (voc_devkit.parent, voc_devkit / "VOC2007"):
        assert len(load(root, "test", "2007").ids) == 3
    (voc_folder / "ImageSets/Main/cell_test.txt").write_text("\ufefft1  1\r\n\nt4 -1\n\n", "utf-8")
    assert load(voc_folder, "cell_test").ids == ["t1", "t4"]
    (voc_folder / "ImageSets/Main/test.txt").rename(voc_folder / "ImageSets/mine.txt")
    path = voc_folder / "Annotations/t1.xml"
    path.rename(path.with_suffix(".XML"))
    assert len(load(voc_folder, "mine").ids) == 4


def test_image_listed_twice_is_taken_once_and_recorded(voc_folder):
    (voc_folder / "ImageSets/Main/twice.txt").write_text("t1\nt2\nt1\n")
    found = load_annotations(voc_folder, [(None, "twice"), (None, "test")])
    assert found.ids == ["t1", "t2", "t3", "t4"]
    assert {skip.kind for skip in found.skipped} == {SkipKind.IMAGE_LISTED_TWICE}
    assert [skip.image for skip in found.skipped] == [0, 0, 1]
    assert re.fullmatch(r".*/twice\.txt:3: t1", found.skipped[0].detail)


@pytest.mark.parametrize(("image_id", "line"), [
    ("my img", "my img"),
    ("my img 1", " my img 1 "),  # no flag: an annotation has that name
    ("my img", "my img -1"),
    ("x/b1", "x/b1"),
    ("x/y z", "x/y z  1"),
    ("b1", "b1.jpg"),
    ("b1", "b1.PNG 1"),
    ("b.1", "b.1"),
])
def test_id_is_the_line_without_flag_and_image_suffix(tmp_path, image_id, line):
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/test.txt").write_text(f"{line}\n")
    path = tmp_path / "Annotations" / f"{image_id}.xml"
    path.parent.mkdir(parents=True)
    write_annotation(path, [("dog", (1, 1, 9, 9))])
    found = load(tmp_path)
    assert found.ids == [image_id] and found.annotations[0].path == path


@pytest.mark.parametrize(("lines", "message"), [
    (["t1", *(f"x{i}" for i in range(12))], r"^12 .* missing: .*x0\.xml.*x9\.xml, \.\.\.$"),
    (["no/b9.jpg 1"], r"^1 annotation .*/no/b9\.jpg 1 or .* or no/b9\.xml"),
    ([""], "the image set test lists no image"),
])
def test_missing_annotations_are_refused_all_at_once(voc_folder, lines, message):
    (voc_folder / "ImageSets/Main/test.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        load(voc_folder)


@pytest.mark.parametrize("root", ["nowhere", "n" * 300, "~no such user/nowhere"])
def test_missing_root_is_refused(tmp_path, root):
    with pytest.raises(UserError, match=f"{root}: no such data set folder.* --root"):
        load(root if root[0] == "~" else tmp_path / root, "test", "2007")


def test_missing_set_is_refused_with_the_paths_tried_and_the_existing_sets(voc_devkit, voc_folder):
    (voc_devkit / "VOC2007/ImageSets/Main/dog_test.txt").touch()  # a class's file is not listed
    with pytest.raises(UserError) as error:
        load(voc_devkit, "test", "2012")
    text = str(error.value)
    for part in ('"2012_test"', "VOC2012/ImageSets/Main/test.txt", "VOC2012/ImageSets/test.txt"):
        assert part in text
    assert text.endswith(": 2007_test, 2007_trainval, 2012_trainval")
    for year, name in (("2007", "test"), (None, "s" * 300)):
        with pytest.raises(UserError, match="sss|2007_test.*: test, trainval$"):
            load(voc_folder, name, year)
    assert list_image_sets(voc_folder) == [(None, "test"), (None, "trainval")]


def test_images_and_annotations_in_one_folder_are_sent_to_the_page(tmp_path):
    write_annotation(tmp_path / "a.xml", [("dog", (1, 1, 5, 5))])
    with pytest.raises(UserError, match="Annotations/ and JPEGImages/ .*docs/own_data.md"):
        load(tmp_path, "trainval", "2007")


@pytest.mark.parametrize("declared", ["rod\n\ncell\nplatelet\n", None])
def test_given_classes_come_before_declared_ones_before_all_names_in_the_sets(voc_folder, declared):
    (voc_folder / "Annotations/stray.xml").write_text("<annotation>")
    (voc_folder / "Annotations/._t1.xml").write_bytes(b"\0\5\x16\7")
    (voc_folder / "ImageSets/Main/._test.txt").write_bytes(b"\0\5\x16\xff")
    (voc_folder / "ImageSets/Main/later.txt").write_text("not labelled yet\nno/folder\n")
    if declared:
        (voc_folder / "classes.txt").write_text(declared)
    expected = ("rod", "cell", "platelet") if declared else ("cell", "platelet", "rod")
    assert load(voc_folder).classes == expected  # no platelet in this set
    assert load(voc_folder, classes=["rod", "cell"]).classes == ("rod", "cell")


@pytest.mark.parametrize(("names", "classes"), [
    (("person", "dog"), VOC_CLASSES), (("screw",), ("screw",)),
    (("person", "helmet"), ("helmet", "person")),
])
def test_devkit_has_the_published_classes_unless_it_names_others(
    make_voc, tmp_path, names, classes
):
    make_voc(tmp_path / "VOC2007", {"test": {"a": [(name, (1, 1, 9, 9)) for name in names]}})
    assert load(tmp_path, "test", "2007").classes == classes


def test_objects_of_unknown_classes_are_recorded(voc_folder):
    found = load(voc_folder, "trainval", classes=["cell"])
    assert {skip.kind for skip in found.skipped} == {SkipKind.UNKNOWN_CLASS}
    assert [skip.image for skip in found.skipped] == [0, 3, 4, 4, 5]
    first = found.skipped[0]
    assert first.box == (49, 9, 89, 29)
    assert first.detail == f'{voc_folder / "Annotations/b1.xml"}: object 2 ("rod")'


def test_set_without_an_object_of_the_classes_is_refused_with_the_names_found(
    voc_folder, make_voc, tmp_path
):
    with pytest.raises(UserError, match=r"set test .*classes nut, bolt; .*name: cell, rod$"):
        load(voc_folder, classes=["nut", "bolt"])
    make_voc(tmp_path, {"test": {"a": []}})
    with pytest.raises(UserError, match=r"no object of the classes \(none\); .*no object at all"):
        load(tmp_path)


@pytest.mark.parametrize(("classes", "message"), [
    (["cell", "rod", "cell"], "repeated: cell"), (["cell", " "], "class name is empty"),
    ([], "class name is empty"), (["background", "cell"], 'leave "background" out'),
])
def test_bad_class_names_are_refused(voc_folder, classes, message):
    with pytest.raises(UserError, match=message):
        load(voc_folder, classes=classes)


def test_classes_of_the_command_line_are_names_or_a_file(tmp_path):
    assert parse_classes("cell, rod") == ("cell", "rod")
    (tmp_path / "names.txt").write_text("cell\nblood cell\n")
    assert parse_classes(str(tmp_path / "names.txt")) == ("cell", "blood cell")
    (tmp_path / "names.txt").write_text("cell\ncell\n")
    with pytest.raises(UserError, match=r"names\.txt: .*repeated: cell"):
        parse_classes(str(tmp_path / "names.txt"))
    # names that no path can be
    names = [f"class {i}" for i in range(80)]
    assert parse_classes(",".join(names)) == tuple(names)
    assert parse_classes("~no such user,bar") == ("~no such user", "bar")
    assert parse_classes("a\0,b") == ("a\0", "b")


def test_faults_are_collected_and_their_images_have_no_objects(voc_folder):
    (voc_folder / "Annotations/t1.xml").write_text("<annotation>")
    (voc_folder / "Annotations/t2.xml").unlink()
    faults: list[str] = []
    found = load(voc_folder, faults=faults)
    assert [len(annotation.names) for annotation in found.annotations] == [0, 0, 2, 1]
    assert [np.shape(annotation.boxes) for annotation in found.annotations[:2]] == [(0, 4)] * 2
    assert len(faults) == 2 and "t1.xml:1" in faults[0] and "t2.xml" in faults[1]
