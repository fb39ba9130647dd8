"""YOLO labels: lines, data.yaml, where images lie, and what is counted or refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import build_dataset, default_sets, find_layout
from data.image import image_size, read_image
from data.skips import SkipKind
from utils.errors import UserError

YAML = "train: images/train\nval: images/val\nnames: [cat, 'no']\n"
CAT = "0 0.5 0.5 0.2 0.5\n"  # in 100 x 80: 40..60, 20..60


def write(root: Path, labels: dict[str, str | bytes | None], yaml: str = YAML) -> Path:
    """labels: content of the label file of each image, such as train/a; None: no file."""
    for name, text in {"val/v": CAT, **labels}.items():
        image, label = root / f"images/{name}.png", root / f"labels/{name}.txt"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), np.zeros((80, 100, 3), np.uint8))
        if text is not None:
            label.write_bytes(text if isinstance(text, bytes) else text.encode())
    if yaml:
        (root / "data.yaml").write_text(yaml)
    return root


def read(root: Path, name: str = "train", **options):
    return build_dataset("YOLO", root, [(None, name)], **options)


@pytest.mark.parametrize("text, rows", [
    (CAT, [[40, 20, 59, 59, 1]]),
    ("\ufeff1.0 0.5 0.5 1 1\r\n\r\n", [[0, 0, 99, 79, 2]]),
    (CAT.encode("utf-16").decode("utf-16") + "1 0.1 0.1 0.3 0.5 0.2 0.9",  # a triangle
     [[40, 20, 59, 59, 1], [10, 8, 29, 71, 2]]),
    ("0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5", [[10, 8, 89, 71, 1]]),  # a turned box
    ("0 0.05 0.5 0.2 0.5", [[0, 20, 14, 59, 1]]),  # leaves the image
    (b"\xff\xfe" + CAT.encode("utf-16-le"), [[40, 20, 59, 59, 1]]),
])  # fmt: skip
def test_line_gives_the_box_around_its_object(text, rows, tmp_path):
    data = read(write(tmp_path, {"train/a": text}))
    assert data.target(0) == pytest.approx(np.array(rows), abs=1e-3)
    assert data.classes == ("cat", "no") and data.image_size(0) == (100, 80)


def test_keypoints_are_no_polygon(tmp_path):
    write(tmp_path, {"train/a": CAT.strip() + " 0 0 1 1"}, f"{YAML}kpt_shape: [2, 2]")
    assert read(tmp_path).target(0).tolist() == [[40, 20, 59, 59, 1]]


@pytest.mark.parametrize("line, words", [
    ("0 0.5 0.5 0.2", ["4 numbers", "5"]), ("0 0.5 0.5 0.2 0.5 0.9", ["6 numbers", "scores"]),
    ("0 .1 .1 .1 .1 .1 .1 .1", ["8 numbers", "polygon"]), ("cat 0.5 0.5 0.2 0.5", ['"cat"']),
    ("0 nan 0.5 0.2 0.5", ['"nan"']), ("-1 0.5 0.5 0.2 0.5", ['"-1"']), ("0,5", ['"0,5"']),
    ("0.5 0.5 0.5 0.2 0.5", ['"0.5"', "class number"]), ("0 0.5 0.5 0.2 1e999", ['"1e999"']),
    (b"\x89PNG\xff\xfe", ["0x89"]), ("0 0.5\0 0.5 0.2 0.5", ["NUL"]),
])  # fmt: skip
def test_line_that_is_no_label_is_refused_by_file_line_and_value(line, words, tmp_path):
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path, {"train/a": CAT.encode() + line, "train/b": CAT})
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert all(word in str(error.value) for word in ["a.txt:2", *words]), error.value
    faults: list[str] = []
    data = read(tmp_path, faults=faults)
    assert len(data.rows) == 1 and faults == [str(error.value)] and data.unread == {0}


@pytest.mark.parametrize("text, words", [
    ("a: &a [x, x]\n" + "".join(f"{k}: &{k} [{', '.join([f'*{p}'] * 9)}]\n" for p, k in zip(
        "abcdefghij", "bcdefghijk", strict=True)) + "names: *k", "names"),
    (f"train: {'x' * 300}\nnames: [a]", "x" * 300),
    ("names: [a, b\ntrain: x", "malformed YAML"), ("train: {a: b}\nnames: [a]", "train"),
    ("train: images/train\nnames: 7", "names is '7'"), (f"{YAML}nc: 3", "nc is '3'"),
    ("train: images/train\nnames: {a: cat}", "names"), (f"{YAML}kpt_shape: 17", "kpt_shape"),
    ("train: images/train\nnames: [a, a]", "unique"),
    (f"train: {'gone' * 99}\nnames: [cat]", "gone"),
    ("train: images/train\nnames: " + "[" * 5000, "malformed YAML"), (b"names: \xff", "0xFF"),
])  # fmt: skip
def test_description_that_cannot_be_read_is_refused_by_file_and_value(text, words, tmp_path):
    write(tmp_path, {"train/a": CAT})
    (tmp_path / "data.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find_layout(tmp_path)[0] == "YOLO"
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert "data.yaml" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("train", [
    "images/train", "./images/train/", "../images/train", "/content/set/images/train",
    "'C:\\set\\images\\train'", "[images/train]", "list.txt", "ABSOLUTE/images/train",
])  # fmt: skip
def test_images_are_found_wherever_the_description_was_written(train, tmp_path):
    root = write(tmp_path / "d", {"train/a": CAT, "train/b": CAT})
    (root / "list.txt").write_text("/x/images/train/a.png\n.\\images\\train\\b.png\n")
    train = train.replace("ABSOLUTE", str(root))
    (root / "data.yaml").write_text(f"path: ../gone\ntrain: {train}\nnames: {{1: x, 0: cat}}\n")
    data = read(root)
    assert [data.image_path(i).name for i in range(2)] == ["a.png", "b.png"]
    assert data.classes == ("cat", "x") and not data.skipped


def test_nothing_is_lost_without_a_record(tmp_path):
    labels = {"train/a": CAT + "7 .5 .5 .1 .1\n0 1.01 .5 .2 .5\n0 .5 .5 0 0", "train/b": None}
    root = write(tmp_path / "d", labels, YAML + "test: ../test/images")
    (root / "labels/train/c.txt").write_text(CAT)
    write(tmp_path / "other", {"train/o": CAT})
    (root / "list.txt").write_text(
        f"images/train/a.png\nimages/train/b.png\nimages/train/a.png\n"
        f"{tmp_path}/other/images/train/o.png\n"
    )
    (root / "data.yaml").write_text(
        "train: list.txt\ntest: ../test/images\nnames: {0: cat, 7: background}\n")
    found = {(skip.kind, skip.image) for skip in read(root).skipped}
    assert found == {
        (SkipKind.UNKNOWN_CLASS, 0), (SkipKind.VALUE_OUTSIDE, 0), (SkipKind.BOX_CLIPPED, 0),
        (SkipKind.BOX_WITHOUT_AREA, 0), (SkipKind.NO_LABEL_FILE, 1), (SkipKind.OUTSIDE_ROOT, 2),
        (SkipKind.IMAGE_LISTED_TWICE, 0), (SkipKind.LABEL_WITHOUT_IMAGE, None),
        (SkipKind.SET_ABSENT, None),
    }  # fmt: skip
    assert [str(name) for each in default_sets("YOLO", root) for name in each] == [
        "split_train", "split_val"]  # fmt: skip


def test_many_images_without_objects_may_come_first(tmp_path):
    labels = {f"val/a{i}": "" for i in range(52)} | {"train/a": CAT}
    for name, text in labels.items():
        write(tmp_path / "d", {name: text}, yaml="")
    for path in [*(tmp_path / "d/labels").glob("*/*.txt")]:  # beside the images
        path.rename(tmp_path / "d/images" / path.parent.name / path.name)
    (tmp_path / "d/classes.txt").write_text("cat")
    assert len(read(tmp_path / "d", "val")) == 53 and len(read(tmp_path / "d")) == 1


@pytest.mark.parametrize("labels, words", [
    ({"a": CAT, "b": CAT}, ["2 images in images/, 2 label", "no name in common", "a.txt", "v.png"]),
    ({"v": "", "w": ""}, ["2 label files in labels/, all empty", "v.txt"]),
    ({"v": "hello"}, ["1 label files in labels/, no labels", "v.txt"]),
    ({}, ["2 images in images/, 0 label files in labels/", "v.txt"]),
])  # fmt: skip
def test_labels_that_fit_no_image_are_counted_in_the_refusal(labels, words, tmp_path):
    write(tmp_path, {"val/w": None, "val/v": None}, yaml="")
    for name, text in labels.items():
        (tmp_path / f"labels/val/{name}.txt").write_text(text)
    for refused in (find_layout, read):
        with pytest.raises(UserError) as error:
            refused(tmp_path)
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("labels, yaml, words", [
    ({"train/a": "0 50 40 20 40"}, YAML, ["train", "pixels", "a.txt"]),
    ({"train/a": None}, YAML, ["train", "none of 1", "labels/train/a.txt"]),
    ({"train/a": CAT + 2 * "5 .5 .5 .2 .5\n"}, YAML, ["data.yaml names 0 cat, 1 no", "2 labels",
                                                   "use 5: add"]),
    ({"train/a": CAT}, "", ["--classes", "classes 0"]),
    ({"train/a": CAT}, "train: images/train\n", ["classes 0", "add names:", "data.yaml"]),
])  # fmt: skip
def test_set_without_a_box_or_a_name_is_refused_with_its_cause(labels, yaml, words, tmp_path):
    write(tmp_path, labels, yaml)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("file", ["data/custom.names", "classes.txt", "obj.names"])
def test_a_file_names_the_classes_and_background_is_none(file, tmp_path):
    write(tmp_path, {"train/a": "1 0.5 0.5 0.2 0.5\n"}, yaml="")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("background\ncat\n")
    if file == "obj.names":
        (tmp_path / "other.names").write_text("a\nb\nc\n")
    (tmp_path / "labels/val/v.txt").write_text("")
    data = read(tmp_path)
    assert data.classes == ("cat",) and data.target(0)[:, 4].tolist() == [1]


def test_labels_that_nothing_names_are_one_fault(tmp_path):
    faults = []
    assert not len(read(write(tmp_path, {"train/a": "5 .5 .5 .2 .5"}), faults=faults).rows)
    assert len(faults) == 1 and "data.yaml" in faults[0] and "use 5: add" in faults[0]


def test_classes_of_the_call_name_numbers_that_nothing_names(tmp_path):
    write(tmp_path, {"train/a": CAT}, yaml="")
    assert read(tmp_path, classes=["dog"]).target(0)[0, 4] == 1
    (tmp_path / "labels/classes.txt").write_text("cat\ndog\n")
    assert read(tmp_path).classes == ("cat", "dog")
    (tmp_path / "labels/classes.txt").rename(tmp_path / "classes.txt")
    with pytest.raises(UserError, match=f"classes 0; give {tmp_path} as --root"):
        read(tmp_path / "images")
    (tmp_path / "labels/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match=r"labels/classes\.txt.*differ"):
        read(tmp_path)


def test_two_images_of_one_label_file_are_refused(tmp_path):
    write(tmp_path, {"train/a": CAT})
    (tmp_path / "images/train/a.bmp").write_bytes((tmp_path / "images/train/a.png").read_bytes())
    with pytest.raises(UserError, match=r"a\.png and .*a\.bmp|a\.bmp and .*a\.png"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_header_tells_the_size_that_decoding_gives(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (100, 80)).save(tmp_path / f"a{suffix}", exif=exif)
    size = image_size(tmp_path / f"a{suffix}")
    assert size == read_image(tmp_path / f"a{suffix}").shape[1::-1]
