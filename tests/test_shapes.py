import json
import xml.etree.ElementTree as ET
from collections import Counter

import cv2
import numpy as np
import pytest

from demo.shapes import (
    CLASSES,
    MIN_DIAMETER,
    MIN_VISIBLE,
    Shape,
    annotation,
    draw_picture,
    main,
    make_dataset,
    outline,
    place,
    render,
)
from utils.errors import UserError

SMALL = {"trainval": 26, "test": 4, "size": (96, 160)}


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes()
            for p in directory.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes") / "set"
    return directory, make_dataset(directory, **SMALL)


def covered(name, centre, radius, angle, squash, width, height, grid=4):
    """Coverage [height, width] of a filled shape: even-odd rule on grid x grid points a pixel."""
    c, s = np.cos(angle), np.sin(angle)
    turned = [(radius * (x * c - y * s), radius * (x * s + y * c)) for x, y in outline(name)]
    corners = [(centre[0] + x * squash, centre[1] + y / squash) for x, y in turned]
    x = (np.arange(width * grid) + 0.5)[None] / grid
    y = (np.arange(height * grid) + 0.5)[:, None] / grid
    inside = np.zeros((height * grid, width * grid), bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside.reshape(height, grid, width, grid).mean((1, 3))


def test_same_seed_gives_identical_files_whatever_the_threads(dataset, tmp_path):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1 if threads > 1 else 4)
    try:
        make_dataset(tmp_path, **SMALL)
    finally:
        cv2.setNumThreads(threads)
    assert files(tmp_path) == files(dataset[0])


def test_larger_set_begins_with_the_smaller_and_another_seed_differs(dataset, tmp_path):
    make_dataset(tmp_path / "a", trainval=3, test=1, size=SMALL["size"])
    make_dataset(tmp_path / "b", trainval=3, test=1, size=SMALL["size"], seed=1)
    big, small, other = files(dataset[0]), files(tmp_path / "a"), files(tmp_path / "b")
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 4
    assert all(small[name] == big[name] != other[name] for name in pictures)
    assert len({small[name] for name in pictures}) == 4


def test_layout_lists_and_annotations_agree(dataset):
    directory, record = dataset
    seen = {"trainval": Counter(), "test": Counter()}
    empty = 0
    for split, count in (("trainval", 26), ("test", 4)):
        ids = (directory / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        assert len(ids) == len(set(ids)) == count
        for name in ids:
            root = ET.parse(directory / "Annotations" / f"{name}.xml").getroot()
            picture = cv2.imread(str(directory / "JPEGImages" / root.findtext("filename")))
            width, height = (int(root.findtext(f"size/{key}")) for key in ("width", "height"))
            assert picture.shape == (height, width, 3)
            objects = root.findall("object")
            assert len(objects) <= 8
            empty += not objects
            for item in objects:
                seen[split][item.findtext("name")] += 1
                assert {item.findtext(key) for key in ("truncated", "difficult")} <= {"0", "1"}
                x1, y1, x2, y2 = (int(item.findtext(f"bndbox/{key}"))
                                  for key in ("xmin", "ymin", "xmax", "ymax"))  # fmt: skip
                assert 1 <= x1 < x2 <= width and 1 <= y1 < y2 <= height
    assert empty == 1
    assert record["objects"] == {split: {c: seen[split][c] for c in CLASSES} for split in seen}
    assert record["classes"] == list(CLASSES)
    assert (directory / "classes.txt").read_text().split() == list(CLASSES)


def test_classes_are_balanced_and_flags_occur():
    names, flags, counts = Counter(), Counter(), Counter()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        width, height = rng.integers(200, 300, 2)
        objects = draw_picture(rng, int(width), int(height), int(rng.integers(1, 7)))[1]
        counts[len(objects)] += 1
        names.update(item["name"] for item in objects)
        flags.update(key for item in objects for key in ("truncated", "difficult") if item[key])
    total = names.total()
    assert all(0.11 < names[name] / total < 0.23 for name in CLASSES)  # 1/6 each
    assert set(counts) == set(range(1, 7))
    assert 0.02 < flags["truncated"] / total < 0.25
    assert 0.02 < flags["difficult"] / total < 0.25


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "ring"])
@pytest.mark.parametrize("angle, squash", [(0.0, 1.0), (0.7, 1.15)])
@pytest.mark.parametrize("centre", [(60.3, 52.8), (4.0, 85.0)])  # the second one is cut
def test_box_is_tight_on_an_independent_mask(name, angle, squash, centre):
    shape = render(name, centre, 30.0, angle, squash)
    expected = covered(name, centre, 30.0, angle, squash, 110, 100)
    got = np.zeros((100, 110))
    window, part = shape.clip(110, 100)
    got[window] = part
    assert np.abs(got - expected).mean() < 0.006  # the rim differs by OpenCV's rounding
    ys, xs = np.nonzero(expected > 0.25)
    box = np.array(shape.box(110, 100))
    assert np.abs(box - (xs.min(), ys.min(), xs.max(), ys.max())).max() <= 1


