"""The demo: its drawn data set, and its way from there to a contact sheet."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
from tiny import TINY

import models
from data.voc0712 import VOCDetection
from demo import run, shapes
from demo.shapes import CLASSES, MIN_VISIBLE, Object, draw_image, fill, make_dataset, outline, place
from utils.errors import UserError

SMALL = {"trainval": 26, "test": 4, "size": (96, 160)}


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes()
            for p in directory.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes") / "set"
    return directory, make_dataset(directory, **SMALL)


def covered(points, width, height, grid=4):
    """Coverage [height, width] of a polygon: even-odd rule on grid x grid points per pixel."""
    x = (np.arange(width * grid) + 0.5)[None] / grid
    y = (np.arange(height * grid) + 0.5)[:, None] / grid
    inside = np.zeros((height * grid, width * grid), bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, 0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside.reshape(height, grid, width, grid).mean((1, 3))


def test_a_seed_gives_the_same_files_whatever_the_threads(dataset, tmp_path):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1 if threads > 1 else 4)
    try:
        make_dataset(tmp_path, **SMALL)
    finally:
        cv2.setNumThreads(threads)
    assert files(tmp_path) == files(dataset[0])


def test_a_larger_set_begins_with_the_smaller_and_another_seed_differs(dataset, tmp_path):
    make_dataset(tmp_path / "a", trainval=3, test=1, size=SMALL["size"])
    make_dataset(tmp_path / "b", trainval=3, test=1, size=SMALL["size"], seed=1)
    big, small, other = (files(folder) for folder in (dataset[0], tmp_path / "a", tmp_path / "b"))
    images = [name for name in small if name.endswith(".jpg")]
    assert len({small[name] for name in images}) == 4
    assert all(small[name] == big[name] != other[name] for name in images)


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_the_reader_takes_the_set_as_it_was_drawn(split, dataset):
    directory, found = dataset
    read = VOCDetection(directory, [(None, split)])
    assert read.classes == CLASSES and read.report() == [] and len(read) == SMALL[split]
    labels = Counter()
    for k, (image, target) in enumerate(read[i] for i in range(len(read))):
        assert read.image_size(k) == image.shape[1::-1]
        assert len(target) <= 8 and (len(target) == 0) == ((k + 1) % 25 == 0)
        labels.update(CLASSES[int(label) - 1] for label in target[:, 4])
    assert labels == found[split]


def test_classes_are_balanced_and_flags_occur():
    rng = np.random.default_rng(0)
    objects = [item for _ in range(150) for item in place(rng, 260, 220, int(rng.integers(1, 7)))]
    names = Counter(item.name for item in objects)
    assert all(0.27 < names[name] / len(objects) < 0.4 for name in CLASSES)
    assert 0.02 < sum(item.truncated for item in objects) / len(objects) < 0.25
    assert 0.02 < sum(item.difficult for item in objects) / len(objects) < 0.25


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("angle, squash", [(0.0, 1.0), (0.7, 1.15)])
@pytest.mark.parametrize("centre", [(60.3, 52.8), (4.0, 85.0)])  # the border cuts the second
def test_a_box_is_tight_on_an_independent_mask(name, angle, squash, centre):
    points = outline(name, centre, 30.0, angle, squash)
    expected, got = covered(points, 110, 100), fill(points, 110, 100)
    assert np.abs(got - expected).mean() < 0.004  # OpenCV rounds the rim
    ys, xs = np.nonzero(expected > 0.25)
    box = np.array(Object(name, got, 1.0, False).box)
    assert np.abs(box - (xs.min(), ys.min(), xs.max(), ys.max())).max() <= 1


def test_what_is_hidden_decides_what_is_drawn_and_what_is_difficult():
    hidden = 0
    for seed in range(30):
        front = np.zeros((200, 240), bool)
        for item in place(np.random.default_rng(seed), 240, 200, 6):  # front to back
            seen = item.coverage[~front].sum() / item.coverage.sum()
            assert item.visible >= MIN_VISIBLE
            assert item.visible <= seen + 0.06  # the rest is cut by the border
            assert item.truncated or item.visible == pytest.approx(seen, abs=0.06)
            assert item.difficult == (item.visible < 0.6)
            hidden += item.difficult
            front |= item.coverage > 0.5
    assert hidden > 5


def test_objects_are_drawn_in_their_boxes(monkeypatch):
    monkeypatch.setattr(shapes, "add_clutter", lambda *_: None)
    for seed in range(20):
        image, (item,) = draw_image(np.random.default_rng(seed), 200, 180, 1)
        hsv = cv2.cvtColor(cv2.medianBlur(image, 5).astype(np.float32) / 255, cv2.COLOR_BGR2HSV)
        ys, xs = np.nonzero(hsv[..., 1] > 0.45)  # only objects are vivid
        drawn = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        assert np.abs(drawn - item.box).max() <= 5, seed


def test_only_a_new_folder_is_drawn_into(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for place_taken in (tmp_path, tmp_path / "notes.txt"):
        assert shapes.main([str(place_taken)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {place_taken} ") and "name a new folder" in error
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_an_interrupted_set_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "voc_annotation", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_dataset(tmp_path / "set", 2, 1, (64, 80))
    assert not (tmp_path / "set").exists()
    make_dataset(tmp_path / "set", 2, 1, (64, 80))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(UserError, match="set holds files"):
        make_dataset(tmp_path / "set", 2, 1, (64, 80))


def test_command_line(tmp_path, capsys):
    argv = [str(tmp_path / "größe"), "--trainval", "2", "--test", "1", "--seed", "4"]
    assert shapes.main(argv) == 0
    out, err = capsys.readouterr()
    assert "größe: trainval: " in out and "größe: test: " in out and not err
    image = np.fromfile(tmp_path / "größe" / "JPEGImages" / "test_0001.jpg", np.uint8)
    sides = cv2.imdecode(image, cv2.IMREAD_COLOR).shape[:2]
    assert 320 <= min(sides) <= max(sides) <= 500


def test_demo_runs_to_its_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    monkeypatch.setattr(run, "VERSION", "tiny")
    words = ["--output", str(tmp_path), "--trainval", "8", "--test", "2", "--epochs", "1"]
    assert run.main(words) == 0
    assert (tmp_path / "shapes_8_2" / "classes.txt").is_file()
    assert cv2.imread(str(tmp_path / "detections.png")) is not None
    output = capsys.readouterr().out
    assert output.count("$ python train_test.py -") == 2 and "\nmean " in output
    assert all(f"\n{name} " in output for name in CLASSES)


@pytest.mark.slow
def test_demo_learns_to_detect(tmp_path):
    """The demo as a user runs it: about five minutes on two cores with bfloat16 instructions."""
    assert run.main(["--output", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("runs/*/*/ss_predict/*/test/results.json")
    assert json.loads(results.read_text())["value"] > 0.9
