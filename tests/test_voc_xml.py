"""VOC's annotations: XML files, image sets, class names."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_annotation

from data.classes import parse_classes
from data.config import VOC_CLASSES
from data.skips import SkipKind
from data.voc_layout import list_image_sets
from data.voc_read import load_annotations
from data.voc_xml import read_annotation
from utils.errors import UserError


def xml(tmp_path, content):
    path = tmp_path / "a.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(root, name="test", year=None, **options):
    return load_annotations(root, [(year, name)], **options)[1]


@pytest.mark.parametrize("size", [
    "", "<size/>", "<size><width>0</width><height>0</height></size>",
    "<size><width/><height>8</height></size>",
    "<date>2024-01-02 10 20 30</date><gps><lat>1</lat><lon>2</lon></gps>",
])
def test_annotation_without_size_and_objects_is_empty(tmp_path, size):
    found = read_annotation(xml(tmp_path, f"<annotation>{size}</annotation>"))
    assert found.boxes.shape == (0, 4) and found.difficult.shape == (0,)
    assert found.names == () and found.size is None


def test_boxes_count_from_0_and_parts_of_an_object_are_ignored(tmp_path):
    text = """<annotation><object><name> person </name><difficult/>
      <bndbox><xmax>20.5</xmax><xmin> 1.25 </xmin><ymin>2</ymin><ymax>3e1</ymax></bndbox>
      <part><name>head</name><bndbox><xmin>x</xmin></bndbox></part></object><object><name>cat</name>
      <difficult>1</difficult><bndbox xmin="1" ymin="1" xmax="96" ymax="72"/></object>
      <size><width>96</width><height>72</height></size></annotation>"""
    found = read_annotation(xml(tmp_path, text))
    assert found.path == tmp_path / "a.xml" and found.size == (96, 72)
    assert found.names == ("person", "cat") and found.difficult.tolist() == [False, True]
    assert found.boxes.tolist() == [[0.25, 1, 19.5, 29], [0, 0, 95, 71]]


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
GOOD = f"<object><name>dog</name>{BOX}</object>"


@pytest.mark.parametrize(("text", "boxes"), [
    (GOOD, [[0, 0, 4, 4]]),
    (f"<object><name>dog</name>{BOX}{BOX.replace('5', '7')}</object>",
     [[0, 0, 4, 4], [0, 0, 6, 6]]),
    (f"<objects><annotation>{GOOD}</annotation></objects>", [[0, 0, 4, 4]]),
    (GOOD.replace("bndbox", "BndBox").replace("object", "Object"), [[0, 0, 4, 4]]),
    (f"<object><name>dog</name><region>{BOX}</region></object>", [[0, 0, 4, 4]]),
    ("<object><name>dog</name><robndbox><cx>21</cx><cy>11</cy><w>8</w><h>4</h><angle>"
     "1.5707963267948966</angle></robndbox></object>", [[18, 6, 22, 14]]),
    ("<object><name>dog</name><attributes><attribute><name>rotation</name><value>90.0</value>"
     "</attribute></attributes><bndbox><xmin>30</xmin><ymin>30</ymin><xmax>70</xmax><ymax>40</ymax>"
     "</bndbox></object>", [[44, 14, 54, 54]]),
    ("<object><name>dog</name><polygon><x1>2</x1><y1>9</y1><x2>7</x2><y2>3</y2></polygon></object>",
     [[1, 2, 6, 8]]),
    ("<object><name>dog</name><polygon><username>x</username><pt><x>2</x><y>9</y></pt><pt><x>7</x>"
     "<y>3</y></pt></polygon></object>", [[1, 2, 6, 8]]),
    ("<object><name>dog</name><points><point>2,9</point><point>7,3</point></points></object>",
     [[1, 2, 6, 8]]),
    (GOOD.replace("<name>", "<deleted>1</deleted><name>"), []),
])
@pytest.mark.parametrize("root", ["annotation", "Annotation", 'annotation xmlns="urn:a"', "doc"])
def test_objects_are_read_at_any_depth_and_in_any_shape(tmp_path, text, boxes, root):
    found = read_annotation(xml(tmp_path, f"<{root}>{text}</{root.split()[0]}>"))
    assert np.allclose(found.boxes, np.reshape(boxes, (-1, 4)), atol=1e-9)
    assert found.names == ("dog",) * len(boxes)


@pytest.mark.parametrize(("content", "message"), [
    ("<doc/>", "root is <doc>"),
    ('<annotations><image><box xmin="1"/></image></annotations>', "<box>"),
    (f"<item><name>dog</name>{BOX}</item>", "<bndbox> outside"),
    ("<item><l>1</l><t>1</t><w>1</w><h>1</h></item>", "<item> outside"),
    ("<rect>1, 2, 3.5, 4</rect>", "<rect> outside"),
    (f"{GOOD}<object><name>a</name>{GOOD}</object>", "object 2 .*<object>"),
    ("<a><b><filename>a</filename></b><b><filename>b</filename></b></a>", "several images|root"),
    (f"<object><name>a</name><name>b</name>{BOX}</object>", "names: a, b"),
    ("<size><width>1e300</width></size>", '<width> is "1e300"'),
    ("<size><width>-1</width></size>", "<size> is -1 x 0"),
    ("<size><width>wide</width></size>", '<width> is "wide"'),
    ("<object><name>a</name><polygon><x>1</x></polygon></object>", "1 x"),
    (GOOD.replace("<xmin>", "<xmin>1</xmin><xmin>"), "several corners"),
    ("<object><name>a</name><robndbox><cx>1</cx><cy>1</cy><w>1</w><h>1</h><angle>90"
     "</angle></robndbox></object>", "<angle> is 90, expected radians"),
    (f"{GOOD}<object>{BOX}</object>", "object 2.*<name>"),
    (f"{GOOD}<object><name> </name>{BOX}</object>", "object 2.*<name>"),
    ("<object><name>dog</name></object>", r'object 1 \("dog"\).*<bndbox>'),
    (GOOD.replace("<ymin>1</ymin>", ""), r'object 1 \("dog"\): no <ymin>'),
    (GOOD.replace("<xmax>5", "<xmax>nan"), 'object 1.*<xmax> is "nan", .*number'),
    (GOOD.replace("<xmax>5", "<xmax>five"), 'object 1.*<xmax> is "five", .*number'),
    (GOOD.replace("<xmax>5", "<xmax>"), 'object 1.*<xmax> is "", .*number'),
    (GOOD.replace("<bnd", "<difficult>2</difficult><bnd"), 'object 1.*<difficult> is "2", .*1'),
    ("\n<object>\n", ":3: malformed XML"),
    ("&#xD800;", ":1: malformed XML"),
    (b"", ":1: malformed XML"),
    (b"\x89PNG\r\n\x1a\n\0", ":1: byte 0x89 is not utf-8 .*save the file as UTF-8"),
    (b"<annotation>\n\xe9</annotation>", ":2: byte 0xE9 is not utf-8 .* as UTF-8"),
    (b'<?xml version="1.0" encoding="klingon"?><a/>', ': encoding "klingon" .* as UTF-8'),
    (b'<?xml version="1.0" encoding="rot13"?><a/>', ': encoding "rot13" .* as UTF-8'),
    (b"<annotation>\0</annotation>", ":1: a NUL character"),
    (b'<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation/>', "XML entities.* remove"),
])
def test_file_that_is_not_understood_is_refused_by_place_and_value(tmp_path, content, message):
    if isinstance(content, str) and not content.startswith(("<doc", "<annotations", "<a>")):
        content = f"<annotation>{content}</annotation>"
    with pytest.raises(UserError, match=rf"a\.xml.*{message}"):
        read_annotation(xml(tmp_path, content))


NAMED = "<annotation><object><name>{}</name>" + BOX + "</object></annotation>"


@pytest.mark.parametrize(("encoding", "declared"), [
    ("utf-8", "utf8"), ("utf-8-sig", None), ("cp1252", "windows-1252"), ("gbk", "GBK"),
    ("shift_jis", "Shift_JIS"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16", None),
    ("utf-8", "utf-16"), ("utf-8-sig", "ascii"),
])
def test_annotation_is_read_in_every_encoding_of_python(tmp_path, encoding, declared):
    name = "\u732b" if encoding in ("gbk", "shift_jis") else "\xe9t\xe9"
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    path = xml(tmp_path, (head + NAMED.format(name)).encode(encoding))
    assert read_annotation(path).names == (name,)


def test_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.xml")
    with pytest.raises(UserError, match=r"a\.xml: .*pipe"):
        read_annotation(tmp_path / "a.xml")


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
    _, found = load_annotations(voc_folder, [(None, "twice"), (None, "test")])
    assert found.ids == ["t1", "t2", "t3", "t4"]
    assert {skip.kind for skip in found.skipped} == {SkipKind.IMAGE_LISTED_TWICE}
    assert [skip.image for skip in found.skipped] == [0, 0, 1]
    assert re.fullmatch(r".*/twice\.txt:3: t1", found.skipped[0].detail)


@pytest.mark.parametrize(("image_id", "line"), [
    ("my img", "my img"),
    ("my img 1", " my img 1 "),  # no flag: an annotation has that name
    ("my img", "my img -1"), ("x/b1", "x/b1"), ("x/y z", "x/y z  1"), ("b1", "b1.jpg"),
    ("b1", "b1.PNG 1"), ("b.1", "b.1"),
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
    (["t1", *(f"x{i}" for i in range(12))], r"annotations .*12.*.*x0\.xml.*x4\.xml, \.\.\.;"),
    (["no/b9.jpg 1"], r"test: annotations missing \(1\): .*/no/b9\.jpg 1 or .* or no/b9\.xml"),
    ([""], "the image set test lists no image"),
])
def test_missing_annotations_are_refused_all_at_once(voc_folder, lines, message):
    (voc_folder / "ImageSets/Main/test.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        load(voc_folder)


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
    with pytest.raises(UserError, match="holds neither XML .*docs/own_data.md"):
        load(voc_folder / "JPEGImages", "trainval", "2007")


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
    ("cell,rod,cell", "repeated: cell"), ("cell, ", "class name is empty"),
    ("", "class name is empty"), ("background,cell", 'leave "background" out'),
    ("a\0,b", "control character"), ("names.txt", r"names\.txt: .*repeated: cell"),
])
def test_bad_class_names_are_refused(voc_folder, monkeypatch, classes, message):
    monkeypatch.chdir(voc_folder)
    Path("names.txt").write_text("cell\ncell\n")
    with pytest.raises(UserError, match=message):
        parse_classes(classes)
    if classes != "names.txt":
        with pytest.raises(UserError, match=message):
            load(voc_folder, classes=classes.split(","))


def test_classes_of_the_command_line_are_names_or_a_file(tmp_path):
    assert parse_classes("cell, rod") == ("cell", "rod")
    (tmp_path / "names.txt").write_text("cell\nblood cell\n")
    assert parse_classes(str(tmp_path / "names.txt")) == ("cell", "blood cell")
    # names that no path can be
    names = [f"class {i}" for i in range(80)]
    assert parse_classes(",".join(names)) == tuple(names)
    assert parse_classes("~no such user,bar") == ("~no such user", "bar")


def test_faults_are_collected_and_their_images_have_no_objects(voc_folder):
    (voc_folder / "Annotations/t1.xml").write_text("<annotation>")
    (voc_folder / "Annotations/t2.xml").unlink()
    faults: list[str] = []
    found = load(voc_folder, faults=faults)
    assert [len(annotation.names) for annotation in found.annotations] == [0, 0, 2, 1]
    assert [np.shape(annotation.boxes) for annotation in found.annotations[:2]] == [(0, 4)] * 2
    assert len(faults) == 2 and "t1.xml:1" in faults[0] and "t2.xml" in faults[1]
