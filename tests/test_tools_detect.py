"""python -m tools.detect: which sources it reads, what it writes, and how it ends."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import commands
from exports import CLASSES, write_checkpoint
from program import locked_elsewhere
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import TINY

import data
import models
from data.config import COCO_CLASSES, VOC_300
from data.voc0712 import VOCDetection
from data.voc_xml import read_annotation
from inference.draw import LEGIBLE, class_colour, find_font
from inference.origins import Origin
from inference.predictor import Predictor
from layers.detect import DetectConfig
from tools import detect, export, outputs
from tools.annotations import Annotations, clipped, label_names, voc_xml, yolo_txt
from tools.outputs import CsvFile, Drawings, Found, JsonFiles, Output, VideoFile
from tools.sources import IMAGES, Frame, Source, find_sources, read_frames, run_ahead
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
OUT = Path("runs/detect/best")


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """Work in a new folder."""
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of the tiny network: some scores over 0.4, more below, no two alike."""
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", TINY)
        write_checkpoint(path, path.parent / "nowhere")
    saved = torch.load(path, weights_only=True)
    for key, value in saved["model"].items():
        if key.startswith("conf"):
            value.mul_(0.1) if key.endswith("weight") else value.view(-1, 4)[:, 0].fill_(2)
    torch.save(saved, path)
    return path


@pytest.fixture
def weights(checkpoint, place):
    shutil.copy(checkpoint, "best.pth")
    return "best.pth"


def image_file(path: str, size: tuple[int, int] = (96, 72), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    image = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(cv2.imencode(Path(path).suffix, image)[1].tobytes())
    return cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def video_file(path: str, frames: int = 7, size: tuple[int, int] = (64, 48)) -> None:
    codec = cv2.VideoWriter_fourcc(*("mp4v" if path.endswith(".mp4") else "MJPG"))
    writer = cv2.VideoWriter(path, codec, 10, size)
    for k in range(frames):
        noise = np.random.default_rng(k).integers(0, 256, (5, 5, 3), np.uint8)
        writer.write(cv2.resize(noise, size))
    writer.release()


def call(*words: object) -> int:
    return detect.main([*map(str, words), "--device", "cpu", "--workers", "2"])


def rows(folder: Path = OUT) -> list[dict]:
    with open(folder / "detections.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(path: str, folder: Path = OUT):
    return json.loads((folder / path).read_text("utf-8"))


def files(folder: str | Path) -> set[str]:
    """All files but the lock of a results folder."""
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*")
            if p.is_file() and p.name != ".detect.lock"}


def contents(folder: str) -> dict[str, bytes]:
    return {path: Path(folder, path).read_bytes() for path in files(folder)}


def sources_of(*names: str) -> list[Source]:
    return [Source(name, name, "video" if name.endswith("mp4") else "image") for name in names]


def found_in(name: str, boxes: Sequence, labels: Sequence[int], number: int | None = None) -> Found:
    """Detections in an image of 100 x 50 pixels, of scores 0.9, 0.8, ..."""
    frame = Frame(sources_of(name)[0], np.zeros((50, 100, 3), np.uint8), number, 0.0, 10.0)
    scores = 0.9 - 0.1 * np.arange(len(labels))
    return Found(frame, np.array(boxes, np.float64).reshape(-1, 4), scores, np.array(labels, int))


def raises(error: Exception):
    """A function that raises, whatever it is called with."""

    def function(*_, **__):
        raise error

    return function


class Capture:
    """A fake of cv2.VideoCapture."""

    def __init__(self, frames=5, size=(48, 64), opened=True, fps=10.0, count=None, time=0.0):
        self.left, self.size, self.opened, self.released = frames, size, opened, False
        count = float(frames) if count is None else count
        self.stated = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: count,
                       cv2.CAP_PROP_POS_MSEC: time}

    def __call__(self, path):
        self.path = getattr(self, "path", path)
        return self

    def isOpened(self):
        return self.opened

    def read(self):
        self.left -= 1
        image = np.full((*self.size, 3), 40 * self.left % 256, np.uint8)
        return (True, image) if self.left >= 0 else (False, None)

    def get(self, key):
        return self.stated[key]

    def set(self, key, value):
        assert (key, value) == (cv2.CAP_PROP_BUFFERSIZE, 1)

    def release(self):
        self.released = True


# ---------------------------------------------------------------- images


def test_a_folder_is_detected_drawn_and_written(weights, capsys):
    sizes = {"a.jpg": (96, 72), "in/b.jpg": (300, 280), "in/ü 猫.jpg": (40, 90)}
    images = {name: image_file(f"photos/{name}", size) for name, size in sizes.items()}
    before = contents("photos")
    assert call(weights, "photos", "-b", 2) == 0
    drawn = {f"drawn/{name}" for name in images}
    always = {"detections.csv", "detections.json", "images.json"}
    assert files(OUT) == {*always, *drawn}
    assert contents("photos") == before

    predictor = Predictor(weights, score_threshold=0.4, device="cpu")
    listed = {image["file_name"]: image for image in read("images.json")["images"]}
    results, found_rows = read("detections.json"), rows()
    assert {image["id"] for image in listed.values()} == {1, 2, 3}
    for name, image in images.items():
        found = predictor(image)
        mine = [row for row in found_rows if row["file"] == name]
        assert [row["class"] for row in mine] == found["names"] != []
        assert all(row["frame"] == row["time"] == "" for row in mine)
        values = [[float(row[k]) for k in ("x1", "y1", "x2", "y2", "score")] for row in mine]
        expected = torch.cat([found["boxes"], found["scores"][:, None]], 1)
        np.testing.assert_allclose(values, expected, atol=0.01)
        records = [r for r in results if r["image_id"] == listed[name]["id"]]
        assert {r["file_name"] for r in records} == {name}
        assert [r["category_id"] for r in records] == found["labels"].tolist()
        # The box format that train_test.py writes for COCO's evaluation
        x, y, x2, y2 = found["boxes"].numpy().T
        expected = np.stack([x, y, x2 - x + 1, y2 - y + 1], 1)
        np.testing.assert_allclose([r["bbox"] for r in records], expected, atol=0.01)
        assert (listed[name]["width"], listed[name]["height"]) == image.shape[1::-1]
        shown = cv2.imdecode(np.fromfile(OUT / "drawn" / name, np.uint8), cv2.IMREAD_COLOR)
        assert min(shown.shape[:2]) >= LEGIBLE
        assert shown.shape[0] * image.shape[1] == shown.shape[1] * image.shape[0]
    output = capsys.readouterr().out
    assert "tiny 300, 3 classes, on cpu, scores over 0.4\n" in output
    assert f"3 images, 0 video frames: {len(found_rows)} objects in" in output
    assert output.endswith("best: detections.json, detections.csv, drawn/\n")

    # A second call writes to a new folder, or says what it replaces.
    kept = contents(OUT)
    assert call(weights, "photos/a.jpg", "--score_threshold", 1) == 0 and contents(OUT) == kept
    assert "no score is over 1; give a lower --score_threshold" in capsys.readouterr().out
    assert files("runs/detect/best-2") == {*always, "drawn/a.jpg"}
    assert call(weights, "photos/a.jpg", "--score_threshold", 1, "--out", OUT) == 0 and not rows()
    assert "best holds results of an earlier call (detections.csv," in capsys.readouterr().out
    assert not list(Path("runs").rglob("*part*"))