def test_boxes_of_upright_shapes_by_hand():
    quarter = np.pi / 4  # the square's corners lie at 0, 90, ... degrees
    half_side = 20 / np.sqrt(2)  # 14.14: from 35.86 to 64.14
    assert render("square", (50, 50), 20, quarter).box(100, 100) == pytest.approx(
        (50 - half_side, 50 - half_side, 49 + half_side, 49 + half_side), abs=1
    )
    assert render("ring", (50, 40), 20, stroke=6).box(100, 100) == pytest.approx(
        (27, 17, 72, 62),
        abs=1,  # radius 20 and half the stroke
    )
    assert render("disc", (0, 40), 20).box(100, 100) == pytest.approx((0, 20, 19, 59), abs=1)
    ring = render("ring", (50, 40), 20, stroke=6)
    assert ring.coverage[40 - ring.y, 50 - ring.x] == 0  # it has a hole
    area = np.pi * (23**2 - 17**2)
    assert ring.coverage.sum() == pytest.approx(area, rel=0.05)  # OpenCV's rims are 1/8 px wider


def test_drawn_object_fills_its_box(monkeypatch):
    """Only pixels in the boxes differ from the same picture's without objects, but for shadows."""
    monkeypatch.setattr("demo.shapes._background",
                        lambda rng, w, h: np.full((h, w, 3), 128, np.float32))  # fmt: skip
    monkeypatch.setattr("demo.shapes._clutter", lambda rng, canvas: None)
    exact = 0
    for seed in range(30):
        picture, (item,) = draw_picture(np.random.default_rng(seed), 200, 180, 1)
        differs = np.abs(cv2.medianBlur(picture, 3).astype(int) - 128).max(axis=2) > 40
        ys, xs = np.nonzero(differs)
        x1, y1, x2, y2 = item["box"]
        drawn = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        assert (np.abs(drawn - (x1, y1, x2, y2)) <= 9).all()  # shadow, median, blur
        exact += (np.abs(drawn - (x1, y1, x2, y2)) <= 2).all()
    assert exact >= 15


def test_hidden_parts_decide_what_is_placed_and_what_is_difficult():
    width, height = 240, 200
    hidden = 0
    for seed in range(40):
        placed = place(np.random.default_rng(seed), width, height, 6)
        front = np.zeros((height, width), bool)
        for shape, visible in placed:  # front to back
            full = np.zeros((3 * height, 3 * width))  # the plane around the picture too
            h, w = shape.coverage.shape
            full[height + shape.y :, width + shape.x :][:h, :w] = shape.coverage
            inside = full[height : 2 * height, width : 2 * width]
            assert visible == pytest.approx(inside[~front].sum() / full.sum(), abs=1e-4)
            assert visible >= MIN_VISIBLE
            hidden += visible < 0.6
            front |= inside > 0.5
            x1, y1, x2, y2 = shape.box(width, height)
            assert max(x2 - x1, y2 - y1) >= MIN_DIAMETER / 3
        rng = np.random.default_rng(seed)
        objects = draw_picture(rng, width, height, 6)[1]
        assert [item["difficult"] for item in objects] == [visible < 0.6 for _, visible in placed]
    assert hidden > 5


