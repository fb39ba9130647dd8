"""Small data sets and pictures, built from nothing."""

import http.server
import os
import re
import shlex
import struct
import threading
from pathlib import Path

# Beside other processes of pytest-xdist one computes with its share of the cores: threads that wait
# for each other on taken cores take many times as long. Before torch is imported, and for programs
# that tests start.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

import cv2
import numpy as np
import pytest
import torch
from coco_files import annotation, write_set
from hypothesis import settings
from layouts import voc_xml
from tiny import TINY

import models
from inference import gathered_conv
from train_test import main

# For --hypothesis-profile fuzz: minutes in place of seconds.
settings.register_profile("fuzz", max_examples=5000, deadline=None)

VOC_IMAGE_SIZE = (96, 72)  # width, height
ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "") -> list[str]:
    """Return the blocks of code of a page, such as "docs/detect.md"."""
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the command lines of a page as words."""
    lines = (line for block in blocks(page) for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines]


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu on a machine without one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def importable():
    """Programs that tests start import the project, and the tests' own modules, as tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path == "/half.bin" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A host of ``server.files`` at ``server.base``; ``server.asked`` has the paths asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.files, server.asked = {}, []
        server.base = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write_annotation(path: Path, objects, size=VOC_IMAGE_SIZE) -> None:
    """objects: (name, (xmin, ymin, xmax, ymax) as the XML has them) or (name, box, difficult)."""
    path.write_text(voc_xml(f"{path.stem}.jpg", objects, size), "utf-8")


def write_voc(folder: Path, sets: dict[str, dict[str, list]], size=VOC_IMAGE_SIZE,
              suffix: str = ".jpg") -> Path:
    """Write Annotations/, JPEGImages/ and ImageSets/Main/; sets: name -> {image id: objects}.

    A picture is dim noise with a bright filled rectangle for every object, its colour by the name.
    """
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for set_name, samples in sets.items():
        (folder / "ImageSets/Main" / f"{set_name}.txt").write_text("\n".join(samples) + "\n")
        for image_id, objects in samples.items():
            write_annotation(folder / "Annotations" / f"{image_id}.xml", objects, size)
            rng = np.random.default_rng(int.from_bytes(image_id.encode(), "big"))
            image = rng.integers(0, 60, (size[1], size[0], 3), np.uint8)
            for name, (x1, y1, x2, y2), *_ in objects:
                colour = [120 + (sum(name.encode()) * k) % 130 for k in (7, 31, 67)]
                image[max(int(y1) - 1, 0) : int(y2), max(int(x1) - 1, 0) : int(x2)] = colour
            cv2.imwrite(str(folder / "JPEGImages" / f"{image_id}{suffix}"), image)
    return folder


def with_exif(jpeg: bytes, orientation: int = 1, thumbnail: bytes = b"") -> bytes:
    """The JPEG with an EXIF segment: one orientation entry, then any bytes."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = b"MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    body = b"Exif\0\0" + tiff + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.fixture
def make_voc():
    """`write_voc(folder, {set: {image id: [(name, box[, difficult])]}})` for a test's own data."""
    return write_voc


@pytest.fixture
def voc_folder(tmp_path) -> Path:
    return write_blood(tmp_path / "blood")


def write_blood(folder: Path) -> Path:
    """A bare folder in VOC layout, classes cell, platelet, rod: trainval 6 pictures, test 4.

    One trainval picture has no object, one test object is difficult, platelet is missing in test.
    """
    trainval = {
        "b1": [("cell", (5, 5, 40, 40)), ("rod", (50, 10, 90, 30))],
        "b2": [("cell", (20, 20, 70, 60))],
        "b3": [],
        "b4": [("platelet", (60, 40, 80, 60)), ("cell", (1, 1, 96, 72))],
        "b5": [("rod", (10, 40, 60, 60)), ("rod", (30, 5, 80, 25))],
        "b6": [("cell", (40, 30, 90, 70)), ("platelet", (5, 5, 25, 25))],
    }
    test = {
        "t1": [("cell", (10, 10, 50, 50))],
        "t2": [("rod", (10, 10, 80, 30)), ("cell", (30, 35, 60, 65))],
        "t3": [("cell", (5, 5, 15, 15), True), ("cell", (40, 20, 90, 70))],
        "t4": [("rod", (20, 40, 90, 65))],
    }
    return write_voc(folder, {"trainval": trainval, "test": test})


@pytest.fixture
def voc_devkit(tmp_path) -> Path:
    """A devkit with VOC classes: 2007 trainval (3 pictures) and test (3), 2012 trainval (2)."""
    root = tmp_path / "VOCdevkit"
    write_voc(root / "VOC2007", {
        "trainval": {
            "000001": [("dog", (10, 10, 60, 60)), ("person", (50, 5, 90, 70))],
            "000002": [("cat", (20, 10, 70, 60), True)],
            "000003": [("person", (1, 1, 96, 72))],
        },
        "test": {
            "000004": [("dog", (30, 20, 80, 65))],
            "000005": [("person", (5, 5, 40, 70)), ("person", (8, 8, 20, 20), True)],
            "000006": [("cat", (10, 30, 50, 60)), ("dog", (55, 10, 95, 40))],
        },
    })
    write_voc(root / "VOC2012", {
        "trainval": {
            "2008_000001": [("dog", (15, 15, 70, 50))],
            "2008_000002": [("cat", (20, 20, 60, 70)), ("person", (5, 40, 15, 70))],
        }
    })
    return root


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    """A COCO root with train2017 (3 pictures) and val2017 (2), categories 3 and 7."""
    categories = [{"id": 3, "name": "thing"}, {"id": 7, "name": "other"}]
    for name, ids in (("train2017", (1, 2, 3)), ("val2017", (4, 5))):
        boxes = [annotation(i, i, [20, 10, 40, 40], 3 + 4 * (i % 2)) for i in ids]
        names = {i: f"{i:012d}.jpg" for i in ids}
        write_set(tmp_path / "coco", f"instances_{name}.json", name, names, boxes, VOC_IMAGE_SIZE,
                  categories=categories)  # fmt: skip
    return tmp_path / "coco"


@pytest.fixture
def tiny(monkeypatch):
    """Make "tiny" a version of the network."""
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)


@pytest.fixture
def tf32():
    """Restore after the test what may compute in TF32; monkeypatch cannot restore such flags."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.fixture
def one_tile(request, monkeypatch):
    """Let gathered convolutions have one tile: every trial of another compiles all layers again."""
    monkeypatch.setattr(gathered_conv, "TILES", (getattr(request, "param", (64, 32)),))
    monkeypatch.setattr(gathered_conv, "_fitting", lambda configs, *args, **kwargs: configs)
    gathered_conv._kernel.cache_clear()
    yield
    gathered_conv._kernel.cache_clear()


@pytest.fixture
def call(tiny, tmp_path, voc_folder):
    """main() on the folder of own classes: call(*options) trains or tests the tiny network."""

    def run(*options, root=voc_folder, version="tiny"):
        common = ["--save_folder", tmp_path / "w", "--device", "cpu", "--num_workers", "0"]
        if "--test" not in options:
            common += ["-d", "VOC", "-v", version, "-s", "300", "--root", root, "-b", "2"]
        return main(list(map(str, [*common, *options])))

    run.folder = tmp_path / "w" / "tiny_300"
    return run


@pytest.fixture
def trained(call):
    """The weights of a run of two epochs."""
    assert call("-max", 2, "--date", "a", "--test_frequency", 0) == 0
    return call.folder / "a" / "Final_tiny_VOC.pth"