def test_pycocotools_loads_the_results(weights):
    for k in (7, 139):
        image_file(f"val/{k:012d}.jpg", seed=k)
    options = ("--no-draw", "--save", "json", "--score_threshold", 0.02)
    assert call(weights, "val", *options) == 0
    assert files(OUT) == {"detections.json", "images.json"}
    found, listed = read("detections.json"), read("images.json")
    assert {record["image_id"] for record in found} == {7, 139}
    # Against themselves as the ground truth
    truth = {**listed, "annotations": [
        {**r, "id": k, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        for k, r in enumerate(found, 1)
    ]}
    Path("truth.json").write_text(json.dumps(truth))
    coco = COCO("truth.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
    evaluation = COCOeval(coco, coco.loadRes(str(OUT / "detections.json")), "bbox")
    evaluation.params.maxDets = [1, 10, 1000]
    evaluation.evaluate()
    matched = [e["dtMatches"][0] > 0 for e in evaluation.evalImgs if e and e["aRng"] == [0, 1e10]]
    assert len(found) == sum(map(np.sum, matched))


def test_classes_of_coco_have_their_official_numbers():
    ids = {each["name"]: each["id"] for each in outputs.categories(COCO_CLASSES)}
    official = {"person": 1, "stop sign": 13, "sheep": 20, "handbag": 31, "bottle": 44, "bed": 65,
                "dining table": 67, "toilet": 70, "tv": 72, "toothbrush": 90}
    assert {name: ids[name] for name in official} == official and len(set(ids.values())) == 80
    assert [each["id"] for each in outputs.categories(("a", "b"))] == [1, 2]


def test_annotations_of_voc_and_yolo():
    boxes = [[9.6, 19.4, 49.7, 39.0], [-20, -5, 150, 30], [200, 5, 250, 30]]
    found, names = clipped(found_in("in/a&b.jpg", boxes, [2, 1, 1])), ("cat", "<dog>")
    Path("a.xml").write_bytes(voc_xml(found, found.name, names))
    annotation = read_annotation(Path("a.xml"))
    assert annotation.names == ("<dog>", "cat") and annotation.size == (100, 50)
    assert annotation.boxes.tolist() == [[10, 19, 50, 39], [0, 0, 99, 30]]  # the third is outside
    root = ElementTree.parse("a.xml").getroot()
    assert (root.findtext("folder"), root.findtext("filename")) == ("in", "a&b.jpg")
    assert [e.text for e in root.findall("object/score")] == ["0.90000", "0.80000"]
    assert [e.text for e in root.find("object/bndbox")] == ["11", "20", "51", "40"]  # 1-based
    text = yolo_txt(found, "", names).decode()
    lines = [list(map(float, line.split())) for line in text.split("\n")]
    assert lines[:2] == [
        pytest.approx([1, (9.6 + 50.7) / 200, (19.4 + 40) / 100, 41.1 / 100, 20.6 / 50], abs=1e-6),
        pytest.approx([0, 0.5, 31 / 100, 1, 31 / 50], abs=1e-6),
    ]


def test_a_reader_keeps_thin_boxes_of_voc(make_voc):
    boxes = [[10.2, 10.2, 10.4, 20], [98.6, 30, 140, 40], [5, 48.7, 9, 49], [-3, 2, 0.3, 8]]
    folder = make_voc(Path("voc"), {"all": {"a": []}}, (100, 50))
    found = clipped(found_in("a.jpg", boxes, [1] * 4))
    (folder / "Annotations/a.xml").write_bytes(voc_xml(found, found.name, ("cat",)))
    dataset = VOCDetection(folder, [(None, "all")], classes=("cat",))
    assert dataset.target(0)[:, :4].tolist() == [[10, 10, 11, 20], [98, 30, 99, 40], [5, 48, 9, 49],
                                                 [0, 2, 1, 8]]


def test_characters_that_xml_does_not_allow_are_replaced():
    found = found_in("in\x01/a\x1f\x7f\ufffe猫\U0001f600.jpg", [1, 2, 30, 40], [1])
    root = ElementTree.fromstring(voc_xml(found, found.name, ("c\0at",)))
    assert root.findtext("folder") == "in\ufffd"
    assert root.findtext("filename") == "a\ufffd\x7f\ufffd猫\U0001f600.jpg"
    assert root.findtext("object/name") == "c\ufffdat"


@pytest.mark.parametrize("least", [0.4, 1])
def test_annotations_are_data_sets_of_all_images(least, weights):
    for name in ("a.jpg", "in/a.png", "in/a.jpg", "in/c.ppm"):
        image_file(f"photos/{name}")
    video_file("photos/film.mp4", 1)
    stems = ["a", "film.mp4/000000", "in/a.jpg", "in/a.png", "in/c"]
    images = [stem + suffix for stem, suffix in zip(stems, (".jpg",) * 3 + (".png",) * 2,
                                                    strict=True)]
    options = ("--save", "voc", "yolo", "coco", "csv", "json", "--no-draw", "--score_threshold")
    assert call(weights, "photos", *options, least) == 0
    written = {"voc": [f"Annotations/{stem}.xml" for stem in stems],
               "yolo": ["data.yaml", *(f"labels/{stem}.txt" for stem in stems)],
               "coco": ["annotations/instances_default.json"]}
    for kind, names in written.items():
        folder = "JPEGImages" if kind == "voc" else "images"
        expected = {"classes.txt", *names, *(f"{folder}/{name}" for name in images)}
        assert files(OUT / kind) == expected
        assert (OUT / kind / "classes.txt").read_text().split() == CLASSES
        assert (OUT / kind / folder / "a.jpg").samefile("photos/a.jpg")
    found = read("coco/annotations/instances_default.json")
    assert [(each["id"], each["file_name"]) for each in found["images"]] == [*enumerate(images, 1)]
    assert len(rows()) == len(read("detections.json")) >= len(found["annotations"])
    assert bool(rows()) == bool(found["annotations"]) == (least < 1)
    assert json.dumps(CLASSES) in (OUT / "yolo/data.yaml").read_text()


@pytest.mark.parametrize("kind", ["voc", "yolo", "coco"])
def test_what_is_saved_can_be_trained_on(kind, weights):
    given = {"a.jpg.jpg": "a.jpg", "a.png.png": "a.png", "b.jpg": "b.jpg", "é.jpg": "é.jpg",
             "c.png": "in/c.ppm", "a.jpg": "in/a.jpg"}
    for seed, name in enumerate(given.values()):
        image_file(f"photos/{name}", seed=seed)
    image_file("photos/not\n\x1bthis.jpg")
    assert call(weights, "photos", "--save", kind, "--no-draw", "--out", "boxes") == 1
    root, predictor = Path("boxes", kind), Predictor(weights, score_threshold=0.4, device="cpu")
    row, _ = data.find_layout(root)
    for sets in data.default_sets(row, root):
        dataset = data.build_dataset(row, root, sets)
        assert set(dataset.classes) <= set(CLASSES) and not dataset.skipped
        for k in range(len(dataset)):
            name, target = given.pop(dataset.image_path(k).name), dataset.target(k)
            found = predictor(f"photos/{name}")["boxes"].numpy().clip(0, (95, 71, 95, 71))
            found = found[(found[:, 2:] > found[:, :2]).all(1)]
            assert dataset.pull_image(k).shape == (72, 96, 3) and len(found) == len(target)
            apart = np.abs(found[:, None] - target[None, :, :4]).max(2)
            assert apart.min(1).max() < (2 if kind == "voc" else 0.02)  # VOC's are whole pixels
    assert not given


def test_what_cannot_be_written_is_counted_and_the_rest_is_done(weights, capsys):
    long = "ü" * 125 + ".jpg"  # 254 bytes
    for name in ("a.jpg", "b.jpg", "c.jpg", long):
        image_file(f"photos/{name}")
    os.rename("photos/c.jpg", f"photos/{'x' * 250}.jfif")  # which is drawn as .jfif.png
    video_file("photos/film.mp4", 3)
    video_file(f"photos/{'v' * 251}.mp4", 2)
    for taken in ("drawn/a.jpg", "voc/JPEGImages/b.jpg", "drawn/film.mp4"):
        (OUT / taken).mkdir(parents=True)
    os.mkfifo("photos/pipe.jpg")
    os.mkfifo("photos/pipe.mp4")
    assert call(weights, "photos", "--save", "json", "voc", "--out", OUT) == 1
    told = capsys.readouterr()
    not_written = [line for line in told.err.splitlines() if line.startswith("not written: ")]
    assert len(not_written) == 4
    for name in ("drawn/a.jpg", "JPEGImages/b.jpg", "drawn/film.mp4", "x.jfif.png"):
        assert any(name in line for line in not_written)
    assert "4 could not be written" in told.out
    assert "2 could not be read" in told.out and "photos/pipe.mp4" in told.err
    assert files(OUT / "drawn") == {"b.jpg", long, f"{'v' * 251}.mp4"}
    assert len(files(OUT / "voc/Annotations")) == 3 + 3 + 2
    assert len(read("images.json")["images"]) == 4 + 3 + 2


def test_nothing_is_written_behind_a_link_out_of_the_results(weights, capsys):
    image_file("photos/in/a.jpg")
    image_file("photos/b.jpg")
    (OUT / "drawn").mkdir(parents=True)
    Path("elsewhere").mkdir()
    os.symlink(Path("elsewhere").absolute(), OUT / "drawn/in")
    assert call(weights, "photos", "--out", OUT) == 1
    assert "remove the link" in capsys.readouterr().err and files("elsewhere") == set()
    assert files(OUT / "drawn") == {"b.jpg"}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_broken_image_is_named_and_the_rest_is_done(batch, weights, capsys):
    for name in "abcde":
        image_file(f"photos/{name}.jpg")
    Path("photos/b.jpg").write_bytes(b"")
    Path("photos/d.jpg").write_bytes(Path("photos/a.jpg").read_bytes()[:-30])
    Path("photos/e.jpg").write_text("no image")
    assert call(weights, "photos", "-b", batch) == 1
    captured = capsys.readouterr()
    skipped = captured.err.splitlines()
    for name, line in zip("bde", skipped, strict=True):
        assert line.startswith("skipped: ") and f"photos{os.sep}{name}.jpg" in line
    assert "2 images, 0 video frames" in captured.out and "; 3 could not be read" in captured.out
    assert {row["file"] for row in rows()} == {"a.jpg", "c.jpg"}
    assert [i["id"] for i in read("images.json")["images"]] == [1, 3]


def test_broken_videos_are_named_and_the_rest_is_done(weights, capsys):
    Path("a.mp4").write_bytes(b"no video")
    video_file("b.mp4", 3)
    assert call(weights, "a.mp4", "b.mp4") == 1
    captured = capsys.readouterr()
    assert re.search(r"skipped: .*a\.mp4: not a video", captured.err)
    assert re.search("0 images, 3 video frames: .*; 1 could not be read", captured.out)
    assert files(OUT / "drawn") == {"b.mp4"}


@pytest.mark.parametrize("suffix", sorted(outputs.DRAWN | {".JPG", ".pgm", ".jp2"}))
def test_every_kind_of_image_is_drawn(suffix):
    name = f"a{suffix}"
    Drawings(Path(), sources_of(name), ("cat",), None).add(found_in(name, [9, 9, 30, 30], [1]))
    drawn = name if suffix.lower() in outputs.DRAWN else f"{name}.png"
    assert files("drawn") == {drawn} and suffix.lower() in IMAGES
    assert cv2.imread(f"drawn/{drawn}").shape == (300, 600, 3)


def test_jobs_run_ahead_only_so_far():
    begun = []
    futures = run_ahead((partial(begun.append, k) for k in range(50)), 2, 5)
    for number, future in enumerate(futures):
        future.result()
        assert begun[: number + 1] == list(range(number + 1)) and len(begun) <= number + 5
    assert len(begun) == 50


def test_output_waits_for_slow_writers():
    free, added = threading.Semaphore(0), []
    add = lambda found: (free.acquire(), added.append(found))  # noqa: E731
    writer = SimpleNamespace(in_order=False, add=add, close=lambda: None)
    with Output([writer], 2) as output:
        for number in range(5):
            if number == 4:  # which waits for the first
                threading.Timer(0.05, free.release, [5]).start()
            output.add(found_in("a.jpg", [], []))
        assert added
    assert len(added) == 5


def test_two_calls_at_once_have_a_folder_each():
    assert [detect.new_folder(OUT) for _ in range(2)] == [OUT, OUT.with_name("best-2")]
    Path("disk").symlink_to("nowhere")
    with pytest.raises(UserError, match="disk"):
        detect.new_folder(Path("disk/detect/best"))


def test_results_that_another_call_is_writing_are_left_alone(weights, capsys):
    image_file("photos/a.jpg")
    assert call(weights, "photos", "--save", "csv", "--out", "out") == 0
    before = contents("out")
    options = ("--save", "voc", "--out", "out")
    capsys.readouterr()
    with locked_elsewhere(Path("out/.detect.lock").absolute()):
        assert call(weights, "photos", *options) == 2
    assert re.search("error: out is in use .* another --out", capsys.readouterr().err)
    assert contents("out") == before
    assert call(weights, "photos", *options) == 0


@pytest.mark.parametrize("happens, status, done, message", [
    (partial(signal.raise_signal, signal.SIGINT), 130, 6, "interrupted"),
    (partial(signal.raise_signal, signal.SIGTERM), 130, 6, "interrupted"),
    (raises(torch.OutOfMemoryError("CUDA out of memory.\nmuch more")), 1, 3,
     r"error: the GPU's memory is full \(CUDA out of memory.\); give .* --batch_size"),
    (partial(torch.empty, 1 << 50), 1, 3, r"error: main memory is full .*; give .* --batch_size"),
])
def test_what_was_done_is_kept(happens, status, done, message, weights, monkeypatch, capsys):
    for k in range(12):
        image_file(f"photos/{k:02d}.jpg", seed=k)
    real, calls = detect.find_objects, []

    def find_objects(predictor, frames):
        calls.append(len(frames))
        if len(calls) == 2:
            happens()
        return real(predictor, frames)

    monkeypatch.setattr(detect, "find_objects", find_objects)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert call(weights, "photos", "-b", 3, "--save", "json", "csv", "voc") == status
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert re.fullmatch(message + "\n", capsys.readouterr().err)
    listed = {image["file_name"] for image in read("images.json")["images"]}
    assert listed == files(OUT / "drawn") == {f"{k:02d}.jpg" for k in range(done)}
    assert files(OUT / "voc/Annotations") == {f"{k:02d}.xml" for k in range(done)}
    assert len(read("detections.json")) == len(rows()) > 0
    assert not list(Path("runs").rglob("*part*"))


# ---------------------------------------------------------------- which files


def names(words: Sequence[str], out: str = "runs") -> list[str]:
    return [source.name for source in find_sources(words, Path(out))]


def test_sources_are_files_folders_and_patterns_and_come_once():
    for name in ("f/b.jpg", "f/a.PNG", "f/in/c.webp", "f/.hidden.jpg", "f/.git/d.jpg",
                 "runs/drawn/e.jpg", "g.jpg", "[1].jpg"):
        image_file(name)
    Path("f/notes.txt").touch()
    Path("f/film.mp4").touch()
    sources = find_sources(["f"], Path("runs"))
    assert [(s.name, s.kind) for s in sources] == [("a.PNG", "image"), ("b.jpg", "image"),
                                                   ("film.mp4", "video"), ("in/c.webp", "image")]
    everything = ["g.jpg", "f/a.PNG", "f/b.jpg", "f/film.mp4", "f/in/c.webp"]
    assert names(["g.jpg", "f/**/*", "f", "./f/b.jpg"]) == everything
    # The results folder is left out, unless it is named.
    assert names(["."]) == ["[1].jpg", *everything]
    assert names(["runs"]) == ["drawn/e.jpg"]
    # A file whose name is a pattern
    assert names(["[1].jpg"]) == ["[1].jpg"]
    # Cameras come last.
    assert find_sources(["camera"], Path("runs")) == [(0, "camera_0", "camera")]
    assert [s.path for s in find_sources(["2", "g.jpg"], Path("runs"))][1:] == [2]


def test_opencv_tells_a_named_file_of_another_suffix(weights):
    image_file("a.png")
    video_file("b.mp4", 3)
    os.renames("a.png", "f/scan")
    os.renames("b.mp4", "f/film.orig")
    words = ["f/scan", "f/film.orig"]
    assert [source.kind for source in find_sources(words, Path("runs"))] == ["image", "video"]
    assert call(weights, *words) == 0
    assert files(OUT / "drawn") == {"scan.png", "film.orig.mp4"}


def test_results_of_this_call_and_drawings_of_an_earlier_one_are_left_out(caplog):
    for name in ("in/real/drawn/a.jpg", "in/real/b.jpg", "in/c.jpg", "photos/a.png",
                 "photos/mine/drawn/b.png", "photos/first/drawn/a.png"):
        image_file(name)
    os.symlink("real", "in/link")
    assert names(["in"], "in/link") == ["c.jpg"]
    assert names(["in/link"], "in/real/drawn") == ["b.jpg"]
    Path("photos/first/images.json").touch()
    assert names(["photos"]) == ["a.png", "mine/drawn/b.png"]
    assert os.path.join("photos", "first", "drawn") in caplog.text
    image_file("photos/first/yolo/images/a.png")
    image_file("photos/other/yolo/images/a.png")
    assert names(["photos"]) == ["a.png", "mine/drawn/b.png", "other/yolo/images/a.png"]


@pytest.mark.skipif(not hasattr(os, "getuid") or not os.getuid(), reason="root may read all")
def test_a_folder_that_cannot_be_read_is_told(caplog):
    image_file("photos/a.png")
    image_file("photos/private/b.png")
    os.chmod("photos/private", 0)
    assert names(["photos"]) == ["a.png"] and "private" in caplog.text
    os.chmod("photos/private", 0o700)


@pytest.mark.parametrize("kind, layout", [("voc", "VOC"), ("yolo", "YOLO")])
@pytest.mark.parametrize("folder", ["train/images", "JPEGImages", "labels", "Annotations/x",
                                    "images_"])
def test_written_data_are_read_whatever_the_folders_of_the_images_are_called(
        folder, kind, layout, weights):
    for name in "abcde":
        image_file(f"photos/{folder}/{name}.png")
    image_file("photos/images/a.png")
    assert call(weights, "photos", "--no-draw", "--save", kind, "--score_threshold", 0.2) == 0
    root = OUT / kind
    assert data.find_layout(root)[0] == layout
    sets = data.default_sets(layout, root)
    found = [data.build_dataset(layout, root, each) for each in sets]
    assert sum(map(len, found)) == 6
    assert all(len(each.target(i)) for each in found for i in range(len(each)))


def test_a_file_that_cannot_be_written_does_not_cost_the_others(weights, monkeypatch, capsys):
    image_file("a.png")

    def full(_):
        raise UserError("detections.json: cannot be written (No space left on device)")

    monkeypatch.setattr(outputs.JsonFiles, "close", full)
    assert call(weights, "a.png", "--no-draw", "--save", "json", "csv", "coco") == 2
    assert "No space" in capsys.readouterr().err
    assert {"detections.csv", "coco/annotations/instances_default.json"} <= files(OUT)


@pytest.mark.parametrize("given, labels, ids", [
    (["x/a.jpg", "y/a.jpg", "y/a.png"], ["x/a", "y/a.jpg", "y/a.png"], [1, 2, 3]),
    (["a.jpg", "A.png", "c.jpg.png"], ["a.jpg", "A.png", "c.jpg"], [1, 2, 3]),
    (["a.jpg", "a.jpg.png"], ["a", "a.jpg.png"], [1, 2]),
    (["000139.jpg", "x/7.jpg"], ["000139", "x/7"], [139, 7]),
    (["7.jpg", "x/7.jpg"], ["7", "x/7"], [1, 2]),
    (["7.jpg", "v.mp4"], ["7", "v.mp4"], [])])
def test_names_and_numbers_do_not_collide(given, labels, ids):
    sources = sources_of(*given)
    assert list(label_names(sources).values()) == labels
    assert list(outputs.image_ids(sources).values()) == ids


def test_names_of_bytes_that_are_not_utf8(weights):
    if sys.platform != "linux":
        pytest.skip("names are text there")
    for seed, byte in enumerate((b"\xfe", b"\xff")):
        image_file("photos/a.jpg", seed=seed)
        os.rename(b"photos/a.jpg", b"photos/" + byte + b".jpg")
    assert call(weights, "photos") == 0
    expected = {r"\udcff.jpg", r"\udcfe.jpg"}
    assert {row["file"] for row in rows()} == files(OUT / "drawn") == expected
    assert {image["file_name"] for image in read("images.json")["images"]} == expected


# ---------------------------------------------------------------- what is never overwritten


def test_an_image_is_never_overwritten():
    real = ["real/a.jpg", "real/drawn/a.jpg"]
    for name in real:
        image_file(name)
    os.symlink("real", "link")
    os.symlink(Path("real/drawn/a.jpg").absolute(), "real/b.jpg")  # to what would be drawn
    for words, out in ((real, "real"), (real, "link"), (["real/a.jpg", "real/b.jpg"], "real"),
                       (["link/a.jpg", "link/drawn/a.jpg"], "real")):
        with pytest.raises(UserError, match=r"drawn.a\.jpg would be overwritten; .*--out"):
            Drawings(Path(out), find_sources(words, Path(out)), (), None)


def test_two_images_are_never_drawn_as_one():
    with pytest.raises(UserError, match=r"a\.pnm and a\.pnm\.png .* o.drawn.a\.pnm\.png.*--out"):
        Drawings(Path("o"), sources_of("a.pnm", "a.pnm.png"), (), None)


def test_annotations_are_never_replaced(weights, capsys):
    image_file("a.png")
    options = ("--no-draw", "--out", "boxes", "--save")
    assert call(weights, "a.png", *options, "csv", "voc", "voc") == 0
    before = contents("boxes")
    assert call(weights, "a.png", "--score_threshold", 1, *options, "csv", "json", "voc") == 2
    error = capsys.readouterr().err
    assert os.path.join("boxes", "voc", "Annotations") in error and "--out" in error
    assert contents("boxes") == before
    assert call(weights, "a.png", *options, "csv") == 0
    Annotations(Path("boxes"), "yolo", sources_of("a.png"), ()).add(found_in("a.png", [], []))
    with pytest.raises(UserError, match="labels"):
        Annotations(Path("boxes"), "yolo", [], ())


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("words, message", [
    (["empty"], r"empty holds no image and no video; give images .*png"),
    (["a.png", "*.jpg"], r"\*\.jpg holds no image"),
    (["none.jpg"], "none.jpg does not exist; give"),
    (["notes.txt"], "notes.txt holds no image .* give images"),
    (["last.pth"], "last.pth is no image .*; the weights come first"),
    (["camera", "1"], "cameras 0, 1 .* give one"),
    (["pipe.mp4"], "pipe.mp4 is a pipe or a device; give"),
    (["/dev/zero"], "/dev/zero is a pipe or a device; give")])
def test_words_that_name_no_source(words, message):
    os.mkfifo("pipe.mp4")
    Path("empty").mkdir()
    for name in ("notes.txt", "last.pth"):
        Path(name).write_text("some words\n")
    image_file("a.png")
    with pytest.raises(UserError, match=message):
        find_sources(words, Path("runs"))


def test_drives_that_share_no_folder(monkeypatch):
    image_file("a.jpg")
    monkeypatch.setattr(os.path, "commonpath", raises(ValueError("not the same drive")))
    with pytest.raises(UserError, match="different drives; give one"):
        find_sources(["a.jpg"], Path("runs"))


@pytest.mark.parametrize("words, message", [
    ([], "give a SOURCE"),
    (["a.png", "--explain", "--no-draw", "--save", "csv"], "give --draw or --save json")])
def test_a_source_and_a_result_must_be_given(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        detect.parse(["best.pth", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["none.pth", "a.png"], "none.pth"),
    (["best.pth", "a.png", "--live"], "--live shows cameras and videos; leave it out"),
    (["best.pth", "a.png", "--explain", "--tiles", "50"], "leave tiles and flip out"),
    (["best.pth", "a.png", "--tiles", "2"], "tiles of 2 px a side"),
    (["best.pth", "a.png", "--out", "notes.txt"], "notes.txt"),
    (["best.pth", "a.png", "--out", "o"], "images.json: cannot be written"),
    (["best.pth", "3", "--out", "p"], "camera_3 cannot be opened; is it connected")])
def test_mistakes_end_with_one_sentence(words, message, weights, monkeypatch, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", Capture(opened=False))
    Path("notes.txt").touch()
    Path("o/images.json").mkdir(parents=True)
    image_file("a.png")
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("runs").exists()


def test_weights_that_diverged_are_told():
    diverged = raises(FloatingPointError("a detection contains NaN"))
    with pytest.raises(UserError, match="not finite .*NaN.*weights"):
        detect.find_objects(diverged, found_in("a.jpg", [], [])[:1])


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("name, size", [("v.mp4", (64, 48)), ("v.avi", (300, 280))])
def test_a_video_is_drawn_and_its_boxes_have_frame_and_time(name, size, weights, capsys):
    video_file(name, 7, size)
    image_file("a.jpg")
    options = ("-b", 3, "--save", "json", "csv", "yolo", "--score_threshold", 0.1)
    assert call(weights, name, "a.jpg", *options) == 0
    drawn = "v.mp4" if name == "v.mp4" else "v.avi.mp4"
    assert files(OUT / "drawn") == {drawn, "a.jpg"}
    capture, frames = cv2.VideoCapture(str(OUT / "drawn" / drawn)), []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert len(frames) == 7 and min(frames[0].shape[:2]) >= LEGIBLE
    of_video = [row for row in rows() if row["file"] == name]
    times = {(int(row["frame"]), float(row["time"])) for row in of_video}
    assert times == {(k, k / 10) for k in range(7)}
    assert {row["frame"] for row in rows() if row["file"] == "a.jpg"} == {""}
    images = read("images.json")["images"]
    numbers = [(image["id"], image.get("frame")) for image in images]
    assert numbers == [*((k + 1, k) for k in range(7)), (8, None)]
    assert files(OUT / "yolo/labels") == {"a.txt", *(f"{name}/{k:06d}.txt" for k in range(7))}
    assert "1 images, 7 video frames: " in capsys.readouterr().out
    # The same network on the same frame alone
    predictor = Predictor(weights, score_threshold=0.1, device="cpu")
    found = predictor(cv2.VideoCapture(name).read()[1])
    assert [row["class"] for row in of_video if row["frame"] == "0"] == found["names"]


@pytest.mark.parametrize("stated, rate", [({}, 10), ({"fps": 0.0, "time": float("nan")}, 25),
                                          ({"fps": 9e4}, 25)])
def test_frames_have_times_also_where_a_video_states_none(stated, rate):
    frames = list(read_frames(Source("v.mkv", "v.mkv", "video"), Capture(3, **stated)))
    assert [(f.number, f.time, f.rate) for f in frames] == [(k, k / rate, rate) for k in range(3)]


@pytest.mark.parametrize("count", [0.0, -9.2e18, 900.0])
def test_a_video_is_done_whatever_length_it_states(count, weights, monkeypatch, capsys):
    Path("v.mkv").touch()
    capture = Capture(5, (49, 65), count=count)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    assert call(weights, "v.mkv") == 0 and capture.released
    assert len(read("images.json")["images"]) == 5
    assert (OUT / "drawn/v.mkv.mp4").stat().st_size > 0
    output = capsys.readouterr().out
    assert ("v.mkv ends after 5 of the 900 frames" in output) == (count == 900)


@pytest.mark.parametrize("rate", [0.02, 23.976, 66.6667, 119.88012, 239.9834, 999.9])
def test_a_video_of_any_rate_is_drawn(rate):
    file = VideoFile(Path("video.mp4"), (33, 32), rate)
    for k in range(3):
        file.write(np.full((32, 33, 3), 50 * k, np.uint8))
    file.close()
    capture = cv2.VideoCapture("video.mp4")
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 34  # an odd side is padded
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=2e-4)


def test_an_opencv_that_cannot_write_videos_says_so(monkeypatch):
    monkeypatch.setattr(cv2, "VideoWriter", lambda *_: SimpleNamespace(isOpened=lambda: False))
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: 0, raising=False)
    with pytest.raises(UserError, match=r"v\.mp4: .* cannot write mp4; give --no-draw"):
        VideoFile(Path("v.mp4"), (32, 32), 10)


def test_a_video_that_fills_the_disk_leaves_its_room_to_the_tables(monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    limits, there = resource.getrlimit(resource.RLIMIT_FSIZE), []
    font, write = find_font(["cat"], None), outputs.write
    monkeypatch.setattr(outputs, "write", lambda *a: there.append(files("drawn")) or write(*a))
    Path("drawn").mkdir()
    Path("drawn/v.mp4").write_bytes(b"earlier")
    drawings = Drawings(Path(), sources_of("v.mp4"), ["cat"], font)
    writers = [JsonFiles(Path(), sources_of("v.mp4"), ["cat"]), CsvFile(Path(), ["cat"]), drawings]
    try:
        with Output(writers, 1) as output:
            output.add(found_in("v.mp4", [[9, 9, 30, 30]], [1], 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"v\.mp4 .*make room", capsys.readouterr().err) and output.unwritten == 1
    assert there == [{"v.mp4"}] * 3 and Path("drawn/v.mp4").read_bytes() == b"earlier"
    assert len(rows(Path())) == len(read("detections.json", Path())) == 1


# ---------------------------------------------------------------- camera and window


def test_a_camera_is_read_frame_by_frame_until_a_signal(weights, monkeypatch):
    capture = Capture(10**6, fps=100.0)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    real, times = detect.find_objects, iter(range(100))

    def find_objects(predictor, frames):
        assert len(frames) == 1
        if next(times) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(predictor, frames)

    monkeypatch.setattr(detect, "find_objects", find_objects)
    assert call(weights, "camera") == 130
    assert capture.path == 0 and capture.released
    images = read("images.json")["images"]
    assert [image["frame"] for image in images] == list(range(5))
    assert files(OUT / "drawn") == {"camera_0.mp4"}


@pytest.fixture
def window(monkeypatch):
    """A fake desktop: the images that are shown, and the keys that are pressed."""
    shown, keys = [], {}
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: shown.clear())
    monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image.copy()))
    monkeypatch.setattr(cv2, "waitKey", lambda _: keys.get(len(shown), -1))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: keys.get("visible", 1.0))
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: shown.append("closed"))
    return shown, keys


