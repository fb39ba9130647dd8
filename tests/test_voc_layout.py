"""Folders with an XML file an image: which image an annotation is for, and what a set loses."""

import os
import shutil
import unicodedata

import pytest
from conftest import write_annotation

from data import default_sets, find_layout
from data.skips import SkipKind
from data.voc0712 import VOCDetection
from utils.errors import UserError

BOX = [("dog", (1, 1, 9, 9))]
NFD = unicodedata.normalize("NFD", "été")


def read(root, *names, **options):
    return VOCDetection(root, [(None, name) for name in names], **options)


def kinds(data):
    return {skip.kind for skip in data.skipped}


@pytest.fixture
def folder(make_voc, tmp_path):
    """Images a, b and c with a box each, in the set "test"."""
    return make_voc(tmp_path / "own", {"test": {name: BOX for name in "abc"}})


def name_image(root, id, name):
    path = root / f"Annotations/{id}.xml"
    text = path.read_text("utf-8")
    tag = f"<filename>{name}</filename>" if name else ""
    path.write_text(text.replace(f"<filename>{path.stem}.jpg</filename>", tag), "utf-8")


@pytest.mark.parametrize(("files", "filename", "line", "image", "kind"), [
    (["a.jpg", "a.png"], "a.png", "a", "a.png", None),
    (["a.jpg", "a.png"], "C:\\data\\a.png", "a", "a.png", None),
    (["a.jpg", "a.png"], "", "a.png", "a.png", None),
    (["a.jpg", "a.png"], "", "a", "a.jpg", SkipKind.SEVERAL_IMAGES),
    (["IMG 7.jpg"], "IMG 7.jpg", "a", "IMG 7.jpg", None),
    (["a.jpg"], "renamed.jpg", "a", "a.jpg", None),
])
def test_annotation_names_its_image(folder, files, filename, line, image, kind):
    (folder / "ImageSets/Main/test.txt").write_text(line)
    (folder / "JPEGImages/a.jpg").rename(folder / "kept")
    for name in files:
        shutil.copy(folder / "kept", folder / "JPEGImages" / name)
    name_image(folder, "a", filename)
    data = read(folder, "test")
    assert data.ids == ["a"] and data.image_path(0).name == image
    assert kinds(data) == ({kind} if kind else set())


@pytest.mark.parametrize("line", [
    "JPEGImages/a.jpg", "./a.jpg", "/home/me/own/JPEGImages/a.jpg", "C:\\own\\JPEGImages\\a.jpg",
    "own/a", "a.jpg 1",
])
def test_list_may_name_image_files_of_any_machine(folder, line):
    (folder / "ImageSets/Main/test.txt").write_text(f"{line}\n", "utf-16")
    assert read(folder, "test").ids == ["a"]
    (folder / "Annotations/own").mkdir()  # then own/a is another image
    if line == "own/a":
        with pytest.raises(UserError, match="missing"):
            read(folder, "test")


def test_image_outside_the_root_is_counted(folder):
    for kind, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (folder.parent / kind).mkdir()
        (folder / kind / f"a{suffix}").rename(folder.parent / kind / f"a{suffix}")
    (folder / "ImageSets/Main/test.txt").write_text("../../Annotations/a\n")
    data = read(folder, "test")
    assert len(data) == 1 and kinds(data) == {SkipKind.OUTSIDE_ROOT}


def test_own_detections_are_read_where_two_images_differ_by_suffix_alone(folder):
    (folder / "JPEGImages/b.jpg").rename(folder / "JPEGImages/a.png")
    for old, new in (("a", "a.jpg"), ("b", "a.png")):
        (folder / f"Annotations/{old}.xml").rename(folder / f"Annotations/{new}.xml")
    (folder / "ImageSets/Main/test.txt").write_text("a.jpg\na.png\nc\n")
    names = [path.name for path in read(folder, "test")._paths]
    assert names == ["a.jpg", "a.png", "c.jpg"]


def test_names_in_another_unicode_form_are_one_image(folder):
    (folder / "Annotations/a.xml").rename(folder / f"Annotations/{NFD}.xml")
    (folder / "JPEGImages/a.jpg").rename(folder / f"JPEGImages/{NFD}.jpg")
    (folder / "ImageSets/Main/test.txt").write_text(f"été\n{NFD}\n", "utf-8")
    objects = [(name, BOX[0][1]) for name in (NFD, "été")]
    write_annotation(folder / f"Annotations/{NFD}.xml", objects)
    data = read(folder, "test")
    assert data.classes == read(folder, "test", classes=[NFD]).classes == ("été",)
    assert data.ids == ["été"] and kinds(data) == {SkipKind.IMAGE_LISTED_TWICE}


@pytest.mark.parametrize("name", ["a.jpg", "sub/a", "a"])
def test_two_annotations_of_one_image_are_refused(folder, name):
    path = folder / (f"Annotations/{name}.xml" if name != "a" else "Annotations/a.XML")
    path.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "Annotations/a.xml", path)
    shutil.rmtree(folder / "ImageSets")
    with pytest.raises(UserError, match=r"a\.(xml|jpg\.xml|XML) .*annotat|missing.*sub/a"):
        read(folder, "split_train", "split_val")