def test_annotation_is_one_based_and_inclusive():
    item = {"name": "disc", "box": (0, 4, 19, 31), "truncated": True, "difficult": False}
    root = ET.fromstring(annotation("a.jpg", 20, 40, [item]))
    assert [int(e.text) for e in root.find("object/bndbox")] == [1, 5, 20, 32]
    assert [e.tag for e in root.find("object/bndbox")] == ["xmin", "ymin", "xmax", "ymax"]
    assert root.findtext("object/truncated") == "1" and root.findtext("object/difficult") == "0"
    assert [e.text for e in root.find("size")] == ["20", "40", "3"]
    assert ET.fromstring(annotation("a.jpg", 20, 40, [])).findall("object") == []


def test_window_outside_the_picture_is_empty():
    shape = Shape("disc", -30, 5, np.ones((10, 10), np.float32))
    window, part = shape.clip(50, 50)
    assert part.size == 0 and np.zeros((50, 50))[window].size == 0


def stamps(directory):
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*")}


def test_complete_set_is_left_alone_and_a_damaged_one_redrawn(tmp_path):
    options = {"trainval": 3, "test": 2, "size": (64, 80)}
    record = make_dataset(tmp_path, **options)
    original, before = files(tmp_path), stamps(tmp_path)
    assert make_dataset(tmp_path, **options) == record
    assert stamps(tmp_path) == before

    for name in ("JPEGImages/test_0002.jpg", "ImageSets/Main/test.txt", "classes.txt"):
        (tmp_path / name).unlink()
        make_dataset(tmp_path, **options)
        assert files(tmp_path) == original

    interrupted = {**record, "complete": False}
    (tmp_path / "dataset.json").write_text(json.dumps(interrupted))
    (tmp_path / "Annotations" / "trainval_0001.xml").write_text("half")
    make_dataset(tmp_path, **options)
    assert files(tmp_path) == original


def test_interrupted_run_is_finished_by_the_next(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("demo.shapes.annotation", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(tmp_path, 2, 1, (64, 80))
    assert make_dataset(tmp_path, 2, 1, (64, 80))["complete"]
    assert len(list((tmp_path / "JPEGImages").iterdir())) == 3


def test_other_parameters_replace_the_pictures_but_no_foreign_file(tmp_path):
    make_dataset(tmp_path, 4, 2, (64, 80))
    (tmp_path / "JPEGImages" / "mine.jpg").write_bytes(b"mine")
    make_dataset(tmp_path, 2, 1, (64, 80), seed=3)
    names = sorted(p.name for p in (tmp_path / "JPEGImages").iterdir())
    assert names == ["mine.jpg", "test_0001.jpg", "trainval_0001.jpg", "trainval_0002.jpg"]
    assert len(list((tmp_path / "Annotations").iterdir())) == 3


@pytest.mark.parametrize("name, content", [
    ("notes.txt", "x"), ("dataset.json", "{}"), ("dataset.json", "[1"), ("dataset.json", "[1]"),
])  # fmt: skip
def test_foreign_folder_is_refused_and_untouched(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="did not write.*name a new or an empty folder") as caught:
        make_dataset(tmp_path, 1, 1)
    assert str(tmp_path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file holds files that demo.shapes did not write"):
        make_dataset(tmp_path / "file", 1, 1)
    with pytest.raises(UserError, match="cannot make the folder .*file/deeper"):
        make_dataset(tmp_path / "file" / "deeper", 1, 1)


@pytest.mark.parametrize("options, message", [
    ({"trainval": 0}, "--trainval is 0: give a number of pictures from 1 to 9999"),
    ({"test": 10000}, "--test is 10000"),
    ({"seed": -1}, "--seed is -1: give a number of at least 0"),
])  # fmt: skip
def test_bad_parameters_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_dataset(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [(320, 300), (20, 300)])
def test_bad_size_is_a_programming_error(tmp_path, size):
    with pytest.raises(ValueError, match=rf"not \({size[0]}, 300\)"):
        make_dataset(tmp_path, size=size)


def test_command_line(tmp_path, capsys):
    argv = [str(tmp_path / "größe"), "--trainval", "2", "--test", "1", "--seed", "4"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "trainval: 2 pictures" in out and "test: 1 pictures" in out and not err
    picture = np.fromfile(tmp_path / "größe" / "JPEGImages" / "test_0001.jpg", np.uint8)
    height, width = cv2.imdecode(picture, cv2.IMREAD_COLOR).shape[:2]
    assert 320 <= min(height, width) <= max(height, width) <= 500

    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