def test_live_shows_the_camera_with_its_rate_until_q(window, weights, monkeypatch):
    shown, keys = window
    keys[3] = ord("q")
    capture, captions = Capture(100), []
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    monkeypatch.setattr(detect, "draw_caption", lambda _, text: captions.append(text))
    assert call(weights, "--live") == 0
    assert capture.path == 0 and capture.released
    assert len(shown) == 4 and shown[-1] == "closed"
    assert all(image.shape[0] >= LEGIBLE for image in shown[:3])
    assert all(re.fullmatch(r"[\d.]+ fps", text) for text in captions) and len(captions) == 3
    assert not Path("runs").exists()


def test_live_ends_with_its_window_and_keeps_what_is_asked_for(window, weights):
    shown, keys = window
    video_file("v.mp4", 4)
    keys["visible"] = 0.0
    assert call(weights, "v.mp4", "--live", "--out", "kept") == 0
    assert len(shown) == 2
    assert len(read("images.json", Path("kept"))["images"]) == 1
    assert files("kept/drawn") == {"v.mp4"}


def test_live_without_a_window_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(detect, "has_display", lambda: False)
    with pytest.raises(UserError, match="--live needs a display"):
        detect.Window()
    monkeypatch.setattr(detect, "has_display", lambda: True)
    monkeypatch.setattr(cv2, "namedWindow", raises(cv2.error("not implemented")))
    with pytest.raises(UserError, match="pip install opencv-python$"):
        detect.Window()


