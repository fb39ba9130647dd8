"""python -m tools.detect: what it looks at, what it writes, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from exports import CLASSES, exported, write_checkpoint
from tiny import TINY

import models
from data.voc0712 import VOCDetection
from data.voc_xml import read_annotation
from inference.draw import LEGIBLE, draw_caption, enlarge
from inference.predictor import Predictor
from tools import detect, outputs
from tools.outputs import COCO_IDS, Found, category_ids, voc_xml, yolo_txt
from tools.sources import PICTURES, find_sources, image_ids, label_names
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """A folder of one's own with the tiny network's weights, best.pth."""
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "best.pth", tmp_path / "nowhere")
    saved = torch.load("best.pth", weights_only=True)
    for key, value in saved["model"].items():  # some scores over 0.4, more below, none alike
        if key.startswith("conf"):
            value.mul_(0.1) if key.endswith("weight") else value.view(-1, 4)[:, 0].fill_(2)
    torch.save(saved, "best.pth")
    return tmp_path


def picture(path: str, size: tuple[int, int] = (96, 72), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), size,
                       interpolation=cv2.INTER_CUBIC)  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(cv2.imencode(Path(path).suffix, image)[1].tobytes())
    return cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def film(path: str, frames: int = 7, size: tuple[int, int] = (64, 48), rate: float = 10) -> None:
    codec = cv2.VideoWriter_fourcc(*("mp4v" if path.endswith(".mp4") else "MJPG"))
    writer = cv2.VideoWriter(path, codec, rate, size)
    for k in range(frames):
        rng = np.random.default_rng(k)
        writer.write(cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), size))
    writer.release()


def call(*words: object) -> int:
    return detect.main([*map(str, words), "--device", "cpu", "--workers", "2"])


def rows(folder: str = "runs/detect/best") -> list[dict]:
    with open(f"{folder}/detections.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(path: str):
    return json.loads(Path(path).read_text("utf-8"))


def files(folder: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


# ---------------------------------------------------------------- pictures


def test_a_folder_is_detected_drawn_and_written_down(capsys):
    images = {f"{name}.jpg": picture(f"photos/{name}.jpg", size, seed)
              for seed, (name, size) in enumerate(
                  {"a": (96, 72), "in/b": (300, 280), "in/ü 猫": (40, 90)}.items())}  # fmt: skip
    before = {path: Path("photos", path).read_bytes() for path in images}
    assert call("best.pth", "photos", "--batch", 2) == 0
    out = "runs/detect/best"
    drawn = {f"drawn/{name}" for name in images}
    assert files(out) == {"detections.csv", "detections.json", "images.json", *drawn}
    assert files("photos") == set(images)
    assert all(Path("photos", path).read_bytes() == data for path, data in before.items())

    predictor = Predictor("best.pth", score_threshold=0.4, device="cpu")
    listed = {image["file_name"]: image for image in read(f"{out}/images.json")["images"]}
    results, found_rows = read(f"{out}/detections.json"), rows()
    assert {image["id"] for image in listed.values()} == {1, 2, 3}
    for name, image in images.items():
        found = predictor(image)
        assert len(found["scores"]) > 0
        mine = [row for row in found_rows if row["file"] == name]
        assert [row["class"] for row in mine] == found["names"]
        assert all(row["frame"] == row["time"] == "" for row in mine)
        corners = [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in mine]
        np.testing.assert_allclose(corners, found["boxes"], atol=0.01)
        np.testing.assert_allclose([float(row["score"]) for row in mine], found["scores"],
                                   atol=1e-5)  # fmt: skip
        records = [r for r in results if r["image_id"] == listed[name]["id"]]
        assert {r["file_name"] for r in records} == {name}
        assert [r["category_id"] for r in records] == found["labels"].tolist()
        # COCO's boxes as those that train_test.py writes for its evaluation
        x, y, x2, y2 = found["boxes"].numpy().T
        expected = np.stack([x, y, x2 - x + 1, y2 - y + 1], 1)
        np.testing.assert_allclose([r["bbox"] for r in records], expected, atol=0.01)
        assert (listed[name]["width"], listed[name]["height"]) == image.shape[1::-1]
        shown = cv2.imdecode(np.fromfile(f"{out}/drawn/{name}", np.uint8), cv2.IMREAD_COLOR)
        assert min(shown.shape[:2]) >= LEGIBLE
        assert shown.shape[0] * image.shape[1] == shown.shape[1] * image.shape[0]
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 3
    assert output[0].endswith("tiny 300, 3 classes, on cpu, scores over 0.4: 3 pictures")
    assert re.search(rf"3 pictures: {len(found_rows)} objects in [\d.]+ s$", output[1])
    assert output[2].endswith("best: detections.json, detections.csv, drawn/")


def test_a_second_run_replaces_the_first(capsys):
    picture("a.png")
    for _ in range(2):
        assert call("best.pth", "a.png") == 0
    first = rows()
    assert call("best.pth", "a.png", "--score_threshold", 1) == 0
    assert first and not rows()
    assert "no score is over 1: --score_threshold says what counts" in capsys.readouterr().out
    assert not list(Path("runs").rglob("*part*"))


def test_pycocotools_loads_the_results():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for k in (7, 139):
        picture(f"val/{k:012d}.jpg", seed=k)
    options = ("--no-draw", "--save", "json", "--score_threshold", 0.02)
    assert call("best.pth", "val", *options, "--out", "o") == 0
    assert files("o") == {"detections.json", "images.json"}
    found, listed = read("o/detections.json"), read("o/images.json")
    assert {image["id"] for image in listed["images"]} == {7, 139}
    assert {record["image_id"] for record in found} == {7, 139}
    # Against themselves as the truth.
    truth = {**listed, "annotations": [
        {**r, "id": k, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        for k, r in enumerate(found, 1)
    ]}  # fmt: skip
    Path("truth.json").write_text(json.dumps(truth))
    coco = COCO("truth.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
    evaluation = COCOeval(coco, coco.loadRes("o/detections.json"), "bbox")
    evaluation.params.maxDets = [1, 10, 1000]
    evaluation.evaluate()
    assert len(found) == sum(np.sum(e["dtMatches"][0] > 0) for e in evaluation.evalImgs
                             if e and e["aRng"] == [0, 1e10])  # fmt: skip


def test_classes_of_coco_have_their_official_numbers():
    from data.config import COCO_CLASSES

    ids = dict(zip(COCO_CLASSES, category_ids(COCO_CLASSES), strict=True))
    official = {"person": 1, "stop sign": 13, "sheep": 20, "handbag": 31, "bottle": 44, "bed": 65,
                "dining table": 67, "toilet": 70, "tv": 72, "toothbrush": 90}  # fmt: skip
    assert {name: ids[name] for name in official} == official and len(set(COCO_IDS)) == 80
    assert category_ids(("a", "b")) == (1, 2)


def test_annotations_of_voc_and_yolo():
    boxes = np.array([[9.6, 19.4, 49.7, 39.0], [-20, -5, 150, 30], [200, 5, 250, 30]])
    found = Found("in/a&b.jpg", 1, (100, 50), boxes, np.array([0.9, 0.8, 0.7]), np.array([2, 1, 1]))
    names = ("cat", "<dog>")
    Path("a.xml").write_bytes(voc_xml(found, names))
    annotation = read_annotation("a.xml")
    assert annotation.names == ("<dog>", "cat") and annotation.size == (100, 50)
    assert annotation.boxes.tolist() == [[10, 19, 50, 39], [0, 0, 99, 30]]  # the third is outside
    text = Path("a.xml").read_text()
    assert "<filename>a&amp;b.jpg</filename>" in text and "<score>0.90000</score>" in text
    lines = [list(map(float, line.split())) for line in yolo_txt(found, names).decode().split("\n")]
    assert lines[:2] == [
        pytest.approx([1, (9.6 + 50.7) / 200, (19.4 + 40) / 100, 41.1 / 100, 20.6 / 50], abs=1e-6),
        pytest.approx([0, 0.5, 31 / 100, 1, 31 / 50], abs=1e-6),
    ]
    scored = yolo_txt(found, names, scored=True).decode().splitlines()
    assert [line.split()[5] for line in scored] == ["0.900000", "0.800000"]


def test_a_thin_box_of_voc_is_kept_by_the_reader():
    boxes = np.array([[10.2, 10.2, 10.4, 20], [98.6, 30, 140, 40], [5, 48.7, 9, 49],
                      [-3, 2, 0.3, 8], [0.4, 0.4, 1.6, 2.6]])  # fmt: skip
    found = Found("a.jpg", 1, (100, 50), boxes, np.full(5, 0.9), np.ones(5, int))
    for folder in ("Annotations", "ImageSets/Main"):
        Path("voc", folder).mkdir(parents=True)
    picture("voc/JPEGImages/a.jpg", (100, 50))
    Path("voc/Annotations/a.xml").write_bytes(voc_xml(found, ("cat",)))
    Path("voc/ImageSets/Main/all.txt").write_text("a\n")
    dataset = VOCDetection("voc", [(None, "all")], classes=("cat",))
    assert dataset.target(0)[:, :4].tolist() == [
        [10, 10, 11, 20], [98, 30, 99, 40], [5, 48, 9, 49], [0, 2, 1, 8], [0, 0, 2, 3],
    ]  # fmt: skip
    assert not any(dataset.skipped.values())


def test_characters_that_xml_lacks_are_replaced():
    name, box = "in\x01/a\x1f\x7f\ufffe猫\U0001f600.jpg", np.array([[1, 2, 30, 40]])
    found = Found(name, 1, (100, 50), box, np.array([0.9]), np.array([1]))
    root = ElementTree.fromstring(voc_xml(found, ("c\0at",)))
    assert root.findtext("folder") == "in\ufffd"
    assert root.findtext("filename") == "a\ufffd\x7f\ufffd猫\U0001f600.jpg"
    assert root.findtext("object/name") == "c\ufffdat"


def test_a_file_for_every_picture_also_without_objects():
    for name in ("a.jpg", "b.jpg", "in/c.png"):
        picture(f"photos/{name}")
    options = ("--save", "voc", "yolo", "csv", "json", "--no-draw", "--out", "boxes")
    assert call("best.pth", "photos", *options) == 0
    expected = {
        f"{folder}/{name}{suffix}"
        for name in ("a", "b", "in/c")
        for folder, suffix in (("voc/Annotations", ".xml"), ("yolo/labels", ".txt"))
    }
    expected |= {"voc/classes.txt", "yolo/classes.txt", "detections.csv", "detections.json",
                 "images.json"}  # fmt: skip
    assert files("boxes") == expected
    assert Path("boxes/voc/classes.txt").read_text().split() == CLASSES
    annotation = read_annotation("boxes/voc/Annotations/in/c.xml")
    lines = Path("boxes/yolo/labels/in/c.txt").read_text().splitlines()
    assert len(annotation.names) == len(lines) > 0
    assert (annotation.boxes >= 0).all() and (annotation.boxes <= [95, 71, 95, 71]).all()
    for place in ("voc", "yolo"):
        shutil.rmtree(f"boxes/{place}")
    assert call("best.pth", "photos", *options, "--score_threshold", 1) == 0
    assert files("boxes") == expected
    assert read_annotation("boxes/voc/Annotations/in/c.xml").names == ()
    assert Path("boxes/yolo/labels/in/c.txt").read_text() == ""
    assert read("boxes/detections.json") == [] and rows("boxes") == []
    assert len(read("boxes/images.json")["images"]) == 3
    assert Path("boxes/detections.csv").read_text() == ",".join(outputs.CSV_HEADER) + "\n"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_broken_picture_is_named_and_the_rest_is_done(batch, capsys):
    for name in "abcde":
        picture(f"photos/{name}.jpg")
    Path("photos/b.jpg").write_bytes(b"")
    Path("photos/d.jpg").write_bytes(Path("photos/a.jpg").read_bytes()[:-30])
    Path("photos/e.jpg").write_text("no picture")
    assert call("best.pth", "photos", "--batch", batch) == 1
    captured = capsys.readouterr()
    skipped = captured.err.splitlines()
    assert len(skipped) == 3 and all(line.startswith("skipped: ") for line in skipped)
    for name, line in zip("bde", skipped, strict=True):
        assert f"photos{os.sep}{name}.jpg" in line
    assert "2 pictures, 3 that could not be read" in captured.out
    assert {row["file"] for row in rows()} == {"a.jpg", "c.jpg"}
    assert [i["id"] for i in read("runs/detect/best/images.json")["images"]] == [1, 3]


def test_every_kind_of_picture_is_drawn_as_what_it_is():
    written = [f"a{suffix}" for suffix in sorted(detect.DRAWN | {".JPG"})]
    for k, name in enumerate(written):
        picture(f"photos/{k}{name}", seed=k)
    image = picture("photos/b.jpg")
    shutil.copy("photos/b.jpg", "photos/grey.pgm")
    os.rename("photos/b.jpg", "photos/b.unknown")
    assert call("best.pth", "photos", "photos/b.unknown", "--save") == 0
    drawn = {f"{k}{name}" for k, name in enumerate(written)}
    drawn |= {"b.unknown.png", "grey.pgm.png"}
    assert detect.DRAWN < PICTURES
    assert files("runs/detect/best") == {f"drawn/{name}" for name in drawn}
    for name in drawn:
        shown = cv2.imread(f"runs/detect/best/drawn/{name}")
        assert shown.shape[0] * image.shape[1] == shown.shape[1] * image.shape[0]


def test_nothing_is_left_of_pictures_that_are_all_broken():
    Path("a.jpg").write_bytes(b"")
    assert call("best.pth", "a.jpg") == 1
    assert read("runs/detect/best/detections.json") == []


def test_only_so_many_pictures_are_in_memory(monkeypatch):
    """Reading waits for the network, and the network for what is written."""
    alive, most = [0], [0]

    class Image(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive[0] -= 1

    def read_image(path):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        image = np.zeros((8, 8, 3), np.uint8)
        owned = np.ndarray.__new__(Image, image.shape, np.uint8)
        owned[:] = image
        return owned

    monkeypatch.setattr(detect, "read_image", read_image)
    monkeypatch.setattr(
        detect.Detector, "__call__", lambda self, frames: [
            {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
            for _ in frames
        ],
    )  # fmt: skip
    Path("many").mkdir()
    for k in range(200):
        Path(f"many/{k}.jpg").touch()
    assert call("best.pth", "many", "--batch", 4, "--save", "csv") == 0
    assert 4 <= most[0] <= 40


def test_what_was_done_before_an_error_is_kept(monkeypatch, capsys):
    for k in range(4):
        picture(f"photos/{k}.jpg", seed=k)
    real, calls = detect.Detector.__call__, []

    def detector(self, frames):
        calls.append(frames)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmuch more")
        return real(self, frames)

    monkeypatch.setattr(detect.Detector, "__call__", detector)
    assert call("best.pth", "photos", "--batch", 2) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "memory is full (CUDA out of memory.); give a smaller --batch" in error
    )
    assert len(read("runs/detect/best/images.json")["images"]) == 2
    assert len(read("runs/detect/best/detections.json")) == len(rows()) > 0


def test_a_folder_that_cannot_be_written_is_told(capsys):
    picture("a.jpg")
    Path("o/drawn/a.jpg").mkdir(parents=True)
    assert call("best.pth", "a.jpg", "--out", "o") == 2
    assert re.search(r"error: .*a\.jpg could not be written", capsys.readouterr().err)


# ---------------------------------------------------------------- which files


def names(sources) -> list[str]:
    return [source.name for source in sources]


def test_sources_are_files_folders_patterns_and_come_once():
    for name in ("f/b.jpg", "f/a.PNG", "f/in/c.webp", "f/.hidden.jpg", "f/.git/d.jpg",
                 "runs/drawn/e.jpg", "g.jpg"):  # fmt: skip
        picture(name)
    Path("f/notes.txt").touch()
    Path("f/film.mp4").touch()
    sources, repeated = find_sources(["f"], Path("runs"))
    assert names(sources) == ["a.PNG", "b.jpg", "film.mp4", "in/c.webp"] and repeated == 0
    assert [s.kind for s in sources] == ["picture", "picture", "video", "picture"]
    sources, repeated = find_sources(["g.jpg", "f/**/*", "f", "./f/b.jpg"], Path("runs"))
    assert names(sources) == ["g.jpg", "f/a.PNG", "f/b.jpg", "f/film.mp4", "f/in/c.webp"]
    assert repeated == 5
    # Where results go nothing is looked for, unless it is asked for.
    everything = ["g.jpg", "f/a.PNG", "f/b.jpg", "f/film.mp4", "f/in/c.webp"]
    assert names(find_sources(["."], Path("runs"))[0]) == everything
    assert names(find_sources(["runs"], Path("runs"))[0]) == ["drawn/e.jpg"]
    # A file that is called as a pattern is.
    picture("[1].jpg")
    assert names(find_sources(["[1].jpg"], Path("runs"))[0]) == ["[1].jpg"]


def test_a_picture_or_video_without_a_known_suffix_is_known_by_its_content():
    picture("a.png")
    shutil.move("a.png", "scan")
    film("v.mp4")
    shutil.move("v.mp4", "film")
    assert [s.kind for s in find_sources(["scan", "film"], Path("runs"))[0]] == ["picture", "video"]
    assert call("best.pth", "scan", "film") == 0
    drawn = files("runs/detect/best/drawn")
    assert drawn == {"scan.png", "film.mp4"}


def test_a_list_on_standard_input(monkeypatch, capsys):
    for name in ("a b.jpg", "in/a b.jpg", "in/ü.jpg"):
        picture(name)
    listed = "a b.jpg\r\nin/a b.jpg\n\nnone.jpg\nin/ü.jpg\nin/ü.jpg\n"
    for data in (listed.encode(), listed.replace("\r\n", "\0").replace("\n", "\0").encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert call("best.pth", "-", "--no-draw") == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("skipped: ") and "none.jpg" in captured.err
        assert "1 named more than once" in captured.out
        assert {row["file"] for row in rows()} == {"a b.jpg", "in/a b.jpg", "in/ü.jpg"}


def test_equal_names_do_not_overwrite_each_other():
    for name in ("x/a.jpg", "y/a.jpg", "y/a.png"):
        picture(name)
    assert call("best.pth", "x", "y", "--save", "csv", "voc", "yolo") == 0
    out = "runs/detect/best"
    assert {f for f in files(out) if not f.endswith("classes.txt")} == {
        "detections.csv",
        *(f"drawn/{name}" for name in ("x/a.jpg", "y/a.jpg", "y/a.png")),
        *(f"voc/Annotations/{name}.xml" for name in ("x/a", "y/a.jpg", "y/a.png")),
        *(f"yolo/labels/{name}.txt" for name in ("x/a", "y/a.jpg", "y/a.png")),
    }
    assert {row["file"] for row in rows()} == {"x/a.jpg", "y/a.jpg", "y/a.png"}
    sources, _ = find_sources(["x", "y"], Path(out))
    assert label_names(sources) == {"x/a.jpg": "x/a", "y/a.jpg": "y/a.jpg", "y/a.png": "y/a.png"}
    assert image_ids(sources) == {"x/a.jpg": 1, "y/a.jpg": 2, "y/a.png": 3}


def test_annotations_do_not_meet_where_a_stem_is_anothers_name():
    for name in ("a.jpg", "a.png", "a.jpg.png", "b", "b.png", "c.jpg.png"):
        picture(f"x/{name if '.' in name else name + '.jpg'}")
    os.rename("x/b.jpg", "x/b")
    sources, _ = find_sources(["x", "x/b"], Path("runs"))
    found = label_names(sources)
    assert found == {"a.jpg": "a.jpg", "a.png": "a.png", "a.jpg.png": "a.jpg.png", "b": "b",
                     "b.png": "b.png", "c.jpg.png": "c.jpg"}  # fmt: skip
    assert call("best.pth", "x", "x/b", "--save", "voc", "--no-draw", "--out", "o") == 0
    assert files("o/voc/Annotations") == {f"{name}.xml" for name in found.values()}


def test_results_that_a_link_leads_to_are_results():
    picture("real/drawn/a.jpg")
    picture("real/b.jpg")
    picture("c.jpg")
    try:
        os.symlink("real", "link", target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    assert names(find_sources(["."], Path("link"))[0]) == ["c.jpg"]
    assert names(find_sources(["link"], Path("real/drawn"))[0]) == ["b.jpg"]


def test_a_picture_is_never_overwritten_through_a_link(capsys):
    picture("real/a.jpg")
    original = picture("real/drawn/a.jpg", seed=1)
    try:
        os.symlink("real", "link", target_is_directory=True)
        os.symlink(Path("real/drawn/a.jpg").absolute(), "real/b.jpg")
    except OSError:
        pytest.skip("links are not allowed here")
    for words, out in (
        (["real/a.jpg", "real/drawn/a.jpg"], "link"),
        (["link/a.jpg", "link/drawn/a.jpg"], "real"),
        (["real/a.jpg", "real/b.jpg"], "real"),  # b.jpg is a link to what would be drawn
    ):
        assert call("best.pth", *words, "--out", out) == 2
        assert re.search(r"drawn.a\.jpg would be overwritten; give another --out",
                         capsys.readouterr().err)  # fmt: skip
        assert np.array_equal(cv2.imread("real/drawn/a.jpg"), original)
        assert call("best.pth", *words, "--out", out, "--no-draw") == 0
        capsys.readouterr()


@pytest.mark.parametrize("kind, folder", [("voc", "voc/Annotations"), ("yolo", "yolo/labels")])
def test_annotations_are_never_replaced(kind, folder, capsys):
    picture("a.png")
    options = ("--save", kind, kind, "--no-draw", "--out", "boxes")
    assert call("best.pth", "a.png", *options) == 0
    (written,) = Path("boxes", folder).iterdir()
    written.write_text("corrected")
    (names,) = Path("boxes").rglob("classes.txt")
    names.write_text("mine")
    assert call("best.pth", "a.png", *options) == 2
    assert "holds annotations, which somebody may have corrected" in capsys.readouterr().err
    assert (written.read_text(), names.read_text()) == ("corrected", "mine")
    assert call("best.pth", "a.png", "--save", "csv", "--out", "boxes") == 0


def test_what_an_earlier_call_has_drawn_is_left_out(capsys):
    picture("photos/a.png")
    picture("photos/mine/drawn/b.png")
    assert call("best.pth", "photos", "--out", "photos/first") == 0
    capsys.readouterr()
    assert call("best.pth", "photos", "--out", "photos/second", "--save", "json") == 0
    assert "drawn is left out: an earlier call has drawn it" in capsys.readouterr().out
    names = {image["file_name"] for image in read("photos/second/images.json")["images"]}
    assert names == {"a.png", "mine/drawn/b.png"}


@pytest.mark.parametrize("rate", [0.02, 23.976, 66.6667, 119.88012, 239.9834, 999.9])
def test_a_film_of_any_rate_is_drawn(rate, tmp_path):
    path = tmp_path / "film.mp4"
    file = detect.VideoFile(path, rate, steady=True)
    for k in range(3):
        file.write(np.full((32, 32, 3), 50 * k, np.uint8), k / rate)
    file.close()
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=2e-4)


def test_two_pictures_are_never_drawn_as_one(capsys):
    picture("photos/a.pnm")
    picture("photos/a.pnm.png", seed=1)
    assert call("best.pth", "photos", "--out", "o") == 2
    assert "a.pnm and a.pnm.png would both be drawn as o/drawn/a.pnm.png" in (
        capsys.readouterr().err.replace(os.sep, "/")
    )
    assert call("best.pth", "photos", "--out", "o", "--no-draw") == 0


def test_a_picture_is_never_overwritten(capsys):
    picture("photos/a.jpg")
    original = picture("photos/drawn/a.jpg", seed=1)
    assert call("best.pth", "photos/a.jpg", "photos/drawn/a.jpg", "--out", "photos") == 2
    assert re.search(r"drawn.a\.jpg would be overwritten; give another --out",
                     capsys.readouterr().err)  # fmt: skip
    assert np.array_equal(cv2.imread("photos/drawn/a.jpg"), original)


@pytest.mark.parametrize("words, message", [
    (["best.pth", "empty"], "empty holds no picture and no video; their names end in .*png"),
    (["best.pth", "*.jpg"], r"\*\.jpg holds no picture"),
    (["best.pth", "a.png", "empty"], "empty holds no picture"),
    (["best.pth", "none.jpg"], "none.jpg does not exist"),
    (["best.pth", "notes.txt"], "notes.txt is neither a picture nor a video"),
    (["none.pth", "a.png"], "none.pth"),
    (["none.onnx", "a.png"], "none.onnx does not exist"),
    (["best.pth", "a.png", "--classes", "a,b"], "classes"),
    (["best.pth", "a.png", "--device", "gpu"], "--device gpu is unknown"),
    (["best.pth", "a.png", "--live"], "--live shows cameras and videos"),
    (["best.pth", "a.png", "--out", "notes.txt"], "notes.txt"),
])  # fmt: skip
def test_mistakes_end_with_one_sentence(words, message, capsys):
    Path("empty").mkdir()
    Path("notes.txt").write_text("some words\n")
    picture("a.png")
    if "--classes" in words:
        torch.save(models.build_net("tiny", 300, 6).state_dict(), "best.pth")
    assert detect.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error)
    assert not Path("runs").exists()


@pytest.mark.parametrize("words, message", [
    (["best.pth"], "give a SOURCE"),
    (["best.pth", "a.png", "--save", "yolo", "yolo_scored"], "give one of them"),
    (["best.pth", "a.png", "--save", "xml"], "invalid choice"),
    (["best.pth", "a.png", "--score_threshold", "2"], "not between 0 and 1"),
    (["best.pth", "a.png", "--batch", "0"], "the least is 1"),
])  # fmt: skip
def test_options_that_are_none_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        detect.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_diverged_weights_are_told(capsys):
    saved = torch.load("best.pth", weights_only=True)
    for key, value in saved["model"].items():
        if key.startswith("conf") and key.endswith("bias"):
            value.fill_(float("nan"))
    torch.save(saved, "best.pth")
    picture("a.png")
    assert call("best.pth", "a.png") == 2
    assert "not finite" in capsys.readouterr().err


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_done_is_kept_when_it_is_interrupted(number, monkeypatch, capsys):
    for k in range(12):
        picture(f"photos/{k:02d}.jpg", seed=k)
    real, calls = detect.Detector.__call__, []

    def detector(self, frames):
        calls.append(len(frames))
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(self, frames)

    monkeypatch.setattr(detect.Detector, "__call__", detector)
    before = signal.getsignal(number)
    assert call("best.pth", "photos", "--batch", 3, "--save", "json", "csv", "voc") == 130
    assert signal.getsignal(number) is before
    captured = capsys.readouterr()
    assert captured.err == "interrupted\n" and "6 pictures:" in captured.out
    done = {f"{k:02d}.jpg" for k in range(6)}
    out = "runs/detect/best"
    assert {image["file_name"] for image in read(f"{out}/images.json")["images"]} == done
    assert len(read(f"{out}/detections.json")) == len(rows()) > 0
    assert files(f"{out}/drawn") == done
    assert files(f"{out}/voc/Annotations") == {f"{k:02d}.xml" for k in range(6)}
    assert not list(Path("runs").rglob("*part*"))


def test_the_program_ends_so_by_itself():
    """As a process, with a signal from outside, in the middle of a long list."""
    picture("a.jpg")
    for k in range(3000):
        os.link("a.jpg", f"{k}.jpg")
    program = "import sys, tiny; tiny.register(); from demo import detect; sys.exit(detect.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "best.pth", ".", "--device", "cpu", "--log_pictures", "20",
         "--no-draw", "--batch", "4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [process.stdout.readline() for _ in range(2)]  # the second is of the 20th picture
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 130, (lines, output, error)
    assert "Traceback" not in error and "interrupted" in error
    done = read("runs/detect/best/images.json")["images"]
    assert 20 <= len(done) < 3001 and f" {len(done)} pictures:" in output


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("name, size", [("v.mp4", (64, 48)), ("v.avi", (300, 280))])
def test_a_video_is_drawn_and_its_boxes_have_frame_and_time(name, size, capsys):
    film(name, 7, size)
    picture("a.jpg")
    options = ("--batch", 3, "--save", "json", "csv", "yolo", "--score_threshold", 0.1)
    assert call("best.pth", name, "a.jpg", *options) == 0
    out = "runs/detect/best"
    drawn = "v.mp4" if name == "v.mp4" else "v.avi.mp4"
    assert files(f"{out}/drawn") == {drawn, "a.jpg"}
    capture = cv2.VideoCapture(f"{out}/drawn/{drawn}")
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    assert len(frames) == 7 and min(frames[0].shape[:2]) >= LEGIBLE
    of_video = [row for row in rows() if row["file"] == name]
    assert {(int(row["frame"]), float(row["time"])) for row in of_video} == {
        (k, k / 10) for k in range(7)
    }
    assert {row["frame"] for row in rows() if row["file"] == "a.jpg"} == {""}
    images = read(f"{out}/images.json")["images"]
    assert [image["id"] for image in images] == list(range(1, 9))
    assert [image.get("frame") for image in images] == [*range(7), None]
    assert {r["image_id"] for r in read(f"{out}/detections.json")} <= set(range(1, 9))
    assert files(f"{out}/yolo/labels") == {"a.txt", *(f"{name}/{k:06d}.txt" for k in range(7))}
    assert "1 picture, 1 video (7 frames): " in capsys.readouterr().out
    # The same network on the same frame by itself
    capture = cv2.VideoCapture(name)
    found = Predictor("best.pth", score_threshold=0.1, device="cpu")(capture.read()[1])
    assert [row["class"] for row in of_video if row["frame"] == "0"] == found["names"]


class Capture:
    """A fake of cv2.VideoCapture: so many frames, with what it says of itself."""

    def __init__(self, frames=5, size=(48, 64), opened=True, **said):
        self.left, self.size, self.opened = frames, size, opened
        self.said = {"fps": 10.0, "count": float(frames), "time": 0.0, **said}
        self.released = False

    def __call__(self, path):
        self.path = path
        return self

    def isOpened(self):
        return self.opened

    def read(self):
        self.left -= 1
        if self.left < 0:
            return False, None
        return True, np.full((*self.size, 3), 40 * self.left % 256, np.uint8)

    def get(self, key):
        names = {cv2.CAP_PROP_FPS: "fps", cv2.CAP_PROP_FRAME_COUNT: "count",
                 cv2.CAP_PROP_POS_MSEC: "time"}  # fmt: skip
        return self.said[names[key]]

    def set(self, *_):
        return False

    def release(self):
        self.released = True


@pytest.mark.parametrize("said", [
    {"count": 0.0}, {"count": -9.2e18}, {"fps": 0.0, "time": float("nan")}, {"fps": 9e4},
    {"count": 900.0},
])  # fmt: skip
def test_a_video_with_wrong_words_about_itself_is_done(said, monkeypatch, capsys):
    Path("v.mkv").touch()
    capture = Capture(5, (49, 65), **said)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    assert call("best.pth", "v.mkv", "--score_threshold", 0.01) == 0
    assert capture.released
    rate = 25 if "fps" in said else 10
    images = read("runs/detect/best/images.json")["images"]
    assert [(i["frame"], i["time"]) for i in images] == [(k, k / rate) for k in range(5)]
    assert Path("runs/detect/best/drawn/v.mkv.mp4").stat().st_size > 0
    assert ("v.mkv ends after 5 of the 900 frames" in capsys.readouterr().out) == (
        said.get("count") == 900
    )


@pytest.mark.parametrize("steady, frames", [(True, 3), (False, 21)])
def test_frames_are_drawn_once_or_to_their_times(steady, frames):
    video = detect.VideoFile(Path("v.mp4"), 10.0, steady)
    for when in range(3):
        video.write(np.full((48, 64, 3), 100 * when, np.uint8), float(when))
    video.close()
    assert cv2.VideoCapture("v.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == frames


def test_broken_videos_are_named_and_the_rest_is_done(capsys):
    Path("a.mp4").write_bytes(b"no video")
    film("b.mp4", 3)
    assert call("best.pth", "a.mp4", "b.mp4") == 1
    captured = capsys.readouterr()
    assert re.search(r"skipped: .*a\.mp4: not a video that OpenCV can read\n", captured.err)
    assert "1 video (3 frames), 1 that could not be read" in captured.out


def test_a_video_without_a_frame_is_broken(monkeypatch, capsys):
    Path("a.mp4").touch()
    monkeypatch.setattr(cv2, "VideoCapture", Capture(0))
    assert call("best.pth", "a.mp4") == 1
    assert "no frame of it can be read" in capsys.readouterr().err
    assert files("runs/detect/best") == {"detections.csv", "detections.json", "images.json"}


def test_an_opencv_that_cannot_write_videos_says_so(monkeypatch, capsys):
    film("b.mp4", 3)

    class Writer:
        def __init__(self, *_): ...

        def isOpened(self):
            return False

        def release(self): ...

    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    assert call("best.pth", "b.mp4") == 2
    assert "cannot write mp4; give --no-draw" in capsys.readouterr().err
    assert call("best.pth", "b.mp4", "--no-draw") == 0


# ---------------------------------------------------------------- camera and window


def test_a_camera_is_filmed_in_its_own_time_until_it_is_interrupted(monkeypatch, capsys):
    capture, opencv = Capture(10**6, fps=100.0), cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    real, times = detect.Detector.__call__, iter(range(100))

    def detector(self, frames):
        assert len(frames) == 1
        if next(times) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, frames)

    monkeypatch.setattr(detect.Detector, "__call__", detector)
    assert call("best.pth", "camera") == 130
    assert capture.path == 0 and capture.released
    images = read("runs/detect/best/images.json")["images"]
    assert [image["frame"] for image in images] == list(range(5))
    monkeypatch.setattr(cv2, "VideoCapture", opencv)
    drawn = cv2.VideoCapture("runs/detect/best/drawn/camera_0.mp4")
    # As many frames as fit the time of the last one.
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == pytest.approx(images[-1]["time"] * 100, abs=2)


def test_cameras_are_named_by_number_or_address(capsys, monkeypatch):
    sources, _ = find_sources(["camera", "2", "rtsp://host:55/stream?a=1"], Path("runs"))
    assert [(s.path, s.name) for s in sources] == [
        (0, "camera_0"), (2, "camera_2"),
        ("rtsp://host:55/stream?a=1", "rtsp_host_55_stream"),
    ]  # fmt: skip
    monkeypatch.setattr(cv2, "VideoCapture", Capture(opened=False))
    assert call("best.pth", 3) == 2
    assert "camera_3 cannot be opened; is the camera connected" in capsys.readouterr().err


def test_streams_have_names_of_their_own_without_what_is_secret():
    addresses = ["rtsp://h/a-b", "rtsp://h/a_b", "rtsp://admin:secret@H/a/b?key=secret#secret",
                 "rtsp://secret@h/x@y", "://"]  # fmt: skip
    Path("rtsp_h_x_y").touch()
    film("v.mp4")
    shutil.move("v.mp4", "rtsp_h_x_y")
    sources, _ = find_sources(["rtsp_h_x_y", *addresses, addresses[0], "0", "camera"], Path("runs"))
    assert [(s.path, s.name) for s in sources[1:]] == [
        *zip(addresses, ["rtsp_h_a_b", "rtsp_h_a_b_2", "rtsp_H_a_b_3", "rtsp_h_x_y_2", "_"],
             strict=True),
        (0, "camera_0"),
    ]  # fmt: skip


@pytest.mark.parametrize("said", [{"opened": False}, {"frames": 0}, {"frames": 2}])
def test_the_password_of_a_stream_is_told_nowhere(said, monkeypatch, capfd):
    capture = Capture(**said)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    status = call("best.pth", "rtsp://admin:secret@10.0.0.1/live", "--save", "csv", "json", "voc")
    assert capture.path == "rtsp://admin:secret@10.0.0.1/live"
    assert status == {"opened": 2, "frames": int(said.get("frames") == 0)}[next(iter(said))]
    captured = capfd.readouterr()
    printed = captured.out + captured.err
    assert "rtsp_10_0_0_1_live" in captured.err or status == 0
    written = "".join(
        f"{path} {path.read_bytes()!r}" for path in Path("runs").rglob("*") if path.is_file()
    )
    assert "rtsp_10_0_0_1_live" in written or status
    assert "secret" not in printed + written and "admin" not in printed + written


@pytest.fixture
def window(monkeypatch):
    """A fake desktop: what is shown, and the keys that are pressed."""
    shown, keys = [], {}
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: shown.clear())
    monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image.copy()))
    monkeypatch.setattr(cv2, "waitKey", lambda _: keys.get(len(shown), -1))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: keys.get("visible", 1.0))
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: shown.append("closed"))
    return shown, keys


def test_live_shows_the_camera_with_its_rate_until_q(window, monkeypatch):
    shown, keys = window
    keys[3] = ord("q")
    capture = Capture(100)
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    captions = []
    monkeypatch.setattr(detect, "draw_caption", lambda _, text: captions.append(text))
    assert call("best.pth", "--live") == 0
    assert capture.path == 0 and capture.released
    assert len(shown) == 4 and shown[-1] == "closed"
    assert all(image.shape[0] >= LEGIBLE for image in shown[:3])
    assert all(re.fullmatch(r"[\d.]+ fps", text) for text in captions) and len(captions) == 3
    assert not Path("runs").exists()


def test_live_ends_when_its_window_is_closed_and_keeps_what_is_asked_for(window):
    shown, keys = window
    film("v.mp4", 4)
    keys["visible"] = 0.0
    assert call("best.pth", "v.mp4", "--live", "--out", "kept") == 0
    assert len(shown) == 2
    assert len(read("kept/images.json")["images"]) == 1
    assert files("kept/drawn") == {"v.mp4"}


def test_live_without_a_window_says_what_to_install(monkeypatch, capsys):
    if sys.platform == "linux":
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert call("best.pth", "--live") == 2
        assert "--live needs a display" in capsys.readouterr().err

    def unable(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", unable)
    assert call("best.pth", "--live") == 2
    assert "pip install opencv-python\n" in capsys.readouterr().err


# ---------------------------------------------------------------- networks


def found_by(weights: str, *more: object) -> list[tuple]:
    assert call(weights, "photos", "--out", "o", "--no-draw", "--save", "csv", *more) == 0
    return [
        (row["file"], row["class"], *(float(row[k]) for k in ("score", "x1", "y1", "x2", "y2")))
        for row in rows("o")
    ]


def assert_alike(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-3)
        assert a[3:] == pytest.approx(b[3:], abs=0.5)


@pytest.mark.parametrize("form, package, options", [
    ("openvino", "openvino", []),
    ("onnx", "onnxruntime", ["--with-nms"]),
])  # fmt: skip
def test_an_exported_file_finds_what_its_checkpoint_finds(form, package, options, capsys):
    for name in (package, "onnx", "onnxscript"):
        pytest.importorskip(name)
    for k in range(3):
        picture(f"photos/{k}.png", (96 + k, 72), seed=k)
    file = exported(Path("best.pth").absolute(), form, *options, "--images", "photos")
    assert_alike(found_by(file), found_by("best.pth"))
    assert_alike(found_by(file, "--score_threshold", 0.6), found_by("best.pth", "--score_threshold",
                                                                    0.6))  # fmt: skip
    # Lower than the network's own: what has its suppression inside cannot.
    arguments = ["--score_threshold", "0.01", "--no-draw"]
    assert call(file, "photos", *arguments) == (2 if "--with-nms" in options else 0)
    assert ("export it again" in capsys.readouterr().err) == ("--with-nms" in options)


@pytest.mark.parametrize("options", [(), ("--with-nms",)], ids=str)
def test_a_file_that_was_made_for_fewer_boxes_finds_them_unless_asked(options):
    for name in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(name)
    picture("photos/a.png")
    file = exported(
        Path("best.pth").absolute(), "onnx", "--images", "photos", "--score_threshold", 0.5,
        *options,
    )  # fmt: skip
    assert_alike(found_by(file), found_by("best.pth", "--score_threshold", 0.5))


def test_safetensors_and_names_that_are_given():
    safetensors = pytest.importorskip("safetensors.torch")
    picture("photos/a.png")
    model = torch.load("best.pth", weights_only=True)["model"]
    safetensors.save_file(model, "bare.safetensors")
    Path("names.txt").write_text("eins\nзвезда\nтри\n", encoding="utf-8")
    found = found_by("bare.safetensors", "--classes", "names.txt")
    expected = found_by("best.pth")
    renamed = dict(zip(CLASSES, ("eins", "звезда", "три"), strict=True))
    assert_alike(found, [(file, renamed[name], *rest) for file, name, *rest in expected])


@pytest.mark.parametrize("options", [
    {"max_detections": 3}, {"nms": "soft"}, {"nms": "soft-gaussian"}, {"class_agnostic": True},
    {"amp": "bf16"},
])  # fmt: skip
def test_options_are_those_of_the_network(options):
    image = picture("photos/a.png")
    ((name, value),) = options.items()
    found = found_by("best.pth", "--score_threshold", 0.1, f"--{name}",
                     *([] if value is True else [value]))  # fmt: skip
    expected = Predictor("best.pth", score_threshold=0.1, device="cpu", **options)(image)
    rows = zip(expected["names"], expected["scores"].tolist(), expected["boxes"].tolist(),
               strict=True)  # fmt: skip
    assert_alike(found, [("a.png", label, score, *box) for label, score, box in rows])


# ---------------------------------------------------------------- pictures for people


def test_small_pictures_are_enlarged_with_their_boxes():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 10:50] = 255
    larger, boxes = enlarge(image, np.array([[10, 10, 49, 29]]))
    assert larger.shape == (280, 420, 3) and boxes.tolist() == [[70, 70, 349, 209]]
    ys, xs = np.nonzero(larger[..., 0] > 127)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == tuple(boxes[0])
    for shape in ((LEGIBLE, 400, 3), (3, 2000, 3), (5000, 100, 3)):
        image = np.zeros(shape, np.uint8)
        assert enlarge(image, boxes)[0] is image
    assert enlarge(np.zeros((1, 1, 3), np.uint8), np.zeros((0, 4)))[0].shape[0] >= LEGIBLE


def test_a_caption_stands_in_the_upper_left_corner_of_any_picture():
    for ground in (0, 128, 255):
        image = np.full((100, 200, 3), ground, np.uint8)
        draw_caption(image, "25.0 fps")
        assert (image[:12, :60] == 0).any() and (image[:15, :60] > 200).any()
        assert (image[20:] == ground).all()


def test_names_that_no_font_has_are_told(monkeypatch, capsys):
    from inference import fonts

    monkeypatch.setattr(fonts, "FOLDERS", ())
    saved = torch.load("best.pth", weights_only=True)
    saved["classes"] = ["cell", "\U00012000", "rod"]  # cuneiform
    saved["config"]["classes"] = saved["classes"]
    torch.save(saved, "best.pth")
    picture("a.png")
    assert call("best.pth", "a.png") == 0
    assert 'no font here has "\U00012000"' in capsys.readouterr().out
    assert call("best.pth", "a.png", "--font", "none.ttf") == 2
    assert "none.ttf cannot be used as a font" in capsys.readouterr().err


# ---------------------------------------------------------------- the page


def test_every_command_of_the_page_runs(monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from tools import export

    text = (ROOT / "docs" / "detect.md").read_text("utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 7
    for name in ("photos/a.jpg", "photos/in/b.jpg", "shots/c.png", "one.jpg"):
        picture(name)
    film("film.mp4", 3)
    programs = {"tools.detect": detect.main, "tools.export": export.main}
    for command in commands:
        before, _, last = command.rpartition(" | ")
        if before:
            if sys.platform == "win32":
                continue
            listed = subprocess.run(before, shell=True, stdout=subprocess.PIPE, check=True).stdout
            assert listed.count(b"\0") == 2
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        words = shlex.split(last)
        assert words[:2] == ["python", "-m"]
        assert programs[words[2]](words[3:]) == 0, command
    assert {"boxes", "runs", "best.onnx"} <= set(os.listdir())
    assert files("runs/detect/best/drawn") >= {"a.jpg", "in/b.jpg"}
    for name in re.findall(r"--[\w-]+", text):
        assert name in (ROOT / "demo" / "detect.py").read_text() or name in (
            "--format", "--images", "--no-draw"), name  # fmt: skip


def test_a_name_of_bytes_that_are_no_text(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("names are text there")
    picture("photos/a.jpg")
    picture("photos/b.jpg", seed=1)
    os.rename(b"photos/a.jpg", b"photos/\xff.jpg")
    os.rename(b"photos/b.jpg", b"photos/\xfe.jpg")
    assert call("best.pth", "photos") == 0
    expected = {r"\udcff.jpg", r"\udcfe.jpg"}
    assert {row["file"] for row in rows()} == expected
    assert files("runs/detect/best/drawn") == expected
    images = read("runs/detect/best/images.json")["images"]
    assert {image["file_name"] for image in images} == expected
    assert sorted(image["id"] for image in images) == [1, 2]


def test_drives_that_share_no_folder_are_told(monkeypatch):
    picture("a.jpg")

    def none(_):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", none)
    with pytest.raises(UserError, match="different drives"):
        find_sources(["a.jpg"], Path("runs"))