@pytest.mark.parametrize("name", ["a\nb", "\udce9", " a", "a\x7f"])
def test_name_that_no_detection_file_can_hold_is_refused(folder, name):
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        os.rename(folder / kind / f"a.{suffix}", folder / kind / f"{name}.{suffix}")
    shutil.rmtree(folder / "ImageSets")
    with pytest.raises(UserError, match="name of the image .*rename"):
        read(folder, "split_train", "split_val")


@pytest.mark.parametrize("content", [b"l\xe9gende", b"not\0text", b"just words\n"])
def test_list_that_nobody_asked_for_never_stops_training(folder, content):
    (folder / "ImageSets/Main/notes.txt").write_bytes(content)
    unread = {SkipKind.OTHER_SET_UNREAD} if content != b"just words\n" else set()
    assert kinds(read(folder, "test")) == unread
    assert len(read(folder, "split_train", "split_val")) == 3
    if unread:
        with pytest.raises(UserError, match=r"notes\.txt:1: .*UTF-8"):
            read(folder, "notes")
    (folder / "ImageSets/Main/test.txt").unlink()
    assert len(read(folder, "split_train", "split_val")) == 3


@pytest.mark.parametrize(("box", "cause"), [
    ((0.1, 0.2, 0.5, 0.6), "fractions of the image"), ((9, 9, 1, 1), "swapped corners"),
    ((5, 5, 5, 5), "without area"), ((500, 500, 600, 600), "outside the image"),
])
def test_lost_boxes_are_told_and_a_set_without_any_left_is_refused(folder, box, cause):
    write_annotation(folder / "Annotations/a.xml", [("cat", box)])
    data = read(folder, "test")
    lost = [skip for skip in data.skipped if skip.kind is SkipKind.IMAGE_EMPTIED]
    assert [skip.image for skip in lost] == [0] and cause in lost[0].detail
    lost = [skip for skip in data.skipped if skip.kind is SkipKind.CLASS_EMPTIED]
    assert [skip.detail.rpartition(" ")[2] for skip in lost] == ["cat"]
    (folder / "ImageSets/Main/test.txt").write_text("a\n")
    with pytest.raises(UserError, match=f"none of the annotated boxes is left.*{cause}"):
        read(folder, "test")
    faults = []
    assert len(read(folder, "test", faults=faults).rows) == 0 and cause in faults[0]


def test_cvat_declares_classes_and_writes_no_file_for_an_image_without_objects(folder):
    (folder / "Annotations/c.xml").unlink()
    with pytest.raises(UserError, match=r"missing .*c\.xml"):
        read(folder, "test")
    (folder / "labelmap.txt").write_text("# label:color\nbackground:0,0,0::\ncat:1,2,3::\ndog:::\n")
    (folder / "ImageSets/Main/dog_test.txt").write_text("a 1\nb -1\n")
    data = read(folder, "test")
    assert data.classes == ("cat", "dog") and kinds(data) == {SkipKind.EMPTY_IN_CVAT}
    assert data.ids == ["a", "b", "c"] and len(data.target(2)) == 0
    assert [each.name for each in VOCDetection.list_image_sets(folder)] == ["test"]


@pytest.mark.parametrize("base", ["train/{}", "Annotations/train/{}", "train/Annotations/{}"])
def test_folders_of_image_sets_give_ids_that_are_unique_and_lists_can_name(folder, base):
    root = folder / "x"
    for split in ("train", "valid"):
        for kind, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            path = root / base.replace("train", split).replace("Annotations", kind).format("a.b")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / kind / f"a{suffix}", f"{path}{suffix}")
    shutil.copy(folder / "JPEGImages/a.jpg", path.with_name("unlabelled.jpg"))
    assert [sets[0].name for sets in default_sets("VOC", root)] == ["train", "valid"]
    data = read(root, "train", "valid")
    assert len({*data.ids}) == len({*data._paths}) == 2
    assert kinds(data) == {SkipKind.NO_ANNOTATION_FILE}
    assert find_layout(root)[0] == "VOC"
    if base != "Annotations/train/{}":
        (root / "test").mkdir()
        shutil.copy(folder / "JPEGImages/a.jpg", root / "test")
        assert SkipKind.SET_UNANNOTATED in kinds(read(root, "train"))
    if base == "train/{}":  # not without its image sets
        with pytest.raises(UserError, match=rf"VOC XML.*{root} as --root"):
            shutil.rmtree(folder / "Annotations")
            find_layout(folder)
    (root / "ImageSets").mkdir()
    (root / "ImageSets/mine.txt").write_text("\n".join(data.ids))
    assert read(root, "mine").ids == data.ids


@pytest.mark.parametrize("name", ["../../test", "sub/test", "/etc/hosts", "s" * 300])
def test_set_is_a_name_and_no_path(folder, name):
    (folder / "ImageSets/Main/test.txt").rename(folder / "test.txt")
    with pytest.raises(UserError, match="no image set .* existing"):
        read(folder, name)