# ---------------------------------------------------------------- networks


def test_bare_weights_take_names_in_any_script(weights):
    safetensors = pytest.importorskip("safetensors.torch")
    image_file("photos/a.png")
    safetensors.save_file(torch.load(weights, weights_only=True)["model"], "bare.safetensors")
    Path("names.txt").write_text("eins\nзвезда\nтри\n", encoding="utf-8")
    assert call("bare.safetensors", "photos", "--classes", "names.txt", "--out", "bare") == 0
    assert call(weights, "photos") == 0
    renamed = dict(zip(CLASSES, ("eins", "звезда", "три"), strict=True))
    expected = [{**row, "class": renamed[row["class"]]} for row in rows()]
    assert rows(Path("bare")) == expected != []


@pytest.mark.parametrize("options, expected", [
    ([], {"conf_thresh": 0.4}),
    (["--score_threshold", "0.1"], {"conf_thresh": 0.1}),
    (["--max_detections", "3", "--nms", "soft"], {"top_k": 3, "nms": "soft"}),
    (["--per_class", "90"], {"per_class": 90}),
    (["--class_agnostic"], {"class_agnostic": True})])
def test_options_reach_the_network(options, expected, weights):
    config = detect.open_predictor(detect.parse([weights, "a.png", *options])).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_an_exported_file_keeps_its_higher_threshold(monkeypatch):
    exported = SimpleNamespace(config=DetectConfig(0.5))
    monkeypatch.setattr(detect, "Predictor", lambda *_, **__: exported)
    assert detect.open_predictor(detect.parse(["a.onnx", "a.png"])).config == DetectConfig(0.5)


def test_characters_that_no_font_has_are_told(monkeypatch, caplog):
    monkeypatch.setattr("inference.draw.FONT_FILES", ())
    own = detect.font_for(["cell"], None)
    assert not caplog.text
    assert detect.font_for(["\U00012000"], None) is own  # cuneiform
    assert "\U00012000 as \\U00012000" in caplog.text and "--font" in caplog.text
    with pytest.raises(UserError, match="none.ttf"):
        detect.font_for(["ü"], "none.ttf")


# ---------------------------------------------------------------- prior boxes of detections


def test_a_detection_tells_the_prior_box_that_it_was_decoded_from(weights, capsys):
    """Every prior box is made and decoded here in loops; one of them gives the box and score."""
    image, size = image_file("a.png", (90, 70)), np.array([90, 70, 90, 70])
    saved = torch.load(weights, weights_only=True)
    for number in range(6):  # every source map finds objects of the first class
        saved["model"][f"conf.{number}.bias"].view(-1, 4)[0, 1] = 2.2 + number / 5
    torch.save(saved, weights)
    assert call(weights, "a.png", "--explain", "--max_per_class", 900, "--max_detections", 900) == 0
    predictor = Predictor(weights, device="cpu")
    outputs = predictor.forward(predictor.preprocess([image]))
    loc, conf = (outputs[key][0].double().numpy() for key in ("loc", "conf"))
    scores = np.exp(conf) / np.exp(conf).sum(1, keepdims=True)
    priors, about = [], []
    for number, (side, step) in enumerate(zip(VOC_300.feature_maps, VOC_300.steps, strict=True)):
        low, high = VOC_300.min_sizes[number], VOC_300.max_sizes[number]
        shapes = [(low, low), (math.sqrt(low * high),) * 2]
        for r in VOC_300.aspect_ratios[number]:
            long, short = low * math.sqrt(r), low / math.sqrt(r)
            shapes += [(long, short), (short, long)]
        for row, column, (w, h) in itertools.product(range(side), range(side), shapes):
            w, h = min(w, 300), min(h, 300)
            about.append({"index": len(about), "map": number, "side": side, "stride": step,
                          "row": row, "column": column, "size": math.sqrt(w * h), "aspect": w / h})
            priors.append(np.minimum(((column + 0.5) * step, (row + 0.5) * step, w, h), 300) / 300)
    x, y, w, h = np.transpose(priors)
    corners = lambda x, y, w, h: np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)  # noqa: E731
    moved = corners(x + 0.1 * loc[:, 0] * w, y + 0.1 * loc[:, 1] * h,
                    w * np.exp(0.2 * loc[:, 2]), h * np.exp(0.2 * loc[:, 3])) * size
    boxes, maps = corners(x, y, w, h) * size, set()
    for record in read("detections.json", Path("runs/detect/best")):
        left, top, width, height = record["bbox"]
        apart = np.abs(moved - (left, top, left + width - 1, top + height - 1)).max(1)
        apart += np.abs(scores[:, record["category_id"]] - record["score"])
        first, second = apart.argsort()[:2]
        assert apart[first] < 0.01 and apart[second] > 2 * apart[first]
        told, prior, box = record["prior"], boxes[first], moved[first]
        shared = (np.minimum(prior, box)[2:] - np.maximum(prior, box)[:2]).clip(0).prod()
        areas = sum((each[2:] - each[:2]).prod() for each in (prior, box))
        sides = prior[2:] - prior[:2]
        assert told.pop("bbox") == pytest.approx([*prior[:2], *sides], abs=0.01)
        assert told.pop("iou") == pytest.approx(shared / (areas - shared), abs=2e-4)
        assert told == pytest.approx(about[first], abs=1e-3)
        maps.add(told["side"])
    assert maps == {*VOC_300.feature_maps}
    assert "objects by source map: 38 x 38: " in capsys.readouterr().out


def test_prior_boxes_are_drawn_dashed_with_their_cells():
    origin = Origin(0, 0, 38, 8, 0, 0, 30, 1, 0.5, [20, 10, 60, 40], [36, 20, 44, 28])
    found = found_in("a.png", [[5, 5, 95, 45]], [1])._replace(origins=[origin])
    drawn = outputs.draw(found, ("cat",), find_font())  # six times as large
    coloured = (drawn == class_colour(1)).all(2)
    assert coloured[120, 216:270].all() and coloured[120:174, 216].all()
    assert 0.3 < coloured[60, 120:366].mean() < 0.7 and 0.3 < coloured[60:246, 120].mean() < 0.7
    coloured[60:246, 120:366] = False  # the detection itself is as before
    assert (coloured == (outputs.draw(found._replace(origins=()), ("cat",), find_font())
                         == class_colour(1)).all(2)).all()


# ---------------------------------------------------------------- the page


def test_every_command_of_the_page_runs(weights, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    text = (ROOT / "docs" / "detect.md").read_text("utf-8")
    found = commands("docs/detect.md")
    assert len(found) == 8
    for name in ("photos/a.jpg", "photos/in/b.jpg", "shots/c.png", "one.jpg"):
        image_file(name)
    video_file("film.mp4", 3)
    programs = {"tools.detect": detect, "tools.export": export}
    for python, option, program, *words in found:
        assert (python, option) == ("python", "-m")
        assert programs[program].main(words) == 0, words
    assert {"boxes", "runs", "best.onnx"} <= set(os.listdir())
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        detect.parse(["--help"])
    options = capsys.readouterr().out
    others = {"--format", "--images", "--no", "--priors", "--root", "--test", "--with"}
    told = set(re.findall(r"--[a-z]\w+", text)) - others
    assert {name for name in told if name not in options} == set()
